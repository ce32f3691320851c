"""Checkpoint folders in the host's Hugging Face format: load, save, and load what was saved.

No code of a checkpoint is ever run; its files are read in `weights`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from vla_energy.actions import DatasetStatistics, load_statistics
from vla_energy.backbones.config import CheckpointFolderError, ComponentError, OpenVLAConfig
from vla_energy.backbones.film import COMPONENT, from_host, has_film, is_film, to_host
from vla_energy.backbones.lora import merged_state_dict
from vla_energy.backbones.openvla import OpenVLA
from vla_energy.backbones.processor import Processor
from vla_energy.backbones.weights import (
    DDP_PREFIX,
    fill,
    from_timm,
    head_action_dim,
    head_hidden_dim,
    is_diffusion,
    open_to_readers,
    projector_dim,
    read_component,
    read_weights,
    to_timm,
)
from vla_energy.checkpoint import CheckpointError
from vla_energy.durable import MANIFEST, check_seal

_PROCESSOR_FILES = (
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)
_STATISTICS = "dataset_statistics.json"
_BLOCKS = "language_model.model.layers."
_LARGEST_IMAGE = 2_048  # pixels


class LoadedVLA(OpenVLA):
    """An `OpenVLA` with what lies beside its weights.

    Attributes:
        folder: where it was loaded from.
        processor: makes its batches.
        statistics: per dataset, empty if the folder has none (a base model before fine-tuning).
    """

    folder: Path
    processor: Processor
    statistics: dict[str, DatasetStatistics]


def load_openvla(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    num_images: int = 1,
    use_proprio: bool = False,
    *,
    horizon: int | None = None,
    action_dim: int | None = None,
    proprio_dim: int | None = None,
    new_head: bool = False,
    use_film: bool | None = None,
    discrete: bool | None = None,
    use_diffusion: bool | None = None,
    diffusion_steps: tuple[int, int] | None = None,
) -> LoadedVLA:
    """Loads an OpenVLA or OpenVLA-OFT checkpoint folder, ours or the host's, in eval mode on the CPU.

    Args:
        folder: `config.json`, safetensors, tokenizer, and (after fine-tuning) `dataset_statistics.json`,
            one `action_head--*_checkpoint.pt` (L1 or diffusion, by its weights), one
            `proprio_projector--*_checkpoint.pt`, with a diffusion head one `noisy_action_projector--*_checkpoint.pt`,
            and with FiLM one `vision_backbone--*_checkpoint.pt`, from which the vision towers' weights are then taken.
        dtype: of all weights.
        num_images: images an observation has.
        use_proprio: whether the policy reads proprioception.
        horizon: H, default what `config.json` says, else 8.
        action_dim: A of a *new* action head, for a folder without one; without it such a folder is refused.
        proprio_dim: P of a *new* proprio projector, likewise.
        new_head: take no action head and projector from the folder, make both new.
        use_film: None is what the folder has; True makes *new* FiLM layers for a folder without; False refuses one
            with FiLM.
        discrete: actions are tokens, and an action head in the folder is left out; None is what the folder says, if it
            was trained here. A is the folder's own, `action_dim`, or that of its statistics.
        use_diffusion: a *new* action head is a diffusion head.
        diffusion_steps: of training and of inference, default what `config.json` says, else 50 and 50.

    Raises:
        CheckpointFolderError: a file is missing, doubled, damaged, or does not fit; the message names it. All that is
            read is compared with the checksums of a `manifest.json` beside it, as fine-tuning writes it.
    """
    folder = Path(folder)
    if num_images < 1:
        raise ValueError(f"num_images={num_images}: expected 1 or more")
    if not folder.is_dir():
        raise CheckpointFolderError(f"{folder} is not a folder; vla_path must be a checkpoint folder on this machine")
    _check_files(folder)
    config = OpenVLAConfig.from_folder(folder)
    path = folder / _STATISTICS
    statistics = load_statistics(path) if path.is_file() else {}
    if discrete is None:
        discrete = config.discrete_action_dim is not None
    if discrete:
        action_dim = _discrete_action_dim(config, action_dim, statistics, folder)
    if diffusion_steps is not None:
        train, inference = diffusion_steps
        config = replace(config, num_diffusion_steps_train=train, num_diffusion_steps_inference=inference)
    head = None if new_head or discrete else read_component(folder, "action_head", required=action_dim is None)
    projector = None
    if use_proprio and not new_head:
        projector = read_component(folder, "proprio_projector", required=proprio_dim is None)
    diffusion = bool(use_diffusion) if head is None else is_diffusion(head)
    noisy = read_component(folder, "noisy_action_projector", required=True) if head and diffusion else None
    film = _film(folder, config, use_film)
    weights = to_timm(read_weights(folder))
    _check_sizes(config, weights, folder)
    vla = _build(
        folder,
        config,
        action_dim=head_action_dim(head, config, folder) if head else int(action_dim or 0),
        head_hidden_dim=head_hidden_dim(head) if head else None,
        proprio_dim=projector_dim(projector, folder) if projector else proprio_dim if use_proprio else None,
        num_images=num_images,
        horizon=horizon,
        use_film=film is not None,
        discrete=discrete,
        diffusion=diffusion,
    )
    fill(vla.backbone, _with_film(weights, film, vla), str(folder))
    for name, state in {"action_head": head, "noisy_action_projector": noisy, "proprio_projector": projector}.items():
        if state:
            fill(getattr(vla, name), state, f"{folder}: {name}")
    vla.folder = folder
    vla.processor = Processor.from_folder(folder, config)
    vla.statistics = statistics
    return vla.to(dtype).eval()


def _build(folder: Path, config: OpenVLAConfig, **settings: Any) -> LoadedVLA:
    try:
        return LoadedVLA(config, **settings)
    except CheckpointFolderError:
        raise
    except Exception as error:  # timm and transformers raise what they like on settings that cannot be
        raise CheckpointFolderError(
            f"{folder / 'config.json'}: no model can be built from it ({type(error).__name__}: {error})"
        ) from error


def _discrete_action_dim(
    config: OpenVLAConfig, asked: int | None, statistics: Mapping[str, DatasetStatistics], folder: Path
) -> int:
    dims = {entry.action.dim for entry in statistics.values()}
    known = config.discrete_action_dim or asked or (dims.pop() if len(dims) == 1 else None)
    if known is None:
        raise CheckpointFolderError(f"{folder}: nothing says how many dimensions an action of its tokens has")
    return known


def _check_files(folder: Path) -> None:
    """One flipped bit of an exponent makes an action of 1e36, and still a finite one; so does one of the statistics."""
    names = ("model*.safetensors", "model*.json", "config.json", _STATISTICS, *_PROCESSOR_FILES)
    parts = ("action_head--*", "proprio_projector--*", "noisy_action_projector--*", "vision_backbone--*")

    def is_read(name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in (*names, *parts))

    try:
        check_seal(folder, is_read)
    except CheckpointError as error:
        raise CheckpointFolderError(
            f"{error}; take another copy of the checkpoint, or, if you changed it on purpose, delete its {MANIFEST}"
        ) from error


def _film(folder: Path, config: OpenVLAConfig, use_film: bool | None) -> dict[str, Tensor] | None:
    """Weights of the vision backbone with FiLM; empty where FiLM is asked for and there are none; None without FiLM."""
    if config.use_film and not has_film(folder):
        raise ComponentError(
            f"{folder} was trained with FiLM, but has no {COMPONENT}--*_checkpoint.pt: copy the checkpoint again, whole"
        )
    if use_film is False and has_film(folder):
        raise ComponentError(
            f"{folder} has a {COMPONENT}--*_checkpoint.pt: it was trained with FiLM, and needs use_film"
        )
    if use_film is False or (use_film is None and not has_film(folder)):
        return None
    return from_host(read_component(folder, COMPONENT, required=False) or {})


def _with_film(weights: dict[str, Tensor], film: dict[str, Tensor] | None, vla: OpenVLA) -> dict[str, Tensor]:
    """The backbone's weights: with FiLM the file's vision towers, or new FiLM layers where it is empty."""
    if film is None:
        return weights
    if film:
        return {key: value for key, value in weights.items() if not key.startswith("vision_backbone.")} | film
    return weights | {key: value for key, value in vla.backbone.state_dict().items() if is_film(key)}


def _check_sizes(config: OpenVLAConfig, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Refuses a language model of other sizes than its weights before it is built: sizes may be absurd."""
    text, where = config.text, folder / "config.json"
    blocks = [key.removeprefix(_BLOCKS) for key in weights if key.startswith(_BLOCKS)]
    rows = {"hidden_size": 1, "vocab_size": 0}
    sizes = {
        name: value.shape for key, value in weights.items() if key.endswith("embed_tokens.weight") for name in rows
    }
    found = {name: shape[rows[name]] for name, shape in sizes.items() if len(shape) == 2}
    gates = [value.shape[0] for key, value in weights.items() if key.endswith("gate_proj.weight") and value.ndim == 2]
    found |= {"intermediate_size": gates[0]} if gates else {}
    found |= {"num_hidden_layers": len({key.split(".")[0] for key in blocks})}
    for name, size in found.items():
        if name in text and text[name] != size:
            raise CheckpointFolderError(f"{where}: {name} is {text[name]!r:.50}, the weights have {size}")
    if max(max(pair) for pair in config.image_sizes) > _LARGEST_IMAGE:
        raise CheckpointFolderError(f"{where}: image_sizes {config.image_sizes}: expected at most {_LARGEST_IMAGE}")


def save_openvla(
    vla: OpenVLA,
    folder: str | Path,
    step: int,
    *,
    processor_files: str | Path,
    statistics: Mapping[str, DatasetStatistics],
    center_crop: bool = False,
    merge: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Writes a checkpoint folder that `load_openvla`, and the host, can load.

    Args:
        vla: with or without LoRA adapters.
        folder: is created; files of the same names are replaced.
        step: for the component files' names.
        processor_files: folder to copy the tokenizer and the image settings from.
        statistics: one entry a dataset.
        center_crop: whether the policy expects centre-cropped images, having been trained with random crops.
        merge: fold LoRA adapters into the saved weights; False saves the base and, in `lora_adapter/`, the adapters.
        dtype: of the saved weights.
    """
    folder, source = Path(folder), Path(processor_files)
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        key: value.to(dtype).contiguous()
        for key, value in from_timm(merged_state_dict(vla.backbone, merge=merge)).items()
        if not is_film(key)
    }
    if not merge and hasattr(vla.backbone, "peft_config"):
        vla.backbone.save_pretrained(str(folder / "lora_adapter"))
    save_torch_state_dict(state, str(folder), max_shard_size="5GB")
    for name in _PROCESSOR_FILES:
        if (source / name).is_file() and source.resolve() != folder.resolve():
            shutil.copyfile(source / name, folder / name)
    _save_components(vla, folder, step, dtype)
    discrete = vla.action_dim if vla.discrete else None
    entries = {name: entry.to_dict() for name, entry in statistics.items()}
    head = vla.action_head
    steps = (head.schedule.num_train, head.num_steps_inference) if vla.diffuses else None
    own = vla.config.to_dict(
        vla.horizon, vla.num_images, center_crop, discrete_action_dim=discrete, use_film=vla.use_film, diffusion=steps
    )
    config = {**own, "norm_stats": entries}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / _STATISTICS).write_text(json.dumps(entries, indent=2))
    open_to_readers(folder)
    return folder


def _save_components(vla: OpenVLA, folder: Path, step: int, dtype: torch.dtype) -> None:
    """The host's `.pt` files of what the policy has; older ones go."""
    components: dict[str, dict[str, Tensor] | None] = {
        name: None if module is None else {DDP_PREFIX + key: value for key, value in module.state_dict().items()}
        for name, module in {
            "action_head": vla.action_head,
            "proprio_projector": vla.proprio_projector,
            "noisy_action_projector": vla.noisy_action_projector,
        }.items()
    }
    components[COMPONENT] = to_host(vla.backbone, dtype) if vla.use_film else None  # the host's has no DDP prefix
    for name, tensors in components.items():
        for old in folder.glob(f"{name}--*_checkpoint.pt"):
            old.unlink()  # the host finds components by substring and wants exactly one
        if tensors is not None:
            saved = {key: value.to(dtype).cpu() for key, value in tensors.items()}
            torch.save(saved, folder / f"{name}--{step}_checkpoint.pt")
