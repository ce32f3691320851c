"""The energy head: encode a context once, score many action chunks against it.

What the original head missed, and why its loss stayed flat, decides this one's shape:

- the action has a residual path of its own from the input to the energy, past every attention;
- no LayerNorm touches raw actions: it would make `E(a) = E(3a + 0.4)`;
- chunks are told apart near a *centre*, a chunk predicted from the context, in units of a good policy's error.

An offset of E that depends on the context alone is a null direction of every row-wise loss: the head cannot see it and
it would grow freely. The objective's small anchor on E^2 removes it; see `vla_energy.objective`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_energy.config import EnergyConfig, RangeConfig

_CENTRE_BOUND = 1.5  # normalised actions lie in [-1, 1]; the centre may overshoot a little
_MASKED = -1e30  # far below any score, and finite: -inf times zero is NaN in a backward pass


@dataclass(frozen=True)
class EncodedContext:
    """What the head keeps of B contexts; the cost of reading them is paid.

    Attributes:
        keys, values: one `(B,heads,S,width)` per scoring layer.
        bias: `(B,1,1,S)`, 0 at valid tokens and very negative at masked ones.
        steps: `(B,H,hidden)` context features of each step of a chunk.
        centre: `(B,H,A)` the chunk around which deviations are measured, normalised.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    bias: Tensor
    steps: Tensor
    centre: Tensor

    def __len__(self) -> int:
        return len(self.bias)

    def index(self, rows: Tensor | slice | Sequence[int]) -> EncodedContext:
        """The contexts `rows`, in that order; rows may repeat."""
        keys, values = (tuple(part[rows] for part in parts) for parts in (self.keys, self.values))
        return EncodedContext(keys, values, self.bias[rows], self.steps[rows], self.centre[rows])

    def expand(self, count: int) -> EncodedContext:
        """Each context `count` times in a row: B becomes `B * count`."""
        return self.index(torch.arange(len(self), device=self.bias.device).repeat_interleave(count))


def attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Softmax attention, `(B,heads,Q,width)` on `(B,heads,S,width)`.

    Written out because flash and memory-efficient kernels have no double backward, which gradient penalties and
    landscape measures need; the memory-efficient backward in fp32 is also a known source of NaN (PyTorch 119320).
    """
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-2, -1) + bias
    return scores.softmax(-1) @ values


def apply_range(raw: Tensor, config: RangeConfig) -> Tensor:
    """`scale * f(slope * raw) + offset`, with f by `config.name` (report, remedy 1)."""
    scale, slope, offset = config.constants()
    functions = {"sigmoid": torch.sigmoid, "bounded": torch.sigmoid, "relu_scaled": torch.relu}
    functions |= {"softplus": F.softplus, "softplus_scaled": F.softplus, "linear": torch.Tensor.clone}
    return scale * functions[config.name](slope * raw) + offset


class Memory(nn.Module):
    """Keys and values `(B,heads,S,width)` of context features `(B,S,hidden)`."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.key_value = nn.Linear(hidden, 2 * hidden)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """`(keys, values)` of `features`."""
        keys, values = self.key_value(features).chunk(2, -1)
        return _split(keys, self.heads), _split(values, self.heads)


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

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """New `x (B,N,H,hidden)`; `keys` and `values` are a `Memory`'s, `bias (B,1,1,S)` shuts out masked tokens."""
        tokens = self.norm_read(x)
        queries = self.query(tokens.flatten(1, 2) if self.per_step else tokens.mean(2))
        found = attend(_split(queries, self.heads), keys, values, bias).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out(found)).unflatten(1, (x.shape[1], -1))
        x = x + self.mix @ self.norm_mix(x)
        return x + self.dropout(self.mlp(self.norm_mlp(x)))


def _split(tokens: Tensor, heads: int) -> Tensor:
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


class EnergyHead(nn.Module):
    """Energy of normalised action chunks given a context; lower is better, always fp32.

    Args:
        context_dim: D, width of the context's hidden states.
        action_dim: A.
        horizon: H, steps of a chunk.
        config: uses `config.head` and `config.range`.
    """

    def __init__(self, context_dim: int, action_dim: int, horizon: int, config: EnergyConfig) -> None:
        super().__init__()
        for name, value in (("context_dim", context_dim), ("action_dim", action_dim), ("horizon", horizon)):
            if value < 1:
                raise ValueError(f"{name}={value}: expected 1 or more")
        self.context_dim, self.action_dim, self.horizon, self.config = (context_dim, action_dim, horizon, config)
        head, hidden = config.head, config.head.hidden_dim
        self.context_norm = nn.LayerNorm(context_dim)
        self.context_in = nn.Linear(context_dim, hidden)
        # Small, so that what the first reader finds is not drowned by the query's own residual.
        self.step_query = nn.Parameter(0.02 * torch.randn(horizon, hidden))
        sizes = (hidden, head.num_heads, horizon, head.dropout)
        layers = range(head.num_layers)
        # Readers see H tokens a context, scorers N*H.
        self.reader_memories = nn.ModuleList(Memory(hidden, head.num_heads) for _ in layers)
        self.readers = nn.ModuleList(Block(*sizes, per_step=True) for _ in layers)
        self.scorer_memories = nn.ModuleList(Memory(hidden, head.num_heads) for _ in layers)
        self.scorers = nn.ModuleList(Block(*sizes, per_step=False) for _ in layers)
        self.steps_norm = nn.LayerNorm(hidden)
        self.centre = nn.Linear(hidden, action_dim)
        self.action_in = nn.Linear(4 * action_dim, hidden)
        self.step_in = nn.Linear(hidden, hidden)
        self.step_embedding = nn.Parameter(0.02 * torch.randn(horizon, hidden))
        self.energy_out = nn.Linear(hidden, 1)
        nn.init.normal_(self.energy_out.weight, std=0.02)
        nn.init.zeros_(self.energy_out.bias)

    def encode(self, context: Tensor, context_mask: Tensor) -> EncodedContext:
        """Reads the contexts once. Gradients reach `context` unless the caller detaches it.

        Trailing columns that are masked in every row are cropped; masked tokens change nothing, whatever they hold.

        Args:
            context: `(B,S,D)`, any floating dtype.
            context_mask: `(B,S)` bool, True = valid.

        Raises:
            ValueError: wrong shape, a mask that is not bool, or a row without a valid token (named by its index).
        """
        length = self._check_context(context, context_mask)
        with torch.autocast(context.device.type, enabled=False):
            mask = context_mask[:, :length]
            # Zeroed, not only masked: 0 * NaN from a padding token would be NaN.
            visible = context[:, :length].float().masked_fill(~mask[..., None], 0.0)
            memory = self.context_in(self.context_norm(visible))
            bias = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, _MASKED)[:, None, None]
            steps = self.step_query.expand(len(context), 1, -1, -1)
            for block, remember in zip(self.readers, self.reader_memories, strict=True):
                steps = block(steps, *remember(memory), bias)
            steps = self.steps_norm(steps[:, 0])
            centre = _CENTRE_BOUND * torch.tanh(self.centre(steps) / _CENTRE_BOUND)
            keys, values = zip(*(remember(memory) for remember in self.scorer_memories), strict=True)
            return EncodedContext(keys, values, bias, self.step_in(steps), centre)

    def forward(
        self, context: EncodedContext | tuple[Tensor, Tensor], actions: Tensor, *, with_centre: bool = False
    ) -> Any:
        """Energies `(B,N)` of `actions (B,N,H,A)`; with `with_centre` also the centre `(B,H,A)`, for its own loss.

        Args:
            context: what `encode` returned, or `(context, context_mask)` to do both in one call; in training under
                DDP take the latter, through the wrapper and once a step, so that gradients are synchronised.
            actions: normalised chunks.

        Raises:
            TypeError: `actions` is no tensor, for example `RawActions`.
            ValueError: wrong shapes; see also `encode`.
        """
        self._check_actions(actions, "(B,N,H,A)", 4)
        encoded = context if isinstance(context, EncodedContext) else self.encode(*context)
        if len(encoded) != len(actions):
            raise ValueError(f"{len(encoded)} contexts but {len(actions)} rows of actions; see EncodedContext.expand")
        with torch.autocast(actions.device.type, enabled=False):
            x = self._embed(encoded, actions.float())
            for block, keys, values in zip(self.scorers, encoded.keys, encoded.values, strict=True):
                x = block(x, keys, values, encoded.bias)
            energies = apply_range(self.energy_out(x.mean(2)).squeeze(-1), self.config.range)
            return (energies, encoded.centre) if with_centre else energies

    def pairwise(self, encoded: EncodedContext, chunks: Tensor, block_size: int = 64) -> Tensor:
        """Energies `(B,M)` of every context with every one of `chunks (M,H,A)`, `block_size` chunks at a time."""
        self._check_actions(chunks, "(M,H,A)", 3)
        rows = len(encoded)
        return torch.cat([self(encoded, part.expand(rows, -1, -1, -1)) for part in chunks.split(block_size)], dim=1)

    def _embed(self, encoded: EncodedContext, actions: Tensor) -> Tensor:
        """Action tokens `(B,N,H,hidden)`: the action, its deviation in fine and coarse units, step and context."""
        deviation = actions - encoded.centre[:, None]
        fine = torch.asinh(deviation / self.config.head.deviation_scale)
        token = self.action_in(torch.cat([actions, fine, fine.abs(), deviation.abs()], -1))
        return token + self.step_embedding + encoded.steps[:, None]

    def _check_context(self, context: Tensor, mask: Tensor) -> int:
        """Length of the context without trailing columns that are masked in all rows."""
        if self.energy_out.weight.dtype != torch.float32:
            raise TypeError(f"the energy head must stay float32, its weights are {self.energy_out.weight.dtype}")
        if context.ndim != 3 or context.shape[-1] != self.context_dim:
            raise ValueError(f"context {tuple(context.shape)}: expected (B,S,D) with D={self.context_dim}")
        if mask.dtype != torch.bool or mask.shape != context.shape[:2]:
            expected = f"bool {tuple(context.shape[:2])}, True = valid"
            raise ValueError(f"context_mask {mask.dtype} {tuple(mask.shape)}: expected {expected}")
        empty = (~mask.any(1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"context_mask has no valid token in row {', '.join(map(str, empty))}")
        return int(mask.any(0).nonzero().max()) + 1

    def _check_actions(self, actions: Any, axes: str, ndim: int) -> None:
        if not isinstance(actions, Tensor):
            raise TypeError(
                f"actions are {type(actions).__name__}, expected a tensor of normalised chunks {axes}; "
                "robot units go through DatasetStatistics.normalize first"
            )
        if actions.ndim != ndim or actions.shape[-2:] != (self.horizon, self.action_dim):
            expected = f"{axes} with H={self.horizon}, A={self.action_dim}"
            raise ValueError(f"actions {tuple(actions.shape)}: expected {expected}")
