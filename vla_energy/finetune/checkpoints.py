"""Checkpoints of a run: a folder that loads anywhere, and the training state that resumes it bit for bit.

Where they lie is `checkpoint_folders`'.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from vla_energy.backbones import save_openvla
from vla_energy.checkpoint import CheckpointError, atomic_write, save_head
from vla_energy.distributed import Ranks
from vla_energy.durable import read_torch, seal
from vla_energy.finetune.checkpoint_folders import (
    STATE,
    NoCheckpointError,
    drop_old,
    find,
    folder_of,
    partial_of,
    put,
)
from vla_energy.finetune.config import EMBEDDED, FinetuneConfig, FlagError
from vla_energy.finetune.setup import vla_folder
from vla_energy.finetune.sharding import load_optimizer_state, write
from vla_energy.rerank import MARGIN_KEY

if TYPE_CHECKING:
    from vla_energy.finetune.trainer import Trainer

logger = logging.getLogger(__name__)

# Flags that may differ between a run and its continuation.
_FREE = {"resume", "resume_step", "max_steps", "val_freq", "val_time_limit", "use_val_set", "save_freq"} | {
    "save_latest_checkpoint_only", "keep_checkpoints", "wandb_entity", "wandb_project", "trackio_project",
    "wandb_log_freq", "device", "run_root_dir", "check_ranks_every", "data_threads", "fsdp", "rank_wait_minutes",
}  # fmt: skip


# Flags that may differ between the processes of a run: each one's own disks and threads, and what rank 0 alone does.
_OWN = {"device", "data_threads", "data_root_dir", "run_root_dir", "vla_path", "dataset_config"} | {
    "wandb_entity", "wandb_project", "trackio_project",
}  # fmt: skip


# Flags that say where something lies: what lies there is compared instead.
_PLACES = {"vla_path", "data_root_dir", "dataset_config"}


def check_ranks(config: FinetuneConfig, ranks: Ranks) -> None:
    """Refuses ranks of which one was started with other flags: they would take other steps, or another number of them.

    Raises:
        FlagError: on every rank, with the flag and the two values.
    """
    own = {key: value for key, value in vars(config).items() if key not in (*_OWN, "energy")}
    flags = {key: repr(value) for key, value in (own | _flat("energy", config.energy.to_dict())).items()}
    first, *others = ranks.gather_objects(flags)
    for rank, other in enumerate(others, start=1):
        for flag, value in first.items():
            if other.get(flag) != value:
                raise FlagError(f"--{flag} is {value} on rank 0 and {other.get(flag)} on rank {rank}: start all alike")


def save(trainer: Trainer) -> Path:
    """Writes the checkpoint beside its place, with checksums, and moves it there whole; an older one goes only then.

    Raises:
        CheckpointError: the system refused (disk full, no permission), or weights are not finite; earlier checkpoints
            are as they were.
    """
    config = trainer.config
    target = folder_of(config, trainer.step)
    _check_finite(trainer, target)
    partial = partial_of(target)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(trainer, partial)
        seal(partial, trainer.step)
        put(partial, target)
    except (OSError, CheckpointError, SafetensorError, RuntimeError) as error:
        # A full disk is an OSError of Python, a RuntimeError of torch's writer and an error of its own in safetensors.
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, RuntimeError) and not _of_the_disk(error):
            raise
        raise CheckpointError(
            f"{target} was not written ({error}); earlier checkpoints are intact: make room, then the same command "
            "with --resume True goes on from the last one"
        ) from error
    drop_old(config, target)
    return target


def _check_finite(trainer: Trainer, target: Path) -> None:
    """A checkpoint that is good for nothing must not take the place of the last good one."""
    named = {f"policy: {name}": p for name, p in trainer.job.vla.named_parameters() if p.requires_grad}
    if trainer.head is not None:
        named |= {f"head: {name}": p for name, p in trainer.head.named_parameters()}
    lost = [name for name, parameter in named.items() if not bool(parameter.isfinite().all())]
    if lost:
        raise CheckpointError(
            f"{target} was not written: {len(lost)} of {len(named)} trained weights are not finite ({lost[0]}): the "
            "run has diverged. Earlier checkpoints are intact; a lower learning rate may keep it from that"
        )


def _of_the_disk(error: RuntimeError) -> bool:
    return "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error) or "inline_container" in str(error)


def _write(trainer: Trainer, folder: Path) -> None:
    config, vla = trainer.config, trainer.job.vla
    save_openvla(
        vla,
        folder,
        trainer.step,
        processor_files=vla.folder,
        statistics={config.dataset_name: trainer.job.statistics},
        center_crop=config.image_aug,
        merge=config.merge_lora_during_training,
    )
    if trainer.head is not None:
        extra = {} if trainer.gate is None else {MARGIN_KEY: trainer.gate["margin"]}
        save_head(folder, trainer.head, trainer.step, trainer.job.statistics, extra)
    if trainer.memory is not None:
        trainer.memory.save(folder, trainer.step)
    state = _state(trainer)
    atomic_write(folder / STATE, lambda file: torch.save(state, file))


def resume(trainer: Trainer) -> None:
    """Puts the trainer where a checkpoint of this run was saved; at the start, if it ended before the first one.

    Raises:
        CheckpointError: there is no such run, its checkpoint it is damaged, or it was made with other flags.
    """
    config = trainer.config
    try:
        folder = find(config)
    except NoCheckpointError:
        # Else a run that was killed early could neither go on nor start again under its name.
        if config.resume_step is not None or not (config.run_dir / "metrics.jsonl").is_file():
            raise
        logger.warning("%s ended before its first checkpoint: it starts again", config.run_dir)
        return
    path = folder / STATE
    state = read_torch(path)
    try:
        saved, asked = dict(state["flags"]), _flags(config, trainer.ranks.world)
        contents = state.get("contents")  # earlier versions have none: where something lies had to do
        changed = {key for key in saved.keys() | asked.keys() if saved.get(key) != asked.get(key)}
        if changed := changed - (set() if contents is None else _PLACES):
            raise CheckpointError(f"{path} was made with other values of: {', '.join(sorted(map(str, changed)))}")
        for what, digest in _contents(trainer).items():
            if contents is not None and contents[what] != digest:
                raise CheckpointError(
                    f"{path} was made with another {what}: the run cannot go on with what is there now; put it back, "
                    "or train anew under another --run_id_override, with this checkpoint as --vla_path"
                )
        _restore(trainer, state)
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is not the training state of this run ({type(error).__name__}: {error}); --resume_step takes "
            "an earlier one"
        ) from error
    logger.info("going on from step %d of %s", trainer.step, folder)


def _restore(trainer: Trainer, state: dict[str, Any]) -> None:
    step = state["step"]
    if type(step) is not int or step < 0:
        raise ValueError(f"step {step!r}")
    named = dict(trainer.job.vla.named_parameters())
    trained = {name for name, parameter in named.items() if parameter.requires_grad}
    if trained != set(state["policy"]):
        raise ValueError("it holds other weights of the policy than this run trains")
    for name, value in state["policy"].items():
        if value.shape != named[name].shape:
            raise ValueError(f"{name} is {tuple(value.shape)}, expected {tuple(named[name].shape)}")
        write(named[name], value)
    if trainer.optimizer is not None:
        load_optimizer_state(trainer.optimizer, state["optimizer"])
    if trainer.head is not None and trainer.guard is not None:
        trainer.head.load_state_dict(state["head"])
        trainer.guard.load_state_dict(state["guard"])
    if trainer.monitor is not None:
        trainer.monitor.load_state_dict(state["monitor"])
    trainer.generator.set_state(state["generator"])
    torch.set_rng_state(state["random"])
    if trainer.job.device.type == "cuda" and state.get("random_cuda") is not None:
        torch.cuda.set_rng_state(state["random_cuda"], trainer.job.device)
    trainer.gate = state.get("gate")
    trainer.step = step


def flatten(metrics: dict[str, Any], prefix: str) -> dict[str, float]:
    """Nested metrics to `prefix/a/b` scalars; None becomes NaN."""
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        name = f"{prefix}/{key}"
        scalar = math.nan if value is None else value
        flat.update(flatten(value, name) if isinstance(value, dict) else {name: float(scalar)})
    return flat


def _flags(config: FinetuneConfig, processes: int) -> dict[str, str]:
    values = {key: value for key, value in vars(config).items() if key not in (*_FREE, "energy")}
    flags = {key: repr(value) for key, value in (values | _flat("energy", config.energy.to_dict())).items()}
    if config.lr_schedule == "cosine":
        flags["max_steps"] = repr(config.max_steps)  # the schedule ends there
    if processes > 1:
        flags["processes"] = repr(processes)  # times `batch_size` frames a step
    # A folder by where it is, whatever the working directory; the embedded one wherever the package is installed.
    return flags | ({} if config.vla_path == EMBEDDED else {"vla_path": str(vla_folder(config).resolve())})


def _contents(trainer: Trainer) -> dict[str, str]:
    """Digests of what a run cannot go on without, wherever it lies."""
    job = trainer.job
    statistics = json.dumps(job.statistics.to_dict(), sort_keys=True)
    return {
        "policy (--vla_path)": trainer.started_from,
        "dataset (--data_root_dir)": job.train.digest,
        "normalisation (dataset_statistics.json)": hashlib.sha256(statistics.encode()).hexdigest()[:16],
    }


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
        "contents": _contents(trainer),
        "policy": {name: p.detach().cpu() for name, p in trainer.job.vla.named_parameters() if p.requires_grad},
        "optimizer": trainer.whole_optimizer_state(),
        "head": trainer.head.state_dict() if with_head and trainer.head is not None else None,
        "guard": trainer.guard.state_dict() if with_head and trainer.guard is not None else None,
        "monitor": None if trainer.monitor is None else trainer.monitor.state_dict(),
        "generator": trainer.generator.get_state(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state(trainer.job.device) if trainer.job.device.type == "cuda" else None,
        "gate": trainer.gate,
    }
