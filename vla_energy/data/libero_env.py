"""One LIBERO task as a two-camera world: reset by seed, step, render on demand.

Needs the `libero` extra (a package of LIBERO with its assets, robosuite, mujoco) and an OpenGL library for `render`.
As in `metaworld_env`, one world a process, and neither torch nor TensorFlow beside it. State, images and actions
follow openvla-oft's `libero_*_no_noops` data.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from vla_energy.data.libero_scenes import (
    MAX_STEPS,
    SUITES,
    check_tasks,
    instruction,
    load,
    quiet,
    solid_shapes,
    suite_of,
    suite_tasks,
    task_names,
    unplaced,
)
from vla_energy.data.metaworld_env import GL_HELP, SimulatorError  # also chooses OSMesa unless MUJOCO_GL is set

__all__ = [
    "MAX_STEPS",
    "SUITES",
    "Libero",
    "SimulatorError",
    "check_tasks",
    "instruction",
    "suite_of",
    "suite_tasks",
    "task_names",
    "to_raw",
]

ACTION_DIM = 7
"""Hand displacement x, y, z, rotation x, y, z, each in [-1, 1], and the gripper."""
PROPRIO_DIM = 8
"""Hand position (3, metres), its orientation as axis times angle (3, radians), position of both fingers (2, metres)."""
IMAGE_SIZE = 128
"""Side of the square images unless the environment variable LIBERO_IMAGE_SIZE gives another, pixels."""
CAMERAS = ("agentview", "robot0_eye_in_hand")
"""The cameras of `render`, in order."""
FIXED_STATES_FROM = 1_000_000
"""Seeds from here are the benchmark's fixed initial states: the offset that rollouts add to theirs
(`rollout.run.EVALUATION_SEED_OFFSET`, not imported here as that module loads torch)."""
WAIT_STEPS = 10
"""Steps after a reset in which objects fall into place; neither recorded nor counted."""
MOVE_METRES, TURN_RADIANS = 0.05, 0.5
"""Displacement and rotation that an action of 1 asks the controller for."""

_WAIT = np.array([0.0] * 6 + [-1.0])
_OPEN_ABOVE = 0.5
_world_built = False


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Rotation axis times angle (3,) of a unit quaternion (4,) x, y, z, w; the angle is in [0, 2 pi)."""
    w = float(np.clip(quaternion[3], -1.0, 1.0))
    sine = np.sqrt(1.0 - w * w)
    return np.zeros(3) if np.isclose(sine, 0.0) else np.asarray(quaternion[:3]) * (2.0 * np.arccos(w) / sine)


def to_raw(action: np.ndarray) -> np.ndarray:
    """What the environment executes of actions (..., 7) whose last is 1 open .. 0 closed.

    Returns:
        The same shape, all within [-1, 1], the last -1 (open) or +1 (closed): the convention of LIBERO's datasets.
    """
    action = np.asarray(action, np.float64)
    gripper = np.where(action[..., -1:] > _OPEN_ABOVE, -1.0, 1.0)
    return np.concatenate([np.clip(action[..., :-1], -1.0, 1.0), gripper], -1)


def _image_size(size: int | None) -> int:
    value = os.environ.get("LIBERO_IMAGE_SIZE", str(IMAGE_SIZE)) if size is None else str(size)
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"image size (or LIBERO_IMAGE_SIZE) must be a positive number of pixels, got {value!r}")
    return int(value)


class Libero:
    """One task; implements `rollout.world.World`.

    Args:
        task: a name from `task_names()`.
        image_size: side of the images; None takes LIBERO_IMAGE_SIZE, or else `IMAGE_SIZE`.

    Attributes:
        task: its name.
        start: predicates that hold at first, such as `["In", "akita_black_bowl_1", "wooden_cabinet_1_top_region"]`.
        goal: what the benchmark checks: predicates such as `["on", "akita_black_bowl_1", "plate_1"]`.

    Raises:
        ValueError: unknown task, or an image size that is no positive number.
        SimulatorError: no simulator, no assets, no OpenGL, or a second world in this process.
    """

    def __init__(self, task: str, image_size: int | None = None) -> None:
        global _world_built
        suite = suite_of(task)
        if _world_built:
            raise SimulatorError("one MuJoCo renderer per process: start another process for a second task")
        self.task = task
        self._size = _image_size(image_size)
        wrapper = load("libero.libero.envs.env_wrapper").ControlEnv  # unlike the others, it may go without drawing
        with quiet():
            benchmark = load("libero.libero.benchmark").get_benchmark(suite)()
            number = benchmark.get_task_names().index(task)
            self._states = np.asarray(benchmark.get_task_init_states(number))
            # No camera observables, which would draw at every step, and no rebuilding of the scene at every reset.
            path = benchmark.get_task_bddl_file_path(number)
            flags = {"has_offscreen_renderer": False, "use_camera_obs": False, "hard_reset": False}
            environment = wrapper(bddl_file_name=path, **flags, ignore_done=True)
        self._env: Any = environment.env
        for name in list(self._env.observation_names):
            self._env.modify_observable(name, "enabled", False)  # nobody reads them
        self.start: list[list[str]] = [list(predicate) for predicate in self._env.parsed_problem["initial_state"]]
        self.goal: list[list[str]] = [list(predicate) for predicate in self._env.parsed_problem["goal_state"]]
        self._furniture = unplaced(self._env)
        self._shapes: dict[str, list[tuple[int, np.ndarray]]] = {}
        self._renderer: Any = None
        _world_built = True

    def reset(self, seed: int) -> None:
        """Starts the episode that this seed always starts, and waits `WAIT_STEPS` steps.

        Args:
            seed: below `FIXED_STATES_FROM` LIBERO's own random placement; from there on the benchmark's fixed
                initial state `seed - FIXED_STATES_FROM`.

        Raises:
            SimulatorError: there are not that many fixed states.
        """
        fixed = seed - FIXED_STATES_FROM
        if fixed >= len(self._states):
            raise SimulatorError(
                f"{self.task} has {len(self._states)} fixed initial states; there is none of number {fixed} "
                f"(seed {seed}): run fewer episodes, or start from a smaller seed"
            )
        if seed < 0:
            raise SimulatorError(f"seed must not be negative, got {seed}")
        self._env.seed(fixed if fixed >= 0 else seed)  # also for fixed states: they leave furniture to chance
        self._place()
        self._robot.gripper.current_action = np.zeros(self._robot.gripper.dof)  # robosuite keeps the last episode's
        if fixed >= 0:
            self._sim.set_state_from_flattened(self._states[fixed])
        self._sim.forward()
        self._env._post_process()
        for _ in range(WAIT_STEPS):
            self.step_raw(_WAIT)

    def _place(self) -> None:
        """LIBERO's own placement of everything, by numpy's global generator."""
        randomization_error = load("robosuite.utils.errors").RandomizationError
        for _ in range(100):
            # A reset moves the furniture, and places objects on it as if it had not been moved before.
            for body, position, quaternion in self._furniture:
                self._sim.model.body_pos[body] = position
                self._sim.model.body_quat[body] = quaternion
            try:
                self._env.reset()
                return
            except randomization_error:  # objects did not fit; the generator has moved on
                continue
        raise SimulatorError(f"{self.task}: LIBERO found no placement of its objects in 100 attempts")

    @property
    def _sim(self) -> Any:
        return self._env.sim

    @property
    def _robot(self) -> Any:
        return self._env.robots[0]

    def state(self) -> np.ndarray:
        """Proprioception (8,) float32, see `PROPRIO_DIM`."""
        w, x, y, z = self._sim.data.get_body_xquat(self._robot.robot_model.eef_name)
        fingers = self._sim.data.qpos[self._robot._ref_gripper_joint_pos_indexes]
        return np.concatenate([self.hand(), axis_angle(np.array([x, y, z, w])), fingers]).astype(np.float32)

    def render(self) -> np.ndarray:
        """Both cameras' images (2, s, s, 3) uint8, turned by 180 degrees from robosuite's: upright, mirrored."""
        renderer = self._renderer = self._renderer or self._open_renderer()
        images = []
        for camera in CAMERAS:
            renderer.update_scene(self._sim.data._data, camera, self._options)
            images.append(renderer.render()[:, ::-1])  # already upright, unlike robosuite's
        return np.stack(images)

    def _open_renderer(self) -> Any:
        mujoco = load("mujoco")
        model = self._sim.model._model
        # Shadows and multisampling cost most of a frame's time under OSMesa, and show nothing the task needs.
        model.vis.quality.shadowsize = 0
        model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, self._size)
        model.vis.global_.offheight = max(model.vis.global_.offheight, self._size)
        self._options = mujoco.MjvOption()
        self._options.geomgroup[0] = 0  # collision shapes
        try:
            return mujoco.Renderer(model, self._size, self._size)
        except Exception as error:
            raise SimulatorError(f"{GL_HELP} ({error})") from error

    def step(self, action: np.ndarray) -> bool:
        """Executes an action (7,) whose last is 1 open .. 0 closed; whether the task is now solved."""
        return self.step_raw(to_raw(action))

    def step_raw(self, action: np.ndarray) -> bool:
        """Executes an action (7,) whose last is -1 open .. +1 closed; whether the task is now solved."""
        clipped = np.clip(np.asarray(action, np.float64), -1.0, 1.0)
        if clipped.shape != (ACTION_DIM,):
            raise ValueError(f"expected an action ({ACTION_DIM},), got shape {clipped.shape}")
        return bool(self._env.step(clipped)[2])  # "done" of LIBERO: its own check of the goal

    def joints(self) -> np.ndarray:
        """The arm's joint angles (7,) float32, radians."""
        return self._sim.data.qpos[self._robot._ref_joint_pos_indexes].astype(np.float32)

    def extras(self) -> dict[str, np.ndarray]:
        """What the recorder stores and the policy does not see: `joint_state` (7,), see `joints`."""
        return {"joint_state": self.joints()}

    def hand(self) -> np.ndarray:
        """Position (3,) between the fingertips, metres."""
        return np.array(self._sim.data.site_xpos[self._robot.eef_site_id])

    def hand_rotation(self) -> np.ndarray:
        """Rotation (3, 3) of the hand; its columns are the hand's axes; the fingers move along the first."""
        return np.array(self._sim.data.site_xmat[self._robot.eef_site_id]).reshape(3, 3)

    def opening(self) -> float:
        """Distance between the fingers, metres: 0 to 0.08."""
        fingers = self._sim.data.qpos[self._robot._ref_gripper_joint_pos_indexes]
        return float(fingers[0] - fingers[1])

    def objects(self) -> list[str]:
        """Names of the movable objects."""
        return list(self._env.objects_dict)

    def furniture(self) -> list[str]:
        """Names of the fixed objects."""
        return list(self._env.fixtures_dict)

    def position(self, name: str) -> np.ndarray:
        """Privileged: position (3,) of an object, a piece of furniture or a named site of it, metres."""
        site = name in self._env.object_sites_dict
        data = self._sim.data
        return np.array(data.get_site_xpos(name) if site else data.body_xpos[self._body(name)])

    def rotation(self, name: str) -> np.ndarray:
        """Privileged: rotation (3, 3) of what `position` locates."""
        site = name in self._env.object_sites_dict
        data = self._sim.data
        return np.array(data.get_site_xmat(name) if site else data.body_xmat[self._body(name)]).reshape(3, 3)

    def travel(self, name: str) -> float:
        """Privileged: how far a drawer (named by its region; out is negative, metres) or a knob (radians) has moved."""
        parts = self._env.object_sites_dict
        (joint,) = (parts[name] if name in parts else self._env.get_object(name)).joints
        return float(self._sim.data.get_joint_qpos(joint))

    def outline(self, name: str) -> np.ndarray:
        """Privileged: points (n, 3) on the hull of an object's collision shapes, metres."""
        if name not in self._shapes:
            self._shapes[name] = solid_shapes(self._sim.model._model, self._body(name))
        mats, centres = self._sim.data.geom_xmat, self._sim.data.geom_xpos
        return np.concatenate([corners @ mats[i].reshape(3, 3).T + centres[i] for i, corners in self._shapes[name]])

    def _body(self, name: str) -> int:
        bodies = self._env.obj_body_id
        if name not in bodies:
            raise ValueError(f"{self.task} has no {name!r}; it has: {', '.join(sorted(bodies))}")
        return bodies[name]
