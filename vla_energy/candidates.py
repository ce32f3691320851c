"""Proposals for the reranker: the policy's chunk, chunks from inner layers, and smooth noise on the policy's chunk.

All in normalised units. The policy's own chunk is candidate 0, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vla_energy.config import CandidatesConfig
from vla_energy.noise import noise_scale, smooth_noise

__all__ = ["CandidateSet", "noise_scale", "propose", "smooth_noise"]


@dataclass(frozen=True)
class CandidateSet:
    """Candidates of a batch.

    Attributes:
        actions: `(B,N,H,A)`, normalised; index 0 is the policy's chunk.
        sources: N names, one a column: `policy`, `layer_exit_<layer>`, `noise_<std>`.
    """

    actions: Tensor
    sources: tuple[str, ...]


def propose(
    policy: Tensor,
    layer_actions: Tensor | None,
    config: CandidatesConfig,
    generator: torch.Generator | None = None,
    *,
    gripper_dims: Sequence[int] = (-1,),
    scale: Tensor | None = None,
    correlation: float = 0.9,
    max_layer_exits: int = 4,
) -> CandidateSet:
    """The policy's chunk, then inner layer exits (deepest first), then `config.num_candidates` noisy copies.

    Noise keeps the policy's gripper. All but candidate 0 are clamped to [-1, 1] on the other dimensions, which are the
    normalised ones.

    Args:
        policy: `(B,H,A)` normalised chunk of the policy.
        layer_actions: `(B,L,H,A)`, the policy's chunk last, or None where the policy has no layer exits. Layer 0 (a
            constant) and the last one are left out.
        generator: of the noise; its device decides where the noise is drawn.
        gripper_dims: dimensions without noise and clamping.
        scale: `(A,)` factor of the noise per dimension, see `noise_scale`; None is 1.
        correlation: of noise at neighbouring time steps, see `smooth_noise`.
        max_layer_exits: only so many of the deepest inner layers.

    Raises:
        ValueError: shapes do not fit, or a gripper dimension does not exist.
    """
    _check(policy, layer_actions, gripper_dims)
    free = torch.ones(policy.shape[-1], dtype=torch.bool, device=policy.device)
    free[list(gripper_dims)] = False
    columns, sources = [], []
    if layer_actions is not None and config.layer_exits:
        for layer in range(layer_actions.shape[1] - 2, 0, -1)[:max_layer_exits]:
            columns.append(layer_actions[:, layer].to(policy.dtype))
            sources.append(f"layer_exit_{layer}")
    if config.num_candidates:
        stds = [config.noise_stds[i % len(config.noise_stds)] for i in range(config.num_candidates)]
        noise = smooth_noise((len(policy), len(stds), *policy.shape[1:]), correlation, generator, policy.device)
        noise = noise * torch.tensor(stds, device=policy.device)[:, None, None]
        noise = noise if scale is None else noise * scale.to(noise)
        noisy = torch.where(free, policy[:, None].float() + noise, policy[:, None].float()).to(policy.dtype)
        columns.extend(noisy.unbind(1))
        sources.extend(f"noise_{std:g}" for std in stds)
    columns = [policy, *(torch.where(free, column.clamp(-1, 1), column) for column in columns)]
    return CandidateSet(torch.stack(columns, 1), ("policy", *sources))


def _check(policy: Tensor, layer_actions: Tensor | None, gripper_dims: Sequence[int]) -> None:
    if policy.ndim != 3 or not policy.is_floating_point():
        raise ValueError(f"policy: expected a floating point (B,H,A), got {policy.dtype} {tuple(policy.shape)}")
    dims = policy.shape[-1]
    outside = [dim for dim in gripper_dims if not -dims <= dim < dims]
    if outside:
        raise ValueError(f"gripper_dims {outside}: the actions have {dims} dimensions")
    if layer_actions is not None and (
        layer_actions.ndim != 4 or layer_actions[:, 0].shape != policy.shape or layer_actions.shape[1] < 2
    ):
        shape = tuple(policy.shape)
        raise ValueError(f"layer_actions {tuple(layer_actions.shape)}: expected (B,L,H,A), L >= 2, for policy {shape}")
