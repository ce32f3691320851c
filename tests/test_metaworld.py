"""The recorder: real simulator, real experts, an RLDS folder that our reader reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vla_energy.data import RldsDataset


def _record(out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    # A process of its own: TensorFlow and OSMesa crash each other when one process loads both.
    command = [sys.executable, "-m", "vla_energy.data.metaworld", "--name", "metaworld_mine", "--out", str(out)]
    return subprocess.run([*command, *flags], capture_output=True, text=True, timeout=300)


@pytest.mark.usefixtures("simulator")
def test_recorded_demonstrations_are_read_back(tmp_path: Path) -> None:
    flags = ["--tasks", "handle-press,drawer-close", "--episodes", "2", "--val-episodes", "1", "--noise-share", "1"]
    result = _record(tmp_path, *flags, "--seed", "3", "--workers", "1")
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "metaworld_mine" / "1.0.0"
    info = json.loads((folder / "dataset_info.json").read_text())
    assert {split["name"]: int(split["shardLengths"][0]) for split in info["splits"]} == {"train": 4, "val": 2}
    train, val = (
        RldsDataset(tmp_path, "metaworld_mine", split, 8, use_proprio=True, shuffle_buffer_size=1)
        for split in ("train", "val")
    )
    assert (train.num_episodes, val.num_episodes, train.action_dim, train.proprio_dim) == (4, 2, 4, 4)
    frames = list(train.batches(1, repeat=False))
    assert {frame["instructions"][0] for frame in frames} == {"handle press", "drawer close"}
    images = np.stack([frame["images"][0, 0] for frame in frames])
    assert images.shape[1:] == (96, 96, 3) and images.std() > 20
    # The scene moves within an episode, and episodes differ by their seeds.
    first = images[: sum(int(frame["episode"][0]) == 0 for frame in frames)]
    assert np.abs(first[-1].astype(int) - first[0].astype(int)).mean() > 1
    actions = np.concatenate([frame["actions"][:, 0] for frame in frames])
    assert np.abs(actions).max() <= 1 and actions.std(0)[:3].min() > 0.05


@pytest.mark.usefixtures("simulator")
def test_several_styles_start_to_both_sides(tmp_path: Path) -> None:
    flags = ["--tasks", "drawer-close", "--episodes", "6", "--val-episodes", "1", "--noise-share", "0"]
    result = _record(tmp_path, *flags, "--styles", "several", "--workers", "1")
    assert result.returncode == 0, result.stderr
    data = RldsDataset(tmp_path, "metaworld_mine", "train", 4, use_proprio=True, shuffle_buffer_size=1)
    (info,) = (tmp_path / "metaworld_mine").glob("*/dataset_info.json")
    assert "styles: several" in info.read_text()
    firsts: dict[int, np.ndarray] = {}
    for frame in data.batches(1, repeat=False):
        chunk = data.statistics.action.unnormalize(torch.tensor(frame["actions"][0])).numpy()
        firsts.setdefault(int(frame["episode"][0]), chunk[:, 0])
    assert {bool((first > 0.5).all()) for first in firsts.values()} == {True, False}
    assert all((abs(first) > 0.5).all() for first in firsts.values())


@pytest.mark.usefixtures("simulator")
def test_unknown_task_lists_those_there_are(tmp_path: Path) -> None:
    result = _record(tmp_path, "--tasks", "reach,fly")
    assert result.returncode != 0
    assert "['fly']" in result.stderr and "drawer-open" in result.stderr
    assert not (tmp_path / "metaworld_mine").exists() and "Traceback" not in result.stderr


def test_an_existing_dataset_is_not_reused(tmp_path: Path) -> None:
    (tmp_path / "metaworld_mine").mkdir()
    result = _record(tmp_path, "--tasks", "reach")
    assert result.returncode != 0 and "exists already" in result.stderr


_LOOK_AHEAD = """
import sys
import numpy as np
sys.path.insert(0, "benchmarks")
from oracle_metaworld import OracleMetaWorld
world, looks = OracleMetaWorld("drawer-close"), sys.argv[1] == "look"
world.reset(3)
seen, answers = [], []
for _ in range(12):
    seen.append(np.concatenate([world.render().ravel(), world.state().view(np.uint8)]))
    if looks:
        answers.append(world.extras()["expert"].reshape(-1, 4))
    action = world.expert_action()
    if looks:
        np.testing.assert_array_equal(answers[-1][0], action)
    world.step(action)
    if len(answers) > 1:
        np.testing.assert_array_equal(answers[-1][0], answers[-2][1])
np.save(sys.argv[2], np.stack(seen))
"""


@pytest.mark.usefixtures("simulator")
def test_looking_ahead_foretells_the_expert_and_leaves_the_world_as_it_was(tmp_path: Path) -> None:
    for look in ("look", "plain"):
        done = subprocess.run(
            [sys.executable, "-c", _LOOK_AHEAD, look, str(tmp_path / look)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    seen, plain = np.load(tmp_path / "look.npy"), np.load(tmp_path / "plain.npy")
    np.testing.assert_array_equal(seen, plain)
    assert (seen[0] != seen[-1]).any()
