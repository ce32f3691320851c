"""Context tokens that attention reads without normalising, copying or projecting each of them.

Features, keys and values are linear in the normalised token: `m = W LayerNorm(x) + b`, `k = W_k m + b_k`. Two
rearrangements follow; both are exact up to rounding, and no parameter changes:

- The norm's affine part goes into the projection: `m = (x - mean) / std @ W'^T + c` with `W' = W diag(gamma)` and
  `c = W beta + b`. With the mean taken out of each row of W', or of the few vectors that come out of it, `mean` drops
  out, so one number a token, `1 / std`, is all that is left of the norm.
- Where few queries ask, the projection goes to their side: `q.k = (q W_k W').x / std` up to what all tokens share (the
  softmax does not see it), and `sum a v = W_v (W' sum (a / std) x + c) + b_v`. With Q query vectors (heads times
  queries) that costs about `Q D (2 S + 3 hidden)` multiplications, projecting all S tokens `D hidden S`. DeepSeek-V2
  calls the first half of this weight absorption (its section 2.1.2).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_SHIFTED = 1.0  # mean^2 / variance above which the variance is not taken from the sum of squares
_PADDING_LIMIT = 1e15  # squares of such numbers, summed over a context's width, stay finite in fp32


@dataclass(frozen=True)
class Tokens:
    """B contexts of S tokens, to be read by attention.

    Attributes:
        source: `(B,S,W)` what attention reads: the raw tokens, or their features.
        scale: `(B,1,1,S)` 1 / std of the raw tokens; None where the source is features.
        projection: the norm and the linear layer from raw tokens to features; None where the source is features.
        bias: `(B,1,1,S)`, 0 at valid tokens and very negative at masked ones.
    """

    source: Tensor
    scale: Tensor | None
    projection: tuple[nn.LayerNorm, nn.Linear] | None
    bias: Tensor

    @property
    def projected(self) -> bool:
        """Whether the source is features."""
        return self.projection is None

    def read(self, queries: Tensor, shift: Tensor) -> Tensor:
        """The features' mean `(B,heads,Q,hidden)`, weighted by `softmax(queries . features + shift)`.

        Args:
            queries: `(B,heads,Q,hidden)`.
            shift: `(B,heads,Q,1)`; changes no weight, and is here so that what it comes from stays in the graph.
        """
        if self.projection is None:
            return self._weighted(queries, shift)
        norm, linear = self.projection
        found = self._weighted(_centred(queries @ linear.weight * norm.weight), shift)
        return linear(_centred(found) * norm.weight + norm.bias)

    def project(self) -> Tokens:
        """The same contexts with features as the source: the wide product is paid here, once for all later reads."""
        if self.projection is None or self.scale is None:
            return self
        norm, linear = self.projection
        wide = self._times(self.source, _centred(linear.weight * norm.weight).T)
        features = wide * self.scale[:, 0, 0, :, None] + (linear.bias + linear.weight @ norm.bias)
        return Tokens(features, None, None, self.bias)

    def index(self, rows: Tensor | slice | Sequence[int]) -> Tokens:
        """The contexts `rows`, in that order; rows may repeat."""
        scale = None if self.scale is None else self.scale[rows]
        return Tokens(self.source[rows], scale, self.projection, self.bias[rows])

    def _weighted(self, asked: Tensor, shift: Tensor) -> Tensor:
        """The (scaled) source's mean `(B,heads,Q,W)`, weighted by `softmax(asked . scaled source + shift)`."""
        size = asked.shape[1:3]
        scores = self._times(asked.flatten(1, 2), self.source.transpose(1, 2)).unflatten(1, size)
        scores = scores if self.scale is None else scores * self.scale
        shares = (scores + shift + self.bias).softmax(-1)
        shares = shares if self.scale is None else shares * self.scale
        return self._times(shares.flatten(1, 2), self.source).unflatten(1, size)

    def _times(self, left: Tensor, right: Tensor) -> Tensor:
        """A product with the source in the source's precision; what follows is fp32."""
        return (left.to(self.source.dtype) @ right.to(self.source.dtype)).float()


def read_tokens(context: Tensor, bias: Tensor, norm: nn.LayerNorm, linear: nn.Linear, dtype: torch.dtype) -> Tokens:
    """Tokens whose features are `linear(norm(context))`.

    Args:
        context: `(B,S,D)`, any floating dtype; masked tokens hold anything that `is_harmless` allows.
        bias: `(B,1,1,S)`, see `Tokens`.
        dtype: of the products with the context; bfloat16 is float32 where `multiplies_bfloat16` says no.
    """
    if dtype == torch.bfloat16 and not multiplies_bfloat16(context.device.type):
        dtype = torch.float32
    scale = inverse_std(context.float(), norm.eps)[:, None, None]
    return Tokens(context.to(dtype), scale, (norm, linear), bias)


@cache
def multiplies_bfloat16(device_type: str) -> bool:
    """Whether this machine multiplies bfloat16 matrices faster than float32; a CPU that does not is warned of, once.

    PyTorch multiplies them on every CPU; without instructions for it, that took 13 times as long as float32.
    """
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device_type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return True
    logger.warning("head.context_dtype=bfloat16: this CPU has no products in bfloat16, they are made in float32")
    return False


def _centred(vectors: Tensor) -> Tensor:
    return vectors - vectors.mean(-1, keepdim=True)


def inverse_std(context: Tensor, eps: float) -> Tensor:
    """`1 / sqrt(variance + eps)` of each token of `context (...,D)` fp32, `(...)`, as a LayerNorm has it."""
    mean = context.mean(-1)
    # Two reductions at memory speed; `var` takes ten times as long on a CPU.
    square = torch.linalg.vector_norm(context, dim=-1).square() / context.shape[-1]
    variance = square - mean.square()
    if bool((mean.square() > _SHIFTED * variance).any()):  # the difference of large numbers has lost its digits
        variance = context.var(-1, correction=0)
    return (variance + eps).rsqrt()


def is_harmless(context: Tensor, mask: Tensor) -> bool:
    """Whether all that `context (B,S,D)` holds outside `mask (B,S)` is finite and not huge: 0 times it is then 0."""
    padding = context[~mask]
    return padding.numel() == 0 or bool(padding.abs().amax() < _PADDING_LIMIT)


def reads_cheaper(vectors: int, tokens: int, width: int, hidden: int) -> bool:
    """Whether `vectors` queries (heads times queries) a context read raw tokens at less cost than projecting them."""
    return vectors * width * (2 * tokens + 3 * hidden) < hidden * tokens * (width + 3 * vectors)
