"""Checkpoints of a run: a folder that loads anywhere, and the training state that resumes it bit for bit."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vla_energy.backbones import save_openvla
from vla_energy.checkpoint import CheckpointError, atomic_write, save_head
from vla_energy.finetune.config import EMBEDDED, FinetuneConfig
from vla_energy.finetune.setup import vla_folder
from vla_energy.rerank import MARGIN_KEY

if TYPE_CHECKING:
    from vla_energy.finetune.trainer import Trainer

STATE = "training_state.pt"
# Flags that may differ between a run and its continuation.
_FREE = {"resume", "resume_step", "max_steps", "val_freq", "val_time_limit", "use_val_set", "save_freq"} | {
    "save_latest_checkpoint_only", "wandb_entity", "wandb_project", "wandb_log_freq", "device", "run_root_dir",
    "check_ranks_every",
}  # fmt: skip


def folder_of(config: FinetuneConfig, step: int) -> Path:
    """The checkpoint's folder: the run's own with `save_latest_checkpoint_only`, else the host's `--{step}_chkpt`."""
    run = config.run_dir
    return run / "latest" if config.save_latest_checkpoint_only else run.with_name(f"{run.name}--{step}_chkpt")


def save(trainer: Trainer) -> Path:
    """Writes the checkpoint beside its place and moves it there whole; an older one goes only then."""
    config, vla = trainer.config, trainer.job.vla
    target = folder_of(config, trainer.step)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_openvla(
            vla,
            partial,
            trainer.step,
            processor_files=vla.folder,
            statistics={config.dataset_name: trainer.job.statistics},
            center_crop=config.image_aug,
            merge=config.merge_lora_during_training,
        )
        if trainer.head is not None:
            extra = {} if trainer.gate is None else {MARGIN_KEY: trainer.gate["margin"]}
            save_head(partial, trainer.head, trainer.step, trainer.job.statistics, extra)
        if trainer.memory is not None:
            trainer.memory.save(partial, trainer.step)
        state = _state(trainer)
        atomic_write(partial / STATE, lambda file: torch.save(state, file))
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{target} was not written ({error}); earlier checkpoints are intact") from error
    old = _old(target)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)  # killed here, `find` takes the old one
    os.replace(partial, target)
    shutil.rmtree(old, ignore_errors=True)
    return target


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def resume(trainer: Trainer) -> None:
    """Puts the trainer where a checkpoint of this run was saved.

    Raises:
        CheckpointError: there is none, it is damaged, or it was made with other flags.
    """
    config = trainer.config
    path = find(config) / STATE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for damaged files
        raise CheckpointError(f"{path} is damaged: {error}") from error
    saved, asked = state["flags"], _flags(config, trainer.ranks.world)
    changed = [key for key in saved.keys() | asked.keys() if saved.get(key) != asked.get(key)]
    if changed:
        raise CheckpointError(f"{path} was made with other values of: {', '.join(sorted(changed))}")
    trainer.step = int(state["step"])
    named = dict(trainer.job.vla.named_parameters())
    with torch.no_grad():
        for name, value in state["policy"].items():
            named[name].copy_(value)
    if trainer.optimizer is not None:
        trainer.optimizer.load_state_dict(state["optimizer"])
    if trainer.head is not None and trainer.guard is not None:
        trainer.head.load_state_dict(state["head"])
        trainer.guard.load_state_dict(state["guard"])
    if trainer.monitor is not None:
        trainer.monitor.load_state_dict(state["monitor"])
    trainer.generator.set_state(state["generator"])
    torch.set_rng_state(state["random"])


def find(config: FinetuneConfig) -> Path:
    """The run's checkpoint at `resume_step`, or its last one.

    Raises:
        CheckpointError: there is none; the message lists those there are.
    """
    run = config.run_dir
    found: dict[int, Path] = {}
    for folder in (*run.parent.glob(f"{run.name}--*_chkpt"), _old(run / "latest"), run / "latest"):
        if (folder / STATE).is_file():
            text = folder.name.removeprefix(f"{run.name}--").removesuffix("_chkpt")
            found[int(text) if text.isdigit() else _saved_step(folder / STATE)] = folder
    if not found:
        raise CheckpointError(f"no checkpoint of {run} to resume from; leave --resume out to start the run")
    step = max(found) if config.resume_step is None else config.resume_step
    if step not in found:
        raise CheckpointError(f"{run} has no checkpoint at step {step}; there are {sorted(found)}")
    return found[step]


def flatten(metrics: dict[str, Any], prefix: str) -> dict[str, float]:
    """Nested metrics to `prefix/a/b` scalars; None becomes NaN."""
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        name = f"{prefix}/{key}"
        scalar = math.nan if value is None else value
        flat.update(flatten(value, name) if isinstance(value, dict) else {name: float(scalar)})
    return flat


def _saved_step(path: Path) -> int:
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True)["step"])
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _flags(config: FinetuneConfig, processes: int) -> dict[str, str]:
    values = {key: value for key, value in vars(config).items() if key not in (*_FREE, "energy")}
    flags = {key: repr(value) for key, value in (values | _flat("energy", config.energy.to_dict())).items()}
    if config.lr_schedule == "cosine":
        flags["max_steps"] = repr(config.max_steps)  # the schedule ends there
    if processes > 1:
        flags["processes"] = repr(processes)  # times `batch_size` frames a step
    # A folder by where it is, whatever the working directory; the embedded one wherever the package is installed.
    return flags | ({} if config.vla_path == EMBEDDED else {"vla_path": str(vla_folder(config).resolve())})


def _flat(name: str, value: Any) -> dict[str, Any]:
    """Nested dicts as one: `energy.range.name`."""
    if not isinstance(value, dict):
        return {name: value}
    return {path: leaf for key, part in value.items() for path, leaf in _flat(f"{name}.{key}", part).items()}


def _state(trainer: Trainer) -> dict[str, Any]:
    """Everything the next step depends on; the data's position follows from the step."""
    with_head = trainer.head is not None and trainer.guard is not None
    return {
        "step": trainer.step,
        "flags": _flags(trainer.config, trainer.ranks.world),
        "policy": {name: p.detach().cpu() for name, p in trainer.job.vla.named_parameters() if p.requires_grad},
        "optimizer": None if trainer.optimizer is None else trainer.optimizer.state_dict(),
        "head": trainer.head.state_dict() if with_head and trainer.head is not None else None,
        "guard": trainer.guard.state_dict() if with_head and trainer.guard is not None else None,
        "monitor": None if trainer.monitor is None else trainer.monitor.state_dict(),
        "generator": trainer.generator.get_state(),
        "random": torch.get_rng_state(),
    }
