"""Fault injection: a training into which broken numbers are thrown, and what must hold afterwards."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from features import Features
from stability_arms import preset
from training import Batch, Run, evaluate, train

from vla_energy.head import EnergyHead

BAD = (math.nan, math.inf, -math.inf, 1e38)
_EVERY = 7  # steps between two faults


class Injector:
    """Throws one fault every few steps, in turn.

    Kinds: a broken number in the context, the expert's chunk, the policy's layers; one in a gradient; a row whose mask
    is all padding (which must be refused); a batch of one; a context in bf16.
    """

    kinds: tuple[str, ...] = ("context", "expert", "layers", "gradient", "padding", "batch_of_one", "bf16")

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.counts = dict.fromkeys((*self.kinds, "padding_refused"), 0)
        self.poison: float | None = None

    def spoil(self, step: int, batch: Batch, head: EnergyHead) -> Batch:
        """The step's batch, with a fault every `_EVERY` steps."""
        self.poison = None
        if step % _EVERY:
            return batch
        index = step // _EVERY
        kind, value = self.kinds[index % len(self.kinds)], BAD[index // len(self.kinds) % len(BAD)]
        self.counts[kind] += 1
        context, mask, expert, layers = batch
        if kind == "context":
            context = self._broken(context * mask[..., None], value, first_columns=True)
        elif kind == "expert":
            expert = self._broken(expert, value)
        elif kind == "layers":
            layers = self._broken(layers, value, layer=True)
        elif kind == "gradient":
            self.poison = value
        elif kind == "padding":
            self._must_refuse(head, batch)
        elif kind == "batch_of_one":
            context, mask, expert, layers = (part[:1] for part in batch)
        else:
            context = context.bfloat16()
        return context, mask, expert, layers

    def after_backward(self, _: int, head: EnergyHead) -> None:
        """Writes the broken number into one element of one gradient."""
        if self.poison is not None:
            gradients = [p.grad for p in head.parameters() if p.grad is not None]
            chosen = gradients[self._draw(len(gradients))]
            chosen.flatten()[0] = self.poison

    def _broken(
        self, values: torch.Tensor, value: float, first_columns: bool = False, layer: bool = False
    ) -> torch.Tensor:
        """A copy with one broken number in a random row.

        Anywhere in it, or in its first token, which is valid in every row, or in a layer that is in use.
        """
        broken = values.clone()
        row = broken[self._draw(len(values))]
        row = row[0] if first_columns else row
        row = row[1 + self._draw(len(row) - 1)] if layer else row  # layer 0 is a constant that nobody uses
        row.view(-1)[self._draw(row.numel())] = value
        return broken

    def _draw(self, count: int) -> int:
        return int(torch.randint(count, (1,), generator=self.generator))

    def _must_refuse(self, head: EnergyHead, batch: Batch) -> None:
        mask = batch[1].clone()
        mask[1] = False
        try:
            head.encode(batch[0], mask)
        except ValueError as error:
            self.counts["padding_refused"] += "row 1" in str(error)


def faults(train_set: Features, held_out: Features, steps: int) -> dict[str, Any]:
    """One row of results: the recommended head, trained for `steps` with faults; `held_out` as in every row."""
    run = Run("recommended, with faults", preset("recommended"), steps, seed=0)
    injector = Injector(seed=0)
    head, facts = train(run, train_set, injector.spoil, injector.after_backward)
    assert injector.counts["padding_refused"] == injector.counts["padding"], injector.counts
    metrics = evaluate(head, held_out, replace(run.config))
    row = {"part": "faults", "arm": run.arm, "seed": 0, "steps": steps, "tags": {}, "flat": None}
    return {**row, **facts, "injected": injector.counts, "held_out": metrics}
