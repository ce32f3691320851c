"""A run that is killed again and again ends bit for bit as one that was not."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import chaos_run
import torch

from vla_energy.durable import MANIFEST, read_torch
from vla_energy.finetune.checkpoints import STATE, find
from vla_energy.finetune.config import FinetuneConfig

SAVE_FREQ = 2
PLACES = ("before_steps", "in_steps", "in_writing", "after_seal", "between_renames")
MODES = ("save", "step", "any")
_CLOCKS = ("frames_per_second", "energy/ms")
_PATIENCE = 900.0  # seconds without a kill or an end: the child hangs


@dataclass(frozen=True)
class Times:
    """Of the uninterrupted run, in seconds: until the first step is logged, of a cycle of steps and save, of a save."""

    start: float
    cycle: float
    save: float


def kill(kills: int, seed: int, out: Path, say: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Kills one run `kills` times with SIGKILL and compares its end with that of an uninterrupted one.

    The moments are drawn in turn: in a save (uniform over the time that one takes), after the first step (over two
    cycles of steps and save), at any time since the start (over start and one cycle). Where they fell is looked up
    afterwards, in what the killed run left.

    Args:
        out: a folder of its own, deleted first.
        say: called with the result so far after each kill.

    Returns:
        `kills`; by where they fell `before_steps`, `in_steps`, `in_writing` and `after_seal` of a save, and
        `between_renames`; `steps` of the run; `lost`, the steps that were taken again; `times`; `compared`, the
        number of files, rows and values; `differences` from the uninterrupted run; `leftovers`, temporary files that
        are still there; `failure`, the log of a child that ended by itself and not well; `ok`.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    chaos_run.warm_up()
    draw, steps = random.Random(seed), kills + 6
    whole = chaos_run.config(out / "whole", "run", steps, SAVE_FREQ)
    killed = replace(whole, run_root_dir=out / "killed")
    result: dict[str, Any] = {"kills": 0, **dict.fromkeys(PLACES, 0), "steps": steps, "lost": 0}
    result |= {"differences": [], "failure": None, "ok": False}
    code, times = _uninterrupted(whole, out / "whole.log")
    if code or times is None:
        return result | {"failure": f"exit code {code}: {(out / 'whole.log').read_text()[-2000:]}"}
    result["times"] = asdict(times)
    while result["kills"] <= kills:
        before = _partial(killed)
        pid = chaos_run.start(replace(killed, resume=(killed.run_dir / "metrics.jsonl").exists()), out / "killed.log")
        begun = _seen(killed.run_dir)
        mode = MODES[result["kills"] % len(MODES)]
        code = _watch(pid, killed, times, draw, mode) if result["kills"] < kills else _wait(pid)
        if code != -signal.SIGKILL:
            break
        _count(result, killed, before, begun)
        if say is not None:
            say(result)
    if code:
        return result | {"failure": f"exit code {code}: {(out / 'killed.log').read_text()[-2000:]}"}
    result["differences"], result["compared"] = compare(whole, killed)
    result["leftovers"] = sorted(str(path.relative_to(out)) for path in out.rglob(".*"))
    result["ok"] = not result["differences"] and result["kills"] == kills
    return result


def _uninterrupted(settings: FinetuneConfig, log: Path) -> tuple[int, Times | None]:
    """Runs it, its exit code, and how long things took; None where it saved less than twice."""
    partial, run = settings.run_dir / ".latest.partial", settings.run_dir
    started, first, began = time.monotonic(), 0.0, list[float]()
    saves: list[float] = []
    pid = chaos_run.start(settings, log)
    while (code := chaos_run.exit_code(pid)) is None:
        now = time.monotonic()
        first = first or (now if chaos_run.last_step(run) else 0.0)
        if len(began) == len(saves) and partial.exists():
            began.append(now)
        elif len(began) > len(saves) and not partial.exists():
            saves.append(now - began[-1])
        time.sleep(0.002)
    if len(saves) < 2:
        return code, None
    cycles = [later - earlier for earlier, later in itertools.pairwise(began)]
    return code, Times(first - started, statistics.median(cycles), statistics.median(saves))


def _watch(pid: int, settings: FinetuneConfig, times: Times, draw: random.Random, mode: str) -> int:
    """Kills the child at a moment drawn for `mode`, see `kill`; its exit code."""
    run, now = settings.run_dir, time.monotonic()
    begun, before, deadline = _seen(run), _partial(settings), now + _PATIENCE
    moment = now + draw.uniform(0.0, times.start + times.cycle) if mode == "any" else None
    while (code := chaos_run.exit_code(pid)) is None:
        now = time.monotonic()
        # The log is opened with the first step: from here on steps are taken.
        if moment is None and mode == "step" and _seen(run) != begun:
            moment = now + draw.uniform(0.0, 2 * times.cycle)
        if moment is None and mode == "save" and _partial(settings) not in (before, None):
            moment = now + draw.uniform(0.0, times.save)
        last = _seen(run) != begun and chaos_run.last_step(run) >= settings.max_steps - 1
        if (moment is not None and now >= moment) or last or now > deadline:
            os.kill(pid, signal.SIGKILL)
            return _wait(pid)
        time.sleep(0.001)
    return code


def _seen(run: Path) -> tuple[int, int]:
    """Changes when the child writes its metrics."""
    try:
        facts = (run / "metrics.jsonl").stat()
    except FileNotFoundError:
        return 0, 0
    return facts.st_size, facts.st_mtime_ns


def _partial(settings: FinetuneConfig) -> tuple[int, int] | None:
    """Of the folder of a save under way, or of one that a kill left; None without."""
    try:
        facts = (settings.run_dir / ".latest.partial").stat()
    except FileNotFoundError:
        return None
    return facts.st_ino, facts.st_ctime_ns


def _wait(pid: int) -> int:
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def _count(
    result: dict[str, Any], settings: FinetuneConfig, before: tuple[int, int] | None, begun: tuple[int, int]
) -> None:
    run = settings.run_dir
    result["kills"] += 1
    if (run / ".latest.old").exists() and not (run / "latest").exists():
        result["between_renames"] += 1
    elif _partial(settings) not in (before, None):
        sealed = (run / ".latest.partial" / MANIFEST).exists()
        result["after_seal" if sealed else "in_writing"] += 1
    else:
        result["before_steps" if _seen(run) == begun else "in_steps"] += 1
    manifests = [folder / MANIFEST for folder in (run / "latest", run / ".latest.old")]
    safe = next((json.loads(path.read_text())["step"] for path in manifests if path.is_file()), 0)
    result["lost"] += max(0, chaos_run.last_step(run) - safe)


def compare(whole: FinetuneConfig, killed: FinetuneConfig) -> tuple[list[str], dict[str, int]]:
    """What differs between two finished runs, and how much was compared.

    Files of the last checkpoint by their checksums, the training state (optimiser, random state, guard, ...) value by
    value, and the rows of metrics, which also show which frames were seen. Readings of a clock are left out.
    """
    folders = [find(settings) for settings in (whole, killed)]
    files = [json.loads((folder / MANIFEST).read_text())["files"] for folder in folders]
    names = sorted((files[0].keys() | files[1].keys()) - {STATE})
    found = [name for name in names if files[0].get(name) != files[1].get(name)]
    first, second = (flat(read_torch(folder / STATE), STATE) for folder in folders)
    found += [where for where in sorted(first.keys() | second.keys()) if first.get(where) != second.get(where)]
    rows = [_rows(settings.run_dir) for settings in (whole, killed)]
    if [row["step"] for row in rows[1]] != list(range(1, whole.max_steps + 1)):
        found.append("metrics.jsonl: steps missing or doubled")
    found += [f"metrics.jsonl: step {a['step']}" for a, b in zip(*rows, strict=False) if a != b]
    return found[:20], {"files": len(names), "values": len(first), "rows": len(rows[0])}


def _rows(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in _CLOCKS} for row in rows]


def flat(value: Any, where: str) -> dict[str, str]:
    """The leaves of nested values by their paths, as text that is equal only where they are bit for bit the same."""
    if where.endswith(tuple(f".{name}" for name in _CLOCKS)):
        return {}
    if isinstance(value, dict):
        inner = {f"{where}.{key}": part for key, part in value.items()}
    elif isinstance(value, (list, tuple)):
        inner = {f"{where}[{index}]": part for index, part in enumerate(value)}
    elif isinstance(value, torch.Tensor):
        content = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return {where: f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(content).hexdigest()}"}
    else:
        return {where: f"{type(value).__name__} {value!r}"}
    leaves = {where: f"{type(value).__name__} {len(value)}"}
    for path, part in inner.items():
        leaves |= flat(part, path)
    return leaves
