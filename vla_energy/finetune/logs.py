"""Where metrics go: `metrics.jsonl` always, and the trackers beside it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import IO

from vla_energy.checkpoint import CheckpointError, atomic_write
from vla_energy.finetune.config import FinetuneConfig, FlagError
from vla_energy.finetune.trackers import Guarded, wanted_trackers
from vla_energy.results import SETTINGS, versions

logger = logging.getLogger(__name__)

_LOCK = ".lock"


class MetricLog:
    """Writes rows of scalars; a context manager.

    Args:
        config: its `run_dir` gets `metrics.jsonl`, `SETTINGS` and TensorBoard's events; see `trackers` for the others.
        step: rows after this step are dropped from an existing `metrics.jsonl`, as a resumed run writes them anew.

    Raises:
        FlagError: W&B or Trackio is asked for and not installed, or another process writes to the run's folder.
        CheckpointError: `metrics.jsonl` of a resumed run is damaged, or cannot be written; its lock is no file.
    """

    def __init__(self, config: FinetuneConfig, step: int) -> None:
        self._path, self._every = config.run_dir / "metrics.jsonl", config.wandb_log_freq
        settings = {"flags": asdict(config), "versions": versions()}
        wanted = wanted_trackers(config, settings, step)  # raises before anything is written
        self._lock = _lock(config.run_dir / _LOCK)
        kept = self._kept(step) if config.resume else []
        # Whole or not at all: a kill while this is written must not lose the rows of the steps before.
        atomic_write(self._path, lambda file: file.write(b"".join(row + b"\n" for row in kept)))
        self._tell_hole(kept, step)
        text = json.dumps(settings, indent=1, default=str) + "\n"
        atomic_write(config.run_dir / SETTINGS, lambda file: file.write(text.encode()))
        self._trackers = [Guarded(name, start, config.run_dir) for name, start in wanted.items()]

    def _kept(self, step: int) -> list[bytes]:
        """Rows up to `step`; of a killed run the last one may be torn, and is of a step that is taken again."""
        try:
            rows = self._path.read_bytes().splitlines() if self._path.exists() else []
        except OSError as error:
            raise CheckpointError(f"{self._path} cannot be read: {error}") from error
        kept = []
        for number, row in enumerate(rows, start=1):
            try:
                if json.loads(row)["step"] <= step:
                    kept.append(row)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                if number < len(rows):
                    raise CheckpointError(
                        f"{self._path}: line {number} is damaged ({error}); mend or delete that line, then resume"
                    ) from error
        return kept

    def _tell_hole(self, kept: list[bytes], step: int) -> None:
        """An earlier resume may have cut rows of steps that are gone on from now."""
        last = int(json.loads(kept[-1])["step"]) if kept else 0
        if last + self._every <= step:
            logger.warning(
                "%s ends at step %d and the run goes on from step %d: the rows between were cut, when an earlier "
                "checkpoint was resumed", self._path, last, step,
            )  # fmt: skip

    def sync(self) -> None:
        """Makes the rows durable, before a checkpoint says that their steps were taken."""
        with self._path.open("ab") as file:
            os.fsync(file.fileno())

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, *_: object) -> None:
        for tracker in self._trackers:
            tracker.close()
        self._lock.close()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One row; values that are not finite become null in the file, as JSON has no NaN.

        Raises:
            CheckpointError: it cannot be written; what was saved before is whole, unless the run's folder is gone.
        """
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        try:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, **finite}) + "\n")
        except OSError as error:
            if not self._path.parent.is_dir():  # and "latest" with it: no promise of checkpoints, no call to make room
                raise CheckpointError(
                    f"step {step}: the run's folder {self._path.parent} is gone: it was deleted or moved while the run "
                    "wrote to it"
                ) from error
            raise CheckpointError(
                f"step {step}: {self._path} cannot be written ({error}); the checkpoints are intact: make room, then "
                "the same command with --resume True goes on from the last one"
            ) from error
        for tracker in self._trackers:
            tracker.log(metrics, step)


def _lock(path: Path) -> IO[str]:
    """Holds a run's folder until the file is closed, or the process ends in whatever way.

    Two that write there would mix their rows, and the files of their checkpoints.

    Raises:
        FlagError: another process holds it.
        CheckpointError: it cannot be opened or written. A link is not followed: what it points to would be emptied.
    """
    try:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
    except OSError as error:
        raise CheckpointError(f"{path} is no file that a run can lock ({error}): delete it") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = file.read(20).strip() or "unknown"
        file.close()
        raise FlagError(
            f"{path.parent} is being written by another process (PID {holder}): end that one first, or name another "
            "run by --run_id_override"
        ) from None
    except OSError as error:  # some network drives have no locks
        logger.warning("%s cannot be locked (%s): see that no other process trains there", path.parent, error)
    try:
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
    except OSError as error:
        with contextlib.suppress(OSError):  # closing writes once more
            file.close()
        raise CheckpointError(f"{path} cannot be written ({error}): nothing was begun; make room") from error
    return file
