"""The LIBERO recorder: its layout on disk, what it leaves out, what it refuses; one episode with the real simulator."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rollout_libero import TASK, libero_simulator  # noqa: F401

from vla_energy.data import RldsDataset, libero, libero_expert, metaworld, recording
from vla_energy.data import libero_env as lb

SIZE = 16
NAME = "libero_spatial_no_noops"
LENGTHS = {0: 5, 1: 6, 5000: 4}
"""Steps of the synthetic episodes by seed."""


def _episode(seed: int) -> recording.Episode:
    rng = np.random.default_rng(seed)
    steps = []
    for index in range(LENGTHS[seed]):
        image = np.full((SIZE, SIZE, 3), 20 * index + seed % 7, np.uint8)
        observation = {
            "image": recording.jpeg(image, 95),
            "wrist_image": recording.jpeg(255 - image, 95),
            "state": rng.normal(size=8).astype(np.float32),
            "joint_state": rng.normal(size=7).astype(np.float32),
        }
        gripper = -1.0 if index < 3 else 1.0
        action = np.append(rng.uniform(-1, 1, 6), gripper).astype(np.float32)
        steps.append(recording.make_step(observation, action, f"Do {seed}", first=index == 0))
    metadata = {"task": "t", "seed": seed, "success": True, "noise_std": 0.0, "file_path": f"scripted/{seed}"}
    return {"steps": recording.finish(steps), "episode_metadata": metadata}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training episodes and one for validation, written by the builder's writer."""
    path = tmp_path_factory.mktemp("libero")
    splits = {"train": lambda: map(_episode, (0, 1)), "val": lambda: map(_episode, (5000,))}
    recording.write_dataset(path, NAME, libero.layout(SIZE), splits, "synthetic")
    return path


def test_the_stored_fields_are_those_of_the_hosts_data(root: Path) -> None:
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(str(root / NAME / "1.0.0"))
    steps = builder.info.features["steps"]
    spec = {
        "/".join(filter(None, (parent, key))): (feature.shape, np.dtype(feature.np_dtype).name)
        for parent, group in (("", steps), ("observation", steps["observation"]))
        for key, feature in group.items()
        if key != "observation"
    }
    image, flag, number, text = ((SIZE, SIZE, 3), "uint8"), ((), "bool"), ((), "float32"), ((), "object")
    assert spec == {
        "observation/image": image,
        "observation/wrist_image": image,
        "observation/state": ((8,), "float32"),
        "observation/joint_state": ((7,), "float32"),
        "action": ((7,), "float32"),
        "language_instruction": text,
        "discount": number,
        "reward": number,
        "is_first": flag,
        "is_last": flag,
        "is_terminal": flag,
    }
    for example in builder.as_dataset("train+val"):
        metadata = {key: value.numpy() for key, value in example["episode_metadata"].items()}
        assert set(metadata) == {"file_path", "task", "seed", "success", "noise_std"}
        expected = _episode(int(metadata["seed"]))["steps"]
        stored = list(example["steps"])
        flags = {key: [bool(step[key]) for step in stored] for key in ("is_first", "is_last", "is_terminal")}
        first, last = [True] + [False] * (len(stored) - 1), [False] * (len(stored) - 1) + [True]
        assert flags == {"is_first": first, "is_last": last, "is_terminal": last}
        for step, made in zip(stored, expected, strict=True):
            assert np.array_equal(step["action"], made["action"])  # the gripper as the environment's command
            for key in ("state", "joint_state"):
                assert np.array_equal(step["observation"][key], made["observation"][key])


def test_our_reader_reads_it_with_its_statistics(root: Path) -> None:
    train, val = (
        RldsDataset(root, NAME, split, 8, num_images=2, use_proprio=True, shuffle_buffer_size=0)
        for split in ("train", "val")
    )
    assert (train.num_episodes, train.num_frames, val.num_frames) == (2, 11, 4)
    actions = np.concatenate([[step["action"] for step in _episode(seed)["steps"]] for seed in (0, 1)])
    states = np.concatenate([[step["observation"]["state"] for step in _episode(seed)["steps"]] for seed in (0, 1)])
    actions[:, -1] = np.where(actions[:, -1] < 0, 1.0, 0.0)
    proprio = train.statistics.proprio
    assert proprio is not None
    assert np.allclose(train.statistics.action.q99, np.quantile(actions.astype(np.float64), 0.99, axis=0))
    assert np.allclose(proprio.q01, np.quantile(states.astype(np.float64), 0.01, axis=0))
    assert train.statistics.action.mask.tolist() == [True] * 6 + [False]
    frames = list(val.batches(1, repeat=False))
    assert [frame["actions"][0, 0, -1] for frame in frames] == [1, 1, 1, 0]  # 1 open, 0 closed
    for index, frame in enumerate(frames):
        assert frame["instructions"] == ["Do 5000"] and frame["images"].shape == (1, 2, SIZE, SIZE, 3)
        main, wrist = frame["images"][0].astype(int)
        assert np.abs(main - 20 * index - 5000 % 7).max() <= 2 and np.abs(wrist + main - 255).max() <= 3


class _Script:
    """World and expert at once: plays a list of actions, and is solved by the last."""

    def __init__(self, actions: list[np.ndarray]) -> None:
        self.task, self.actions = TASK, actions
        self.played: list[np.ndarray] = []

    def reset(self, seed: int) -> None:
        self.played = []

    def action(self, world: Any) -> np.ndarray:
        return self.actions[len(self.played)]

    def step_raw(self, action: np.ndarray) -> bool:
        self.played.append(action)
        return len(self.played) == len(self.actions)


_ACTIONS = st.tuples(st.sampled_from([0.0, 1e-6, 0.5]), st.sampled_from([-1.0, 1.0])).map(
    lambda pair: np.array([pair[0], 0, 0, 0, 0, 0, pair[1]])
)


@settings(deadline=None)
@given(st.lists(_ACTIONS, min_size=1, max_size=12))
def test_no_op_steps_are_executed_but_not_recorded(actions: list[np.ndarray]) -> None:
    script: Any = _Script(actions)
    wanted = libero.LiberoRecording(TASK, 1, 0, 0.0, "libero_spatial", SIZE, "one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(libero, "_expert", lambda *_: script)
        patch.setattr(libero, "_observe", lambda _: {"count": len(script.played)})
        patch.setattr(libero.lb, "instruction", lambda _: "do it")
        steps, noops = libero._run_expert(script, wanted, 0, 0.0)
    assert np.array_equal(script.played, np.asarray(actions, np.float32))  # undisturbed, all executed
    recorded = [] if steps is None else steps
    assert len(recorded) + noops == len(actions)
    gripper: Any = None
    kept = []
    for index, action in enumerate(actions):
        if abs(action[0]) >= 1e-4 or (gripper is not None and action[-1] != gripper):
            kept.append(index)
            gripper = action[-1]
    assert [step["observation"]["count"] for step in recorded] == kept
    assert [step["is_first"] for step in recorded] == [index == 0 for index in range(len(kept))]
    assert [step["reward"] for step in recorded] == [0.0] * (len(kept) - 1) + [1.0] * bool(kept)
    again = None
    for step in recorded:  # what is recorded has nothing left to filter
        assert not libero.is_noop(step["action"], again)
        again = float(step["action"][-1])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"suite": "libero_90"}, "no experts for the suite 'libero_90'; there are for: libero_spatial"),
        ({"episodes": 0}, "episodes=0.*expected 1 to 1250"),
        ({"episodes": 1251}, "seeds of training and validation would meet"),
        ({"seed": 999_000}, "fixed states of the evaluation"),
        ({"noise_share": 1.5}, "noise_share=1.5"),
        ({"styles": "many"}, "styles='many': expected one of one, several"),
        ({"image_size": 0}, "image_size=0"),
    ],
)
def test_bad_settings_are_refused_before_recording(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    settings = {"suite": "libero_spatial", "episodes": 1, "val_episodes": 0, **changes}
    with pytest.raises(ValueError, match=message):
        libero.build(str(tmp_path), **settings)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="mine exists already"):
        libero.build(str(tmp_path), "libero_spatial", 1, 0, name="mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.usefixtures("libero_simulator")
def test_a_task_of_another_suite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"not in libero_object: {TASK}; its tasks: pick_up_the_alphabet"):
        libero.build(str(tmp_path), "libero_object", 1, 0, tasks=[TASK])


@pytest.mark.parametrize("styles", ["one", "several"])
def test_styles_reach_the_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, styles: str) -> None:
    given: dict[str, list[libero.LiberoRecording]] = {}
    monkeypatch.setattr(libero, "run_alone", lambda *_: [TASK])
    monkeypatch.setattr(libero, "record_dataset", lambda *arguments: given.update(arguments[4]))
    flags = ["--suite", "libero_spatial", "--out", str(tmp_path), "--styles", styles]
    monkeypatch.setattr(sys, "argv", ["libero", *flags])
    libero.main()
    assert [recording.styles for split in ("train", "val") for recording in given[split]] == [styles] * 2

    script: Any = _Script([np.full(7, 0.5)])
    drawn = []
    monkeypatch.setattr(libero, "Expert", lambda _, style: drawn.append(style) or script)
    monkeypatch.setattr(libero, "_observe", lambda _: {})
    monkeypatch.setattr(libero.lb, "instruction", lambda _: "do it")
    for seed in (3, 3, 4):
        libero._run_expert(script, given["train"][0], seed, 0.0)
    first, again, other = drawn
    if styles == "one":
        assert drawn == [None] * 3
    else:
        assert first == again and len({first, other, libero_expert.Style()}) == 3


def test_a_task_named_twice_is_refused_before_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = ["open_a", "open_b", "open_a"]
    message = "named more than once: open_a; give each task once"
    monkeypatch.setattr(recording, "record_all", lambda *_: pytest.fail("recorded"))
    for module in (libero, metaworld):
        monkeypatch.setattr(module, "run_alone", lambda *_: tasks)  # what looks the tasks up in the simulator
    with pytest.raises(ValueError, match=message):
        libero.build(str(tmp_path), "libero_goal", 1, 0, tasks=tasks)
    with pytest.raises(ValueError, match=message):
        metaworld.build(str(tmp_path), "mine", tasks, 1, 0)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def half_a_suite(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tasks of a Goal suite whose second task has no expert."""
    tasks = ["open_a", "open_b", "open_c"]
    monkeypatch.setattr(lb, "suite_tasks", lambda _: tasks)
    monkeypatch.setattr(lb, "suite_of", lambda _: "libero_goal")
    monkeypatch.setattr(libero_expert, "_SINGLE_TASKS", {"libero_goal": ("open_c", "open_a")})
    return tasks


def test_a_partly_covered_suite_loses_no_task_silently(half_a_suite: list[str]) -> None:
    assert libero_expert.tasks_with_expert("libero_goal") == ["open_a", "open_c"]
    assert [libero_expert.has_expert(task) for task in half_a_suite] == [True, False, True]
    refusal = "no expert for open_b of libero_goal; give the rest as --tasks: open_a,open_c"
    for tasks in (None, ["open_b"], half_a_suite):
        with pytest.raises(ValueError, match=refusal):
            libero.choose_tasks("libero_goal", tasks)
    assert libero.choose_tasks("libero_goal", ["open_c"]) == ["open_c"]
    libero_expert.require_experts("libero_spatial", half_a_suite)
    with pytest.raises(ValueError, match="of libero_10; suites that have: libero_spatial, libero_object, libero_goal"):
        libero_expert.require_experts("libero_10", ["open_a"])


def _solve(task: str) -> tuple[list[str], int, int]:
    """Phases of an expert's first fixed state, its steps, and those that do nothing."""
    world = lb.Libero(task)
    world.reset(lb.FIXED_STATES_FROM)
    expert, phases, actions = libero_expert.Expert(world), [], []
    for _ in range(lb.MAX_STEPS["libero_goal"]):
        actions.append(expert.action(world))
        phases.append(expert.phase)
        if world.step_raw(actions[-1]):
            return list(dict.fromkeys(phases)), len(actions), sum(libero.is_noop(action, None) for action in actions)
    return phases, len(actions), -1


@pytest.mark.usefixtures("libero_simulator")
@pytest.mark.parametrize(
    "task, last",
    [
        ("open_the_middle_drawer_of_the_cabinet", "pull"),
        ("turn_on_the_stove", "turn"),
        ("pick_up_the_alphabet_soup_and_place_it_in_the_basket", "carry"),
    ],
)
def test_experts_that_open_turn_and_place_in_a_basket(task: str, last: str) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        phases, steps, still = pool.apply(_solve, (task,))
    assert phases == ["reach", "close", last] and steps < 120 and still == 0


@pytest.mark.usefixtures("libero_simulator")
def test_which_tasks_have_an_expert() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        counts = [len(pool.apply(libero_expert.tasks_with_expert, (suite,))) for suite in lb.SUITES]
    assert counts == [10, 10, 10, 0]


def _recorded(wanted: libero.LiberoRecording) -> Iterator[recording.Episode]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield from pool.apply(libero.record, (wanted,))


@pytest.mark.usefixtures("libero_simulator")
def test_an_episode_of_the_simulator() -> None:
    wanted = libero.LiberoRecording(TASK, 1, 3, 0.0, "libero_spatial", 32, "several")
    (episode,) = _recorded(wanted)
    seed = episode["episode_metadata"]["seed"]
    assert episode["episode_metadata"]["file_path"] == f"scripted/libero_spatial/{TASK}/seed_{seed}"
    steps = episode["steps"]
    assert 40 < len(steps) <= 220 and steps[-1]["is_last"]
    actions = np.stack([step["action"] for step in steps])
    assert actions.dtype == np.float32 and np.abs(actions).max() <= 1 and set(actions[:, -1]) == {-1.0, 1.0}
    states, joints = (np.stack([step["observation"][key] for step in steps]) for key in ("state", "joint_state"))
    assert states.shape[1] == 8 and joints.shape[1] == 7 and np.ptp(joints, axis=0).max() > 0.1
    assert steps[0]["language_instruction"] == "pick up the black bowl on the stove and place it on the plate"
