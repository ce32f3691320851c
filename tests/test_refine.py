"""Descent against a bowl whose lowest point is known; the trust region, the gate, and rows that are not finite."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vla_energy.config import EnergyConfig
from vla_energy.head import EnergyHead
from vla_energy.refine import EnergyFn, refine

B, H, A = 3, 4, 3


def chunks(seed: int, scale: float = 0.5) -> Tensor:
    return scale * (2 * torch.rand(B, H, A, generator=torch.Generator().manual_seed(seed)) - 1)


def bowl(centre: Tensor) -> EnergyFn:
    return lambda actions: (actions - centre[:, None]).square().sum((2, 3))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.floats(0.02, 0.5))
def test_it_ends_at_the_boxs_nearest_point_to_the_lowest_one(seed: int, radius: float) -> None:
    policy, centre = chunks(seed), chunks(seed + 100, 1.2)
    result = refine(bowl(centre), policy, radius=radius, margin=0.0, steps=200, step_size=0.5, gripper_dims=())
    low, high = (policy - radius).clamp(min=-1), (policy + radius).clamp(max=1)
    nearest = torch.minimum(torch.maximum(centre, low), high)
    torch.testing.assert_close(result.actions, nearest, atol=0.12 * radius, rtol=0)
    assert result.accepted.all() and (result.energy_lowest < result.energy_policy).all()
    torch.testing.assert_close(result.moved, (result.actions - policy).abs().mean((1, 2)))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.floats(0.01, 2.0), st.floats(0.05, 20), st.integers(0, 12))
def test_never_outside_the_box_and_never_higher(seed: int, radius: float, step_size: float, steps: int) -> None:
    policy, centre = chunks(seed, 1.1), chunks(seed + 100, 2.0)
    result = refine(bowl(centre), policy, radius=radius, margin=0.0, steps=steps, step_size=step_size)
    difference = (result.actions - policy).abs()
    assert difference.max() <= radius * (1 + 1e-5) and difference[..., -1].max() == 0
    assert (result.actions.abs() <= policy.abs().clamp(min=1) + 1e-6).all()
    assert (result.energy_lowest <= result.energy_policy).all()
    torch.testing.assert_close(bowl(centre)(result.actions[:, None])[:, 0], result.energy_lowest)


def test_a_scaled_energy_takes_the_same_way() -> None:
    policy, energy = chunks(0), bowl(chunks(1))
    plain = refine(energy, policy, radius=0.1, margin=0.0)
    scaled = refine(lambda actions: 1e-6 * energy(actions), policy, radius=0.1, margin=0.0)
    torch.testing.assert_close(scaled.actions, plain.actions)


def test_what_is_not_accepted_is_the_policys_chunk_bit_for_bit() -> None:
    policy, energy = chunks(0).to(torch.bfloat16), bowl(chunks(1))
    fell = refine(energy, policy, radius=0.1, margin=0.0)
    gain = fell.energy_policy - fell.energy_lowest
    between = float(gain.sort().values[:2].mean())
    result = refine(energy, policy, radius=0.1, margin=between)
    assert torch.equal(result.accepted, gain > between) and result.accepted.sum() == 2
    assert result.actions.dtype == torch.bfloat16
    assert torch.equal(result.actions[~result.accepted], policy[~result.accepted])
    assert not torch.equal(result.actions[result.accepted], policy[result.accepted])
    assert torch.equal(refine(energy, policy, radius=0.1, margin=math.inf).actions, policy)
    shut = refine(energy, policy, radius=0.1, margin=math.inf)
    assert not shut.accepted.any() and (shut.moved > 0).all()


def test_a_flat_energy_moves_nothing() -> None:
    result = refine(lambda actions: 0 * actions.sum((2, 3)), chunks(0), radius=0.1, margin=0.0)
    assert torch.equal(result.actions, chunks(0)) and not result.accepted.any() and not result.moved.any()


def test_the_gripper_is_chosen_and_not_moved() -> None:
    policy = chunks(0)
    policy[..., -1] = 1.0
    centre = policy.clone()
    centre[0, :, -1], centre[1, :, -1] = 0.1, 0.9
    result = refine(bowl(centre), policy, radius=0.1, margin=0.0, gripper_values=(0.0, 1.0))
    assert torch.equal(result.actions[0, :, -1], torch.zeros(H))
    assert torch.equal(result.actions[1:, :, -1], torch.ones(2, H))
    assert torch.equal(refine(bowl(centre), policy, radius=0.1, margin=0.0).actions[..., -1], policy[..., -1])


def test_a_radius_for_each_dimension() -> None:
    policy = chunks(0, 0.1)
    radius = torch.tensor([0.05, 0.2, 0.4])
    energy = bowl(torch.full((B, H, A), 5.0))
    result = refine(energy, policy, radius=radius, margin=0.0, steps=100, gripper_dims=())
    torch.testing.assert_close((result.actions - policy).amax((0, 1)), radius, atol=1e-3, rtol=1e-2)


def test_rows_that_are_not_finite_stay_and_spoil_no_other() -> None:
    policy = chunks(0)
    expected = refine(bowl(chunks(1)), policy, radius=0.1, margin=0.0)
    spoilt = policy.clone()
    spoilt[1, 0, 0] = math.nan
    result = refine(bowl(chunks(1)), spoilt, radius=0.1, margin=0.0)
    assert result.accepted.tolist() == [True, False, True] and result.actions[1, 0, 0].isnan()
    torch.testing.assert_close(result.actions[[0, 2]], expected.actions[[0, 2]])

    def cliff(actions: Tensor) -> Tensor:
        energies = bowl(chunks(1))(actions)
        below = energies < expected.energy_policy[:, None] - 0.3
        return torch.where(below, torch.full_like(energies, math.nan), energies)

    over = refine(cliff, policy, radius=0.5, margin=0.0)
    assert over.energy_lowest.isfinite().all() and over.actions.isfinite().all()
    nothing = refine(lambda actions: math.nan * actions.sum((2, 3)), policy, radius=0.1, margin=0.0)
    assert torch.equal(nothing.actions, policy) and not nothing.accepted.any()


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("gripper_values", [(), (0.9,)])
def test_an_energy_that_is_not_finite_is_never_the_lowest_and_told(
    broken: float, gripper_values: tuple[float, ...]
) -> None:
    policy, low = chunks(0), chunks(1)
    policy[2, 0, 0] = math.nan

    def only_the_policys(actions: Tensor) -> Tensor:
        same = (actions == policy[:, None].nan_to_num(nan=0.0)).flatten(2).all(2)
        return torch.where(same, bowl(low)(actions), torch.full_like(same, broken, dtype=torch.float32))

    result = refine(only_the_policys, policy, radius=0.1, margin=0.0, gripper_values=gripper_values)
    assert not result.accepted.any() and torch.equal(result.actions[:2], policy[:2])
    assert result.energy_lowest[:2].isfinite().all() and not result.moved[:2].any()
    assert result.unscored.tolist() == [True, True, False], "a chunk that is none has no energy"

    def pit(actions: Tensor) -> Tensor:
        energies = bowl(low)(actions)
        return torch.where(energies < result.energy_policy[:, None] - 0.3, broken + 0 * energies, energies)

    finite = policy.nan_to_num()
    over = refine(pit, finite, radius=0.5, margin=0.0, steps=40, step_size=0.05)
    assert over.unscored[:2].all() and over.energy_lowest[:2].isfinite().all() and over.accepted[:2].all()
    torch.testing.assert_close(bowl(low)(over.actions[:, None])[:2, 0], over.energy_lowest[:2])
    assert not refine(bowl(low), finite, radius=0.5, margin=0.0).unscored.any()


def test_works_in_inference_mode_with_a_head_that_gets_no_gradient() -> None:
    torch.manual_seed(0)
    head = EnergyHead(16, A, H, EnergyConfig()).eval()
    context, mask, policy = torch.randn(B, 5, 16), torch.ones(B, 5, dtype=torch.bool), chunks(0)
    encoded = head.encode(context, mask)

    def run() -> Tensor:
        return refine(lambda actions: head(encoded, actions), policy, radius=0.3, margin=0.0).actions

    with torch.no_grad():
        plain = run()
    with torch.inference_mode():
        inference = run()
    assert torch.equal(plain, inference) and not plain.requires_grad
    assert all(parameter.grad is None for parameter in head.parameters())
    assert not torch.equal(plain, policy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"radius": 0.0}, "radius=0.0"),
        ({"radius": torch.ones(2)}, "one or 3"),
        ({"margin": math.nan}, "margin=nan"),
        ({"steps": -1}, "steps=-1"),
        ({"step_size": 0.0}, "step_size=0.0"),
        ({"gripper_dims": (3,)}, r"gripper_dims \[3\]"),
        ({"policy": torch.zeros(2, 3)}, r"expected a floating point \(B,H,A\)"),
        ({"energy_fn": lambda actions: actions.sum()}, r"energy_fn gave \(\)"),
    ],
)
def test_bad_settings_are_named(change: dict, message: str) -> None:
    arguments = {"energy_fn": bowl(chunks(1)), "policy": chunks(0), "radius": 0.1, "margin": 0.0} | change
    with pytest.raises(ValueError, match=message):
        refine(**arguments)
