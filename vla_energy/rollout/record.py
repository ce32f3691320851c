"""Rollouts as an RLDS dataset: what `vla-energy rollout --record DIR` writes to `DIR/NAME/1.0.0`, split `train`.

Every episode of every arm, solved or not, one step for each executed action with what was seen before it. Fields are
named as the simulator's recorder names them (`image`, `wrist_image` with a second camera, `state`, ...), actions are
what the simulator executed (clipped; LIBERO's gripper as -1 open or +1 closed). The last step of a solved episode has
reward 1 and is terminal; that of a failed one has reward 0 and is not. `episode_metadata` has `success`, `arm`,
`task`, `seed`. Unlike in recorded demonstrations of LIBERO, steps that do nothing are in the data.

A backend given as `module:Class` gets the same fields: `image`, `wrist_image`, `image_3` ... in the order of its
cameras, `state`, its class's `extras()` if it has any, and actions as the policy gave them.

Beside the dataset is `DIR/NAME/fields.json`, which tells our reader about it: a `dataset_config` for any NAME.

During the run, episodes of finished tasks are kept in `DIR/NAME.unfinished`. If the run fails, they are written; if
it is killed, they stay, and this writes them:

    python -m vla_energy.rollout.record DIR/NAME.unfinished
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from vla_energy.data import tensorflow_quiet
from vla_energy.data.datasets import DatasetConfig, dataset_config
from vla_energy.data.recording import Layout, check_new, write_dataset
from vla_energy.rollout.simulator import BACKENDS
from vla_energy.rollout.spool import SUFFIX, Spool, Trace, camera_name, load_episode, load_layout
from vla_energy.rollout.world import Observation

FIELDS = "fields.json"
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_FINISH = "python -m vla_energy.rollout.record"


class RecordingError(RuntimeError):
    """The dataset could not be written; the message says where the episodes are."""


@dataclass(frozen=True)
class Convention:
    """How rollouts of a backend are stored.

    Attributes:
        name: the dataset's name unless another one is given.
        quality: of the JPEG images, as in the backend's recorder.
        executed: of a policy's actions `(n, A)`, what the simulator executed, in the convention of its datasets.
        fields: how our reader reads datasets of the backend; None where it knows none.
        file_path: whether the metadata has openvla-oft's text field of this name.
    """

    name: str = "rollouts"
    quality: int = 95
    executed: Callable[[np.ndarray], np.ndarray] = np.asarray
    fields: DatasetConfig | None = None
    file_path: bool = False


def convention(backend: str) -> Convention:
    """The convention of a backend, a name in `BACKENDS` or `module:Class`."""
    if backend in ("metaworld", BACKENDS["metaworld"]):
        from vla_energy.data.metaworld import JPEG_QUALITY

        clip = functools.partial(np.clip, a_min=-1.0, a_max=1.0)
        return Convention("metaworld_rollouts", JPEG_QUALITY, clip, dataset_config("metaworld"))
    if backend in ("libero", BACKENDS["libero"]):
        from vla_energy.data import libero, libero_env

        fields = dataset_config("libero_rollouts")
        return Convention("libero_rollouts", libero.JPEG_QUALITY, libero_env.to_raw, fields, file_path=True)
    return Convention()


def check_target(root: str | Path, name: str | None, backend: str) -> str:
    """Checks before the first episode that a recording can be written; returns its name.

    Args:
        root: the data root.
        name: dataset name; None takes the backend's.
        backend: the simulator.

    Raises:
        ValueError: a name that is not in snake case, or a dataset or an unfinished recording of this name is there.
        DataDependencyError: TensorFlow or tensorflow-datasets is not installed.
    """
    name = convention(backend).name if name is None else name
    if _NAME.fullmatch(name) is None:
        raise ValueError(f"record name {name!r}: expected snake case, such as my_rollouts")
    check_new(root, name)
    spool = Path(root) / f"{name}{SUFFIX}"
    if spool.exists():
        raise ValueError(
            f"{spool} holds the finished tasks of a recording that was killed, or is going on: write them with "
            f"`{_FINISH} {spool}`, delete it, or take another name"
        )
    tensorflow_quiet.require()
    return name


class Recorder:
    """Keeps the episodes of a run on disk and writes them as a dataset when it ends, whether it fails or not.

    A context manager. Leaving it writes the episodes of finished tasks; after an exception it says on stderr what was
    kept, and lets the exception pass.

    Args:
        root: the data root.
        name: dataset name, from `check_target`.
        backend: the simulator.
        description: kept in the dataset's description.

    Attributes:
        folder: where the dataset will be.

    Raises:
        OSError: `root` cannot be written.
    """

    def __init__(self, root: str | Path, name: str, backend: str, description: str) -> None:
        self.folder = Path(root) / name / "1.0.0"
        self._convention = convention(backend)
        about = {"backend": backend, "description": description}
        self._spool = Spool.create(Path(root) / f"{name}{SUFFIX}", about)
        self._shapes: dict[str, tuple[int, ...]] | None = None

    def extend(self, trace: Trace, frames: Sequence[Observation], actions: np.ndarray) -> None:
        """Appends executed steps to an episode's trace.

        Args:
            trace: the episode's.
            frames: n observations, each from before its action.
            actions: `(m >= n, A)` as the policy gave them; the first n were executed.
        """
        executed = self._convention.executed(np.asarray(actions, np.float64)[: len(frames)])
        trace.extend(frames, executed, self._convention.quality)

    def add(self, trace: Trace, task: str, seed: int, arm: str, success: bool) -> None:
        """Keeps a finished episode.

        Raises:
            ValueError: its observations have other names or shapes than those before.
            OSError: it cannot be written.
        """
        self._shapes = self._shapes or trace.shapes
        if trace.shapes != self._shapes:
            raise ValueError(
                f"{task}: one dataset cannot hold observations {trace.shapes} beside {self._shapes}: record such tasks "
                "to different names"
            )
        metadata = {"task": task, "seed": seed, "success": success, "noise_std": 0.0, "arm": arm}
        if self._convention.file_path:
            metadata["file_path"] = f"rollout/{task}/{arm}/seed_{seed}"
        self._spool.add(trace, metadata)

    def finish_task(self) -> None:
        """All episodes of the task are there: from here on they outlive a failure."""
        self._spool.finish_task()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        count = len(self._spool.episodes())
        if not count:
            shutil.rmtree(self._spool.folder)
            return
        try:
            write(self._spool.folder)
        except Exception as failure:
            folder = self._spool.folder
            where = f"{count} recorded episodes are kept in {folder}; write them with `{_FINISH} {folder}`"
            if error is None:
                raise RecordingError(f"the dataset could not be written ({failure}); {where}") from failure
            print(f"{where} ({failure})", file=sys.stderr)
        else:
            if error is not None:
                print(f"{count} recorded episodes of the finished tasks are in {self.folder}", file=sys.stderr)


def write(spool_folder: str | Path) -> Path:
    """Writes the dataset of a folder `DIR/NAME.unfinished` to `DIR/NAME` and deletes that folder.

    Returns:
        `DIR/NAME/1.0.0`.

    Raises:
        ValueError: not such a folder, no finished task in it, or `DIR/NAME` exists.
        DataDependencyError: tensorflow-datasets is not installed.
        OSError: something cannot be read or written.
    """
    spool = Spool(Path(spool_folder).resolve())
    about, files = spool.about(), spool.episodes()
    if not files:
        raise ValueError(f"no task was finished in {spool.folder}: delete it")
    root, name = spool.folder.parent, spool.folder.name.removesuffix(SUFFIX)
    check_new(root, name)
    layout = load_layout(files[0])
    splits = {"train": lambda: map(load_episode, files)}
    try:
        with contextlib.redirect_stdout(sys.stderr):  # tensorflow-datasets prints
            folder = Path(write_dataset(root, name, layout, splits, about["description"]))
        fields = {name: asdict(_fields(about["backend"], layout))}
        (root / name / FIELDS).write_text(json.dumps(fields, indent=1) + "\n")
    except BaseException:
        shutil.rmtree(root / name, ignore_errors=True)
        raise
    shutil.rmtree(spool.folder)
    return folder


def _fields(backend: str, layout: Layout) -> DatasetConfig:
    """How our reader is to read the dataset."""
    known = convention(backend).fields
    if known is not None:
        return known
    wrist = camera_name(1)
    return DatasetConfig(wrist_image_key=wrist if wrist in layout.observation else None)


def main() -> None:
    """Writes what a killed run left; prints the dataset's folder."""
    parser = argparse.ArgumentParser(description="Writes the dataset of a recording that was killed.")
    parser.add_argument("folder", help=f"DIR/NAME{SUFFIX}")
    try:
        print(write(parser.parse_args().folder))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
