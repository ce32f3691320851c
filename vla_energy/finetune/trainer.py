"""The fine-tuning loop: the policy's loss, the energy objective on its detached context, checkpoints, resume."""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vla_energy.backbones import VLAOutput
from vla_energy.backbones.tokens import sample_chunks, token_loss, token_metrics
from vla_energy.distributed import ALONE, Ranks
from vla_energy.finetune import checkpoints
from vla_energy.finetune.checkpoint_folders import check_place, drop_partial
from vla_energy.finetune.config import FinetuneConfig, FlagError
from vla_energy.finetune.diffusion import draw_noise, noise_loss, observe, say_samples
from vla_energy.finetune.energy import HeadTraining, check_head_sources, l1_metrics, load_memory, retrieve
from vla_energy.finetune.evaluate import evaluate
from vla_energy.finetune.logs import MetricLog
from vla_energy.finetune.policy_step import PolicyStep
from vla_energy.finetune.rollouts import RolloutStream
from vla_energy.finetune.setup import (
    Batch,
    autocast,
    layer_exits,
    make_head,
    open_rollouts,
    open_split,
    prepare,
    vla_folder,
)
from vla_energy.finetune.sharding import gathered, optimizer_state, whole
from vla_energy.finetune.signals import RunStoppedError, StopSignals, ValidationStoppedError
from vla_energy.fingerprint import fingerprint
from vla_energy.outcomes import RolloutFrames

logger = logging.getLogger(__name__)


class Trainer:
    """One fine-tuning run; `run()` does it all.

    Args:
        config: the flags. The constructor loads everything and raises on anything that does not fit.
        ranks: the processes that train, from `distributed.start`. Rank 0 alone validates, logs and saves.
    """

    def __init__(self, config: FinetuneConfig, ranks: Ranks = ALONE) -> None:
        self.config, self.ranks = config, ranks
        checkpoints.check_ranks(config, ranks)
        # All are there before one of them writes, and none trains where another could not load.
        ranks.each(self._load)
        ranks.check_equal((self.job.vla, self.head), "at the start")

    def _load(self) -> None:
        config, ranks = self.config, self.ranks
        config.check()
        if (config.run_dir / "metrics.jsonl").exists() and not config.resume:
            raise FlagError(
                f"{config.run_dir} holds a run already: go on with --resume True, or name another by --run_id_override"
            )
        if ranks.is_main:
            check_place(config)
        self.job = prepare(config, ranks)
        self.started_from = fingerprint(vla_folder(config), policy_only=True)
        # Opened now, so that a broken held-out shard is told before training and not after it.
        self.held_out = open_split(config, self.job.vla, "val", self.job.statistics) if config.use_val_set else None
        self.rollouts = open_rollouts(config, self.job.vla, self.job.statistics)
        self.trains_policy = not config.energy.freeze_backbone
        self.parameters = [p for p in self.job.vla.parameters() if p.requires_grad]
        # Fused kernels take no mixture of shards and whole tensors.
        how: dict[str, Any] = {"fused": False, "foreach": False} if config.fsdp else {"fused": True}
        self.optimizer = (
            torch.optim.AdamW(self.parameters, lr=config.learning_rate, **how) if self.trains_policy else None
        )
        self.policy_step = (
            None if self.optimizer is None else PolicyStep(self.optimizer, self.parameters, config, ranks)
        )
        self._gathered: dict[str, Any] | None = None  # the sharded optimiser's state, while rank 0 may save it
        self.head = self.guard = self.objective = self.monitor = None
        self.gate: dict[str, Any] | None = None  # of the last validation; its margin goes into the head's file
        self.generator = torch.Generator().manual_seed(config.seed)  # of the negatives alone
        self.training: HeadTraining | None = None
        if config.energy.enabled:
            self.head = make_head(config, self.job.vla).to(self.job.device)
            traits = check_head_sources(config, self.job.vla, self.job.statistics, ranks)
            if self.job.vla.diffuses:
                say_samples(config)
            self.training = HeadTraining(self.head, config, traits, self.generator, ranks)
            self.objective, self.guard, self.monitor = (
                self.training.objective, self.training.guard, self.training.monitor,
            )  # fmt: skip
        self.memory = load_memory(config, vla_folder(config), self.job.vla)
        self.step = 0
        self.stop = StopSignals()
        torch.manual_seed(config.seed)
        if config.resume:
            checkpoints.resume(self)

    def run(self) -> dict[str, Any]:
        """Trains to `max_steps`, validates and saves on the way; returns the last validation's metrics (on rank 0).

        Raises:
            RunStoppedError: SIGINT, SIGTERM or SIGHUP came; the step was finished and saved, its validation left out or
                broken off.
            CheckpointError: a checkpoint cannot be written; those before are intact.
            DivergedError: the policy's gradient is not finite any more.
        """
        config, ranks = self.config, self.ranks
        results: dict[str, Any] = {}
        accumulate = config.grad_accumulation_steps
        shard = (ranks.rank, ranks.world)
        batches = self.job.train.batches(config.batch_size, skip=self.step * accumulate, shard=shard)
        bar = tqdm(total=config.max_steps, initial=self.step, disable=None if ranks.is_main else True, unit="step")
        recorded = self._start_rollouts()
        reading = contextlib.nullcontext() if recorded is None else contextlib.closing(recorded)
        written = ranks.on_main(self._open_log)
        logging_to = contextlib.nullcontext() if written is None else written
        with logging_to as log, contextlib.closing(batches), reading, bar, self.stop:
            while self.step < config.max_steps:
                started = time.perf_counter()
                metrics = self.train_step(batches, recorded)
                self.step += 1
                frames = ranks.world * config.batch_size * accumulate / (time.perf_counter() - started)
                bar.update()
                if self._every(config.check_ranks_every, last=False):
                    ranks.check_equal((self.job.vla, self.head), f"after step {self.step}")
                if self._every(config.wandb_log_freq):
                    row = self._row(metrics)
                    if log is not None:
                        log.write(self.step, {**row, "frames_per_second": frames})
                    keys = ("train/l1", "train/noise_mse", "energy/loss")
                    shown: dict[str, Any] = {key: f"{row[key]:.4f}" for key in keys if key in row}
                    bar.set_postfix(**shown, frames_s=f"{frames:.0f}")
                stopping = self._stop_signal()
                if config.use_val_set and self._every(config.val_freq) and stopping is None:
                    results = self._validate_or_save(log)
                    if log is not None and results:
                        log.write(self.step, checkpoints.flatten(results, "val"))
                    stopping = self._stop_signal()
                if self._every(config.save_freq) or stopping is not None:
                    self._save(log)
                    stopping = stopping or self._stop_signal()  # one that came while it was saved: it need not again
                if stopping is not None:
                    raise RunStoppedError(stopping, checkpoints.folder_of(config, self.step))
        return results

    def _every(self, steps: int, last: bool = True) -> bool:
        """Whether something that is due every so many `steps` (0: never), and at the `last` one, is due now."""
        return (bool(steps) and self.step % steps == 0) or (last and self.step == self.config.max_steps)

    def whole_optimizer_state(self) -> dict[str, Any] | None:
        """The policy's optimiser, as checkpoints hold it; None where the policy is not trained."""
        return self._gathered or (None if self.optimizer is None else self.optimizer.state_dict())

    def _open_log(self) -> MetricLog:
        self.config.run_dir.mkdir(parents=True, exist_ok=True)
        log = MetricLog(self.config, self.step)
        drop_partial(self.config)
        return log

    def _stop_signal(self) -> int | None:
        """The signal that came on any rank; None before one did, and after the last step."""
        number = self.stop.number or 0
        if self.ranks.world > 1:
            number = int(self.ranks.largest(torch.tensor(number, device=self.job.device)))
        return number if number and self.step < self.config.max_steps else None

    def _save(self, log: MetricLog | None) -> None:
        """On rank 0; what is sharded is gathered there."""

        def work() -> None:
            if log is not None:
                log.sync()
            logger.info("saved %s", checkpoints.save(self))

        if self.optimizer is not None and self.config.fsdp:
            self._gathered = optimizer_state(self.optimizer, self.ranks)
        with gathered(self.job.vla, self.ranks):
            self.ranks.on_main(work)
        self._gathered = None

    def _row(self, metrics: dict[str, Tensor | float]) -> dict[str, float]:
        """Plain numbers of all ranks' frames: the policy's are means over the ranks, the head's are so already."""
        row = {key: float(value) for key, value in metrics.items()}
        names = [key for key in row if key.startswith("train/")]
        if self.ranks.world > 1 and names:
            means = self.ranks.mean(torch.tensor([row[name] for name in names], device=self.job.device))
            row.update(zip(names, means.tolist(), strict=True))
        return row

    def validate(self) -> dict[str, Any]:
        """Metrics on the held-out split; see `evaluate`. A signal breaks it off, unless the training is over."""
        assert self.held_out is not None

        def stopped() -> bool:
            return self.stop.number is not None and self.step < self.config.max_steps

        results = evaluate(self.job, self.held_out, self.head, self.config, self.config.run_dir, stopped)
        self.gate = results.get("gate")
        # What a validation leaves in cycles would else lie among what lives on, and the heap would grow around it.
        gc.collect()
        return results

    def _validate_or_save(self, log: MetricLog | None) -> dict[str, Any]:
        """The validation's metrics, on rank 0; none if it was broken off.

        The steps taken are not lost to held-out data that cannot be read.
        """
        results: dict[str, Any] = {}
        error: Exception | None = None
        with whole(self.job.vla):
            if self.ranks.is_main:
                try:
                    results = self.validate()
                except ValidationStoppedError:
                    logger.warning("step %d: the validation was broken off by the signal", self.step)
                except Exception as raised:
                    error = raised
            self.ranks.share()  # the others wait
        failed = torch.tensor(float(error is not None), device=self.job.device)
        if self.ranks.largest(failed):
            logger.error("validation failed")
            self._save(log)
        self.ranks.share(error)
        return results

    def _start_rollouts(self) -> RolloutStream | None:
        """The second stream, where this run's next step takes it up; None where rollouts are off."""
        if self.rollouts is None:
            return None
        return RolloutStream(self.rollouts, self.job, self.config, self.step * self.config.grad_accumulation_steps)

    def train_step(
        self, batches: Iterator[dict[str, Any]], recorded: RolloutStream | None = None
    ) -> dict[str, Tensor | float]:
        """One optimiser step of policy and head over all ranks' micro-batches; metrics of the last one."""
        metrics: dict[str, Tensor | float] = {}
        seen = None
        for micro in range(self.config.grad_accumulation_steps):
            raw = self.ranks.each(lambda: next(batches))
            batch = self.job.to_batch(raw)
            output = self._forward_policy(batch, metrics, micro)
            frames = None if recorded is None else recorded.next(raw["instructions"], self.generator)
            started = time.perf_counter()
            with self.ranks.own_randomness(self.config.seed, self.step, micro, 1):
                seen = self._backward_energy(output, batch, raw["episode"], metrics, frames)
            metrics["energy/ms"] = 1e3 * (time.perf_counter() - started)  # of the host's time: a GPU works on behind it
        if self.policy_step is not None:
            metrics.update(self.policy_step.take(self.step))
        if self.training is not None:
            self.training.step(self.step, seen, metrics)
        return metrics

    def _forward_policy(self, batch: Batch, metrics: dict[str, Tensor | float], micro: int = 0) -> VLAOutput | None:
        """Forward, and backward where the policy is trained; adds its metrics. None where nothing needs chunks."""
        own_randomness = self.ranks.own_randomness(self.config.seed, self.step, micro, 0)
        if self.job.vla.diffuses:
            return self._forward_diffusion(batch, metrics, own_randomness)
        exits = layer_exits(self.config)
        vla = self.job.vla.train(self.trains_policy)
        with own_randomness, torch.set_grad_enabled(self.trains_policy), autocast(self.config, self.job.device):
            output = vla(batch, exits)
        loss = (output.actions.float() - batch["actions"]).abs().mean()
        if output.token_logits is not None:
            loss = token_loss(output.token_logits, batch["labels"])
            with torch.no_grad():
                found = token_metrics(output.token_logits, batch["labels"], vla.action_dim, vla.config)
            metrics.update({f"train/{name}": value for name, value in found.items()})
            metrics["train/cross_entropy"] = loss.detach()
        if self.trains_policy:
            (loss / self.config.grad_accumulation_steps).backward()
        metrics.update(l1_metrics(output.actions, batch["actions"]))
        return output

    def _forward_diffusion(
        self,
        batch: Batch,
        metrics: dict[str, Tensor | float],
        own_randomness: contextlib.AbstractContextManager[None],
    ) -> VLAOutput | None:
        """The noise loss, and the policy's samples where the energy head or the L1 metrics need them."""
        config, job, ranks = self.config, self.job, self.ranks
        if self.trains_policy:
            drawn = draw_noise(job.vla, batch["actions"], ranks)
            with own_randomness, autocast(config, job.device):
                loss = noise_loss(job.vla.train(), batch, *drawn)
            (loss / config.grad_accumulation_steps).backward()
            metrics["train/noise_mse"] = loss.detach()
        if (self.step + 1) % config.diffusion_sample_freq == 0:
            # A generator of its own: the negatives are drawn as if nothing were measured.
            own = torch.Generator().manual_seed(config.seed + self.step)
            metrics.update(l1_metrics(observe(job, batch, config, own, 0, ranks=ranks).actions, batch["actions"]))
        if self.objective is None:
            return None
        samples = config.energy.negatives.samples
        return observe(job, batch, config, self.generator, samples.count, samples.steps, ranks)

    def _backward_energy(
        self,
        output: VLAOutput | None,
        batch: Batch,
        episodes: Any,
        metrics: dict[str, Tensor | float],
        rollouts: RolloutFrames | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Forward and backward of the objective; adds its metrics and returns what it saw."""
        if self.training is None or output is None:
            return None
        assert output.layer_actions is not None
        layers = output.layer_actions.detach().float()
        seen = (output.context.detach(), output.context_mask, batch["actions"], layers)
        retrieved = retrieve(self.memory, self.config, output.context, output.context_mask, output.actions, episodes)
        drawn = output.samples if output.token_logits is None else self._sample(output)
        self.training.backward(seen, self.step, metrics, retrieved, rollouts, drawn)
        return seen

    def _sample(self, output: VLAOutput) -> Tensor | None:
        """`(B,K,H,A)` more chunks of a policy with discrete tokens, where the objective wants them."""
        config, vla = self.config.energy, self.job.vla
        count = config.negatives.samples.count
        if output.token_logits is None or not count:
            return None
        temperature = config.candidates.sample_temperature
        drawing = (temperature, self.generator, vla.action_dim, vla.config, self.ranks)
        return sample_chunks(output.token_logits, count, *drawing)
