"""Flags of `scripts/finetune_energy.py`: the original script's names and defaults, and `--energy.*`.

No `from __future__ import annotations` here: draccus reads the field types at run time.
"""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path

from vla_energy.config import EnergyConfig, RolloutsConfig

EMBEDDED = "embedded"
"""Value of `vla_path` and `data_root_dir` that means what ships with the package."""


class FlagError(ValueError):
    """A flag has a value that cannot work; the message names the flag and the fix."""


@dataclass
class FinetuneConfig:
    """Fine-tuning an OpenVLA(-OFT) checkpoint with an energy head.

    Attributes:
        vla_path: checkpoint folder; "embedded" is the tiny one that ships with us.
        data_root_dir: folder with RLDS datasets; "embedded" is the bundled one.
        dataset_name: RLDS dataset in it.
        dataset_config: JSON or YAML file that describes a dataset we do not know.
        run_root_dir: runs are written below it.
        shuffle_buffer_size: frames.
        data_threads: of each process, to read, decode and augment frames; the batches are the same with any number.
        use_l1_regression: continuous actions by L1; False is discrete action tokens, without an action head, or what
            `use_diffusion` says.
        use_diffusion: continuous actions by diffusion: the action head learns the noise in a chunk, chunks are samples.
        num_diffusion_steps_train: T of its noise schedule; of a checkpoint's head, those that it was trained with.
        num_diffusion_steps_inference: steps of a denoising in validation, rollouts, memories and preflight, stored with
            the checkpoint; 0 takes the checkpoint's, else T. The host has this flag in its evaluation scripts.
        diffusion_sample_freq: steps between two measurements of the sampled chunks' L1 while training.
        use_film: the instruction modulates the vision blocks (FiLM); a checkpoint trained with it needs it.
        num_images_in_input: 1 main camera, 2 with wrist.
        use_proprio: proprioception as an input.
        batch_size: of each process, per optimiser step and accumulation step; so is `energy.rollouts.batch_size`.
        learning_rate: of LoRA, action head and proprio projector (AdamW).
        lr_warmup_steps: from 10 to 100 percent of the rate.
        num_steps_before_decay: the rate drops tenfold after so many steps.
        grad_accumulation_steps: micro-batches a step.
        max_steps: optimiser steps; exactly so many are taken.
        use_val_set, val_freq, val_time_limit: validation every so many steps, for at most so many seconds.
        save_freq, save_latest_checkpoint_only: checkpoints.
        keep_checkpoints: how many of a run are kept, the newest ones; 0 keeps all.
        resume, resume_step: go on from the run's last (or that) checkpoint; other flags must be the run's.
        image_aug: the host's augmentation; inference then centre-crops.
        use_lora, lora_rank, lora_dropout: False trains every weight.
        merge_lora_during_training: checkpoints hold merged weights, ready to load; False keeps the adapters only
            in the training state.
        wandb_entity, wandb_project: W&B; empty is off. TensorBoard and metrics.jsonl are always written.
        trackio_project: Trackio, on this machine; empty takes the environment variable TRACKIO_PROJECT, else is off.
        run_id_note, run_id_override: name of the run.
        wandb_log_freq: steps between two rows of metrics.
        energy_warm_steps: optimiser steps in which the head's learning rate rises.
        energy_learning_rate: of the head.
        energy: everything else about the head.
        horizon: actions a chunk; 0 takes the checkpoint's.
        new_action_head: start action head and proprio projector anew, for a robot with other dimensions.
        precision: "bf16" autocast or "fp32"; the head is always fp32.
        lr_schedule: "step" as the host's, or "cosine" to a tenth at `max_steps`.
        max_grad_norm: clips the policy's gradient; 0 is off, as in the host.
        device: "auto", "cpu", "cuda", ...
        seed: of everything random.
        check_ranks_every: with several processes (torchrun), steps between two comparisons of a hash of their weights;
            0 compares them at the start only.
        rank_wait_minutes: with several processes, how long they wait for one that lives, but reads data, validates or
            saves; then all end, with its number. Twice `val_time_limit` at least; 0 is without limit.
        fsdp: with several processes, each keeps its part of the decoder layers (FSDP2); needs torch 2.6.
    """

    vla_path: str = EMBEDDED
    data_root_dir: str = EMBEDDED
    dataset_name: str = "metaworld_demo"
    run_root_dir: Path = Path("runs")
    shuffle_buffer_size: int = 100_000
    data_threads: int = 1
    use_l1_regression: bool = True
    use_diffusion: bool = False
    num_diffusion_steps_train: int = 50
    num_diffusion_steps_inference: int = 0
    use_film: bool = False
    num_images_in_input: int = 1
    use_proprio: bool = False
    batch_size: int = 8
    learning_rate: float = 5e-4
    lr_warmup_steps: int = 0
    num_steps_before_decay: int = 100_000
    grad_accumulation_steps: int = 1
    max_steps: int = 200_000
    use_val_set: bool = False
    val_freq: int = 10_000
    val_time_limit: int = 180
    save_freq: int = 10_000
    save_latest_checkpoint_only: bool = False
    keep_checkpoints: int = 0
    resume: bool = False
    resume_step: int | None = None
    image_aug: bool = True
    diffusion_sample_freq: int = 50
    use_lora: bool = True
    lora_rank: int = 32
    lora_dropout: float = 0.0
    merge_lora_during_training: bool = True
    wandb_entity: str = ""
    wandb_project: str = ""
    trackio_project: str = ""
    run_id_note: str | None = None
    run_id_override: str | None = None
    wandb_log_freq: int = 10
    energy_warm_steps: int = 0
    energy_learning_rate: float = 5e-4
    energy: EnergyConfig = field(default_factory=EnergyConfig)
    dataset_config: str | None = None
    horizon: int = 0
    new_action_head: bool = False
    precision: str = "bf16"
    lr_schedule: str = "step"
    max_grad_norm: float = 0.0
    device: str = "auto"
    seed: int = 7
    check_ranks_every: int = 0
    rank_wait_minutes: float = 60.0
    fsdp: bool = False

    def check(self) -> None:
        """Refuses what cannot work or is not built yet, before anything is loaded.

        Raises:
            FlagError: names the flag and what to do.
        """
        for entry in fields(self):  # draccus takes a file's null for any of them
            if getattr(self, entry.name) is None and entry.default is not None:
                raise FlagError(f"--{entry.name}: needs a value, and not null")
        self._check_diffusion()
        self._check_samples()
        if self.precision not in ("bf16", "fp32"):
            raise FlagError(f"--precision {self.precision}: known are bf16, fp32")
        if self.lr_schedule not in ("step", "cosine"):
            raise FlagError(f"--lr_schedule {self.lr_schedule}: known are step, cosine")
        counts = ("batch_size", "grad_accumulation_steps", "max_steps", "val_freq", "save_freq", "wandb_log_freq")
        for flag in (*counts, "data_threads", "shuffle_buffer_size"):
            if getattr(self, flag) < 1:
                raise FlagError(f"--{flag} {getattr(self, flag)}: must be 1 or more")
        for flag in ("learning_rate", "energy_learning_rate", "lora_rank", "num_images_in_input", "val_time_limit"):
            if not 0 < getattr(self, flag) < math.inf:
                raise FlagError(f"--{flag} {getattr(self, flag)}: must be above 0, and finite")
        for flag in ("learning_rate", "energy_learning_rate"):
            if getattr(self, flag) > 1:
                raise FlagError(f"--{flag} {getattr(self, flag)}: must be 1 or less; 5e-4 is usual")
        if not 0 <= self.lora_dropout < 1:
            raise FlagError(f"--lora_dropout {self.lora_dropout}: must be 0 or more, and below 1")
        if not 0 <= self.seed < 2**32:
            raise FlagError(f"--seed {self.seed}: must be 0 or more, and below 2**32")
        not_negative = ("horizon", "lr_warmup_steps", "energy_warm_steps", "max_grad_norm", "num_steps_before_decay")
        for flag in (*not_negative, "keep_checkpoints", "check_ranks_every", "rank_wait_minutes"):
            if not getattr(self, flag) >= 0:
                raise FlagError(f"--{flag} {getattr(self, flag)}: must be 0 or more")
        if self.energy.freeze_backbone and not self.energy.enabled:
            raise FlagError("--energy.freeze_backbone True with --energy.enabled False leaves nothing to train")
        if self.keep_checkpoints and self.save_latest_checkpoint_only:
            raise FlagError(
                f"--keep_checkpoints {self.keep_checkpoints} with --save_latest_checkpoint_only True, which keeps one: "
                "leave one of them out"
            )
        if self.resume_step is not None and not self.resume:
            raise FlagError("--resume_step needs --resume True")
        self._check_rollouts()

    def _check_rollouts(self) -> None:
        """Here and not in `RolloutsConfig`: heads that were trained with such idle settings can still be loaded."""
        rollouts, default = self.energy.rollouts, RolloutsConfig()
        changed = [
            entry.name for entry in fields(default) if getattr(rollouts, entry.name) != getattr(default, entry.name)
        ]
        if changed and not rollouts.dataset:
            value = getattr(rollouts, changed[0])
            raise FlagError(
                f"--energy.rollouts.{changed[0]} {value} does nothing without --energy.rollouts.dataset: name the "
                "dataset of recorded rollouts, or leave the flag out"
            )

    def _check_samples(self) -> None:
        energy = self.energy
        counts = {
            "negatives.samples.count": energy.negatives.samples.count,
            "candidates.samples": energy.candidates.samples,
        }
        for flag, value in counts.items():
            if value and energy.enabled and self.use_l1_regression:
                raise FlagError(
                    f"--energy.{flag} {value} needs --use_l1_regression False, for discrete tokens, or with "
                    "--use_diffusion True for a diffusion head: an L1 head has one chunk"
                )

    @property
    def discrete(self) -> bool:
        """Whether actions are tokens of the language model: neither L1 nor diffusion, as in the host."""
        return not self.use_l1_regression and not self.use_diffusion

    @property
    def longest_wait(self) -> float:
        """Seconds that processes wait for one that lives: `rank_wait_minutes`, and two validations at least."""
        return max(60 * self.rank_wait_minutes, 2 * self.val_time_limit) if self.rank_wait_minutes else math.inf

    def _check_diffusion(self) -> None:
        samples, on = self.energy.negatives.samples, self.energy.enabled
        if not self.use_diffusion:
            return
        if self.use_l1_regression:
            raise FlagError("--use_diffusion True needs --use_l1_regression False: a policy has one action head")
        for flag in ("num_diffusion_steps_train", "diffusion_sample_freq"):
            if getattr(self, flag) < 1:
                raise FlagError(f"--{flag} {getattr(self, flag)}: must be 1 or more")
        most = self.num_diffusion_steps_train
        steps = {"num_diffusion_steps_inference": self.num_diffusion_steps_inference}
        steps |= {"energy.negatives.samples.steps": samples.steps} if on else {}
        for flag, value in steps.items():
            if not 0 <= value <= most:
                raise FlagError(f"--{flag} {value}: must be at most --num_diffusion_steps_train {most}")

    @property
    def run_dir(self) -> Path:
        """`run_root_dir/run_id`; the id names what the host's does: checkpoint, dataset, batch, rate, LoRA."""
        return self.run_root_dir / (self.run_id_override or self._run_id())

    def _run_id(self) -> str:
        parts = [Path(self.vla_path).name, self.dataset_name, f"b{self.batch_size * self.grad_accumulation_steps}"]
        parts.append(f"lr-{self.learning_rate}")
        parts += [f"lora-r{self.lora_rank}+dropout-{self.lora_dropout}"] if self.use_lora else []
        parts += ["image_aug"] if self.image_aug else []
        parts += ["energy"] if self.energy.enabled else []
        parts += [self.run_id_note] if self.run_id_note else []
        return "+".join(parts)
