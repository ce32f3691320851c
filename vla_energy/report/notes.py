"""What to know before believing a page: what is not there, is not finished, or cannot be compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vla_energy.fingerprint import fingerprint
from vla_energy.results import FOOTAGE, SETTINGS, SHAPES

if TYPE_CHECKING:
    from vla_energy.report.runs import Run

_NAMED = 8  # tasks in a sentence


def tell_missing(run: Run, home: Path | None) -> None:
    """Fills in `Run.missing`; `home` is the folder with `metrics.jsonl`."""
    name = run.folder
    if run.rows and not run.metrics.get("energy"):
        run.missing["held-out ranking"] = "no validation of a head in metrics.jsonl: train with --use_val_set True"
    if run.rows and not run.settings:
        run.missing["settings"] = f"no {SETTINGS}: flags and versions of this run are not known"
    if run.shapes is None:
        run.missing["landscapes and the gate's curve"] = (
            f"no {SHAPES}: written at the end of a run with --use_val_set True and an energy head"
        )
    if run.preflight is None:
        run.missing["preflight"] = f"no preflight.json: vla-energy preflight ... --out {name}, or --preflight FILE"
    if run.rollout is None:
        reason = run.metrics.get("rollout_reason")
        run.missing["closed loop"] = (
            f"no rollout.json{f' ({reason})' if reason else ''}: vla-energy rollout ... --out "
            + (f"{name}/rollout.json, or --rollout FILE")
        )
    if run.footage is None:
        run.missing["frames of an episode"] = f"no {FOOTAGE}: vla-energy rollout ... --footage {name}/{FOOTAGE}"


def tell_others(run: Run, checkpoints: Sequence[Path]) -> None:
    """Notes results that were made with another checkpoint than those that are there now."""
    made_with = {
        "preflight's results": (run.preflight or {}).get("fingerprint"),
        "the rollouts": (((run.rollout or {}).get("meta") or {}).get("checkpoint") or {}).get("fingerprint"),
    }
    if not checkpoints:
        return
    for name, mark in made_with.items():
        if mark is not None and all(fingerprint(folder) != mark for folder in checkpoints):
            run.notes.append(
                f"{name} were made with another checkpoint than this run's, or before it was trained on or got its "
                "head or memory: run it again"
            )


def tell_unfinished(run: Run) -> None:
    """Notes tasks of the rollouts that have no results yet."""
    rollout = run.rollout or {}
    asked = (rollout.get("settings") or {}).get("tasks") or []
    outstanding = [task for task in asked if task not in rollout["tasks"]]
    if not outstanding and rollout.get("complete", True) is not False:
        return
    which = ""
    if outstanding:
        more = f" and {len(outstanding) - _NAMED} more" if len(outstanding) > _NAMED else ""
        which = f": {len(outstanding)} of {len(asked)} tasks have no results ({', '.join(outstanding[:_NAMED])}{more})"
    run.notes.append(f"the rollouts are not finished{which}; what is said of all tasks is of those that are")
