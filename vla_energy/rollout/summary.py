"""From episode records to the results file: per task and overall, per arm and paired.

Layout of the file (JSON):
    complete       false while tasks are outstanding
    settings       tasks, episodes, arms, seed, replan_every, max_steps, workers, backend, step_limits (a task)
    meta           checkpoint, versions, first_episode_seed, seconds
    overall        {arms: {ARM: ...}, differences: {ARM: ...}} over the finished tasks
    tasks          the same for each finished task
    episodes       one record an episode and arm

An arm has `episodes, successes, success, interval` (Wilson), `decisions_per_episode, steps_per_episode,
accepted_share` (of decisions) and `milliseconds_per_decision` {mean, p50, p95, rows}: the time of a policy call
divided by its rows, and how many rows it had on average. A difference has the fields of
`statistics.PairedDifference` and `baseline`, the first arm.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_energy.rollout.statistics import paired_difference, wilson_interval

if TYPE_CHECKING:
    from vla_energy.rollout.run import Settings

_TIMES = ("milliseconds", "rows")  # a list a record: used in the summary, not written


def summarize(
    records: list[dict[str, Any]], settings: Settings, meta: dict[str, Any], *, complete: bool
) -> dict[str, Any]:
    """The results file's content, see the module's text.

    Args:
        records: one an episode and arm; every finished task has all arms on the same seeds.
        settings: what was run.
        meta: checkpoint, versions, seconds.
        complete: whether all tasks are finished.
    """
    finished = [task for task in settings.tasks if any(record["task"] == task for record in records)]
    by_task = {task: [record for record in records if record["task"] == task] for task in finished}
    episodes = [{key: value for key, value in record.items() if key not in _TIMES} for record in records]
    return {
        "complete": complete,
        "settings": dataclasses.asdict(settings),
        "meta": dict(meta),
        "overall": _compare([by_task[task] for task in finished], settings.arms),
        "tasks": {task: _compare([by_task[task]], settings.arms) for task in finished},
        "episodes": episodes,
    }


def _compare(strata: list[list[dict[str, Any]]], arms: list[str]) -> dict[str, Any]:
    """Summary of each arm over all strata, and its difference to the first arm."""
    success = {
        arm: [np.array([record["success"] for record in stratum if record["arm"] == arm]) for stratum in strata]
        for arm in arms
    }
    differences = {
        arm: {
            "baseline": arms[0],
            **dataclasses.asdict(paired_difference(list(zip(success[arm], success[arms[0]], strict=True)))),
        }
        for arm in arms[1:]
    }
    pooled = [record for stratum in strata for record in stratum]
    return {
        "arms": {arm: _arm_summary([record for record in pooled if record["arm"] == arm]) for arm in arms},
        "differences": differences,
    }


def _arm_summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    successes, episodes = sum(record["success"] for record in records), len(records)
    decisions = sum(record["decisions"] for record in records)
    times = np.concatenate([record["milliseconds"] for record in records])
    rows = np.concatenate([record["rows"] for record in records])
    accepted = sum(record["accepted_share"] * record["decisions"] for record in records)
    return {
        "episodes": episodes,
        "successes": successes,
        "success": successes / episodes,
        "interval": wilson_interval(successes, episodes),
        "decisions_per_episode": decisions / episodes,
        "steps_per_episode": sum(record["steps"] for record in records) / episodes,
        "accepted_share": accepted / decisions,
        "milliseconds_per_decision": {
            "mean": float(times.mean()),
            "p50": float(np.quantile(times, 0.5)),
            "p95": float(np.quantile(times, 0.95)),
            "rows": float(rows.mean()),
        },
    }
