"""What `OpenVLA` does with a diffusion head: the noise in a chunk, and chunks out of noise.

The sequence is that of `OpenVLA.forward` with a time-step token behind the last token before the prompt, and with the
noised chunk, a token for each of its numbers, in the action placeholders (openvla-oft).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vla_energy.backbones.diffusion import time_embedding

if TYPE_CHECKING:
    from vla_energy.backbones.openvla import OpenVLA

_ROWS = ("pixel_values", "input_ids", "attention_mask", "labels", "proprio")


def predict_noise(
    vla: OpenVLA, batch: Mapping[str, Any], noisy: Tensor, timesteps: Tensor, features: Tensor | None = None
) -> Tensor:
    """The noise `(B, H, A)` that a diffusion head sees in chunks: what it is trained to say.

    Args:
        vla: with a diffusion head.
        batch: as in `OpenVLA.forward`.
        noisy: `(B, H, A)` noised normalised chunks.
        timesteps: `(B,)` how much noise is in them, see `NoiseSchedule`.
        features: `projector_features (B, F, D)` of an earlier pass on the same rows, in place of the images.

    Raises:
        ValueError: an L1 head, a chunk of another length, or as in `OpenVLA.forward`.
    """
    projector = vla.noisy_action_projector
    if projector is None:
        raise ValueError("the action head is an L1 head: it predicts no noise")
    vla.check(batch)
    tokens = (batch["labels"] > vla.config.action_token_begin).sum(1)
    if noisy.shape[1:] != (vla.horizon, vla.action_dim) or bool((tokens != noisy[0].numel()).any()):
        raise ValueError(
            f"noisy {tuple(noisy.shape)} for action tokens {tokens.tolist()}: expected (B,H,A) with H, A = "
            f"{vla.horizon}, {vla.action_dim}"
        )
    extra = time_embedding(timesteps, vla.context_dim)[:, None]
    proprio = vla.proprio_token(batch) if features is None else None
    if proprio is not None:
        extra = torch.cat([proprio, extra.to(proprio.dtype)], dim=1)
    hidden, _, rows, positions = vla.encode(batch, extra, features, projector(noisy.to(projector.fc1.weight.dtype)))
    return vla.action_head(hidden[-1][rows, positions].to(vla.action_head.dtype))


@torch.no_grad()
def denoise(
    vla: OpenVLA, batch: Mapping[str, Any], features: Tensor, noise: Tensor, steps: int | None = None
) -> Tensor:
    """Chunks `(B, K, H, A)` in float32, from K starting noises a row; the images are not read again.

    Args:
        vla: with a diffusion head, in eval mode unless its dropout is wanted.
        batch: as in `OpenVLA.forward`.
        features: `projector_features (B, F, D)` of a pass on the same rows.
        noise: `(B, K, H, A)`.
        steps: of the denoising, default the action head's.

    Raises:
        ValueError: too many steps, or as in `predict_noise`.
    """
    rows, count = noise.shape[:2]
    there = {key: batch[key] for key in _ROWS if batch.get(key) is not None}
    there = {key: value.repeat_interleave(count, 0) for key, value in there.items()}
    features = features.repeat_interleave(count, 0)
    chunks, schedule = noise.flatten(0, 1).float(), vla.action_head.schedule
    steps = vla.action_head.num_steps_inference if steps is None else steps
    for timestep in schedule.timesteps(steps):
        now = torch.full((rows * count,), float(timestep), device=chunks.device)
        chunks = schedule.step(chunks, predict_noise(vla, there, chunks, now, features), timestep, steps)
    return chunks.unflatten(0, (rows, count))


def sample(
    vla: OpenVLA, batch: Mapping[str, Any], features: Tensor, noise: Tensor | None, steps: int | None
) -> tuple[Tensor, Tensor | None]:
    """The policy's chunk `(B, H, A)` and, where more noise is given, more samples `(B, K, H, A)`; see `denoise`.

    Two denoisings: the policy's own chunk must not move by a rounding error with the number of the others.

    Args:
        vla, batch, features, steps: as in `denoise`.
        noise: `(B, 1+K, H, A)`, the policy's own first; None draws that alone from torch's global state.

    Raises:
        ValueError: noise of another shape, or as in `denoise`.
    """
    shape = (len(features), vla.horizon, vla.action_dim)
    noise = torch.randn(shape)[:, None] if noise is None else noise
    if noise.ndim != 4 or noise.shape[1] < 1 or (len(noise), *noise.shape[2:]) != shape:
        raise ValueError(f"noise {tuple(noise.shape)}: expected (B,1+K,H,A) with B, H, A = {shape}")
    noise = noise.to(features.device)
    policy = denoise(vla, batch, features, noise[:, :1], steps)[:, 0]
    return policy, denoise(vla, batch, features, noise[:, 1:], steps) if noise.shape[1] > 1 else None
