from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vla_energy.config import EnergyConfig, RerankConfig
from vla_energy.measures import chunk_distance, spearman, success_auc, win_rate
from vla_energy.monitors import _negatives, evaluate_ranking, rerank_l1

B, S, D, L, H, A = 6, 3, 12, 5, 4, 3


def _naive_spearman(energies: list[float], distances: list[float]) -> float:
    def ranks(values: list[float]) -> list[float]:
        ordered = sorted(values)
        return [sum(i + 1 for i, v in enumerate(ordered) if v == value) / ordered.count(value) for value in values]

    a, b = ranks(energies), ranks(distances)
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    cov = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    var = sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b)
    return cov / math.sqrt(var) if var else 0.0


def test_spearman_equals_the_naive_twin_with_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    energies = torch.randint(0, 5, (20, 9), generator=generator).float()
    distances = torch.randint(0, 6, (20, 9), generator=generator).float()
    energies[0] = 1.0
    expected = [_naive_spearman(e, d) for e, d in zip(energies.tolist(), distances.tolist(), strict=True)]
    assert float(spearman(energies, distances)) == pytest.approx(sum(expected) / len(expected))


def test_spearman_of_known_orders() -> None:
    ascending = torch.arange(6.0).expand(2, -1)
    assert float(spearman(ascending, ascending.square())) == pytest.approx(1)
    assert float(spearman(ascending, -ascending)) == pytest.approx(-1)
    assert float(spearman(torch.zeros(2, 6), ascending)) == 0
    for broken in (math.nan, math.inf, -math.inf):
        energies = ascending.clone()
        energies[1, 5] = broken
        assert math.isnan(float(spearman(energies, ascending))) and math.isnan(float(spearman(ascending, energies)))


def test_win_rate_counts_valid_negatives_and_halves_ties() -> None:
    energies = torch.tensor([[1.0, 2.0, 0.0, 1.0], [5.0, 6.0, 7.0, 4.0]])
    every = torch.ones(2, 4, dtype=torch.bool)
    assert float(win_rate(energies, every)) == pytest.approx((1 + 0 + 0.5 + 1 + 1 + 0) / 6)
    valid = torch.tensor([[False, True, False, False], [True, True, True, False]])
    assert float(win_rate(energies, valid)) == 1
    assert math.isnan(float(win_rate(energies, ~every)))


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 2])
def test_an_energy_that_is_not_finite_wins_nothing(broken: float, place: int) -> None:
    energies, valid = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]), torch.ones(2, 3, dtype=torch.bool)
    energies[1, place] = broken
    assert math.isnan(float(win_rate(energies, valid)))
    valid[1, 1:] = False
    assert float(win_rate(energies, valid)) == 1, "it is part of no pair"
    solved = torch.tensor([True, False, False])
    assert math.isnan(float(success_auc(energies[1], solved, solved | True)))
    assert float(success_auc(energies[1], solved, torch.arange(3) != place)) == (0.5 if place == 0 else 1)


def test_rerank_l1_and_chunk_distance() -> None:
    expert = torch.zeros(2, H, A)
    actions = torch.tensor([[0.3, 0.1, 0.2], [0.1, -0.5, 0.4]])[:, :, None, None].expand(2, 3, H, A)
    distances = chunk_distance(actions, expert)
    torch.testing.assert_close(distances, torch.tensor([[0.3, 0.1, 0.2], [0.1, 0.5, 0.4]]))
    out = {name: float(value) for name, value in rerank_l1(torch.tensor([[2.0, 1, 0], [0, 1, 2]]), distances).items()}
    assert out == pytest.approx({"policy": 0.2, "chosen": 0.15, "oracle": 0.1})
    with pytest.raises(ValueError, match="expert"):
        chunk_distance(actions, expert[:1])


def test_negatives_by_kind_and_shuffle_moves_every_step() -> None:
    expert = torch.arange(float(H)).reshape(1, H, 1).expand(200, H, A)
    kinds = _negatives(expert, torch.zeros(200, L, H, A), torch.Generator().manual_seed(0))
    exits = ["layer_exit_1", "layer_exit_2", "layer_exit_3"]
    assert list(kinds) == ["in_batch", "noise_0.1", "noise_0.3", "noise_0.5", "at_0.05", "shuffle", *exits]
    shuffled = kinds["shuffle"][:, 0, :, 0]
    assert (shuffled != expert[..., 0]).all()
    assert torch.equal(shuffled.sort(1).values, expert[..., 0])
    assert len(shuffled.unique(dim=0)) == 6, "all (H-1)! cycles occur"
    torch.testing.assert_close((kinds["at_0.05"][:, 0] - expert).abs().mean((1, 2)), torch.full((200,), 0.05))
    alone = _negatives(expert[:1, :1], torch.zeros(1, 2, 1, A), None)
    assert set(alone) == {"noise_0.1", "noise_0.3", "noise_0.5", "at_0.05"}


class Distance(nn.Module):
    """The energy is the distance to the expert, which the context holds; `sign` -1 ranks backwards."""

    context_dim, action_dim, horizon = D, A, H

    def __init__(self, sign: float = 1.0) -> None:
        super().__init__()
        self.sign = sign

    def encode(self, context: Tensor, context_mask: Tensor, reference: Tensor) -> Tensor:
        return context[:, 0].reshape(-1, H, A)

    def forward(self, encoded: Any, actions: Tensor) -> Tensor:
        assert not self.training
        return self.sign * chunk_distance(actions, encoded)


class Holes(Distance):
    """A perfect head, but `broken` for the expert's chunk, or for every other."""

    def __init__(self, broken: float, expert: bool) -> None:
        super().__init__()
        self.broken, self.expert = broken, expert

    def forward(self, encoded: Any, actions: Tensor) -> Tensor:
        energies = super().forward(encoded, actions)
        return energies.masked_fill((energies == 0) == self.expert, self.broken)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("expert", [True, False])
def test_a_head_without_numbers_is_no_perfect_ranking(broken: float, expert: bool) -> None:
    energy: Any = evaluate_ranking(Holes(broken, expert), _batches(), EnergyConfig(), torch.Generator()).metrics[
        "energy"
    ]
    assert all(math.isnan(rate) for rate in energy["win_rate"].values()) and energy["win_rate"]
    assert energy["nonfinite"] > 0 and math.isnan(energy["spearman"])


class NoneOfTheirOwn(Distance):
    """A perfect head, but `broken` for the policy's chunk."""

    def __init__(self, broken: float) -> None:
        super().__init__()
        self.broken = broken

    def encode(self, context: Tensor, context_mask: Tensor, reference: Tensor) -> Any:
        return super().encode(context, context_mask, reference), reference

    def forward(self, encoded: Any, actions: Tensor) -> Tensor:
        target, reference = encoded
        energies = super().forward(target, actions)
        return energies.masked_fill((actions == reference[:, None]).flatten(2).all(2), self.broken)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_has_no_energy_for_the_policys_chunk_chooses_nothing(broken: float) -> None:
    """As `rerank` does: held-out figures are of what would be executed."""
    out = evaluate_ranking(NoneOfTheirOwn(broken), _batches(), EnergyConfig(), torch.Generator(), margin=0.0)
    rerank: Any = out.metrics["rerank"]
    assert rerank["kept"] == 1 and rerank["l1_policy"] == rerank["l1_gated"] == rerank["l1_reranked"]
    assert rerank["l1_oracle"] < rerank["l1_policy"]


def _batches(count: int = 3) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        expert = 0.5 * torch.randn(B, H, A, generator=generator)
        layers = expert[:, None] + 0.1 * torch.randn(B, L, H, A, generator=generator)
        layers[:, 3] = expert  # a false negative: not to be counted
        context = expert.reshape(B, 1, D).expand(B, S, D)
        batches.append((context, torch.ones(B, S, dtype=torch.bool), expert, layers))
    return batches


def test_perfect_head_reaches_the_oracle() -> None:
    config = dataclasses.replace(EnergyConfig(), rerank=RerankConfig(margin=0.0))
    head = Distance()
    out = evaluate_ranking(head, iter(_batches()), config, torch.Generator().manual_seed(1))
    metrics: Any = out.metrics
    assert set(metrics["energy"]["win_rate"].values()) == {1.0}
    assert "layer_exits" in metrics["energy"]["win_rate"] and "layer_exit_3" not in metrics["energy"]["win_rate"]
    assert metrics["energy"]["spearman"] == pytest.approx(1)
    assert metrics["rerank"]["l1_reranked"] == metrics["rerank"]["l1_gated"] == metrics["rerank"]["l1_oracle"]
    assert metrics["rerank"]["l1_oracle"] < metrics["rerank"]["l1_policy"]
    assert out.energies.shape == out.distances.shape == (3 * B, len(out.sources)) and metrics["frames"] == 3 * B
    assert head.training


def test_backward_head_loses_and_a_shut_gate_saves_the_policy() -> None:
    out = evaluate_ranking(Distance(-1.0), _batches(), EnergyConfig(), torch.Generator(), margin=math.inf)
    metrics: Any = out.metrics
    assert set(metrics["energy"]["win_rate"].values()) == {0.0}
    assert metrics["energy"]["spearman"] == pytest.approx(-1)
    assert metrics["rerank"]["l1_reranked"] > metrics["rerank"]["l1_policy"] == metrics["rerank"]["l1_gated"]
    assert metrics["rerank"]["kept"] == 1
    with pytest.raises(ValueError, match="no held-out batch"):
        evaluate_ranking(Distance(), [], EnergyConfig())
