"""Scripted experts for LIBERO's tasks, from privileged state.

    expert = Expert(world, Style.draw(rng))  # after each reset
    solved = world.step_raw(expert.action(world))

Every action is computed from the state the world is in, so that an expert recovers from a disturbed execution and
picks up what it lost. A task is one stage, or several in turn: `libero_place` takes things to places,
`libero_articulated` opens drawers, turns knobs and pushes plates.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from vla_energy.data import libero_env as lb
from vla_energy.data.libero_articulated import PullDrawer, PushPlate, TurnKnob
from vla_energy.data.libero_motion import Style
from vla_energy.data.libero_place import PickAndPlace

__all__ = ["SUITES", "Expert", "Style", "has_expert", "require_experts", "tasks_with_expert"]

_WHOLE_SUITES = ("libero_spatial", "libero_object")
_SINGLE_TASKS = {
    "libero_goal": (
        "open_the_middle_drawer_of_the_cabinet",
        "put_the_bowl_on_the_stove",
        "put_the_wine_bottle_on_top_of_the_cabinet",
        "open_the_top_drawer_and_put_the_bowl_inside",
        "put_the_bowl_on_top_of_the_cabinet",
        "push_the_plate_to_the_front_of_the_stove",
        "put_the_cream_cheese_in_the_bowl",
        "turn_on_the_stove",
        "put_the_bowl_on_the_plate",
        "put_the_wine_bottle_on_the_rack",
    ),
}
SUITES = (*_WHOLE_SUITES, *_SINGLE_TASKS)
"""Suites of which at least some tasks have an expert."""


class _Stage(Protocol):
    """A part of a task."""

    phase: str

    def action(self, world: lb.Libero) -> np.ndarray: ...

    def done(self, world: lb.Libero) -> bool: ...


def tasks_with_expert(suite: str) -> list[str]:
    """The tasks of a suite that have an expert, in the benchmark's order. Raises ValueError for an unknown suite."""
    tasks = lb.suite_tasks(suite)
    return tasks if suite in _WHOLE_SUITES else [task for task in tasks if task in _SINGLE_TASKS.get(suite, ())]


def has_expert(task: str) -> bool:
    """Whether there is an expert for a task. Raises ValueError for an unknown task."""
    return task in tasks_with_expert(lb.suite_of(task))


def require_experts(suite: str, tasks: list[str]) -> None:
    """Raises ValueError if tasks of a suite have no expert; it names them, and the tasks of the suite that have one."""
    ready = tasks_with_expert(suite)
    if missing := [task for task in tasks if task not in ready]:
        rest = f"give the rest as --tasks: {','.join(ready)}" if ready else f"suites that have: {', '.join(SUITES)}"
        raise ValueError(f"no expert for {', '.join(missing)} of {suite}; {rest}")


class Expert:
    """The expert of one episode. Build it after the reset: it plans from where things lie.

    Args:
        world: a world of a task that has an expert.
        style: how to do it; None takes the fixed way.

    Raises:
        ValueError: the task has no expert.
    """

    def __init__(self, world: lb.Libero, style: Style | None = None) -> None:
        require_experts(lb.suite_of(world.task), [world.task])
        self._style = style or Style()
        self._stages = 0
        self._stage = self._next(world)

    @property
    def phase(self) -> str:
        """What the expert is at, such as "reach" or "carry"."""
        return self._stage.phase

    def action(self, world: lb.Libero) -> np.ndarray:
        """The action (7,) float32 for the present state, for `Libero.step_raw`: last is -1 open .. +1 closed."""
        if self._stage.done(world):
            self._stage = self._next(world)
        return self._stage.action(world)

    def _next(self, world: lb.Libero) -> _Stage:
        """The stage that comes now; where a drawer has to be opened first, there are two."""
        self._stages += 1
        ((predicate, name, *place),) = world.goal
        if predicate == "turnon":
            return TurnKnob(world, name, self._style)
        if predicate == "open":
            return PullDrawer(world, name, self._style)
        if name.startswith("plate"):
            return PushPlate(world, name, place[0], self._style)
        if predicate == "in" and "cabinet" in place[0] and self._stages == 1:
            return PullDrawer(world, place[0], self._style)
        return PickAndPlace(world, name, place[0], self._style)
