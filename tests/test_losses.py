"""Each loss against a naive loop, forward and backward; signs; rows without negatives."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_energy import losses

TEMPERATURE, SCALE, WIDTH = 0.7, 0.03, 0.5


def naive_info_nce(energies, distances, valid, weight):
    rows = []
    for i in range(len(energies)):
        others = [j for j in range(1, energies.shape[1]) if valid[i, j]]
        if others:
            terms = [torch.exp(-energies[i, j] / TEMPERATURE) * (1.0 if j == 0 else weight[j]) for j in [0, *others]]
            rows.append(-torch.log(terms[0] / sum(terms)))
    return torch.stack(rows).sum() / len(rows)


def naive_listwise(energies, distances, valid, weight):
    rows = []
    for i in range(len(energies)):
        columns = [0] + [j for j in range(1, energies.shape[1]) if valid[i, j]]
        if len(columns) > 1:
            w = [1.0 if j == 0 else weight[j] for j in columns]
            model = [torch.exp(-energies[i, j] / TEMPERATURE) * k for j, k in zip(columns, w, strict=True)]
            target = [torch.exp(-distances[i, j] / SCALE) * k for j, k in zip(columns, w, strict=True)]
            p, q = [t / sum(target) for t in target], [m / sum(model) for m in model]
            rows.append(sum(a * (a / b).log() for a, b in zip(p, q, strict=True)))
    return torch.stack(rows).sum() / len(rows)


def naive_margin(energies, distances, valid, weight):
    rows = []
    for i in range(len(energies)):
        others = [j for j in range(1, energies.shape[1]) if valid[i, j]]
        if others:
            terms = [weight[j] * torch.clamp(energies[i, 0] - energies[i, j] + WIDTH, min=0) for j in others]
            rows.append(sum(terms) / sum(weight[j] for j in others))
    return torch.stack(rows).sum() / len(rows)


def fast(name: str, energies, distances, valid, weight):
    if name == "info_nce":
        return losses.info_nce(energies, TEMPERATURE, valid, weight)
    if name == "listwise":
        return losses.listwise(energies, distances, TEMPERATURE, SCALE, valid, weight)
    return losses.margin(energies, WIDTH, valid, weight)


NAIVE = {"info_nce": naive_info_nce, "listwise": naive_listwise, "margin": naive_margin}


def case(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    energies = torch.randn(4, 6, generator=generator, dtype=torch.float64).requires_grad_()
    distances = torch.rand(4, 6, generator=generator, dtype=torch.float64) * 0.2
    distances[:, 0] = 0
    valid = torch.rand(4, 6, generator=generator) < 0.6
    valid[:, 0], valid[0, 1], valid[2, 1:] = True, True, False
    weight = torch.rand(6, generator=generator, dtype=torch.float64) + 0.5
    weight[0] = 1
    return energies, distances, valid, weight


@pytest.mark.parametrize("name", NAIVE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_its_naive_twin(name: str, dtype: torch.dtype) -> None:
    energies, distances, valid, weight = case()
    slow = NAIVE[name](energies, distances, valid, weight)
    (expected,) = torch.autograd.grad(slow, energies)
    cast = energies.detach().to(dtype).requires_grad_()
    quick = fast(name, cast, distances.to(dtype), valid, weight.to(dtype))
    (gradient,) = torch.autograd.grad(quick, cast)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(quick.double(), slow, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(gradient.double(), expected, atol=tolerance, rtol=tolerance)
    assert (gradient[~valid] == 0).all()


@pytest.mark.parametrize("name", NAIVE)
def test_one_step_lowers_the_expert_against_its_negatives(name: str) -> None:
    energies = torch.zeros(3, 5, requires_grad=True)
    distances = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4]).expand(3, -1)
    (gradient,) = torch.autograd.grad(fast(name, energies, distances, None, None), energies)
    stepped = energies - 0.1 * gradient
    assert (stepped[:, :1] < stepped[:, 1:]).all()


@pytest.mark.parametrize("name", NAIVE)
@pytest.mark.parametrize("columns", [1, 4])
def test_no_negatives_is_zero_and_counted(name: str, columns: int) -> None:
    energies = torch.randn(2, columns, requires_grad=True)
    valid = torch.zeros(2, columns, dtype=torch.bool)
    valid[:, 0] = True
    loss = fast(name, energies, energies.detach().abs(), valid, None)
    (gradient,) = torch.autograd.grad(loss, energies)
    assert loss == 0
    assert (gradient == 0).all()
    assert losses.count_no_negatives(energies, valid) == 2


@pytest.mark.parametrize("name", NAIVE)
def test_a_masked_energy_may_be_anything(name: str) -> None:
    energies, distances, valid, weight = case()
    poisoned = energies.detach().clone()
    poisoned[~valid] = float("inf")
    poisoned.requires_grad_()
    loss = fast(name, poisoned, distances, valid, weight)
    (gradient,) = torch.autograd.grad(loss, poisoned)
    torch.testing.assert_close(loss, fast(name, energies, distances, valid, weight))
    assert gradient.isfinite().all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(-50, 50))
def test_row_wise_losses_ignore_an_offset_and_only_the_anchor_sees_it(seed: int, offset: float) -> None:
    energies, distances, valid, weight = case(seed)
    for name in NAIVE:
        plain, moved = (fast(name, e, distances, valid, weight) for e in (energies, energies + offset))
        torch.testing.assert_close(plain, moved, atol=1e-9, rtol=1e-9)
    assert losses.anchor(energies.detach() * 0 + offset) == pytest.approx(offset**2)


def test_known_values() -> None:
    assert losses.info_nce(torch.zeros(5, 8), 0.5).item() == pytest.approx(math.log(8))
    distances = torch.rand(5, 8)
    assert losses.listwise(2 * distances / SCALE + 3, distances, 2.0, SCALE).item() == pytest.approx(0, abs=1e-5)
    assert losses.anchor(torch.tensor([[3.0, 9.0]]), torch.tensor([[True, False]])) == 9


def test_extreme_energies_stay_finite() -> None:
    energies = torch.tensor([[1e30, -1e30, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(losses.info_nce(energies, 0.5), energies)
    assert gradient.isfinite().all()
