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
    if _energy(run).get("enabled") is False:
        run.missing["energy head"] = "this run trained with --energy.enabled False: it has no ranking and no gate"
    else:
        _tell_unmeasured(run, home)
    if run.rows and not run.settings:
        run.missing["settings"] = f"no {SETTINGS}: flags and versions of this run are not known"
    if run.rollout is None:
        reason = run.metrics.get("rollout_reason")
        run.missing["closed loop"] = (
            f"no rollout.json{f' ({reason})' if reason else ''}: vla-energy rollout ... --out "
            + (f"{name}/rollout.json, or --rollout FILE")
        )
    if run.footage is None:
        run.missing["frames of an episode"] = f"no {FOOTAGE}: vla-energy rollout ... --footage {name}/{FOOTAGE}"


def _tell_unmeasured(run: Run, home: Path | None) -> None:
    """What validation and preflight would tell of the head."""
    remedy = "train with --use_val_set True"
    # Only train-head leaves a head beside its metrics; while it trains, its settings look like any frozen policy's.
    if home is not None and any(home.glob("energy_head--*")):
        remedy = "train-head with --val-cache DIR"
    elif _energy(run).get("freeze_backbone") is True:
        remedy += ", train-head with --val-cache DIR"
    if run.rows and not run.metrics.get("energy"):
        run.missing["held-out ranking"] = f"no validation of a head in metrics.jsonl: {remedy}"
    if run.shapes is None:
        run.missing["landscapes and the gate's curve"] = (
            f"no {SHAPES}: written at each validation of an energy head: {remedy}"
        )
    if run.preflight is None:
        where = f"--out {run.folder}, or --preflight FILE"
        run.missing["preflight"] = f"no preflight.json: vla-energy preflight ... {where}"


def _energy(run: Run) -> dict[str, Any]:
    """Its flags `--energy.*`; empty where it has stored none."""
    stored = run.settings.get("energy")
    return stored if isinstance(stored, dict) else {}


def rerank_margin(run: Run) -> Any:
    """The margin that validation's reranking has, of the settings."""
    rerank = _energy(run).get("rerank")
    return rerank.get("margin", "not known") if isinstance(rerank, dict) else "not known"


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
    rolls = {"tasks": {label: sorted(rollout["tasks"]) for label, rollout in rolled.items()}}
    for name in _ROLLED:
        stored = {label: (rollout.get("settings") or {}).get(name) for label, rollout in rolled.items()}
        rolls[name] = {label: value for label, value in stored.items() if value is not None}
    if differing := [f"{name} ({_listed(found)})" for name, found in rolls.items() if _differ(found)]:
        told.append(f"the rollouts differ in {'; '.join(differing)}: their successes are not of the same episodes")
    flat = [flat_settings(run.settings) for run in runs if _energy(run).get("enabled") is not False]
    names = {name for settings in flat for name in settings if name.startswith(_SCALES)}
    stored = {name: {n: settings[name] for n, settings in enumerate(flat) if name in settings} for name in names}
    other = {name.rpartition(".")[0] for name, values in stored.items() if _differ(values)}
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
