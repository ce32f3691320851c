"""Prompts and action placeholders as token ids: put together, taken apart, found again. No model is needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100
STOP_ID = 2
"""Llama's end-of-sequence token, which closes every action sequence."""


def without_actions(batch: Mapping[str, Any], action_token_begin: int) -> dict[str, Any]:
    """`input_ids` and `attention_mask` of the prompts alone, for a batch with or without `labels`."""
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    if batch.get("labels") is not None:
        mask = mask & ((batch["labels"] > action_token_begin).cumsum(dim=1) == 0)
        longest = int(mask.sum(dim=1).max())
        ids, mask = ids[:, :longest], mask[:, :longest]
    return {"input_ids": ids, "attention_mask": mask}


def ending_in(prompts: Mapping[str, Any], token: int, pad_id: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` with `token` put behind every row that does not end in it."""
    ids, mask = prompts["input_ids"], prompts["attention_mask"].bool()
    lengths = mask.sum(dim=1, keepdim=True)
    lacking = ids.gather(1, lengths - 1) != token
    ids = torch.cat([ids.masked_fill(~mask, pad_id), ids.new_full((len(ids), 1), pad_id)], dim=1)
    ids = ids.scatter(1, lengths, torch.where(lacking, token, pad_id))
    total = lengths + lacking
    ids = ids[:, : int(total.max())]
    return {"input_ids": ids, "attention_mask": torch.arange(ids.shape[1], device=ids.device)[None] < total}


def append_actions(prompts: Mapping[str, Tensor], tokens: Tensor, stop_id: int, pad_id: int) -> dict[str, Tensor]:
    """Puts action tokens and the stop token behind each prompt, before its padding.

    Args:
        prompts: `input_ids` and `attention_mask`, `(B, T)`, padded on the right.
        tokens: `(B, H*A)`.

    Returns:
        `input_ids`, `attention_mask` and `labels`, `(B, T + H*A + 1)`.
    """
    mask = prompts["attention_mask"].bool()
    tail = torch.cat([tokens, tokens.new_full((len(tokens), 1), stop_id)], dim=1)
    lengths = mask.sum(dim=1, keepdim=True)
    positions = lengths + torch.arange(tail.shape[1], device=tail.device)
    shape = (len(tail), mask.shape[1] + tail.shape[1])
    ids = torch.full(shape, pad_id, dtype=tail.dtype, device=tail.device)
    ids[:, : mask.shape[1]] = prompts["input_ids"].masked_fill(~mask, pad_id)
    labels = torch.full(shape, IGNORE_INDEX, dtype=tail.dtype, device=tail.device)
    attention_mask = torch.arange(shape[1], device=tail.device)[None] < lengths + tail.shape[1]
    return {
        "input_ids": ids.scatter(1, positions, tail),
        "attention_mask": attention_mask,
        "labels": labels.scatter(1, positions, tail),
    }


def action_positions(action_mask: Tensor, num_features: int, action_dim: int) -> tuple[Tensor, Tensor]:
    """Where the states that predict the action tokens sit: row indices `(B,1)` and positions `(B, H*A)`.

    A state predicts the token after it, so each lies one position before its placeholder.

    Args:
        action_mask: `(B,T)`, True at the placeholders.
        num_features: image patches and other tokens before the prompt.
        action_dim: A.

    Raises:
        ValueError: rows have different numbers of placeholders, none, or no multiple of A.
    """
    counts = action_mask.sum(dim=1)
    first = int(counts[0])
    if first == 0 or first % action_dim or bool((counts != first).any()):
        raise ValueError(
            f"action tokens a row {counts.tolist()}: every row needs the same positive multiple of A = {action_dim}"
        )
    tokens = action_mask.nonzero()[:, 1].reshape(-1, first)
    rows = torch.arange(len(action_mask), device=action_mask.device)[:, None]
    return rows, tokens - 1 + num_features
