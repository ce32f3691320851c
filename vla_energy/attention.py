"""Attention of chunks on a context, and the residual block that both sides of our scorer are made of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vla_energy.context_tokens import Tokens

Read = Callable[[Tensor], Tensor]
"""What queries `(B,heads,Q,width)` find in a context, the same shape."""


def attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Softmax attention, `(B,heads,Q,width)` on `(B,heads,S,width)`.

    Written out because flash and memory-efficient kernels have no double backward, which gradient penalties and
    landscape measures need; the memory-efficient backward in fp32 is also a known source of NaN (PyTorch 119320).
    """
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-2, -1) + bias
    return scores.softmax(-1) @ values


class Memory(nn.Module):
    """Keys and values `(B,heads,S,width)` of context features `(B,S,hidden)`, or a look at them through `read`."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.key_value = nn.Linear(hidden, 2 * hidden)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """`(keys, values)` of `features`."""
        keys, values = self.key_value(features).chunk(2, -1)
        return _split(keys, self.heads), _split(values, self.heads)

    def read(self, tokens: Tokens, queries: Tensor) -> Tensor:
        """As `attend` with `forward`'s keys and values, which are not made: the weights go to the queries' side."""
        queries = queries * queries.shape[-1] ** -0.5
        by_key, by_value = self.key_value.weight.unflatten(0, (2, self.heads, -1))  # each (heads,width,hidden)
        key_bias, value_bias = self.key_value.bias.unflatten(0, (2, self.heads, -1, 1))
        found = tokens.read(_per_head(queries, by_key), queries @ key_bias)
        return _per_head(found, by_value.transpose(-2, -1)) + value_bias.transpose(-2, -1)


class Block(nn.Module):
    """Pre-norm residual block on chunks `(B,N,H,hidden)`: read the context, mix the H steps of a chunk, MLP.

    All N chunks of a row are one query sequence: the context is not copied N times. Chunks never see each other, so
    an energy does not depend on which other candidates are scored with it.

    Args:
        per_step: every step asks the context on its own (N*H queries); else a chunk asks once, for all its steps (N
            queries), at an H-th of the attention's cost. In a 400-step trial on synthetic contexts (one seed) the
            Spearman correlation around the policy was 0.65 with the first and 0.64 with the second.
    """

    def __init__(self, hidden: int, heads: int, horizon: int, dropout: float, per_step: bool) -> None:
        super().__init__()
        self.heads, self.per_step = heads, per_step
        self.norm_read, self.norm_mix, self.norm_mlp = (nn.LayerNorm(hidden) for _ in range(3))
        self.query, self.out = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.mix = nn.Parameter(torch.randn(horizon, horizon) * (0.1 / horizon**0.5))
        self.mlp = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.SiLU(), nn.Linear(2 * hidden, hidden))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, read: Read) -> Tensor:
        """New `x (B,N,H,hidden)` of chunks that ask the context by `read`; one row may ask for all B."""
        x = self._mixed(x, read)
        return x + self.dropout(self.mlp(self.norm_mlp(x)))

    def mean(self, x: Tensor, read: Read) -> Tensor:
        """`forward(x, read).mean(2)`, `(B,N,hidden)`: the MLP's last layer, being linear, acts on the mean alone."""
        if self.training and self.dropout.p:
            return self(x, read).mean(2)
        x = self._mixed(x, read)
        first, activation, last = self.mlp
        return x.mean(2) + last(activation(first(self.norm_mlp(x))).mean(2))

    def _mixed(self, x: Tensor, read: Read) -> Tensor:
        tokens = self.norm_read(x)
        queries = self.query(tokens.flatten(1, 2) if self.per_step else tokens.mean(2))
        found = read(_split(queries, self.heads)).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out(found)).unflatten(1, (x.shape[1], -1))
        chunks = self.norm_mix(x).flatten(0, 1)
        # One small product a chunk: a broadcast matmul would bring the H steps to the end by a copy, and back.
        mixed = torch.bmm(self.mix.expand(len(chunks), -1, -1), chunks)
        return x + mixed.unflatten(0, x.shape[:2])


def _per_head(x: Tensor, weight: Tensor) -> Tensor:
    """`x (B,heads,Q,m) @ weight (heads,m,n)`, all rows of a head in one product.

    Broadcast instead, the weight's gradient would be made for each of the B rows and then summed.
    """
    return (x.transpose(0, 1).flatten(1, 2) @ weight).unflatten(1, (len(x), -1)).transpose(0, 1)


def _split(tokens: Tensor, heads: int) -> Tensor:
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)
