from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_energy.actions import DatasetStatistics, FieldStatistics
from vla_energy.candidates import (
    CandidateSet,
    Source,
    noise_scale,
    overlap,
    propose,
    retrieved_source,
    smooth_noise,
    source_report,
)
from vla_energy.config import CandidatesConfig, RetrievalConfig

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


def _slow_noise(shape: tuple[int, ...], correlation: float, generator: torch.Generator) -> torch.Tensor:
    """The recurrence, step by step."""
    drawn = torch.randn(shape, generator=generator)
    smooth = drawn.clone()
    for step in range(1, shape[-2]):
        new = math.sqrt(1 - correlation**2) * drawn[..., step, :]
        smooth[..., step, :] = correlation * smooth[..., step - 1, :] + new
    return smooth


def test_noise_of_a_row_is_its_generators_alone() -> None:
    together = smooth_noise((B, 5, H, A), 0.9, [_generator(row) for row in range(B)])
    for row in range(B):
        assert torch.equal(together[row], _slow_noise((5, H, A), 0.9, _generator(row)))
    assert torch.equal(smooth_noise((2, 1, A), 0.9, _generator()), _slow_noise((2, 1, A), 0.9, _generator()))
    with pytest.raises(ValueError, match="2 generators for 3 entries"):
        smooth_noise((B, 5, H, A), 0.9, [_generator(), _generator()])


def _slowly(
    policy: torch.Tensor, layers: torch.Tensor, config: CandidatesConfig, row: int, others: dict[str, Source]
) -> tuple[torch.Tensor, list[str], torch.Tensor]:
    """One row's candidates, names and priors, one candidate after the other."""
    free = torch.tensor([True] * (A - 1) + [False])
    chunks, names, prior = [], [], [0.0]
    for layer in (range(L - 2, 0, -1)[:4]) if config.layer_exits else ():
        chunks.append(layers[row, layer].to(policy.dtype))
        names.append(f"layer_exit_{layer}")
    noise = _slow_noise((config.num_candidates, H, A), 0.9, _generator(row)) if config.num_candidates else ()
    for index, one in enumerate(noise):
        std = config.noise_stds[index % len(config.noise_stds)]
        own = policy[row].float()
        chunks.append(torch.where(free, own + one * std, own).to(policy.dtype))
        names.append(f"noise_{std:g}")
    prior += [0.0] * len(chunks)
    for name, source in others.items():
        for index in range(source.chunks.shape[1]):
            chunks.append(source.chunks[row, index].to(policy.dtype))
            names.append(name)
            prior.append(0.0 if source.prior is None else float(source.prior[row, index]))
    rest = [torch.where(free, chunk.clamp(-1, 1), chunk) for chunk in chunks]
    return torch.stack([policy[row], *rest]), ["policy", *names], torch.tensor(prior)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize(("exits", "lent"), [(True, True), (False, True), (True, False), (False, False)])
def test_a_batch_is_its_rows_one_by_one_bit_for_bit(dtype: torch.dtype, count: int, exits: bool, lent: bool) -> None:
    policy, layers = (part.to(dtype) for part in _chunks())
    config, others = CandidatesConfig(num_candidates=count, layer_exits=exits), _others() if lent else {}
    out = propose(policy, layers, config, [_generator(row) for row in range(B)], others=others)
    for row in range(B):
        actions, names, prior = _slowly(policy, layers, config, row, others)
        assert torch.equal(out.actions[row], actions) and out.actions.dtype == dtype
        assert out.sources == tuple(names) and torch.equal(out.prior[row], prior)


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


def _others() -> dict[str, Source]:
    chunks = 2 * torch.randn(B, 3, H, A, generator=_generator(2))
    prior = torch.tensor([[-1.0, math.inf], [0.5, 2.0], [3.0, 0.0]])
    return {"retrieved": Source(chunks[:, :2], prior), "crop": Source(chunks[:, 2:])}


def test_others_come_last_under_their_names_with_their_priors() -> None:
    policy, layers = _chunks()
    config, others = CandidatesConfig(num_candidates=2), _others()
    own = propose(policy, layers, config, _generator(), max_layer_exits=1)
    out = propose(policy, layers, config, _generator(), max_layer_exits=1, others=others)
    assert own.sources == ("policy", "layer_exit_5", "noise_0.02", "noise_0.05")
    assert out.sources == (*own.sources, "retrieved", "retrieved", "crop")
    assert torch.equal(out.actions[:, :4], own.actions), "others change none of the own candidates"
    assert own.prior.dtype == torch.float32 and torch.equal(own.prior, torch.zeros(B, 4))
    given = others["retrieved"].prior
    assert given is not None
    assert torch.equal(out.prior, torch.cat([torch.zeros(B, 4), given, torch.zeros(B, 1)], 1))


@pytest.mark.parametrize("gripper_dims", [(-1,), (1, 3), ()])
def test_others_are_clamped_but_for_their_grippers_and_the_policy_is_not(gripper_dims: tuple[int, ...]) -> None:
    policy, _ = _chunks()
    others = _others()
    given = torch.cat([source.chunks for source in others.values()], 1)
    nothing = CandidatesConfig(num_candidates=0)
    out = propose(policy, None, nothing, gripper_dims=gripper_dims, others=others)
    assert policy.max() > 1 and torch.equal(out.actions[:, 0], policy)
    grippers = [dim % A for dim in gripper_dims]
    for dim in range(A):
        expected = given[..., dim] if dim in grippers else given[..., dim].clamp(-1, 1)
        assert torch.equal(out.actions[:, 1:, :, dim], expected)
    assert given[..., grippers].abs().max() > 1 if grippers else out.actions[:, 1:].abs().max() == 1


def test_others_take_the_policys_dtype_and_priors_stay_exact() -> None:
    policy, _ = _chunks()
    prior = torch.full((B, 1), 1 / 3)
    out = propose(policy.bfloat16(), None, CandidatesConfig(), others={"crop": Source(policy[:, None], prior)})
    assert out.actions.dtype == torch.bfloat16 and torch.equal(out.actions[:, 0], policy.bfloat16())
    assert out.prior.dtype == torch.float32 and torch.equal(out.prior[:, -1:], prior)


@pytest.mark.parametrize("shape", [(B, H, A), (B + 1, 2, H, A), (B, 2, H + 1, A), (B, 2, H, A - 1), (1, B, 2, H, A)])
def test_others_of_a_wrong_shape_are_named(shape: tuple[int, ...]) -> None:
    policy, _ = _chunks()
    others = {"retrieved": Source(policy[:, None]), "crop": Source(torch.zeros(shape))}
    with pytest.raises(ValueError, match=r"crop \(.*expected \(B,K,H,A\) for policy \(3, 8, 4\)"):
        propose(policy, None, CandidatesConfig(), others=others)


@pytest.mark.parametrize("shape", [(B, 1), (B, 3), (B + 1, 2), (B,)])
def test_a_prior_that_is_not_one_a_chunk_is_named(shape: tuple[int, ...]) -> None:
    policy, _ = _chunks()
    others = {"crop": Source(torch.zeros(B, 2, H, A), torch.zeros(shape))}
    with pytest.raises(ValueError, match="crop"):
        propose(policy, None, CandidatesConfig(), others=others)


@settings(max_examples=30, deadline=None)
@given(
    st.floats(0, 10), st.floats(0, 10), st.lists(st.floats(0, 100) | st.just(math.inf), min_size=1, max_size=6)
)  # fmt: skip
def test_a_retrieved_chunk_is_believed_the_more_the_nearer_it_is(
    weight: float, reach: float, distances: list[float]
) -> None:
    chunks = torch.randn(1, len(distances), H, A)
    source = retrieved_source(chunks, torch.tensor([distances]), RetrievalConfig(weight=weight, reach=reach))
    assert source.chunks is chunks and source.prior is not None
    for prior, distance in zip(source.prior[0].tolist(), distances, strict=True):
        expected = weight * (distance - reach) if distance < math.inf else math.inf
        assert prior == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_at_its_reach_a_retrieved_chunk_counts_as_the_policys_own() -> None:
    distances = torch.tensor([[0.0, 4.0, 6.0, math.inf, math.nan]])
    source = retrieved_source(torch.zeros(1, 5, H, A), distances, RetrievalConfig(weight=2.0, reach=4.0))
    assert source.prior is not None and source.prior[0].tolist() == [-8, 0, 4, math.inf, math.inf]
    unweighted = retrieved_source(torch.zeros(1, 5, H, A), distances, RetrievalConfig(weight=0.0))
    assert unweighted.prior is not None and unweighted.prior[0].tolist() == [0, 0, 0, math.inf, math.inf]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.none() | st.integers(0, H + 2), min_size=1, max_size=5))
def test_overlap_goes_on_where_the_last_chunk_stopped(executed: list[int | None]) -> None:
    fresh = torch.randn(len(executed), H, A, generator=_generator(3))
    previous = [None if done is None else torch.randn(H, A, generator=_generator(done)) for done in executed]
    out = overlap(fresh, previous, [done or 0 for done in executed])
    assert out.shape == fresh.shape
    for row, (chunk, done) in enumerate(zip(previous, executed, strict=True)):
        for step in range(H):
            expected = fresh[row, step]
            if chunk is not None and done is not None and done + step < H:
                expected = chunk[done + step]
            assert torch.equal(out[row, step], expected)


def test_overlap_takes_the_policys_dtype_and_asks_for_a_plan_a_row() -> None:
    policy, _ = _chunks()
    out = overlap(policy.bfloat16(), [policy[0], None, None], [2, 0, 5])
    assert out.dtype == torch.bfloat16 and torch.equal(out[0, :-2], policy[0, 2:].bfloat16())
    assert torch.equal(out[1:], policy[1:].bfloat16()), "without a chunk under way nothing was executed of it"
    with pytest.raises(ValueError):
        overlap(policy, [None], [0, 0, 0])


def _slow_report(candidates: CandidateSet, expert: torch.Tensor, kind: str) -> tuple[float, float, float]:
    spread, oracle, both = [], [], []
    for row in range(len(expert)):
        policy = candidates.actions[row, 0]
        own = float((policy - expert[row]).abs().mean())
        mine = [
            candidates.actions[row, column]
            for column, source in enumerate(candidates.sources)
            if source.startswith(kind) and candidates.prior[row, column] != math.inf
        ]
        errors = [float((chunk - expert[row]).abs().mean()) for chunk in mine]
        spread += [float((chunk - policy).abs().mean()) for chunk in mine]
        oracle += [min(errors)] if errors else []
        both.append(min([own, *errors]))
    return float(np.mean(spread)), float(np.mean(oracle)), float(np.mean(both))


def test_the_report_on_sources_is_that_of_a_slow_loop() -> None:
    policy, layers = _chunks()
    others = _others()
    others["retrieved"] = Source(
        others["retrieved"].chunks, torch.tensor([[-1.0, math.inf], [math.inf, math.inf], [3.0, 0.0]])
    )
    candidates = propose(policy, layers, CandidatesConfig(num_candidates=5), _generator(), others=others)
    expert = policy + 0.1 * torch.randn(B, H, A, generator=_generator(4))
    report = source_report(candidates, expert)
    assert list(report) == ["policy", "layer_exit", "noise", "retrieved", "crop"]
    for kind, numbers in report.items():
        found = (numbers["spread"], numbers["oracle"], numbers["oracle_with_policy"])
        assert found == pytest.approx(_slow_report(candidates, expert, kind), rel=1e-5), kind
    assert report["policy"]["spread"] == 0
    assert report["policy"]["oracle"] == report["policy"]["oracle_with_policy"]


def test_a_source_that_found_nothing_at_all_leaves_the_policy_and_no_number() -> None:
    policy, _ = _chunks()
    nothing = Source(policy[:, None].clone(), torch.full((B, 1), math.inf))
    candidates = propose(policy, None, CandidatesConfig(num_candidates=0), others={"retrieved": nothing})
    report = source_report(candidates, policy + 0.25)
    assert math.isnan(report["retrieved"]["spread"]) and math.isnan(report["retrieved"]["oracle"])
    assert report["retrieved"]["oracle_with_policy"] == pytest.approx(0.25)
