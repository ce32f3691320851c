"""Tiny recorded rollouts without a simulator: Meta-World's fields, random pictures, tasks of the bundled data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vla_energy.data.metaworld_env import instruction
from vla_energy.finetune.setup import EMBEDDED_DATA
from vla_energy.rollout.record import Recorder
from vla_energy.rollout.spool import Trace
from vla_energy.rollout.world import Observation

NAME = "metaworld_test_rollouts"
TASKS = ("button-press-topdown", "door-close", "drawer-open", "handle-press-side", "plate-slide-side", "window-close")
OUTCOMES = (True, False, False)


def write_rollouts(root: Path, *, outcomes: Sequence[bool] = OUTCOMES, action_dim: int = 4, name: str = NAME) -> Path:
    """Makes `root` a data root with the bundled demonstrations and `name`: for each task an episode an outcome.

    A solved episode has 12 steps, a failed one 20.
    """
    root.mkdir(parents=True, exist_ok=True)
    demonstrations = root / "metaworld_demo"
    if not demonstrations.exists():
        demonstrations.symlink_to(EMBEDDED_DATA / "metaworld_demo", target_is_directory=True)
    rng = np.random.default_rng(0)
    backend = "metaworld"
    with Recorder(root, name, backend, "synthetic") as recorder:
        for task in TASKS:
            for seed, solved in enumerate(outcomes):
                trace, steps = Trace(), 12 if solved else 20
                frames = [
                    Observation(rng.integers(0, 256, (1, 96, 96, 3), np.uint8), rng.normal(size=4), instruction(task))
                    for _ in range(steps)
                ]
                recorder.extend(trace, frames, rng.uniform(-1, 1, (steps, action_dim)))
                recorder.add(trace, task, seed, "policy", solved)
            recorder.finish_task()
    return root
