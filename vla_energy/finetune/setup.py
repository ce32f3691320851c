"""From flags to the objects that train: policy, data, head. Every clash between them is told here, before training."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vla_energy.actions import DatasetStatistics, select_statistics
from vla_energy.backbones import CheckpointFolderError, LoadedVLA, OpenVLAConfig, load_openvla
from vla_energy.backbones.config import ComponentError
from vla_energy.backbones.film import has_film
from vla_energy.backbones.lora import add_lora
from vla_energy.backbones.openvla import LayerExits
from vla_energy.backbones.tiny import EMBEDDED as EMBEDDED_VLA
from vla_energy.data import DatasetError, RldsDataset, dataset_config
from vla_energy.data.augment import center_crop
from vla_energy.distributed import ALONE, Ranks
from vla_energy.finetune.config import EMBEDDED, FinetuneConfig, FlagError
from vla_energy.finetune.energy import PolicyShape
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


def open_split(config: FinetuneConfig, vla: LoadedVLA, split: str, statistics: DatasetStatistics | None) -> RldsDataset:
    """One split of the dataset, in the policy's image size and chunk length."""
    training = split == "train"
    return RldsDataset(
        data_root(config),
        config.dataset_name,
        split,
        vla.horizon,
        num_images=config.num_images_in_input,
        use_proprio=config.use_proprio,
        config=dataset_config(config.dataset_name, config.dataset_config),
        statistics=statistics,
        image_size=vla.processor.image_size,
        image_aug=config.image_aug and training,
        # Held-out frames in stored order would make a batch of neighbours, which are no negatives of each other.
        shuffle_buffer_size=config.shuffle_buffer_size if training else 10_000,
        seed=config.seed,
        num_threads=config.data_threads,
    )


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
        data = RldsDataset(
            data_root(config),
            rollouts.dataset,
            "train",
            vla.horizon,
            num_images=config.num_images_in_input,
            use_proprio=config.use_proprio,
            config=dataset_config(rollouts.dataset, config.dataset_config),
            statistics=statistics,
            image_size=vla.processor.image_size,
            image_aug=config.image_aug,
            shuffle_buffer_size=config.shuffle_buffer_size,
            seed=config.seed,
            num_threads=config.data_threads,
            val_fraction=0.0,
            outcomes=True,
        )
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
    probe = RldsDataset(
        data_root(config),
        config.dataset_name,
        num_images=config.num_images_in_input,
        use_proprio=config.use_proprio,
        config=dataset_config(config.dataset_name, config.dataset_config),
        image_size=(32, 32),
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)  # of a new action head and of LoRA
        vla = _load(config, folder, probe.action_dim, probe.proprio_dim)
        _check_head(config, vla, folder)
        if vla.action_dim != probe.action_dim:
            raise FlagError(
                f"{config.dataset_name} has {probe.action_dim}-dimensional actions, the action head of {folder} "
                f"{vla.action_dim}; another robot needs --new_action_head True"
            )
        _check_length(config, vla)
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


def _load(config: FinetuneConfig, folder: Path, action_dim: int | None, proprio_dim: int | None) -> LoadedVLA:
    # A bare OpenVLA has no action head and gets a new one; of a checkpoint that was fine-tuned, none may be missing.
    stored = OpenVLAConfig.from_folder(folder)
    fine_tuned = any(folder.glob("*action_head*")) or "vla_energy" in stored.raw
    _check_discrete(config, folder)
    if fine_tuned and not config.new_action_head:
        action_dim, proprio_dim = action_dim if config.discrete else None, None
    elif config.discrete:
        if config.use_proprio and (config.new_action_head or not any(folder.glob("proprio_projector--*"))):
            logger.warning("starting a new proprio projector: %s is taken without", folder)
    else:
        logger.warning("starting a new action head (and proprio projector): %s is taken without", folder)
    if not config.use_proprio and any(folder.glob("proprio_projector--*")):
        logger.warning("%s was trained with proprioception; --use_proprio True would use it", folder)
    _check_film(config, folder)
    steps = config.num_diffusion_steps_train
    known = stored.num_diffusion_steps_inference if stored.num_diffusion_steps_train == steps else steps
    try:
        return load_openvla(
            folder,
            num_images=config.num_images_in_input,
            use_proprio=config.use_proprio,
            horizon=config.horizon or None,
            action_dim=action_dim,
            proprio_dim=proprio_dim,
            new_head=config.new_action_head,
            use_film=config.use_film,
            discrete=config.discrete,
            use_diffusion=config.use_diffusion,
            diffusion_steps=(steps, config.num_diffusion_steps_inference or known),
        )
    except ComponentError as error:
        raise ComponentError(
            f"{error}; --new_action_head True starts both components anew, and a checkpoint with discrete action "
            "tokens needs --use_l1_regression False"
        ) from error


def _check_discrete(config: FinetuneConfig, folder: Path) -> None:
    trained = OpenVLAConfig.from_folder(folder).discrete_action_dim is not None
    if trained and not config.discrete and not config.new_action_head:
        raise FlagError(
            f"{folder} was trained with discrete action tokens: it needs --use_l1_regression False, or "
            "--new_action_head True to start an action head"
        )
    if config.discrete and any(folder.glob("action_head--*")):
        if config.energy.freeze_backbone:
            raise FlagError(
                f"--use_l1_regression False: {folder} was trained with an action head, and "
                "--energy.freeze_backbone True trains no tokens; leave --use_l1_regression out"
            )
        logger.warning("%s has an action head, which discrete action tokens leave out", folder)


def _check_film(config: FinetuneConfig, folder: Path) -> None:
    if has_film(folder) and not config.use_film:
        raise FlagError(f"{folder} was trained with FiLM: it needs --use_film True")
    if config.use_film and not has_film(folder):
        if config.energy.freeze_backbone:
            raise FlagError(
                f"--use_film True: {folder} was trained without FiLM, and --energy.freeze_backbone True trains no new "
                "layers; leave --use_film out"
            )
        logger.warning("starting new FiLM layers: %s is taken without", folder)


def _check_head(config: FinetuneConfig, vla: LoadedVLA, folder: Path) -> None:
    """The action head is of the kind that the flags name, with the noise schedule that it was trained with."""
    anew = "or --new_action_head True for a new one"
    if vla.diffuses != config.use_diffusion:
        kind = "a diffusion" if vla.diffuses else "an L1"
        raise FlagError(
            f"{folder} has {kind} action head: pass --use_diffusion {vla.diffuses} --use_l1_regression "
            f"{not vla.diffuses}, {anew}"
        )
    trained = OpenVLAConfig.from_folder(folder).raw.get("vla_energy", {}).get("num_diffusion_steps_train")
    asked = config.num_diffusion_steps_train
    if vla.diffuses and not config.new_action_head and trained not in (None, asked):
        raise FlagError(
            f"--num_diffusion_steps_train {asked}: the action head of {folder} was trained with {trained}; pass that, "
            f"{anew}"
        )


def _check_length(config: FinetuneConfig, vla: LoadedVLA) -> None:
    """A chunk must fit the language model's positions, with the images and a prompt of up to 64 tokens."""
    limit = int(vla.backbone.language_model.config.max_position_embeddings)
    patches = vla.backbone.vision_backbone.num_patches * config.num_images_in_input
    longest = (limit - patches - 64) // vla.action_dim
    if vla.horizon > longest:
        raise FlagError(f"--horizon {vla.horizon}: the model's {limit} positions hold chunks of at most {longest}")


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
        return torch.device(name)
    except RuntimeError as error:
        raise FlagError(f"--device {name}: {error}") from error
