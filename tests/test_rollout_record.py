"""Rollouts recorded as RLDS datasets: read back, kept after failures, and without influence on the results."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_rollout import BACKEND, FakePolicy, rollouts

from vla_energy import cli
from vla_energy.data import RldsDataset, dataset_config, libero, libero_env, metaworld
from vla_energy.data.metaworld_env import SimulatorError
from vla_energy.rollout import record
from vla_energy.rollout.record import FIELDS, Recorder, RecordingError, check_target, convention
from vla_energy.rollout.run import EVALUATION_SEED_OFFSET
from vla_energy.rollout.simulator import SimulatorProcess
from vla_energy.rollout.spool import SUFFIX, Trace, load_layout
from vla_energy.rollout.world import Observation


@pytest.fixture(autouse=True)
def _backend_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def stored_episodes(root: Path, name: str = "rollouts") -> list[dict[str, Any]]:
    """What is stored, read with tensorflow-datasets alone."""
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(str(root / name / "1.0.0"))
    episodes = []
    for episode in builder.as_dataset(split="train"):
        metadata = {key: value.numpy() for key, value in episode["episode_metadata"].items()}
        metadata = {key: value.decode() if isinstance(value, bytes) else value for key, value in metadata.items()}
        episodes.append({**metadata, "steps": list(episode["steps"].as_numpy_iterator())})
    return episodes


def reader(root: Path, name: str = "rollouts", **options: Any) -> RldsDataset:
    config = dataset_config(name, root / name / FIELDS)
    return RldsDataset(
        root, name, horizon=4, config=config, use_proprio=True, shuffle_buffer_size=0, val_fraction=0, **options
    )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A data root with `rollouts`, two tasks and two arms, and the results of that run."""
    root = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        return root, rollouts(record=root)


def test_every_episode_is_stored_with_its_outcome(recorded: tuple[Path, dict[str, Any]]) -> None:
    root, result = recorded
    episodes = stored_episodes(root)
    told = {(e["task"], e["arm"], e["seed"]): (e["success"], e["steps"]) for e in result["episodes"]}
    assert {(e["task"], e["arm"], e["seed"]): (e["success"], len(e["steps"])) for e in episodes} == told
    assert len(episodes) == 20 and {e["success"] for e in episodes} == {True, False}
    assert min(e["seed"] for e in episodes) == 3 + EVALUATION_SEED_OFFSET
    for episode in episodes:
        steps, solved = episode["steps"], episode["success"]
        assert [s["is_first"] for s in steps] == [True] + [False] * (len(steps) - 1)
        assert [s["is_last"] for s in steps] == [False] * (len(steps) - 1) + [True]
        assert [s["reward"] for s in steps] == [0.0] * (len(steps) - 1) + [float(solved)]
        assert steps[-1]["is_terminal"] == solved and not any(s["is_terminal"] for s in steps[:-1])
        assert {float(s["discount"]) for s in steps} == {1.0}
        assert {s["language_instruction"] for s in steps} == {f"go {episode['task']}".encode()}
    assert result["meta"]["recorded"] == str(root / "rollouts" / "1.0.0")
    assert [path.name for path in root.iterdir() if path.name.startswith("rollouts")] == ["rollouts"]


def test_each_step_has_what_was_seen_before_its_action(recorded: tuple[Path, dict[str, Any]]) -> None:
    for episode in stored_episodes(recorded[0]):
        states = np.stack([step["observation"]["state"] for step in episode["steps"]])
        actions = np.stack([step["action"] for step in episode["steps"]])
        assert states[0, 0] == 0 and actions.dtype == np.float32
        np.testing.assert_allclose(np.diff(states[:, 0]), actions[:-1, 0], atol=1e-6)
        reached = states[-1, 0] + actions[-1, 0]
        assert (abs(reached - states[-1, 1]) < 0.1) == episode["success"]
        brightness = [step["observation"]["image"].mean() for step in episode["steps"]]
        assert np.abs(brightness - (20 * states[:, 0]).astype(int) % 256).max() < 3  # JPEG


def test_recording_changes_no_result(recorded: tuple[Path, dict[str, Any]]) -> None:
    plain = rollouts()
    assert plain["episodes"] == recorded[1]["episodes"] and "recorded" not in plain["meta"]


def test_the_world_draws_more_only_while_recording() -> None:
    actions = np.full((3, 1), 0.1)
    with SimulatorProcess("far", BACKEND) as world:
        first = world.reset(0)
        recording = world.execute(actions, record=True)
        seen = [frame.proprio[0] for frame in recording.frames]
        np.testing.assert_allclose(seen, [0, 0.1, 0.2], atol=1e-6)
        assert np.array_equal(recording.frames[0].images, first.images)
        after = world.execute(actions)
        assert after.frames == () and after.observation is not None
        again = world.execute(actions[:1], observe=False, record=True)
        assert again.frames[0].proprio == pytest.approx(after.observation.proprio) and again.observation is None


def test_our_reader_gives_outcomes_where_asked(recorded: tuple[Path, dict[str, Any]]) -> None:
    root, result = recorded
    dataset = reader(root, outcomes=True)
    assert (dataset.action_dim, dataset.proprio_dim, dataset.num_episodes) == (1, 2, 20)
    frames = [
        (b["episode"][0], b["step"][0], b["success"][0], b["remaining"][0])
        for b in dataset.batches(1, repeat=False, drop_last=False)
    ]
    lengths = {episode: 1 + max(step for e, step, *_ in frames if e == episode) for episode, *_ in frames}
    assert all(step + remaining == lengths[episode] - 1 for episode, step, _, remaining in frames)
    solved = {episode for episode, _, success, _ in frames if success}
    assert len(solved) == sum(e["success"] for e in result["episodes"])
    batch = next(reader(root, outcomes=True).batches(5))
    assert batch["success"].dtype == bool and batch["success"].shape == (5,) and batch["remaining"].dtype == np.int64
    assert not {"success", "remaining"} & set(next(reader(root).batches(5)))


def test_what_is_there_is_refused_before_the_first_episode(tmp_path: Path) -> None:
    policy = FakePolicy()
    (tmp_path / "there").mkdir()
    (tmp_path / f"killed{SUFFIX}").mkdir()
    for name, message in (
        ("there", "there exists already: take another name, or delete it"),
        (
            "killed",
            "recording that was killed, or is going on: write them with `python -m .*killed.unfinished`, delete",
        ),
        ("No-Snake", "'No-Snake': expected snake case"),
    ):
        with pytest.raises(ValueError, match=message):
            rollouts(policy, record=tmp_path, record_name=name)
    assert not policy.batches
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"killed{SUFFIX}", "there"]


def test_nothing_runs_without_tensorflow_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install 'vla-energy\\[data\\]'"):
        rollouts(record=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failure_midway_keeps_the_finished_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SimulatorError, match="physics exploded"):
        rollouts(tasks=["near", "raises", "far"], episodes=2, record=tmp_path)
    assert {(e["task"], e["arm"]) for e in stored_episodes(tmp_path)} == {("near", "policy"), ("near", "rerank")}
    assert "4 recorded episodes of the finished tasks are in" in capsys.readouterr().err
    assert not list(tmp_path.glob(f"*{SUFFIX}"))


def test_a_failure_before_the_first_task_is_finished_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(SimulatorError, match="physics exploded"):
        rollouts(tasks=["raises"], record=tmp_path)
    assert not list(tmp_path.iterdir())


def test_episodes_are_kept_if_the_dataset_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(record, "write_dataset", full)
        with pytest.raises(RecordingError, match=r"disk full.*20 recorded episodes are kept in .*rollouts\.unfinished"):
            rollouts(record=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"rollouts{SUFFIX}"]
    command = [sys.executable, "-m", "vla_energy.rollout.record", str(tmp_path / f"rollouts{SUFFIX}")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(tmp_path / "rollouts" / "1.0.0")]
    assert len(stored_episodes(tmp_path)) == 20 and not list(tmp_path.glob(f"*{SUFFIX}"))


def test_a_folder_without_finished_tasks_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no recorded rollouts"):
        record.write(tmp_path)
    Recorder(tmp_path, "mine", BACKEND, "")
    with pytest.raises(ValueError, match="no task was finished in .*mine.unfinished: delete it"):
        record.write(tmp_path / f"mine{SUFFIX}")


def _spooled(root: Path, backend: str, frame: Observation, actions: np.ndarray) -> Recorder:
    """A recorder with one finished task of one episode that always sees `frame`."""
    recorder = Recorder(root, convention(backend).name, backend, "synthetic")
    trace = Trace()
    recorder.extend(trace, [frame] * len(actions), actions)
    recorder.add(trace, "t", 1, "policy@4", False)
    recorder.finish_task()
    return recorder


def test_libero_is_stored_as_its_recorder_stores_it(tmp_path: Path) -> None:
    size = 16
    frame = Observation(
        np.stack([np.full((size, size, 3), value, np.uint8) for value in (50, 200)]),
        np.arange(8, dtype=np.float32),
        "do it",
        {"joint_state": np.arange(7.0)},
    )
    policy = np.array([[2.0, 0.5, 0, 0, 0, -3.0, gripper] for gripper in (1.0, 0.51, 0.5, 0.0)])
    with _spooled(tmp_path, "libero", frame, policy):
        (file,) = (tmp_path / f"libero_rollouts{SUFFIX}").glob("*/*.npz")
        assert load_layout(file).observation == libero.layout(size).observation
    (episode,) = stored_episodes(tmp_path, "libero_rollouts")
    actions = np.stack([step["action"] for step in episode["steps"]])
    np.testing.assert_array_equal(actions[:, 6], [-1, -1, 1, 1])
    np.testing.assert_array_equal(actions[0, :6], [1, 0.5, 0, 0, 0, -1])
    assert episode["arm"] == "policy@4" and episode["file_path"] == "rollout/t/policy@4/seed_1"
    assert set(episode) == {"task", "seed", "success", "noise_std", "arm", "file_path", "steps"}
    assert json.loads((tmp_path / "libero_rollouts" / FIELDS).read_text()) == {
        "libero_rollouts": json.loads(json.dumps(asdict(dataset_config("libero_spatial_no_noops"))))
    }
    dataset = RldsDataset(
        tmp_path, "libero_rollouts", horizon=1, num_images=2, use_proprio=True, shuffle_buffer_size=0, val_fraction=0
    )
    (batch,) = dataset.batches(4, repeat=False)
    np.testing.assert_array_equal(batch["actions"][:, 0, 6], [1, 1, 0, 0])
    assert batch["images"][:, 0].mean() == pytest.approx(50, abs=3) and batch["images"][0, 1].mean() > 190


def test_libero_executes_what_is_recorded() -> None:
    executed: list[np.ndarray] = []

    class Environment(libero_env.Libero):
        def __init__(self) -> None:
            pass

        def step_raw(self, action: np.ndarray) -> bool:
            executed.append(action)
            return False

    actions = np.random.default_rng(0).uniform(-1.5, 1.5, (6, 7))
    for action in actions:
        Environment().step(action)
    np.testing.assert_array_equal(convention("libero").executed(actions), executed)


def test_metaworld_is_stored_as_its_recorder_stores_it(tmp_path: Path) -> None:
    frame = Observation(np.zeros((1, 96, 96, 3), np.uint8), np.zeros(4, np.float32), "do it")
    with _spooled(tmp_path, "metaworld", frame, np.array([[2.0, 0.5, -2.0, 0.3]])):
        (file,) = (tmp_path / f"metaworld_rollouts{SUFFIX}").glob("*/*.npz")
        layout = load_layout(file)
        assert (layout.observation, layout.action_dim) == (metaworld.LAYOUT.observation, metaworld.LAYOUT.action_dim)
    (episode,) = stored_episodes(tmp_path, "metaworld_rollouts")
    np.testing.assert_allclose(episode["steps"][0]["action"], [1, 0.5, -1, 0.3])
    assert check_target(tmp_path, None, "vla_energy.data.libero_env:Libero") == "libero_rollouts"


def test_tasks_that_look_different_are_refused_while_they_run(tmp_path: Path) -> None:
    recorder = _spooled(
        tmp_path, BACKEND, Observation(np.zeros((1, 4, 4, 3), np.uint8), np.zeros(2), ""), np.ones((1, 1))
    )
    trace = Trace()
    recorder.extend(trace, [Observation(np.zeros((1, 4, 4, 3), np.uint8), np.zeros(3), "")], np.ones((1, 1)))
    with pytest.raises(ValueError, match="other: one dataset cannot hold observations"):
        recorder.add(trace, "other", 1, "policy", True)


def test_the_command_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import types

    module = types.SimpleNamespace(load_policy=lambda checkpoint, device, strict: FakePolicy())
    monkeypatch.setitem(sys.modules, "vla_energy.rollout.policy", module)
    out = tmp_path / "result.json"
    flags = [
        "rollout",
        "--checkpoint",
        "fake",
        "--tasks",
        "near",
        "--episodes",
        "2",
        "--sim",
        BACKEND,
        "--out",
        str(out),
    ]
    assert cli.main([*flags, "--record-name", "mine"]) == 2
    assert "without --record" in capsys.readouterr().err
    record_flags = ["--record", str(tmp_path / "data"), "--record-name", "mine"]
    assert cli.main([*flags, *record_flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["meta"]["recorded"] == str(tmp_path / "data" / "mine" / "1.0.0")
    assert len(stored_episodes(tmp_path / "data", "mine")) == 4
    assert cli.main([*flags, *record_flags]) == 2
    assert "exists already" in capsys.readouterr().err
