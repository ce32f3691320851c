"""The policy's chunks for the same observation seen through slightly shifted, slightly enlarged crops: candidates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vla_energy.config import CandidatesConfig
from vla_energy.data.augment import crop

if TYPE_CHECKING:
    from vla_energy.backbones import LoadedVLA


def random_crops(images: np.ndarray, count: int, side: float, generator: torch.Generator) -> np.ndarray:
    """`count` crops of one observation, each at a random place, another one for each camera.

    Args:
        images: `(cameras, h, w, 3)` uint8.
        count: K.
        side: of a crop relative to the image, above 0 and at most 1.
        generator: of the places; on the CPU.

    Returns:
        `(K, cameras, h, w, 3)` uint8.
    """
    places = torch.rand(count, len(images), 2, generator=generator, dtype=torch.float64).numpy() * (1 - side)
    return np.stack([[crop(image, at, side) for image, at in zip(images, row, strict=True)] for row in places])


def crop_chunks(
    vla: LoadedVLA,
    images: np.ndarray,
    instructions: Sequence[str],
    proprio: Tensor | None,
    generators: Sequence[torch.Generator],
    config: CandidatesConfig,
) -> Tensor:
    """Chunks `(B,K,H,A)`, normalised, of `config.crops` = K crops of each observation; no gradient, dropout off.

    The cost is a forward of B * K more rows: what asking the policy K times more costs.

    Args:
        vla: the policy.
        images: `(B, cameras, h, w, 3)` uint8, whole: a crop stands in the place of the centre crop.
        instructions: B.
        proprio: `(B,P)` normalised, or None for a policy without.
        generators: B, of each row's places and of a diffusion policy's samples, whatever its batch.
        config: uses `crops`, 1 or more, and `crop_scale`.

    Raises:
        ValueError: no crop is asked for, or the arguments are not of B rows.
    """
    count, rows = config.crops, (len(images), len(instructions), len(generators))
    if count < 1:
        raise ValueError(f"candidates.crops={count}: expected 1 or more")
    if len(set(rows)) > 1 or (proprio is not None and len(proprio) != len(images)):
        raise ValueError(f"images, instructions, generators are of {rows} rows, proprio must be too")
    views = [random_crops(row, count, config.crop_scale, own) for row, own in zip(images, generators, strict=True)]
    repeated = None if proprio is None else proprio.repeat_interleave(count, 0)
    texts = [text for text in instructions for _ in range(count)]
    batch = vla.processor.batch(np.concatenate(views), texts, proprio=repeated)
    device = next(vla.parameters()).device
    noise = None
    if vla.diffuses:  # a sample for each crop
        shape = (count, 1, vla.horizon, vla.action_dim)
        noise = torch.cat([torch.randn(shape, generator=own) for own in generators])
    actions = vla.predict({key: value.to(device) for key, value in batch.items()}, "off", noise).actions
    return actions.unflatten(0, (len(images), count))
