"""A simulator backend without a simulator: walk to a goal on a line. Also one that fails on request."""

from __future__ import annotations

import os
import sys
import time

import numpy as np

ACTION_DIM = 1


def task_names() -> list[str]:
    return ["near", "far", "raises", "dies", "hangs", "no-world"]


def instruction(task: str) -> str:
    return f"go {task}"


class PointWorld:
    """Position starts at 0; the goal is 1 to 2 (`near`) or 3 to 4 (`far`) away, by seed. Solved within 0.1."""

    def __init__(self, task: str) -> None:
        if task == "no-world":
            raise RuntimeError("no such world")
        self._task = task

    def reset(self, seed: int) -> None:
        # "torch" would mean that the parent's world leaks into this process.
        assert "torch" not in sys.modules
        self._position = 0.0
        self._goal = np.random.default_rng(seed).uniform(1, 2) + 2 * (self._task == "far")

    def state(self) -> np.ndarray:
        return np.array([self._position, self._goal], np.float32)

    def render(self) -> np.ndarray:
        return np.full((4, 4, 3), int(20 * self._position) % 256, np.uint8)

    def step(self, action: np.ndarray) -> bool:
        if self._task == "raises":
            raise RuntimeError("physics exploded")
        if self._task == "dies":
            print("last words")
            sys.stdout.flush()
            os._exit(7)
        if self._task == "hangs":
            time.sleep(60)
        self._position += float(np.clip(action[0], -0.2, 0.2))
        return abs(self._position - self._goal) < 0.1
