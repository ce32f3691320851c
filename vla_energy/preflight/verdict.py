"""From what was measured to calibrated gates and a verdict in words: which mode to use, or none, and why.

A mode is worth using where it takes at least `WORTH` off the policy's L1 and the interval over episodes excludes 0.
Plain retrieval has no margin: its gate is the task. It is preferred where it is worth using, although choosing among
retrieved chunks by energy often has the lower L1: in closed loop the choice by energy stays near the policy's chunk
where the policy is stuck (docs/does-it-help.md). Where episodes were tried, they decide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from vla_energy.arms import split_arm
from vla_energy.config import RerankConfig
from vla_energy.preflight.effects import Effect, calibrate, effect, gate_curve, halves
from vla_energy.preflight.measure import Measured
from vla_energy.preflight.trials import Trials
from vla_energy.preflight.words import reasons_of, uncounted_trials, unseen_trials

TASK_WORTH = 0.25
"""`WORTH` for one task, told by its few episodes alone; on a task with 0.13 retrieval cost 20 points of success."""
TASK_FEWEST = 3
"""Held-out episodes of a task below which nothing is advised for it: two frames said `retrieve` where it costs 20."""


def judge(measured: Measured, gates_config: RerankConfig, trials: Mapping[str, Trials] | None = None) -> dict[str, Any]:
    """Gates, effects overall and by task, and the verdict; JSON types but for margins, which may be inf.

    Args:
        measured: on held-out frames.
        gates_config: risk and tolerance.
        trials: episodes by instruction. Where there are any they decide on the task, whatever its L1 says. A mode that
            won keeps the margin behind which it was tried.

    Returns:
        `gates` {mode: margin}, shut where the mode is not worth using; `modes` {mode: effect (behind the calibrated
        margin), spearman, bands, curve, sources, ms}; `tasks` {instruction: {use, effects, trials or None}}; `policy`
        {l1, by_step, frames, episodes, forward_ms}; `verdict` {use, reasons}; `use` is
        `recommended`, by task, where an arm beat the policy in trials.

    Raises:
        ValueError: fewer than two episodes.
    """
    ours, rest = halves(measured)
    gates, modes, effects = {}, {}, {}
    for mode, record in measured.modes.items():
        # Plain retrieval is the baseline that others are compared with: it has no gate.
        gates[mode] = 0.0 if mode == "retrieve" else calibrate(measured, record, ours, gates_config)
        effects[mode] = effect(measured, record, gates[mode], _judging(mode, rest))
        modes[mode] = {
            "effect": asdict(effects[mode]),
            "spearman": record.spearman,
            "bands": record.bands,
            "curve": None if mode == "retrieve" else gate_curve(measured, record, gates[mode], rest),
            "sources": record.sources,
            "ms": record.milliseconds / len(measured.policy_error),
        }
    use = _best(effects)
    policy = {
        "l1": float(measured.policy_error.mean()),
        "by_step": measured.by_step.tolist(),
        "frames": len(measured.policy_error),
        "episodes": len(measured.episodes.unique()),
        "forward_ms": measured.forward_milliseconds,
    }
    tasks = _tasks(measured, gates, rest, use)
    won = _try(tasks, trials or {}, gates)
    open_gates = {"retrieve", *(mode for mode in gates if effects[mode].helps), *won}
    reasons = reasons_of(use, effects, gates, measured, gates_config.risk)
    if won.get(use, gates.get(use)) != gates.get(use):
        # Where it was not tried it will run behind the margin of the trials, so that one is judged.
        untried = _tasks(measured, {**gates, **won}, rest, use)
        tasks.update({task: {**row, "trials": None} for task, row in untried.items() if task not in (trials or {})})
    if trials:
        use, reasons = _with_trials(use, reasons, trials, tasks, gates)
    gates.update(won)
    return {
        "verdict": {"use": use, "reasons": reasons},
        "policy": policy,
        "gates": {mode: margin if mode in open_gates else math.inf for mode, margin in gates.items()},
        "modes": modes,
        "tasks": tasks,
    }


def _try(tasks: dict[str, Any], trials: Mapping[str, Trials], gates: Mapping[str, float]) -> dict[str, float]:
    """Puts the arm that won the trials in the place of what held-out frames say; `policy` is `off`.

    Returns:
        The margins of the modes that won, behind which they did; never below the calibrated ones.
    """
    for row in tasks.values():
        row["trials"] = None
    won = {}
    for task, found in trials.items():
        row = tasks.setdefault(task, {"use": "off", "effects": {}})
        best = found.best(row["use"], gates)
        row["use"] = "off" if best == "policy" else best
        row["trials"] = {
            "episodes": found.episodes, "successes": found.successes, "seeds": found.seeds,
            "replan_every": found.replan_every,
        }  # fmt: skip
        mode = split_arm(best)[0]
        if best in found.successes and mode in found.margins and found.counts(best, gates):
            won[mode] = found.margins[mode]
    return won


def _best(effects: dict[str, Effect]) -> str:
    """`retrieve` where it helps, else the mode with the lowest L1 among those that do, or `off`."""
    helping = [(mode != "retrieve", found.l1_gated, mode) for mode, found in effects.items() if found.helps]
    return min(helping)[2] if helping else "off"


def _judging(mode: str, rest: Tensor) -> Tensor:
    """The frames that judge: all for plain retrieval, as no margin of it was set on any."""
    return torch.ones_like(rest) if mode == "retrieve" else rest


def _tasks(measured: Measured, gates: dict[str, float], rest: Tensor, use: str) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for task in sorted(set(measured.tasks)):
        mine = torch.tensor([name == task for name in measured.tasks])
        # A task's only episode may have set the gates: then no gated mode is judged on it.
        rows = {mode: _judging(mode, rest) & mine for mode in measured.modes}
        found = {m: effect(measured, measured.modes[m], gates[m], rows[m]) for m in rows if rows[m].any()}
        # A task has few episodes, so its interval decides nothing: the mode is sure overall, the task must agree.
        helps = use in found and found[use].change <= -TASK_WORTH and found[use].episodes >= TASK_FEWEST
        table[task] = {"use": use if helps else "off", "effects": {mode: asdict(part) for mode, part in found.items()}}
    return table


def _with_trials(
    use: str, reasons: list[str], trials: Mapping[str, Trials], tasks: dict[str, Any], gates: Mapping[str, float]
) -> tuple[str, list[str]]:
    """What is recommended in the light of the trials: by task, where an arm beat the policy on any."""
    episodes = sum(found.episodes for found in trials.values())
    policy = sum(found.successes["policy"] for found in trials.values())
    arms = {task: "policy" if tasks[task]["use"] == "off" else tasks[task]["use"] for task in trials}
    # A mode that was not tried on a task may still be advised for it; the policy's count is what is known there.
    best = sum(found.successes.get(arms[task], found.successes["policy"]) for task, found in trials.items())
    every = next(iter(trials.values())).replan_every
    text = (
        f"{len(trials)} tasks were tried in {episodes} episodes an arm: the policy succeeds in {policy}, the best arm "
        f"of each task in {best} (as it was chosen by these episodes, expect less; arms without @n decided every "
        f"{every} steps, let them: --replan-every {every})"
    )
    reasons = [*reasons, *uncounted_trials(trials, gates), *unseen_trials(tasks)]
    if best == policy:
        return use, [reasons[0], text, *reasons[1:]]
    return "recommended", [f"use recommended, by task: {text}", f"on held-out data alone: {reasons[0]}", *reasons[1:]]
