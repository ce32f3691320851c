"""Where a run's checkpoints lie: put in place whole, the old ones dropped, the one to resume from found.

At every moment, a kill included, the last whole checkpoint is where `find` looks.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from vla_energy.checkpoint import CheckpointError, sync_folder
from vla_energy.durable import check_seal, read_torch
from vla_energy.finetune.config import FinetuneConfig

logger = logging.getLogger(__name__)

STATE = "training_state.pt"
"""File in a checkpoint's folder: what only a resumed training needs."""


class NoCheckpointError(CheckpointError):
    """A run has no checkpoint at all."""


def folder_of(config: FinetuneConfig, step: int) -> Path:
    """The checkpoint's folder: the run's own with `save_latest_checkpoint_only`, else the host's `--{step}_chkpt`."""
    run = config.run_dir
    return run / "latest" if config.save_latest_checkpoint_only else run.with_name(f"{run.name}--{step}_chkpt")


def put(partial: Path, target: Path) -> None:
    """Puts the new folder in its place; at every moment it or the one before is there whole, where `find` looks."""
    old = _old(target)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)  # killed here, `find` takes the old one
        try:
            os.replace(partial, target)
        except OSError:
            os.replace(old, target)
            raise
    else:
        os.replace(partial, target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def drop_old(config: FinetuneConfig, newest: Path) -> None:
    """Deletes all but the last `keep_checkpoints` of the run; never what is newer than the one just saved."""
    if not config.keep_checkpoints or config.save_latest_checkpoint_only:
        return
    saved = sorted((step, folder) for step, folder in _numbered(config).items() if step <= _number(config, newest))
    for _, folder in saved[: -config.keep_checkpoints]:
        shutil.rmtree(folder)


def _numbered(config: FinetuneConfig) -> dict[int, Path]:
    """The run's `--{step}_chkpt` folders by step."""
    run = config.run_dir
    folders = [folder for folder in run.parent.glob("*_chkpt") if folder.name.startswith(f"{run.name}--")]
    return {step: folder for folder in folders if (step := _number(config, folder)) >= 0}


def _number(config: FinetuneConfig, folder: Path) -> int:
    text = folder.name.removeprefix(f"{config.run_dir.name}--").removesuffix("_chkpt")
    return int(text) if text.isdecimal() else -1


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def find(config: FinetuneConfig) -> Path:
    """The run's checkpoint at `resume_step`, or its last one, every file of it compared with its checksum.

    A damaged one is never passed over in silence: another is taken where `resume_step` names it. Only `latest`, where
    the one before was not deleted yet, is put aside as `latest.damaged` with a warning.

    Raises:
        CheckpointError: there is none, or it is damaged; the message names the file and what else there is.
    """
    run = config.run_dir
    latest = _check_latest(run / "latest", config.resume_step)
    found = {step: folder for step, folder in _numbered(config).items() if (folder / STATE).is_file()}
    if not found and not latest:
        raise NoCheckpointError(f"no checkpoint of {run} to resume from; leave --resume out to start the run")
    step = max({**found, **latest}) if config.resume_step is None else config.resume_step
    if step in latest:
        return latest[step]
    if step not in found:
        raise CheckpointError(f"{run} has no checkpoint at step {step}; there are {sorted({**found, **latest})}")
    try:
        _warn_unsealed(found[step], check_seal(found[step]))
    except CheckpointError as error:
        others = sorted({*found, *latest} - {step})
        remedy = f"--resume_step takes an earlier one: {others}" if others else "there is no other of this run"
        raise CheckpointError(f"{error}; {remedy}") from error
    return found[step]


def _check_latest(latest: Path, asked: int | None) -> dict[int, Path]:
    """`latest` by its step if it is whole, else the one before, if that is still there."""
    old = _old(latest)
    if not (latest / STATE).is_file():
        folder = old
    else:
        try:
            return {_step_of(latest): latest}
        except CheckpointError as error:
            if asked is None and not (old / STATE).is_file():
                raise
            logger.warning("%s", error)
            folder = old
    if not (folder / STATE).is_file():
        return {}
    step = _step_of(folder)
    if latest.exists():
        aside = latest.with_name("latest.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(latest, aside)
        logger.warning("%s is put aside as %s; the checkpoint before it, of step %d, is taken", latest, aside, step)
    os.replace(folder, latest)
    return {step: latest}


def _step_of(folder: Path) -> int:
    """The step of a folder that is whole. Raises CheckpointError, naming the file, where it is not."""
    step = check_seal(folder)
    _warn_unsealed(folder, step)
    if step is not None:
        return step
    state = read_torch(folder / STATE)
    if not isinstance(state, dict) or type(state.get("step")) is not int:
        raise CheckpointError(f"{folder / STATE} is damaged: it says no step")
    return state["step"]


def _warn_unsealed(folder: Path, step: int | None) -> None:
    if step is None:
        logger.warning("%s has no manifest.json: its files cannot be checked", folder)
