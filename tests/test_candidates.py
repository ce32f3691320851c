from __future__ import annotations

import numpy as np
import pytest
import torch

from vla_energy.actions import DatasetStatistics, FieldStatistics
from vla_energy.candidates import noise_scale, propose, smooth_noise
from vla_energy.config import CandidatesConfig

B, L, H, A = 3, 7, 8, 4


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _chunks() -> tuple[torch.Tensor, torch.Tensor]:
    layers = 0.5 * torch.randn(B, L, H, A, generator=_generator(1))
    layers[:, -1, 0, 0] = 1.5  # policies overshoot
    return layers[:, -1].clone(), layers


def test_policy_first_then_deepest_exits_then_noise() -> None:
    policy, layers = _chunks()
    out = propose(policy, layers, CandidatesConfig(num_candidates=5), _generator(), max_layer_exits=3)
    exits = ("layer_exit_5", "layer_exit_4", "layer_exit_3")
    noise = ("noise_0.02", "noise_0.05", "noise_0.1", "noise_0.02", "noise_0.05")
    assert out.sources == ("policy", *exits, *noise)
    assert out.actions.shape == (B, len(out.sources), H, A)
    assert torch.equal(out.actions[:, 0], policy)
    torch.testing.assert_close(out.actions[:, 2, :, :3], layers[:, 4, :, :3].clamp(-1, 1))
    torch.testing.assert_close(out.actions[:, 2, :, 3], layers[:, 4, :, 3])


def test_noise_spares_the_gripper_and_stays_in_range() -> None:
    policy, _ = _chunks()
    out = propose(policy, None, CandidatesConfig(num_candidates=32, noise_stds=(0.5,)), _generator())
    noisy = out.actions[:, 1:]
    assert torch.equal(noisy[..., -1], policy[:, None, :, -1].expand_as(noisy[..., -1]))
    assert noisy[..., :-1].abs().max() == 1
    assert (noisy[..., :-1] != policy[:, None, :, :-1]).any((1, 2)).all()
    two = propose(policy, None, CandidatesConfig(num_candidates=4), _generator(), gripper_dims=(1, 3))
    assert torch.equal(two.actions[:, 1:, :, [1, 3]], policy[:, None, :, [1, 3]].expand(-1, 4, -1, -1))


def test_same_generator_same_candidates_and_dtype_is_kept() -> None:
    policy, layers = _chunks()
    first, second = (propose(policy, layers, CandidatesConfig(), _generator(5)).actions for _ in range(2))
    assert torch.equal(first, second)
    half = propose(policy.bfloat16(), layers, CandidatesConfig(), _generator(5)).actions
    assert half.dtype == torch.bfloat16 and torch.equal(half[:, 0], policy.bfloat16())


def test_nothing_but_the_policy() -> None:
    policy, layers = _chunks()
    out = propose(policy, layers, CandidatesConfig(num_candidates=0, layer_exits=False))
    assert out.sources == ("policy",) and torch.equal(out.actions[:, 0], policy)


def test_smooth_noise_has_unit_variance_and_the_stated_correlation() -> None:
    noise = smooth_noise((20000, H, 2), 0.8, _generator())
    torch.testing.assert_close(noise.std(0), torch.ones(H, 2), rtol=0, atol=0.03)
    for lag in (1, 3):
        correlation = (noise[:, lag:] * noise[:, :-lag]).mean()
        assert correlation == pytest.approx(0.8**lag, abs=0.03)


def test_noise_scale_leaves_out_what_is_not_normalised_or_does_not_move() -> None:
    values = np.random.default_rng(0).normal(size=(500, A)) * (1, 10, 0, 1)
    values[:, 0] = np.sign(values[:, 0]) * np.abs(values[:, 0]) ** 0.1  # mass near the bounds: larger relative spread
    mask = np.array([True, True, True, False])
    scale = noise_scale(DatasetStatistics(FieldStatistics.of(values, mask), None, 0, 0))
    assert scale[2] == scale[3] == 0
    assert scale[:2].mean() == pytest.approx(1) and scale[0] > scale[1]
    policy, _ = _chunks()
    out = propose(policy.clamp(-0.2, 0.2), None, CandidatesConfig(), _generator(), scale=scale).actions
    assert torch.equal(out[:, 1:, :, 2], out[:, :1, :, 2].expand(-1, 16, -1))


def test_wrong_shapes_are_refused() -> None:
    policy, layers = _chunks()
    with pytest.raises(ValueError, match="layer_actions"):
        propose(policy, layers[:, :, 1:], CandidatesConfig())
    with pytest.raises(ValueError, match="gripper_dims"):
        propose(policy, None, CandidatesConfig(), gripper_dims=(4,))
    with pytest.raises(ValueError, match="policy"):
        propose(policy[0], None, CandidatesConfig())
