"""Rollouts of suites, with the backend's own limits: on a line, and in LIBERO."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_rollout import FakePolicy

from vla_energy.actions import RawActions
from vla_energy.data.metaworld_env import GL_HELP, SimulatorError
from vla_energy.rollout.interface import Decision, Request
from vla_energy.rollout.run import Settings, run_rollouts
from vla_energy.rollout.simulator import backend_info, expand_tasks

TASK = "pick_up_the_black_bowl_on_the_stove_and_place_it_on_the_plate"
LINE = "line_suite:PointWorld"
LINE_SUITE = """
from point_world import ACTION_DIM, PointWorld, instruction
SUITES = ("both", "close")
MAX_STEPS = {"both": 9, "close": 30}
def task_names(): return ["near", "far"]
def suite_tasks(suite): return ["near", "far"] if suite == "both" else ["near"]
"""


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A backend with suites, without a simulator."""
    (tmp_path / "line_suite.py").write_text(LINE_SUITE)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.syspath_prepend(str(tmp_path))


class Lift:
    """Moves the hand up, and opens the gripper if it looks at the right things."""

    horizon, action_dim = 4, 7
    arms = frozenset({"policy"})
    metadata: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self) -> None:
        self.images: list[np.ndarray] = []
        self.proprios: list[np.ndarray] = []

    def act(self, requests: Sequence[Request], arm: str) -> Sequence[Decision]:
        for request in requests:
            seen = request.observation
            assert seen.instruction == "pick up the black bowl on the stove and place it on the plate"
            self.images.append(seen.images)
            self.proprios.append(seen.proprio)
        return [Decision(RawActions(np.tile([0.0, 0, 1, 0, 0, 0, 1], (4, 1)))) for _ in requests]


def _rollouts(policy: Any, tasks: list[str], episodes: int, **options: Any) -> dict[str, Any]:
    return run_rollouts(policy, tasks, episodes, ["policy"], workers=1, **options)


@functools.cache
def _lifted() -> tuple[Lift, dict[str, Any]] | str:
    """Two episodes of LIBERO; the reason if it cannot run here."""
    policy = Lift()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIBERO_IMAGE_SIZE", "64")
        try:
            return policy, _rollouts(policy, [TASK], 2, max_steps=8, backend="libero")
        except SimulatorError as error:
            missing = "pip install" in str(error) or GL_HELP in str(error)
            if not missing or os.environ.get("CI"):
                raise
            return str(error)


@pytest.fixture(scope="module")
def libero_simulator() -> tuple[Lift, dict[str, Any]]:
    """Two episodes; skips where LIBERO or OpenGL is not installed, with the reason; in CI there has to be one."""
    found = _lifted()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.mark.usefixtures("line")
def test_a_suite_is_its_tasks_with_the_backends_limit() -> None:
    result = _rollouts(FakePolicy(), ["both"], 2, backend=LINE)
    settings = result["settings"]
    assert settings["tasks"] == ["near", "far"] and list(result["tasks"]) == ["near", "far"]
    assert settings["max_steps"] == 30 and settings["step_limits"] == {"near": 30, "far": 9}
    assert {e["steps"] for e in result["episodes"] if e["task"] == "far"} == {9}
    given = _rollouts(FakePolicy(), ["far", "near"], 1, backend=LINE, max_steps=5)["settings"]
    assert given["max_steps"] == 5 and given["step_limits"] == {"far": 5, "near": 5}


@pytest.mark.usefixtures("line")
def test_unknown_names_and_tasks_in_two_suites_are_refused() -> None:
    with pytest.raises(ValueError, match=f"unknown {LINE} .* nowhere; known: both, close, far, near"):
        expand_tasks(["both", "nowhere"], LINE)
    for names in (["both", "far"], ["close", "both"]):
        with pytest.raises(ValueError, match="given twice, themselves or in a suite: (far|near)"):
            expand_tasks(names, LINE)


def test_metaworld_keeps_its_limit() -> None:
    from vla_energy.data import metaworld_env

    assert metaworld_env.MAX_STEPS == 150 and not hasattr(metaworld_env, "SUITES")


@pytest.mark.parametrize("seed, episodes, left", [(0, 51, 50), (49, 2, 1), (70, 1, 0)])
def test_more_episodes_than_fixed_states_are_refused_before_anything_runs(seed: int, episodes: int, left: int) -> None:
    policy = Lift()
    with pytest.raises(ValueError, match=f"50 fixed initial states .* there are {left} episodes, not {episodes}"):
        _rollouts(policy, ["no such task"], episodes, seed=seed, backend="libero")
    assert not policy.images


@pytest.mark.usefixtures("libero_simulator")
def test_libero_suites() -> None:
    info = backend_info("libero")
    tasks = expand_tasks(["libero_goal", TASK], "libero")
    assert len(tasks) == 11 and tasks[-1] == TASK and TASK in expand_tasks(["libero_spatial"], "libero")
    assert {suite: len(names) for suite, names in info.suites.items()} == dict.fromkeys(info.suites, 10)
    assert info.action_dim == 7 and len(info.tasks) == 40
    settings = Settings(["libero_goal", TASK], 50, ["policy"], 0, 4, None, 1, "libero").resolve()
    assert settings.max_steps == 300 and settings.step_limits[TASK] == 220
    with pytest.raises(ValueError, match="unknown libero task.*libero_90; known: libero_spatial, libero_object"):
        expand_tasks(["libero_90"], "libero")


def test_two_episodes_of_libero(libero_simulator: tuple[Lift, dict[str, Any]]) -> None:
    policy, result = libero_simulator
    assert [(e["seed"], e["steps"], e["success"]) for e in result["episodes"]] == [
        (1_000_000, 8, False),
        (1_000_001, 8, False),
    ]
    assert [image.shape for image in policy.images] == [(2, 64, 64, 3)] * 4
    first, later, other = (image.astype(int) for image in policy.images[:3])
    assert first[0].std() > 10 and first[1].std() > 10
    assert np.abs(first - later).mean() > 1 and np.abs(first - other).max() > 30  # the hand moved; another state
    heights = [proprio[2] for proprio in policy.proprios]
    assert heights[1] > heights[0] + 0.01 and policy.proprios[0].shape == (8,)
