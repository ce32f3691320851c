"""Weights in a checkpoint folder, read with care: safetensors, and the host's `.pt` files of components.

Safetensors are single or sharded; action head, projectors and a vision backbone with FiLM are `.pt` files, read with
`weights_only=True`. Nothing is unpickled.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vla_energy.backbones.config import CheckpointFolderError, ComponentError, OpenVLAConfig, read_json
from vla_energy.checkpoint import CheckpointError
from vla_energy.durable import is_file, read_torch
from vla_energy.results import require_regular

DDP_PREFIX = "module."
"""Before every name in the host's `.pt` files of components, but for the vision backbone's."""
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_LONGEST_NAME = 255  # of a file, in most file systems
_L1_PREFIX, _DIFFUSION_PREFIX = "model.", "noise_predictor.mlp_resnet."


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors, single or sharded, as they are named there.

    Raises:
        CheckpointFolderError: a file is missing or damaged; the message names it.
    """
    index = folder / _INDEX
    names = _shards(index) if index.is_file() else [_SINGLE]
    state: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        if not is_file(path):
            raise CheckpointFolderError(f"{path} not found; the checkpoint is incomplete")
        try:
            state.update(load_file(path))
        except (SafetensorError, OSError) as error:
            raise CheckpointFolderError(f"{path} is damaged ({error}); copy or download it again") from error
    return state


def open_to_readers(folder: Path) -> None:
    """Gives the policy's safetensors in a folder the mode of its `config.json`, which is as the umask says.

    safetensors makes its files for the owner alone, and nobody else on a shared machine could load the checkpoint.
    """
    for pattern in ("model*.safetensors", "lora_adapter/*.safetensors"):
        for path in folder.glob(pattern):
            shutil.copymode(folder / "config.json", path)


def _shards(index: Path) -> list[str]:
    """Names of the files beside an index that its weights are in; whatever else stands there is refused."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointFolderError(f"{index}: no weight_map")
    for key, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointFolderError(
                f"{index}: weight_map: {key!r:.80}: expected a file's name, not {type(name).__name__}"
            )
        if not name or Path(name).name != name or len(name) > _LONGEST_NAME or not name.isprintable():
            raise CheckpointFolderError(f"{index}: weight_map: {name!r:.80} is not the name of a file in this folder")
    return sorted(set(weight_map.values()))


def read_component(folder: Path, name: str, *, required: bool) -> dict[str, Tensor] | None:
    """State of the one `<name>--*_checkpoint.pt`, without DDP's prefix; None if absent and not required.

    Raises:
        ComponentError: there are several, or none where it is required.
        CheckpointFolderError: it is damaged.
    """
    found = sorted(folder.glob(f"*{name}*_checkpoint.pt"))
    if not found and not required:
        return None
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ComponentError(f"{folder}: need exactly one {name}--*_checkpoint.pt, found {names}")
    try:
        require_regular(found[0])
        state = read_torch(found[0])
    except (CheckpointError, OSError) as error:
        raise CheckpointFolderError(str(error)) from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise CheckpointFolderError(f"{found[0]}: expected a dictionary of tensors")
    return {key.removeprefix(DDP_PREFIX): value for key, value in state.items()}


def projector_dim(projector: Mapping[str, Tensor], folder: Path) -> int:
    """P of a proprio projector's weights."""
    weight = projector.get("fc1.weight")
    if weight is None or weight.ndim != 2:
        raise CheckpointFolderError(f"{folder}: the file proprio_projector--*_checkpoint.pt holds no proprio projector")
    return weight.shape[1]


def is_diffusion(head: Mapping[str, Tensor]) -> bool:
    """Whether an action head's weights are a diffusion head's."""
    return any(key.startswith(_DIFFUSION_PREFIX) for key in head)


def _prefix(head: Mapping[str, Tensor]) -> str:
    return _DIFFUSION_PREFIX if is_diffusion(head) else _L1_PREFIX


def head_hidden_dim(head: Mapping[str, Tensor]) -> int:
    """Width of an action head's weights."""
    return len(head[f"{_prefix(head)}fc1.bias"])


def head_action_dim(head: Mapping[str, Tensor], config: OpenVLAConfig, folder: Path) -> int:
    """A of an action head's weights.

    Raises:
        CheckpointFolderError: it is none, or of another language model.
    """
    prefix = _prefix(head)
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


def fill(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Strict load; complains with names, and never leaves a weight at its random value.

    Raises:
        CheckpointFolderError: names or shapes do not fit, or a weight is not finite.
    """
    own = module.state_dict()
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in own]
    problems += [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    # One that is not finite makes every action NaN, and says nothing.
    problems += [f"{key} is not finite" for key in own if key in state and not bool(state[key].isfinite().all())]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointFolderError(f"{where}: weights do not fit: {shown}")
    module.load_state_dict(state)


def to_timm(state: Mapping[str, Any]) -> dict[str, Any]:
    """The host renames timm's LayerScale parameter, as its Hugging Face version mangles the name `gamma`."""
    return {key.replace(".scale_factor", ".gamma"): value for key, value in state.items()}


def from_timm(state: Mapping[str, Any]) -> dict[str, Any]:
    """The names that `to_timm` takes."""
    return {
        key.replace(".gamma", ".scale_factor") if key.startswith("vision_backbone.") else key: value
        for key, value in state.items()
    }
