"""The scripted expert that takes an object of LIBERO's from one place to another, from privileged state.

While the fingers close the hand keeps correcting its place by a millimetre or so: no action is a no-op (no movement
and the gripper as before), and none is left out of recorded data.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla_energy.data import libero_env as lb
from vla_energy.data.libero_motion import DOWN, Style, about_z, along_cone, command, tilted

_OPEN = 0.05  # metres between the fingers above which they count as open: they still open while the hand comes down
_GRIPPING = 0.0015  # below this there is nothing between them
_STOPPED = 0.0006  # metres a step: slower fingers have met something
_AT_SIDE, _AT_HEIGHT = 0.012, 0.010  # metres from the grasp at which the fingers close
_LOST = 0.08  # metres from the grasp at which the object is not held
_BOWL_RIM, _BOWL_WALL = 0.047, 0.025  # metres: radius of a bowl's wall, and height of the hand above its origin
_BOWL_FINGERS = 0.03  # metres between fingers on a bowl's wall at most
_ON_RACK = np.array([-0.06, 0.0, 0.04])  # metres from the middle of a rack's region, in the region's axes
_BESIDE_DRAWER, _LEAN = 0.5, 0.55  # turn and tilt of a hand that takes a bowl from under an open drawer, radians
_DEPTH = 0.035  # metres below the top of a tall object at which it is grasped
_FINGERTIP = 0.012  # metres of finger below the hand's position


@dataclass(frozen=True)
class _Plan:
    """How one object is grasped and carried, decided once an episode.

    Attributes:
        yaw: turn of the hand; at 0 its fingers move along y.
        offset: of the hand from the object's origin (3,); None grasps the middle of the object's outline.
        widest: metres between fingers that hold the object, at most.
        down, over: steepness of the cones over the grasp and over the goal.
        top: height of the object's origin while it is carried, metres.
        low: height by which the hand may lag behind its cone and still move sideways, metres.
        target: of the object's origin from the goal's position (3,), metres.
        tilt: by which the hand leans out over the rim that it holds, radians.
    """

    yaw: float
    offset: np.ndarray | None
    widest: float
    down: float
    over: float
    top: float
    low: float
    target: np.ndarray
    tilt: float = 0.0


class PickAndPlace:
    """Takes an object to a place. Build it when it is to begin: it plans the grasp from where the object lies.

    Args:
        world: the world after its reset.
        name: the object.
        goal: where it goes: an object or a region, as the benchmark's goal names it.
        style: how to do it.

    Attributes:
        phase: "reach", "close", "carry" or "leave".
    """

    def __init__(self, world: lb.Libero, name: str, goal: str, style: Style) -> None:
        self._style = style
        self._object, self._goal = name, goal
        self._plan = _plan(world, name, goal, style)
        self._steps = 0
        self._fingers = world.opening()
        self.phase = "reach"

    def done(self, world: lb.Libero) -> bool:
        """Never: the benchmark ends the episode."""
        return False

    def action(self, world: lb.Libero) -> np.ndarray:
        """The action (7,) float32 for the present state, for `Libero.step_raw`."""
        self._switch(world)
        move = getattr(self, f"_{self.phase}")(world)
        rotation = about_z(self._plan.yaw) @ tilted(self._plan.tilt) @ DOWN
        return command(world, move, rotation, self.phase in ("close", "carry"), self._style.speed)

    def _switch(self, world: lb.Libero) -> None:
        """Moves on to the next phase, or back to the first where the object is not held."""
        fingers, before = world.opening(), self.phase
        miss = world.hand() - self._grasp(world)
        holding = self.phase in ("close", "carry")
        if holding and (np.linalg.norm(miss) > _LOST or fingers < _GRIPPING):
            self.phase = "reach"
        elif self.phase == "reach" and np.hypot(*miss[:2]) < _AT_SIDE and abs(miss[2]) < _AT_HEIGHT:
            self.phase = "close"
        elif self.phase == "close" and self._steps > 3 and fingers < self._plan.widest:
            if self._fingers - fingers < _STOPPED:
                self.phase = "carry"
        elif self.phase == "carry":
            error = world.position(self._object) - self._target(world)
            if np.hypot(*error[:2]) < 0.02 and error[2] < 0.008:
                self.phase = "leave"
        elif self.phase == "leave" and miss[2] > self._style.height:
            self.phase = "reach"
        self._steps = self._steps + 1 if self.phase == before else 0
        self._fingers = fingers

    def _grasp(self, world: lb.Libero) -> np.ndarray:
        """Where the hand (3,) has to be to grasp the object."""
        if self._plan.offset is not None:
            return world.position(self._object) + self._plan.offset
        outline = world.outline(self._object)
        low, high = outline.min(0), outline.max(0)
        middle = (low + high) / 2
        middle[2] = max(middle[2], high[2] - _DEPTH, low[2] + _FINGERTIP)
        return middle

    def _target(self, world: lb.Libero) -> np.ndarray:
        """Where the object's origin (3,) goes."""
        return world.position(self._goal) + self._plan.target

    def _reach(self, world: lb.Libero) -> np.ndarray:
        hand, grasp = world.hand(), self._grasp(world)
        if world.opening() < _OPEN:  # the fingers open above the object
            grasp[2] += self._style.height
        return along_cone(hand, grasp, grasp[2] + self._style.height, self._plan.down, self._plan.low, near=0.01)

    def _close(self, world: lb.Libero) -> np.ndarray:
        return self._grasp(world) - world.hand()

    def _carry(self, world: lb.Libero) -> np.ndarray:
        return along_cone(
            world.position(self._object), self._target(world), self._plan.top, self._plan.over, self._plan.low, 0.02
        )

    def _leave(self, world: lb.Libero) -> np.ndarray:
        return np.array([0.0, 0.0, lb.MOVE_METRES])


def _plan(world: lb.Libero, name: str, goal: str, style: Style) -> _Plan:
    goal_z, start = world.position(goal)[2], world.position(name)
    if "bowl" not in name:
        return _plan_by_outline(world, name, goal, style)
    # A place's predicate comes as in the file, ("In", bowl, drawer) or ("On", bowl, table or another object).
    support = next(predicate for predicate in world.start if predicate[1] == name)
    drawer = support[0].lower() == "in"
    if drawer:
        # The hand fits between bowl and drawer in one corner only: right in front, seen from the robot.
        cabinet = next(fixture for fixture in world.furniture() if support[2].startswith(fixture))
        x, y, _ = world.rotation(cabinet) @ [0.82, -0.57, 0.0]
        yaw, side, rim, slope = float(np.arctan2(-x, y)) + 0.3 * style.yaw, 1, 0.042, 4.0
    else:
        yaw, side, rim, slope = style.yaw, style.side, _BOWL_RIM, style.slope
    tilt = 0.0
    if "cabinet" in goal and goal.endswith("_region"):
        # The drawer stands open beside and above the bowl: the hand comes from the side away from it, and leans away.
        yaw, side, tilt = _BESIDE_DRAWER + 0.3 * style.yaw, 1, _LEAN
    offset = about_z(yaw) @ [0.0, side * rim, _BOWL_WALL + (0.005 if drawer else 0.0)]
    top = max(goal_z + style.lift, start[2] + (0.09 if drawer else 0.06))
    return _Plan(yaw, offset, _BOWL_FINGERS, slope, style.slope, top, 0.015 if drawer else 0.04, np.zeros(3), tilt)


def _plan_by_outline(world: lb.Libero, name: str, goal: str, style: Style) -> _Plan:
    outline, start = world.outline(name), world.position(name)
    yaws = np.linspace(-np.pi / 2, np.pi / 2, 36, endpoint=False)
    widths = np.ptp(outline[:, :2] @ [-np.sin(yaws), np.cos(yaws)], axis=0)
    yaw = float(yaws[np.argmin(widths + 0.004 * np.abs(yaws))])  # the short side, and little turning for a round one
    holder = next(other for other in world.objects() + world.furniture() if goal.startswith(other))
    rim = world.outline(holder)[:, 2].max()
    # A rack's region is a strip up its slope; a post stands in its middle.
    target = world.rotation(goal) @ _ON_RACK if "rack" in goal else np.zeros(3)
    top = max(rim + start[2] - outline[:, 2].min() + 0.02 + 0.5 * (style.lift - Style.lift), start[2] + 0.06)
    return _Plan(yaw + 0.5 * style.yaw, None, 0.075, style.slope, 4.0, top, 0.03, target)
