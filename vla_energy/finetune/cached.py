"""Trains heads from a feature cache: what the fine-tuning does with a frozen policy, without the policy."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vla_energy.cache import CacheError, FeatureCache
from vla_energy.checkpoint import save_head
from vla_energy.config import EnergyConfig
from vla_energy.durable import MANIFEST
from vla_energy.finetune.checkpoints import STATE, flatten
from vla_energy.finetune.config import FinetuneConfig, FlagError
from vla_energy.finetune.energy import HeadTraining, Metrics, check_head_sources, l1_metrics, load_memory, retrieve
from vla_energy.finetune.evaluate import MIN_BATCH, HeldOutFrames, summarise, unless
from vla_energy.finetune.logs import MetricLog
from vla_energy.finetune.setup import make_head, vla_folder
from vla_energy.finetune.signals import RunStoppedError, StopSignals, ValidationStoppedError
from vla_energy.monitors import Batch
from vla_energy.rerank import MARGIN_KEY

logger = logging.getLogger(__name__)

# What the readers of a policy take: `load_openvla`, the host's `from_pretrained`, peft, the memory. Named one by one,
# not "all but": a folder may hold reports and results as well, and what is written later under such a name would go
# through the link into the checkpoint. All weights are among them, so that the policy's fingerprint stays the
# checkpoint's. A model card stays behind: it tells of the other head, and is written to by hand.
_OF_A_POLICY = (
    "*.safetensors", "*.safetensors.index.json", "*.pt", "*.bin", "*.bin.index.json", "config.json", "*_config.json",
    "dataset_statistics.json", "tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.*", "*.py", "lora_adapter", MANIFEST, "LICENSE*",
)  # fmt: skip
_NOT_OF_A_POLICY = (STATE, "energy_head--*", "energy_state*", ".*")


class CachedTraining:
    """One head trained from a cache; the run of `scripts/finetune_energy.py --energy.freeze_backbone True`.

    Seeds, negatives, optimiser and metrics are those of that run; given its frames in its order, so are the weights.

    Args:
        config: of the head's training, see `head_config`; what concerns policy and data is not read.
        cache: of the training split.
        held_out: of the held-out split, made as `cache` was, for validation; None trains without.

    Attributes:
        copy_policy: `save` copies the policy's files instead of linking them.

    Raises:
        FlagError: what the head is to be trained on is not in a cache.
        CacheError: the two caches were not made alike.
    """

    def __init__(self, config: FinetuneConfig, cache: FeatureCache, held_out: FeatureCache | None = None) -> None:
        self.config, self.cache, self.held_out = config, cache, held_out
        config.check()
        _check_possible(config.energy, cache)
        if held_out is not None:
            check_held_out(cache, held_out)
        self.device = torch.device(config.device)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.head = make_head(config, cache).to(self.device)
        traits = check_head_sources(config, cache, cache.statistics)
        self.training = HeadTraining(self.head, config, traits, self.generator)
        self.memory = load_memory(config, vla_folder(config), cache)
        self._neighbours: dict[int, Tensor] = {}
        self.gate: dict[str, Any] | None = None
        self.step, self.copy_policy = 0, False
        self.stop = StopSignals()
        torch.manual_seed(config.seed)

    def run(self, order: Iterable[Tensor] | None = None) -> dict[str, Any]:
        """Trains to `max_steps`, validates every `val_freq` and at the end; returns the last validation's metrics.

        Writes `metrics.jsonl` and TensorBoard's events to the run's folder, and there last the head beside links to
        the policy.

        Args:
            order: rows of the batches, one a step; by default `shuffled` ones of `batch_size`.

        Raises:
            RunStoppedError: SIGINT, SIGTERM or SIGHUP came; the step was finished and the head saved as it was then.
        """
        config = self.config
        config.run_dir.mkdir(parents=True, exist_ok=True)
        rows = iter(shuffled(len(self.cache), config.batch_size, config.seed) if order is None else order)
        results: dict[str, Any] = {}
        bar = tqdm(total=config.max_steps, disable=None, unit="step")
        with MetricLog(config, 0) as log, bar, self.stop:
            while self.step < config.max_steps and self.stop.number is None:
                started = time.perf_counter()
                metrics = self.train_step(next(rows))
                self.step += 1
                bar.update()
                last = self.step == config.max_steps
                if self.step % config.wandb_log_freq == 0 or last:
                    row = {key: float(value) for key, value in metrics.items()}
                    log.write(self.step, {**row, "frames_per_second": config.batch_size / _since(started)})
                if self.held_out is not None and (self.step % config.val_freq == 0 or last):
                    try:
                        results = self.validate()
                    except ValidationStoppedError:
                        break
                    log.write(self.step, flatten(results, "val"))
            saved = self.save()  # before another hangup could end it
        if self.stop.number is not None and self.step < config.max_steps:
            done = f"it has taken {self.step} of {config.max_steps} steps, and a head from a cache begins anew"
            raise RunStoppedError(self.stop.number, saved, done)
        return results

    def train_step(self, rows: Tensor) -> Metrics:
        """One optimiser step of the head on these frames."""
        frames = self.cache.batch(rows, self.device)
        started = time.perf_counter()
        metrics = l1_metrics(frames.layer_actions[:, -1], frames.expert)
        seen = (frames.context, frames.context_mask, frames.expert, frames.layer_actions)
        self.training.backward(seen, self.step, metrics, self._retrieve(rows))
        metrics["energy/ms"] = 1e3 * _since(started)
        self.training.step(self.step, seen, metrics)
        return metrics

    def validate(self) -> dict[str, Any]:
        """Metrics on the held-out cache, see `evaluate`; all of its frames. A signal breaks it off."""
        assert self.held_out is not None

        def stopped() -> bool:
            return self.stop.number is not None and self.step < self.config.max_steps

        frames = HeldOutFrames()
        held_out, run = unless(stopped, self._held_out(frames)), self.config.run_dir
        results = summarise(self.head, held_out, frames, self.cache.statistics, self.config, run)
        self.gate = results.get("gate")
        return results

    def save(self) -> Path:
        """Writes the head beside links to the checkpoint's other files, so that the folder is a checkpoint.

        Raises:
            CheckpointError: the head cannot be written.
        """
        folder = self.config.run_dir
        link_policy(vla_folder(self.config), folder, copy=self.copy_policy)
        extra = {} if self.gate is None else {MARGIN_KEY: self.gate["margin"]}
        return save_head(folder, self.head, self.step, self.cache.statistics, extra)

    def _held_out(self, frames: HeldOutFrames) -> Iterator[Batch]:
        assert self.held_out is not None
        size = max(self.config.batch_size, MIN_BATCH)
        for rows in torch.arange(len(self.held_out)).split(size):
            batch = self.held_out.batch(rows, self.device)
            frames.add((batch.layer_actions[:, -1] - batch.expert).abs(), batch.episodes.cpu().numpy())
            yield batch.context.float(), batch.context_mask, batch.expert, batch.layer_actions

    def _retrieve(self, rows: Tensor) -> Tensor | None:
        """`(B,K,H,A)` as online, looked up once a frame: neither memory nor contexts change."""
        if self.memory is None or not self.config.energy.negatives.retrieved.count:
            return None
        new = sorted({int(row) for row in rows} - self._neighbours.keys())
        if new:
            frames = self.cache.batch(new)
            seen = (frames.context, frames.context_mask, frames.layer_actions[:, -1])
            found = retrieve(self.memory, self.config, *seen, frames.episodes.numpy())
            assert found is not None
            self._neighbours.update(zip(new, found, strict=True))
        return torch.stack([self._neighbours[int(row)] for row in rows]).to(self.device)


def shuffled(frames: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Rows of endless batches: every epoch has each frame once, in an order of its own; batches span epochs."""
    left = torch.empty(0, dtype=torch.long)
    epoch = 0
    while True:
        while len(left) < batch_size:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            left = torch.cat([left, torch.randperm(frames, generator=generator)])
            epoch += 1
        yield left[:batch_size]
        left = left[batch_size:]


def link_policy(checkpoint: Path, folder: Path, *, copy: bool = False) -> None:
    """Links a checkpoint's policy and memory into a folder; a head, its gates, results and the rest stay behind."""
    for path in sorted(checkpoint.resolve().iterdir()):
        target = folder / path.name
        if not _is_of_a_policy(path.name) or target.exists():
            continue
        if copy:
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, target)
        else:
            os.symlink(path, target)


def _is_of_a_policy(name: str) -> bool:
    wanted, other = (any(fnmatch(name, one) for one in names) for names in (_OF_A_POLICY, _NOT_OF_A_POLICY))
    return wanted and not other


def _check_possible(energy: EnergyConfig, cache: FeatureCache) -> None:
    """What needs the policy itself."""
    alone = "train that head with scripts/finetune_energy.py --energy.freeze_backbone True"
    if energy.rollouts.dataset:
        raise FlagError(f"--energy.rollouts.dataset: a cache has no recorded rollouts; {alone}")
    if energy.negatives.samples.count:
        raise FlagError(f"--energy.negatives.samples.count: a cache has no further samples of the policy; {alone}")
    stored = cache.manifest.options["layer_exits"]
    wanted = "normed" if energy.negatives.layer_exits.normed else "raw"
    if stored != wanted and cache.num_exits > 1:
        raise FlagError(
            f"--energy.negatives.layer_exits.normed {wanted == 'normed'}: {cache.folder} was built with --layer-exits "
            f"{stored}; build one with --layer-exits {wanted}"
        )


def _since(started: float) -> float:
    return time.perf_counter() - started


def check_held_out(cache: FeatureCache, held_out: FeatureCache) -> None:
    """Refuses a cache that cannot judge heads that are trained from another.

    Raises:
        CacheError: it has the same split, or is of another dataset, checkpoint or normalisation, or made otherwise.
    """
    mine, theirs = cache.manifest, held_out.manifest
    other = mine.differences(theirs, split=False)
    for part in ("name", "fingerprint"):
        if mine.dataset[part] != theirs.dataset[part]:
            other.append(f"the dataset's {part} ({mine.dataset[part]}, here {theirs.dataset[part]})")
    if theirs.options["pool"] not in (1, mine.options["pool"]):
        other.append(f"pool ({mine.options['pool']} or 1, here {theirs.options['pool']})")
    if other:
        raise CacheError(f"{held_out.folder} was not made as {cache.folder}: {'; '.join(other)}")
    if mine.dataset["split"] == theirs.dataset["split"]:
        raise CacheError(
            f"{held_out.folder} has the split {theirs.dataset['split']}, as {cache.folder}: heads would be judged on "
            "what they learn; build one of the other split"
        )
