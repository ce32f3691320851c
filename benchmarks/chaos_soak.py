"""A long fine-tuning run, watched from outside: does its memory grow, does it leak file handles, does it slow down?"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import chaos_run
import torch

from vla_energy.durable import MANIFEST

WARM = 0.2  # of the run: caches and allocators fill
SLOWER = 1.1  # of the last third's CPU time a step over the first third's
WINDOWS, STUDENT = 12, 2.228  # of a trend, see there; the quantile 97.5 % of t for ten degrees of freedom
_CYCLE = 200  # steps between two validations, with four saves: a window of so many holds all that recurs
SHORT = 600.0  # seconds; in shorter runs allocators and caches still fill
_STOP = 300.0  # seconds that the step under way and its save may take
_KEPT = 240  # samples in the result


@dataclass(frozen=True)
class Sample:
    """Of the child at one moment, from /proc.

    Attributes:
        seconds: since the first sample.
        step: steps taken.
        anonymous, resident: bytes; anonymous memory is what the process itself allocated, resident memory also
            counts mapped files, which the system drops when others need the room.
        handles: open file descriptors.
        threads: of the process.
        cpu: seconds of CPU time so far, all threads.
        work: seconds of CPU time of a fixed piece of work just now: what else runs on the machine makes it slower too.
    """

    seconds: float
    step: int
    anonymous: int
    resident: int
    handles: int
    threads: int
    cpu: float
    work: float


def soak(minutes: float, out: Path, say: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Fine-tunes the shipped policy for `minutes`, with validation and saves, and ends the run by SIGTERM.

    Args:
        minutes: of the training itself; the start is not counted.
        out: a folder of its own, deleted first.
        say: called with the result so far, once a minute.

    Returns:
        What `verdict` finds, `minutes`, `steps`, `saved` (the step of the last checkpoint), `samples` (some of them),
        `allocated` (see `held`), `failure` (the log's end, where the child ended by itself or not as told); `ok`.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    chaos_run.warm_up()
    settings = replace(
        chaos_run.config(out, "run", 10**9, _CYCLE // 4), use_val_set=True, val_freq=_CYCLE, val_time_limit=5
    )
    samples, log, allocated = list[Sample](), out / "run.log", out / "allocated.jsonl"
    pid = chaos_run.start(settings, log, allocated)
    every, said, begun = min(5.0, minutes * 60 / 40), time.monotonic(), None
    while (code := chaos_run.exit_code(pid)) is None:
        time.sleep(every)
        step = chaos_run.last_step(settings.run_dir)
        if not step:
            continue
        begun = begun or time.monotonic()
        try:
            samples.append(look(pid, time.monotonic() - begun, step))
        except FileNotFoundError:  # it ended just now
            continue
        if say is not None and time.monotonic() - said > 60 and len(samples) > 20:
            said = time.monotonic()
            say(_result(samples, allocated, None, None))
        if samples[-1].seconds >= minutes * 60:
            return _result(samples, allocated, settings.run_dir, _stop(pid, log))
    return _result(samples, allocated, settings.run_dir, f"exit code {code}: {log.read_text()[-2000:]}")


def fixed_work() -> float:
    """Seconds of CPU time for some matrix products and interpreter steps."""
    matrix = torch.ones(256, 256)
    started = time.thread_time()
    for _ in range(10):
        (matrix @ matrix).softmax(1)
        sum(value * value for value in range(10_000))
    return time.thread_time() - started


def look(pid: int, seconds: float, step: int) -> Sample:
    """A sample of process `pid`. Raises FileNotFoundError where it is gone."""
    process = Path("/proc") / str(pid)
    facts = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    if "VmRSS" not in facts:
        raise FileNotFoundError(process)
    ticks = (process / "stat").read_text().rpartition(")")[2].split()[11:13]
    return Sample(
        seconds,
        step,
        1024 * int(facts["RssAnon"].split()[0]),
        1024 * int(facts["VmRSS"].split()[0]),
        len(os.listdir(process / "fd")),
        int(facts["Threads"]),
        sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"),
        fixed_work(),
    )


def verdict(samples: Sequence[Sample]) -> dict[str, Any]:
    """What a run's samples say, the first `WARM` of them left out.

    Returns:
        `memory`: bytes an hour of anonymous memory with its standard error, `mib_first`, `mib_last` (medians of the
        first and last third), `within_noise` (the slope is not above `STUDENT` standard errors); `handles` and
        `threads`: the fewest of each third, `grows` where the last third's fewest are more: what is open only for a
        moment does not count; `step`: seconds of CPU time a step, medians of the first and last third; `relative`, the
        same in units of `fixed_work` at that time, with standard errors; `steady` (the relative time is not longer by
        more than a tenth or two standard errors); `long_enough`: in runs shorter than
        `SHORT` memory and step time are not judged; `ok`.

    Raises:
        ValueError: too few samples or steps.
    """
    if len(samples) < 15:
        raise ValueError(f"{len(samples)} samples are too few for a verdict: 15 are needed")
    rows = [row for row in samples if row.seconds >= WARM * samples[-1].seconds]
    third = len(rows) // 3
    first, last = rows[:third], rows[-third:]
    slope, error = trend([row.seconds / 3600 for row in rows], [float(row.anonymous) for row in rows])
    megabytes = [statistics.median(row.anonymous for row in part) / 2**20 for part in (first, last)]
    memory = {"slope_mib_per_hour": slope / 2**20, "standard_error": error / 2**20}
    memory |= {"mib_first": megabytes[0], "mib_last": megabytes[1], "within_noise": slope <= STUDENT * error}
    result: dict[str, Any] = {"memory": memory}
    for name in ("handles", "threads"):
        fewest = [min(getattr(row, name) for row in part) for part in (rows[:third], rows[third:-third], last)]
        result[name] = {"fewest": fewest, "most": max(getattr(r, name) for r in rows), "grows": fewest[2] > fewest[0]}
    result["step"] = _steady(first, last, samples[-1].step)
    grows = result["handles"]["grows"] or result["threads"]["grows"]
    result["long_enough"] = samples[-1].seconds >= SHORT
    flat = memory["within_noise"] and result["step"]["steady"]
    return result | {"ok": not grows and (flat or not result["long_enough"])}


def of_stored(result: dict[str, Any]) -> dict[str, Any]:
    """A stored result with its memory judged by today's `verdict`; older rules wrote others.

    At most `_KEPT` samples are stored, so that its numbers differ a little from those of the run itself. What is looked
    at by its fewest, or step by step, is as the run said it of all.
    """
    memory = verdict([Sample(**row) for row in result["samples"]])["memory"]
    grows = result["handles"]["grows"] or result["threads"]["grows"]
    flat = memory["within_noise"] and result["step"]["steady"]
    return result | {"memory": memory, "ok": flat and not grows and result["failure"] is None}


def _steady(first: Sequence[Sample], last: Sequence[Sample], steps: int) -> dict[str, Any]:
    """CPU time a step of two thirds: medians over windows, and whether the last is slower by more than the noise."""
    window = min(_CYCLE, max(1, steps // 20))
    costs = [_costs(part, window) for part in (first, last)]
    seconds, relative = ([[cost[kind] for cost in part] for part in costs] for kind in (0, 1))
    medians = [statistics.median(part) for part in relative]
    errors = [statistics.stdev(part) / len(part) ** 0.5 for part in relative]
    allowed = max((SLOWER - 1) * medians[0], 2 * math.hypot(*errors))
    return {
        "cpu_seconds": [statistics.median(part) for part in seconds],
        "relative": medians,
        "standard_errors": errors,
        "windows": [len(part) for part in costs],
        "ratio": medians[1] / medians[0],
        "steady": medians[1] - medians[0] <= allowed,
    }


def _costs(rows: Sequence[Sample], window: int) -> list[tuple[float, float]]:
    """CPU seconds a step, and these over the fixed work's, of windows of so many steps or the few more to a sample."""
    found, start = [], 0
    for index, row in enumerate(rows):
        steps = row.step - rows[start].step
        if steps >= window:
            cost = (row.cpu - rows[start].cpu) / steps
            found.append((cost, cost / statistics.fmean(other.work for other in rows[start : index + 1])))
            start = index
    if len(found) < 2:
        raise ValueError(f"{rows[-1].step - rows[0].step} steps in a third are too few for a verdict: --minutes more")
    return found


def trend(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope of `y` over `x` and its standard error: of a least-squares line through the medians of twelve windows.

    A validation's or a save's buffers are peaks of seconds, and the heap's noise lasts for minutes. The median of a
    window holds neither; windows' medians are nearly independent, so that Student's t with ten degrees of freedom
    judges them (`STUDENT`). Newey and West's error over all samples, which stood here before, was exceeded twice over
    by one flat series in ten.
    """
    windows = min(WINDOWS, len(x) // 2)
    edges = [round(index * len(x) / windows) for index in range(windows + 1)]
    parts = [slice(first, last) for first, last in pairwise(edges)]
    x, y = [statistics.fmean(x[part]) for part in parts], [statistics.median(y[part]) for part in parts]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    away = [value - mean_x for value in x]
    spread = sum(value * value for value in away)
    slope = sum(a * (value - mean_y) for a, value in zip(away, y, strict=True)) / spread
    left = sum((value - mean_y - slope * a) ** 2 for a, value in zip(away, y, strict=True))
    return slope, math.sqrt(left / (windows - 2) / spread)


def _stop(pid: int, log: Path) -> str | None:
    """Ends the child as a user would; what was not as told, None where all was."""
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP
    while (code := chaos_run.exit_code(pid)) is None:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return f"no end {_STOP:.0f} s after SIGTERM: {log.read_text()[-2000:]}"
        time.sleep(0.1)
    return None if code == 128 + signal.SIGTERM else f"exit code {code} after SIGTERM: {log.read_text()[-2000:]}"


def held(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """How what the child has allocated and not freed changes, the first `WARM` of the run left out.

    Args:
        rows: of `chaos_run.allocations` after each validation, with `seconds`.

    Returns:
        Of `bytes` and `blocks`: `first` and `last` (medians of thirds), `slope_per_hour`, `standard_error`; `rows`,
        how many there were. None where there are fewer than fifteen.
    """
    used = [row for row in rows if row["seconds"] >= WARM * rows[-1]["seconds"]]
    if len(used) < 15:
        return None
    third, hours = len(used) // 3, [row["seconds"] / 3600 for row in used]
    result: dict[str, Any] = {"rows": len(used)}
    for name in ("bytes", "blocks"):
        values = [float(row[name]) for row in used]
        slope, error = trend(hours, values)
        ends = {"first": statistics.median(values[:third]), "last": statistics.median(values[-third:])}
        result[name] = ends | {"slope_per_hour": slope, "standard_error": error}
    return result


def _result(samples: Sequence[Sample], allocated: Path, run: Path | None, failure: str | None) -> dict[str, Any]:
    result: dict[str, Any] = {"ok": False}
    try:
        result = verdict(samples)
    except ValueError as error:
        failure = failure or str(error)
    if samples:
        result |= {"minutes": samples[-1].seconds / 60, "steps": samples[-1].step}
        kept = samples[:: -(-len(samples) // _KEPT)]
        result["samples"] = [{**asdict(row), "seconds": round(row.seconds, 1)} for row in kept]
    if allocated.is_file():
        lines = allocated.read_text().splitlines(keepends=True)  # the last one may be being written
        result["allocated"] = held([json.loads(line) for line in lines if line.endswith("\n")])
    manifest = None if run is None else run / "latest" / MANIFEST
    if manifest is not None and manifest.is_file():
        result["saved"] = json.loads(manifest.read_text())["step"]
    return result | {"failure": failure, "ok": result["ok"] and failure is None}
