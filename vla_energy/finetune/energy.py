"""The head's part of a training, shared by the loop that runs the policy and the one that reads a feature cache."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vla_energy.actions import DatasetStatistics
from vla_energy.distributed import ALONE, Ranks
from vla_energy.finetune.config import FinetuneConfig, FlagError
from vla_energy.finetune.monitor import Monitor
from vla_energy.guard import GuardedOptimizer
from vla_energy.head import EnergyHead
from vla_energy.memory import PREFIX, ChunkMemory, check_memory
from vla_energy.objective import EnergyObjective
from vla_energy.outcomes import RolloutFrames
from vla_energy.sources import ActionTraits, check_sources

logger = logging.getLogger(__name__)

Metrics = dict[str, Tensor | float]
Seen = tuple[Tensor, Tensor, Tensor, Tensor]
"""`context (B,S,D)`, `context_mask (B,S)`, `expert (B,H,A)`, `layer_actions (B,L,H,A)` fp32, without gradient."""


class PolicyShape(Protocol):
    """What of a policy the head's training needs to know; a feature cache knows it too."""

    @property
    def horizon(self) -> int:
        """H."""
        ...

    @property
    def action_dim(self) -> int:
        """A."""
        ...

    @property
    def context_dim(self) -> int:
        """D."""
        ...

    @property
    def num_exits(self) -> int:
        """L, chunks a frame has of the layers."""
        ...


class HeadTraining:
    """Objective, guarded optimiser and monitor of one head.

    Args:
        head: on its device.
        config: of the run.
        traits: of the action space, from `check_head_sources`.
        generator: of the negatives; its state is the caller's to keep.
        ranks: the processes that train it together.
    """

    def __init__(
        self,
        head: EnergyHead,
        config: FinetuneConfig,
        traits: ActionTraits,
        generator: torch.Generator,
        ranks: Ranks = ALONE,
    ) -> None:
        energy = config.energy
        self.head, self.generator, self.ranks = head, generator, ranks
        self.objective = EnergyObjective(head, energy, traits, ranks)
        rate = config.energy_learning_rate * energy.guard.lr_factor
        groups = head.parameter_groups()
        self.guard = GuardedOptimizer.adamw(groups, rate, energy.guard, config.energy_warm_steps, ranks)
        self.monitor = Monitor(energy.monitor, self.objective, self.guard)
        self._accumulate = config.grad_accumulation_steps

    def backward(
        self,
        seen: Seen,
        step: int,
        metrics: Metrics,
        retrieved: Tensor | None = None,
        rollouts: RolloutFrames | None = None,
        samples: Tensor | None = None,
    ) -> None:
        """Forward and backward of one micro-batch; `step` are optimiser steps taken. Adds to `metrics`."""
        loss, found = self.objective(*seen, self.generator, step, retrieved, rollouts, samples)
        (loss / self._accumulate).backward()
        metrics.update(found)

    def step(self, step: int, seen: Seen | None, metrics: Metrics) -> None:
        """The optimiser step that follows `step` others, and what the monitor says of it. Adds to `metrics`."""
        self.ranks.average_gradients(self.head.parameters())
        metrics.update(self.guard.step().metrics())
        if seen is not None:
            self.monitor.add(metrics)
            metrics.update(self.monitor.judge(step + 1, seen))


def check_head_sources(
    config: FinetuneConfig, policy: PolicyShape, statistics: DatasetStatistics, ranks: Ranks = ALONE
) -> ActionTraits:
    """Says what the sources of negatives cannot do with this batch size, policy and data."""
    traits = ActionTraits.of(statistics)
    shape = (ranks.world * config.batch_size, policy.num_exits, policy.horizon, policy.action_dim)
    loss = config.energy.loss
    asked = loss.margin_sources if loss.margin else ()
    for warning in check_sources(config.energy.negatives, *shape, traits, asked):
        logger.warning("%s", warning)
    return traits


def load_memory(config: FinetuneConfig, folder: Path, policy: PolicyShape) -> ChunkMemory | None:
    """The memory beside the policy's checkpoint, where that policy stays as it is; checkpoints take it along.

    Raises:
        FlagError: retrieved negatives are asked for, and there is no memory, or the policy is trained.
    """
    wanted = config.energy.enabled and config.energy.negatives.retrieved.count > 0
    if wanted and not config.energy.freeze_backbone:
        raise FlagError(
            "--energy.negatives.retrieved.count needs --energy.freeze_backbone True: a memory holds what the "
            "finished policy makes of the training set; fine-tune first, then vla-energy memory, then the head"
        )
    there = any(folder.glob(f"{PREFIX}*"))
    if wanted and not there:
        raise FlagError(f"--energy.negatives.retrieved.count: {folder} has no memory: run vla-energy memory first")
    if not config.energy.freeze_backbone or not there:
        return None
    memory = ChunkMemory.load(folder)
    check_memory(memory, policy.horizon, policy.action_dim, policy.context_dim)
    return memory


def retrieve(
    memory: ChunkMemory | None,
    config: FinetuneConfig,
    context: Tensor,
    context_mask: Tensor,
    policy: Tensor,
    episodes: np.ndarray,
) -> Tensor | None:
    """`(B,K,H,A)` chunks of the nearest frames of other episodes, where the objective wants them."""
    count = config.energy.negatives.retrieved.count
    if memory is None or not count:
        return None
    return memory.nearest(context, context_mask, policy, count, torch.tensor(episodes)).chunks


def l1_metrics(policy: Tensor, expert: Tensor) -> Metrics:
    """Error of the policy's chunks `(B,H,A)`: of all steps, of the first, and of the others."""
    errors = (policy.float() - expert).abs().detach()
    rest = errors[:, 1:].mean() if errors.shape[1] > 1 else errors.mean()
    return {"train/l1": errors.mean(), "train/l1_current": errors[:, 0].mean(), "train/l1_next": rest}
