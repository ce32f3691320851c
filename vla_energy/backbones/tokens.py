"""Discrete action tokens: a chunk's numbers are bins, and the bins are the last ids of the vocabulary (openvla-oft).

All tokens of a chunk are predicted in one pass. Bin d of 1 to `n_action_bins` has id `vocab_size - d`; the host has one
centre fewer than bins, so the last two bins share the last centre.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vla_energy.backbones.config import OpenVLAConfig
from vla_energy.distributed import ALONE, Ranks


def bin_centers(config: OpenVLAConfig) -> Tensor:
    """`(bins - 1,)` float64, from -1 to 1."""
    edges = torch.linspace(-1, 1, config.n_action_bins, dtype=torch.float64)
    return (edges[:-1] + edges[1:]) / 2


def decode(ids: Tensor, action_dim: int, config: OpenVLAConfig) -> Tensor:
    """Token ids `(..., H*A)` to normalised actions `(..., H, A)` float32.

    Ids of text decode to an end of the range, as in the host.
    """
    centers = bin_centers(config).to(ids.device)
    index = (config.vocab_size - ids - 1).clamp(0, len(centers) - 1)
    return centers[index].float().unflatten(-1, (-1, action_dim))


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the chunk's tokens and of the stop token behind them, as the host trains them; 0-d float32.

    Args:
        logits: `(B, H*A + 1, V)`, see `VLAOutput.token_logits`.
        labels: `(B, T)` of the batch: -100 but at these tokens.

    Raises:
        ValueError: a row has another number of labels.
    """
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), _targets(logits, labels).flatten())


def token_metrics(logits: Tensor, labels: Tensor, action_dim: int, config: OpenVLAConfig) -> dict[str, Tensor]:
    """The host's metrics, 0-d: share of right tokens, and L1 to the expert's bins, of the first action and the rest.

    Args:
        logits, labels: as in `token_loss`.
        action_dim: A.
        config: of the checkpoint.
    """
    targets, chosen = _targets(logits, labels)[:, :-1], logits[:, :-1].argmax(-1)
    right = (chosen == targets).float()
    errors = (decode(chosen, action_dim, config) - decode(targets, action_dim, config)).abs()
    metrics = {}
    parts = {"current": slice(None, 1), "next": slice(1, None) if errors.shape[1] > 1 else slice(None)}
    for name, steps in parts.items():
        metrics[f"accuracy_{name}"] = right.unflatten(-1, (-1, action_dim))[:, steps].mean()
        metrics[f"binned_l1_{name}"] = errors[:, steps].mean()
    return metrics


def _targets(logits: Tensor, labels: Tensor) -> Tensor:
    there = labels >= 0
    if bool((there.sum(1) != logits.shape[1]).any()):
        raise ValueError(f"labels a row {there.sum(1).tolist()}: expected {logits.shape[1]}, the chunk's and the stop")
    return labels[there].unflatten(0, (len(labels), -1))


def expected_chunks(logits: Tensor, action_dim: int, config: OpenVLAConfig) -> Tensor:
    """Mean action under the bins' distributions `(B, H, A)`: unlike the likeliest one, it moves with every input."""
    ids = _action_ids(config, logits.device)
    values = decode(ids, 1, config)[:, 0]
    return (logits[:, :-1, ids].float().softmax(-1) @ values).unflatten(-1, (-1, action_dim))


def sample_chunks(
    logits: Tensor,
    count: int,
    temperature: float,
    generator: torch.Generator | Sequence[torch.Generator],
    action_dim: int,
    config: OpenVLAConfig,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Chunks drawn from the tokens' distributions, `(B, K, H, A)` normalised float32, no gradient.

    Tokens are drawn independently, as they are predicted; ids that are no bins are never drawn.

    Args:
        logits: `(B, H*A + 1, V)`, see `VLAOutput.token_logits`.
        count: K.
        temperature: divides the logits; towards 0 the draws become the likeliest bins.
        generator: on the CPU; or B of them, so that a row's chunks do not depend on its batch.
        action_dim: A.
        config: of the checkpoint.
        ranks: with one generator, in the same state on all of them: B rows are this rank's of the whole batch's.

    Raises:
        ValueError: temperature is not above 0, or there are not B generators.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected above 0")
    ids = _action_ids(config, logits.device)
    # In float64: the sum of 256 rounded probabilities must not leave a gap at its end.
    shares = (logits.detach()[:, :-1, ids].double() / temperature).softmax(-1).cumsum(-1)
    shape = (*shares.shape[1:2], count)
    if isinstance(generator, torch.Generator):
        draws = ranks.own(torch.rand((ranks.world * len(logits), *shape), generator=generator, dtype=torch.float64))
    elif len(generator) == len(logits):
        draws = torch.stack([torch.rand(shape, generator=own, dtype=torch.float64) for own in generator])
    else:
        raise ValueError(f"{len(generator)} generators for {len(logits)} rows: expected one a row")
    chosen = torch.searchsorted(shares, draws.to(shares.device), right=True).clamp_max(len(ids) - 1)
    return decode(ids[chosen].transpose(1, 2), action_dim, config)


def _action_ids(config: OpenVLAConfig, device: torch.device) -> Tensor:
    """Ids of all bins, ascending: from the highest action to the lowest."""
    return torch.arange(config.vocab_size - config.n_action_bins, config.vocab_size, device=device)
