"""Meta-World whose observations also carry what the scripted expert would do next: a backend for `oracle.py` alone.

The expert is asked by simulating ahead and taking the simulation back, bit for bit: an arm that does not look at its
answer runs the same episodes as on the ordinary backend.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from vla_energy.data.metaworld_env import ACTION_DIM, MAX_STEPS, MetaWorld, instruction, task_names

__all__ = ["ACTION_DIM", "AHEAD", "MAX_STEPS", "OracleMetaWorld", "instruction", "task_names"]

AHEAD = 4
"""Actions of the expert that an observation carries."""
_PLAIN = (int, float, bool, np.ndarray, np.generic, type(None), tuple, list)


class OracleMetaWorld(MetaWorld):
    """`extras()["expert"]` is `(AHEAD * A,)`: the expert's next actions from here, each after the ones before it."""

    def extras(self) -> dict[str, np.ndarray]:
        """The expert's answer; `(AHEAD * A,)` in the robot's units."""
        environment: Any = self._env
        data, vector, expert = environment.data, self._vector, copy.deepcopy(vars(self._expert))
        plain = {name: copy.deepcopy(value) for name, value in vars(environment).items() if isinstance(value, _PLAIN)}
        environment.data = copy.copy(data)  # the original is not touched: what is drawn is derived from it
        actions = []
        for _ in range(AHEAD):
            actions.append(self.expert_action())
            self.step(actions[-1])
        vars(environment).update(plain)
        vars(self._expert).update(expert)
        environment.data, self._vector = data, vector
        return {"expert": np.concatenate(actions)}
