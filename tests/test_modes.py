"""What may replace the policy's chunk: proposals, gates, replanning, and arms that decide every n steps."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vla_energy.actions import DatasetStatistics, FieldStatistics, RawActions
from vla_energy.arms import BOTH, split_arm
from vla_energy.candidates import Source
from vla_energy.config import CandidatesConfig, EnergyConfig, HeadConfig, RefineConfig, ReplanConfig, RetrievalConfig
from vla_energy.head import EnergyHead
from vla_energy.memory import ChunkMemory, MemoryBatch
from vla_energy.modes import Advisor, Frame, Plan, replan
from vla_energy.rerank import EnergyError, Reranker
from vla_energy.rollout.interface import ARMS, Decision, check_arms
from vla_energy.rollout.run import run_rollouts

B, S, D, L, H, A = 4, 5, 16, 4, 8, 2
FRAMES, PER_EPISODE = 40, 5
MODES = ("rerank", "refine", "retrieve", BOTH)


BROKEN = [math.nan, math.inf, -math.inf]


class Bowl(nn.Module):
    """`E = 10 mean (a - a*)^2`, a* the context's first token."""

    context_dim, action_dim, horizon = D, A, H

    def encode(self, context: Tensor, context_mask: Tensor, reference: Tensor) -> Tensor:
        return context[:, 0].reshape(-1, 1, H, A)

    def forward(self, encoded: Any, actions: Tensor) -> Tensor:
        return 10 * (actions - encoded).square().mean((2, 3))


class Pit(Bowl):
    """A bowl with no number below `edge`; -inf there looks like the best there is."""

    def __init__(self, value: float, edge: float) -> None:
        super().__init__()
        self.value, self.edge = value, edge

    def forward(self, encoded: Any, actions: Tensor) -> Tensor:
        energies = super().forward(encoded, actions)
        return torch.where(energies < self.edge, self.value + 0 * energies, energies)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _generators(rows: int = B) -> list[torch.Generator]:
    return [_generator(row) for row in range(rows)]


def _frame(seed: int, rows: int = B) -> Frame:
    generator = _generator(seed)
    context = 0.5 * torch.randn(rows, S, D, generator=generator)
    layers = (0.4 * torch.randn(rows, L, H, A, generator=generator)).clamp(-0.9, 0.9)
    return Frame(context, torch.ones(rows, S, dtype=torch.bool), layers[:, -1].clone(), layers)


def _rows(frame: Frame, rows: Sequence[int]) -> Frame:
    index = list(rows)
    layers = None if frame.layer_actions is None else frame.layer_actions[index]
    return Frame(frame.context[index], frame.context_mask[index], frame.policy[index], layers)


@pytest.fixture(scope="module")
def remembered() -> tuple[Frame, Tensor, ChunkMemory]:
    """Frames, their experts' chunks, and the memory of both."""
    frame = _frame(99, FRAMES)
    expert = torch.rand(FRAMES, H, A, generator=_generator(98))
    fields = FieldStatistics.of(np.random.default_rng(0).normal(size=(100, A)))
    episodes = torch.arange(FRAMES) // PER_EPISODE
    batch = MemoryBatch(frame.context, frame.context_mask, frame.policy, expert, episodes)
    return frame, expert, ChunkMemory.build([batch], DatasetStatistics(fields, None, FRAMES, 8))


def _reranker(margin: float = 0.0, head: Any = None, **changes: Any) -> Reranker:
    return Reranker(Bowl() if head is None else head, None, EnergyConfig(**changes), margin)


def _advisor(memory: ChunkMemory | None = None, gates: dict[str, float] | None = None, **changes: Any) -> Advisor:
    return Advisor(_reranker(**changes), memory, gates, gripper_dims=())


def _head() -> EnergyHead:
    """In training mode, with dropout; a new head's lowest chunk is the policy's, a shaken one's is not."""
    torch.manual_seed(0)
    head = EnergyHead(D, A, H, EnergyConfig(head=HeadConfig(hidden_dim=8, dropout=0.5))).train()
    with torch.no_grad():
        for weight in head.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return head


NOTHING = CandidatesConfig(num_candidates=0, layer_exits=False)


# Which modes there are, and their gates.


def test_head_and_memory_decide_on_the_modes(remembered: tuple[Frame, Tensor, ChunkMemory]) -> None:
    memory = remembered[2]
    assert Advisor(None).modes == ()
    assert Advisor(_reranker()).modes == ("rerank", "refine")
    assert Advisor(None, memory).modes == ("retrieve",)
    assert set(Advisor(_reranker(), memory).modes) == set(MODES)


def test_a_mode_that_is_not_there_is_named_with_those_that_are(remembered: tuple[Frame, Tensor, ChunkMemory]) -> None:
    with pytest.raises(ValueError, match="mode 'rerank': this checkpoint has retrieve"):
        Advisor(None, remembered[2]).propose("rerank", _frame(0), _generators())
    with pytest.raises(ValueError, match="mode 'retrieve': this checkpoint has rerank, refine"):
        _advisor().decide("retrieve", _frame(0), _generators())
    with pytest.raises(ValueError, match="mode 'refine': this checkpoint has none"):
        Advisor(None).propose("refine", _frame(0), _generators())


def test_gates_are_shut_but_for_the_rerankers_own_and_the_baseline(
    remembered: tuple[Frame, Tensor, ChunkMemory],
) -> None:
    memory = remembered[2]
    shut = {"rerank": 0.3, "refine": math.inf, "retrieve": 0.0, BOTH: math.inf}
    assert Advisor(_reranker(0.3), memory).gates == shut
    calibrated = {"rerank": 0.1, "refine": 0.2, BOTH: 0.4, "retrieve": math.inf}
    opened = Advisor(_reranker(0.3), memory, calibrated).gates
    assert opened == {**calibrated, "retrieve": 0.0}, "the plain baseline has no gate"
    assert Advisor(_reranker(0.3), memory, {"refine": 0.2}).gates == {**shut, "refine": 0.2}


@pytest.mark.parametrize("mode", ["refine", BOTH, "rerank"])
def test_without_a_calibrated_margin_the_policy_stays(remembered: tuple[Frame, Tensor, ChunkMemory], mode: str) -> None:
    frame = _rows(remembered[0], range(B))
    advisor = _advisor(remembered[2], margin=math.inf)
    proposal, accepted = advisor.decide(mode, frame, _generators())
    assert (proposal.gain > 0).any() and not torch.equal(proposal.actions, frame.policy), "there is something better"
    assert accepted.dtype == torch.bool and accepted.shape == (B,) and not accepted.any()
    _, taken = _advisor(remembered[2], {mode: 0.0}).decide(mode, frame, _generators())
    assert torch.equal(taken, proposal.gain > 0) and taken.any()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.floats(0, 3))
def test_the_gate_is_the_rerankers(seed: int, margin: float) -> None:
    """Proposing at margin 0 and opening the gate above a margin is reranking at that margin."""
    frame = _frame(seed)
    advisor = _advisor(gates={"rerank": margin})
    proposal, accepted = advisor.decide("rerank", frame, _generators())
    assert proposal.candidates is not None
    assert proposal.candidates.sources[:4] == ("policy", "layer_exit_2", "layer_exit_1", "noise_0.02")
    twin = _reranker(margin)(frame.context, frame.context_mask, proposal.candidates.actions)
    assert torch.equal(accepted, twin.accepted)
    assert torch.equal(torch.where(accepted[:, None, None], proposal.actions, frame.policy), twin.actions)
    assert proposal.scores is not None and torch.equal(proposal.scores, twin.scores)
    assert proposal.nearest.isnan().all()


# What each mode proposes.


def test_retrieve_gives_the_nearest_chunk(remembered: tuple[Frame, Tensor, ChunkMemory]) -> None:
    known, expert, memory = remembered
    frame = dataclasses.replace(_rows(known, [3, 17, 30]), context=known.context[[3, 17, 30]] + 1e-3)
    proposal, accepted = Advisor(None, memory).decide("retrieve", frame, _generators(3))
    assert torch.equal(proposal.actions, expert[[3, 17, 30]]) and accepted.all()
    assert proposal.gain.tolist() == [math.inf] * 3 and (proposal.nearest < 0.05).all()
    assert proposal.candidates is None and proposal.scores is None
    far = _frame(5)
    keys = memory.encoder(far.context, far.context_mask, far.policy)
    distances = (keys[:, None] - memory.keys).norm(dim=2)
    proposal = Advisor(None, memory).propose("retrieve", far, _generators())
    assert torch.equal(proposal.actions, expert[distances.argmin(1)])
    torch.testing.assert_close(proposal.nearest, distances.amin(1), atol=1e-3, rtol=1e-3)


def test_where_nothing_can_be_looked_up_retrieve_keeps_the_policy(
    remembered: tuple[Frame, Tensor, ChunkMemory],
) -> None:
    known, expert, memory = remembered
    frame = _rows(known, range(B))
    frame.context[1, 0, 0] = math.nan
    frame = dataclasses.replace(frame, policy=frame.policy.bfloat16())
    proposal, accepted = Advisor(None, memory).decide("retrieve", frame, _generators())
    assert accepted.tolist() == [True, False, True, True]
    assert proposal.gain.tolist() == [math.inf, 0, math.inf, math.inf] and proposal.nearest[1] == math.inf
    assert proposal.actions.dtype == torch.bfloat16 and torch.equal(proposal.actions[1], frame.policy[1])
    assert torch.equal(proposal.actions[[0, 2, 3]], expert[[0, 2, 3]].bfloat16())


@pytest.mark.parametrize(("distance", "taken"), [("near", True), ("far", False)])
def test_a_retrieved_chunk_is_taken_near_its_key_and_not_far_from_it(
    remembered: tuple[Frame, Tensor, ChunkMemory], distance: str, taken: bool
) -> None:
    known, expert, memory = remembered
    frame = _rows(known, [2, 11, 25])
    # The context's first token is the bowl's centre, so that the energy alone speaks for the policy's chunk.
    frame.context[:, 0] = frame.policy.flatten(1)
    frame.context[:, 1:] *= 1 if distance == "near" else 30
    advisor = _advisor(memory, {BOTH: 0.0}, candidates=NOTHING, retrieval=RetrievalConfig(1, weight=2.0, reach=4.0))
    proposal, accepted = advisor.decide(BOTH, frame, _generators(3))
    assert accepted.tolist() == [taken] * 3 and ((proposal.nearest < 2) == taken).all()
    assert torch.equal(proposal.actions, expert[[2, 11, 25]] if taken else frame.policy)
    assert ((proposal.gain > 0) == taken).all()
    for weight, reach in ((0.0, 4.0), (2.0, 0.0)):
        timid = _advisor(memory, {BOTH: 0.0}, candidates=NOTHING, retrieval=RetrievalConfig(1, weight, reach))
        assert not timid.decide(BOTH, frame, _generators(3))[1].any(), "without its prior the energy decides"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.floats(0, 3), st.floats(0, 6), st.integers(1, 6))
def test_reranking_with_retrieval_is_a_slow_loop_over_all(
    remembered: tuple[Frame, Tensor, ChunkMemory], seed: int, weight: float, reach: float, count: int
) -> None:
    memory = remembered[2]
    frame = _frame(seed)
    config = RetrievalConfig(count, weight, reach)
    advisor = _advisor(memory, candidates=CandidatesConfig(num_candidates=2), retrieval=config)
    proposal = advisor.propose(BOTH, frame, _generators())
    candidates, scores = proposal.candidates, proposal.scores
    assert candidates is not None and scores is not None
    assert candidates.sources[-count:] == ("retrieved",) * count and len(candidates.sources) == 5 + count
    keys = memory.encoder(frame.context, frame.context_mask, frame.policy)
    for row in range(B):
        distances = (memory.keys - keys[row]).norm(dim=1)
        nearest = distances.argsort()[:count]
        lent = list(memory.chunks[nearest].clamp(-1, 1))
        own = list(candidates.actions[row, :5])
        assert torch.equal(own[0], frame.policy[row])
        centre = frame.context[row, 0].reshape(H, A)
        priors = [0.0] * 5 + [weight * (float(distances[index]) - reach) for index in nearest]
        chunks = own + lent
        totals = [
            10 * float((chunk - centre).square().mean()) + prior for chunk, prior in zip(chunks, priors, strict=True)
        ]
        assert scores[row].tolist() == pytest.approx(totals, abs=0.02, rel=1e-3)
        best = int(np.argmin(scores[row].numpy()))
        assert torch.equal(proposal.actions[row], chunks[best])
        assert float(proposal.gain[row]) == pytest.approx(totals[0] - min(totals), abs=0.04, rel=1e-3)
        assert float(proposal.nearest[row]) == pytest.approx(float(distances.min()), abs=1e-3, rel=1e-3)


def test_no_retrieved_candidates_where_none_are_asked_for(remembered: tuple[Frame, Tensor, ChunkMemory]) -> None:
    advisor = _advisor(remembered[2], retrieval=RetrievalConfig(count=0))
    both, plain = (advisor.propose(mode, _frame(1), _generators()) for mode in (BOTH, "rerank"))
    assert both.candidates is not None and "retrieved" not in both.candidates.sources and both.nearest.isnan().all()
    assert torch.equal(both.actions, plain.actions) and torch.equal(both.gain, plain.gain)


def test_where_the_memory_is_too_small_what_is_missing_is_never_chosen() -> None:
    frame = _frame(7, 6)
    expert = torch.rand(6, H, A, generator=_generator(8))
    fields = FieldStatistics.of(np.random.default_rng(0).normal(size=(100, A)))
    batch = MemoryBatch(frame.context, frame.context_mask, frame.policy, expert, torch.arange(6) // 3)
    memory = ChunkMemory.build([batch], DatasetStatistics(fields, None, 6, 2))
    advisor = _advisor(memory, candidates=NOTHING, retrieval=RetrievalConfig(count=9))
    proposal = advisor.propose(BOTH, frame, _generators(6))
    assert proposal.candidates is not None and proposal.scores is not None
    assert proposal.candidates.actions.shape == (6, 10, H, A)
    assert proposal.candidates.prior[:, 7:].isinf().all() and proposal.scores[:, 7:].isinf().all()
    assert proposal.candidates.prior[:, :7].isfinite().all() and proposal.actions.isfinite().all()


def test_the_callers_candidates_come_before_the_retrieved_ones(remembered: tuple[Frame, Tensor, ChunkMemory]) -> None:
    frame = _frame(2)
    advisor = _advisor(remembered[2], candidates=NOTHING, retrieval=RetrievalConfig(count=2))
    proposal = advisor.propose(BOTH, frame, _generators(), {"crop": Source(frame.policy[:, None])})
    assert proposal.candidates is not None
    assert proposal.candidates.sources == ("policy", "crop", "retrieved", "retrieved")


def test_the_callers_candidates_are_among_those_of_reranking() -> None:
    frame = _frame(2)
    centre = frame.context[:, 0].reshape(B, 1, H, A).clamp(-1, 1)
    prior = torch.tensor([[0.0], [100.0], [0.0], [math.inf]])
    advisor = _advisor(candidates=NOTHING)
    proposal = advisor.propose("rerank", frame, _generators(), {"oracle": Source(centre, prior)})
    assert proposal.candidates is not None and proposal.candidates.sources == ("policy", "oracle")
    assert torch.equal(proposal.candidates.prior, torch.cat([torch.zeros(B, 1), prior], 1))
    assert (proposal.gain > 0).tolist() == [True, False, True, False]
    assert torch.equal(proposal.actions[[0, 2]], centre[[0, 2], 0])
    assert torch.equal(proposal.actions[[1, 3]], frame.policy[[1, 3]])
    free = advisor.propose("rerank", frame, _generators(), {"oracle": Source(centre)})
    assert (free.gain > 0).all()


def test_noise_spares_the_grippers_and_takes_the_scale() -> None:
    frame = dataclasses.replace(_frame(3), layer_actions=None)
    advisor = Advisor(_reranker(), gripper_dims=(0,), scale=torch.tensor([1.0, 0.0]))
    candidates = advisor.propose("rerank", frame, _generators()).candidates
    assert candidates is not None and torch.equal(candidates.actions, frame.policy[:, None].expand(-1, 17, -1, -1))
    refined = Advisor(_reranker(), gripper_dims=(0,)).propose("refine", frame, _generators())
    assert torch.equal(refined.actions[..., 0], frame.policy[..., 0]) and (refined.gain > 0).all()


def test_refine_descends_by_what_it_says_and_inside_its_box() -> None:
    frame = _frame(4)
    advisor = _advisor(refine=RefineConfig(radius=0.2))
    proposal = advisor.propose("refine", frame, [])
    head, encoded = Bowl(), Bowl().encode(frame.context, frame.context_mask, frame.policy)
    before, after = (head(encoded, chunk[:, None])[:, 0] for chunk in (frame.policy, proposal.actions))
    assert (proposal.gain > 0.1).all() and proposal.nearest.isnan().all() and proposal.candidates is None
    torch.testing.assert_close(proposal.gain, before - after)
    assert 0.1 < (proposal.actions - frame.policy).abs().max() <= 0.2 + 1e-6


@pytest.mark.parametrize("value", BROKEN)
def test_refine_tells_of_energies_that_are_not_finite_and_takes_none(value: float) -> None:
    frame = _frame(4)
    own = Bowl()(Bowl().encode(frame.context, frame.context_mask, frame.policy), frame.policy[:, None])
    head, settings = Pit(value, float(own.min()) - 0.5), RefineConfig(radius=0.5, num_steps=30)
    reranker = _reranker(head=head, refine=settings)
    proposal = Advisor(reranker, gripper_dims=()).propose("refine", frame, [])
    assert proposal.gain.isfinite().all() and proposal.gain.max() > 0 and proposal.actions.isfinite().all()
    assert reranker.fallback.counts == {"EnergyError": 1}
    strict = Reranker(head, None, EnergyConfig(refine=settings), 0.0, strict=True)
    with pytest.raises(EnergyError, match=r"another chunk than the policy's own is not finite \(row \d\)"):
        Advisor(strict, gripper_dims=()).propose("refine", frame, [])
    frame.policy[:] = math.nan  # a chunk that is none has no energy
    Advisor(strict, gripper_dims=()).propose("refine", frame, [])


def test_refine_runs_in_inference_mode_and_leaves_the_head_as_it_was() -> None:
    head = _head()
    advisor = _advisor(head=head, refine=RefineConfig(radius=0.3))
    plain = advisor.propose("refine", _frame(5), _generators())
    with torch.inference_mode():
        inference, accepted = advisor.decide("refine", _frame(5), _generators())
    assert torch.equal(plain.actions, inference.actions) and torch.equal(plain.gain, inference.gain)
    assert (plain.gain > 0).any() and not accepted.any() and not plain.actions.requires_grad
    assert head.training and all(parameter.grad is None for parameter in head.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_rows_do_not_see_each_other(remembered: tuple[Frame, Tensor, ChunkMemory], mode: str) -> None:
    advisor = _advisor(remembered[2])
    frame = _frame(6)
    together = advisor.propose(mode, frame, _generators())
    broken = _rows(frame, range(B))
    broken.context[0] = math.nan
    broken.policy[0] = math.nan
    spoilt = advisor.propose(mode, broken, _generators())
    for row in range(1, B):
        alone = advisor.propose(mode, _rows(frame, [row]), [_generator(row)])
        for other in (together, spoilt):
            torch.testing.assert_close(other.actions[row], alone.actions[0])
            torch.testing.assert_close(other.gain[row], alone.gain[0])
            torch.testing.assert_close(other.nearest[row], alone.nearest[0], equal_nan=True)
            if alone.candidates is not None and other.candidates is not None:
                torch.testing.assert_close(other.candidates.actions[row], alone.candidates.actions[0])
                assert torch.equal(other.candidates.actions[row, :19], alone.candidates.actions[0, :19]), "same noise"
    if mode == "rerank":
        assert together.candidates is not None
        noise = together.candidates.actions[:, 3:] - frame.policy[:, None]
        assert (noise[0] - noise[1]).abs().max() > 0.01, "each row has noise of its own"


@pytest.mark.parametrize("mode", ["rerank", BOTH, "refine"])
def test_what_cannot_be_scored_gains_nothing(remembered: tuple[Frame, Tensor, ChunkMemory], mode: str) -> None:
    frame = _frame(8)
    frame.context[2, 0, 0] = math.nan
    proposal, accepted = _advisor(remembered[2], {mode: 0.0}).decide(mode, frame, _generators())
    assert proposal.gain[2] == 0 and not accepted[2]
    assert torch.equal(proposal.actions[2], frame.policy[2])
    assert proposal.gain.isfinite().all() and (proposal.gain[[0, 1, 3]] > 0).all() and accepted.sum() == 3


def test_any_chunk_gains_infinitely_on_a_broken_one_and_a_shut_gate_stays_shut() -> None:
    frame = _frame(9)
    frame.policy[1, 0, 0] = math.nan  # its noisy copies are broken with it, inner exits are not
    proposal, accepted = _advisor(gates={"rerank": 100.0}).decide("rerank", frame, _generators())
    assert proposal.gain[1] == math.inf and accepted.tolist() == [False, True, False, False]
    assert proposal.actions[1].isfinite().all() and proposal.candidates is not None
    assert not _advisor(gates={"rerank": math.inf}).decide("rerank", frame, _generators())[1].any()


def test_the_policys_own_chunk_gains_nothing() -> None:
    frame = _frame(10)
    frame.context[:, 0] = frame.policy.flatten(1)
    for mode in ("rerank", "refine"):
        proposal, accepted = _advisor(gates={"rerank": 0.0, "refine": 0.0}).decide(mode, frame, _generators())
        assert torch.equal(proposal.actions, frame.policy) and proposal.gain.tolist() == [0] * B and not accepted.any()


# Replanning.


def _replanner(head: Any = None, **changes: Any) -> Reranker:
    return _reranker(head=head, replan=ReplanConfig(**{"margin": 0.5, "shortest": 2, "longest": 6, **changes}))


def _under_way(frame: Frame, executed: int, off: float) -> Tensor:
    """A chunk whose rest is the bowl's centre, moved by `off`."""
    centre = frame.context[0, 0].reshape(H, A)
    return torch.cat([torch.zeros(executed, A), centre[: H - executed] + off])


def test_an_episode_starts_with_the_policys_chunk() -> None:
    frame = _frame(0)
    plans, rise = replan(_replanner(), frame, [None] * B, [0] * B)
    assert [plan.interval for plan in plans] == [2] * B and rise.tolist() == [0] * B
    assert all(torch.equal(plan.chunk, fresh) for plan, fresh in zip(plans, frame.policy, strict=True))


def test_a_rest_that_stays_low_is_kept_for_longer_and_longer() -> None:
    frame = _frame(1, 1)
    reranker = _replanner()
    plan, intervals = Plan(_under_way(frame, 2, 0.0), 2), []
    for _ in range(4):
        done = plan.interval
        chunk = torch.cat([torch.zeros(done, A), frame.context[0, 0].reshape(H, A)[: H - done]])
        (plan,), rise = replan(reranker, frame, [Plan(chunk, done)], [done])
        assert torch.equal(plan.chunk[: H - done], chunk[done:]), "the rest comes first"
        assert torch.equal(plan.chunk[H - done :], frame.policy[0, H - done :]), "then the new chunk's end"
        assert float(rise) < 0
        intervals.append(plan.interval)
    assert intervals == [4, 6, 6, 6]


def test_a_rest_that_rises_is_dropped_and_the_interval_starts_anew() -> None:
    frame = _frame(1, 1)
    (plan,), rise = replan(_replanner(), frame, [Plan(_under_way(frame, 4, 2.0), 6)], [4])
    assert float(rise) > 0.5 and plan.interval == 2 and torch.equal(plan.chunk, frame.policy[0])


def test_the_rise_is_the_rests_energy_above_the_new_chunks_and_the_margin_its_limit() -> None:
    frame = _frame(2, 1)
    chunk, head = _under_way(frame, 3, 1.0), Bowl()
    rest = torch.cat([chunk[3:], frame.policy[0, H - 3 :]])
    encoded = head.encode(frame.context, frame.context_mask, frame.policy)
    expected = float(head(encoded, rest[None, None]) - head(encoded, frame.policy[:, None]))
    (plan,), rise = replan(_replanner(margin=100.0), frame, [Plan(chunk, 1)], [3])
    assert float(rise) == pytest.approx(expected, rel=1e-5) and expected > 0
    assert plan.interval == 2 and torch.equal(plan.chunk, rest)
    for margin, kept in ((expected + 0.01, True), (expected - 0.01, False)):
        (plan,), _ = replan(_replanner(margin=margin), frame, [Plan(chunk, 2)], [3])
        assert torch.equal(plan.chunk, rest if kept else frame.policy[0]) and plan.interval == (4 if kept else 2)


def test_no_interval_is_longer_than_the_chunk() -> None:
    frame = _frame(3, 1)
    reranker = _replanner(shortest=12, longest=20)
    (plan,), _ = replan(reranker, frame, [None], [0])
    assert plan.interval == H
    # A kept chunk leaves one action, or there would be nothing to compare next time.
    (plan,), _ = replan(reranker, frame, [Plan(_under_way(frame, 1, 0.0), H)], [1])
    assert plan.interval == H - 1


def test_replanned_rows_do_not_see_each_other_and_nan_takes_the_new_chunk() -> None:
    frame = _frame(4)
    frame.context[3, 0] = math.nan
    good, bad = (frame.context[row, 0].reshape(H, A) + off for row, off in ((0, 0.0), (1, 3.0)))
    plans: list[Plan | None] = [Plan(good.roll(2, 0), 2), Plan(bad, 4), None, Plan(good, 2)]
    executed = [2, 1, 0, 3]
    new, rise = replan(_replanner(), frame, plans, executed)
    assert [plan.interval for plan in new] == [4, 2, 2, 2]
    for row in range(B):
        alone, above = replan(_replanner(), _rows(frame, [row]), [plans[row]], [executed[row]])
        assert torch.equal(alone[0].chunk, new[row].chunk) and alone[0].interval == new[row].interval
        torch.testing.assert_close(above[0], rise[row], equal_nan=True)
    assert torch.equal(new[3].chunk, frame.policy[3])
    with pytest.raises(ValueError):
        replan(_replanner(), frame, plans[:2], executed[:2])


@pytest.mark.parametrize("value", BROKEN)
def test_a_rest_whose_energy_is_not_finite_is_dropped_and_told(value: float) -> None:
    frame = _frame(1, 1)
    plan = Plan(_under_way(frame, 4, 0.0), 2)
    settings = ReplanConfig(margin=0.5)
    energies = Bowl()(Bowl().encode(frame.context, frame.context_mask, frame.policy), frame.policy[:, None])
    head = Pit(value, float(energies) - 0.5)
    reranker = _reranker(head=head, replan=settings)
    (new,), rise = replan(reranker, frame, [plan], [4])
    assert rise.isnan().all() and torch.equal(new.chunk, frame.policy[0])
    assert reranker.fallback.counts == {"EnergyError": 1}
    strict = Reranker(head, None, EnergyConfig(replan=settings), strict=True)
    with pytest.raises(EnergyError, match="another chunk"):
        replan(strict, frame, [plan], [4])
    broken = Plan(torch.full((H, A), math.nan), 2)
    (new,), _ = replan(strict, frame, [broken], [4])
    assert torch.equal(new.chunk, frame.policy[0]), "a chunk that is none has no energy"


def test_replanning_needs_no_gradient_and_no_dropout() -> None:
    head = _head()
    frame, reranker = _frame(5), _replanner(head)
    plans: list[Plan | None] = [Plan(torch.zeros(H, A), 2)] * B
    with torch.inference_mode():
        first, second = (replan(reranker, frame, plans, [2] * B)[1] for _ in range(2))
    assert torch.equal(first, second) and not replan(reranker, frame, plans, [2] * B)[1].requires_grad
    assert head.training


# Arms of a rollout.


def test_an_arm_may_say_how_often_it_decides() -> None:
    assert split_arm("policy") == ("policy", None) and split_arm("rerank+retrieve@12") == ("rerank+retrieve", 12)
    wrong = ["policy@", "policy@0", "policy@-1", "policy@two", "policy@1.5", "policy@2@3", "policy@ 2", "policy@2\n"]
    for arm in (*wrong, "policy@04", "policy@1\u0664", "policy@+4", "policy@1_0", "policy@\u0664", "@2", "@", ""):
        with pytest.raises(ValueError, match=f"arm {re.escape(repr(arm))}: expected ARM or ARM@n, .* of 1 or more"):
            split_arm(arm)
    for name in ("replan", "recommended"):
        with pytest.raises(ValueError, match=f"arm '{name}@2': {name} decides itself when to ask again"):
            split_arm(f"{name}@2")


def test_arms_are_checked_by_their_names_alone() -> None:
    check_arms(["policy", "policy@3", "own@2"], {"policy", "own"})
    with pytest.raises(ValueError, match=r"unknown arm\(s\): magic; known: own, policy, recommended, refine"):
        check_arms(["policy", "magic@2"], {"policy", "own"})
    with pytest.raises(ValueError, match=r"cannot run arm\(s\) retrieve, only policy: .*vla-energy memory"):
        check_arms(["policy", "retrieve@2"], {"policy"})
    for arm, message in (("replan@2", "replan decides itself"), ("@2", "arm '@2': expected"), ("policy@02", "zeros")):
        with pytest.raises(ValueError, match=message):
            check_arms(["policy", arm], {"policy", "replan"})
    assert {"policy", *MODES, "recommended", "replan"} == set(ARMS)


class Walker:
    """Walks on, and notes what it is asked; `stride` executes what it wants."""

    horizon, action_dim = 6, 1
    arms = frozenset({"policy", "stride"})
    metadata: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, execute: Sequence[int | None] = (None,)) -> None:
        self.execute, self.seen = execute, []

    def act(self, requests: Sequence[Any], arm: str) -> list[Decision]:
        self.seen += [(arm, request.previous, request.executed) for request in requests]
        decisions = []
        for request in requests:
            count = 0 if request.previous is None else request.previous.memo + 1
            wanted = self.execute[count % len(self.execute)] if arm == "stride" else None
            decisions.append(Decision(RawActions(np.full((6, 1), 0.01)), execute=wanted, memo=count))
        return decisions


@pytest.fixture
def walk(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))

    def run(policy: Walker, arms: list[str], **changes: Any) -> dict[tuple[str, int], tuple[int, int]]:
        fixed: dict[str, Any] = {"episodes": 1, "replan_every": 4, "max_steps": 12, "workers": 1}
        result = run_rollouts(policy, ["far"], arms=arms, backend="point_world:PointWorld", **{**fixed, **changes})
        return {(e["arm"], e["seed"] - 1_000_000): (e["steps"], e["decisions"]) for e in result["episodes"]}

    return run


def test_arms_of_one_policy_decide_as_often_as_they_say(walk: Any) -> None:
    policy = Walker()
    counts = walk(policy, ["policy", "policy@2", "policy@5"])
    assert counts == {("policy", 0): (12, 3), ("policy@2", 0): (12, 6), ("policy@5", 0): (12, 3)}
    assert {arm for arm, _, _ in policy.seen} == {"policy"}, "the policy is asked for an arm without its interval"
    for arms, message in ((["policy@7"], "7 exceeds the checkpoint's horizon 6"), (["policy@x"], "expected ARM or")):
        with pytest.raises(ValueError, match=message):
            walk(Walker(), arms)


def test_a_decision_may_say_how_long_it_holds_and_comes_back_with_what_was_executed(walk: Any) -> None:
    policy = Walker([1, 6, 3])
    assert walk(policy, ["stride", "stride@2"], max_steps=12, workers=2, episodes=2) == {
        (arm, seed): (12, 5) for arm in ("stride", "stride@2") for seed in (0, 1)
    }
    starts = [executed for _, previous, executed in policy.seen if previous is None]
    later = [(previous.memo, executed) for _, previous, executed in policy.seen if previous is not None]
    assert starts == [0] * 4
    assert sorted(later) == sorted([(0, 1), (1, 6), (2, 3), (3, 1)] * 4), "the last, of 6, is cut short by the limit"


@pytest.mark.parametrize("wanted", [0, -1, 7])
def test_a_decision_cannot_ask_for_more_than_its_chunk(walk: Any, wanted: int) -> None:
    with pytest.raises(ValueError, match=f"asks to execute {wanted} of 6 actions"):
        walk(Walker([wanted]), ["stride"])
