"""Evaluation rollouts as evidence: which arm succeeded most on each task, in episodes that are not the evaluation.

Held-out L1 is a proxy of success and wrong on some tasks (docs/does-it-help.md); a few episodes with each arm are not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_energy.modes import split_arm

_NEVER = ("recommended",)  # what is to be decided here cannot be what decides


class TrialsError(ValueError):
    """A file of rollouts that cannot serve as evidence, and why."""


@dataclass(frozen=True)
class Trials:
    """Paired episodes of one task.

    Attributes:
        successes: by arm, in the order of the files.
        episodes: how many each arm has, on the same seeds.
        seeds: the seeds, sorted.
    """

    successes: dict[str, int]
    episodes: int
    seeds: tuple[int, ...]

    def best(self, expected: str) -> str:
        """The arm with the most successes; among equals `expected`, then the policy, then the first."""
        most = max(self.successes.values())
        equals = [arm for arm, count in self.successes.items() if count == most]
        return next((arm for arm in (expected, "policy") if arm in equals), equals[0])


def read_trials(paths: Sequence[str | Path], available: Sequence[str]) -> dict[str, Trials]:
    """Trials by instruction, from results of `vla-energy rollout` with the checkpoint that is judged.

    Args:
        paths: results files; arms of one task may be spread over several.
        available: arms that the checkpoint can run, without `@n`.

    Raises:
        TrialsError: a file cannot be read, is of a run that did not end, has arms that the checkpoint cannot run, or
            names no instructions; an episode comes twice; a task lacks the arm `policy` or seeds that all arms share.
    """
    found: dict[str, dict[str, dict[int, bool]]] = {}
    for path in paths:
        for task, arm, seed, success in _episodes(Path(path)):
            if arm in _NEVER:
                continue
            if split_arm(arm)[0] not in available:
                raise TrialsError(f"{path}: arm {arm}, which this checkpoint cannot run; it has {', '.join(available)}")
            seeds = found.setdefault(task, {}).setdefault(arm, {})
            if seed in seeds:
                raise TrialsError(f"{path}: task {task!r}, arm {arm}, seed {seed} comes twice")
            seeds[seed] = success
    return {task: _pair(task, arms) for task, arms in found.items()}


def _pair(task: str, arms: Mapping[str, Mapping[int, bool]]) -> Trials:
    if "policy" not in arms:
        raise TrialsError(f"task {task!r}: no episodes of the arm policy, with which the others are compared")
    shared = sorted(set.intersection(*(set(seeds) for seeds in arms.values())))
    if not shared:
        raise TrialsError(f"task {task!r}: arms {', '.join(arms)} share no seed; run them in one rollout")
    return Trials({arm: sum(seeds[seed] for seed in shared) for arm, seeds in arms.items()}, len(shared), tuple(shared))


def _episodes(path: Path) -> list[tuple[str, str, int, bool]]:
    try:
        data: Any = json.loads(path.read_text())
        if data["complete"] is not True:
            raise TrialsError(f"{path} is of a rollout that did not end: run it again")
        rows = [(row["instruction"], row["arm"], row["seed"], row["success"]) for row in data["episodes"]]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise TrialsError(f"{path} is no result of vla-energy rollout ({type(error).__name__}: {error})") from error
    kinds = (str, str, int, bool)
    if not rows or not all(type(value) is kind for row in rows for value, kind in zip(row, kinds, strict=True)):
        raise TrialsError(f"{path} is no result of vla-energy rollout: its episodes are empty or have wrong types")
    return rows
