"""Energy ranges `scale * f(slope * raw) + offset` (report, remedy 1), and how much slope they leave to the loss."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vla_energy.config import RangeConfig, checks

_FUNCTIONS = {
    "sigmoid": torch.sigmoid,
    "bounded": torch.sigmoid,
    "relu_scaled": torch.relu,
    "softplus": F.softplus,
    "softplus_scaled": F.softplus,
    "linear": torch.positive,
}
_ROUNDING = 4 * torch.finfo(torch.float32).eps  # energies are made in fp32, whatever they are converted to later


def apply_range(raw: Tensor, config: RangeConfig) -> Tensor:
    """`scale * f(slope * raw) + offset`, with f by `config.name` (report, remedy 1); the shape of `raw`."""
    scale, slope, offset = config.constants()
    return scale * _FUNCTIONS[config.name](slope * raw) + offset


def relative_slope(energies: Tensor, config: RangeConfig) -> Tensor:
    """|dE/draw| at `energies`, as a share 0..1 of the range's largest slope; the shape of `energies`.

    From the energies alone, as f can be inverted wherever it has a slope: with `f = (E - offset) / scale` the sigmoid's
    derivative is `f * (1 - f)` (at most 1/4) and softplus' is `1 - exp(-f)`. NaN stays NaN; an energy outside the
    range (rounding) counts as on its edge.

    Where an energy is a mean of several (`head.per_step`), this is the slope at the mean. It is never below the mean
    of the steps' slopes, so it can miss dead steps but invents none.
    """
    scale, _, offset = config.constants()
    level = (energies - offset) / scale
    if config.name in ("sigmoid", "bounded"):
        share = 4 * level * (1 - level)
    elif config.name in ("softplus", "softplus_scaled"):
        share = -torch.expm1(-level)
    elif config.name == "relu_scaled":
        share = (energies - offset > _ROUNDING * energies.abs()).to(level.dtype)
    else:
        share = torch.ones_like(level)
    return share.clamp(0, 1).masked_fill(energies.isnan(), math.nan)


def saturated_share(energies: Tensor, config: RangeConfig, below: float = 0.01) -> Tensor:
    """Share of `energies` (any shape) whose relative slope is under `below`, a 0-d tensor.

    Such a unit is dead: hardly any gradient of any loss passes the range (report, F1 and F2, and the correction to 1a).
    An energy that is NaN makes the share NaN, and so does an empty tensor.

    Raises:
        ValueError: `below` is not within 0 < below <= 1.
    """
    checks.require(checks.is_number(below) and 0 < below <= 1, "below", below, "0 < below <= 1")
    slopes = relative_slope(energies.detach(), config)
    return (slopes < below).to(slopes.dtype).masked_fill(slopes.isnan(), math.nan).mean()
