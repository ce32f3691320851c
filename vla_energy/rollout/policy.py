"""A checkpoint folder as a policy for rollouts: the native backbone, with its energy head and memory if it has them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_energy.actions import DatasetStatistics, select_statistics
from vla_energy.advisor import load_advisor
from vla_energy.arms import split_arm
from vla_energy.backbones import load_openvla
from vla_energy.backbones.config import OpenVLAConfig
from vla_energy.backbones.diffusion import starting_noise
from vla_energy.backbones.tokens import sample_chunks
from vla_energy.candidates import Source, overlap
from vla_energy.config import EnergyConfig
from vla_energy.crops import crop_chunks
from vla_energy.data.augment import center_crop
from vla_energy.fallback import Fallback
from vla_energy.fingerprint import fingerprint
from vla_energy.modes import Frame, replan
from vla_energy.rerank import scoring
from vla_energy.rollout.interface import Decision, Request, check_arms


class CheckpointPolicy:
    """Acts from raw observations; see `rollout.interface.Policy`.

    Args:
        folder: an OpenVLA-OFT checkpoint folder, with or without energy head and chunk memory.
        device: where to run.
        dataset: whose statistics to use, where the folder has several.
        strict: whether an exception in candidates, head, memory or gate is raised. Else the policy's own chunk is
            taken, bit for bit, for all rows of the call; it is logged, and counted in `fallback.counts` and, by
            decision, in the telemetry `fallback`.

    Attributes:
        fallback: what failed so far.

    Raises:
        CheckpointFolderError, CheckpointError, CompatibilityError, StatisticsError: the folder is not usable.
    """

    def __init__(
        self, folder: str | Path, device: str = "cpu", dataset: str | None = None, strict: bool = False
    ) -> None:
        folder = Path(folder)
        self.fallback = Fallback(strict)
        config = OpenVLAConfig.from_folder(folder)
        use_proprio = any(folder.glob("proprio_projector--*_checkpoint.pt"))
        self._vla = load_openvla(folder, num_images=config.num_images, use_proprio=use_proprio).to(device)
        self._device = torch.device(device)
        self._crop = config.center_crop
        self._num_images = config.num_images
        self._statistics: DatasetStatistics = select_statistics(self._vla.statistics, dataset)
        self._folder, self._fingerprint = folder, fingerprint(folder)
        self._advisor = load_advisor(
            folder, self._statistics, self.horizon, self.action_dim, self._vla.context_dim, self._device
        )
        drawn_from = self._vla.diffuses or self._vla.discrete
        if (count := self._head_config().candidates.samples) and not drawn_from:
            raise ValueError(
                f"{folder}: candidates.samples={count} of its energy head, but the action head is an L1 head, "
                "which has one chunk: train the energy head with this policy"
            )

    @property
    def horizon(self) -> int:
        """H."""
        return self._vla.horizon

    @property
    def action_dim(self) -> int:
        """A."""
        return self._vla.action_dim

    @property
    def arms(self) -> frozenset[str]:
        """`policy`, and what head and memory allow; see `interface.ARMS`."""
        judged = ("recommended",) if self._advisor.tasks else ()
        return frozenset({*self._advisor.arms, *judged})

    @property
    def metadata(self) -> dict[str, Any]:
        """The folder's name and fingerprint, the gates' margins, and the size of the memory."""
        memory = self._advisor.memory
        return {
            "checkpoint": self._folder.name,
            "fingerprint": self._fingerprint,
            "gates": {mode: self._advisor.gates[mode] for mode in self._advisor.modes},
            "memory": None if memory is None else {"frames": len(memory), "bytes": memory.nbytes},
            "recommended": self._advisor.tasks,
            "center_crop": self._crop,
        }

    @torch.no_grad()
    def act(self, requests: Sequence[Request], arm: str) -> list[Decision]:
        """One forward pass for all rows; the arm then decides on each row's chunk, see `strict`.

        Raises:
            ValueError: an arm that this checkpoint cannot run, or too few cameras.
        """
        check_arms([arm], self.arms)
        if arm == "recommended":
            return self._recommended(requests)
        if arm == "policy":
            return self._decide(requests, arm)
        # A decision that failed has drawn from the generators: the policy's own starts where that one did.
        drawn = [request.generator.get_state() for request in requests]

        def own() -> list[Decision]:
            for request, state in zip(requests, drawn, strict=True):
                request.generator.set_state(state)
            decisions = self._decide(requests, "policy")
            return [replace(decision, telemetry={"fallback": 1.0}) for decision in decisions]

        def attempt() -> list[Decision]:
            decisions = self._decide(requests, arm)
            if not all(np.isfinite(decision.actions.values).all() for decision in decisions):
                raise ValueError("a chunk that it chose is not finite")
            return [replace(decision, telemetry={**decision.telemetry, "fallback": 0.0}) for decision in decisions]

        return self.fallback(attempt, own, f"arm {arm}")

    @torch.no_grad()
    def energies(self, request: Request, decision: Decision) -> tuple[float, float] | None:
        """Energy of the chunk that `decision` gives for `request`, and of the policy's own; lower is better.

        A pass of its own, for pictures; the request's generator is left alone.

        Returns:
            None without an energy head, and of a diffusion policy, whose own chunk is a sample that is gone.
        """
        if self._advisor.reranker is None or self._vla.diffuses:
            return None
        output = self._vla.predict(self._batch([request]), "off", None)
        own = output.actions.float()
        # What the policy itself decides carries no memo; a plan carries its chunk.
        memo = decision.memo
        chosen = memo if memo is None or isinstance(memo, Tensor) else memo.chunk
        executed = own[0] if chosen is None else chosen.to(own)
        head = self._advisor.reranker.head
        with scoring(head):
            encoded = head.encode(output.context.float(), output.context_mask, own)
            energies = head(encoded, torch.stack([executed, own[0]])[None])[0].tolist()
        return energies[0], energies[1]

    def _decide(self, requests: Sequence[Request], arm: str) -> list[Decision]:
        reads_layers = arm.startswith("rerank") and self._head_config().candidates.layer_exits
        noise, generators = None, [request.generator for request in requests]
        if self._vla.diffuses:
            count = self._head_config().candidates.samples if arm.startswith("rerank") else 0
            noise, generators = starting_noise(generators, count, self.horizon, self.action_dim)
        output = self._vla.predict(self._batch(requests), "raw" if reads_layers else "off", noise)
        if arm == "policy":
            return [Decision(self._statistics.unnormalize(chunk)) for chunk in output.actions]
        frame = Frame(output.context, output.context_mask, output.actions, output.layer_actions)
        if arm == "replan":
            return self._replan(frame, requests)
        others = self._others(arm, frame, requests, generators)
        others |= {} if output.samples is None else {"sample": Source(output.samples)}
        candidates = self._head_config().candidates
        if output.token_logits is not None and arm.startswith("rerank") and candidates.samples:
            drawn = (candidates.samples, candidates.sample_temperature, generators)
            others["sample"] = Source(sample_chunks(output.token_logits, *drawn, self.action_dim, self._vla.config))
        proposal, accepted = self._advisor.decide(arm, frame, generators, others)
        chunks = torch.where(accepted[:, None, None], proposal.actions, output.actions)
        numbers = {"energy_gain": proposal.gain, "key_distance": proposal.nearest}
        return [
            Decision(self._statistics.unnormalize(chunk), bool(taken), _finite(numbers, row), memo=chunk)
            for row, (chunk, taken) in enumerate(zip(chunks, accepted, strict=True))
        ]

    def _recommended(self, requests: Sequence[Request]) -> list[Decision]:
        """Each row by what is recommended for its instruction; one forward pass for each arm among them."""
        arms = [self._advisor.tasks.get(request.observation.instruction, "policy") for request in requests]
        decisions: dict[int, Decision] = {}
        for arm in dict.fromkeys(arms):
            name, every = split_arm(arm)
            rows = [row for row, other in enumerate(arms) if other == arm]
            for row, decision in zip(rows, self.act([requests[row] for row in rows], name), strict=True):
                decisions[row] = replace(decision, execute=decision.execute or every)
        return [decisions[row] for row in range(len(requests))]

    def _others(
        self, arm: str, frame: Frame, requests: Sequence[Request], generators: Sequence[torch.Generator]
    ) -> dict[str, Source]:
        """Candidates that need the episode's past or its images; crops draw from a row's generator before its noise."""
        config, others = self._head_config().candidates, {}
        if not arm.startswith("rerank"):
            return others
        if config.overlap:
            under_way = [None if request.previous is None else request.previous.memo for request in requests]
            rest = overlap(frame.policy, under_way, [request.executed for request in requests])
            others["overlap"] = Source(rest[:, None])
        if config.crops:
            chunks = crop_chunks(
                self._vla, self._images(requests), _instructions(requests), self._proprio(requests), generators, config
            )
            others["crop"] = Source(chunks)
        return others

    def _replan(self, frame: Frame, requests: Sequence[Request]) -> list[Decision]:
        assert self._advisor.reranker is not None
        plans = [None if request.previous is None else request.previous.memo for request in requests]
        new, rise = replan(self._advisor.reranker, frame, plans, [request.executed for request in requests])
        return [
            Decision(
                self._statistics.unnormalize(plan.chunk),
                not torch.equal(plan.chunk, fresh),
                {"energy_rise": above, "interval": float(plan.interval)},
                plan.interval,
                plan,
            )
            for plan, fresh, above in zip(new, frame.policy, rise.tolist(), strict=True)
        ]

    def _head_config(self) -> EnergyConfig:
        return EnergyConfig() if self._advisor.reranker is None else self._advisor.reranker.config

    def _batch(self, requests: Sequence[Request]) -> dict[str, Tensor]:
        images = self._images(requests)
        images = center_crop(images) if self._crop else images
        batch = self._vla.processor.batch(images, _instructions(requests), proprio=self._proprio(requests))
        return {key: value.to(self._device) for key, value in batch.items()}

    def _images(self, requests: Sequence[Request]) -> np.ndarray:
        """`(B, cameras, h, w, 3)`, of the cameras that the policy looks through."""
        images = [request.observation.images for request in requests]
        if images[0].shape[0] < self._num_images:
            raise ValueError(
                f"{self._folder} looks through {self._num_images} cameras, the simulator has {images[0].shape[0]}"
            )
        return np.stack([row[: self._num_images] for row in images])  # a simulator's first camera is the main one

    def _proprio(self, requests: Sequence[Request]) -> Tensor | None:
        """`(B,P)` normalised, None where the policy has no use for it."""
        if self._vla.proprio_projector is None:
            return None
        statistics = self._statistics.proprio
        if statistics is None:
            raise ValueError(f"{self._folder} has a proprio projector but no proprio statistics")
        return statistics.normalize(torch.tensor(np.stack([request.observation.proprio for request in requests])))


def _instructions(requests: Sequence[Request]) -> list[str]:
    return [request.observation.instruction for request in requests]


def _finite(numbers: dict[str, Tensor], row: int) -> dict[str, float]:
    values = {name: float(column[row]) for name, column in numbers.items()}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def load_policy(checkpoint: str, device: str = "cpu", strict: bool = False) -> CheckpointPolicy:
    """The policy in a checkpoint folder, see `CheckpointPolicy`."""
    return CheckpointPolicy(checkpoint, device, strict=strict)
