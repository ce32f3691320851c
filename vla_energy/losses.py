"""Losses as pure functions of energies `(B,N)`: column 0 is the expert's chunk, the others are negatives.

Every function takes `valid (B,N)` bool (None: all valid) and `weight (B,N)` or `(N,)` (None: ones) where it applies.
A negative that is not valid, or of weight 0, takes no part, in value or in gradient, whatever its energy (inf and NaN
included). A row without a negative contributes nothing, never NaN, and the mean is taken over the other rows;
`count_no_negatives` counts such rows. With a batch of one and in-batch negatives alone, the report's F2 ("NaN") began
exactly there. In the other rows the expert always takes part; callers give it weight 1.

All row-wise losses ignore a constant added to a row (except through `logit_clamp`): an offset that depends on the
context alone is free to drift. `anchor` holds it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Finite, so that 0 * (masked - masked) is 0 and not NaN, forward and backward. Relative to a row's largest logit.
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


def clamp_count(energies: Tensor, temperature: float | Tensor, bound: float, valid: Tensor | None = None) -> Tensor:
    """How many valid logits lie beyond `±bound`, a 0-d float tensor: what `info_nce`'s clamp would cut."""
    beyond = logits_of(energies.detach(), temperature).abs() > bound
    return (beyond if valid is None else beyond & valid).sum().to(energies.dtype)


def info_nce(
    energies: Tensor,
    temperature: float | Tensor,
    valid: Tensor | None = None,
    weight: Tensor | None = None,
    log_q: Tensor | None = None,
    logit_clamp: float = 0.0,
) -> Tensor:
    """`-log p(expert)` with `p = softmax(-E / temperature - log_q)`; report, remedy 4.

    `log_softmax` is stable by itself, so the report's eps, which cancels, is not here, and its clamp is off. A
    negative's `weight` multiplies its term in the denominator.

    Args:
        log_q: `(B,N)` log of how common each chunk is under the distribution it was drawn from, up to a constant per
            row. Without it the optimum is `E = -temperature * log(p(chunk | context) / q(chunk))`: in-batch negatives
            punish common actions. With it q is gone (sampled softmax: Bengio & Senecal 2008; Yi et al. 2019). It does
            not help against a negative that equals the expert's own chunk; leave that one out by `valid`.
        logit_clamp: above 0, `-E / temperature` is clamped to `±logit_clamp` (the report's is 50) before weights and
            log_q. Where it acts it kills the gradient: an expert far too high gets no signal to come down.

    Returns:
        0-d tensor, the mean over rows that have a negative; 0 if there are none.

    Raises:
        ValueError: `log_q` is not of the energies' shape, or `logit_clamp` is below 0.
    """
    if logit_clamp < 0:
        raise ValueError(f"logit_clamp={logit_clamp}: expected 0 (off) or more")
    used = _used(energies, valid, weight)
    logits = logits_of(_only(energies, used), temperature)
    if logit_clamp:
        logits = logits.clamp(-logit_clamp, logit_clamp)
    if log_q is not None:
        logits = logits - _only(_like(energies, log_q, "log_q"), used)
    return _mean_rows(-_log_softmax(logits, used, weight)[:, 0], used)


def chance(
    energies: Tensor, valid: Tensor | None = None, weight: Tensor | None = None, log_q: Tensor | None = None
) -> Tensor:
    """InfoNCE of a head that knows nothing: all energies equal, whatever `energies` holds.

    Without `log_q`: `log(1 + sum of the negatives' weights)`, so ln 8 for seven negatives. InfoNCE that stays there is
    the report's F1 ("a flat line").

    Returns:
        0-d tensor without gradient, the mean over rows that have a negative; 0 if there are none.
    """
    return info_nce(torch.zeros_like(energies), 1.0, valid, weight, log_q).detach()


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

    Raises:
        ValueError: `distances` is not of the energies' shape.
    """
    used = _used(energies, valid, weight)
    distances = _only(_like(energies, distances, "distances"), used)
    log_model = _log_softmax(logits_of(_only(energies, used), temperature), used, weight)
    log_target = _log_softmax(logits_of(distances, distance_scale), used, weight)
    return _mean_rows((log_target.exp() * (log_target - log_model)).sum(1), used)


def distance_regression(
    energies: Tensor,
    distances: Tensor,
    temperature: float | Tensor,
    distance_scale: float,
    valid: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """`((E_i - E_j) / temperature - (d_i - d_j) / distance_scale)^2`, mean over a row's ordered pairs (i, j).

    Gaps of energies against gaps of distances, after the pairwise regression on near misses of VGAS (arXiv
    2602.07399). In squared logits; the optimum is `listwise`'s. A softmax forgets far chunks, this loss does not: they
    dominate it. A pair weighs `w_i * w_j`, the N pairs i = j are counted, so the mean is twice the variance of
    `E / temperature - d / distance_scale`: O(N). Residuals above 1e19 overflow to inf in fp32; gradients stay finite.

    Args:
        distances: `(B,N)` of each chunk to the expert's; column 0 is usually 0. No gradient is taken.

    Returns:
        0-d tensor, the mean over rows that have a negative; 0 if there are none.

    Raises:
        ValueError: `distances` is not of the energies' shape.
    """
    used = _used(energies, valid, weight)
    energies, distances = _only(energies, used), _only(_like(energies, distances, "distances"), used)
    # Gaps to the expert first: a large common offset must not eat the digits.
    gaps = (energies - energies[:, :1]) / temperature - (distances - distances[:, :1]) / distance_scale
    shares = _shares(energies, used, weight)
    deviations = _only(gaps - (shares * gaps).sum(1, keepdim=True), used)
    return _mean_rows(2 * (shares * deviations.square()).sum(1), used)


def margin(energies: Tensor, width: float, valid: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """`relu(E_expert - E_negative + width)`, a weighted mean over a row's negatives; report, remedy 5.

    The report writes `relu(E_neg - E_pos + width)`. With lower-is-better energies that trains the head backwards.

    Returns:
        0-d tensor, the mean over rows that have a negative; 0 if there are none.
    """
    used = _used(energies, valid, weight)
    violation, negatives = _violation(energies, width, used)
    return _mean_rows((violation * _shares(energies, negatives, weight)).sum(1), used)


def hinge(energies: Tensor, width: float, valid: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """`relu(E_expert - min over negatives of E_negative + width)`: the most offending negative alone.

    The energy-based hinge loss of LeCun et al. 2006. With `weight`, the largest weighted violation counts, weights
    taken relative to the row's largest. Equally offending negatives share the gradient.

    Returns:
        0-d tensor, the mean over rows that have a negative; 0 if there are none.
    """
    used = _used(energies, valid, weight)
    violation, negatives = _violation(energies, width, used)
    shares = _shares(energies, negatives, weight)
    relative = shares / shares.amax(1, keepdim=True).clamp_min(1e-12)
    return _mean_rows((violation * relative).amax(1), used)


def diversity(energies: Tensor, minimum: float, valid: Tensor | None = None) -> Tensor:
    """`relu(minimum - std(E))` per row, population std over the row's valid entries; report, remedy 5.

    The report takes the std over everything, which an offset that depends on the context alone satisfies; within a
    row it cannot. Its sample std of one element is NaN (F2 with a batch of one); the population's is 0.

    At exactly zero spread std has a kink: it grows alike in opposite directions, and none is preferred. The gradient
    there is defined as 0, so this term alone cannot free a head that is constant to the last bit.

    Returns:
        0-d tensor, the mean over rows that have a negative; 0 if there are none.
    """
    used = _used(energies, valid, None)
    energies, count = _only(energies, used), used.sum(1, keepdim=True).clamp_min(1).to(energies.dtype)
    deviations = _only(energies - energies.sum(1, keepdim=True) / count, used)
    # vector_norm's backward is 0 at 0, sqrt's is inf * 0 = NaN.
    std = torch.linalg.vector_norm(deviations, dim=1) / count[:, 0].sqrt()
    return _mean_rows(torch.relu(minimum - std), used)


def anchor(energies: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean of E^2 over valid entries; fixes the offset that the row-wise losses leave free.

    Without it any function of the context alone drifts freely; with a saturating range that kills the head within
    tens of steps.
    """
    if valid is None:
        return energies.square().mean()
    return torch.where(valid, energies, torch.zeros_like(energies)).square().sum() / valid.sum().clamp_min(1)


def outcome(
    energies: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    bias: float | Tensor = 0.0,
    valid: Tensor | None = None,
) -> Tensor:
    """Binary cross entropy between `sigmoid(-E / temperature + bias)` of executed chunks and what came of them.

    A success classifier whose logit is the negative energy. Its floor is the targets' mean entropy, not 0. Unlike the
    row-wise losses it sees an offset of E; `bias`, the same in all contexts, takes the level that `anchor` holds E at,
    so the two do not pull against each other. The gradient of each energy is bounded
    by 1 / temperature.

    Args:
        energies: `(R,)` of one executed chunk a frame.
        targets: `(R,)` in [0, 1], see `outcome_targets`. No gradient is taken.
        bias: in logits.
        valid: `(R,)` bool; a frame that is not takes no part, whatever its energy. None: all are.

    Returns:
        0-d tensor, the mean over valid frames; 0 if there are none.

    Raises:
        ValueError: `targets` or `valid` is not of the energies' shape.
    """
    used = torch.ones_like(energies, dtype=torch.bool) if valid is None else valid
    targets = _only(_like(energies, targets, "targets"), _like(energies, used, "valid"))
    logits = logits_of(_only(energies, used), temperature) + bias
    each = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return _only(each, used).sum() / used.sum().clamp_min(1)


def outcome_targets(success: Tensor, remaining: Tensor, discount: float) -> Tensor:
    """`discount**remaining` in solved episodes, 0 in failed ones: the discounted return of a reward of 1 at the end.

    Args:
        success: `(R,)` bool, of the frame's episode.
        remaining: `(R,)` steps that follow in the episode.
        discount: per step, 0 to 1; 0 leaves 1 at a solved episode's last step alone.

    Returns:
        `(R,)` float32.

    Raises:
        ValueError: a discount outside [0, 1], or shapes that differ.
    """
    if not 0 <= discount <= 1 or success.shape != remaining.shape:
        shapes = f"success {tuple(success.shape)}, remaining {tuple(remaining.shape)}"
        raise ValueError(f"discount={discount}, {shapes}: expected 0 <= discount <= 1 and equal shapes")
    returns = torch.full_like(remaining, discount, dtype=torch.float32) ** remaining
    return _only(returns, success)


@torch.no_grad()
def log_frequency(chunks: Tensor, width: float) -> Tensor:
    """`log(mean over the M chunks of exp(-distance / width))`: how common each chunk is among them, for `log_q`.

    A Laplace kernel density up to a constant; distance is the mean absolute difference. A chunk that is there k times
    gets `log(k / M)` where the others are far; `+ log(M)` makes that 0 for a chunk that is there once, the value to
    give to columns that were not drawn from `chunks`.

    Args:
        chunks: `(M,H,A)` normalised; any floating dtype, computed in at least fp32.
        width: of the kernel, mean absolute distance.

    Returns:
        `(M,)` without gradient, between `-log(M)` and 0.

    Raises:
        ValueError: `chunks` is not `(M,H,A)` with M, H and A above 0, or `width` is not above 0.
    """
    if chunks.ndim != 3 or not chunks.numel() or not width > 0:
        raise ValueError(f"chunks {tuple(chunks.shape)}, width={width}: expected (M,H,A) without a 0, width above 0")
    flat = chunks.flatten(1).to(torch.promote_types(chunks.dtype, torch.float32))
    distances = torch.cdist(flat, flat, p=1.0) / flat.shape[1]
    return logits_of(distances, width).logsumexp(1) - math.log(len(flat))


def mixed_alpha(step: int, mix_steps: int) -> float:
    """InfoNCE's share `min(1, step / mix_steps)` of the mixed loss; report, remedy 5. 1 where `mix_steps` is 0.

    Raises:
        ValueError: `step` or `mix_steps` is below 0.
    """
    if step < 0 or mix_steps < 0:
        raise ValueError(f"step={step}, mix_steps={mix_steps}: expected 0 or more")
    return min(1.0, step / mix_steps) if mix_steps else 1.0


def _used(energies: Tensor, valid: Tensor | None, weight: Tensor | None) -> Tensor:
    """`(B,N)` bool: negatives that count, and the expert of rows that have one. All False in other rows."""
    negatives = negatives_of(energies, valid)
    if weight is not None:
        negatives = negatives & (weight[..., 1:] > 0)
    return torch.cat([negatives.any(1, keepdim=True), negatives], 1)


def _only(values: Tensor, used: Tensor) -> Tensor:
    """0 where not used. Before any arithmetic: a product with 0 leaves NaN of an inf, in the gradient too."""
    return torch.where(used, values, torch.zeros_like(values))


def _like(energies: Tensor, values: Tensor, name: str) -> Tensor:
    if values.shape != energies.shape:
        raise ValueError(f"{name} {tuple(values.shape)}: expected the energies' {tuple(energies.shape)}")
    return values.detach()


def _shares(energies: Tensor, used: Tensor, weight: Tensor | None) -> Tensor:
    """`(B,N)` weights of the used entries, summing to 1 in each row that has any."""
    shares = used.to(energies.dtype)
    if weight is not None:
        shares = _only(weight.to(energies.dtype).expand_as(energies), used)
    return shares / shares.sum(1, keepdim=True).clamp_min(1e-12)


def _violation(energies: Tensor, width: float, used: Tensor) -> tuple[Tensor, Tensor]:
    """`relu(E_expert - E_negative + width) (B,N)`, 0 in column 0, and the used negatives `(B,N)`."""
    negatives = used.clone()
    negatives[:, 0] = False
    energies = _only(energies, used)
    return _only(torch.relu(energies[:, :1] - energies + width), negatives), negatives


def _log_softmax(logits: Tensor, used: Tensor, weight: Tensor | None) -> Tensor:
    if weight is not None:
        logits = logits + weight.log()
    logits = logits.masked_fill(~used, torch.finfo(logits.dtype).min)
    # Relative to the largest, or a used logit of -2e30 would lie below the masked ones.
    top = logits.detach().amax(1, keepdim=True)
    return (logits - top).masked_fill(~used, _MASKED).log_softmax(1)


def _mean_rows(losses: Tensor, used: Tensor) -> Tensor:
    return torch.where(used[:, 0], losses, torch.zeros_like(losses)).sum() / used[:, 0].sum().clamp_min(1)
