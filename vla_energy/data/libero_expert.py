"""Scripted experts for LIBERO's pick-and-place tasks, from privileged state.

    expert = Expert(world, Style.draw(rng))  # after each reset
    solved = world.step_raw(expert.action(world))

Every action is computed from the state the world is in, so that an expert recovers from a disturbed execution and
picks up what it lost. Its way is a cone above the place it heads for: the nearer, the lower, and it moves sideways
only where it is high enough. That gives arcs without stops, and actions that can be told from what a camera sees.
While the fingers close the hand keeps correcting its place by a millimetre or so: no action is a no-op (no movement
and the gripper as before), and none is left out of recorded data.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla_energy.data import libero_env as lb

SUITES = ("libero_spatial", "libero_object")
"""Suites whose every task has an expert."""

_GAIN = 2.0  # share of an error that the controller is asked to make up; it covers a third of what is asked a step
_TURN_GAIN, _TURN_MAX = 0.5, 0.3
_OPEN = 0.05  # metres between the fingers above which they count as open: they still open while the hand comes down
_GRIPPING = 0.0015  # below this there is nothing between them
_STOPPED = 0.0006  # metres a step: slower fingers have met something
_AT_SIDE, _AT_HEIGHT = 0.012, 0.010  # metres from the grasp at which the fingers close
_LOST = 0.08  # metres from the grasp at which the object is not held
_BOWL_RIM, _BOWL_WALL = 0.047, 0.025  # metres: radius of a bowl's wall, and height of the hand above its origin
_BOWL_FINGERS = 0.03  # metres between fingers on a bowl's wall at most
_DEPTH = 0.035  # metres below the top of a tall object at which it is grasped
_FINGERTIP = 0.012  # metres of finger below the hand's position
_DOWN = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])  # hand down, fingers along y


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
    """

    yaw: float
    offset: np.ndarray | None
    widest: float
    down: float
    over: float
    top: float
    low: float


def has_expert(task: str) -> bool:
    """Whether there is an expert for a task. Raises ValueError for an unknown task."""
    return lb.suite_of(task) in SUITES


class Expert:
    """The expert of one episode. Build it after the reset: it plans the grasp from where the object lies.

    Args:
        world: a world of a task of `SUITES`.
        style: how to do it; None takes the fixed way.

    Attributes:
        phase: "reach", "close", "carry" or "leave".

    Raises:
        ValueError: the task has no expert.
    """

    def __init__(self, world: lb.Libero, style: Style | None = None) -> None:
        if not has_expert(world.task):
            raise ValueError(f"no expert for {world.task!r}; suites that have experts: {', '.join(SUITES)}")
        self._style = style or Style()
        ((_, self._object, self._goal),) = world.goal
        self._plan = _plan(world, self._object, self._goal, self._style)
        self._steps = 0
        self._fingers = world.opening()
        self.phase = "reach"

    def action(self, world: lb.Libero) -> np.ndarray:
        """The action (7,) float32 for the present state, for `Libero.step_raw`: last is -1 open .. +1 closed."""
        self._switch(world)
        move = getattr(self, f"_{self.phase}")(world)
        turn = _about_z(self._plan.yaw) @ _DOWN @ world.hand_rotation().T
        axis = np.array([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]]) / 2
        action = np.empty(lb.ACTION_DIM, np.float32)
        action[:3] = _GAIN * move / lb.MOVE_METRES
        # Apart from each other, or a long way down would leave nothing for staying above the goal meanwhile.
        action[:2] *= min(1.0, self._style.speed / max(float(np.abs(action[:2]).max()), 1e-9))
        action[2] = np.clip(action[2], -self._style.speed, self._style.speed)
        action[3:6] = np.clip(_TURN_GAIN * axis / lb.TURN_RADIANS, -_TURN_MAX, _TURN_MAX)
        action[6] = 1.0 if self.phase in ("close", "carry") else -1.0
        return action

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
            error = world.position(self._object) - world.position(self._goal)
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

    def _reach(self, world: lb.Libero) -> np.ndarray:
        hand, grasp = world.hand(), self._grasp(world)
        if world.opening() < _OPEN:  # the fingers open above the object
            grasp[2] += self._style.height
        return _along_cone(hand, grasp, grasp[2] + self._style.height, self._plan.down, self._plan.low, near=0.01)

    def _close(self, world: lb.Libero) -> np.ndarray:
        return self._grasp(world) - world.hand()

    def _carry(self, world: lb.Libero) -> np.ndarray:
        goal = world.position(self._goal)
        return _along_cone(world.position(self._object), goal, self._plan.top, self._plan.over, self._plan.low, 0.02)

    def _leave(self, world: lb.Libero) -> np.ndarray:
        return np.array([0.0, 0.0, lb.MOVE_METRES])


def _along_cone(here: np.ndarray, goal: np.ndarray, top: float, slope: float, low: float, near: float) -> np.ndarray:
    """Displacement (3,) of what is at `here` towards the goal.

    Heads for the height of a cone that stands on the goal (within `near` metres of it: for the goal itself) and ends
    at `top`; sideways the less, the further it is below that.
    """
    side = goal[:2] - here[:2]
    beyond = max(0.0, float(np.hypot(*side)) - near)
    height = min(goal[2] + slope * beyond, max(top, goal[2]))
    free = np.clip(1.0 - (height - here[2] - 0.01) / low, 0.0, 1.0)
    return np.append(side * free, height - here[2])


def _about_z(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def _plan(world: lb.Libero, name: str, goal: str, style: Style) -> _Plan:
    goal_z, start = world.position(goal)[2], world.position(name)
    if "bowl" not in name:
        return _plan_in_basket(world, name, goal, style)
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
    offset = _about_z(yaw) @ [0.0, side * rim, _BOWL_WALL + (0.005 if drawer else 0.0)]
    top = max(goal_z + style.lift, start[2] + (0.09 if drawer else 0.06))
    return _Plan(yaw, offset, _BOWL_FINGERS, slope, style.slope, top, 0.015 if drawer else 0.04)


def _plan_in_basket(world: lb.Libero, name: str, goal: str, style: Style) -> _Plan:
    outline, start = world.outline(name), world.position(name)
    yaws = np.linspace(-np.pi / 2, np.pi / 2, 36, endpoint=False)
    widths = np.ptp(outline[:, :2] @ [-np.sin(yaws), np.cos(yaws)], axis=0)
    yaw = float(yaws[np.argmin(widths + 0.004 * np.abs(yaws))])  # the short side, and little turning for a round one
    basket = next(other for other in world.objects() if goal.startswith(other))
    rim = world.outline(basket)[:, 2].max()
    top = max(rim + start[2] - outline[:, 2].min() + 0.02 + 0.5 * (style.lift - Style.lift), start[2] + 0.06)
    return _Plan(yaw + 0.5 * style.yaw, None, 0.075, style.slope, 4.0, top, 0.03)
