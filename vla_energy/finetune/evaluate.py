"""Held-out measures of a policy and its head: L1, ranking per kind of negative, what reranking would do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from vla_energy.candidates import noise_scale
from vla_energy.data import RldsDataset
from vla_energy.finetune.config import FinetuneConfig
from vla_energy.finetune.setup import Job
from vla_energy.head import EnergyHead
from vla_energy.monitors import Batch, RankingReport, evaluate_ranking

_MIN_BATCH = 16  # in-batch negatives need company


class _L1:
    """Sum of absolute errors over frames."""

    def __init__(self) -> None:
        self.total, self.frames = 0.0, 0

    def add(self, errors: torch.Tensor) -> None:
        self.total += float(errors.mean(dim=(1, 2)).sum())
        self.frames += len(errors)


def evaluate(job: Job, split: RldsDataset, head: EnergyHead | None, config: FinetuneConfig) -> dict[str, Any]:
    """Metrics over a held-out split, for at most `val_time_limit` seconds.

    Returns:
        `finetune`: `l1_val` (normalised units) and `frames`; with a head also `energy` and `rerank`, see
        `monitors.RankingReport`.
    """
    report, l1 = rank(job, split, head, config)
    result: dict[str, Any] = {"finetune": {"l1_val": l1.total / l1.frames, "frames": l1.frames}}
    if report is not None:
        metrics = report.metrics
        result.update(energy=metrics["energy"], rerank=metrics["rerank"])
    return result


def rank(
    job: Job, split: RldsDataset, head: EnergyHead | None, config: FinetuneConfig
) -> tuple[RankingReport | None, _L1]:
    """The ranking report (None without a head) and the policy's L1, in one pass over the split."""
    l1 = _L1()
    frames = held_out(job, split, config, l1)
    if head is None:
        for _ in frames:
            pass
        return None, l1
    generator = torch.Generator().manual_seed(config.seed)
    gripper = [dim for dim, normalised in enumerate(job.statistics.action.mask) if not normalised]
    report = evaluate_ranking(
        head, frames, config.energy, generator, gripper_dims=gripper, scale=noise_scale(job.statistics)
    )
    return report, l1


def held_out(job: Job, split: RldsDataset, config: FinetuneConfig, l1: _L1) -> Iterator[Batch]:
    """Batches for `evaluate_ranking`; the policy in eval mode, its images cropped if it was trained with crops."""
    deadline = time.monotonic() + config.val_time_limit
    size = min(max(config.batch_size, _MIN_BATCH), split.num_frames)
    job.vla.eval()
    for raw in split.batches(size, repeat=False, drop_last=False):
        batch = job.to_batch(raw, crop=config.image_aug)
        with torch.no_grad(), torch.autocast(job.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            output = job.vla(batch)
        assert output.layer_actions is not None
        l1.add((output.actions.float() - batch["actions"]).abs())
        yield output.context.float(), output.context_mask, batch["actions"], output.layer_actions.float()
        if time.monotonic() > deadline:
            return
