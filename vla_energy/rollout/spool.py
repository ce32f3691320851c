"""Recorded episodes on disk until their dataset is written: one npz file each, no TensorFlow, no pickles.

`NAME.unfinished` has `about.json`, which says what the dataset is; `task_000/00000.npz` and so on, the episodes of
finished tasks; and `under_way/`, those of the task under way, renamed once it is finished.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vla_energy.data.recording import Episode, Layout, finish, jpeg, make_step
from vla_energy.rollout.world import Observation

SUFFIX = ".unfinished"
_ABOUT, _UNDER_WAY, _OBSERVATION = "about.json", "under_way", "observation/"
_CAMERAS = ("image", "wrist_image")


@dataclass
class Trace:
    """The steps of one episode, as they are executed.

    Attributes:
        observations: what was seen before each action, by name: images as JPEG, vectors as float32.
        actions: `(A,)` float32, in the dataset's convention.
        shapes: of the observations, images `(h, w, 3)`.
        instruction: the task in words.
    """

    observations: list[dict[str, Any]] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    instruction: str = ""

    def extend(self, frames: Sequence[Observation], actions: np.ndarray, quality: int) -> None:
        """Appends steps.

        Args:
            frames: n observations, each from before its action.
            actions: `(n, A)`.
            quality: of the JPEG images, 1 to 100.
        """
        for frame, action in zip(frames, actions, strict=True):
            images = {camera_name(index): image for index, image in enumerate(frame.images)}
            vectors = {"state": frame.proprio, **frame.extras}
            vectors = {key: np.asarray(value, np.float32) for key, value in vectors.items()}
            self.shapes = {key: value.shape for key, value in {**images, **vectors}.items()}
            self.observations.append({**{key: jpeg(image, quality) for key, image in images.items()}, **vectors})
            self.actions.append(np.asarray(action, np.float32))
            self.instruction = frame.instruction


def camera_name(index: int) -> str:
    """`image`, `wrist_image`, `image_3`, `image_4` ..."""
    return _CAMERAS[index] if index < len(_CAMERAS) else f"image_{index + 1}"


class Spool:
    """The folder with the episodes of one recording.

    Args:
        folder: `DIR/NAME.unfinished`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def create(cls, folder: Path, about: dict[str, Any]) -> Spool:
        """A new, empty one.

        Args:
            folder: must not exist.
            about: kept beside the episodes; JSON.

        Raises:
            OSError: it cannot be written.
        """
        folder.mkdir(parents=True)
        (folder / _ABOUT).write_text(json.dumps(about))
        return cls(folder)

    def about(self) -> dict[str, Any]:
        """What `create` was given.

        Raises:
            ValueError: the folder is no spool.
        """
        try:
            return json.loads((self.folder / _ABOUT).read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{self.folder} holds no recorded rollouts ({error})") from error

    def add(self, trace: Trace, metadata: dict[str, Any]) -> None:
        """Writes an episode of the task under way; `metadata` is the episode's, JSON, with `success`."""
        folder = self.folder / _UNDER_WAY
        folder.mkdir(exist_ok=True)
        columns: dict[str, Any] = {
            # JPEG data never ends in zeros, so numpy's padded byte strings give it back as it was.
            f"{_OBSERVATION}{key}": np.array([observation[key] for observation in trace.observations])
            for key in trace.shapes
        }
        about = {"instruction": trace.instruction, "metadata": metadata, "shapes": trace.shapes}
        path = folder / f"{len(list(folder.iterdir())):05d}.npz"
        np.savez(path, about=np.array(json.dumps(about)), action=np.stack(trace.actions), **columns)

    def finish_task(self) -> None:
        """The task under way is finished: from here on its episodes are kept."""
        under_way = self.folder / _UNDER_WAY
        under_way.rename(self.folder / f"task_{len(list(self.folder.glob('task_*'))):03d}")

    def episodes(self) -> list[Path]:
        """Files of the episodes of finished tasks."""
        return sorted(self.folder.glob("task_*/*.npz"))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever numpy, zipfile and zlib raise on a damaged file becomes a ValueError that names it."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); delete it and record again") from error


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The file's arrays; they are stored as they are, so a file that unpacks to more than it has is none of ours."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed, which ours are not")
    with np.load(path, allow_pickle=False) as stored:
        return {key: stored[key] for key in stored.files}


def load_layout(path: Path) -> Layout:
    """The fields of a dataset with the episode in this file.

    Raises:
        ValueError: it is damaged.
    """
    with _reading(path):
        return _layout(_arrays(path))


def _layout(arrays: dict[str, np.ndarray]) -> Layout:
    about, action = json.loads(str(arrays["about"])), arrays["action"]
    texts = [key for key, value in about["metadata"].items() if isinstance(value, str) and key != "task"]
    shapes = {key: tuple(shape) for key, shape in about["shapes"].items()}
    return Layout(shapes, action.shape[1], tuple(texts))


def load_episode(path: Path) -> Episode:
    """An episode in RLDS layout, images as JPEG bytes.

    Raises:
        ValueError: it is damaged.
    """
    with _reading(path):
        return _episode(_arrays(path))


def _episode(arrays: dict[str, np.ndarray]) -> Episode:
    about = json.loads(str(arrays["about"]))
    columns = {
        key.removeprefix(_OBSERVATION): column.tolist() if column.dtype.kind == "S" else column
        for key, column in arrays.items()
        if key.startswith(_OBSERVATION)
    }
    steps = [
        make_step({key: column[i] for key, column in columns.items()}, action, about["instruction"], first=i == 0)
        for i, action in enumerate(arrays["action"])
    ]
    metadata = about["metadata"]
    return {"steps": finish(steps, metadata["success"]), "episode_metadata": metadata}
