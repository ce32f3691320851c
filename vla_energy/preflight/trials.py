"""Evaluation rollouts as evidence: which arm succeeded most on each task, in episodes that are not the evaluation.

Held-out L1 is a proxy of success and wrong on some tasks (docs/does-it-help.md); a few episodes with each arm are not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vla_energy.arms import split_arm

_NEVER = ("recommended",)  # what is to be decided here cannot be what decides
_FEWEST = 8
"""Episodes an arm below which a task's trials are no evidence: at 8, an arm that solves 30 percent looks at least as
good as one that solves 70 in 1 of 13 tries."""
_SAME = ("replan_every", "backend")


class TrialsError(ValueError):
    """A file of rollouts that cannot serve as evidence, and why."""


@dataclass(frozen=True)
class Trials:
    """Paired episodes of one task.

    Attributes:
        successes: by arm, in the order of the files.
        episodes: how many each arm has, on the same seeds.
        seeds: the seeds, sorted.
        margins: the gates behind which the modes ran, by mode; inf: shut, so the policy was executed.
        replan_every: steps between two decisions, of arms without `@n`.
    """

    successes: dict[str, int]
    episodes: int
    seeds: tuple[int, ...]
    margins: Mapping[str, float] = field(default_factory=dict)
    replan_every: int = 0

    def counts(self, arm: str, gates: Mapping[str, float]) -> bool:
        """Whether an arm's episodes say what it would do behind `gates`, calibrated ones: no margin below was tried.

        Behind a shut gate it executed the policy, and no success of a few episodes opens a gate that was found unsafe.
        """
        mode = split_arm(arm)[0]
        return gates.get(mode, 0.0) <= self.margins.get(mode, 0.0) < math.inf

    def best(self, expected: str, gates: Mapping[str, float] | None = None) -> str:
        """The arm with the most successes; among equals `expected`, then the policy, then the first.

        An arm that was not tried is not overruled by a policy that nothing else tried beats: then it is `expected`
        that stays. Only arms that `counts` take part.
        """
        ran = {arm: n for arm, n in self.successes.items() if self.counts(arm, gates or {})}
        most = max(ran.values())
        equals = [arm for arm, count in ran.items() if count == most]
        if "policy" in equals and expected not in ran:
            return "policy" if expected == "off" else expected
        return next((arm for arm in (expected, "policy") if arm in equals), equals[0])


def read_trials(paths: Sequence[str | Path], checkpoint: Mapping[str, Any]) -> dict[str, Trials]:
    """Trials by instruction, from results of `vla-energy rollout` with the checkpoint that is judged.

    Args:
        paths: results files; arms of one task may be spread over several.
        checkpoint: what is judged: its `fingerprint` (see `vla_energy.fingerprint`), the `arms` that it can run,
            without `@n`, and its `horizon`.

    Raises:
        TrialsError: a file cannot be read, is of a run that did not end, of another checkpoint or of other settings
            than the rest, has arms that the checkpoint cannot run, or names no instructions; an episode comes twice;
            a task lacks the arm `policy`, or `_FEWEST` seeds that all arms share.
    """
    found: dict[str, dict[str, dict[int, bool]]] = {}
    same: dict[str, Any] = {}
    for path in map(Path, paths):
        rows, ran = _read(path)
        if ran.pop("fingerprint") != checkpoint["fingerprint"]:
            raise TrialsError(f"{path} is of another checkpoint, or of this one before it was changed: run it again")
        for name, value in ran.items():
            if same.setdefault(name, value) != value:
                raise TrialsError(f"{path}: {name} is {value}, in the files before {same[name]}: run them alike")
        for task, arm, seed, success in rows:
            if arm in _NEVER:
                continue
            _check_arm(path, arm, checkpoint)
            seeds = found.setdefault(task, {}).setdefault(arm, {})
            if seed in seeds:
                raise TrialsError(f"{path}: task {task!r}, arm {arm}, seed {seed} comes twice")
            seeds[seed] = success
    return {task: _pair(task, arms, same["gates"], same["replan_every"]) for task, arms in found.items()}


def _check_arm(path: Path, arm: str, checkpoint: Mapping[str, Any]) -> None:
    try:
        name, every = split_arm(arm)
    except ValueError as error:
        raise TrialsError(f"{path}: {error}") from error
    if name not in checkpoint["arms"]:
        raise TrialsError(
            f"{path}: arm {arm}, which this checkpoint cannot run; it has {', '.join(checkpoint['arms'])}"
        )
    if every is not None and every > checkpoint["horizon"]:
        raise TrialsError(f"{path}: arm {arm}: a chunk has {checkpoint['horizon']} actions")


def _pair(task: str, arms: Mapping[str, Mapping[int, bool]], margins: Mapping[str, float], replan_every: int) -> Trials:
    if "policy" not in arms:
        raise TrialsError(f"task {task!r}: no episodes of the arm policy, with which the others are compared")
    shared = sorted(set.intersection(*(set(seeds) for seeds in arms.values())))
    if len(shared) < _FEWEST:
        raise TrialsError(
            f"task {task!r}: arms {', '.join(arms)} share {len(shared)} seeds, which is no evidence: run {_FEWEST} "
            "episodes or more, all arms in one rollout"
        )
    counts = {arm: sum(seeds[seed] for seed in shared) for arm, seeds in arms.items()}
    return Trials(counts, len(shared), tuple(shared), margins, replan_every)


def _read(path: Path) -> tuple[list[tuple[str, str, int, bool]], dict[str, Any]]:
    """A file's episodes, and what all files must have in common with each other and with the checkpoint."""
    try:
        data: Any = json.loads(path.read_text())
        if data["complete"] is not True:
            raise TrialsError(f"{path} is of a rollout that did not end: run it again")
        rows = [(row["instruction"], row["arm"], row["seed"], row["success"]) for row in data["episodes"]]
        policy = data["meta"]["checkpoint"]
        gates = {mode: math.inf if margin is None else float(margin) for mode, margin in policy["gates"].items()}
        if not all(margin >= 0 for margin in gates.values()):
            raise TypeError(f"its margins are {policy['gates']}")
        ran = {"fingerprint": policy["fingerprint"], "gates": gates, "center_crop": policy["center_crop"]}
        ran |= {name: data["settings"][name] for name in _SAME}
        ran |= {f"limit of {task}": steps for task, steps in data["settings"]["step_limits"].items()}
    except TrialsError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise TrialsError(f"{path} is no result of vla-energy rollout ({type(error).__name__}: {error})") from error
    kinds = (str, str, int, bool)
    if not rows or not all(type(value) is kind for row in rows for value, kind in zip(row, kinds, strict=True)):
        raise TrialsError(f"{path} is no result of vla-energy rollout: its episodes are empty or have wrong types")
    return rows, ran
