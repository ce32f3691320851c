"""Is attention bidirectional? By influence, not by version: earlier states must move with a later token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vla_energy.doctor.findings import Finding, Subject
from vla_energy.doctor.host import CAUSAL_COST, CAUSAL_REMEDY
from vla_energy.doctor.policy import Batch, Policy, hidden_states, make_batch

LEAST = 1e-5
"""Influence, in standard deviations of the hidden states, below which a token is unseen: a causal model has 0."""
NOISE_FACTOR = 10
"""Influence must also exceed this multiple of what two identical runs differ by."""


def attention(subject: Subject) -> Iterator[Finding]:
    """Without padding, with padding, and whether padding itself is hidden."""
    policy = subject.loaded
    alone, padded = make_batch(policy, (12,)), make_batch(policy, (12, 7))
    for name, batch, row in (("attention", alone, 0), ("attention, padded batch", padded, 1)):
        moved, noise = influence(policy, batch, row)
        if moved > max(LEAST, NOISE_FACTOR * noise):
            yield Finding(
                name, "ok", f"{policy.kind}: bidirectional; a later token moves earlier states by {moved:.1e}"
            )
        else:
            text = (
                f"{policy.kind}: causal; a later token moves earlier states by {moved:.1e}, two equal runs {noise:.1e}"
            )
            yield Finding(name, "problem", text, CAUSAL_COST, CAUSAL_REMEDY)
    leak, noise = influence(policy, padded, 1, after_end=True)
    if leak <= max(LEAST, NOISE_FACTOR * noise):
        yield Finding("padding", "ok", f"{policy.kind}: hidden from attention")
    else:
        yield Finding(
            "padding", "problem", f"{policy.kind}: visible; a padding token moves the states before it by {leak:.1e}",
            "a chunk depends on the longest prompt of its batch: training and inference differ",
            "pad on the right and pass attention_mask",
        )  # fmt: skip


def influence(policy: Policy, batch: Batch, row: int, *, after_end: bool = False) -> tuple[float, float]:
    """How far a token moves earlier hidden states, and how far two identical runs differ.

    Both are largest absolute differences over the row's earlier valid positions, in standard deviations of its states.

    Args:
        policy: is run three times.
        batch: from `make_batch`.
        row: that is looked at.
        after_end: disturb the first padding token instead of the last valid one.
    """
    before, again = hidden_states(policy, batch), hidden_states(policy, batch)
    length = int(batch["attention_mask"][row].sum()) + before.shape[1] - batch["input_ids"].shape[1]
    position = length if after_end else length - 1
    after = hidden_states(policy, batch, (row, position))
    states = before[row, :position]
    return _largest(states, after[row, :position]), _largest(states, again[row, :position])


def _largest(before: Tensor, after: Tensor) -> float:
    return float((after - before).abs().max() / before.std().clamp_min(torch.finfo(torch.float32).tiny))
