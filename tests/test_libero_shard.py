"""A real recording of LIBERO, read as a user reads one: fields, conventions, statistics, and a step of training.

The shard in `tests/libero/` is made by

    python -m vla_energy.data.libero --suite libero_spatial --tasks TASKS --episodes 2 --val-episodes 1 \
        --image-size 64 --out tests/libero
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vla_energy.backbones.tiny import EMBEDDED
from vla_energy.config import EnergyConfig
from vla_energy.data import RldsDataset
from vla_energy.data.rlds_folder import find_folder
from vla_energy.finetune.config import FinetuneConfig
from vla_energy.finetune.trainer import Trainer

ROOT, NAME = Path(__file__).parent / "libero", "libero_spatial_no_noops"
TASKS = (
    "pick up the black bowl from table center and place it on the plate",
    "pick up the black bowl on the stove and place it on the plate",
)


def read(split: str) -> RldsDataset:
    return RldsDataset(ROOT, NAME, split, 8, num_images=2, use_proprio=True, shuffle_buffer_size=0)


def test_the_shard_is_small() -> None:
    assert sum(file.stat().st_size for file in find_folder(ROOT, NAME).iterdir()) < 4_000_000


@pytest.mark.parametrize(("split", "episodes"), [("train", 4), ("val", 2)])
def test_episodes_follow_the_conventions(split: str, episodes: int) -> None:
    data = read(split)
    statistics = data.statistics
    assert data.num_episodes == episodes and statistics.action.dim == 7
    assert statistics.proprio is not None and statistics.proprio.dim == 8
    batches = list(data.batches(16, repeat=False, drop_last=False))
    chunks = np.concatenate([batch["actions"] for batch in batches])
    images = np.concatenate([batch["images"] for batch in batches])
    instructions = {text for batch in batches for text in batch["instructions"]}
    assert instructions == set(TASKS)
    assert chunks.shape == (data.num_frames, 8, 7) and images.shape == (data.num_frames, 2, 64, 64, 3)
    # The gripper is 1 open .. 0 closed and not normalised; every episode begins open and closes on the bowl.
    assert set(np.unique(chunks[..., -1])) == {0.0, 1.0}
    assert np.abs(chunks[..., :6]).max() <= 1
    numbers = np.concatenate([batch["episode"] for batch in batches])
    for episode in np.unique(numbers):
        own = chunks[numbers == episode]
        assert 40 < len(own) < 220 and own[0, 0, -1] == 1 and (own[:, 0, -1] == 0).sum() > 10
    # Two cameras see different things, and what they see changes.
    main, wrist = images[:, 0].astype(float), images[:, 1].astype(float)
    assert np.abs(main - wrist).mean() > 20
    assert np.abs(wrist[0] - wrist[len(wrist) // 2]).mean() > 5


def test_the_state_is_hand_axis_angle_and_fingers() -> None:
    proprio = read("train").statistics.proprio
    assert proprio is not None
    low, high = proprio.min, proprio.max
    assert (low[:3] > (-0.5, -0.5, 0.8)).all() and (high[:3] < (0.3, 0.5, 1.5)).all()  # metres, above the table
    assert low[3] > 2.5 and high[3] < 3.8  # the hand points down: half a turn about x
    assert -0.045 < low[7] < high[7] < 0 < low[6] < high[6] < 0.045  # fingers mirror each other


def test_a_step_of_training_on_two_cameras(tmp_path: Path) -> None:
    config = FinetuneConfig(
        vla_path=str(EMBEDDED), data_root_dir=str(ROOT), dataset_name=NAME, run_root_dir=tmp_path,
        run_id_override="run", num_images_in_input=2, use_proprio=True, new_action_head=True, use_lora=False,
        image_aug=False, batch_size=4, max_steps=2, save_freq=2, save_latest_checkpoint_only=True, precision="fp32",
        shuffle_buffer_size=50, wandb_log_freq=1, device="cpu", energy=EnergyConfig(),
    )  # fmt: skip
    torch.manual_seed(0)
    Trainer(config).run()
    saved = json.loads((tmp_path / "run" / "latest" / "dataset_statistics.json").read_text())
    assert saved[NAME]["num_trajectories"] == 4 and len(saved[NAME]["action"]["q99"]) == 7
    assert json.loads((tmp_path / "run" / "latest" / "config.json").read_text())["vla_energy"]["num_images"] == 2
