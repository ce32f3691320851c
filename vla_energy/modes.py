"""What may replace the policy's chunk at inference: each mode proposes a chunk and says by how much its score is lower.

One gate for all: the proposal is taken where that gain is above the mode's margin, else the policy's chunk stays bit
for bit. `vla-energy preflight` sets the margins from held-out data (`gates.py`); rollouts and preflight call the same
code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vla_energy.arms import BOTH, HEAD_MODES, MEMORY_MODES, split_arm
from vla_energy.candidates import CandidateSet, Source, overlap, propose, retrieved_source
from vla_energy.memory import ChunkMemory
from vla_energy.refine import refine
from vla_energy.rerank import Reranker, check_energies, scoring


@dataclass(frozen=True)
class Frame:
    """What the policy made of B observations.

    Attributes:
        context, context_mask: `(B,S,D)` and `(B,S)`, True = valid.
        policy: `(B,H,A)` its chunks, normalised.
        layer_actions: `(B,L,H,A)`, the policy's chunk last, or None.
    """

    context: Tensor
    context_mask: Tensor
    policy: Tensor
    layer_actions: Tensor | None = None


@dataclass(frozen=True)
class Proposal:
    """A mode's alternative for each of B rows.

    Attributes:
        actions: `(B,H,A)`; the policy's chunk where there is none.
        gain: `(B,)` fp32, how much lower its score is than that of the policy's chunk; 0 where there is none, inf for
            `retrieve`, which does not score.
        nearest: `(B,)` key distance of the nearest remembered frame, NaN without a memory.
        candidates: what was chosen among; None for `refine` and `retrieve`.
        scores: `(B,N)` of the candidates.
    """

    actions: Tensor
    gain: Tensor
    nearest: Tensor
    candidates: CandidateSet | None = None
    scores: Tensor | None = None


class Advisor:
    """The modes that a checkpoint's head and memory allow.

    Args:
        reranker: the head, or None.
        memory: of the training set, or None.
        gates: margin by mode; inf keeps the policy's chunk. A mode that is missing has a shut gate, but for `rerank`,
            which falls back to the reranker's own margin, and for `retrieve`, the plain baseline, which has none.
        gripper_dims, scale: of the noise, see `candidates.propose`.
        tasks: recommended arm by instruction, `ARM` or `ARM@n`, one of `arms`.

    Raises:
        ValueError: `tasks` names an arm that this checkpoint cannot run.
    """

    def __init__(
        self,
        reranker: Reranker | None,
        memory: ChunkMemory | None = None,
        gates: Mapping[str, float] | None = None,
        *,
        gripper_dims: Sequence[int] = (-1,),
        scale: Tensor | None = None,
        tasks: Mapping[str, str] | None = None,
    ) -> None:
        self.reranker, self.memory, self.tasks = reranker, memory, dict(tasks or {})
        self.gripper_dims, self.scale = gripper_dims, scale
        own = {} if reranker is None else {"rerank": reranker.margin}
        self.gates = {**dict.fromkeys(self.modes, math.inf), **own, **(gates or {}), "retrieve": 0.0}

        if unknown := {split_arm(arm)[0] for arm in self.tasks.values()} - {*self.arms}:
            raise ValueError(
                f"recommended are {', '.join(sorted(unknown))}, the checkpoint has {', '.join(self.arms)}: "
                "delete its energy_gates.json and run vla-energy preflight again"
            )

    @property
    def modes(self) -> tuple[str, ...]:
        """Names of the modes that can be run."""
        head = () if self.reranker is None else HEAD_MODES
        memory = () if self.memory is None else MEMORY_MODES
        return head + memory + ((BOTH,) if head and memory else ())

    @property
    def arms(self) -> tuple[str, ...]:
        """What a robot can be run with: the policy alone, the modes, and replanning by energy."""
        return ("policy", *self.modes, *(() if self.reranker is None else ("replan",)))

    def decide(
        self,
        mode: str,
        frame: Frame,
        generators: Sequence[torch.Generator],
        others: Mapping[str, Source] | None = None,
    ) -> tuple[Proposal, Tensor]:
        """The proposal and, `(B,)` bool, where the gate takes it; see `propose` for the rest."""
        proposal = self.propose(mode, frame, generators, others)
        return proposal, proposal.gain > self.gates[mode]

    def propose(
        self,
        mode: str,
        frame: Frame,
        generators: Sequence[torch.Generator],
        others: Mapping[str, Source] | None = None,
    ) -> Proposal:
        """A mode's alternative, whatever the gate says of it.

        Args:
            mode: one of `modes`.
            frame: B rows.
            generators: B, of each row's noise, so that a row's candidates do not depend on its batch.
            others: more candidates by name, for the reranking modes.

        Raises:
            ValueError: a mode that this checkpoint cannot run, or shapes that do not fit.
        """
        if mode not in self.modes:
            raise ValueError(f"mode {mode!r}: this checkpoint has {', '.join(self.modes) or 'none'}")
        if mode == "retrieve":
            return self._retrieve(frame)
        return self._refine(frame) if mode == "refine" else self._rerank(mode, frame, generators, others or {})

    def _retrieve(self, frame: Frame) -> Proposal:
        assert self.memory is not None
        found = self.memory.nearest(frame.context, frame.context_mask, frame.policy, 1)
        nearest = found.distances[:, 0]
        there = nearest.isfinite()
        actions = torch.where(there[:, None, None], found.chunks[:, 0].to(frame.policy), frame.policy)
        return Proposal(actions, torch.where(there, math.inf, 0.0), nearest)

    def _rerank(
        self, mode: str, frame: Frame, generators: Sequence[torch.Generator], others: Mapping[str, Source]
    ) -> Proposal:
        assert self.reranker is not None
        config = self.reranker.config
        nearest = torch.full((len(frame.policy),), math.nan)
        if mode == BOTH and self.memory is not None and config.retrieval.count:
            count = config.retrieval.count
            found = self.memory.nearest(frame.context, frame.context_mask, frame.policy, count)
            others = {**others, "retrieved": retrieved_source(found.chunks, found.distances, config.retrieval)}
            nearest = found.distances[:, 0]
        candidates = self._candidates(frame, generators, others)
        result = self.reranker(frame.context, frame.context_mask, candidates.actions, candidates.prior, margin=0.0)
        gain = (result.scores[:, 0] - result.scores.amin(1)).nan_to_num(nan=0.0, posinf=math.inf)
        gain = torch.where(result.accepted, gain, torch.zeros_like(gain))
        return Proposal(result.actions, gain, nearest, candidates, result.scores)

    def _candidates(
        self, frame: Frame, generators: Sequence[torch.Generator], others: Mapping[str, Source]
    ) -> CandidateSet:
        assert self.reranker is not None
        return propose(
            frame.policy, frame.layer_actions, self.reranker.config.candidates, generators,
            gripper_dims=self.gripper_dims, scale=self.scale, others=others,
        )  # fmt: skip

    def _refine(self, frame: Frame) -> Proposal:
        assert self.reranker is not None
        head, config = self.reranker.head, self.reranker.config.refine
        with torch.inference_mode(False), scoring(head):
            # Copies: tensors of inference mode cannot be part of a graph.
            policy = frame.policy.detach().float().clone()
            encoded = head.encode(frame.context.detach().clone(), frame.context_mask.clone(), policy)
            result = refine(
                lambda chunks: head(encoded, chunks), policy, radius=config.radius, margin=0.0,
                steps=config.num_steps, step_size=config.step_size, gripper_dims=self.gripper_dims,
            )  # fmt: skip
        own = policy.flatten(1).isfinite().all(1)
        broken = torch.stack([own & ~result.energy_policy.isfinite(), result.unscored], 1)
        check_energies(broken, self.reranker.fallback, "refine")
        gain = torch.where(result.accepted, result.energy_policy - result.energy_lowest, 0.0)
        actions = torch.where(result.accepted[:, None, None], result.actions.to(frame.policy), frame.policy)
        return Proposal(actions, gain, torch.full_like(gain, math.nan))


@dataclass(frozen=True)
class Plan:
    """The chunk under way in one episode, for `replan`.

    Attributes:
        chunk: `(H,A)` normalised.
        interval: how many of its actions are executed before the next look.
    """

    chunk: Tensor
    interval: int


def replan(
    reranker: Reranker, frame: Frame, plans: Sequence[Plan | None], executed: Sequence[int]
) -> tuple[list[Plan], Tensor]:
    """Goes on with the chunk under way where its rest is still low in energy, else takes the policy's new one.

    The rest is filled up with the end of the new chunk; it is kept where its energy is at most `config.replan.margin`
    above the new chunk's. Each time it is kept the next look comes after twice as many steps, up to `longest`, so that
    the policy is asked less often where it does not change its mind; where it does, after `shortest`.

    Args:
        reranker: its head and `config.replan` are used.
        frame: B rows. One action of a chunk is always left to compare.
        plans: of each row, None at an episode's start.
        executed: of each row, actions of the plan's chunk that were executed.

    Returns:
        A plan a row, and `(B,)` by how much the rest's energy is above the new chunk's, 0 at an episode's start, NaN
        where one of the two is not finite: then the new chunk is taken.

    Raises:
        EnergyError: where the reranker is strict, an energy of a finite chunk is not finite.
    """
    config, head = reranker.config.replan, reranker.head
    rest = overlap(frame.policy, [plan and plan.chunk for plan in plans], executed)
    with scoring(head):
        encoded = head.encode(frame.context, frame.context_mask, frame.policy)
        chunks = torch.stack([frame.policy, rest], 1)
        energies = head(encoded, chunks).float()
    finite, known = chunks.flatten(2).isfinite().all(2), energies.isfinite()
    check_energies(finite & ~known, reranker.fallback, "replan")
    # A rest at -inf would fall without end, and be kept.
    rise = (energies[:, 1] - energies[:, 0]).masked_fill(~(finite & known).all(1), math.nan)
    new = []
    for plan, old, fresh, above in zip(plans, rest, frame.policy, rise.tolist(), strict=True):
        if plan is not None and above <= config.margin:
            new.append(Plan(old, min(2 * plan.interval, config.longest, max(1, len(old) - 1))))
        else:
            new.append(Plan(fresh, min(config.shortest, len(fresh))))
    return new, rise
