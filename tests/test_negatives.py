"""Samplers of negatives: which chunks they give, and what they do when they have nothing to give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_energy import negatives
from vla_energy.config import EnergyConfig, NegativesConfig

H, A = 4, 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(rows: int = 5, layers: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    expert = torch.randn(rows, H, A, generator=generator(1))
    return expert, torch.randn(rows, layers, H, A, generator=generator(2))


@pytest.mark.parametrize(
    ("layers", "count", "picked"), [(6, 4, [1, 2, 3, 4]), (6, 2, [2, 4]), (5, 9, [1, 2, 3]), (2, 3, []), (1, 3, [])]
)
def test_layer_exits_leave_out_first_and_last(layers: int, count: int, picked: list[int]) -> None:
    layer_actions = torch.arange(layers).float()[None, :, None, None].expand(2, -1, H, A)
    assert negatives.layer_exits(layer_actions, count)[0, :, 0, 0].tolist() == picked


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 99))
def test_in_batch_gives_other_rows_once(rows: int, count: int, seed: int) -> None:
    expert = torch.arange(rows).float()[:, None, None].expand(-1, H, A)
    drawn = negatives.in_batch(expert, count, generator(seed))
    assert drawn.shape == (rows, min(count, rows - 1), H, A)
    for row, chunks in enumerate(drawn[:, :, 0, 0].tolist()):
        assert row not in chunks
        assert len(set(chunks)) == len(chunks)


def test_gaussian_has_the_stds_in_order_and_repeats_by_seed() -> None:
    centre = torch.ones(50, 8, 7)
    drawn = negatives.gaussian(centre, (0.1, 0.5), 3, generator())
    assert drawn.shape == (50, 6, 8, 7)
    stds = (drawn - 1).std((0, 2, 3))
    torch.testing.assert_close(stds, torch.tensor([0.1] * 3 + [0.5] * 3), rtol=0.1, atol=0)
    assert torch.equal(drawn, negatives.gaussian(centre, (0.1, 0.5), 3, generator()))


def test_near_positives_are_masked_by_mean_absolute_distance() -> None:
    expert = torch.zeros(1, H, A)
    chunks = torch.tensor([0.0, 0.019, 0.021])[None, :, None, None].expand(1, -1, H, A)
    assert negatives.near_positive_mask(chunks, expert, 0.02).tolist() == [[True, True, False]]


def test_build_stacks_every_source_with_its_weight() -> None:
    expert, layer_actions = batch()
    config = NegativesConfig()
    config.in_batch.weight = 0.5
    built = negatives.build_negatives(config, expert, layer_actions[:, -1], layer_actions, generator())
    assert list(built.sources) == ["layer_exits", "expert_noise", "policy", "policy_noise", "in_batch"]
    assert [built.chunks[:, s].shape[1] for s in built.sources.values()] == [3, 6, 1, 6, 4]
    assert torch.equal(built.chunks[:, built.sources["policy"]][:, 0], layer_actions[:, -1])
    assert built.weight.tolist() == [1.0] * 16 + [0.5] * 4
    assert built.valid.shape == built.distances.shape == (5, 20)
    assert built.empty == ()
    assert torch.equal(built.valid, ~negatives.near_positive_mask(built.chunks, expert, 0.02))


def test_sources_without_rows_or_layers_are_named() -> None:
    expert, layer_actions = batch(rows=1, layers=2)
    built = negatives.build_negatives(NegativesConfig(), expert, layer_actions[:, -1], layer_actions, generator())
    assert built.empty == ("layer_exits", "in_batch")
    alone = EnergyConfig.preset("original").negatives
    built = negatives.build_negatives(alone, expert, layer_actions[:, -1], layer_actions, generator())
    assert built.chunks.shape == (1, 0, H, A)
    assert built.valid.shape == (1, 0)


def test_a_duplicate_of_the_expert_in_the_batch_is_no_negative() -> None:
    expert = torch.zeros(3, H, A)
    alone = NegativesConfig()
    alone.layer_exits.count = alone.expert_noise.count = alone.policy_noise.count = 0
    built = negatives.build_negatives(alone, expert, expert, expert[:, None], generator())
    assert built.chunks.shape[1] == 2
    assert not built.valid.any()


def test_shapes_that_do_not_fit_are_refused() -> None:
    expert, layer_actions = batch()
    with pytest.raises(ValueError, match="layer_actions"):
        negatives.build_negatives(NegativesConfig(), expert[:, :2], layer_actions[:, -1], layer_actions, generator())
