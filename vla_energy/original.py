"""The original scorer, whose training failed, kept to be measured against (report, F1 to F4).

One cross-attention asks the context with the action as its query, and an MLP reads the answer. What this costs:

- the action reaches the energy only through the attention's weights: where these are uniform, or where the context is
  one token, the energy does not depend on the action at all;
- the LayerNorm on the raw action makes `E(a) = E(3a + 0.4)`, up to the norm's eps.

Parameter names, start values and numbers are the original's (up to fp32 rounding). It copied the context for every
chunk, B*B times in its loss; here a context is encoded once, which changes no number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_energy.attention import attend
from vla_energy.config import EnergyConfig
from vla_energy.ranges import apply_range

_MASKED = -1e30  # far below any score, and finite: -inf times zero is NaN in a backward pass


@dataclass(frozen=True)
class OriginalContext:
    """What the scorer keeps of B contexts.

    Attributes:
        keys, values: `(B,heads,S,width)`.
        bias: `(B,1,1,S)`, 0 at valid tokens and very negative at masked ones.
        centre, reference: None; this scorer has neither.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    centre: None = None
    reference: None = None

    def __len__(self) -> int:
        return len(self.bias)

    def index(self, rows: Tensor | slice | Sequence[int]) -> OriginalContext:
        """The contexts `rows`, in that order; rows may repeat."""
        return OriginalContext(self.keys[rows], self.values[rows], self.bias[rows])


class _ResidualBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class _ResidualMLP(nn.Module):
    """The layout of the host's action head (`backbones.action_head`), but with SiLU for ReLU."""

    def __init__(self, input_dim: int, hidden: int, output_dim: int, num_blocks: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(input_dim)
        self.fc1 = nn.Linear(input_dim, hidden)
        self.mlp_resnet_blocks = nn.ModuleList(_ResidualBlock(hidden) for _ in range(num_blocks))
        self.layer_norm2 = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, output_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


def sine_positions(length: int, dim: int) -> Tensor:
    """`(length,dim)`: at 2i the sine and at 2i+1 the cosine of `position / 10000^(2i/dim)` (Vaswani et al. 2017)."""
    rates = 10000.0 ** (torch.arange(0, dim, 2) / dim)
    angles = torch.arange(length)[:, None] / rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :dim]


class OriginalScorer(nn.Module):
    """Energies from a context and chunks, as the original computed them.

    Args:
        context_dim: D, width of the context's hidden states.
        action_dim: A.
        horizon: H, steps of a chunk.
        config: uses `config.head` (`hidden_dim`, `num_heads`, `dropout`, `per_step`) and `config.range`.
    """

    positions: Tensor

    def __init__(self, context_dim: int, action_dim: int, horizon: int, config: EnergyConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.head.hidden_dim
        # Holds the weights under the original's names and start values; its own forward is not used.
        self.cross = nn.MultiheadAttention(hidden, config.head.num_heads, batch_first=True)
        self.dropout = nn.Dropout(config.head.dropout)
        self.state_linear = _ResidualMLP(context_dim, hidden, hidden, num_blocks=1)
        self.action_linear = _ResidualMLP(action_dim, hidden, hidden, num_blocks=1)
        self.prediction_head = _ResidualMLP(hidden, hidden, 1, num_blocks=2)
        self.register_buffer("positions", sine_positions(horizon, hidden), persistent=False)

    def encode(
        self, context: Tensor, mask: Tensor, reference: Tensor | None = None, candidates: int | None = None
    ) -> OriginalContext:
        """Projects the contexts to keys and values, once.

        Args:
            context: `(B,S,D)`, finite at masked tokens too.
            mask: `(B,S)` bool, True = valid (the original's is True where a token is ignored).
            reference: not used; ours measures deviations from it.
            candidates: not used; ours saves work where few are to come.
        """
        features = self.state_linear(context.to(self.positions.dtype))
        keys, values = (self._project(features, part) for part in (1, 2))
        bias = torch.zeros_like(mask, dtype=features.dtype).masked_fill(~mask, _MASKED)[:, None, None]
        return OriginalContext(keys, values, bias)

    def energies(self, encoded: OriginalContext, actions: Tensor) -> Tensor:
        """Energies `(B,N)` of `actions (B,N,H,A)` fp32.

        With `head.per_step` the range acts on each step and the energy is the mean of the steps (the original's second
        version); without, the attention's answers are averaged over the steps first (its first).
        """
        tokens = self.dropout(self.action_linear(actions) + self.positions)
        queries = self._project(tokens.flatten(1, 2), 0)
        found = attend(queries, encoded.keys, encoded.values, encoded.bias).transpose(1, 2).flatten(2)
        answers = self.cross.out_proj(found).unflatten(1, actions.shape[1:3])
        if self.config.head.per_step:
            return apply_range(self.prediction_head(answers).squeeze(-1), self.config.range).mean(2)
        return apply_range(self.prediction_head(answers.mean(2)).squeeze(-1), self.config.range)

    def centres(self, encoded: OriginalContext) -> tuple[Tensor, ...]:
        """No chunk is predicted, so there is none to train."""
        return ()

    def row_bytes(self, tokens: int, candidates: int) -> int:
        """About how much memory one row's encoding and scoring keeps for the backward pass."""
        width, hidden, horizon = self.state_linear.fc1.in_features, self.config.head.hidden_dim, len(self.positions)
        queries = horizon * candidates
        return 4 * (tokens * (width + 8 * hidden) + 3 * self.cross.num_heads * tokens * queries + 20 * queries * hidden)

    def _project(self, tokens: Tensor, part: int) -> Tensor:
        """Queries (0), keys (1) or values (2) `(B,heads,T,width)` of `tokens (B,T,hidden)`."""
        weight, bias = self.cross.in_proj_weight.chunk(3)[part], self.cross.in_proj_bias.chunk(3)[part]
        return F.linear(tokens, weight, bias).unflatten(-1, (self.cross.num_heads, -1)).transpose(1, 2)
