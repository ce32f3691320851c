"""The scripted experts that pull a drawer, turn a knob or push a plate of LIBERO's, from privileged state."""

from __future__ import annotations

import numpy as np

from vla_energy.data import libero_env as lb
from vla_energy.data.libero_motion import DOWN, Style, about_z, along_cone, command, tilted

_HANDLES = {"top": 0.184, "middle": 0.110, "bottom": 0.041}  # metres above the cabinet's origin
_HANDLE_AHEAD = 0.1016  # metres from the cabinet's origin to the handle of a closed drawer
_TILT = 1.35  # radians by which the hand is turned up from pointing down: its fingers pass above and below the handle
_OPEN_BY = 0.143  # metres; the benchmark counts 0.14 as open, and further out is in the way
_CLEAR = 0.09  # metres in front of a handle at which the hand may rise
_RISE = 0.11  # metres above a handle at which the hand is free to go elsewhere
_KNOB = np.array([-0.008, 0.0, 0.034])  # metres from the stove's origin to where its knob's ridge is held
_KNOB_LEAD = 0.5  # radians by which the turning hand is asked to be ahead of the knob
_PLATE_AHEAD, _PLATE_HEIGHT = 0.03, 0.018  # metres from a plate's middle to the fingers: towards the goal, and up
_PLATE_PRESS = 0.01  # metres below that at which the pushing hand aims, or it would slide over the rim
_PLATE_LOST = 0.065  # metres from a plate's middle at which the fingers are no longer in it


class _Stage:
    """Calls the method of the present phase; starts with "reach".

    Attributes:
        phase: what it is at.
    """

    def __init__(self, world: lb.Libero, style: Style) -> None:
        self._style = style
        self.phase = "reach"
        self._steps = 0

    def done(self, world: lb.Libero) -> bool:
        """Whether the next stage may begin."""
        return False

    def action(self, world: lb.Libero) -> np.ndarray:
        """The action (7,) float32 for the present state, for `Libero.step_raw`."""
        before = self.phase
        action = getattr(self, f"_{self.phase}")(world)
        self._steps = self._steps + 1 if self.phase == before else 0
        return action


class PullDrawer(_Stage):
    """Takes a closed drawer by its handle, pulls it open, lets go and rises.

    Args:
        world: the world after its reset.
        name: the drawer's region, such as `wooden_cabinet_1_top_region`.
        style: how to do it.
    """

    def __init__(self, world: lb.Libero, name: str, style: Style) -> None:
        super().__init__(world, style)
        self._drawer = name
        self._cabinet = next(fixture for fixture in world.furniture() if name.startswith(fixture))
        self._height = next(height for level, height in _HANDLES.items() if f"_{level}_" in name)
        axes = world.rotation(self._cabinet)
        self._out = axes @ [0.0, -1.0, 0.0]
        self._rotation = axes @ about_z(np.pi) @ tilted(_TILT) @ DOWN

    def done(self, world: lb.Libero) -> bool:
        """Whether it has let go, and is above the drawer."""
        return self.phase == "leave" and world.hand()[2] > self._handle(world)[2] + _RISE

    def _handle(self, world: lb.Libero) -> np.ndarray:
        closed = world.rotation(self._cabinet) @ [-0.003, -_HANDLE_AHEAD, self._height]
        return world.position(self._cabinet) + closed - self._out * world.travel(self._drawer)

    def _command(self, world: lb.Libero, move: np.ndarray, closed: bool) -> np.ndarray:
        return command(world, move, self._rotation, closed, self._style.speed, turn_max=0.6)

    def _miss(self, world: lb.Libero) -> tuple[float, np.ndarray]:
        """How far the hand is in front of the handle, and beside it (3,), metres."""
        error = world.hand() - self._handle(world)
        ahead = float(error @ self._out)
        return ahead, error - ahead * self._out

    def _reach(self, world: lb.Libero) -> np.ndarray:
        ahead, side = self._miss(world)
        turned = float(np.arccos(np.clip(self._rotation[:, 2] @ world.hand_rotation()[:, 2], -1.0, 1.0)))
        beside = float(np.linalg.norm(side)) + 0.1 * max(0.0, turned - 0.15)
        if beside < 0.012 and ahead < 0.008:
            self.phase = "close"
        wanted = min(0.12, 3.0 * max(0.0, beside - 0.008))
        free = np.clip(1.0 - (wanted - ahead - 0.01) / 0.04, 0.0, 1.0)
        return self._command(world, (wanted - ahead) * self._out - side * free, closed=False)

    def _close(self, world: lb.Libero) -> np.ndarray:
        ahead, side = self._miss(world)
        if self._steps > 3 and world.opening() < 0.03:
            self.phase = "pull"
        return self._command(world, -side - ahead * self._out, closed=True)

    def _pull(self, world: lb.Libero) -> np.ndarray:
        ahead, side = self._miss(world)
        if world.travel(self._drawer) < -_OPEN_BY:
            self.phase = "leave"
        elif np.hypot(ahead, np.linalg.norm(side)) > 0.05 or world.opening() < 0.004:
            self.phase = "reach"
        return self._command(world, 0.05 * self._out - side, closed=True)

    def _leave(self, world: lb.Libero) -> np.ndarray:
        ahead, _ = self._miss(world)
        if ahead < _CLEAR:
            return self._command(world, 0.04 * self._out, closed=False)
        # Up and towards the robot, away from the open drawer, with the hand pointing down again.
        move = np.array([-0.04, 0.0, 0.05])
        return command(world, move, DOWN, False, self._style.speed, turn_max=0.6)


class TurnKnob(_Stage):
    """Takes the stove's knob by its ridge and turns it on.

    Args:
        world: the world after its reset.
        name: the stove.
        style: how to do it.
    """

    def __init__(self, world: lb.Libero, name: str, style: Style) -> None:
        super().__init__(world, style)
        self._stove = name

    def _yaw(self, world: lb.Libero) -> float:
        x, y, _ = world.rotation(self._stove)[:, 0]
        return float(np.arctan2(y, x)) + world.travel(self._stove)

    def _grip(self, world: lb.Libero) -> np.ndarray:
        return world.position(self._stove) + about_z(self._yaw(world)) @ _KNOB

    def _command(self, world: lb.Libero, move: np.ndarray, closed: bool, lead: float = 0.0) -> np.ndarray:
        rotation = about_z(self._yaw(world) + lead) @ DOWN
        return command(world, move, rotation, closed, self._style.speed, turn_max=0.5)

    def _reach(self, world: lb.Libero) -> np.ndarray:
        hand, grip = world.hand(), self._grip(world)
        if np.hypot(*(hand - grip)[:2]) < 0.012 and abs(hand[2] - grip[2]) < 0.01:
            self.phase = "close"
        way = along_cone(hand, grip, grip[2] + self._style.height, self._style.slope, 0.04, near=0.01)
        return self._command(world, way, closed=False)

    def _close(self, world: lb.Libero) -> np.ndarray:
        if self._steps > 5 and world.opening() < 0.04:
            self.phase = "turn"
        return self._command(world, self._grip(world) - world.hand(), closed=True)

    def _turn(self, world: lb.Libero) -> np.ndarray:
        miss = self._grip(world) - world.hand()
        if np.linalg.norm(miss) > 0.04 or world.opening() < 0.004:
            self.phase = "reach"
        return self._command(world, miss, closed=True, lead=_KNOB_LEAD)


class PushPlate(_Stage):
    """Pushes a plate over the table with closed fingers inside it: behind it there is no room for a hand.

    Args:
        world: the world after its reset.
        name: the plate.
        goal: the region it goes to.
        style: how to do it.
    """

    def __init__(self, world: lb.Libero, name: str, goal: str, style: Style) -> None:
        super().__init__(world, style)
        self._plate, self._goal = name, goal

    def _way(self, world: lb.Libero) -> np.ndarray:
        """From the plate to its goal (3,), over the table, metres."""
        return (world.position(self._goal) - world.position(self._plate)) * [1.0, 1.0, 0.0]

    def _inside(self, world: lb.Libero) -> np.ndarray:
        way = self._way(world)
        ahead = way * _PLATE_AHEAD / max(float(np.linalg.norm(way)), 1e-9)
        return world.position(self._plate) + ahead + np.array([0.0, 0.0, _PLATE_HEIGHT])

    def _command(self, world: lb.Libero, move: np.ndarray) -> np.ndarray:
        return command(world, move, about_z(self._style.yaw) @ DOWN, True, self._style.speed)

    def _reach(self, world: lb.Libero) -> np.ndarray:
        hand, inside = world.hand(), self._inside(world)
        if np.hypot(*(hand - inside)[:2]) < 0.02 and abs(hand[2] - inside[2]) < 0.01:
            self.phase = "push"
        way = along_cone(hand, inside, inside[2] + self._style.height, self._style.slope, 0.04, near=0.01)
        return self._command(world, way)

    def _push(self, world: lb.Libero) -> np.ndarray:
        way, miss = self._way(world), self._inside(world) - world.hand()
        if np.hypot(*(world.hand() - world.position(self._plate))[:2]) > _PLATE_LOST or miss[2] < -0.03:
            self.phase = "reach"
        ahead = way * min(1.0, 0.04 / max(float(np.linalg.norm(way)), 1e-9))
        return self._command(world, miss + ahead - np.array([0.0, 0.0, _PLATE_PRESS]))
