"""The monitors of a run: means over the last steps, descent alignment, and warnings in words."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from vla_energy.config import MonitorConfig
from vla_energy.guard import GuardedOptimizer
from vla_energy.health import HealthWatch
from vla_energy.objective import EnergyObjective

logger = logging.getLogger(__name__)

_SKIPS = ("nonfinite", "too_large", "no_gradient")


class Monitor:
    """Judges the head's training every `config.every` optimiser steps.

    Means over the steps between are judged, as a single batch's win rate says little.
    """

    def __init__(self, config: MonitorConfig, objective: EnergyObjective, guard: GuardedOptimizer) -> None:
        self.config, self.objective, self.guard = config, objective, guard
        self.watch = HealthWatch(config)
        self._sums: dict[str, Tensor | float] = {}
        self._count = 0

    def add(self, metrics: dict[str, Tensor | float]) -> None:
        """The metrics of one step."""
        for name, value in metrics.items():
            if name.startswith("energy/"):
                self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1

    def judge(self, step: int, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> dict[str, float]:
        """Every `config.every` steps: logs what is wrong and returns what was measured for it; else nothing.

        Args:
            step: optimiser steps taken.
            batch: `context, context_mask, expert, layer_actions` of the last one.
        """
        if step % self.config.every:
            return {}
        skips = {name: float(self.guard.counters[name]) for name in _SKIPS}
        measured = {
            "energy/alignment": float(self.objective.alignment(*batch)),
            "energy/skips": sum(skips.values()),
            **{f"energy/skips/{name}": value for name, value in skips.items()},
        }
        means = {name: float(total) / max(self._count, 1) for name, total in self._sums.items()}
        for warning in self.watch.update(step, {**means, **measured}):
            logger.warning("step %d: %s", step, warning)
        self._sums, self._count = {}, 0
        return measured

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; a resumed run warns as an uninterrupted one."""
        sums = {name: float(total) for name, total in self._sums.items()}
        return {"watch": self.watch.state_dict(), "sums": sums, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self.watch.load_state_dict(state["watch"])
        self._sums, self._count = dict(state["sums"]), state["count"]
