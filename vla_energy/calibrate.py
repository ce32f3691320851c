"""The gate's margin from held-out data: how much lower an energy must be before it is worth believing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_GRID, _SEQUENCE = 16, (4, 16)
"""Margins tried on independent rows, each paid for by Bonferroni's correction; and on episodes, where each is tried if
those before it passed: 4 to 16 sixteenths of the rows."""


def calibrate_margin(
    energies: Tensor,
    distances: Tensor,
    risk: float = 0.1,
    confidence: float = 0.9,
    tolerance: float = 0.0,
    episodes: Tensor | None = None,
) -> float:
    """The smallest margin whose accepted choices are worse than the policy's chunk at most with probability `risk`.

    With probability `confidence` over the held-out rows, P(worse | accepted) <= risk on new rows of the same
    distribution. "Worse" is a distance above that of the policy's chunk by more than `tolerance`.

    Learn then Test (Angelopoulos, Bates, Candes, Jordan and Lei, 2021, arXiv:2110.01052) over a grid fixed before
    outcomes are looked at: accept the k rows of largest gain, for several k. Without `episodes`, rows are taken for
    independent: exact binomial p-values (Clopper and Pearson, 1934) and Bonferroni's correction; given the (k+1)-th
    largest gain, the k above it are independent draws from the rows the gate would accept. With `episodes`, whole
    episodes are independent and rows of one may be as alike as they like: of each episode in which the gate takes any
    row, the share of worse ones among them is one draw between 0 and 1, and its mean is to be at most `risk`;
    Hoeffding-Bentkus p-values (the paper's section 3.1), from a quarter of the rows to all, until one fails (fixed
    sequence testing, its section 4).

    Args:
        energies: `(M,N)` of held-out candidates, index 0 the policy's. One that is not finite is never taken; where
            it is the policy's own, the policy's chunk stays, as in `rerank`.
        distances: `(M,N)` to the expert's chunk.
        risk: between 0 and 1.
        confidence: between 0 and 1.
        tolerance: 0 or more, in the distances' unit.
        episodes: `(M,)` int, the episode of each row; at the defaults 22 in which nothing is worse are the fewest
            that can pass, see `fewest_draws`. None where rows are independent.

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
    if episodes is not None and episodes.shape != distances.shape[:1]:
        raise ValueError(f"episodes {tuple(episodes.shape)}: expected one a row, ({len(distances)},)")
    gains, index = _gains(energies)
    gains, order = gains.sort(descending=True)
    worse = (distances.gather(1, index[:, None])[:, 0] > distances[:, 0] + tolerance)[order]
    if episodes is None:
        return _by_rows(gains, worse, risk, 1 - confidence)
    return _by_episodes(gains, worse, episodes[order], risk, 1 - confidence)


def margin_curve(energies: Tensor, distances: Tensor, points: int = 24) -> dict[str, list[float | None]]:
    """What each of several margins would accept, and the loss that follows: for a picture, not for a choice.

    Args:
        energies, distances: `(M,N)` as for `calibrate_margin`; of rows that did not set the margin.
        points: at most so many margins, from 0 through quantiles of the gains to the largest, which accepts nothing.

    Returns:
        `margins`, and for each: `accepted` (share of rows), `worse` (share of these that are worse than the policy's
        chunk, None where none is accepted), `l1` (mean distance behind the gate).
    """
    gains, index = _gains(energies)
    chosen = distances.gather(1, index[:, None])[:, 0]
    finite = gains[gains.isfinite() & (gains > 0)].double()
    grid = torch.linspace(0, 1, max(points - 1, 1), dtype=torch.float64)
    margins = sorted({0.0, *finite.quantile(grid).tolist()}) if len(finite) else [0.0]
    curve: dict[str, list[float | None]] = {"margins": [*margins], "accepted": [], "worse": [], "l1": []}
    for margin in margins:
        accepted = gains.double() > margin
        worse = (chosen > distances[:, 0])[accepted]
        curve["accepted"].append(float(accepted.double().mean()))
        curve["worse"].append(float(worse.double().mean()) if len(worse) else None)
        curve["l1"].append(float(torch.where(accepted, chosen, distances[:, 0]).double().mean()))
    return curve


def _gains(energies: Tensor) -> tuple[Tensor, Tensor]:
    """`(M,)` how much lower the lowest finite energy of a row is than the policy's, and where it stands."""
    energies = energies.float()
    usable = energies.isfinite() & energies[:, :1].isfinite()
    energies = torch.where(usable, energies, torch.full_like(energies, math.inf))
    lowest, index = energies.min(1)
    return (energies[:, 0] - lowest).nan_to_num(nan=0.0, posinf=math.inf), index


def fewest_draws(risk: float, level: float = 0.1) -> int:
    """How many rows or episodes without anything worse a margin needs to pass at `level`, 1 less the confidence."""
    return math.ceil(math.log(level) / math.log1p(-risk))


def _by_rows(gains: Tensor, worse: Tensor, risk: float, level: float) -> float:
    positive, fewest = int((gains > 0).sum()), fewest_draws(risk, level / _GRID)
    if positive < fewest:
        return math.inf
    passing = [math.inf]
    for threshold in _thresholds(
        gains, positive, [fewest + (positive - fewest) * i / (_GRID - 1) for i in range(_GRID)]
    ):
        accepted = gains > threshold
        count, bad = int(accepted.sum()), int((accepted & worse).sum())
        if count and _binomial_cdf(bad, count, risk) <= level / _GRID:
            passing.append(threshold)
    return min(passing)


def _by_episodes(gains: Tensor, worse: Tensor, episodes: Tensor, risk: float, level: float) -> float:
    positive, margin = int((gains > 0).sum()), math.inf
    first, last = _SEQUENCE
    for threshold in _thresholds(gains, positive, [positive * i / last for i in range(first, last + 1)]):
        accepted = gains > threshold
        if not accepted.any():  # equal gains: nothing is tried
            continue
        if _hoeffding_bentkus(_shares(worse[accepted], episodes[accepted]), risk) > level:
            break
        margin = threshold
    return margin


def _thresholds(gains: Tensor, positive: int, counts: Sequence[float]) -> list[float]:
    """From the largest to the smallest; each accepts the `count` rows of largest gain, or all that are positive."""
    return [float(gains[k]) if k < positive else 0.0 for k in sorted({round(count) for count in counts})]


def _shares(worse: Tensor, episodes: Tensor) -> Tensor:
    """`(E,)` share of worse rows in each of the episodes that come."""
    _, rank, count = episodes.unique(return_inverse=True, return_counts=True)
    return torch.zeros(len(count), dtype=torch.float64).index_add_(0, rank, worse.double()) / count


def _hoeffding_bentkus(draws: Tensor, mean: float) -> float:
    """P-value of "their expectation is `mean` or more" for independent draws between 0 and 1 (arXiv:2110.01052)."""
    n, found = len(draws), min(float(draws.mean()), mean)
    divergence = (1 - found) * math.log((1 - found) / (1 - mean)) + (found * math.log(found / mean) if found else 0.0)
    # A sum of shares that is whole but for rounding must not count as one more.
    worse = math.ceil(float(draws.sum()) - 1e-9)
    return min(1.0, math.exp(-n * divergence), math.e * _binomial_cdf(worse, n, mean))


def _binomial_cdf(successes: int, trials: int, p: float) -> float:
    """P(X <= successes), X ~ Binomial(trials, p), 0 < p < 1."""
    total = 0.0
    for k in range(successes + 1):
        ways = math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        total += math.exp(ways + k * math.log(p) + (trials - k) * math.log1p(-p))
    return min(1.0, total)
