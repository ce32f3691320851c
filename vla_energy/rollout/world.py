"""What a simulator backend offers, and the process side that serves it.

A backend is a module with a `World` class and, beside it, `task_names() -> list[str]`,
`instruction(task) -> str` and `ACTION_DIM`. It may also have

    SUITES, suite_tasks(suite) -> list[str]   names that stand for several tasks, and the tasks of one
    MAX_STEPS                                 its limit of an episode's steps: a number, or one for each suite

and its class `extras() -> dict[str, np.ndarray]`: further observations, float vectors, for recorded episodes only.

This module is imported by the simulator's process: no torch here.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np

from vla_energy.data.metaworld_env import SimulatorError

DEFAULT_MAX_STEPS = 150
"""Limit of an episode's steps where a backend has none."""


class World(Protocol):
    """What a backend's class offers; its constructor takes the task's name."""

    def reset(self, seed: int) -> None:
        """Starts the episode that this seed always starts, whatever was run before."""

    def state(self) -> np.ndarray:
        """Proprioception `(P,)` float32 in the robot's units."""
        ...

    def render(self) -> np.ndarray:
        """Camera image `(h, w, 3)`, or `(num_images, h, w, 3)` with several cameras; uint8."""
        ...

    def step(self, action: np.ndarray) -> bool:
        """Executes one raw action `(A,)`; True once the task is solved."""
        ...


@dataclass(frozen=True)
class Observation:
    """What the policy sees.

    Attributes:
        images: `(num_images, h, w, 3)` uint8.
        proprio: `(P,)` float32 in the robot's units.
        instruction: the task in words.
        extras: what the backend's class gives as `extras`; not for the policy, only to be recorded.
    """

    images: np.ndarray
    proprio: np.ndarray
    instruction: str
    extras: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Execution:
    """Outcome of executing actions.

    Attributes:
        observation: what is seen afterwards; None once solved or if it was not asked for.
        done: whether the task was solved; later actions of the chunk were not executed.
        steps: physics steps taken.
        frames: what was seen before each of these steps, if that was asked for.
    """

    observation: Observation | None
    done: bool
    steps: int
    frames: tuple[Observation, ...] = ()


@dataclass(frozen=True)
class BackendInfo:
    """What a backend offers.

    Attributes:
        tasks: its task names, sorted.
        action_dim: A.
        suites: tasks by suite.
        max_steps: limit of an episode's steps by task.
    """

    tasks: tuple[str, ...]
    action_dim: int
    suites: dict[str, tuple[str, ...]] = field(default_factory=dict)
    max_steps: dict[str, int] = field(default_factory=dict)


class _Server:
    """The child's side: builds the world when first needed and answers requests by name."""

    def __init__(self, task: str, target: str) -> None:
        self._task, self._target = task, target
        self._world: World | None = None
        self._module: Any = None
        self._seen: Observation | None = None  # the last observation, until the next step makes it old

    def _load(self) -> Any:
        module, _, name = self._target.partition(":")
        self._module = importlib.import_module(module)
        return getattr(self._module, name)

    def _ready(self) -> World:
        world: World = self._world if self._world is not None else self._load()(self._task)
        self._world = world
        return world

    def _observe(self, world: World) -> Observation:
        if self._seen is None:
            image = np.array(world.render(), np.uint8)  # copies: a world may draw into the same buffer again
            images = image[None] if image.ndim == 3 else image
            extras = getattr(world, "extras", dict)()
            instruction = self._module.instruction(self._task)
            self._seen = Observation(images, np.array(world.state(), np.float32), instruction, extras)
        return self._seen

    def info(self) -> BackendInfo:
        self._load()
        module = self._module
        tasks = tuple(sorted(module.task_names()))
        suites = {suite: tuple(module.suite_tasks(suite)) for suite in getattr(module, "SUITES", ())}
        limits = getattr(module, "MAX_STEPS", DEFAULT_MAX_STEPS)
        if isinstance(limits, dict):
            limits = {task: limits[suite] for suite, members in suites.items() for task in members}
        else:
            limits = dict.fromkeys(tasks, limits)
        return BackendInfo(tasks, int(module.ACTION_DIM), suites, limits)

    def reset(self, seed: int) -> Observation:
        world = self._ready()
        world.reset(seed)
        self._seen = None
        return self._observe(world)

    def execute(self, actions: np.ndarray, observe: bool, record: bool) -> Execution:
        world = self._world
        if world is None:
            raise SimulatorError("execute before the first reset")
        frames: list[Observation] = []
        for steps, action in enumerate(actions, start=1):
            if record:
                frames.append(self._observe(world))
            self._seen = None
            if world.step(action):
                return Execution(None, True, steps, tuple(frames))
        return Execution(self._observe(world) if observe else None, False, len(actions), tuple(frames))


def serve(descriptor: int, task: str, target: str) -> None:
    """Main function of the simulator's process: answers requests from the pipe until its other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it closes the pipe
    pipe, server = Connection(descriptor), _Server(task, target)
    with contextlib.suppress(EOFError, OSError):  # the parent has gone, or is done
        while True:
            name, arguments = pipe.recv()
            try:
                answer = True, getattr(server, name)(*arguments)
            except Exception as error:
                ours = isinstance(error, (SimulatorError, ValueError))
                message = str(error) if ours else f"{type(error).__name__}: {error}"
                answer = False, (message, traceback.format_exc())
            pipe.send(answer)
    sys.stdout.flush()
    os._exit(0)  # skips the renderer's destructors, which may crash under OSMesa
