"""The policy's optimiser step: its learning rate, clipping, and no step where the gradient is not finite."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vla_energy.distributed import Ranks
from vla_energy.finetune.config import FinetuneConfig
from vla_energy.finetune.sharding import is_shard, sharded_norm
from vla_energy.finetune.signals import DivergedError

logger = logging.getLogger(__name__)

IN_A_ROW = 20
"""Steps left out one after the other, after which the policy counts as lost: what is computed with it stays NaN."""


class PolicyStep:
    """Steps of the policy's optimiser.

    Args:
        optimizer: of `parameters`.
        parameters: that are trained; some may be shards.
        config: learning rate, schedule, `max_grad_norm`.
        ranks: all of them take the same steps: a gradient is finite on all or on none, once it is averaged.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], config: FinetuneConfig, ranks: Ranks
    ) -> None:
        self.optimizer, self.parameters, self.config, self.ranks = optimizer, parameters, config, ranks
        self._left_out = 0  # in a row

    def take(self, step: int) -> dict[str, Tensor | float]:
        """Averages the gradients over the ranks, takes the step and zeroes them.

        One gradient that is not finite would make every weight NaN for good, and the next checkpoints with them: such a
        step is left out and told, as the head's guard does it (report, item 6).

        Args:
            step: that is taken, from 0.

        Returns:
            `train/grad_norm`, before it is clipped, and `train/skipped`, 1 where the step was left out.

        Raises:
            DivergedError: `IN_A_ROW` steps were left out one after the other.
        """
        config, optimizer = self.config, self.optimizer
        self.ranks.average_gradients(p for p in self.parameters if not is_shard(p))  # FSDP averages those of shards
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rate_factor(config, step)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = sharded_norm(gradients, self.ranks) if config.fsdp else nn.utils.get_total_norm(gradients)
        if finite := bool(norm.isfinite()):
            if config.max_grad_norm:
                scale(gradients, (config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self._count(finite, norm, step)
        return {"train/grad_norm": norm, "train/skipped": float(not finite)}

    def _count(self, finite: bool, norm: Tensor, step: int) -> None:
        self._left_out = 0 if finite else self._left_out + 1
        if self._left_out == 1:
            logger.warning("step %d of the policy is left out: the norm of its gradient is %s", step + 1, float(norm))
        if self._left_out >= IN_A_ROW:
            raise DivergedError(
                f"the policy's gradient has not been finite for {IN_A_ROW} steps in a row (up to step {step + 1}): its "
                "data hold NaN, or it has diverged. The last checkpoint is whole; a lower --learning_rate or "
                "--max_grad_norm 1.0 may keep it from diverging (docs/troubleshooting.md)"
            )


def scale(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Multiplies gradients, of which some may be shards, in place by `factor ()`."""
    for gradient in gradients:
        part = gradient.to_local() if is_shard(gradient) else gradient  # pyright: ignore[reportAttributeAccessIssue]
        part.mul_(factor)


def rate_factor(config: FinetuneConfig, step: int) -> float:
    """Factor of the policy's learning rate at a step: warm-up from a tenth, then the host's schedule or a cosine."""
    warm = min(1.0, (step + 1) / config.lr_warmup_steps) if config.lr_warmup_steps else 1.0
    if config.lr_schedule == "cosine":
        decay = 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, step / config.max_steps)))
    else:
        decay = 0.1 if step >= config.num_steps_before_decay else 1.0
    return (0.1 + 0.9 * warm) * decay
