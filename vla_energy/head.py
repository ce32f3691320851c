"""The energy head: encode a context once, score many action chunks against it.

`EnergyHead` checks what comes in and keeps everything in fp32; the scorer that `config.head.name` names does the work.

An offset of E that depends on the context alone is a null direction of every row-wise loss: the head cannot see it and
it would grow freely. The objective's small anchor on E^2 removes it; see `vla_energy.objective`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vla_energy.config import EnergyConfig
from vla_energy.context_tokens import is_harmless
from vla_energy.original import OriginalContext, OriginalScorer
from vla_energy.residual import EncodedContext, ResidualScorer
from vla_energy.row_blocks import block_rows, in_row_blocks
from vla_energy.temperature import Temperature

SCORERS = {"residual": ResidualScorer, "original": OriginalScorer}

_BIAS_UNIT = 10.0
"""Logits per unit of the outcome's bias: a step of Adam moves it by the learning rate, whatever the unit, and a bias of
several logits must not take thousands of steps."""

Encoded = EncodedContext | OriginalContext
"""What `EnergyHead.encode` returns: `len()` contexts, with `index(rows)`."""

Visible = tuple[Tensor, Tensor, Tensor | None]
"""Context `(B,S,D)`, mask `(B,S)` and reference `(B,H,A)`, checked."""


class HeadOutput(NamedTuple):
    """What training needs of one forward.

    Attributes:
        energies: `(B,N)`.
        centres: chunks `(B,H,A)` that the head predicts, each to be trained by a loss of its own; may be empty.
        temperature: of the logits: a number, or a 0-d tensor (with gradient if it is learnt).
        executed: `(R,)` energies of chunks that rollouts executed; None without.
        outcome_bias: 0-d, of the logit of success; None where the config has no outcome loss.
    """

    energies: Tensor
    centres: tuple[Tensor, ...]
    temperature: float | Tensor
    executed: Tensor | None = None
    outcome_bias: Tensor | None = None


class EnergyHead(nn.Module):
    """Energy of normalised action chunks given a context; lower is better, always fp32.

    Args:
        context_dim: D, width of the context's hidden states.
        action_dim: A.
        horizon: H, steps of a chunk.
        config: uses `config.head`, `config.range`, `config.temperature`, and whether `config.rollouts` needs a bias.
    """

    def __init__(self, context_dim: int, action_dim: int, horizon: int, config: EnergyConfig) -> None:
        super().__init__()
        for name, value in (("context_dim", context_dim), ("action_dim", action_dim), ("horizon", horizon)):
            if value < 1:
                raise ValueError(f"{name}={value}: expected 1 or more")
        self.context_dim, self.action_dim, self.horizon, self.config = (context_dim, action_dim, horizon, config)
        self.scorer: Any = SCORERS[config.head.name](context_dim, action_dim, horizon, config)
        self.temperature = Temperature(config.temperature)
        # In the head, and used in its forward, so that checkpoints have it and DDP synchronises it.
        self.outcome_bias = nn.Parameter(torch.zeros(())) if config.rollouts.learns_outcome else None

    def encode(self, context: Tensor, context_mask: Tensor, reference: Tensor | None = None) -> Encoded:
        """Reads the contexts once. Gradients reach `context` unless the caller detaches it.

        Trailing columns that are masked in every row are cropped; masked tokens change nothing, whatever they hold.

        Args:
            context: `(B,S,D)`, any floating dtype.
            context_mask: `(B,S)` bool, True = valid.
            reference: `(B,H,A)` normalised, the policy's own chunk, next to which the head tells candidates apart
                best; without it (or in rows of NaN) it predicts one from the context. The original head ignores it.

        Raises:
            ValueError: wrong shape, a mask that is not bool, or a row without a valid token (named by its index).
        """
        with torch.autocast(context.device.type, enabled=False):
            return self.scorer.encode(*self._visible(context, context_mask, reference))

    def forward(
        self, context: Any, actions: Tensor, *, training_output: bool = False, executed: Tensor | None = None
    ) -> Any:
        """Energies `(B,N)` of `actions (B,N,H,A)`; with `training_output` a `HeadOutput`.

        Args:
            context: what `encode` returned, or its arguments `(context, context_mask[, reference])` to do both in one
                call; in training under DDP take the latter, through the wrapper and once a step, so that gradients
                are synchronised. It costs less where the chunks are few, and memory is bounded by
                `config.head.block_mib`: rows go in blocks that are computed again in the backward pass.
            actions: normalised chunks.
            executed: `(R,H,A)` chunks of rollouts, for the output's `executed`: `context` then holds B + R contexts,
                the last R theirs, so that a step is one call. Needs `training_output`.

        Raises:
            TypeError: `actions` is no tensor, for example `RawActions`.
            ValueError: wrong shapes; see also `encode`.
        """
        self._check_actions(actions, "(B,N,H,A)", 4)
        if executed is not None:
            self._check_actions(executed, "(R,H,A)", 3)
            if not training_output:
                raise ValueError("executed chunks are for training alone: they need training_output=True")
        rows, extra = len(actions), 0 if executed is None else len(executed)
        with torch.autocast(actions.device.type, enabled=False):
            contexts = self._visible(*context) if isinstance(context, tuple) else context
            found = len(contexts[0]) if isinstance(contexts, tuple) else len(contexts)
            if found != rows + extra:
                more = f" and {extra} executed chunks" if extra else ""
                raise ValueError(f"{found} contexts but {rows} rows of actions{more}")
            energies, *centres = self._score(contexts, slice(rows), actions.float())
            if not training_output:
                return energies
            output = HeadOutput(energies, tuple(centres), self.temperature(energies))
            if executed is None:
                return output
            energy = self._score(contexts, slice(rows, None), executed.float()[:, None])[0][:, 0]
            bias = None if self.outcome_bias is None else _BIAS_UNIT * self.outcome_bias
            return output._replace(executed=energy, outcome_bias=bias)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """For an optimiser: a learnt temperature and the outcome's bias apart, as decay would pull them to 1 and 0."""
        own = list(self.temperature.parameters())
        own += [] if self.outcome_bias is None else [self.outcome_bias]
        groups: list[dict[str, Any]] = [{"params": list(self.scorer.parameters())}]
        return groups + ([{"params": own, "weight_decay": 0.0}] if own else [])

    def pairwise(self, encoded: Encoded, chunks: Tensor, block_size: int = 64) -> Tensor:
        """Energies `(B,M)` of every context with every one of `chunks (M,H,A)`, `block_size` chunks at a time."""
        self._check_actions(chunks, "(M,H,A)", 3)
        rows = len(encoded)
        return torch.cat([self(encoded, part.expand(rows, -1, -1, -1)) for part in chunks.split(block_size)], dim=1)

    def _visible(self, context: Tensor, mask: Tensor, reference: Tensor | None = None) -> Visible:
        """`encode`'s arguments, checked and cropped; padding that could do harm is zeroed."""
        length = self._check_context(context, mask)
        if reference is not None:
            self._check_actions(reference, "(B,H,A)", 3)
            if len(reference) != len(context):
                raise ValueError(f"{len(context)} contexts but {len(reference)} reference chunks")
            reference = reference.float()
        context, mask = context[:, :length], mask[:, :length]
        if not is_harmless(context, mask):  # masked is not enough: 0 * NaN from a padding token would be NaN
            context = context.masked_fill(~mask[..., None], 0.0)
        return context, mask, reference

    def _score(self, contexts: Any, rows: slice, actions: Tensor) -> tuple[Tensor, ...]:
        """Energies `(B,N)` of `actions (B,N,H,A)` in the contexts `rows`, and the centres that the head predicts."""
        if not isinstance(contexts, tuple):
            own = contexts if len(contexts) == len(actions) else contexts.index(rows)
            return self.scorer.energies(own, actions), *self.scorer.centres(own)
        context, mask = contexts[0][rows], contexts[1][rows]
        reference = None if contexts[2] is None else contexts[2][rows]
        row_bytes = self.scorer.row_bytes(context.shape[1], actions.shape[1])
        size = block_rows(len(actions), row_bytes, self.config.head.block_mib << 20)
        return in_row_blocks(self._score_rows, size, context, mask, reference, actions)

    def _score_rows(self, context: Tensor, mask: Tensor, reference: Tensor | None, actions: Tensor) -> Any:
        encoded = self.scorer.encode(context, mask, reference, candidates=actions.shape[1])
        return self.scorer.energies(encoded, actions), *self.scorer.centres(encoded)

    def _check_context(self, context: Tensor, mask: Tensor) -> int:
        """Length of the context without trailing columns that are masked in all rows."""
        # One weight stands for all, which a cast changes together: to look at each costs a tenth of reading a context.
        dtype = next(self.parameters()).dtype
        if dtype != torch.float32:
            raise TypeError(f"the energy head must stay float32, its weights are {dtype}")
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
