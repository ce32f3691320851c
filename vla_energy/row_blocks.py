"""Rows in blocks of bounded memory: what a block keeps for the backward pass is computed again there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def block_rows(rows: int, row_bytes: int, limit: int) -> int:
    """Rows of a block, alike in size, of which each needs `row_bytes` and all at most `limit` (0: no limit)."""
    if rows == 0 or limit == 0:
        return max(1, rows)
    most = max(1, limit // max(1, row_bytes))
    blocks = -(-rows // most)
    return -(-rows // blocks)


def in_row_blocks(function: Callable[..., tuple[Tensor, ...]], size: int, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """`function(*inputs)` of at most `size` rows at a time, joined; its rows must not see each other.

    With gradients and more than one block (not reentrant checkpointing, Chen et al. 2016: "sublinear memory cost") only
    a block's inputs are kept. Random numbers are drawn again as they were, and double backward works.

    Args:
        inputs: tensors of equally many rows; None stays None.
    """
    rows = next(len(part) for part in inputs if part is not None)
    if rows <= size:
        return function(*inputs)
    blocks = []
    for start in range(0, rows, size):
        block = [None if part is None else part[start : start + size] for part in inputs]
        keeps = torch.is_grad_enabled()
        blocks.append(checkpoint(function, *block, use_reentrant=False) if keeps else function(*block))
    return tuple(torch.cat(parts) for parts in zip(*blocks, strict=True))
