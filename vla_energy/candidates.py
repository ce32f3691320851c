"""Proposals for the reranker: the policy's chunk, inner layers' chunks, smooth noise on the policy's chunk, and others.

All in normalised units. The policy's own chunk is candidate 0, bit for bit. Others are what the caller has: chunks
retrieved from the training set with what speaks against them (`retrieved_source`), the rest of the chunk under way
(`overlap`), chunks of cropped images, samples of a stochastic head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vla_energy.config import CandidatesConfig, RetrievalConfig
from vla_energy.measures import chunk_distance
from vla_energy.noise import noise_scale, smooth_noise

__all__ = [
    "CandidateSet",
    "Source",
    "noise_scale",
    "overlap",
    "propose",
    "retrieved_source",
    "smooth_noise",
    "source_report",
]


@dataclass(frozen=True)
class Source:
    """Chunks from elsewhere.

    Attributes:
        chunks: `(B,K,H,A)` normalised.
        prior: `(B,K)` added to their energies, lower is better; None is 0. inf rules a chunk out.
    """

    chunks: Tensor
    prior: Tensor | None = None


@dataclass(frozen=True)
class CandidateSet:
    """Candidates of a batch.

    Attributes:
        actions: `(B,N,H,A)`, normalised; index 0 is the policy's chunk.
        sources: N names, one a column: `policy`, `layer_exit_<layer>`, `noise_<std>`, then the caller's.
        prior: `(B,N)` fp32, to be added to the energies; 0 but where a source brought one.
    """

    actions: Tensor
    sources: tuple[str, ...]
    prior: Tensor


def propose(
    policy: Tensor,
    layer_actions: Tensor | None,
    config: CandidatesConfig,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    *,
    gripper_dims: Sequence[int] = (-1,),
    scale: Tensor | None = None,
    correlation: float = 0.9,
    max_layer_exits: int = 4,
    others: Mapping[str, Source] | None = None,
) -> CandidateSet:
    """The policy's chunk, inner layer exits (deepest first), `config.num_candidates` noisy copies, then the others.

    Noise keeps the policy's gripper. All but candidate 0 are clamped to [-1, 1] on the other dimensions, which are the
    normalised ones.

    Args:
        policy: `(B,H,A)` normalised chunk of the policy.
        layer_actions: `(B,L,H,A)`, the policy's chunk last, or None. Layer 0 (a constant) and the last one are left
            out; a policy without layer exits has L = 1.
        generator: of the noise, or B of them, so that a row's noise does not depend on its batch; its device decides
            where the noise is drawn.
        gripper_dims: dimensions without noise and clamping.
        scale: `(A,)` factor of the noise per dimension, see `noise_scale`; None is 1.
        correlation: of noise at neighbouring time steps, see `smooth_noise`.
        max_layer_exits: only so many of the deepest inner layers.
        others: sources by name.

    Raises:
        ValueError: shapes do not fit, a gripper dimension does not exist, or there are not B generators.
    """
    _check(policy, layer_actions, gripper_dims)
    free = torch.ones(policy.shape[-1], dtype=torch.bool, device=policy.device)
    free[list(gripper_dims)] = False
    parts, sources = [], []
    if layer_actions is not None and config.layer_exits:
        layers = range(layer_actions.shape[1] - 2, 0, -1)[:max_layer_exits]
        parts.append(layer_actions[:, 1:-1].flip(1)[:, :max_layer_exits].to(policy.dtype))
        sources.extend(f"layer_exit_{layer}" for layer in layers)
    if config.num_candidates:
        stds = [config.noise_stds[i % len(config.noise_stds)] for i in range(config.num_candidates)]
        noise = smooth_noise((len(policy), len(stds), *policy.shape[1:]), correlation, generator, policy.device)
        noise = noise * torch.tensor(stds, device=policy.device)[:, None, None]
        noise = noise if scale is None else noise * scale.to(noise)
        noisy = torch.where(free, policy[:, None].float() + noise, policy[:, None].float()).to(policy.dtype)
        parts.append(noisy)
        sources.extend(f"noise_{std:g}" for std in stds)
    prior = [torch.zeros(len(policy), 1 + len(sources), device=policy.device)]
    for name, source in (others or {}).items():
        count = source.chunks.shape[1] if source.chunks.ndim == 4 else 0
        if source.chunks.shape != (len(policy), count, *policy.shape[1:]):
            raise ValueError(
                f"{name} {tuple(source.chunks.shape)}: expected (B,K,H,A) for policy {tuple(policy.shape)}"
            )
        if source.prior is not None and source.prior.shape != source.chunks.shape[:2]:
            raise ValueError(f"{name}: expected a prior (B,K), got {tuple(source.prior.shape)}")
        parts.append(source.chunks.to(policy))
        sources.extend([name] * source.chunks.shape[1])
        none = torch.zeros(source.chunks.shape[:2], device=policy.device)
        prior.append(none if source.prior is None else source.prior.to(none))
    rest = torch.cat(parts, 1) if parts else policy[:, None][:, :0]
    actions = torch.cat([policy[:, None], torch.where(free, rest.clamp(-1, 1), rest)], 1)
    return CandidateSet(actions, ("policy", *sources), torch.cat(prior, 1))


def retrieved_source(chunks: Tensor, distances: Tensor, config: RetrievalConfig) -> Source:
    """Retrieved `chunks (B,K,H,A)` at key `distances (B,K)`, see `memory.Retrieved`.

    The prior is `weight * (distance - reach)`: the nearer a key, the more its chunk is believed. It is inf where
    nothing was found.
    """
    return Source(chunks, torch.where(distances.isfinite(), config.weight * (distances - config.reach), math.inf))


def overlap(policy: Tensor, previous: Sequence[Tensor | None], executed: Sequence[int]) -> Tensor:
    """What is left of the chunk under way, filled up with the end of the policy's new one: `(B,H,A)`.

    Args:
        policy: `(B,H,A)` the policy's new chunks.
        previous: of each row, the chunk `(H,A)` under way, or None (then the policy's chunk is given back).
        executed: of each row, its actions that were executed.
    """
    rows = []
    for fresh, chunk, done in zip(policy, previous, executed, strict=True):
        left = fresh[:0] if chunk is None else chunk[done:].to(fresh)
        rows.append(torch.cat([left, fresh[len(left) :]]))
    return torch.stack(rows)


def source_report(candidates: CandidateSet, expert: Tensor) -> dict[str, dict[str, float]]:
    """What each source offers on B frames: `spread`, `oracle` (L1) and `oracle_with_policy`, normalised units.

    `spread` is the mean distance of its chunks to the policy's, `oracle` the L1 of the best of them to the expert's
    `(B,H,A)`, `oracle_with_policy` that of the best of them and the policy's. Chunks whose prior is inf do not count;
    rows without any other are left out of the first two.
    """
    distances = chunk_distance(candidates.actions, expert)
    away = chunk_distance(candidates.actions, candidates.actions[:, 0].float())
    report = {}
    kinds = [_kind(source) for source in candidates.sources]
    for name in dict.fromkeys(kinds):
        columns = [i for i, kind in enumerate(kinds) if kind == name]
        there = candidates.prior[:, columns] < math.inf
        best = distances[:, columns].masked_fill(~there, math.inf).amin(1)
        rows = there.any(1)
        report[name] = {
            "spread": float(away[:, columns][there].mean()),
            "oracle": float(best[rows].mean()),
            "oracle_with_policy": float(torch.minimum(best, distances[:, 0]).mean()),
        }
    return report


def _kind(source: str) -> str:
    """`layer_exit_3` is a `layer_exit`, `noise_0.05` is `noise`; other sources keep their names."""
    return next((kind for kind in ("layer_exit", "noise") if source.startswith(f"{kind}_")), source)


def _check(policy: Tensor, layer_actions: Tensor | None, gripper_dims: Sequence[int]) -> None:
    if policy.ndim != 3 or not policy.is_floating_point():
        raise ValueError(f"policy: expected a floating point (B,H,A), got {policy.dtype} {tuple(policy.shape)}")
    dims = policy.shape[-1]
    outside = [dim for dim in gripper_dims if not -dims <= dim < dims]
    if outside:
        raise ValueError(f"gripper_dims {outside}: the actions have {dims} dimensions")
    if layer_actions is not None and (
        layer_actions.ndim != 4 or not layer_actions.shape[1] or layer_actions[:, 0].shape != policy.shape
    ):
        shape = tuple(policy.shape)
        raise ValueError(f"layer_actions {tuple(layer_actions.shape)}: expected (B,L,H,A), L >= 1, for policy {shape}")
