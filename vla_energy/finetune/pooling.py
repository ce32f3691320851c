"""Fewer context tokens to store: the mean of neighbouring image patches in their place."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from vla_energy.config import checks


def patch_grid(patches: int, pool: int) -> int:
    """Patches along a side of a square image.

    Raises:
        ValueError: they are no square, or cannot be pooled by `pool`; the message has what can be.
    """
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"{patches} patches an image are no square: they cannot be pooled; leave --pool out")
    possible = [divisor for divisor in range(1, side + 1) if side % divisor == 0]
    checks.require(pool in possible, "--pool", pool, f"one of {possible}: an image has {side} x {side} patches")
    return side


def pool_patches(context: Tensor, mask: Tensor, grid: int, images: int, pool: int) -> tuple[Tensor, Tensor]:
    """Contexts with the mean of each `pool` x `pool` patches in their place: `(B,S',D)` and `(B,S')`.

    Args:
        context, mask: `(B,S,D)` and `(B,S)`: BOS, then the patches of all images, row by row, then the rest.
        grid: patches along an image's side.
        images: cameras.
    """
    rows, last = len(context), 1 + images * grid**2
    patches = context[:, 1:last].reshape(rows * images, grid, grid, -1).permute(0, 3, 1, 2)
    pooled = avg_pool2d(patches.float(), pool).flatten(2).transpose(1, 2).reshape(rows, -1, context.shape[2])
    kept = mask[:, 1 : 1 + pooled.shape[1]]
    pooled_mask = torch.cat([mask[:, :1], torch.ones_like(kept), mask[:, last:]], 1)
    return torch.cat([context[:, :1], pooled.to(context.dtype), context[:, last:]], 1), pooled_mask
