"""Synthetic features at the width of a 7B model: contexts of 4096 that hold the expert's chunk in a noisy code."""

from __future__ import annotations

import torch
from features import Features


def wide_features(frames: int, seed: int, width: int = 4096, tokens: int = 32) -> Features:
    """The expert's chunk times a fixed random matrix, spread over the tokens, in noise; the policy errs by 0.05.

    Layer exits err by 0.5, 0.25 and 0.12. The matrix does not depend on the seed, so that two sets are one world.
    """
    horizon, dims = 8, 7
    world = torch.Generator().manual_seed(1234)
    code = torch.randn(horizon * dims, width, generator=world) / (horizon * dims) ** 0.5
    place = torch.rand(tokens, 1, generator=world)
    draw = torch.Generator().manual_seed(seed)
    expert = torch.rand(frames, horizon, dims, generator=draw) * 2 - 1
    signal = expert.flatten(1) @ code
    context = place * signal[:, None] + 0.3 * torch.randn(frames, tokens, width, generator=draw)
    errors = torch.tensor([1.0, 0.5, 0.25, 0.12, 0.0626])[:, None, None]  # std of Gaussian noise of mean size 0.05
    layers = expert[:, None] + errors * torch.randn(frames, 5, horizon, dims, generator=draw)
    one = torch.ones(dims)
    return Features(
        context.half(), torch.ones(frames, tokens, dtype=torch.bool), expert, layers, torch.arange(frames),
        scale=one, low=-one, high=one, gripper=torch.tensor([], dtype=torch.long),
    )  # fmt: skip
