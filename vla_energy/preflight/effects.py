"""What a mode does to the held-out error: one half of the episodes sets its margin, if it has one, the other tells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_energy.calibrate import calibrate_margin, margin_curve
from vla_energy.config import RerankConfig
from vla_energy.preflight.measure import Measured, ModeRecord

WORTH = 0.1
"""Share of the policy's L1 that a mode must take away over all tasks to be worth using."""
FEWEST = 5
"""Judging episodes below which an interval over episodes says nothing."""
_RESAMPLES = 2_000


@dataclass(frozen=True)
class Effect:
    """A mode on held-out frames that did not set its margin.

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
        """Whether the mode is worth using, as far as enough episodes tell."""
        return self.episodes >= FEWEST and self.change <= -WORTH and self.interval[1] < 0


def halves(measured: Measured) -> tuple[Tensor, Tensor]:
    """`(M,)` bool of frames that calibrate and of those that judge: every other episode of each task.

    Raises:
        ValueError: fewer than two episodes.
    """
    keys = list(zip(measured.tasks, measured.episodes.tolist(), strict=True))
    # Counted on from task to task: where tasks have one episode each, every other task judges.
    rank = {key: index for index, key in enumerate(sorted(set(keys)))}
    if len(rank) < 2:
        raise ValueError("preflight needs frames of two episodes or more: one half sets the gates, the other judges")
    judges = torch.tensor([rank[key] % 2 == 0 for key in keys])
    return ~judges, judges


def calibrate(measured: Measured, record: ModeRecord, rows: Tensor, config: RerankConfig) -> float:
    """The mode's margin from the frames `rows` (bool); inf where none is safe enough. See `calibrate_margin`."""
    energies = torch.stack([torch.zeros_like(record.gain), -record.gain.clamp(max=1e30)], 1)
    distances = torch.stack([measured.policy_error, record.error], 1)
    tolerance = config.tolerance * float(measured.policy_error[rows].mean())
    return calibrate_margin(
        energies[rows], distances[rows], config.risk, tolerance=tolerance, episodes=measured.episodes[rows]
    )


def gate_curve(measured: Measured, record: ModeRecord, margin: float, rows: Tensor) -> dict[str, Any]:
    """`calibrate.margin_curve` of the mode on the frames `rows` (bool), with the policy's L1 and the margin `chosen`.

    A gate that stays shut has no margin: `chosen` is None.
    """
    energies = torch.stack([torch.zeros_like(record.gain), -record.gain], 1)
    distances = torch.stack([measured.policy_error, record.error], 1)
    curve = margin_curve(energies[rows], distances[rows])
    chosen = margin if np.isfinite(margin) else None
    return {**curve, "l1_policy": float(measured.policy_error[rows].mean()), "chosen": chosen}


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
