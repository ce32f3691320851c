"""Checkpoint folders in the host's Hugging Face format: load, save, and load what was saved.

Weights are safetensors (single or sharded); action head, proprio projector and a vision backbone with FiLM are the
host's `.pt` files, read with `weights_only=True`. Nothing is unpickled and no code of a checkpoint is ever run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vla_energy.actions import DatasetStatistics, load_statistics
from vla_energy.backbones.config import CheckpointFolderError, ComponentError, OpenVLAConfig, read_json
from vla_energy.backbones.film import COMPONENT, from_host, has_film, is_film, to_host
from vla_energy.backbones.lora import merged_state_dict
from vla_energy.backbones.openvla import OpenVLA
from vla_energy.backbones.processor import Processor
from vla_energy.checkpoint import CheckpointError
from vla_energy.durable import read_torch

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PROCESSOR_FILES = (
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)
_BLOCKS = "language_model.model.layers."
_LARGEST_IMAGE = 2_048  # pixels
_DDP_PREFIX = "module."
_L1_PREFIX, _DIFFUSION_PREFIX = "model.", "noise_predictor.mlp_resnet."


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
        CheckpointFolderError: a file is missing, doubled, damaged, or does not fit; the message names it.
    """
    folder = Path(folder)
    if num_images < 1:
        raise ValueError(f"num_images={num_images}: expected 1 or more")
    if not folder.is_dir():
        raise CheckpointFolderError(f"{folder} is not a folder; vla_path must be a checkpoint folder on this machine")
    config = OpenVLAConfig.from_folder(folder)
    path = folder / "dataset_statistics.json"
    statistics = load_statistics(path) if path.is_file() else {}
    if discrete is None:
        discrete = config.discrete_action_dim is not None
    if discrete:
        action_dim = _discrete_action_dim(config, action_dim, statistics, folder)
    if diffusion_steps is not None:
        train, inference = diffusion_steps
        config = replace(config, num_diffusion_steps_train=train, num_diffusion_steps_inference=inference)
    head = None if new_head or discrete else _component(folder, "action_head", required=action_dim is None)
    projector = None
    if use_proprio and not new_head:
        projector = _component(folder, "proprio_projector", required=proprio_dim is None)
    diffusion = bool(use_diffusion) if head is None else is_diffusion(head)
    prefix = _DIFFUSION_PREFIX if diffusion else _L1_PREFIX
    noisy = _component(folder, "noisy_action_projector", required=True) if head and diffusion else None
    if config.use_film and not has_film(folder):
        raise ComponentError(
            f"{folder} was trained with FiLM, but has no {COMPONENT}--*_checkpoint.pt: copy the checkpoint again, whole"
        )
    film = _film(folder, use_film)
    weights = _to_timm(read_weights(folder))
    _check_sizes(config, weights, folder)
    vla = _build(
        folder,
        config,
        action_dim=_head_action_dim(head, prefix, config, folder) if head else int(action_dim or 0),
        head_hidden_dim=len(head[f"{prefix}fc1.bias"]) if head else None,
        proprio_dim=_proprio_dim(projector, folder) if projector else proprio_dim if use_proprio else None,
        num_images=num_images,
        horizon=horizon,
        use_film=film is not None,
        discrete=discrete,
        diffusion=diffusion,
    )
    if film:
        weights = {key: value for key, value in weights.items() if not key.startswith("vision_backbone.")} | film
    elif film is not None:
        weights |= {key: value for key, value in vla.backbone.state_dict().items() if is_film(key)}
    _load(vla.backbone, weights, str(folder))
    if head:
        _load(vla.action_head, head, f"{folder}: action_head")
    if noisy:
        assert vla.noisy_action_projector is not None
        _load(vla.noisy_action_projector, noisy, f"{folder}: noisy_action_projector")
    if projector:
        assert vla.proprio_projector is not None
        _load(vla.proprio_projector, projector, f"{folder}: proprio_projector")
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
        for key, value in _from_timm(merged_state_dict(vla.backbone, merge=merge)).items()
        if not is_film(key)
    }
    if not merge and hasattr(vla.backbone, "peft_config"):
        vla.backbone.save_pretrained(str(folder / "lora_adapter"))
    save_torch_state_dict(state, str(folder), max_shard_size="5GB")
    for name in _PROCESSOR_FILES:
        if (source / name).is_file() and source.resolve() != folder.resolve():
            shutil.copyfile(source / name, folder / name)
    components: dict[str, dict[str, Tensor] | None] = {
        name: None if module is None else {_DDP_PREFIX + key: value for key, value in module.state_dict().items()}
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
    discrete = vla.action_dim if vla.discrete else None
    entries = {name: entry.to_dict() for name, entry in statistics.items()}
    head = vla.action_head
    steps = (head.schedule.num_train, head.num_steps_inference) if vla.diffuses else None
    own = vla.config.to_dict(
        vla.horizon, vla.num_images, center_crop, discrete_action_dim=discrete, use_film=vla.use_film, diffusion=steps
    )
    config = {**own, "norm_stats": entries}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "dataset_statistics.json").write_text(json.dumps(entries, indent=2))
    return folder


def _discrete_action_dim(
    config: OpenVLAConfig, asked: int | None, statistics: Mapping[str, DatasetStatistics], folder: Path
) -> int:
    dims = {entry.action.dim for entry in statistics.values()}
    known = config.discrete_action_dim or asked or (dims.pop() if len(dims) == 1 else None)
    if known is None:
        raise CheckpointFolderError(f"{folder}: nothing says how many dimensions an action of its tokens has")
    return known


def _film(folder: Path, use_film: bool | None) -> dict[str, Tensor] | None:
    """Weights of the vision backbone with FiLM; empty where FiLM is asked for and there are none; None without FiLM."""
    if use_film is False and has_film(folder):
        raise ComponentError(
            f"{folder} has a {COMPONENT}--*_checkpoint.pt: it was trained with FiLM, and needs use_film"
        )
    if use_film is False or (use_film is None and not has_film(folder)):
        return None
    return from_host(_component(folder, COMPONENT, required=False) or {})


def _component(folder: Path, name: str, *, required: bool) -> dict[str, Tensor] | None:
    """State of the one `<name>--*_checkpoint.pt`, without DDP's prefix; None if absent and not required."""
    found = sorted(folder.glob(f"*{name}*_checkpoint.pt"))
    if not found and not required:
        return None
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ComponentError(f"{folder}: need exactly one {name}--*_checkpoint.pt, found {names}")
    try:
        state = read_torch(found[0])
    except CheckpointError as error:
        raise CheckpointFolderError(str(error)) from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise CheckpointFolderError(f"{found[0]}: expected a dictionary of tensors")
    return {key.removeprefix(_DDP_PREFIX): value for key, value in state.items()}


def _proprio_dim(projector: Mapping[str, Tensor], folder: Path) -> int:
    weight = projector.get("fc1.weight")
    if weight is None or weight.ndim != 2:
        raise CheckpointFolderError(f"{folder}: the file proprio_projector--*_checkpoint.pt holds no proprio projector")
    return weight.shape[1]


def is_diffusion(head: Mapping[str, Tensor]) -> bool:
    """Whether an action head's weights are a diffusion head's."""
    return any(key.startswith(_DIFFUSION_PREFIX) for key in head)


def _head_action_dim(head: dict[str, Tensor], prefix: str, config: OpenVLAConfig, folder: Path) -> int:
    try:
        action_dim, width, _ = (len(head[f"{prefix}{name}.bias"]) for name in ("fc2", "layer_norm1", "fc1"))
    except (KeyError, TypeError) as error:
        raise CheckpointFolderError(
            f"{folder}: the action head is neither an L1 nor a diffusion head, it lacks {error}"
        ) from error
    expected = int(config.text.get("hidden_size", 4096)) * action_dim
    if width != expected:
        raise CheckpointFolderError(f"{folder}: the action head reads {width} features, the model gives {expected}")
    return action_dim


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors, single or sharded, as they are named there.

    Raises:
        CheckpointFolderError: a file is missing or damaged; the message names it.
    """
    names = [_SINGLE]
    if (folder / _INDEX).is_file():
        weight_map = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointFolderError(f"{folder / _INDEX}: no weight_map")
        names = sorted(set(weight_map.values()))
    state: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointFolderError(f"{path} not found; the checkpoint is incomplete")
        try:
            state.update(load_file(path))
        except (SafetensorError, OSError) as error:
            raise CheckpointFolderError(f"{path} is damaged ({error}); copy or download it again") from error
    return state


def _load(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Strict load; complains with names, and never leaves a weight at its random value."""
    own = module.state_dict()
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in own]
    problems += [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointFolderError(f"{where}: weights do not fit: {shown}")
    module.load_state_dict(state)


def _to_timm(state: Mapping[str, Any]) -> dict[str, Any]:
    """The host renames timm's LayerScale parameter, as its Hugging Face version mangles the name `gamma`."""
    return {key.replace(".scale_factor", ".gamma"): value for key, value in state.items()}


def _from_timm(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key.replace(".gamma", ".scale_factor") if key.startswith("vision_backbone.") else key: value
        for key, value in state.items()
    }
