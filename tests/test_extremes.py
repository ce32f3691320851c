"""Extreme finite inputs of public functions: the result is finite and where it should be, or our own error comes."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vla_energy import losses
from vla_energy.actions import DatasetStatistics, FieldStatistics, RawActions, StatisticsError
from vla_energy.calibrate import calibrate_margin
from vla_energy.measures import chunk_distance, spearman, success_auc, win_rate
from vla_energy.rerank import choose

# Squares of these still fit into fp32; beyond them losses may overflow, and the guard skips the step.
LARGE = st.one_of(
    st.sampled_from([0.0, -0.0, 1e15, -1e15, 1e-30, -1e-30, 1.0]), st.floats(-1e15, 1e15), st.floats(-1, 1)
)
ANY = st.one_of(st.sampled_from([3.4e38, -3.4e38, 1e-30, 0.0]), st.floats(-1e38, 1e38))


@st.composite
def rows(draw: st.DrawFn, numbers: st.SearchStrategy[float] = LARGE) -> Tensor:
    """`(B,N)` fp32."""
    count, width = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    return torch.tensor(draw(st.lists(numbers, min_size=count * width, max_size=count * width))).view(count, width)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "info_nce": lambda e, _, v: losses.info_nce(e, 0.05, v),
    "clamped": lambda e, _, v: losses.info_nce(e, 0.05, v, logit_clamp=50.0),
    "listwise": lambda e, d, v: losses.listwise(e, d, 0.5, 0.1, v),
    "regression": lambda e, d, v: losses.distance_regression(e, d, 1.0, 1.0, v),
    "margin": lambda e, _, v: losses.margin(e, 0.1, v),
    "hinge": lambda e, _, v: losses.hinge(e, 0.1, v),
    "diversity": lambda e, _, v: losses.diversity(e, 0.1, v),
    "anchor": lambda e, _, v: losses.anchor(e, v),
    "outcome": lambda e, d, v: losses.outcome(e[:, 0], d[:, 0].clamp(0, 1), 0.5, 0.0, v[:, 0]),
}


@pytest.mark.parametrize("name", LOSSES)
@settings(deadline=None, max_examples=60)
@given(energies=rows(), seed=st.integers(0, 99))
@example(energies=torch.tensor([[1e15, -1e15], [0.0, 0.0]]), seed=0)
@example(energies=torch.tensor([[3.0]]), seed=0)
def test_losses_and_their_gradients_are_finite(name: str, energies: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(energies.shape, generator=generator) < 0.8
    distances = 1e3 * torch.rand(energies.shape, generator=generator)
    energies = energies.clone().requires_grad_()
    loss = LOSSES[name](energies, distances, valid)
    assert loss.ndim == 0 and bool(loss.isfinite())
    loss.backward()
    assert energies.grad is not None and bool(energies.grad.isfinite().all())


@settings(deadline=None, max_examples=100)
@given(energies=rows(ANY), seed=st.integers(0, 99))
def test_measures_are_shares_and_correlations(energies: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    other = torch.randn(energies.shape, generator=generator)
    valid = torch.rand(energies.shape, generator=generator) < 0.8
    assert -1 - 1e-9 <= float(spearman(energies, other)) <= 1 + 1e-9
    share = float(win_rate(energies, valid))
    assert 0 <= share <= 1 if valid[:, 1:].any() else math.isnan(share)
    assert 0 <= float(success_auc(energies[:, 0], other[:, 0] > 0, valid[:, 0])) <= 1
    chunks = energies[:, :, None, None].clamp(-1e37, 1e37)
    assert bool(chunk_distance(chunks, chunks[:, 0]).isfinite().all())


@settings(deadline=None, max_examples=100)
@given(
    energies=rows(st.one_of(ANY, st.just(math.inf), st.just(-math.inf))),
    margin=st.one_of(st.floats(0, 1e38), st.just(math.inf)),
)
def test_the_gate_accepts_only_what_is_lower(energies: Tensor, margin: float) -> None:
    index, accepted = choose(energies, margin)
    assert bool(((index >= 0) & (index < energies.shape[1])).all())
    for row, place, taken in zip(energies, index.tolist(), accepted.tolist(), strict=True):
        assert (place != 0) == taken
        assert not taken or (row[place] == row.min() and row[place] < row[0])
    assert margin != math.inf or not accepted.any()


@settings(deadline=None, max_examples=60)
@given(
    energies=rows(st.one_of(ANY, st.just(math.inf), st.just(math.nan))),
    seed=st.integers(0, 99),
    risk=st.floats(1e-6, 1 - 1e-6),
    episodes=st.booleans(),
)
def test_a_calibrated_margin_is_none_or_a_number(energies: Tensor, seed: int, risk: float, episodes: bool) -> None:
    energies = energies.repeat(20, 1)
    distances = torch.rand(energies.shape, generator=torch.Generator().manual_seed(seed)) * 1e30
    owners = torch.arange(len(energies)) // 2 if episodes else None
    margin = calibrate_margin(energies, distances, risk, episodes=owners)
    assert margin >= 0 and not math.isnan(margin)


@settings(deadline=None, max_examples=100)
@given(
    values=st.lists(st.one_of(st.floats(-1e30, 1e30), st.sampled_from([0.0, 1e-300, -1e30])), min_size=2, max_size=12),
    robot=st.floats(-1e30, 1e30),
)
@example(values=[0.0, 0.0], robot=1e30)
@example(values=[-1e30, 1e30], robot=0.0)
def test_statistics_normalise_to_the_unit_box_and_back(values: list[float], robot: float) -> None:
    field = FieldStatistics.of(np.array(values)[:, None])
    data = {"action": field.to_dict(), "num_transitions": len(values), "num_trajectories": 1}
    try:
        statistics = DatasetStatistics.from_dict(data)
    except StatisticsError:
        assert not np.isfinite(list(data["action"].values())[:6]).all() or max(map(abs, values)) > 1e29
        return
    actions = statistics.normalize(RawActions(np.array([[robot], [values[0]]])))
    assert bool((actions.abs() <= 1).all()) and np.isfinite(statistics.unnormalize(actions).values).all()
