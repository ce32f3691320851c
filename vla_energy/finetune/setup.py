"""From flags to the objects that train: policy, data, head. Every clash between them is told before training."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vla_energy.actions import DatasetStatistics, select_statistics
from vla_energy.backbones import CheckpointFolderError, LoadedVLA
from vla_energy.backbones.lora import add_lora
from vla_energy.backbones.openvla import LayerExits
from vla_energy.backbones.tiny import EMBEDDED as EMBEDDED_VLA
from vla_energy.data import DatasetError, RldsDataset, dataset_config
from vla_energy.data.augment import center_crop
from vla_energy.distributed import ALONE, Ranks
from vla_energy.finetune.config import EMBEDDED, FinetuneConfig, FlagError
from vla_energy.finetune.energy import PolicyShape
from vla_energy.finetune.policy import load_vla
from vla_energy.finetune.sharding import shard
from vla_energy.head import EnergyHead

logger = logging.getLogger(__name__)

EMBEDDED_DATA = Path(__file__).parents[1] / "data" / "bundled"
"""Data root of the bundled RLDS shard."""

Batch = dict[str, Tensor]


@dataclass
class Job:
    """What a fine-tuning run works on.

    Attributes:
        vla: the policy on the device, LoRA added if asked.
        train: the training split.
        statistics: what its actions and proprio are normalised with.
        device: of the policy.
        ranks: the processes that train.
    """

    vla: LoadedVLA
    train: RldsDataset
    statistics: DatasetStatistics
    device: torch.device
    ranks: Ranks = ALONE

    def to_batch(self, raw: dict, *, crop: bool = False) -> Batch:
        """A dataset's batch in the host's keys, on the device; `crop` takes the centre, as inference does."""
        images = raw["images"]
        if crop:
            shape = images.shape
            images = center_crop(images.reshape(-1, *shape[2:])).reshape(shape)
        batch = self.vla.processor.batch(images, raw["instructions"], raw["actions"], raw.get("proprio"))
        return {key: value.to(self.device) for key, value in batch.items()}


def vla_folder(config: FinetuneConfig) -> Path:
    """The checkpoint folder that `vla_path` means."""
    return EMBEDDED_VLA if config.vla_path == EMBEDDED else Path(config.vla_path)


def data_root(config: FinetuneConfig) -> Path:
    """The folder that `data_root_dir` means."""
    return EMBEDDED_DATA if config.data_root_dir == EMBEDDED else Path(config.data_root_dir)


def _open(config: FinetuneConfig, name: str, split: str = "train", horizon: int = 8, **more: Any) -> RldsDataset:
    """A dataset with the fields that the flags name."""
    return RldsDataset(
        data_root(config),
        name,
        split,
        horizon,
        num_images=config.num_images_in_input,
        use_proprio=config.use_proprio,
        config=dataset_config(name, config.dataset_config),
        **more,
    )


def _open_for(
    config: FinetuneConfig, vla: LoadedVLA, name: str, split: str, statistics: DatasetStatistics | None, **more: Any
) -> RldsDataset:
    training = split == "train"
    return _open(
        config,
        name,
        split,
        vla.horizon,
        statistics=statistics,
        image_size=vla.processor.image_size,
        image_aug=config.image_aug and training,
        # Held-out frames in stored order would make a batch of neighbours, which are no negatives of each other.
        shuffle_buffer_size=config.shuffle_buffer_size if training else 10_000,
        seed=config.seed,
        num_threads=config.data_threads,
        **more,
    )


def open_split(config: FinetuneConfig, vla: LoadedVLA, split: str, statistics: DatasetStatistics | None) -> RldsDataset:
    """One split of the dataset, in the policy's image size and chunk length."""
    return _open_for(config, vla, config.dataset_name, split, statistics)


def open_rollouts(config: FinetuneConfig, vla: LoadedVLA, statistics: DatasetStatistics) -> RldsDataset | None:
    """The recorded rollouts of `energy.rollouts`, read as the demonstrations are; None where they are off.

    All their episodes are read: none is held out.

    Raises:
        FlagError: the dataset cannot be read, does not fit, or has not the outcomes that what is on needs.
    """
    rollouts = config.energy.rollouts
    if not (config.energy.enabled and rollouts.dataset):
        return None
    where = f"--energy.rollouts.dataset {rollouts.dataset}"
    try:
        data = _open_for(config, vla, rollouts.dataset, "train", statistics, val_fraction=0.0, outcomes=True)
        solved = data.episode_outcomes()
    except DatasetError as error:
        raise FlagError(f"{where}: {error}") from error
    if rollouts.failed and solved.all():
        raise FlagError(f"{where}: all {len(solved)} episodes succeeded: --energy.rollouts.failed must be 0")
    if rollouts.outcome and solved.all() == solved.any():
        kind = "succeeded" if solved.all() else "failed"
        raise FlagError(
            f"{where}: all {len(solved)} episodes {kind}: there is no outcome to tell apart; record more, or set "
            "--energy.rollouts.outcome 0"
        )
    logger.info("%s: %d of %d episodes succeeded", where, solved.sum(), len(solved))
    return data


def prepare(config: FinetuneConfig, ranks: Ranks = ALONE) -> Job:
    """Loads policy and data and checks that they fit; on several ranks the policy goes to the rank's device.

    Raises:
        FlagError, CheckpointFolderError, DatasetError: what does not fit, and the flag that mends it.
    """
    config.check()
    device = ranks.device or _device(config.device)
    folder = vla_folder(config)
    if not folder.is_dir():
        raise CheckpointFolderError(f"{folder} is not a folder; vla_path must be a checkpoint folder on this machine")
    probe = _open(config, config.dataset_name, image_size=(32, 32))
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)  # of a new action head and of LoRA
        vla = load_vla(config, folder, probe.action_dim, probe.proprio_dim)
        if config.use_lora and not config.energy.freeze_backbone:
            add_lora(vla, config.lora_rank, config.lora_dropout)
    # A policy that is trained learns the dataset's; a finished one means its actions in those it was trained with.
    finished = config.energy.freeze_backbone and vla.statistics and not config.new_action_head
    statistics = policy_statistics(vla, config.dataset_name) if finished else probe.statistics
    train = open_split(config, vla, "train", statistics)
    vla.requires_grad_(False) if config.energy.freeze_backbone else None
    vla = vla.to(device)
    if config.fsdp:
        ranks.check_equal((vla,), "before sharding")
        shard(vla, ranks, config.precision)
    return Job(vla, train, statistics, device, ranks)


def policy_statistics(vla: LoadedVLA, dataset: str, name: str | None = None) -> DatasetStatistics:
    """Those that a finished policy's actions are normalised with: `name`'s, its only ones, or those of the dataset.

    Raises:
        StatisticsError: none of this name; or there are several and none of the dataset's.
    """
    return select_statistics(vla.statistics, name or (None if len(vla.statistics) == 1 else dataset))


def layer_exits(config: FinetuneConfig) -> LayerExits:
    """How inner layers are decoded: not at all without an energy head."""
    if not config.energy.enabled:
        return "off"
    return "normed" if config.energy.negatives.layer_exits.normed else "raw"


def make_head(config: FinetuneConfig, vla: PolicyShape) -> EnergyHead:
    """The energy head, fp32; drawing its weights leaves the global random state alone."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return EnergyHead(vla.context_dim, vla.action_dim, vla.horizon, config.energy)


def autocast(config: FinetuneConfig, device: torch.device) -> torch.autocast:
    """bf16 where the flags say so; the head opts out by itself."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).tolist()  # "meta" holds no numbers, a GPU's number may be too high
    except (RuntimeError, AssertionError) as error:  # the second where torch was built without CUDA
        raise FlagError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device
