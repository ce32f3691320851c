"""One Meta-World task as a camera-and-proprio world: reset by seed, step, render on demand.

Needs the `sim` extra (metaworld, mujoco) and an OpenGL library; with `MUJOCO_GL=osmesa` that is
Debian's `libosmesa6`. MuJoCo allows *one renderer per process* here: a second one returns garbage
without an error, so this module refuses to build two worlds in one process. Recording and rollouts
therefore start one process per task.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np

os.environ.setdefault("MUJOCO_GL", "osmesa")

IMAGE_SIZE = 96
"""Side of the square camera image, pixels."""
PROPRIO_DIM = 4
"""Hand position x, y, z (metres) and gripper opening (0 closed .. 1 open)."""
ACTION_DIM = 4
"""Hand displacement x, y, z and gripper effort, each in [-1, 1]."""
MAX_STEPS = 150
"""Episode limit used by recordings and rollouts; most scripted experts need 30 to 120 steps."""

GL_HELP = (
    "MuJoCo could not open an off-screen OpenGL context. On Debian/Ubuntu: "
    "`apt-get install libosmesa6`, then run with MUJOCO_GL=osmesa (the default here)."
)

_SUFFIX = "-v3"
_CAMERA = "corner2"
_CAMERA_POSITION = (0.75, 0.075, 0.7)  # closer than Meta-World's own: sees the table at 96 pixels
_CAMERA_FOVY = 42.0  # degrees; Meta-World's 60 spends half the pixels on the wall and the robot's base
_world_built = False


class SimulatorError(RuntimeError):
    """The simulator is missing, or cannot draw."""


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SimulatorError(f"{name} is missing: pip install 'vla-energy[sim]'") from error


def task_names() -> list[str]:
    """Names of the tasks, without Meta-World's version suffix, sorted.

    Raises:
        SimulatorError: metaworld is not installed.
    """
    return sorted(name.removesuffix(_SUFFIX) for name in _import("metaworld.policies").ENV_POLICY_MAP)


def check_tasks(tasks: list[str]) -> None:
    """Raises ValueError naming every unknown task and listing the known ones."""
    known = task_names()
    unknown = [task for task in tasks if task not in known]
    if unknown:
        raise ValueError(f"unknown Meta-World task(s) {unknown}; known: {', '.join(known)}")


def instruction(task: str) -> str:
    """The language instruction of a task: its name with blanks for hyphens."""
    return task.replace("-", " ")


class MetaWorld:
    """One task. Observations are `image` (96, 96, 3) uint8 and `state` (4,) float32.

    Args:
        task: a name from `task_names()`.

    Raises:
        ValueError: unknown task.
        SimulatorError: no simulator, no OpenGL, or a second world in this process.
    """

    def __init__(self, task: str) -> None:
        global _world_built
        check_tasks([task])
        if _world_built:
            raise SimulatorError("one MuJoCo renderer per process: start another process for a second task")
        environments = _import("metaworld.env_dict").ALL_V3_ENVIRONMENTS
        self.task = task
        self._env = environments[task + _SUFFIX]()
        self._env._set_task_called = True  # the seed chooses the positions, not a pickled task
        self._env._partially_observable = False  # the expert needs the goal; the policy never sees this vector
        self._env.__dict__.pop("sawyer_observation_space", None)  # cached with a goal clipped to zero
        self._env._freeze_rand_vec = False
        self._env.seeded_rand_vec = True
        self._expert = _import("metaworld.policies").ENV_POLICY_MAP[task + _SUFFIX]()
        self._renderer = self._open_renderer()
        self._vector = np.zeros(39)
        _world_built = True

    def _open_renderer(self) -> Any:
        mujoco = _import("mujoco")
        model = self._env.model
        # Shadows and multisampling cost 70 of 80 ms a frame under OSMesa, and show nothing the task needs.
        model.vis.quality.shadowsize = 0
        model.vis.quality.offsamples = 0
        camera = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, _CAMERA)
        model.cam_pos[camera] = _CAMERA_POSITION
        model.cam_fovy[camera] = _CAMERA_FOVY
        try:
            return mujoco.Renderer(model, IMAGE_SIZE, IMAGE_SIZE)
        except Exception as error:
            raise SimulatorError(f"{GL_HELP} ({error})") from error

    def reset(self, seed: int) -> None:
        """Starts the episode that this seed always starts (object and goal positions included)."""
        self._env.seed(seed)
        self._vector, _ = self._env.reset(seed=seed)

    def state(self) -> np.ndarray:
        """Proprioception (4,) float32: hand x, y, z, gripper opening."""
        return self._vector[:PROPRIO_DIM].astype(np.float32)

    def render(self) -> np.ndarray:
        """Camera image (96, 96, 3) uint8, upright."""
        self._renderer.update_scene(self._env.data, camera=_CAMERA)
        return np.ascontiguousarray(self._renderer.render()[::-1, ::-1])

    def expert_action(self) -> np.ndarray:
        """The scripted expert's action (4,) float32, clipped to [-1, 1] as the simulator does."""
        return np.clip(self._expert.get_action(self._vector), -1.0, 1.0).astype(np.float32)

    def step(self, action: np.ndarray) -> bool:
        """Executes a raw action (4,) and returns whether the task is now solved."""
        clipped = np.clip(np.asarray(action, np.float64), -1.0, 1.0)
        self._vector, _, _, _, info = self._env.step(clipped)
        return bool(info["success"])
