"""Noise on action chunks, in normalised units: shared by the candidates of inference and the negatives of training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vla_energy.actions import DatasetStatistics


def smooth_noise(
    shape: Sequence[int],
    correlation: float,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Gaussian noise `(...,H,A)` fp32, of unit variance everywhere, correlated over the H time steps.

    A stationary AR(1) process, the Ornstein-Uhlenbeck process sampled at equal times:
    `x_0 = e_0`, `x_t = c x_{t-1} + sqrt(1 - c^2) e_t`. Independent noise at every step averages out over a chunk and
    proposes jerks that no expert makes.

    Raises:
        ValueError: correlation outside [0, 1].
    """
    if not 0 <= correlation <= 1:
        raise ValueError(f"correlation={correlation}: expected 0 to 1")
    source = generator.device if generator is not None else device
    noise = torch.randn(tuple(shape), generator=generator, device=source).to(device or source)
    steps = noise.unbind(-2)
    smooth = [steps[0]]
    for step in steps[1:]:
        smooth.append(correlation * smooth[-1] + math.sqrt(1 - correlation**2) * step)
    return torch.stack(smooth, -2)


def noise_scale(statistics: DatasetStatistics) -> Tensor:
    """`(A,)` fp32: each dimension's standard deviation in normalised units over their mean; 0 where not normalised.

    A dimension that hardly moves in the demonstrations gets little noise; the mean over the others is 1.

    Raises:
        ValueError: no dimension is normalised and moves.
    """
    action = statistics.action
    std = torch.as_tensor(2 * action.std / (action.q99 - action.q01 + 1e-8), dtype=torch.float32)
    moving = torch.as_tensor(action.mask & (action.min < action.max) & (action.q01 < action.q99))
    if not moving.any():
        raise ValueError("no normalised action dimension moves in these statistics")
    return torch.where(moving, std / std[moving].mean(), torch.zeros_like(std))
