"""Our scorer: what the original head missed, and why its loss stayed flat, decides its shape.

- The action has a residual path of its own from the input to the energy, past every attention.
- No LayerNorm touches raw actions: it would make `E(a) = E(3a + 0.4)`.
- Chunks are told apart near a *centre*, in units of a good policy's error. The centre is the policy's own chunk (the
  `reference`), corrected by what the context says; where no reference is given, a chunk predicted from the context.
- The energy is a distance to the centre, weighted by how sure the context makes each number of the chunk (up to a
  constant, the negative log-likelihood of a Laplace distribution), times a factor that a network reads off the chunk
  and the context. A network whose output is *added* learns faster and ranks held-out chunks around the policy worse
  than the plain distance to the policy's chunk does: docs/stability.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vla_energy.attention import Block, Memory, Read, attend
from vla_energy.config import EnergyConfig
from vla_energy.context_tokens import Tokens, read_tokens, reads_cheaper
from vla_energy.ranges import apply_range

_CENTRE_BOUND = 1.5  # normalised actions lie in [-1, 1]; the centre may overshoot a little
_MASKED = -1e30  # far below any score, and finite: -inf times zero is NaN in a backward pass
_CERTAINTY_BOUND = 1.0  # of the logarithm
_NEAR = 3.0  # in units of `deviation_scale`: where the factor has half its bound
_ROUNDING = 0.2  # in units of `deviation_scale`: below it the distance is smooth, for descent on the energy


@dataclass(frozen=True)
class EncodedContext:
    """What the scorer keeps of B contexts; the cost of reading them is paid.

    Attributes:
        keys, values: one `(B,heads,S,width)` per scoring layer; empty where there are `tokens`.
        tokens: the contexts themselves, which few chunks read at less cost than making keys and values; else None.
        bias: `(B,1,1,S)`, 0 at valid tokens and very negative at masked ones.
        steps: `(B,H,hidden)` context features of each step of a chunk.
        certainty: `(B,H,A)` weights of the distance to the centre, positive.
        centre: `(B,H,A)` the chunk around which deviations are measured, normalised.
        blind: `(B,H,A)` the centre that the context alone predicts.
        reference: `(B,H,A)` the policy's chunk, or `blind` where none was given.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    tokens: Tokens | None
    bias: Tensor
    steps: Tensor
    certainty: Tensor
    centre: Tensor
    blind: Tensor
    reference: Tensor

    def __len__(self) -> int:
        return len(self.bias)

    def index(self, rows: Tensor | slice | Sequence[int]) -> EncodedContext:
        """The contexts `rows`, in that order; rows may repeat."""
        keys, values = (tuple(part[rows] for part in parts) for parts in (self.keys, self.values))
        tokens = None if self.tokens is None else self.tokens.index(rows)
        rest = (self.bias, self.steps, self.certainty, self.centre, self.blind, self.reference)
        return EncodedContext(keys, values, tokens, *(part[rows] for part in rest))


def _bounded_exp(logarithm: Tensor, bound: float) -> Tensor:
    """A positive factor between `exp(-bound)` and `exp(bound)`, 1 at 0."""
    return (bound * torch.tanh(logarithm / bound)).exp()


class ResidualScorer(nn.Module):
    """Energies from a context and chunks; see the module's text for the shape and why.

    Args:
        context_dim: D, width of the context's hidden states.
        action_dim: A.
        horizon: H, steps of a chunk.
        config: uses `config.head` and `config.range`.
    """

    readers: Any
    reader_memories: Any
    scorers: Any
    scorer_memories: Any

    def __init__(self, context_dim: int, action_dim: int, horizon: int, config: EnergyConfig) -> None:
        super().__init__()
        self.config = config
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
        self.blind = nn.Linear(hidden, action_dim)
        self.correction = nn.Sequential(
            nn.Linear(hidden + 2 * action_dim, hidden), nn.SiLU(), nn.Linear(hidden, action_dim)
        )
        self.certainty = nn.Linear(hidden, action_dim)
        self.action_in = nn.Linear(6 * action_dim, hidden)
        self.step_in = nn.Linear(hidden, hidden)
        self.step_embedding = nn.Parameter(0.02 * torch.randn(horizon, hidden))
        self.factor = nn.Linear(hidden, 1)
        for start in (*self.correction[-1].parameters(), *self.certainty.parameters()):
            nn.init.zeros_(start)
        nn.init.normal_(self.factor.weight, std=0.02)
        nn.init.zeros_(self.factor.bias)

    def encode(
        self, context: Tensor, mask: Tensor, reference: Tensor | None = None, candidates: int | None = None
    ) -> EncodedContext:
        """Reads the contexts once.

        Args:
            context: `(B,S,D)`, floating; what masked tokens hold is finite, see `context_tokens.is_harmless`.
            mask: `(B,S)` bool, True = valid, at least one in each row.
            reference: `(B,H,A)` fp32, the policy's chunk; a row of NaN has none.
            candidates: how many chunks of each row will be scored, once, so that nothing is made that does not pay;
                None: any number, any number of times.
        """
        hidden, heads, horizon = self.config.head.hidden_dim, self.config.head.num_heads, len(self.step_query)
        bias = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, _MASKED)[:, None, None]
        dtype = getattr(torch, self.config.head.context_dtype)
        tokens = read_tokens(context, bias, self.context_norm, self.context_in, dtype)
        vectors = heads * len(self.readers) * (horizon + (candidates or 0))
        if candidates is None or not reads_cheaper(vectors, context.shape[1], context.shape[2], hidden):
            tokens = tokens.project()
        steps = self.step_query[None, None]  # one row: the first reader asks all contexts the same
        for block, memory in zip(self.readers, self.reader_memories, strict=True):
            steps = block(steps, partial(memory.read, tokens))
        steps = self.steps_norm(steps[:, 0])
        blind = _CENTRE_BOUND * torch.tanh(self.blind(steps) / _CENTRE_BOUND)
        if not self.config.head.reference:
            reference = None
        guess = self._learnt_alone(blind)
        known = guess if reference is None else torch.where(reference.isnan(), guess, reference)
        gap = torch.asinh((guess - known) / self.config.head.deviation_scale)
        centre = known + self.config.head.deviation_scale * self.correction(torch.cat([steps, known, gap], -1))
        certainty = _bounded_exp(self.certainty(steps), _CERTAINTY_BOUND)
        parts = (bias, self.step_in(steps), certainty, centre, blind, known)
        if tokens.projected and (candidates is None or heads * candidates >= hidden):
            keys, values = zip(*(remember(tokens.source) for remember in self.scorer_memories), strict=True)
            return EncodedContext(keys, values, None, *parts)
        return EncodedContext((), (), tokens, *parts)

    def energies(self, encoded: EncodedContext, actions: Tensor) -> Tensor:
        """Energies `(B,N)` of `actions (B,N,H,A)` fp32."""
        unit = self.config.head.deviation_scale
        deviation = (actions - self._learnt_alone(encoded.centre)[:, None]) / unit
        x = self._embed(encoded, actions, deviation)
        *inner, last = zip(self.scorers, self._reads(encoded), strict=True)
        for block, read in inner:
            x = block(x, read)
        block, read = last
        distance = (deviation.square() + _ROUNDING**2).sqrt() - _ROUNDING
        raw = self._factor(block.mean(x, read), distance) * (encoded.certainty[:, None] * distance).mean((2, 3))
        return apply_range(raw, self.config.range)

    def _reads(self, encoded: EncodedContext) -> list[Read]:
        """How each scoring layer looks at the contexts."""
        if encoded.tokens is not None:
            return [partial(memory.read, encoded.tokens) for memory in self.scorer_memories]
        parts = zip(encoded.keys, encoded.values, strict=True)
        return [partial(attend, keys=keys, values=values, bias=encoded.bias) for keys, values in parts]

    def row_bytes(self, tokens: int, candidates: int) -> int:
        """About how much memory one row's encoding and scoring keeps for the backward pass."""
        head, width, horizon = self.config.head, self.context_in.in_features, len(self.step_query)
        hidden, layers, vectors = head.hidden_dim, head.num_layers, head.num_heads * (horizon + candidates)
        reading = 3 * tokens * vectors * layers
        if reads_cheaper(vectors * layers, tokens, width, hidden):
            reading += 2 * vectors * layers * (width + 2 * hidden)
        else:
            reading += tokens * hidden * (2 + 4 * layers)
        return 4 * (reading + 16 * layers * horizon * (candidates + 1) * hidden)

    def _factor(self, x: Tensor, distance: Tensor) -> Tensor:
        """`(B,N)` of `x (B,N,hidden)`, 1 at the centre; far from it up to `exp(factor_bound)` and down to its inverse.

        Near the centre candidates differ by little, and what a network adds there is mostly noise; far from it the
        distance alone cannot tell an expert's chunk from an inner layer's.
        """
        square = distance.mean((2, 3)).square()
        bound = self.config.head.factor_bound * square / (square + _NEAR**2)
        return (bound * torch.tanh(self.factor(x).squeeze(-1))).exp()

    def centres(self, encoded: EncodedContext) -> tuple[Tensor, ...]:
        """The centre and the one that the context alone predicts, both `(B,H,A)`, to be trained to the expert's."""
        return encoded.centre, encoded.blind

    def _learnt_alone(self, centre: Tensor) -> Tensor:
        """Without gradient where the centre has a loss of its own: ranking losses moved it away from the expert's."""
        return centre.detach() if self.config.loss.centre else centre

    def _embed(self, encoded: EncodedContext, actions: Tensor, deviation: Tensor) -> Tensor:
        """Action tokens `(B,N,H,hidden)`: the action, its deviations in fine and coarse units, step and context."""
        fine = torch.asinh(deviation)
        away = torch.asinh((actions - encoded.reference[:, None]) / self.config.head.deviation_scale)
        coarse = deviation.abs() * self.config.head.deviation_scale
        token = self.action_in(torch.cat([actions, fine, fine.abs(), coarse, away, away.abs()], -1))
        return token + self.step_embedding + encoded.steps[:, None]
