"""The optimiser step of the energy head: measure the gradient, then skip, clip or step; one decision on all ranks.

Clipping by a norm that is not finite writes NaN into every gradient, so the norm is tested before anything is scaled. A
rank that skips while another steps would leave them with different weights, so every rank takes the worst verdict.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vla_energy.config import GuardConfig
from vla_energy.distributed import Ranks, current

logger = logging.getLogger(__name__)

# Ordered by severity: the ranks' joint verdict is the maximum.
_VERDICTS = ("step", "no_gradient", "too_large", "nonfinite")
_NONE, _TOO_LARGE, _NONFINITE = 1, 2, 3
_ALARM_EVERY = 100  # steps skipped in a row


@dataclass(frozen=True)
class GuardReport:
    """What one call of `GuardedOptimizer.step` did.

    Attributes:
        grad_norm: total norm before clipping, of this rank; may be inf or NaN.
        skipped: None, or why: `nonfinite`, `too_large` or `no_gradient` (on any rank).
        clipped: whether the gradient was scaled down to `max_grad_norm`.
        learning_rate: of the first param group, in force at this step.
    """

    grad_norm: float
    skipped: str | None
    clipped: bool
    learning_rate: float

    def metrics(self) -> dict[str, float]:
        """For the log."""
        return {
            "energy/grad_norm": self.grad_norm,
            "energy/skipped": float(self.skipped is not None),
            "energy/clipped": float(self.clipped),
            "energy/learning_rate": self.learning_rate,
        }


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Euclidean norm over all gradients, fp32 scalar; 0 if there are none. One that overflows fp32 is inf."""
    norms = [torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32) for gradient in gradients]
    if not norms:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


class GuardedOptimizer:
    """An optimiser that never takes a step it could not undo.

    It owns its param groups: their learning rate is the one they came with, times the warm-up. `zero_grad` is done by
    `step`, after a skip too.

    Args:
        optimizer: over the head's parameters alone.
        config: norms at which to clip and to skip.
        warm_steps: the learning rate of the k-th step taken is `min(1, k / warm_steps)` of the full one; skipped
            steps do not count. 0 is off.
        ranks: who joins in the verdict; None is `distributed.current()` at each step.

    Attributes:
        counters: `steps` taken, `clipped` among them, and calls skipped as `nonfinite`, `too_large`, `no_gradient`.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, config: GuardConfig, warm_steps: int = 0, ranks: Ranks | None = None
    ) -> None:
        if warm_steps < 0:
            raise ValueError(f"warm_steps={warm_steps}: expected 0 or more")
        self.optimizer = optimizer
        self.config = config
        self.warm_steps = warm_steps
        self.counters = {name: 0 for name in ("steps", "clipped", *_VERDICTS[1:])}
        self._ranks = ranks
        self._base_rates = [float(param_group["lr"]) for param_group in optimizer.param_groups]
        self._skips_in_a_row = 0
        self._set_learning_rate()

    @classmethod
    def adamw(
        cls,
        parameters: Iterable[Any],
        learning_rate: float,
        config: GuardConfig,
        warm_steps: int = 0,
        ranks: Ranks | None = None,
    ) -> GuardedOptimizer:
        """AdamW with the config's weight decay."""
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=config.weight_decay)
        return cls(optimizer, config, warm_steps, ranks)

    def zero_grad(self) -> None:
        """Drops all gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> GuardReport:
        """Skips, or clips and steps; gradients are gone afterwards. Every rank must call it."""
        gradients = [parameter.grad for parameter in self._parameters() if parameter.grad is not None]
        norm = float(total_norm(gradients))
        verdict = _VERDICTS[self._joint(self._severity(norm, bool(gradients)))]
        clipped = verdict == "step" and norm > self.config.max_grad_norm
        self._set_learning_rate()
        rate = float(self.optimizer.param_groups[0]["lr"])
        if verdict == "step":
            if clipped:
                for gradient in gradients:
                    gradient.mul_(self.config.max_grad_norm / norm)
            self.optimizer.step()
            self.counters["steps"] += 1
            self.counters["clipped"] += clipped
            self._skips_in_a_row = 0
        else:
            self._count_skip(verdict, norm)
        self.zero_grad()
        return GuardReport(norm, None if verdict == "step" else verdict, clipped, rate)

    def state_dict(self) -> dict[str, Any]:
        """Optimiser state, counters (the warm-up's position is `steps`) and full learning rates."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "counters": dict(self.counters),
            "base_rates": list(self._base_rates),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken; the saved learning rates win over the constructor's.

        Raises:
            ValueError: keys or counters are missing, or the param groups differ.
        """
        if set(state) != {"optimizer", "counters", "base_rates"} or set(state["counters"]) != set(self.counters):
            raise ValueError(f"not the state of a guarded optimiser: keys {sorted(state)}")
        if len(state["base_rates"]) != len(self._base_rates):
            raise ValueError(f"{len(state['base_rates'])} param groups saved, {len(self._base_rates)} here")
        self.optimizer.load_state_dict(state["optimizer"])
        self.counters = dict(state["counters"])
        self._base_rates = list(state["base_rates"])
        self._skips_in_a_row = 0
        self._set_learning_rate()

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _severity(self, norm: float, has_gradients: bool) -> int:
        if not has_gradients:
            return _NONE
        if not norm < float("inf"):  # NaN fails this comparison too
            return _NONFINITE
        return _TOO_LARGE if norm > self.config.skip_grad_norm else 0

    def _joint(self, severity: int) -> int:
        """The worst severity of all ranks."""
        ranks = current() if self._ranks is None else self._ranks
        return int(ranks.largest(torch.tensor(severity, device=self._parameters()[0].device)))

    def _set_learning_rate(self) -> None:
        """Of the next step to be taken."""
        share = min(1.0, (self.counters["steps"] + 1) / self.warm_steps) if self.warm_steps else 1.0
        for param_group, rate in zip(self.optimizer.param_groups, self._base_rates, strict=True):
            param_group["lr"] = rate * share

    def _count_skip(self, verdict: str, norm: float) -> None:
        self.counters[verdict] += 1
        self._skips_in_a_row += 1
        if self.counters[verdict] == 1 or self._skips_in_a_row % _ALARM_EVERY == 0:
            message = "energy step skipped (%s, gradient norm %.3g here, %d in a row); all skips: %s"
            skips = {name: self.counters[name] for name in _VERDICTS[1:]}
            logger.warning(message, verdict, norm, self._skips_in_a_row, skips)
