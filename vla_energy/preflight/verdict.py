"""From what was measured to calibrated gates and a verdict in words: which mode to use, or none, and why.

One half of the held-out episodes sets each mode's margin, the other half tells what the mode does behind it. A mode
is worth using where it takes at least `WORTH` off the policy's L1 and the interval over episodes excludes 0. Plain
retrieval has no margin: its gate is the task. It is preferred where it is worth using, although choosing among
retrieved chunks by energy often has the lower L1: in closed loop the choice by energy stays near the policy's chunk
where the policy is stuck (docs/does-it-help.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_energy.calibrate import calibrate_margin
from vla_energy.config import RerankConfig
from vla_energy.preflight.measure import Measured, ModeRecord

WORTH = 0.1
"""Share of the policy's L1 that a mode must take away over all tasks to be worth using."""
TASK_WORTH = 0.25
"""The same for one task, told by its few episodes alone; on a task with 0.13 retrieval cost 20 points of success."""
_LATE = 1.5  # ratio of late to early error from which shorter chunks are advised
_RESAMPLES = 2_000
_HEADROOM = 0.1  # an oracle that takes away less than this leaves nothing to choose


@dataclass(frozen=True)
class Effect:
    """A gated mode on held-out frames that did not set its margin.

    Attributes:
        frames, episodes: how many.
        l1_policy, l1_gated, l1_oracle: normalised units; the oracle takes the best candidate of each frame.
        change: `l1_gated / l1_policy - 1`, negative is better.
        interval: its 95 percent bootstrap interval over episodes.
        gap_closed: share of `l1_policy - l1_oracle` that the mode closes; None where there is no gap.
        accepted: share of frames on which the gate takes the proposal.
        worse: share of those whose L1 is above the policy's; None where none is taken.
    """

    frames: int
    episodes: int
    l1_policy: float
    l1_gated: float
    l1_oracle: float
    change: float
    interval: tuple[float, float]
    gap_closed: float | None
    accepted: float
    worse: float | None

    @property
    def helps(self) -> bool:
        """Whether the mode is worth using."""
        return self.change <= -WORTH and self.interval[1] < 0


def halves(episodes: Tensor) -> tuple[Tensor, Tensor]:
    """`(M,)` bool of frames that calibrate and of those that judge: every other episode.

    Raises:
        ValueError: fewer than two episodes.
    """
    _, rank = episodes.unique(return_inverse=True)
    if int(rank.max()) < 1:
        raise ValueError("preflight needs frames of two episodes or more: one half sets the gates, the other judges")
    return rank % 2 == 0, rank % 2 == 1


def calibrate(measured: Measured, record: ModeRecord, rows: Tensor, config: RerankConfig) -> float:
    """The mode's margin from the frames `rows` (bool); inf where none is safe enough. See `calibrate_margin`."""
    energies = torch.stack([torch.zeros_like(record.gain), -record.gain.clamp(max=1e30)], 1)
    distances = torch.stack([measured.policy_error, record.error], 1)
    tolerance = config.tolerance * float(measured.policy_error[rows].mean())
    return calibrate_margin(energies[rows], distances[rows], config.risk, tolerance=tolerance)


def effect(measured: Measured, record: ModeRecord, margin: float, rows: Tensor) -> Effect:
    """What the mode does behind `margin` on the frames `rows` (bool)."""
    policy, proposed = measured.policy_error[rows], record.error[rows]
    accepted = record.gain[rows] > margin
    gated = torch.where(accepted, proposed, policy)
    l1 = {name: float(error.mean()) for name, error in (("policy", policy), ("gated", gated))}
    oracle = float(record.oracle[rows].mean())
    gap = l1["policy"] - oracle
    episodes = measured.episodes[rows]
    low, high = _interval(policy, gated, episodes)
    return Effect(
        int(rows.sum()), len(episodes.unique()), l1["policy"], l1["gated"], oracle,
        l1["gated"] / max(l1["policy"], 1e-12) - 1, (low, high),
        (l1["policy"] - l1["gated"]) / gap if gap > 1e-9 else None,
        float(accepted.float().mean()),
        float((proposed > policy)[accepted].float().mean()) if accepted.any() else None,
    )  # fmt: skip


def _interval(policy: Tensor, gated: Tensor, episodes: Tensor) -> tuple[float, float]:
    """95 percent bootstrap interval of the relative change, whole episodes drawn (Efron, 1979)."""
    _, rank = episodes.unique(return_inverse=True)
    count = int(rank.max()) + 1
    sums = [torch.zeros(count, dtype=torch.float64).index_add_(0, rank, part.double()) for part in (policy, gated)]
    draws = np.random.default_rng(0).integers(0, count, (_RESAMPLES, count))
    before, after = (part.numpy()[draws].sum(1) for part in sums)
    low, high = np.percentile(after / np.maximum(before, 1e-12) - 1, [2.5, 97.5])
    return float(low), float(high)


def judge(measured: Measured, gates_config: RerankConfig) -> dict[str, Any]:
    """Gates, effects overall and by task, and the verdict; JSON types but for margins, which may be inf.

    Returns:
        `gates` {mode: margin}, shut where the mode is not worth using; `modes` {mode: effect (behind the calibrated
        margin), spearman, bands, sources, ms}; `tasks` {instruction: {use, effects}}; `policy` {l1, by_step, frames,
        episodes, forward_ms}; `verdict` {use, reasons}.

    Raises:
        ValueError: fewer than two episodes.
    """
    ours, rest = halves(measured.episodes)
    gates, modes, effects = {}, {}, {}
    for mode, record in measured.modes.items():
        # Plain retrieval is the baseline that others are compared with: it has no gate.
        gates[mode] = 0.0 if mode == "retrieve" else calibrate(measured, record, ours, gates_config)
        effects[mode] = effect(measured, record, gates[mode], rest)
        modes[mode] = {
            "effect": asdict(effects[mode]),
            "spearman": record.spearman,
            "bands": record.bands,
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
    return {
        "verdict": {"use": use, "reasons": _reasons(use, effects, gates, measured)},
        "policy": policy,
        "gates": {mode: gates[mode] if mode == "retrieve" or effects[mode].helps else math.inf for mode in gates},
        "modes": modes,
        "tasks": _tasks(measured, gates, rest, use),
    }


def _best(effects: dict[str, Effect]) -> str:
    """`retrieve` where it helps, else the mode with the lowest L1 among those that do, or `off`."""
    helping = [(mode != "retrieve", found.l1_gated, mode) for mode, found in effects.items() if found.helps]
    return min(helping)[2] if helping else "off"


def _tasks(measured: Measured, gates: dict[str, float], rest: Tensor, use: str) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for task in sorted(set(measured.tasks)):
        rows = rest & torch.tensor([name == task for name in measured.tasks])
        if not rows.any():
            continue
        found = {mode: effect(measured, record, gates[mode], rows) for mode, record in measured.modes.items()}
        # A task has few episodes, so its interval decides nothing: the mode is sure overall, the task must agree.
        helps = use != "off" and found[use].change <= -TASK_WORTH
        table[task] = {"use": use if helps else "off", "effects": {mode: asdict(part) for mode, part in found.items()}}
    return table


def _reasons(use: str, effects: dict[str, Effect], gates: dict[str, float], measured: Measured) -> list[str]:
    reasons = []
    for mode, found in effects.items():
        low, high = (100 * bound for bound in found.interval)
        text = f"{mode}: L1 {found.l1_policy:.4f} to {found.l1_gated:.4f} ({100 * found.change:+.0f} %, {low:+.0f} to "
        text += f"{high:+.0f}), {100 * found.accepted:.0f} % of chunks replaced"
        if not math.isfinite(gates[mode]):
            text += "; no margin was safe on the calibration half, so its gate stays shut"
        elif found.l1_oracle > (1 - _HEADROOM) * found.l1_policy:
            text += (
                f"; even the best candidate has {found.l1_oracle:.4f}, there is little to choose: its gate stays shut"
            )
        elif not found.helps:
            text += f"; less than {100 * WORTH:.0f} % better, or not surely: its gate stays shut"
        reasons.append(text)
    early, late = _early_and_late(measured.by_step.tolist())
    if late > _LATE * early:
        reasons.append(
            f"the policy's error grows along the chunk ({early:.4f} to {late:.4f}): ask it more often "
            "(--replan-every), or let the arm replan do so where its energy says"
        )
    chosen = "leave reranking off" if use == "off" else f"use {use}"
    return [f"{chosen}: {_why(use, effects)}", *reasons]


def _why(use: str, effects: dict[str, Effect]) -> str:
    if use == "off":
        return "no mode is surely better than the policy on held-out episodes"
    found = effects[use]
    gap = "" if found.gap_closed is None else f", {100 * found.gap_closed:.0f} % of the gap to the best candidate"
    return f"it takes {-100 * found.change:.0f} % off the policy's held-out L1{gap}"


def _early_and_late(errors: Sequence[float]) -> tuple[float, float]:
    half = max(1, len(errors) // 2)
    return float(np.mean(errors[:half])), float(np.mean(errors[half:] or errors))
