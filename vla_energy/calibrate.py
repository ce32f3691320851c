"""The gate's margin from held-out data: how much lower an energy must be before it is worth believing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_GRID = 16
"""Margins tried; Bonferroni's correction pays for each."""


def calibrate_margin(
    energies: Tensor, distances: Tensor, risk: float = 0.1, confidence: float = 0.9, tolerance: float = 0.0
) -> float:
    """The smallest margin whose accepted choices are worse than the policy's chunk at most with probability `risk`.

    With probability `confidence` over the held-out rows, P(worse | accepted) <= risk on new rows of the same
    distribution. Rows must be exchangeable: take them from many episodes, not many from one. "Worse" is a distance
    above that of the policy's chunk by more than `tolerance`.

    Learn then Test (Angelopoulos, Bates, Candes, Jordan and Lei, 2021, arXiv:2110.01052) with exact binomial p-values
    (Clopper and Pearson, 1934) and Bonferroni's correction over a grid fixed before outcomes are looked at: accept the
    k rows of largest gain, for 16 values of k. Given the (k+1)-th largest gain, the k above it are independent draws
    from the rows the gate would accept, so the number of worse ones is binomial.

    Args:
        energies: `(M,N)` of held-out candidates, index 0 the policy's; NaN counts as inf.
        distances: `(M,N)` to the expert's chunk.
        risk: between 0 and 1.
        confidence: between 0 and 1.
        tolerance: 0 or more, in the distances' unit.

    Returns:
        A margin for `choose`; inf where no margin passes, so that the gate stays shut.

    Raises:
        ValueError: shapes differ, there are no rows, a distance is not finite, or a share is not between 0 and 1.
    """
    if energies.ndim != 2 or energies.shape != distances.shape or not energies.numel():
        raise ValueError(f"energies {tuple(energies.shape)}, distances {tuple(distances.shape)}: expected equal (M,N)")
    if not (0 < risk < 1 and 0 < confidence < 1):
        raise ValueError(f"risk={risk}, confidence={confidence}: expected both between 0 and 1")
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance={tolerance}: expected a finite number, 0 or more")
    if not distances.isfinite().all():
        raise ValueError("distances must be finite")
    energies = energies.float()
    energies = torch.where(energies.isfinite(), energies, torch.full_like(energies, math.inf))
    lowest, index = energies.min(1)
    gains, order = (energies[:, 0] - lowest).nan_to_num(nan=0.0, posinf=math.inf).sort(descending=True)
    worse = (distances.gather(1, index[:, None])[:, 0] > distances[:, 0] + tolerance)[order]
    positive = int((gains > 0).sum())
    level = (1 - confidence) / _GRID
    fewest = math.ceil(math.log(level) / math.log1p(-risk))  # fewer rows cannot pass even if none is worse
    if positive < fewest:
        return math.inf
    thresholds = [gains[k] if k < positive else gains.new_zeros(()) for k in _spread(fewest, positive, _GRID)]
    passing = [math.inf]
    for threshold in thresholds:
        accepted = gains > threshold
        count, bad = int(accepted.sum()), int((accepted & worse).sum())
        if count and _binomial_cdf(bad, count, risk) <= level:
            passing.append(float(threshold))
    return min(passing)


def _spread(low: int, high: int, count: int) -> list[int]:
    return sorted({round(low + (high - low) * i / (count - 1)) for i in range(count)})


def _binomial_cdf(successes: int, trials: int, p: float) -> float:
    """P(X <= successes), X ~ Binomial(trials, p), 0 < p < 1."""
    total = 0.0
    for k in range(successes + 1):
        ways = math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        total += math.exp(ways + k * math.log(p) + (trials - k) * math.log1p(-p))
    return min(1.0, total)
