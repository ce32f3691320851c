"""What LIBERO's scripted experts share: the style of an episode, the way to a place, the action that follows.

A way is a cone above the place it heads for: the nearer, the lower, and it moves sideways only where it is high
enough. That gives arcs without stops, and actions that can be told from what a camera sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla_energy.data import libero_env as lb

DOWN = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
"""Rotation of a hand that points down, its fingers along y."""

_GAIN = 2.0  # share of an error that the controller is asked to make up; it covers a third of what is asked a step
_TURN_GAIN, _TURN_MAX = 0.5, 0.3


@dataclass(frozen=True)
class Style:
    """One way of doing a task; the default is the fixed way, `draw` gives others.

    Attributes:
        side: side of a bowl's rim that is grasped, +1 or -1 along y; in a drawer only one can be reached.
        yaw: turn of the hand from the task's own grasp, radians; the grasp on a rim turns with it.
        height: how far above the grasp the hand comes in, metres.
        lift: how far above the goal the object is carried, metres; more where something stands in the way.
        slope: steepness of the cones, metres down for each metre sideways.
        speed: share of full speed, 0 to 1.
    """

    side: int = 1
    yaw: float = 0.0
    height: float = 0.10
    lift: float = 0.14
    slope: float = 1.5
    speed: float = 1.0

    @staticmethod
    def draw(rng: np.random.Generator) -> Style:
        """A random style, in ranges within which the tasks stay solvable."""
        return Style(
            side=int(rng.choice([-1, 1])),
            yaw=float(rng.uniform(-0.25, 0.25)),
            height=float(rng.uniform(0.08, 0.14)),
            lift=float(rng.uniform(0.13, 0.18)),
            slope=float(rng.uniform(1.3, 2.0)),
            speed=float(rng.uniform(0.8, 1.0)),
        )


def command(
    world: lb.Libero, move: np.ndarray, rotation: np.ndarray, closed: bool, speed: float, turn_max: float = _TURN_MAX
) -> np.ndarray:
    """The action (7,) float32, for `Libero.step_raw`, that moves and turns the hand.

    Args:
        world: the world in its present state.
        move: displacement of the hand (3,), metres.
        rotation: what the hand's rotation (3, 3) is to become.
        closed: whether the fingers are to close; otherwise they open.
        speed: share of full speed, 0 to 1.
        turn_max: the largest value that the action's rotation may have, 0 to 1.
    """
    turn = rotation @ world.hand_rotation().T
    axis = np.array([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]]) / 2
    action = np.empty(lb.ACTION_DIM, np.float32)
    action[:3] = _GAIN * move / lb.MOVE_METRES
    # Apart from each other, or a long way down would leave nothing for staying above the goal meanwhile.
    action[:2] *= min(1.0, speed / max(float(np.abs(action[:2]).max()), 1e-9))
    action[2] = np.clip(action[2], -speed, speed)
    action[3:6] = np.clip(_TURN_GAIN * axis / lb.TURN_RADIANS, -turn_max, turn_max)
    action[6] = 1.0 if closed else -1.0
    return action


def along_cone(here: np.ndarray, goal: np.ndarray, top: float, slope: float, low: float, near: float) -> np.ndarray:
    """Displacement (3,) of what is at `here` towards the goal, metres.

    Heads for the height of a cone of this slope that stands on the goal (within `near` metres of it: for the goal
    itself) and ends at `top`; sideways the less, the further it is below that, and not at all `low` metres below.
    """
    side = goal[:2] - here[:2]
    beyond = max(0.0, float(np.hypot(*side)) - near)
    height = min(goal[2] + slope * beyond, max(top, goal[2]))
    free = np.clip(1.0 - (height - here[2] - 0.01) / low, 0.0, 1.0)
    return np.append(side * free, height - here[2])


def about_z(angle: float) -> np.ndarray:
    """Rotation (3, 3) about the vertical, radians."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def tilted(angle: float) -> np.ndarray:
    """Rotation (3, 3) that turns a hand pointing down towards -y, radians."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[1.0, 0.0, 0.0], [0.0, c, s], [0.0, -s, c]])
