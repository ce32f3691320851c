"""Energy ranges: their slope, from the energies alone, against autograd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vla_energy.config import RANGES, RangeConfig
from vla_energy.ranges import apply_range, relative_slope, saturated_share

PLAIN = {
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "bounded": lambda x: 1 / (1 + math.exp(-x)),
    "relu_scaled": lambda x: max(x, 0.0),
    "softplus": lambda x: math.log1p(math.exp(x)),
    "softplus_scaled": lambda x: math.log1p(math.exp(x)),
    "linear": lambda x: x,
}
STEEPEST = {"sigmoid": 0.25, "bounded": 0.25}  # of f; 1 for the others
CONSTANTS = [{}, {"scale": 3.0, "slope": 0.4, "offset": -2.5}, {"scale": 0.2, "slope": 5.0, "offset": 0.0}]
ranges = pytest.mark.parametrize("config", [RangeConfig(name, **c) for name in RANGES for c in CONSTANTS], ids=str)


def slope_by_autograd(raw: Tensor, config: RangeConfig) -> Tensor:
    raw = raw.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(apply_range(raw, config).sum(), raw)
    scale, slope, _ = config.constants()
    return gradient / (scale * slope * STEEPEST.get(config.name, 1.0))


@ranges
def test_a_range_is_scale_times_f_plus_offset(config: RangeConfig) -> None:
    scale, slope, offset = config.constants()
    raw = torch.linspace(-9, 9, 37, dtype=torch.float64)
    expected = [scale * PLAIN[config.name](slope * x) + offset for x in raw.tolist()]
    energies = apply_range(raw, config)
    # 1e-9: beyond 20, PyTorch's softplus is the identity.
    torch.testing.assert_close(energies, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-9)
    assert energies is not raw


@ranges
def test_relative_slope_equals_autograd(config: RangeConfig) -> None:
    raw = torch.linspace(-40, 40, 401, dtype=torch.float64)
    raw = raw[raw.abs() > 1e-9].view(4, -1)  # relu has no slope at 0
    actual = relative_slope(apply_range(raw, config), config)
    torch.testing.assert_close(actual, slope_by_autograd(raw, config), rtol=1e-7, atol=3e-9)


@ranges
def test_in_fp32_the_slope_survives_rounding(config: RangeConfig) -> None:
    raw = torch.linspace(-40, 40, 401)
    raw = raw[raw.abs() > 1e-2]
    slopes = relative_slope(apply_range(raw, config), config)
    assert slopes.dtype == torch.float32
    assert slopes.min() >= 0
    assert slopes.max() <= 1
    torch.testing.assert_close(slopes, slope_by_autograd(raw.double(), config).float(), rtol=0, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(RANGES)), st.floats(1e-3, 1e3), st.floats(-1e3, 1e3), st.floats(-1e6, 1e6))
def test_any_energy_has_a_slope_between_0_and_1(name: str, scale: float, offset: float, energy: float) -> None:
    energies = torch.tensor([[energy, math.inf], [-math.inf, math.nan]])
    slopes = relative_slope(energies, RangeConfig(name, scale=scale, offset=offset))
    assert slopes.isnan().tolist() == [[False, False], [False, True]]
    assert slopes[~slopes.isnan()].min() >= 0
    assert slopes[~slopes.isnan()].max() <= 1


def test_a_relu_unit_at_its_offset_is_dead_even_after_fp32_rounding() -> None:
    config = RangeConfig("relu_scaled")
    dead = apply_range(torch.tensor([-3.0, -1e-9, 0.0]), config)
    assert torch.equal(relative_slope(dead, config), torch.zeros(3))
    assert torch.equal(relative_slope(dead.double(), config), torch.zeros(3, dtype=torch.float64))
    assert torch.equal(relative_slope(torch.nextafter(dead, torch.tensor(1.0)), config), torch.zeros(3))
    assert relative_slope(apply_range(torch.tensor(1e-6), config), config) == 1


@pytest.mark.parametrize(
    ("name", "raw", "share"),
    [
        ("sigmoid", [-10.0, 10.0, 0.0, 1.0], 0.5),  # F2: raw at +-10
        ("bounded", [-10.0, 10.0, 0.0, 1.0], 0.5),
        ("relu_scaled", [-10.0, -0.1, 0.1, 10.0], 0.5),  # 1a: no way back from below 0
        ("softplus", [-10.0, -8.0, 0.0, 1e4], 0.25),  # slope 0.0067 and 0.018 of the largest
        ("softplus_scaled", [-10.0, -8.0, 0.0, 1e4], 0.0),
        ("linear", [-1e6, 0.0, 1.0, 1e6], 0.0),
    ],
)
def test_saturated_share(name: str, raw: list[float], share: float) -> None:
    config = RangeConfig(name)
    measured = saturated_share(apply_range(torch.tensor(raw).view(2, 2), config), config)
    assert measured.shape == ()
    assert measured.item() == share


def test_a_saturated_sigmoid_passes_no_gradient_to_its_weights_and_is_counted() -> None:
    """The original's failure in small: a context-only offset (bias) of 20 and nothing can move it back."""
    config, bias = RangeConfig("sigmoid"), torch.tensor(20.0, requires_grad=True)
    energies = apply_range(torch.linspace(-1, 1, 8) + bias, config)
    energies.square().mean().backward()
    assert bias.grad is not None
    assert bias.grad.abs() < 1e-7
    assert saturated_share(energies, config) == 1


def test_the_bound_of_the_saturated_share() -> None:
    config = RangeConfig("sigmoid")
    energies = apply_range(torch.tensor([-2.0, 0.0, 2.0, 9.0]), config)  # slopes 0.42, 1, 0.42, 5e-4
    assert [saturated_share(energies, config, below).item() for below in (1e-4, 0.01, 0.5, 1.0)][:3] == [0, 0.25, 0.75]
    for wrong in (0.0, -1.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="below"):
            saturated_share(energies, config, wrong)
    assert saturated_share(torch.tensor([0.5, math.nan]), config).isnan()
