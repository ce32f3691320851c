"""A vision backbone with FiLM for the golden checkpoint, the same in the host's environment and in ours."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

NAME = "vision_backbone--1000_checkpoint.pt"


def film_state(checkpoint: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The host's `vision_backbone` file: the checkpoint's towers, and drawn adapters and FiLM layers.

    Drawn numbers are integers times a power of two: the same on every machine, and exact in bf16.

    Args:
        checkpoint: folder with the towers.
        shapes: of every tensor, by the host's names.
    """
    base = load_file(checkpoint / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name in sorted(shapes):
        plain = name.replace(".block.", ".").replace(".base_layer.", ".")
        if plain in base:
            state[name] = base[plain].float()
        else:
            power = 10 if ".lora_" in name or ".scale." in name or ".shift." in name else None
            assert power is not None, f"{name} is neither the checkpoint's nor an adapter's nor FiLM's"
            state[name] = torch.randint(-127, 128, tuple(shapes[name]), generator=generator).float() / 2**power
    return state


def copy_checkpoint(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint's files in a new folder that may be written."""
    folder.mkdir(parents=True)
    for path in checkpoint.iterdir():  # not copytree: the goldens may be read-only
        shutil.copyfile(path, folder / path.name)
    return folder
