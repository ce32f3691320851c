"""What the RLDS recorders share: attempts until enough succeed, disturbances, one process a task, the writer.

Recorded rollouts (`vla_energy.rollout.record`) share the steps and the writer.

Simulator processes import this module: neither torch nor TensorFlow at its top.
"""

from __future__ import annotations

import functools
import io
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_energy.data.metaworld_env import SimulatorError

NOISE_HOLD = 5
"""Steps for which one disturbance is held; half of the intervals have none."""
VAL_SEED_OFFSET = 5_000
"""Validation episodes start from `seed + VAL_SEED_OFFSET`; rollouts use seeds of their own."""
ATTEMPTS_PER_EPISODE = 4

Step = dict[str, Any]
Episode = dict[str, Any]


@dataclass(frozen=True)
class Recording:
    """What to record of one task.

    Attributes:
        task: the simulator's name of it.
        episodes: successful episodes wanted.
        seed: seed of the first attempt; each attempt takes the next one.
        noise_share: share of episodes with a disturbed execution, 0 to 1.
    """

    task: str
    episodes: int
    seed: int
    noise_share: float


@dataclass(frozen=True)
class Layout:
    """The fields of a dataset that are not every recorder's.

    Attributes:
        observation: shape of each observation; three dimensions are an image, stored as JPEG, fewer are float32.
        action_dim: A.
        texts: further text fields of an episode's metadata.
    """

    observation: dict[str, tuple[int, ...]]
    action_dim: int
    texts: tuple[str, ...] = ()


class Disturbance:
    """What is added to an episode's executed actions `(A,)`: noise in the first three dimensions, held for some steps.

    Args:
        seed: the episode's.
        std: standard deviation in units of the action; 0 for an undisturbed episode.
        action_dim: A.
    """

    def __init__(self, seed: int, std: float, action_dim: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._std = std
        self._noise = np.zeros(action_dim)

    def at(self, index: int) -> np.ndarray:
        """The disturbance `(A,)` of step `index`; to be asked for every step in order."""
        if self._std and index % NOISE_HOLD == 0:
            self._noise[:3] = self._rng.normal(0.0, self._std, 3) * (self._rng.random() < 0.5)  # not the gripper
        return self._noise


def make_step(observation: dict[str, Any], action: np.ndarray, instruction: str, *, first: bool) -> Step:
    """A step in RLDS layout; `finish` marks the last."""
    return {
        "observation": observation,
        "action": action,
        "language_instruction": instruction,
        "discount": 1.0,
        "reward": 0.0,
        "is_first": first,
        "is_last": False,
        "is_terminal": False,
    }


def finish(steps: list[Step], solved: bool = True) -> list[Step]:
    """`steps` with the last one marked: as the one that solved the task, or as where the episode was cut off."""
    steps[-1].update(reward=float(solved), is_last=True, is_terminal=solved)
    return steps


def jpeg(image: np.ndarray, quality: int) -> bytes:
    """`image (h, w, 3)` uint8, encoded."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def record_successes(
    recording: Recording, noise_std: float, attempt: Callable[[int, float], list[Step] | None]
) -> list[Episode]:
    """Episodes in RLDS layout: successful attempts, failed ones replaced by the next seed.

    Args:
        recording: what is asked for.
        noise_std: of the disturbance of the noisy share.
        attempt: steps of one episode by seed and standard deviation of its disturbance; None if it failed.

    Raises:
        SimulatorError: fewer successes than asked for in four times as many attempts.
    """
    episodes: list[Episode] = []
    attempts = ATTEMPTS_PER_EPISODE * recording.episodes
    for seed in range(recording.seed, recording.seed + attempts):
        if len(episodes) == recording.episodes:
            break
        noisy = (seed * 0.6180339887) % 1.0 < recording.noise_share  # spreads the share evenly over seeds
        std = noise_std if noisy else 0.0
        steps = attempt(seed, std)
        if steps is not None:
            metadata = {"task": recording.task, "seed": seed, "success": True, "noise_std": std}
            episodes.append({"steps": steps, "episode_metadata": metadata})
    if len(episodes) < recording.episodes:
        raise SimulatorError(
            f"{recording.task}: the expert solved {len(episodes)} of the {recording.episodes} episodes asked for "
            f"in {attempts} attempts; ask for fewer, or less noise"
        )
    return episodes


def run_alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` in a child: OSMesa and TensorFlow crash each other when one process loads both."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def record_all(
    record: Callable[[Any], list[Episode]], recordings: Sequence[Recording], workers: int
) -> Iterator[Episode]:
    """Episodes of all recordings; one fresh process a task, `workers` at a time."""
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=1) as pool:
        for episodes in pool.imap(record, recordings, chunksize=1):
            yield from episodes


def record_dataset(
    out: str | Path,
    name: str,
    layout: Layout,
    record: Callable[[Any], list[Episode]],
    splits: Mapping[str, Sequence[Recording]],
    workers: int,
    description: str,
) -> str:
    """Records and writes a dataset, see `record_all` and `write_dataset`; returns its folder.

    Raises:
        ValueError: a split has a task twice, which would record the same episodes twice.
    """
    for recordings in splits.values():
        tasks = [recording.task for recording in recordings]
        if twice := [task for task in dict.fromkeys(tasks) if tasks.count(task) > 1]:
            raise ValueError(f"named more than once: {', '.join(twice)}; give each task once")
    episodes = {
        split: functools.partial(record_all, record, recordings, workers) for split, recordings in splits.items()
    }
    return write_dataset(out, name, layout, episodes, description)


def check_new(out: str | Path, name: str) -> None:
    """Raises ValueError if there is a dataset `name` in `out`."""
    if (Path(out) / name).exists():
        raise ValueError(f"{Path(out) / name} exists already: take another name, or delete it")


def write_dataset(
    out: str | Path, name: str, layout: Layout, splits: Mapping[str, Callable[[], Iterable[Episode]]], description: str
) -> str:
    """Writes `out/name/1.0.0` with tensorflow-datasets; returns its folder.

    Args:
        out: the data root.
        name: dataset name in snake case.
        layout: its fields.
        splits: what gives each split's episodes; images are JPEG bytes.
        description: kept in the dataset's description.

    Raises:
        ValueError: a dataset of this name is there.
        DataDependencyError: tensorflow-datasets is not installed.
    """
    check_new(out, name)
    from vla_energy.data import tensorflow_quiet

    tfds = tensorflow_quiet.tfds()

    # The keyword belongs to tfds' `__init_subclass__`, which pyright cannot see: the module comes as Any.
    class Demonstrations(  # pyright: ignore[reportGeneralTypeIssues]
        tfds.core.GeneratorBasedBuilder,
        skip_registration=True,  # pyright: ignore[reportCallIssue]
    ):
        VERSION = tfds.core.Version("1.0.0")
        # tfds finds this by itself in scripts only; in a module it takes a package that it does not install.
        code_path = tfds.core.Path(__file__)

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(builder=self, features=_features(tfds, layout), description=description)

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {split: self._generate_examples(episodes) for split, episodes in splits.items()}

        def _generate_examples(self, episodes: Callable[[], Iterable[Episode]]) -> Iterator[tuple[str, Episode]]:
            for episode in episodes():
                for step in episode["steps"]:
                    for key, value in step["observation"].items():
                        if isinstance(value, bytes):
                            step["observation"][key] = io.BytesIO(value)
                metadata = episode["episode_metadata"]
                yield "_".join(str(metadata[key]) for key in ("task", "seed", "arm") if key in metadata), episode

    Demonstrations.name = name
    builder = Demonstrations(data_dir=str(out))
    builder.download_and_prepare()
    return str(builder.data_path)


def _features(tfds: Any, layout: Layout) -> Any:
    features = tfds.features

    def observed(shape: tuple[int, ...]) -> Any:
        if len(shape) == 3:
            return features.Image(shape=shape, encoding_format="jpeg")
        return features.Tensor(shape=shape, dtype=np.float32)

    step = {
        "observation": {key: observed(shape) for key, shape in layout.observation.items()},
        "action": features.Tensor(shape=(layout.action_dim,), dtype=np.float32),
        "language_instruction": features.Text(),
        "discount": features.Scalar(dtype=np.float32),
        "reward": features.Scalar(dtype=np.float32),
        "is_first": features.Scalar(dtype=np.bool_),
        "is_last": features.Scalar(dtype=np.bool_),
        "is_terminal": features.Scalar(dtype=np.bool_),
    }
    metadata = {
        "task": features.Text(),
        "seed": features.Scalar(dtype=np.int64),
        "success": features.Scalar(dtype=np.bool_),
        "noise_std": features.Scalar(dtype=np.float32),
        **{key: features.Text() for key in layout.texts},
    }
    return features.FeaturesDict({"steps": features.Dataset(step), "episode_metadata": metadata})
