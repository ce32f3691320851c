"""LIBERO's tasks by name, its libraries without their chatter, and where a scene's furniture and shapes are.

What `libero_env` needs beside the world itself.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np

from vla_energy.data.metaworld_env import GL_HELP, SimulatorError

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
"""The suites with evaluation results in openvla-oft."""
MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520}
"""Episode limit a suite, as in openvla-oft's evaluation; the waiting steps after a reset are not counted."""

_INSTALL = "pip install 'vla-energy[libero]', or from a checkout `make libero`"
# An error that names OpenGL, its libraries or functions (PyOpenGL without OSMesa: "... no attribute 'glGetError'").
_OF_OPENGL = re.compile(r"(?<![A-DF-Z])GL(?!IBC|OB)|\be?gl[A-Z]|(?i:osmesa|\bdisplay\b)")
_IDENTITY = (("pos", "0 0 0"), ("quat", "1 0 0 0"))  # what MuJoCo takes for a body without them


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides what LIBERO prints and robosuite's advice to write a macro file; errors are raised and so stay.

    robosuite also opens a log file in the common temporary folder on import, which fails where another
    user's is there: it gets none.
    """
    logging.disable(logging.WARNING)
    try:
        with (
            open(os.devnull, "w") as null,
            contextlib.redirect_stdout(null),
            mock.patch.object(logging, "FileHandler", lambda *_, **__: logging.NullHandler()),
        ):
            yield
    finally:
        logging.disable(logging.NOTSET)


def load(name: str) -> Any:
    """Imports a module of the simulator.

    Raises:
        SimulatorError: it, LIBERO's assets or an OpenGL library is missing, or the import fails for another reason;
            says what to install.
    """
    try:
        with quiet():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise SimulatorError(f"{error.name} is missing: {_INSTALL}") from error
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        if "asset" in str(error):
            raise SimulatorError(f"LIBERO's asset packages are missing: {_INSTALL} ({error})") from error
        remedy = GL_HELP if _OF_OPENGL.search(str(error)) else f"Install it again: {_INSTALL}"
        raise SimulatorError(f"{name} cannot be imported. {remedy} ({error})") from error


@functools.cache
def suite_table(suite: str) -> dict[str, Any]:
    """The suite's tasks by name, in the benchmark's order."""
    if suite not in SUITES:
        raise ValueError(f"unknown LIBERO suite {suite!r}; known: {', '.join(SUITES)}")
    return dict(load("libero.libero.benchmark").task_maps[suite])


def suite_tasks(suite: str) -> list[str]:
    """Names of a suite's ten tasks, in the benchmark's order.

    Raises:
        ValueError: unknown suite.
        SimulatorError: LIBERO is not installed.
    """
    return list(suite_table(suite))


def task_names() -> list[str]:
    """Names of the tasks of all suites, sorted.

    Raises:
        SimulatorError: LIBERO is not installed.
    """
    return sorted(task for suite in SUITES for task in suite_table(suite))


def check_tasks(tasks: Sequence[str]) -> None:
    """Raises ValueError naming every unknown task and listing the known ones."""
    known = task_names()
    unknown = [task for task in tasks if task not in known]
    if unknown:
        raise ValueError(f"unknown LIBERO task(s) {unknown}; known: {', '.join(known)}")


def suite_of(task: str) -> str:
    """The suite that a task is in. Raises ValueError for an unknown task."""
    check_tasks([task])
    return next(suite for suite in SUITES if task in suite_table(suite))


def instruction(task: str) -> str:
    """The language instruction of a task. Raises ValueError for an unknown one."""
    return suite_table(suite_of(task))[task].language


def unplaced(environment: Any) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Body number, position (3,) and quaternion (4,) of each fixture as the scene's XML has it."""
    furniture = []
    for fixture in environment.fixtures_dict.values():
        element = environment.model.worldbody.find(f".//body[@name='{fixture.root_body}']")
        position, quaternion = (np.array(element.get(key, default).split(), float) for key, default in _IDENTITY)
        furniture.append((environment.sim.model.body_name2id(fixture.root_body), position, quaternion))
    return furniture


def solid_shapes(model: Any, body: int) -> list[tuple[int, np.ndarray]]:
    """Number of each collision shape of an object, and its corners (n, 3) in the shape's own axes.

    Args:
        model: MuJoCo's model.
        body: number of the object's body.
    """
    mine = model.body_rootid[model.geom_bodyid] == model.body_rootid[body]
    solid = (model.geom_contype != 0) | (model.geom_conaffinity != 0)
    return [(geom, _corners(model, geom)) for geom in np.flatnonzero(mine & solid).tolist()]


def _corners(model: Any, geom: int) -> np.ndarray:
    """Vertices of a mesh, or the corners of another shape's bounding box, (n, 3) in the shape's axes."""
    mesh = model.geom_dataid[geom]
    if mesh >= 0:
        first = model.mesh_vertadr[mesh]
        return np.array(model.mesh_vert[first : first + model.mesh_vertnum[mesh]], np.float64)
    signs = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, -1).T
    return model.geom_aabb[geom, :3] + signs * model.geom_aabb[geom, 3:]
