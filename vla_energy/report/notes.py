"""What to know before believing a page: what is not there, is not finished, or cannot be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla_energy.fingerprint import fingerprint
from vla_energy.results import FOOTAGE, SETTINGS, SHAPES

if TYPE_CHECKING:
    from vla_energy.report.runs import Run

_NAMED = 8  # tasks in a sentence
_SCALES = ("energy.loss.", "energy.negatives.", "energy.range.", "energy.temperature.", "energy.rollouts.")
"""Settings that decide what a loss, an energy or a win rate in training is a measure of."""
_ROLLED = ("episodes", "seed", "replan_every", "backend", "step_limits")
"""Settings that decide which episodes were run, and how."""


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


def flat_settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their name with dots."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flat_settings(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def across(runs: Sequence[Run]) -> list[str]:
    """Sentences on what of several runs cannot be compared; what a run did not store is not held against it."""
    told = []
    rolled = {run.label: run.rollout for run in runs if run.rollout is not None}
    values = {"tasks": {label: sorted(rollout["tasks"]) for label, rollout in rolled.items()}}
    for name in _ROLLED:
        stored = {label: (rollout.get("settings") or {}).get(name) for label, rollout in rolled.items()}
        values[name] = {label: value for label, value in stored.items() if value is not None}
    if differing := [f"{name} ({_listed(found)})" for name, found in values.items() if _differ(found)]:
        told.append(f"the rollouts differ in {'; '.join(differing)}: their successes are not of the same episodes")
    flat = [flat_settings(run.settings) for run in runs if run.settings]
    names = {name for settings in flat for name in settings if name.startswith(_SCALES)}
    other = {name.rpartition(".")[0] for name in names if _differ({n: s.get(name) for n, s in enumerate(flat)})}
    if other:
        told.append(
            f"settings below {', '.join(sorted(other))} differ: losses, energies and win rates in training of these "
            "runs are of different scales; compare L1, rank correlation and success"
        )
    return told


def _differ(values: Mapping[Any, Any]) -> bool:
    return len({json.dumps(value, sort_keys=True) for value in values.values()}) > 1


def _listed(values: Mapping[str, Any]) -> str:
    """Value by run, where they are short."""
    if any(isinstance(value, (list, dict)) for value in values.values()):
        return ", ".join(f"{label}: {len(value)}" for label, value in values.items())
    return ", ".join(f"{label}: {value}" for label, value in values.items())
