"""Pure measures of how well energies rank: distances, win rates, rank correlation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BANDS = (0.0, 0.02, 0.05, 0.1, 0.3)
"""Lower ends of the bands of distance to the expert in which ranking is told; normalised units."""


def chunk_distance(actions: Tensor, expert: Tensor) -> Tensor:
    """Mean absolute difference `(B,N)` of `actions (B,N,H,A)` to `expert (B,H,A)`, fp32, normalised units."""
    if actions.ndim != 4 or expert.shape != (len(actions), *actions.shape[2:]):
        raise ValueError(f"actions {tuple(actions.shape)}, expert {tuple(expert.shape)}: expected (B,N,H,A), (B,H,A)")
    return (actions.float() - expert[:, None].float()).abs().mean((2, 3))


def win_rate(energies: Tensor, valid: Tensor) -> Tensor:
    """Share of valid negatives whose energy is above their row's positive; a scalar, NaN if no negative is valid.

    Args:
        energies: `(B,N)`, the positive at index 0. A tie counts half: a saturated head must not look good. Where one
            of a valid pair is not finite the result is NaN.
        valid: `(B,N)` bool; index 0 is not looked at.
    """
    wins, pairs = wins_and_pairs(energies, valid)
    return wins / pairs


def spearman(energies: Tensor, distances: Tensor) -> Tensor:
    """Spearman's rank correlation of each row of two `(B,N)` tensors, averaged over rows; a scalar.

    Ties get their average rank. A row in which either is constant has no ranking and counts as 0;
    one with a number that is not finite makes the result NaN. 1 is perfect.
    """
    if energies.ndim != 2 or energies.shape != distances.shape:
        raise ValueError(f"energies {tuple(energies.shape)}, distances {tuple(distances.shape)}: expected equal (B,N)")
    a, b = (ranks - ranks.mean(1, keepdim=True) for ranks in (_average_ranks(energies), _average_ranks(distances)))
    spread = a.norm(dim=1) * b.norm(dim=1)
    rows = torch.where(spread > 0, (a * b).sum(1) / spread.clamp(min=1e-30), torch.zeros_like(spread))
    undefined = ~(energies.isfinite() & distances.isfinite()).all(1)
    return rows.masked_fill(undefined, math.nan).mean()


def wins_and_pairs(energies: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Number of won pairs (a tie is half a win) and of valid pairs, 0-d; as in `win_rate`, NaN wins among them."""
    if energies.ndim != 2 or energies.shape != valid.shape:
        raise ValueError(f"energies {tuple(energies.shape)}, valid {tuple(valid.shape)}: expected equal (B,N)")
    positive, negative, counted = energies[:, :1], energies[:, 1:], valid[:, 1:]
    score = (positive < negative).float() + 0.5 * (positive == negative).float()
    unknown = counted & ~(positive.isfinite() & negative.isfinite())
    return (score * counted).sum().masked_fill(unknown.any(), math.nan), counted.sum()


def pairs_by_band(scores: Tensor, distances: Tensor, usable: Tensor) -> dict[str, tuple[float, float]]:
    """How well near candidates are told apart, and how well far ones: counts of pairs by band of distance, see `BANDS`.

    Args:
        scores: `(B,N)`, lower is better.
        distances: `(B,N)` to the expert.
        usable: `(B,N)` bool; pairs with another candidate are left out.

    Returns:
        `from_{low}` -> pairs whose scores are in the order of their distances (a tie is half a pair), and all pairs;
        the nearer one's distance is in the band. Pairs of equal distance have no order.
    """
    nearer = distances[:, :, None] < distances[:, None, :]
    nearer &= usable[:, :, None] & usable[:, None, :]
    right = (scores[:, :, None] < scores[:, None, :]).double() + 0.5 * (scores[:, :, None] == scores[:, None, :])
    counts = {}
    for low, high in zip(BANDS, (*BANDS[1:], math.inf), strict=True):
        pairs = nearer & ((distances >= low) & (distances < high))[:, :, None]
        counts[f"from_{low:g}"] = (float(right[pairs].sum()), float(pairs.sum()))
    return counts


def success_auc(energies: Tensor, success: Tensor, valid: Tensor) -> Tensor:
    """Share of pairs (solved, failed) in which the solved frame has the lower energy, 0-d; 0.5 where there is no pair.

    The area under the ROC curve of success predicted by low energy. A tie counts half. Where an energy of a pair is not
    finite the result is NaN.

    Args:
        energies: `(R,)`.
        success, valid: `(R,)` bool; frames that are not valid are left out.
    """
    lower, tie = (compare(energies[:, None], energies[None]) for compare in (torch.lt, torch.eq))
    pairs = (success & valid)[:, None] & (~success & valid)[None]
    won = ((lower.float() + 0.5 * tie.float()) * pairs).sum()
    unknown = pairs & ~(energies.isfinite()[:, None] & energies.isfinite()[None])
    share = torch.where(pairs.any(), won / pairs.sum().clamp_min(1), torch.full_like(won, 0.5))
    return share.masked_fill(unknown.any(), math.nan)


def _average_ranks(values: Tensor) -> Tensor:
    """Ranks `(B,N)` from 1 in float64; equal values share the mean of their ranks."""
    below = (values[:, None, :] < values[:, :, None]).sum(2)
    equal = (values[:, None, :] == values[:, :, None]).sum(2)
    return below.double() + (equal.double() + 1) / 2
