"""A run that is killed again and again ends bit for bit as one that was not."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import chaos_run
import torch

from vla_energy.durable import MANIFEST, read_torch
from vla_energy.finetune.checkpoints import STATE, find
from vla_energy.finetune.config import FinetuneConfig

SAVE_FREQ = 2
_CLOCKS = ("frames_per_second", "energy/ms")
_PATIENCE = 900.0  # seconds without a kill or an end: the child hangs


def kill(kills: int, seed: int, out: Path, say: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Kills one run `kills` times with SIGKILL and compares its end with that of an uninterrupted one.

    Every second kill waits for the folder of a save that is under way, the others for a random time after a step.

    Args:
        out: a folder of its own, deleted first.
        say: called with the result so far after each kill.

    Returns:
        `kills`; of them `in_saves` (a folder half written), `between_renames` and `in_steps`; `steps` of the run;
        `lost`, the steps that were taken again; `differences` from the uninterrupted run; `failure`, the log of a
        child that ended by itself and not well; `ok`.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    chaos_run.warm_up()
    draw = random.Random(seed)
    steps = 2 * kills + 6
    whole = chaos_run.config(out / "whole", "run", steps, SAVE_FREQ)
    killed = replace(whole, run_root_dir=out / "killed")
    result: dict[str, Any] = {"kills": 0, "in_saves": 0, "between_renames": 0, "in_steps": 0, "steps": steps, "lost": 0}
    pid, started = chaos_run.start(whole, out / "whole.log"), time.monotonic()
    while (code := chaos_run.exit_code(pid)) is None:
        time.sleep(0.05)
    result |= {"seconds_uninterrupted": time.monotonic() - started, "differences": [], "failure": None, "ok": False}
    if code:
        return result | {"failure": (out / "whole.log").read_text()[-2000:]}
    while result["kills"] <= kills:
        pid = chaos_run.start(replace(killed, resume=(killed.run_dir / "metrics.jsonl").exists()), out / "killed.log")
        more = result["kills"] < kills
        code = _watch(pid, killed, draw, result["kills"] % 2 == 0) if more else _wait(pid)
        if code != -signal.SIGKILL:
            break
        _count(result, killed)
        if say is not None:
            say(result)
    if code:
        return result | {"failure": f"exit code {code}: {(out / 'killed.log').read_text()[-2000:]}"}
    result["differences"] = compare(whole, killed)
    result["ok"] = not result["differences"] and result["kills"] == kills
    return result


def _watch(pid: int, settings: FinetuneConfig, draw: random.Random, in_save: bool) -> int:
    """Kills the child at a moment drawn after its first step, or in a save; its exit code."""
    run, partial = settings.run_dir, settings.run_dir / ".latest.partial"
    begun = _seen(run)
    deadline, first, moment = time.monotonic() + _PATIENCE, None, None
    while (code := chaos_run.exit_code(pid)) is None:
        now = time.monotonic()
        if first is None and _seen(run) != begun:
            # The log is opened with the first row's step: from here on steps are taken.
            first = now
            moment = None if in_save else now + draw.uniform(0.0, 1.5)
        if first is not None and in_save and moment is None and partial.exists():
            moment = now + draw.uniform(0.0, 0.15)
        last = first is not None and chaos_run.last_step(run) >= settings.max_steps - 1
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


def _wait(pid: int) -> int:
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def _count(result: dict[str, Any], settings: FinetuneConfig) -> None:
    run = settings.run_dir
    result["kills"] += 1
    if (run / ".latest.old").exists() and not (run / "latest").exists():
        result["between_renames"] += 1
    elif (run / ".latest.partial").exists():
        result["in_saves"] += 1
    else:
        result["in_steps"] += 1
    for folder in (run / "latest", run / ".latest.old"):
        if (folder / MANIFEST).is_file():
            result["lost"] += max(0, chaos_run.last_step(run) - json.loads((folder / MANIFEST).read_text())["step"])
            break


def compare(whole: FinetuneConfig, killed: FinetuneConfig) -> list[str]:
    """What differs between two finished runs: files of the last checkpoint, training state, rows of metrics."""
    folders = [find(settings) for settings in (whole, killed)]
    files = [json.loads((folder / MANIFEST).read_text())["files"] for folder in folders]
    names = sorted((files[0].keys() | files[1].keys()) - {STATE})
    found = [name for name in names if files[0].get(name) != files[1].get(name)]
    first, second = (read_torch(folder / STATE) for folder in folders)
    found += _differences(first, second, STATE)
    rows = [_rows(settings.run_dir) for settings in (whole, killed)]
    if [row["step"] for row in rows[1]] != list(range(1, whole.max_steps + 1)):
        found.append("metrics.jsonl: steps missing or doubled")
    found += [f"metrics.jsonl: step {a['step']}" for a, b in zip(*rows, strict=False) if a != b]
    return found[:20]


def _rows(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in _CLOCKS} for row in rows]


def _differences(first: Any, second: Any, where: str) -> list[str]:
    """Paths at which two nested values are not bit for bit the same."""
    if type(first) is not type(second):
        return [where]
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return [f"{where}: other keys"]
        return [path for key in first for path in _differences(first[key], second[key], f"{where}.{key}")]
    if isinstance(first, (list, tuple)):
        if len(first) != len(second):
            return [f"{where}: other length"]
        return [
            path
            for i, (a, b) in enumerate(zip(first, second, strict=True))
            for path in _differences(a, b, f"{where}[{i}]")
        ]
    if isinstance(first, torch.Tensor):
        same = first.dtype == second.dtype and first.shape == second.shape
        equal = same and first.contiguous().numpy().tobytes() == second.contiguous().numpy().tobytes()
        return [] if equal else [where]
    return [] if first == second or (first != first and second != second) else [where]
