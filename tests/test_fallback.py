"""Whatever fails beside the policy, its own chunk is executed; in evaluation it ends the run instead."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla_energy import EnergyConfig, EnergyHead, Reranker
from vla_energy.backbones import LoadedVLA, load_openvla, save_openvla
from vla_energy.checkpoint import save_head
from vla_energy.compatibility import CompatibilityError
from vla_energy.config import CandidatesConfig
from vla_energy.fallback import Fallback
from vla_energy.rerank import EnergyError
from vla_energy.rollout.interface import Request
from vla_energy.rollout.policy import CheckpointPolicy
from vla_energy.rollout.world import Observation


def test_failures_are_counted_by_kind_and_logged_at_every_doubling(caplog: pytest.LogCaptureFixture) -> None:
    fallback, errors = Fallback(False, (OSError,)), [ValueError("a"), KeyError("b"), RuntimeError("c")]

    def fail(error: Exception) -> int:
        raise error

    with caplog.at_level(logging.ERROR):
        for turn in range(9):
            assert fallback(lambda turn=turn: fail(errors[turn % 3]), lambda: 3, "it") == 3
    assert fallback.counts == {"ValueError": 3, "KeyError": 3, "RuntimeError": 3} and fallback.total == 9
    logged = zip((1, 2, 4, 8), caplog.records, strict=True)
    assert all(f"({count} times" in row.getMessage() for count, row in logged)
    assert [bool(row.exc_info) for row in caplog.records] == [True, False, False, False]
    with pytest.raises(OSError, match="wrong use"):
        fallback(lambda: fail(OSError("wrong use")), lambda: 3, "it")
    with pytest.raises(KeyboardInterrupt):
        fallback(lambda: (_ for _ in ()).throw(KeyboardInterrupt()), lambda: 3, "it")
    with pytest.raises(ValueError, match="a"):
        Fallback(True)(lambda: fail(errors[0]), lambda: 3, "it")


def _reranker(strict: bool) -> Reranker:
    torch.manual_seed(0)
    return Reranker(EnergyHead(6, 3, 2, EnergyConfig()), None, EnergyConfig(), 0.0, strict=strict)


def test_a_reranker_falls_back_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    context, mask, candidates = torch.randn(2, 4, 6), torch.ones(2, 4, dtype=torch.bool), torch.randn(2, 5, 2, 3)
    mask[1] = False  # the head refuses a row without a token
    reranker = _reranker(strict=False)
    reranker.head.train()
    result = reranker(context, mask, candidates)
    assert torch.equal(result.actions, candidates[:, 0]) and not result.accepted.any() and not result.index.any()
    assert reranker.fallback.counts == {"ValueError": 1} and reranker.head.training, "its mode is put back"
    with pytest.raises(ValueError, match="row 1"):
        _reranker(strict=True)(context, mask, candidates)
    with pytest.raises(CompatibilityError):
        reranker(context[..., :5], mask, candidates)


def test_a_head_without_numbers_is_no_shut_gate(caplog: pytest.LogCaptureFixture) -> None:
    """NaN weights: nothing is chosen, which must not pass for a gate that stays shut."""
    context, mask, candidates = torch.randn(3, 4, 6), torch.ones(3, 4, dtype=torch.bool), torch.randn(3, 5, 2, 3)
    context[1] = torch.nan
    reranker = _reranker(strict=False)
    result = reranker(context, mask, candidates)
    assert reranker.fallback.counts == {"EnergyError": 1} and "own chunk is not finite (row 1)" in caplog.text
    assert not result.accepted[1] and result.energies[[0, 2]].isfinite().all(), "the other rows are reranked"
    with pytest.raises(EnergyError, match="row 1"):
        _reranker(strict=True)(context, mask, candidates)
    candidates[1, 0] = torch.inf  # no number is expected for a chunk that is none
    _reranker(strict=True)(context.nan_to_num(), mask, candidates)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("columns", [slice(1, None), slice(2, 4)])
def test_a_head_with_numbers_for_some_chunks_says_so_and_chooses_among_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: float, columns: slice
) -> None:
    """Finite for the policy's own chunk alone: nothing is chosen, which must not pass for a gate that stays shut."""
    context, mask, candidates = torch.randn(3, 4, 6), torch.ones(3, 4, dtype=torch.bool), torch.randn(3, 5, 2, 3)
    energies = torch.arange(5, 0, -1.0).repeat(3, 1)
    energies[1:, columns] = value
    monkeypatch.setattr(EnergyHead, "forward", lambda self, *args: energies.clone())
    reranker = _reranker(strict=False)
    result = reranker(context, mask, candidates)
    left = 0 if columns.stop is None else 4
    assert result.index.tolist() == [4, left, left] and (result.energies[1:, columns] == torch.inf).all()
    assert reranker.fallback.counts == {"EnergyError": 1}, "once a call"
    assert "another chunk than the policy's own is not finite (row 1)" in caplog.text and "left out" in caplog.text
    with pytest.raises(EnergyError, match=r"another chunk .* \(row 1\)"):
        _reranker(strict=True)(context, mask, candidates)
    candidates[1:, columns] = torch.nan  # no number is expected for a chunk that is none
    _reranker(strict=True)(context, mask, candidates)


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, statistics: Any) -> Path:
    """The tiny policy with a head whose gate is open."""
    folder = tmp_path_factory.mktemp("policy") / "vla"
    shutil.copytree(tiny_folder, folder)
    _add_head(folder, load_openvla(folder), EnergyConfig(), statistics)
    return folder


def _add_head(folder: Path, vla: LoadedVLA, config: EnergyConfig, statistics: Any) -> None:
    torch.manual_seed(0)
    save_head(folder, EnergyHead(vla.context_dim, 4, 8, config), 0, statistics, {"rerank_margin": 0.0})


DRAWS: dict[str, dict[str, Any]] = {
    "diffusion": {"new_head": True, "use_diffusion": True, "diffusion_steps": (4, 2)},
    "tokens": {"discrete": True},
}


@pytest.fixture(scope="module", params=DRAWS)
def drawing_folder(
    request: pytest.FixtureRequest, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, statistics: Any
) -> Path:
    """A policy whose chunk, or whose candidates, come from the request's generator; the gate is open."""
    torch.manual_seed(1)
    vla = load_openvla(tiny_folder, action_dim=4, **DRAWS[request.param])
    folder = tmp_path_factory.mktemp(request.param) / "vla"
    save_openvla(vla, folder, 0, processor_files=vla.folder, statistics=vla.statistics, dtype=torch.float32)
    _add_head(folder, vla, EnergyConfig(candidates=CandidatesConfig(samples=2)), statistics)
    return folder


def _requests() -> list[Request]:
    images = np.random.default_rng(0).integers(0, 255, (2, 1, 64, 64, 3), np.uint8)
    return [
        Request(Observation(image, np.zeros(4, np.float32), "reach"), torch.Generator().manual_seed(row))
        for row, image in enumerate(images)
    ]


PLACES = {
    "candidates": ("vla_energy.modes.propose", "rerank"),
    "head": ("vla_energy.head.EnergyHead.forward", "rerank"),
    "encode": ("vla_energy.head.EnergyHead.encode", "rerank"),
    "gate": ("vla_energy.modes.Advisor.decide", "rerank"),
    "refine": ("vla_energy.modes.refine", "refine"),
    "replan": ("vla_energy.rollout.policy.replan", "replan"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_policy_falls_back_bit_for_bit_wherever_it_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    target, arm = PLACES[place]
    strict, policy = (CheckpointPolicy(folder, strict=strict) for strict in (True, False))
    alone = _requests()
    expected = policy.act(alone, "policy")
    assert [decision.telemetry["fallback"] for decision in policy.act(_requests(), arm)] == [0.0, 0.0]

    def fail(*_: Any, **__: Any) -> Any:
        raise IndexError("a bug")

    monkeypatch.setattr(target, fail)
    requests = _requests()
    decisions = policy.act(requests, arm)
    for own, decision in zip(expected, decisions, strict=True):
        assert np.array_equal(own.actions.values, decision.actions.values)
        assert not decision.accepted and decision.telemetry == {"fallback": 1.0} and decision.memo is None
    assert _states(requests) == _states(alone), "what the failed decision drew is put back"
    assert policy.fallback.counts == {"IndexError": 1} and f"arm {arm} failed" in caplog.text
    with pytest.raises(IndexError, match="a bug"):
        strict.act(_requests(), arm)


def _states(requests: Sequence[Request]) -> list[bytes]:
    return [request.generator.get_state().numpy().tobytes() for request in requests]


def test_a_policy_that_draws_falls_back_to_the_chunks_that_it_would_have_drawn_alone(
    drawing_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over an episode's decisions: each starts where the generators of the one before it stopped."""
    policy, alone, requests = CheckpointPolicy(drawing_folder), _requests(), _requests()
    before = _states(requests)
    policy.act(_requests(), "rerank")
    assert not policy.fallback.total, "it can rerank"

    def fail(*_: Any) -> Any:
        raise IndexError("a bug")

    monkeypatch.setattr(policy._advisor, "decide", fail)
    for turn in range(2):
        for own, decision in zip(policy.act(alone, "policy"), policy.act(requests, "rerank"), strict=True):
            assert np.array_equal(own.actions.values, decision.actions.values)
        assert _states(requests) == _states(alone)
        assert policy.fallback.total == turn + 1
    assert (_states(alone) != before) == policy._vla.diffuses, "a chunk of tokens is the likeliest, not a drawn one"


@pytest.mark.parametrize("arm", ["rerank", "refine", "replan"])
def test_a_policy_with_a_broken_head_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch, arm: str) -> None:
    strict, policy = (CheckpointPolicy(folder, strict=strict) for strict in (True, False))
    expected = policy.act(_requests(), "policy")
    forward = EnergyHead.forward
    monkeypatch.setattr(EnergyHead, "forward", lambda self, *args: forward(self, *args) * torch.nan)
    decisions = policy.act(_requests(), arm)
    assert policy.fallback.counts == {"EnergyError": 1}
    assert all(decision.telemetry == {"fallback": 1.0} for decision in decisions)
    assert all(np.array_equal(a.actions.values, b.actions.values) for a, b in zip(expected, decisions, strict=True))
    with pytest.raises(EnergyError, match="own chunk"):
        strict.act(_requests(), arm)


@pytest.mark.parametrize("arm", ["rerank", "replan"])
def test_a_policy_whose_head_knows_its_own_chunk_alone_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arm: str
) -> None:
    strict, policy = (CheckpointPolicy(folder, strict=strict) for strict in (True, False))
    expected, forward = policy.act(_requests(), "policy"), EnergyHead.forward

    def partly(self: EnergyHead, *args: Any) -> torch.Tensor:
        energies = forward(self, *args)
        return energies.masked_fill(torch.arange(energies.shape[1]) > 0, torch.nan)

    monkeypatch.setattr(EnergyHead, "forward", partly)
    decisions = policy.act(_requests(), arm)
    assert policy.fallback.counts == {"EnergyError": 1}
    assert all(decision.telemetry == {"fallback": 1.0} for decision in decisions)
    assert all(np.array_equal(a.actions.values, b.actions.values) for a, b in zip(expected, decisions, strict=True))
    with pytest.raises(EnergyError, match="another chunk"):
        strict.act(_requests(), arm)


def test_an_accepted_chunk_that_is_not_finite_is_a_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = CheckpointPolicy(folder)
    expected = policy.act(_requests(), "policy")
    decide = policy._advisor.decide

    def broken(*args: Any) -> Any:
        proposal, accepted = decide(*args)
        return type(proposal)(
            torch.full_like(proposal.actions, torch.nan), proposal.gain, proposal.nearest
        ), accepted | True

    monkeypatch.setattr(policy._advisor, "decide", broken)
    for own, decision in zip(expected, policy.act(_requests(), "rerank"), strict=True):
        assert np.array_equal(own.actions.values, decision.actions.values)
    assert policy.fallback.counts == {"ValueError": 1}
