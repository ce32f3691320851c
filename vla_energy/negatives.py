"""Chunks that are not the expert's: one small sampler a source, and `build_negatives` to stack them.

Samplers take normalised chunks and a `torch.Generator`, and return `(B,n,H,A)` in float32. A source that needs other
rows or inner layers and has none gives n = 0 columns, and the set names it in `empty`.

In-batch chunks alone teach "which scene is this", not "is this action good here" (report, last section), and noise of
0.3 never shapes the region in which a policy errs by 0.05. So there is a source around the policy's own chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vla_energy.config import NegativesConfig
from vla_energy.measures import chunk_distance


@dataclass(frozen=True)
class NegativeSet:
    """Negatives of a batch.

    Attributes:
        chunks: `(B,N,H,A)` normalised, no gradient.
        valid: `(B,N)` bool, False where a chunk is so near the expert's that it is none (one-hot losses leave it out).
        distances: `(B,N)` to the expert's chunk, see `chunk_distance`.
        weight: `(N,)`.
        sources: the columns of each source.
        empty: sources that are switched on but gave no column.
    """

    chunks: Tensor
    valid: Tensor
    distances: Tensor
    weight: Tensor
    sources: dict[str, slice]
    empty: tuple[str, ...]


def near_positive_mask(chunks: Tensor, expert: Tensor, threshold: float) -> Tensor:
    """`(B,N)` bool, True where a chunk is nearer to the expert's than `threshold`: a false negative."""
    return chunk_distance(chunks, expert) < threshold


def layer_exits(layer_actions: Tensor, count: int) -> Tensor:
    """At most `count` chunks of inner layers, evenly spread and ending with the last inner one; report, remedy 3.

    Layer 0 is left out (the embeddings are zero at action positions: its chunk is a constant), and so is the last
    layer, which is the policy.

    Args:
        layer_actions: `(B,L,H,A)`.
    """
    inner = layer_actions[:, 1:-1]
    available = inner.shape[1]
    count = min(count, available)
    if count == 0:
        return inner[:, :0]
    picked = [available - 1 - (i * available) // count for i in reversed(range(count))]
    return inner[:, picked]


def gaussian(centre: Tensor, stds: Sequence[float], count: int, generator: torch.Generator) -> Tensor:
    """`count` Gaussian copies of `centre (B,H,A)` for each of `stds`: `(B,len(stds)*count,H,A)`, grouped by std."""
    rows, horizon, dims = centre.shape
    # Drawn on the generator's device: a CPU generator then gives the same negatives on every accelerator.
    shape = (rows, len(stds), count, horizon, dims)
    noise = torch.randn(shape, generator=generator, device=generator.device).to(centre)
    scale = torch.tensor(stds, dtype=centre.dtype, device=centre.device)[:, None, None, None]
    return centre[:, None] + (noise * scale).flatten(1, 2)


def in_batch(expert: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Expert chunks of `min(count, B - 1)` other rows, drawn without replacement for each row; none if B = 1."""
    rows = len(expert)
    count = min(count, rows - 1)
    order = torch.rand((rows, max(rows - 1, 0)), generator=generator, device=generator.device).argsort(1)
    shift = order[:, :count].to(expert.device) + 1
    return expert[(torch.arange(rows, device=expert.device)[:, None] + shift) % rows]


def build_negatives(
    config: NegativesConfig, expert: Tensor, policy: Tensor, layer_actions: Tensor, generator: torch.Generator
) -> NegativeSet:
    """Draws all sources that `config` switches on.

    Args:
        expert: `(B,H,A)` normalised.
        policy: `(B,H,A)` the policy's chunk.
        layer_actions: `(B,L,H,A)`, the policy's chunk last.

    Raises:
        ValueError: the shapes do not fit together.
    """
    fits = layer_actions.ndim == 4 and expert.shape == policy.shape == layer_actions[:, -1].shape
    if not fits:
        shapes = (
            f"expert {tuple(expert.shape)}, policy {tuple(policy.shape)}, layer_actions {tuple(layer_actions.shape)}"
        )
        raise ValueError(f"{shapes}: expected (B,H,A), (B,H,A), (B,L,H,A)")
    expert, policy, layer_actions = (chunks.detach().float() for chunks in (expert, policy, layer_actions))
    exits, expert_noise, policy_noise = (config.layer_exits, config.expert_noise, config.policy_noise)
    drawn: dict[str, tuple[float, Tensor]] = {}
    if exits.count:
        drawn["layer_exits"] = exits.weight, layer_exits(layer_actions, exits.count)
    if expert_noise.count:
        chunks = gaussian(expert, expert_noise.stds, expert_noise.count, generator)
        drawn["expert_noise"] = expert_noise.weight, chunks
    if policy_noise.count:
        drawn["policy"] = policy_noise.weight, policy[:, None]
        chunks = gaussian(policy, policy_noise.stds, policy_noise.count, generator)
        drawn["policy_noise"] = policy_noise.weight, chunks
    if config.in_batch.count:
        drawn["in_batch"] = (config.in_batch.weight, in_batch(expert, config.in_batch.count, generator))
    return _stack(drawn, expert, config.near_positive_threshold)


def _stack(drawn: dict[str, tuple[float, Tensor]], expert: Tensor, threshold: float) -> NegativeSet:
    chunks = torch.cat([part for _, part in drawn.values()], 1)
    weights, sources = [], {}
    for name, (weight, part) in drawn.items():
        sources[name] = slice(len(weights), len(weights) + part.shape[1])
        weights += [weight] * part.shape[1]
    distances = chunk_distance(chunks, expert)
    empty = tuple(name for name, (_, part) in drawn.items() if not part.shape[1])
    return NegativeSet(chunks, distances >= threshold, distances, expert.new_tensor(weights), sources, empty)
