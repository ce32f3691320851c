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
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Gaussian noise `(...,H,A)` fp32, of unit variance everywhere, correlated over the H time steps.

    A stationary AR(1) process, the Ornstein-Uhlenbeck process sampled at equal times:
    `x_0 = e_0`, `x_t = c x_{t-1} + sqrt(1 - c^2) e_t`. Independent noise at every step averages out over a chunk and
    proposes jerks that no expert makes.

    Args:
        shape: `(...,H,A)`.
        correlation: c, 0 to 1.
        generator: of the whole, or a sequence with one for each entry of the first axis, which then gets the noise that
            it would get alone. Where it lies the noise is drawn.
        device: of the result.

    Raises:
        ValueError: correlation outside [0, 1], or another number of generators than entries.
    """
    if not 0 <= correlation <= 1:
        raise ValueError(f"correlation={correlation}: expected 0 to 1")
    if generator is None or isinstance(generator, torch.Generator):
        noise = _draw(shape, generator, device)
    elif len(generator) == shape[0]:
        noise = torch.stack([_draw(shape[1:], own, device) for own in generator])
    else:
        raise ValueError(f"{len(generator)} generators for {shape[0]} entries")
    # Scaled at once: of small chunks each further operation costs more than its arithmetic.
    first, *steps = (noise[..., :1, :], *(math.sqrt(1 - correlation**2) * noise[..., 1:, :]).split(1, -2))
    smooth = [first]
    for step in steps:
        smooth.append(correlation * smooth[-1] + step)
    return torch.cat(smooth, -2)


def _draw(shape: Sequence[int], generator: torch.Generator | None, device: torch.device | None) -> Tensor:
    source = generator.device if generator is not None else device
    return torch.randn(tuple(shape), generator=generator, device=source).to(device or source)


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
