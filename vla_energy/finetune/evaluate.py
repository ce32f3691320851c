"""Held-out measures of a policy and its head: L1, ranking per kind of negative, what reranking would do."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla_energy.actions import DatasetStatistics
from vla_energy.backbones.tokens import sample_chunks
from vla_energy.calibrate import calibrate_margin
from vla_energy.candidates import noise_scale
from vla_energy.data import DatasetError, RldsDataset
from vla_energy.finetune.config import FinetuneConfig
from vla_energy.finetune.diffusion import observe
from vla_energy.finetune.setup import Job, autocast
from vla_energy.finetune.shapes import FirstBatch, halves, write_shapes
from vla_energy.finetune.signals import ValidationStoppedError
from vla_energy.head import EnergyHead
from vla_energy.monitors import Batch, RankingReport, evaluate_ranking
from vla_energy.rerank import choose

logger = logging.getLogger(__name__)

MIN_BATCH = 16  # in-batch negatives need company


RISK = 0.1
"""At most this share of the choices that the calibrated gate accepts is worse than the policy's (confidence 0.9)."""


class HeldOutFrames:
    """The policy's error on the frames seen, and the episode of each."""

    def __init__(self) -> None:
        self.errors: list[torch.Tensor] = []
        self.episodes: list[torch.Tensor] = []
        self.places: list[tuple[str, int]] = []

    def add(
        self, errors: torch.Tensor, episodes: np.ndarray, tasks: Sequence[str] = (), steps: Sequence[int] = ()
    ) -> None:
        """Errors `(B,H,A)` and episodes `(B,)` of a batch; where they are known, its instructions and steps."""
        self.errors.append(errors.mean(dim=(1, 2)).cpu())
        self.episodes.append(torch.tensor(episodes))
        count = len(episodes)
        self.places += zip(tasks or [""] * count, steps if len(steps) else [-1] * count, strict=True)


def evaluate(
    job: Job,
    split: RldsDataset,
    head: EnergyHead | None,
    config: FinetuneConfig,
    shapes_to: Path | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Metrics over a held-out split, for at most `val_time_limit` seconds.

    Args:
        job: the policy.
        split: held out.
        head: None measures the policy alone.
        config: of the run.
        shapes_to: a folder that gets `shapes.json`, the pictures' numbers, see `shapes`; needs a head.
        stopped: asked after each batch whether to break off.

    Returns:
        `finetune`: `l1_val` (normalised units) and `frames`; with a head also `energy` and `rerank`, see
        `monitors.RankingReport`, and `gate`, see `calibrated_gate`.

    Raises:
        DatasetError: the split cannot be read, or the values of all its frames are not finite.
        ValidationStoppedError: `stopped` said so.
    """
    frames = HeldOutFrames()
    batches = unless(stopped, held_out(job, split, config, frames))
    return summarise(head, batches, frames, job.statistics, config, shapes_to)


def unless(stopped: Callable[[], bool], batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, until `stopped` says so: then `ValidationStoppedError`."""
    for batch in batches:
        yield batch
        if stopped():
            raise ValidationStoppedError


def summarise(
    head: EnergyHead | None,
    batches: Iterable[Batch],
    frames: HeldOutFrames,
    statistics: DatasetStatistics,
    config: FinetuneConfig,
    shapes_to: Path | None = None,
) -> dict[str, Any]:
    """What `evaluate` returns, of batches that add to `frames` as they are drawn."""
    report, first = None, FirstBatch(batches)
    if head is None:
        for _ in first:
            pass
    else:
        gripper = [dim for dim, normalised in enumerate(statistics.action.mask) if not normalised]
        generator = torch.Generator().manual_seed(config.seed)
        report = evaluate_ranking(
            head, first, config.energy, generator, gripper_dims=gripper, scale=noise_scale(statistics)
        )
    errors = torch.cat(frames.errors)
    result: dict[str, Any] = {"finetune": {"l1_val": float(errors.mean()), "frames": len(errors)}}
    if report is not None:
        result.update(energy=report.metrics["energy"], rerank=report.metrics["rerank"])
        episodes = torch.cat(frames.episodes)
        result["gate"] = calibrated_gate(report, episodes)
        if shapes_to is not None and head is not None:
            write_shapes(shapes_to, head, first, frames.places, report, episodes, result["gate"]["margin"])
    return result


def calibrated_gate(report: RankingReport, episodes: torch.Tensor) -> dict[str, Any]:
    """The gate's margin from one half of the held-out episodes, and what it does on the other half.

    Whole episodes count, as frames of one are alike: few episodes leave the gate shut. The other half tells what the
    margin is worth.

    Args:
        report: of M frames.
        episodes: `(M,)` episode of each frame.

    Returns:
        `margin` (None: the gate stays shut), and on the other half `frames`, `accepted` (share), `worse` (share of
        the accepted that are worse than the policy's chunk; None if none is accepted), `l1_policy`, `l1_gated`.
    """
    ours, rest = halves(episodes)
    if not rest.any():
        return {"margin": None, "frames": 0}
    margin = calibrate_margin(report.energies[ours], report.distances[ours], RISK, episodes=episodes[ours])
    distances = report.distances[rest]
    index, accepted = choose(report.energies[rest], margin)
    chosen = distances.gather(1, torch.where(accepted, index, 0)[:, None])[:, 0]
    worse = (chosen > distances[:, 0])[accepted]
    return {
        "margin": margin if math.isfinite(margin) else None,
        "frames": int(rest.sum()),
        "accepted": float(accepted.float().mean()),
        "worse": float(worse.float().mean()) if len(worse) else None,
        "l1_policy": float(distances[:, 0].mean()),
        "l1_gated": float(chosen.mean()),
    }


def held_out(job: Job, split: RldsDataset, config: FinetuneConfig, frames: HeldOutFrames) -> Iterator[Batch]:
    """Batches for `evaluate_ranking`; the policy in eval mode, its images cropped if it was trained with crops.

    Frames with values that are not finite are left out, and counted in the log, as the training's steps are: what a
    dataset holds is checked when it is opened, but a file may change during a run of days.

    Raises:
        DatasetError: see `evaluate`.
    """
    left_out = 0
    deadline = time.monotonic() + config.val_time_limit
    size = min(max(config.batch_size, MIN_BATCH), split.num_frames)
    job.vla.eval()
    generator, candidates = torch.Generator().manual_seed(config.seed), config.energy.candidates
    count = candidates.samples if config.energy.enabled else 0
    for read in split.batches(size, repeat=False, drop_last=False):
        raw = finite_frames(read)
        left_out += len(read["actions"]) - len(raw["actions"])
        if not len(raw["actions"]):
            continue
        batch = job.to_batch(raw, crop=config.image_aug)
        if job.vla.diffuses:
            output = observe(job, batch, config, generator, count)
        else:
            with torch.no_grad(), autocast(config, job.device):
                output = job.vla(batch, "normed" if config.energy.negatives.layer_exits.normed else "raw")
        assert output.layer_actions is not None
        errors = (output.actions.float() - batch["actions"]).abs()
        frames.add(errors, raw["episode"], list(raw["instructions"]), raw["step"].tolist())
        seen = (output.context.float(), output.context_mask, batch["actions"], output.layer_actions.float())
        if output.token_logits is not None and count:
            drawn = (count, candidates.sample_temperature, generator)
            yield *seen, sample_chunks(output.token_logits, *drawn, job.vla.action_dim, job.vla.config)
        elif output.samples is not None:
            yield *seen, output.samples.float()
        else:
            yield seen
        if time.monotonic() > deadline:
            break
    if left_out:
        logger.warning("validation: %d held-out frames are left out: their actions or proprio are not finite", left_out)
    if not frames.errors:
        raise DatasetError(f"{config.dataset_name}: no held-out frame has actions and proprio that are finite")


def finite_frames(raw: dict[str, Any]) -> dict[str, Any]:
    """A dataset's batch without the frames whose actions or proprio are not finite."""
    values = [raw[key].reshape(len(raw["actions"]), -1) for key in ("actions", "proprio") if key in raw]
    keep = np.isfinite(np.concatenate(values, 1)).all(1)
    if keep.all():
        return raw
    rows = keep.nonzero()[0]
    return {key: [value[i] for i in rows] if isinstance(value, list) else value[rows] for key, value in raw.items()}
