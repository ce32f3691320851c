"""Losses as pure functions of energies `(B,N)`: column 0 is the expert's chunk, the others are negatives.

Every function takes `valid (B,N)` bool (None: all valid) and `weight (B,N)` or `(N,)` (None: ones) where it applies.
A negative that is not valid takes no part, in value or in gradient. A row without a valid negative contributes
nothing, never NaN, and the mean is taken over the other rows; `count_no_negatives` counts such rows. With a batch of
one and in-batch negatives alone, the report's F2 ("NaN") began exactly there.

All row-wise losses ignore a constant added to a row: an offset that depends on the context alone is free to drift.
`anchor` holds it.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Finite, so that 0 * (masked - masked) is 0 and not NaN, forward and backward.
_MASKED = -1e30


def logits_of(energies: Tensor, temperature: float | Tensor) -> Tensor:
    """`-energy / temperature`: the only place where the sign turns.

    A larger temperature shrinks logits (the report's remedy 2 argues the opposite); it helps only with a wider range.
    """
    return -energies / temperature


def negatives_of(energies: Tensor, valid: Tensor | None) -> Tensor:
    """`(B,N-1)` bool: the valid negatives."""
    return torch.ones_like(energies, dtype=torch.bool)[:, 1:] if valid is None else valid[:, 1:]


def count_no_negatives(energies: Tensor, valid: Tensor | None = None) -> Tensor:
    """Rows without a valid negative, a 0-d float tensor."""
    return (~negatives_of(energies, valid).any(1)).sum().to(energies.dtype)


def info_nce(
    energies: Tensor, temperature: float | Tensor, valid: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """`-log p(expert)` with `p = softmax(-E / temperature)`; report, remedy 4.

    `log_softmax` is stable by itself, so neither the report's eps (which cancels) nor its clamp (which kills the
    gradient where it is needed) is here. A negative's `weight` multiplies its term in the denominator.

    Returns:
        0-d tensor, the mean over rows that have a negative; 0 if there are none.
    """
    logits = _masked(logits_of(energies, temperature), valid, weight)
    return _mean_rows(-logits.log_softmax(1)[:, 0], energies, valid)


def listwise(
    energies: Tensor,
    distances: Tensor,
    temperature: float | Tensor,
    distance_scale: float,
    valid: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """`KL(softmax(-distance / distance_scale) || softmax(-E / temperature))`: graded targets, ListNet's top-one loss.

    Its optimum is `E = temperature / distance_scale * distance` up to a constant per row, whatever the weights: a
    column's weight multiplies its term in both softmaxes. Being a divergence, its floor is 0.

    Args:
        distances: `(B,N)` of each chunk to the expert's; column 0 is usually 0. No gradient is taken.

    Returns:
        0-d tensor, the mean over rows that have a negative; 0 if there are none.
    """
    log_model = _masked(logits_of(energies, temperature), valid, weight).log_softmax(1)
    log_target = _masked(logits_of(distances.detach(), distance_scale), valid, weight).log_softmax(1)
    return _mean_rows((log_target.exp() * (log_target - log_model)).sum(1), energies, valid)


def margin(energies: Tensor, width: float, valid: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """`relu(E_expert - E_negative + width)`, a weighted mean over a row's negatives; report, remedy 5.

    The report writes `relu(E_neg - E_pos + width)`. With lower-is-better energies that trains the head backwards.

    Returns:
        0-d tensor, the mean over rows that have a negative; 0 if there are none.
    """
    shares = negatives_of(energies, valid).to(energies.dtype)
    if weight is not None:
        shares = shares * weight[..., 1:]
    violation = torch.relu(energies[:, :1] - energies[:, 1:] + width)
    # where, not only a product with 0: a masked energy may be anything, inf included.
    violation = torch.where(shares > 0, violation, torch.zeros_like(violation))
    return _mean_rows((violation * shares).sum(1) / shares.sum(1).clamp_min(1e-12), energies, valid)


def anchor(energies: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean of E^2 over valid entries; fixes the offset that the row-wise losses leave free.

    Without it any function of the context alone drifts freely; with a saturating range that kills the head within
    tens of steps.
    """
    if valid is None:
        return energies.square().mean()
    return torch.where(valid, energies, torch.zeros_like(energies)).square().sum() / valid.sum().clamp_min(1)


def _masked(logits: Tensor, valid: Tensor | None, weight: Tensor | None) -> Tensor:
    if weight is not None:
        logits = logits + weight.log()
    if valid is None:
        return logits
    expert = torch.zeros_like(valid)
    expert[:, 0] = True
    return logits.masked_fill(~(valid | expert), _MASKED)


def _mean_rows(losses: Tensor, energies: Tensor, valid: Tensor | None) -> Tensor:
    has_negative = negatives_of(energies, valid).any(1)
    return torch.where(has_negative, losses, torch.zeros_like(losses)).sum() / has_negative.sum().clamp_min(1)
