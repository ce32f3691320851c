from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vla_energy.actions import DatasetStatistics, FieldStatistics, RawActions
from vla_energy.calibrate import _hoeffding_bentkus, _shares, calibrate_margin, fewest_draws, margin_curve
from vla_energy.checkpoint import CheckpointError, save_head
from vla_energy.compatibility import CompatibilityError
from vla_energy.config import EnergyConfig, HeadConfig
from vla_energy.durable import seal
from vla_energy.head import EnergyHead
from vla_energy.rerank import Reranker, rerank

B, S, D, N, H, A = 5, 6, 16, 7, 4, 3


class Quadratic(nn.Module):
    """`E = mean (a - a*)^2`, with a* the first context token's first H*A features."""

    context_dim, action_dim, horizon = D, A, H

    def encode(self, context: Tensor, context_mask: Tensor, reference: Tensor) -> Tensor:
        return context[:, 0, : H * A].reshape(-1, 1, H, A)

    def forward(self, encoded: Any, actions: Tensor) -> Tensor:
        return (actions - encoded).square().mean((2, 3))


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(B, S, D, generator=generator)
    return context, torch.ones(B, S, dtype=torch.bool), torch.randn(B, N, H, A, generator=generator)


def _statistics(factor: float = 1.0) -> DatasetStatistics:
    values = factor * np.random.default_rng(0).normal(size=(100, A))
    return DatasetStatistics(FieldStatistics.of(values, np.array([True, True, False])), None, 100, 1)


def _reranker(margin: float) -> Reranker:
    return Reranker(Quadratic(), _statistics(), EnergyConfig(), margin=margin)


def test_finds_the_known_optimum(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    context, mask, candidates = problem
    best = torch.tensor([3, 0, 6, 1, 2])
    optimum = context[:, 0, : H * A].reshape(B, H, A)
    candidates[torch.arange(B), best] = optimum
    reranker = _reranker(0.0)
    result = reranker(context, mask, candidates)
    assert torch.equal(result.index, best) and torch.equal(result.actions, optimum)
    assert torch.equal(result.accepted, best > 0)
    assert reranker.counters["decisions"] == B and reranker.counters["accepted"] == 4


def test_permutation_moves_the_choice(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    context, mask, candidates = problem
    order = torch.tensor([0, 4, 2, 6, 1, 3, 5])
    first, second = (_reranker(0.0)(context, mask, chunks) for chunks in (candidates, candidates[:, order]))
    torch.testing.assert_close(second.energies, first.energies[:, order])
    assert torch.equal(second.actions, first.actions) and torch.equal(order[second.index], first.index)


@pytest.mark.parametrize("margin", [0.0, math.inf])
def test_one_candidate_is_the_identity_and_a_shut_gate_is_bit_identical(
    problem: tuple[Tensor, Tensor, Tensor], margin: float
) -> None:
    context, mask, candidates = problem
    assert torch.equal(_reranker(margin)(context, mask, candidates[:, :1]).actions, candidates[:, 0])
    for dtype in (torch.float32, torch.bfloat16):
        shut = _reranker(math.inf)(context, mask, candidates.to(dtype))
        assert torch.equal(shut.actions, candidates[:, 0].to(dtype)) and not shut.accepted.any()


def test_the_gate_opens_only_above_the_margin() -> None:
    candidates = torch.tensor([2.0, 1.0, 1.5]).reshape(1, 3, 1, 1).expand(2, -1, -1, -1)

    def energy_fn(actions: Tensor) -> Tensor:
        return actions[:, :, 0, 0]

    assert rerank(energy_fn, candidates, 0.99).index.tolist() == [1, 1]
    assert rerank(energy_fn, candidates, 1.0).index.tolist() == [0, 0]


def test_broken_candidates_are_dropped_and_counted(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    context, mask, candidates = problem
    clean = _reranker(0.0)(context, mask, candidates)
    broken = candidates.clone()
    broken[0, clean.index[0].clamp(min=1), 1, 1] = math.nan
    broken[1, 1:, 0, 0] = math.inf
    broken[2, 0] = math.nan
    broken[3] = math.nan
    reranker = _reranker(0.0)
    result = reranker(context, mask, broken)
    assert torch.isfinite(result.actions[:3]).all()
    assert torch.equal(result.actions[1], candidates[1, 0]) and not result.accepted[1]
    assert result.accepted[2], "any finite chunk is better than a broken policy's"
    assert result.index[3] == 0 and not result.accepted[3]
    assert torch.equal(result.actions[4], clean.actions[4])
    assert reranker.counters["dropped_candidates"] == 1 + (N - 1) + 1 + N
    assert reranker.counters["no_alternative"] == 2 and reranker.counters["dropped_energies"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_candidates_that_are_not_finite_are_found_wherever_it_shows(dtype: torch.dtype) -> None:
    candidates = torch.full((4, 3, H, A), -torch.finfo(dtype).max, dtype=dtype)
    for row, value in enumerate((math.nan, math.inf, -math.inf)):
        candidates[row, row, row, row % A] = value
    seen = []
    rerank(lambda actions: seen.append(actions) or actions.float().sum((2, 3)), candidates, 0.0)
    expected = torch.stack([torch.stack([chunk.isfinite().all() for chunk in row]) for row in candidates])
    assert (~expected).sum() == 3 and torch.equal(seen[0] != 0, expected[..., None, None].expand_as(candidates))


def test_a_head_that_is_in_eval_mode_is_left_alone(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    head = _head().eval()
    head.train = lambda mode=True: pytest.fail("visits every module, for each observation")
    with torch.enable_grad():
        assert not Reranker(head, None, EnergyConfig())(*problem).energies.requires_grad


def test_energies_that_are_not_finite_keep_the_policy(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    context, mask, candidates = problem
    context[0, 0, 0] = math.nan
    reranker = _reranker(0.0)
    result = reranker(context, mask, candidates)
    assert torch.equal(result.actions[0], candidates[0, 0]) and torch.isinf(result.energies[0]).all()
    assert reranker.counters["dropped_energies"] == N

    def policy_unscored(actions: Tensor) -> Tensor:
        return torch.arange(N, 0.0, -1).expand(B, -1).masked_fill(torch.arange(N) == 0, math.nan)

    assert not rerank(policy_unscored, candidates, 0.0).accepted.any()


def test_bad_candidates_are_refused(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    context, mask, candidates = problem
    reranker: Any = _reranker(0.0)
    with pytest.raises(TypeError, match="normalize"):
        reranker(context, mask, RawActions(candidates.numpy()))
    for values, name in (((None, mask, candidates), "context"), ((context, mask, candidates, [0]), "prior")):
        with pytest.raises(TypeError, match=f"{name} is .*: expected a tensor"):
            reranker(*values)
    with pytest.raises(ValueError, match="at least the policy"):
        reranker(context, mask, candidates[:, :0])
    with pytest.raises(CompatibilityError, match="horizon"):
        reranker(context, mask, candidates[:, :, 1:])
    with pytest.raises(ValueError, match="context"):
        reranker(context[1:], mask[1:], candidates)
    with pytest.raises(ValueError, match="margin"):
        _reranker(-1.0)


def _head(dropout: float = 0.0) -> EnergyHead:
    torch.manual_seed(0)
    return EnergyHead(D, A, H, EnergyConfig(head=HeadConfig(hidden_dim=8, num_heads=2, num_layers=1, dropout=dropout)))


def test_from_checkpoint_in_inference_mode_without_dropout(
    tmp_path: Path, problem: tuple[Tensor, Tensor, Tensor]
) -> None:
    head = _head(dropout=0.5)
    with pytest.raises(CheckpointError, match="no file"):
        Reranker.from_checkpoint(tmp_path)
    file = save_head(tmp_path, head, 3, _statistics())
    reranker = Reranker.from_checkpoint(tmp_path, margin=0.0)
    reranker.head.train(True)
    with torch.inference_mode():
        first, second = (reranker(*problem) for _ in range(2))
    assert torch.equal(first.energies, second.energies)
    assert reranker.head.training, "the caller's mode is restored"
    expected = head.eval()((problem[0], problem[1], problem[2][:, 0]), problem[2])
    torch.testing.assert_close(first.energies, expected.detach())
    save_head(tmp_path, head, 4, _statistics())
    with pytest.raises(CheckpointError, match="2 files"):
        Reranker.from_checkpoint(tmp_path)
    assert Reranker.from_checkpoint(file).margin == head.config.rerank.margin


def test_ensure_compatible_names_what_differs() -> None:
    reranker = _reranker(0.0)
    reranker.ensure_compatible(_statistics(), H, A, D)
    for dims, name in (((H + 1, A, D), "horizon"), ((H, A + 1, D), "action_dim"), ((H, A, D + 1), "context_dim")):
        with pytest.raises(CompatibilityError, match=name):
            reranker.ensure_compatible(_statistics(), *dims)
    with pytest.raises(CompatibilityError, match="q01 differs at dimension 0"):
        reranker.ensure_compatible(_statistics(2.0), H, A, D)
    statistics = _statistics()
    other = dataclasses.replace(statistics.action, mask=np.ones(A, bool))
    with pytest.raises(CompatibilityError, match="mask differs at dimension 2"):
        reranker.ensure_compatible(dataclasses.replace(statistics, action=other), H, A, D)
    with pytest.raises(CompatibilityError, match="no dataset statistics"):
        Reranker(Quadratic(), None, EnergyConfig()).ensure_compatible(statistics, H, A, D)


def _held_out(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One alternative a row; the larger its gain in energy, the likelier it is better: P(worse) = exp(-gain) / 2."""
    gain = torch.rand(rows, generator=generator) * 4
    worse = torch.rand(rows, generator=generator) < 0.5 * torch.exp(-gain)
    energies = torch.stack([torch.zeros(rows), -gain], 1)
    return energies, torch.stack([torch.ones(rows), torch.where(worse, 1.5, 0.5)], 1)


def test_calibrated_margin_keeps_the_risk_on_new_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    # P(worse | gain > m) = (e^-m - e^-4) / (2 (4 - m)) is 0.1 at m = 0.274.
    margins = [calibrate_margin(*_held_out(1500, generator), risk=0.1) for _ in range(200)]
    risks = [(math.exp(-m) - math.exp(-4)) / (2 * (4 - m)) for m in margins]
    assert np.mean([risk > 0.1 for risk in risks]) <= 0.1
    assert np.median(margins) < 1.0, "and it is not hopelessly careful"


def _alike(episodes: int, risk: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """60 rows an episode, all of one worse or none, worse with probability `risk`."""
    worse = (torch.rand(episodes, generator=generator) < risk).repeat_interleave(60)
    energies = torch.stack([torch.zeros(len(worse)), -torch.rand(len(worse), generator=generator)], 1)
    distances = torch.stack([torch.ones(len(worse)), torch.where(worse, 1.5, 0.5)], 1)
    return energies, distances, torch.arange(episodes).repeat_interleave(60)


def test_rows_of_one_episode_are_not_taken_for_independent() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [_alike(60, 0.12, generator) for _ in range(200)]
    by_row = [calibrate_margin(energies, distances) for energies, distances, _ in draws]
    by_episode = [calibrate_margin(energies, distances, episodes=episodes) for energies, distances, episodes in draws]
    assert np.mean(np.isfinite(by_row)) > 0.3, "opened, although 0.12 is above the risk: what episodes are for"
    assert np.mean(np.isfinite(by_episode)) <= 0.1
    safe = [_alike(60, 0.005, generator) for _ in range(50)]
    opened = [calibrate_margin(energies, distances, episodes=episodes) for energies, distances, episodes in safe]
    assert np.mean(np.isfinite(opened)) > 0.8, "and it is not hopelessly careful"


def test_the_fewest_episodes_that_can_open_the_gate() -> None:
    generator = torch.Generator().manual_seed(0)
    for episodes, opens in ((21, False), (22, True)):
        energies, distances, of = _alike(episodes, 0.0, generator)
        assert math.isfinite(calibrate_margin(energies, distances, episodes=of)) == opens
    assert fewest_draws(0.1) == 22
    with pytest.raises(ValueError, match="one a row"):
        calibrate_margin(energies, distances, episodes=of[:-1])


@pytest.mark.parametrize(("bad", "opens"), [((3,), False), ((), True), ((30,), True)])
def test_the_sequence_of_margins_stops_at_the_first_that_fails(bad: tuple[int, ...], opens: bool) -> None:
    """200 episodes of 40 rows; with all rows one worse in 40 would be safe, but not in the 10 that are tried first."""
    gain = torch.arange(40, 0, -1.0).repeat(200) + 0.001 * torch.rand(8000, generator=torch.Generator().manual_seed(0))
    worse = torch.zeros(40, dtype=torch.bool)
    worse[list(bad)] = True
    distances = torch.stack([torch.ones(8000), torch.where(worse.repeat(200), 2.0, 0.5)], 1)
    of = torch.arange(200).repeat_interleave(40)
    margin = calibrate_margin(torch.stack([torch.zeros(8000), -gain], 1), distances, 0.1, episodes=of)
    assert margin == (0.0 if opens else math.inf)


def test_the_share_of_an_episode_is_one_draw() -> None:
    # 60 episodes of 10 rows; one row worse in each of 30: shares 0.1 and 0, mean 0.05.
    worse = torch.zeros(60, 10)
    worse[:30, 0] = 1
    draws = _shares(worse.flatten().bool(), torch.arange(60).repeat_interleave(10))
    assert draws.tolist() == [0.1] * 30 + [0.0] * 30
    kl = 0.05 * math.log(0.05 / 0.1) + 0.95 * math.log(0.95 / 0.9)
    bentkus = math.e * sum(math.comb(60, k) * 0.1**k * 0.9 ** (60 - k) for k in range(4))
    assert _hoeffding_bentkus(draws, 0.1) == pytest.approx(min(math.exp(-60 * kl), bentkus))
    assert _hoeffding_bentkus(torch.full((60,), 0.2), 0.1) == 1.0
    assert _hoeffding_bentkus(torch.zeros(20), 0.1) == pytest.approx(0.9**20)


def test_a_head_of_another_step_under_this_ones_name_is_told(tmp_path: Path) -> None:
    """Whole by its own checksum: the folder's manifest tells."""
    heads = {step: EnergyHead(D, A, H, EnergyConfig()) for step in (4, 8)}
    for step, head in heads.items():
        file = save_head(tmp_path / str(step), head, step, _statistics())
        seal(tmp_path / str(step), step)
        assert Reranker.from_checkpoint(file).counters["decisions"] == 0
    other = tmp_path / "4" / "energy_head--4_checkpoint.safetensors"
    shutil.copyfile(other, tmp_path / "8" / "energy_head--8_checkpoint.safetensors")
    with pytest.raises(CheckpointError, match=r"energy_head--8.* is damaged.*delete its manifest.json"):
        Reranker.from_checkpoint(tmp_path / "8")


@pytest.mark.parametrize("broken", [math.inf, -math.inf, math.nan])
def test_rows_whose_policy_has_no_energy_open_no_gate(broken: float) -> None:
    """`rerank` keeps the policy's chunk there, so they say nothing of what the gate would take."""
    energies, distances = _held_out(1500, torch.Generator().manual_seed(0))
    margin = calibrate_margin(energies, distances)
    more, alike = torch.tensor([[broken, 0.0]]).expand(1500, 2), torch.tensor([[1.0, 0.5]]).expand(1500, 2)
    assert math.isfinite(margin) and calibrate_margin(more, alike) == math.inf
    curve = margin_curve(torch.cat([energies, more]), torch.cat([distances, alike]))
    assert curve["accepted"][0] == pytest.approx(float((energies[:, 1] < 0).double().mean()) / 2)


def test_calibration_without_evidence_shuts_the_gate() -> None:
    generator = torch.Generator().manual_seed(0)
    assert calibrate_margin(*_held_out(30, generator), risk=0.1) == math.inf
    energies, distances = _held_out(1500, generator)
    assert calibrate_margin(energies, distances.flip(1), risk=0.1) == math.inf
    assert calibrate_margin(torch.zeros(1500, 2), distances, risk=0.1) == math.inf
    with pytest.raises(ValueError, match="between 0 and 1"):
        calibrate_margin(energies, distances, risk=0.0)
    with pytest.raises(ValueError, match=r"\(M,N\)"):
        calibrate_margin(energies[:0], distances[:0])


def _fixed(energies: Tensor) -> Any:
    return lambda actions: energies


def _random(seed: int, rows: int = B) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates, energies and priors, some of them not finite."""
    generator = torch.Generator().manual_seed(seed)
    candidates = torch.randn(rows, N, H, A, generator=generator)
    energies, prior = (3 * torch.randn(rows, N, generator=generator) for _ in range(2))
    prior[:, 0] = 0
    prior[:, 1:].masked_fill_(torch.rand(rows, N - 1, generator=generator) < 0.3, math.inf)
    energies.masked_fill_(torch.rand(rows, N, generator=generator) < 0.1, math.nan)
    return candidates, energies, prior


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.5, 2.0, math.inf]))
def test_with_a_prior_the_lowest_sum_is_chosen_as_by_a_slow_loop(seed: int, margin: float) -> None:
    candidates, energies, prior = _random(seed)
    result = rerank(_fixed(energies), candidates, margin, prior)
    for row in range(B):
        sums = [
            (float(energy + above) if energy.isfinite() else math.inf)
            for energy, above in zip(energies[row], prior[row], strict=True)
        ]
        best = min(range(N), key=sums.__getitem__)
        taken = sums[0] < math.inf and sums[0] - sums[best] > margin
        assert bool(result.accepted[row]) == taken and int(result.index[row]) == (best if taken else 0)
        assert torch.equal(result.actions[row], candidates[row, best if taken else 0])
        assert result.scores[row].tolist() == pytest.approx(sums, rel=1e-5)
    clean = energies.nan_to_num(nan=math.inf)
    assert torch.equal(result.energies, clean), "energies are told without the prior"


def test_a_prior_can_make_and_break_a_choice() -> None:
    candidates = torch.randn(3, 2, H, A)
    energies, prior = torch.tensor([[1.0, 2.0], [1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, -3], [0, 3], [0, 0.5]])
    result = rerank(_fixed(energies), candidates, 0.0, prior)
    assert result.index.tolist() == [1, 0, 1]
    assert result.scores.tolist() == [[1, -1], [1, 3], [1, 0.5]] and torch.equal(result.energies, energies)
    assert rerank(_fixed(energies), candidates, 0.5, prior).index.tolist() == [1, 0, 0]
    assert rerank(_fixed(energies), candidates, 0.0).index.tolist() == [0, 1, 1]


@pytest.mark.parametrize("lowest", [-1e30, -1.0])
def test_what_an_infinite_prior_rules_out_is_never_chosen(lowest: float) -> None:
    energies = torch.zeros(B, N)
    energies[:, 3] = lowest
    prior = torch.zeros(B, N)
    prior[:, 3] = math.inf
    result = rerank(_fixed(energies), torch.randn(B, N, H, A), 0.0, prior)
    assert not result.accepted.any() and not result.index.any()
    assert result.scores[:, 3].isinf().all() and (result.energies[:, 3] == lowest).all()
    all_out = rerank(_fixed(energies), torch.randn(B, N, H, A), 0.0, torch.full((B, N), math.inf))
    assert not all_out.accepted.any() and not all_out.index.any()


@pytest.mark.parametrize(
    "prior",
    [
        torch.zeros(B, N - 1),
        torch.zeros(N),
        torch.zeros(B, 1),
        torch.zeros(B, N).index_fill(1, torch.tensor([2]), math.nan),
        torch.zeros(B, N).index_fill(1, torch.tensor([2]), -math.inf),
    ],
    ids=["too few", "one row", "one column", "NaN", "-inf"],
)
def test_bad_priors_are_refused(problem: tuple[Tensor, Tensor, Tensor], prior: Tensor) -> None:
    with pytest.raises(ValueError, match=r"prior .*expected \(B,N\) = \(5, 7\), no NaN or -inf"):
        rerank(_fixed(torch.zeros(B, N)), problem[2], 0.0, prior)
    with pytest.raises(ValueError, match="prior"):
        _reranker(0.0)(*problem, prior)


def test_a_reranker_adds_the_prior_and_takes_a_margin_for_one_call(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    reranker = _reranker(math.inf)
    assert not reranker(*problem).accepted.any()
    plain = reranker(*problem, margin=0.0)
    assert plain.accepted.any() and torch.equal(plain.scores, plain.energies)
    assert reranker.margin == math.inf and not reranker(*problem).accepted.any(), "the call's margin is forgotten"
    prior = torch.zeros(B, N)
    prior[:, 4] = -100
    result = reranker(*problem, prior, margin=0.0)
    assert torch.equal(result.energies, plain.energies) and torch.equal(result.scores, plain.energies + prior)
    assert result.index.tolist() == [4] * B and reranker.counters["accepted"] == int(plain.accepted.sum()) + B
    assert not _reranker(0.0)(*problem, margin=math.inf).accepted.any()
    for margin in (-1.0, math.nan):
        with pytest.raises(ValueError, match="margin="):
            reranker(*problem, margin=margin)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 2), st.floats(0, 2))
def test_more_tolerance_never_asks_for_a_larger_margin(seed: int, first: float, second: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    energies = torch.randn(300, 3, generator=generator)
    distances = torch.rand(300, 3, generator=generator)
    distances[:, 0] += 0.4
    low, high = sorted((first, second))
    strict, none, loose = (calibrate_margin(energies, distances, tolerance=t) for t in (0.0, low, high))
    assert loose <= none <= strict
    assert calibrate_margin(energies, distances) == strict


def test_tolerance_forgives_what_is_worse_by_no_more() -> None:
    generator = torch.Generator().manual_seed(0)
    energies, distances = torch.randn(500, 2, generator=generator), torch.tensor([[1.0, 1.25]]).expand(500, 2)
    assert calibrate_margin(energies, distances, tolerance=0.24) == math.inf
    assert calibrate_margin(energies, distances, tolerance=0.25) == 0.0, "a difference of the tolerance is forgiven"
    for tolerance in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="tolerance="):
            calibrate_margin(energies, distances, tolerance=tolerance)
