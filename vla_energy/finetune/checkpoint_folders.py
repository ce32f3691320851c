"""Where a run's checkpoints lie: put in place whole, the old ones dropped, the one to resume from found.

At every moment, a kill included, the last whole checkpoint is where `find` looks.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from pathlib import Path

from vla_energy.checkpoint import CheckpointError, sync_folder
from vla_energy.durable import check_seal, is_sealed_with, read_torch
from vla_energy.finetune.config import FinetuneConfig
from vla_energy.results import SETTINGS

logger = logging.getLogger(__name__)

STATE = "training_state.pt"
"""File in a checkpoint's folder: what only a resumed training needs."""

_ROOM = 2**16  # bytes


class NoCheckpointError(CheckpointError):
    """A run has no checkpoint at all, and never had one."""


def check_place(config: FinetuneConfig) -> None:
    """Proves that the run's last checkpoint can be written where it belongs, before steps are taken for it.

    Raises:
        CheckpointError: it cannot: a name too long, a folder that is read-only, no room at all.
    """
    target = folder_of(config, config.max_steps)
    made = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
    probe = target.with_name(f".{target.name}.{os.getpid():07d}")  # as long as a partial one; that may be of a live run
    try:
        probe.mkdir(parents=True)
        (probe / "probe").write_bytes(bytes(_ROOM))  # an empty file fits on a full disk
    except OSError as error:
        raise CheckpointError(
            f"no checkpoint could be written to {target} ({error}): make room, or name another place by "
            "--run_root_dir or --run_id_override"
        ) from error
    finally:
        shutil.rmtree(probe, ignore_errors=True)
        for folder in made:  # the innermost first
            with contextlib.suppress(OSError):
                folder.rmdir()


def drop_partial(config: FinetuneConfig) -> None:
    """Deletes what saves of this run left that were killed; for a process that holds the run's lock."""
    run = config.run_dir
    beside = [path for path in run.parent.glob(".*_chkpt.partial") if path.name.startswith(f".{run.name}--")]
    for path in (*beside, partial_of(run / "latest")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def partial_of(target: Path) -> Path:
    """Where a checkpoint is written before it is put in its place."""
    return target.with_name(f".{target.name}.partial")


def folder_of(config: FinetuneConfig, step: int) -> Path:
    """The checkpoint's folder: the run's own with `save_latest_checkpoint_only`, else the host's `--{step}_chkpt`."""
    return config.run_dir / "latest" if config.save_latest_checkpoint_only else _named(config, step)


def _named(config: FinetuneConfig, step: int) -> Path:
    return config.run_dir.with_name(f"{config.run_dir.name}--{step}_chkpt")


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
        NoCheckpointError: there is none, and none was lost, as far as the run's files tell.
        CheckpointError: there is none any more, or it is damaged; the message names the file and what else there is.
            Or the folder was renamed: it holds another step than its name says.
    """
    run = config.run_dir
    latest = _check_latest(run / "latest", config.resume_step)
    numbered = _numbered(config)
    found = {step: folder for step, folder in numbered.items() if _was_saved(folder)}
    if not found and not latest:
        _check_none_lost(config, [*numbered.values(), run / "latest", _old(run / "latest")])
        raise NoCheckpointError(f"no checkpoint of {run} to resume from; leave --resume out to start the run")
    step = max({**found, **latest}) if config.resume_step is None else config.resume_step
    if step in latest:
        return latest[step]
    for other in sorted(numbered.keys() - found.keys()):
        if other > step and config.resume_step is None and any(numbered[other].iterdir()):
            logger.warning("%s has neither %s nor a manifest.json, and is passed over", numbered[other], STATE)
    if step not in found:
        raise CheckpointError(f"{run} has no checkpoint at step {step}; there are {sorted({**found, **latest})}")
    try:
        held = _step_of(found[step])
    except CheckpointError as error:
        others = sorted({*found, *latest} - {step})
        remedy = f"--resume_step takes an earlier one: {others}" if others else "there is no other of this run"
        raise CheckpointError(f"{error}; {remedy}") from error
    if held != step:  # whole, but not the step that was asked for; what `drop_old` keeps goes by names too
        name = _named(config, held).name
        there = ", and what lies there now to its own step" if (run.parent / name).exists() else ""
        raise CheckpointError(
            f"{found[step]} holds step {held}, not step {step} as its name says: rename it back to {name}{there}"
        )
    return found[step]


def _was_saved(folder: Path) -> bool:
    """Whether a run saved this folder to be resumed; a state that is lost since is told by the seal."""
    return (folder / STATE).is_file() or is_sealed_with(folder, STATE)


def _check_none_lost(config: FinetuneConfig, folders: list[Path]) -> None:
    """Raises CheckpointError where the run had a checkpoint that is not there to resume: nothing may be overwritten."""
    run = config.run_dir
    for folder in folders:
        if folder.is_dir() and any(folder.iterdir()):
            raise CheckpointError(
                f"{folder} holds no {STATE}: the run cannot be resumed from it. Put that file back, or train anew "
                "under another --run_id_override, with this folder as --vla_path if its policy is whole"
            )
    last, freq = _last_row(run), _save_freq(config)
    if last > freq:  # the row of a step is written before its save: one behind it proves that save
        raise CheckpointError(
            f"{run / 'metrics.jsonl'} goes to step {last} and a checkpoint was due every {freq}, but there is none: "
            f"they lie beside the run's folder ({run.name}--STEP_chkpt) or in its latest/; put them there, or train "
            "anew under another --run_id_override"
        )


def _last_row(run: Path) -> int:
    """The last step in the run's metrics; 0 without, or where they are damaged, which is told when they are opened."""
    steps = [0]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        steps += [int(json.loads(row)["step"]) for row in (run / "metrics.jsonl").read_bytes().splitlines()]
    return max(steps)


def _save_freq(config: FinetuneConfig) -> int:
    """The `save_freq` that the run was started with, or this process's."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        freq = json.loads((config.run_dir / SETTINGS).read_bytes())["flags"]["save_freq"]
        if type(freq) is int and freq > 0:
            return freq
    return config.save_freq


def _check_latest(latest: Path, asked: int | None) -> dict[int, Path]:
    """`latest` by its step if it is whole, else the one before, if that is still there."""
    old = _old(latest)
    if not _was_saved(latest):
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
    if not isinstance(state, dict) or type(state.get("step")) is not int or state["step"] < 0:
        raise CheckpointError(f"{folder / STATE} is damaged: it says no step")
    return state["step"]


def _warn_unsealed(folder: Path, step: int | None) -> None:
    if step is None:
        logger.warning("%s has no manifest.json: its files cannot be checked", folder)
