"""FiLM: the instruction scales and shifts the features inside every vision block, and the host's file of it.

openvla-oft's `--use_film True`. The host saves the whole vision backbone in `vision_backbone--{step}_checkpoint.pt`,
LoRA adapters unmerged, and reads it over whatever the other weights say; so do we.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

COMPONENT = "vision_backbone"
"""Name of the host's file."""
HOST_RANK = 32
"""Rank of the adapters that are written for a policy without any: the host's default `lora_rank`, as it loads no FiLM
checkpoint without adapters."""

_PREFIX = "vision_backbone."  # of our backbone, and of the host's wrapper around its towers
_PEFT = "base_model.model."
_BLOCK = re.compile(r"^(\w*featurizer\.blocks\.\d+)\.")
_HOST_FILM = re.compile(r"^(\w*featurizer)\.blocks\.(\d+)\.(scale|shift)\.")
_OWN_FILM = re.compile(r"^film\.(\w*featurizer)\.(\d+)\.(scale|shift)\.")
_LORA_A, _LORA_B = ".lora_A.default.weight", ".lora_B.default.weight"


class FilmLayer(nn.Module):
    """Scale and shift of one block's features, between its attention and its MLP (Perez et al. 2018, `1 + scale`).

    The start is `nn.Linear`'s, as the host's: near the identity for a language model's small embeddings.
    """

    def __init__(self, vision_dim: int, text_dim: int) -> None:
        super().__init__()
        self.scale = nn.Linear(text_dim, vision_dim)
        self.shift = nn.Linear(text_dim, vision_dim)

    def forward(self, features: Tensor, language: Tensor) -> Tensor:
        """`(B, patches, vision_dim)` and `(B, text_dim)` -> `(B, patches, vision_dim)`."""
        return features * (1 + self.scale(language)[:, None]) + self.shift(language)[:, None]


def film_layers(towers: Mapping[str, nn.Module], text_dim: int) -> nn.ModuleDict:
    """A `FilmLayer` for every block of every tower. The last block's output is never read: its layer stays as it is."""
    return nn.ModuleDict(
        {
            name: nn.ModuleList(
                FilmLayer(int(tower.embed_dim), text_dim)  # type: ignore[arg-type]
                for _ in tower.blocks  # type: ignore[union-attr]
            )
            for name, tower in towers.items()
        }
    )


def modulated_features(tower: nn.Module, layers: nn.ModuleList, images: Tensor, language: Tensor) -> Tensor:
    """Patch features `(B, patches, width)` of a timm vision transformer's second-to-last block, without its final norm.

    Args:
        tower: of plain blocks: norm, attention, LayerScale, norm, MLP, LayerScale.
        layers: one `FilmLayer` a block.
        images: `(B, 3, height, width)`.
        language: `(B, text_dim)`.
    """
    x = tower.norm_pre(tower.patch_drop(tower._pos_embed(tower.patch_embed(images))))  # type: ignore[operator]
    for block, film in zip(list(tower.blocks)[:-1], layers, strict=False):  # type: ignore[arg-type]
        x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))  # type: ignore[operator]
        x = film(x, language)
        x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))  # type: ignore[operator]
    return x[:, tower.num_prefix_tokens :]  # type: ignore[misc]


def average_language(embeddings: Tensor, keep: Tensor) -> Tensor:
    """Mean over the kept tokens, `(B, T, D)` and `(B, T)` bool -> `(B, D)`.

    What conditions FiLM: BOS, prompt and stop token. The host's mean counts a training batch's padding too, and has
    none at inference; without it a row means the same in every batch.
    """
    kept = keep[..., None].to(embeddings.dtype)
    return (embeddings * kept).sum(dim=1) / kept.sum(dim=1)


def has_film(folder: Path) -> bool:
    """Whether a checkpoint folder has the host's file of a vision backbone with FiLM."""
    return any(folder.glob(f"{COMPONENT}--*_checkpoint.pt"))


def is_film(key: str) -> bool:
    """Whether a key of the backbone's state is a FiLM layer's: not the base model's, and not adapted by LoRA."""
    return key.removeprefix(_PEFT).startswith(f"{_PREFIX}film.")


def from_host(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The host's file as keys of our backbone, adapters folded in (alpha is `min(rank, 16)` in the host)."""
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.removeprefix(_PREFIX)
        if name.endswith((_LORA_A, _LORA_B)):
            continue
        merged = value
        layer = key.removesuffix(".base_layer.weight")
        if layer != key and layer + _LORA_A in state and layer + _LORA_B in state:
            merged = value.float() + _delta(state[layer + _LORA_A], state[layer + _LORA_B]).reshape(value.shape)
        name = name.replace(".base_layer.", ".").replace(".scale_factor", ".gamma")
        name, films = _HOST_FILM.subn(r"film.\1.\2.\3.", name)
        ours[_PREFIX + (name if films else re.sub(r"^(\w*featurizer\.blocks\.\d+)\.block\.", r"\1.", name))] = merged
    return ours


def _delta(lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """Of a linear or convolution layer, flat: `(out, in)`."""
    rank = len(lora_a)
    return min(rank, 16) / rank * (lora_b.float().flatten(1) @ lora_a.float().flatten(1))


def to_host(backbone: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The host's file of a backbone with FiLM, with its adapters, or with ones that change nothing if it has none.

    Args:
        backbone: our backbone or peft's wrapper around it.
        dtype: of the result.
    """
    parts = {key.removeprefix(_PEFT): value for key, value in backbone.state_dict().items()}
    state = {key.removeprefix(_PREFIX): value for key, value in parts.items() if key.startswith(_PREFIX)}
    if not any(_LORA_A in key for key in state):
        state = _with_idle_adapters(state)
    theirs = {}
    for key, value in state.items():
        name, films = _OWN_FILM.subn(r"\1.blocks.\2.\3.", key)
        name = name if films else _BLOCK.sub(r"\1.block.", name).replace(".gamma", ".scale_factor")
        theirs[_PREFIX + name] = value.to(dtype).cpu().contiguous()
    return theirs


def _with_idle_adapters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    adapted: dict[str, Tensor] = {}
    for key, value in state.items():
        layer, _, parameter = key.rpartition(".")
        weight = state.get(f"{layer}.weight")
        # Weights of linear and convolution layers alone have 2 or 4 dimensions, position embeddings 3.
        if _OWN_FILM.match(key) or weight is None or weight.ndim not in (2, 4):
            adapted[key] = value
            continue
        adapted[f"{layer}.base_layer.{parameter}"] = value
        if parameter == "weight":
            # Not zero both: they could never be trained.
            drawn = torch.randn(HOST_RANK, *weight.shape[1:], generator=generator) / HOST_RANK
            adapted[layer + _LORA_A] = drawn
            adapted[layer + _LORA_B] = drawn.new_zeros(weight.shape[0], HOST_RANK, *([1] * (weight.ndim - 2)))
    return adapted
