"""One training of an energy head on frozen features: the run that the stability benchmarks repeat."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from features import Features
from torch import Tensor

from vla_energy.config import EnergyConfig
from vla_energy.guard import GuardedOptimizer
from vla_energy.head import EnergyHead
from vla_energy.monitors import evaluate_ranking
from vla_energy.objective import EnergyObjective

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
KEPT = (
    "loss", "info_nce", "chance", "margin", "positive", "negative", "std_row", "saturated", "logits_min", "logits_max",
)  # fmt: skip
"""Metrics of the curve."""


@dataclass
class Run:
    """One training.

    Attributes:
        arm: name of the variant.
        config: of the head.
        steps, batch_size, learning_rate, warm_steps: of the training; the rate is before `config.guard.lr_factor`.
        seed: of weights, batches and negatives.
    """

    arm: str
    config: EnergyConfig
    steps: int
    seed: int
    batch_size: int = 8
    learning_rate: float = 5e-4
    warm_steps: int = 0
    tags: dict[str, Any] = field(default_factory=dict)


def train(
    run: Run,
    features: Features,
    spoil: Callable[[int, Batch, EnergyHead], Batch] | None = None,
    after_backward: Callable[[int, EnergyHead], None] | None = None,
) -> tuple[EnergyHead, dict[str, Any]]:
    """The trained head, and `curve` (means over 1/50 of the steps), counters, and what was not finite.

    Args:
        spoil: changes a step's batch, for fault injection.
        after_backward: called between backward and the optimiser step.
    """
    torch.manual_seed(run.seed)
    context, _, expert, _ = features.batch(torch.zeros(1, dtype=torch.long))
    head = EnergyHead(context.shape[2], expert.shape[2], expert.shape[1], run.config)
    objective = EnergyObjective(head, run.config, features.traits)
    rate = run.learning_rate * run.config.guard.lr_factor
    guard = GuardedOptimizer.adamw(head.parameter_groups(), rate, run.config.guard, run.warm_steps)
    generator = torch.Generator().manual_seed(run.seed)
    every = max(1, run.steps // 50)
    sums: dict[str, float] = {}
    curve, nonfinite_losses, started = [], 0, time.perf_counter()
    for step in range(run.steps):
        batch = features.batch(torch.randint(len(features), (run.batch_size,), generator=generator))
        batch = batch if spoil is None else spoil(step, batch, head)
        loss, metrics = objective(*batch, generator, step)
        nonfinite_losses += not math.isfinite(float(loss.detach()))
        loss.backward()
        if after_backward is not None:
            after_backward(step, head)
        norm = guard.step().grad_norm
        row = {name: float(metrics[f"energy/{name}"]) for name in KEPT if f"energy/{name}" in metrics}
        for name, value in (*row.items(), ("grad_norm", norm)):
            sums[name] = sums.get(name, 0.0) + value
        if (step + 1) % every == 0:
            curve.append({"step": step + 1, **{name: total / every for name, total in sums.items()}})
            sums = {}
    broken = sum(int((~p.isfinite()).any()) for p in head.parameters())
    facts = {"curve": curve, "counters": guard.counters, "nonfinite_losses": nonfinite_losses}
    seconds = time.perf_counter() - started
    return head, facts | {"nonfinite_parameters": broken, "ms_per_step": 1e3 * seconds / max(1, run.steps)}


def is_flat(curve: list[dict[str, float]], width: float, band: float = 0.02) -> bool | None:
    """Whether the loss of the last tenth is that of a head that knows nothing (chance, or the margin's width).

    None without a step, or without a loss that can tell.
    """
    if not curve:
        return None
    last = curve[-max(1, len(curve) // 10) :]
    for name, chance in (("info_nce", "chance"), ("margin", None)):
        if name in last[0]:
            gaps = [row[name] - (row[chance] if chance else width) for row in last]
            return abs(sum(gaps) / len(gaps)) < band
    return None


def batches(features: Features, size: int = 25) -> Iterator[Batch]:
    """All frames in a fixed random order, so that a batch is no episode."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(1))
    for rows in order.split(size):
        if len(rows) > 1:
            yield features.batch(rows)


def evaluate(head: EnergyHead, features: Features, config: EnergyConfig) -> dict[str, Any]:
    """Held-out ranking, see `vla_energy.monitors.RankingReport`."""
    if config.head.name == "original":  # wide, so a look at 100 frames, in small batches, has to do
        features = features.first(100)
    generator = torch.Generator().manual_seed(2)
    gripper = features.gripper.tolist()
    report = evaluate_ranking(head, batches(features), config, generator, gripper_dims=gripper, scale=features.scale)
    return report.metrics
