"""The policy that the flags name: what a checkpoint has, what is started anew, what does not fit together."""

from __future__ import annotations

import logging
from pathlib import Path

from vla_energy.backbones import LoadedVLA, OpenVLAConfig, load_openvla
from vla_energy.backbones.config import ComponentError
from vla_energy.backbones.film import has_film
from vla_energy.finetune.config import FinetuneConfig, FlagError

logger = logging.getLogger(__name__)


def load_vla(config: FinetuneConfig, folder: Path, action_dim: int, proprio_dim: int) -> LoadedVLA:
    """The policy on the CPU, with what the flags add to the checkpoint.

    Args:
        config: of the run.
        folder: of the checkpoint.
        action_dim, proprio_dim: of the dataset.

    Raises:
        FlagError, CheckpointFolderError: what does not fit, and the flag that mends it.
    """
    vla = _load(config, folder, action_dim, proprio_dim)
    _check_head(config, vla, folder)
    if vla.action_dim != action_dim:
        raise FlagError(
            f"{config.dataset_name} has {action_dim}-dimensional actions, the action head of {folder} "
            f"{vla.action_dim}; another robot needs --new_action_head True"
        )
    _check_length(config, vla)
    return vla


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
