"""Episodes under way: one decision for all of them, then its execution in their simulators."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vla_energy.actions import RawActions
from vla_energy.arms import split_arm
from vla_energy.rollout.footage import Footage
from vla_energy.rollout.interface import Decision, Policy, Request
from vla_energy.rollout.record import Recorder
from vla_energy.rollout.simulator import SimulatorProcess
from vla_energy.rollout.spool import Trace
from vla_energy.rollout.world import Observation

if TYPE_CHECKING:
    from vla_energy.rollout.run import Settings


@dataclass
class Episode:
    """An episode under way in one simulator."""

    simulator: SimulatorProcess
    arm: str
    seed: int
    observation: Observation | None = None
    steps: int = 0
    success: bool = False
    decisions: list[Decision] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    executed: int = 0
    trace: Trace = field(default_factory=Trace)
    instruction: str = ""

    def record(self) -> dict[str, Any]:
        """What the results keep of it, see `summary`."""
        keys = sorted({key for decision in self.decisions for key in decision.telemetry})
        values = {key: [float(d.telemetry[key]) for d in self.decisions if key in d.telemetry] for key in keys}
        return {
            "task": self.simulator.task,
            "instruction": self.instruction,
            "seed": self.seed,
            "arm": self.arm,
            "success": self.success,
            "steps": self.steps,
            "decisions": len(self.decisions),
            "accepted_share": float(np.mean([decision.accepted for decision in self.decisions])),
            "milliseconds": self.milliseconds,
            "rows": self.rows,
            "telemetry": {key: float(np.mean(value)) for key, value in values.items()},
        }


def decide_and_execute(
    policy: Policy,
    running: list[Episode],
    settings: Settings,
    recorder: Recorder | None,
    footage: Footage | None = None,
) -> None:
    """One decision and its execution for every episode; the observation of a finished one becomes None.

    Raises:
        ValueError: the policy's answer has the wrong length, type or shape, or is not finite.
        SimulatorError: a simulator failed, died or hung.
    """
    for episode in running:
        if episode.observation is not None:
            episode.instruction = episode.observation.instruction
    for arm in settings.arms:
        if batch := [episode for episode in running if episode.arm == arm]:
            _decide(policy, arm, batch, footage)
    for episode in running:
        limit = settings.step_limits[episode.simulator.task]
        decision = episode.decisions[-1]
        count = min(decision.execute or settings.interval(episode.arm), limit - episode.steps)
        observe = episode.steps + count < limit
        episode.simulator.request_execute(decision.actions.values[:count], observe, recorder is not None)
    for episode in running:
        execution = episode.simulator.answer()
        episode.observation, episode.success = execution.observation, execution.done
        episode.steps += execution.steps
        episode.executed = execution.steps
        if recorder is not None:
            recorder.extend(episode.trace, execution.frames, episode.decisions[-1].actions.values)


def _decide(policy: Policy, arm: str, batch: list[Episode], footage: Footage | None) -> None:
    """One batched call of the policy; appends a decision to each episode.

    Raises:
        ValueError: the policy's answer has the wrong length, type or shape, or is not finite.
    """
    requests = [
        Request(
            episode.observation,
            _generator(episode.simulator.task, episode.seed, episode.steps),
            episode.decisions[-1] if episode.decisions else None,
            episode.executed,
        )
        for episode in batch
        if episode.observation is not None
    ]
    start = time.perf_counter()
    decisions = policy.act(requests, split_arm(arm)[0])
    milliseconds = 1e3 * (time.perf_counter() - start)
    if len(decisions) != len(batch):
        raise ValueError(f"arm {arm}: the policy gave {len(decisions)} decisions for {len(batch)} observations")
    shape = (policy.horizon, policy.action_dim)
    for episode, decision in zip(batch, decisions, strict=True):
        where = f"arm {arm}, task {episode.simulator.task}, seed {episode.seed}, step {episode.steps}"
        if not isinstance(decision.actions, RawActions) or decision.actions.values.shape != shape:
            raise ValueError(f"{where}: the policy must answer with RawActions of shape {shape}")
        if not np.isfinite(decision.actions.values).all():
            raise ValueError(f"{where}: the policy's actions are not finite")
        if decision.execute is not None and not 1 <= decision.execute <= policy.horizon:
            raise ValueError(f"{where}: asks to execute {decision.execute} of {policy.horizon} actions")
        episode.decisions.append(decision)
        episode.milliseconds.append(milliseconds / len(batch))
        episode.rows.append(len(batch))
    if footage is not None:
        for episode, request in zip(batch, requests, strict=True):
            footage.add(policy, episode, request)


def _generator(task: str, seed: int, step: int) -> torch.Generator:
    digest = hashlib.sha256(f"{task}/{seed}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
