"""Runs every mode over held-out frames and keeps, for each frame, what it would have changed."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vla_energy.candidates import Source, source_report
from vla_energy.finetune.frames import PolicyFrames
from vla_energy.measures import chunk_distance, pairs_by_band, spearman
from vla_energy.modes import Advisor, Frame, Proposal


@dataclass
class ModeRecord:
    """One mode on M frames.

    Attributes:
        error: `(M,)` L1 of the proposal to the expert's chunk, whatever a gate says.
        gain: `(M,)` see `modes.Proposal`.
        oracle: `(M,)` L1 of the best candidate, the policy's own among them.
        nearest: `(M,)` key distance of the nearest remembered frame, NaN without a memory.
        milliseconds: of all proposals together.
        sources: `source_report` of the candidates, averaged over batches.
        spearman: of scores and distances, averaged over frames; None where nothing is scored.
        bands: share of ordered pairs of candidates whose scores are in the order of their distances, by the band of the
            nearer one; see `measures.BANDS`.
    """

    error: Tensor
    gain: Tensor
    oracle: Tensor
    nearest: Tensor
    milliseconds: float
    sources: dict[str, dict[str, float]]
    spearman: float | None
    bands: dict[str, float]


@dataclass
class Measured:
    """What the policy and each mode did on M held-out frames.

    Attributes:
        policy_error: `(M,)` L1 of the policy's chunk.
        by_step: `(H,)` the same by step of the chunk.
        episodes: `(M,)`.
        tasks: M instructions.
        modes: by name.
        forward_milliseconds: a frame, of reading data and policy, and of the policy on crops.
    """

    policy_error: Tensor
    by_step: Tensor
    episodes: Tensor
    tasks: list[str]
    modes: dict[str, ModeRecord]
    forward_milliseconds: float


@dataclass
class _Parts:
    error: list[Tensor] = field(default_factory=list)
    gain: list[Tensor] = field(default_factory=list)
    oracle: list[Tensor] = field(default_factory=list)
    nearest: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0
    sources: list[dict[str, dict[str, float]]] = field(default_factory=list)
    spearman: list[tuple[float, int]] = field(default_factory=list)
    pairs: dict[str, Any] = field(default_factory=dict)

    def add(self, frames: PolicyFrames, proposal: Proposal, policy_error: Tensor) -> None:
        error = _l1(proposal.actions, frames.expert)
        best = torch.minimum(error, policy_error)
        if proposal.candidates is not None and proposal.scores is not None:
            distances = chunk_distance(proposal.candidates.actions, frames.expert)
            usable = proposal.scores.isfinite()
            best = distances.masked_fill(~usable, torch.inf).amin(1)
            self.sources.append(source_report(proposal.candidates, frames.expert))
            complete = usable.all(1)
            if complete.any():
                value = float(spearman(proposal.scores[complete], distances[complete]))
                self.spearman.append((value, int(complete.sum())))
            for band, counts in pairs_by_band(proposal.scores, distances, usable).items():
                self.pairs[band] = self.pairs.get(band, 0.0) + torch.tensor(counts, dtype=torch.float64)
        for name, part in (("error", error), ("gain", proposal.gain), ("oracle", best), ("nearest", proposal.nearest)):
            getattr(self, name).append(part)

    def record(self) -> ModeRecord:
        error, gain, oracle, nearest = (
            torch.cat(getattr(self, name)) for name in ("error", "gain", "oracle", "nearest")
        )
        rows = sum(count for _, count in self.spearman)
        rank = sum(value * count for value, count in self.spearman) / rows if rows else None
        bands = {name: float(right / pairs) for name, (right, pairs) in self.pairs.items() if pairs}
        return ModeRecord(error, gain, oracle, nearest, 1e3 * self.seconds, _mean(self.sources), rank, bands)


def measure(advisor: Advisor, batches: Iterable[PolicyFrames], seed: int = 0) -> Measured:
    """Every mode of the advisor on held-out frames.

    Args:
        advisor: its gates are not looked at.
        batches: frames of the policy; crops and samples that they have are candidates.
        seed: of the candidates' noise.

    Raises:
        ValueError: there is no frame, or shapes do not fit.
    """
    parts = {mode: _Parts() for mode in advisor.modes}
    errors: list[Tensor] = []
    steps: list[Tensor] = []
    episodes: list[Tensor] = []
    tasks: list[str] = []
    forward, started = 0.0, time.perf_counter()
    for index, frames in enumerate(batches):
        forward += time.perf_counter() - started
        # The same sum as for a proposal, or the policy's own chunk, proposed, would differ from it by rounding.
        policy_error = _l1(frames.policy, frames.expert)
        frame = Frame(frames.context, frames.context_mask, frames.policy, frames.layer_actions)
        others = {"crop": frames.crops, "sample": frames.samples}
        others = {name: Source(chunks) for name, chunks in others.items() if chunks is not None}
        for mode, part in parts.items():
            generators = [torch.Generator().manual_seed(seed + 1000 * index + row) for row in range(len(policy_error))]
            started = time.perf_counter()
            proposal = advisor.propose(mode, frame, generators, others)
            part.seconds += time.perf_counter() - started
            part.add(frames, proposal, policy_error)
        errors.append(policy_error)
        steps.append((frames.policy - frames.expert).abs().mean(2))
        episodes.append(frames.episodes)
        tasks += frames.instructions
        started = time.perf_counter()
    if not errors:
        raise ValueError("no held-out frame to measure on")
    error, by_step = torch.cat(errors), torch.cat(steps).mean(0)
    records = {mode: part.record() for mode, part in parts.items()}
    return Measured(error, by_step, torch.cat(episodes), tasks, records, 1e3 * forward / len(error))


def _l1(actions: Tensor, expert: Tensor) -> Tensor:
    return (actions.float() - expert.float()).abs().mean((1, 2))


def _mean(reports: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Averages; batches in which a source had nothing are left out."""
    names = reports[0] if reports else {}
    result: dict[str, dict[str, Any]] = {}
    for name in names:
        columns = {key: [report[name][key] for report in reports] for key in names[name]}
        finite = {key: [v for v in values if v == v and abs(v) != float("inf")] for key, values in columns.items()}
        result[name] = {key: sum(values) / len(values) for key, values in finite.items() if values}
    return result
