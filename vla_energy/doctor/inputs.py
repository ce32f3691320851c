"""Is every input read? Each camera, proprioception and the instruction are changed in turn, and the chunk must move."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vla_energy.doctor.findings import Finding, Subject
from vla_energy.doctor.policy import Batch, Policy, make_batch

LEAST = 1e-6
"""Change of a normalised action below which an input counts as unread."""
NOISE_FACTOR = 10
"""The change must also exceed this multiple of what two identical runs differ by."""

_CAMERA = (
    "the policy does not see: it repeats what it learnt for the instruction. Stock transformers from 4.50 on can drop "
    "images without a word",
    "install the host's transformers fork (4.40.1) or use our backbone; if both see nothing, the checkpoint's vision "
    "weights are damaged or zero: copy it again",
)
_PROPRIO = (
    "the policy does not feel where the hand is, though it was trained with it",
    "look at proprio_projector--*_checkpoint.pt: zero, or of another run",
)
_WORDS = (
    "the policy does the same whatever it is asked to do",
    "the language model's weights are damaged: copy it again",
)


def inputs(subject: Subject) -> Iterator[Finding]:
    """A finding for each input."""
    policy = subject.loaded
    batch = make_batch(policy, (12,))
    before = policy(batch)
    noise = float((policy(batch) - before).abs().max())
    for name, changed, (cost, remedy) in variants(policy, batch):
        moved = float((policy(changed) - before).abs().max())
        if moved > max(LEAST, NOISE_FACTOR * noise):
            yield Finding(name, "ok", f"{policy.kind}: read; another one moves the chunk by {moved:.1e}")
        else:
            text = f"{policy.kind}: not read; another one moves the chunk by {moved:.1e} (two equal runs: {noise:.1e})"
            yield Finding(name, "problem", text, cost, remedy)


def variants(policy: Policy, batch: Batch) -> Iterator[tuple[str, Batch, tuple[str, str]]]:
    """The batch with one input replaced by another, its name, and what it costs and takes if nothing moves."""
    other = make_batch(policy, (12,), seed=1)
    width = batch["pixel_values"].shape[1] // policy.num_images
    for camera in range(policy.num_images):
        pixels = batch["pixel_values"].clone()
        part = slice(camera * width, (camera + 1) * width)
        pixels[:, part] = other["pixel_values"][:, part]
        yield f"camera {camera + 1}", {**batch, "pixel_values": pixels}, _CAMERA
    if policy.proprio_dim is not None:
        yield "proprioception", {**batch, "proprio": other["proprio"]}, _PROPRIO
    # The prompt alone: action placeholders, their labels and the stop token stay.
    words = torch.where(batch["labels"] == -100, other["input_ids"], batch["input_ids"])
    yield "instruction", {**batch, "input_ids": words}, _WORDS
