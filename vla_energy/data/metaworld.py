"""RLDS builder of Meta-World demonstrations by Meta-World's own scripted experts.

    python -m vla_energy.data.metaworld --name metaworld_mine --tasks drawer-open,reach \
        --episodes 20 --val-episodes 2 --noise-share 0.5 --out DIR

writes `DIR/metaworld_mine/1.0.0/` with splits `train` and `val`. In a noisy episode the executed
action is the expert's plus a disturbance held for a few steps, while the *recorded* action stays the
expert's answer to the state it was pushed into (DART, Laskey et al. 2017): recoveries, not mistakes. Only `train`
has noisy episodes.
Episodes that the expert fails are dropped and replaced by the next seed.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_energy.data import metaworld_env as mw

NOISE_STD = 0.6
"""Standard deviation of the disturbance of a noisy episode, in units of the action's range."""
NOISE_HOLD = 5
"""Steps for which one disturbance is held; half of the intervals have none."""
JPEG_QUALITY = 92
VAL_SEED_OFFSET = 5_000
"""Validation episodes start from `seed + VAL_SEED_OFFSET`; rollouts use seeds of their own."""
_ATTEMPTS_PER_EPISODE = 4


@dataclass(frozen=True)
class Recording:
    """What to record of one task.

    Attributes:
        task: Meta-World task name.
        episodes: successful episodes wanted.
        seed: seed of the first attempt; each attempt takes the next one.
        noise_share: share of episodes with a disturbed execution, 0 to 1.
    """

    task: str
    episodes: int
    seed: int
    noise_share: float


def record(recording: Recording) -> list[dict[str, Any]]:
    """Records one task in this process (one renderer per process, see `metaworld_env`).

    Returns:
        Episodes in RLDS layout; images are JPEG bytes.

    Raises:
        SimulatorError: the expert solves fewer episodes than asked in four times as many attempts.
    """
    world = mw.MetaWorld(recording.task)
    episodes: list[dict[str, Any]] = []
    for seed in range(recording.seed, recording.seed + _ATTEMPTS_PER_EPISODE * recording.episodes):
        if len(episodes) == recording.episodes:
            break
        noisy = (seed * 0.6180339887) % 1.0 < recording.noise_share  # spreads the share evenly over seeds
        steps = _run_expert(world, seed, NOISE_STD if noisy else 0.0)
        if steps is not None:
            metadata = {"task": recording.task, "seed": seed, "success": True, "noise_std": NOISE_STD if noisy else 0.0}
            episodes.append({"steps": steps, "episode_metadata": metadata})
    if len(episodes) < recording.episodes:
        raise mw.SimulatorError(
            f"{recording.task}: the expert solved {len(episodes)} of the {recording.episodes} episodes asked for "
            f"in {_ATTEMPTS_PER_EPISODE * recording.episodes} attempts; ask for fewer, or less noise"
        )
    return episodes


def _run_expert(world: mw.MetaWorld, seed: int, noise_std: float) -> list[dict[str, Any]] | None:
    """One episode's steps, or None if the expert does not solve it within `MAX_STEPS`."""
    rng = np.random.default_rng(seed)
    noise = np.zeros(mw.ACTION_DIM)
    steps: list[dict[str, Any]] = []
    world.reset(seed)
    for index in range(mw.MAX_STEPS):
        if noise_std and index % NOISE_HOLD == 0:
            noise[:3] = rng.normal(0.0, noise_std, 3) * (rng.random() < 0.5)  # the gripper is left alone
        action = world.expert_action()
        steps.append(
            {
                "observation": {"image": _jpeg(world.render()), "state": world.state()},
                "action": action,
                "language_instruction": mw.instruction(world.task),
                "discount": 1.0,
                "reward": 0.0,
                "is_first": index == 0,
                "is_last": False,
                "is_terminal": False,
            }
        )
        if world.step(action + noise):
            steps[-1].update(reward=1.0, is_last=True, is_terminal=True)
            return steps
    return None


def _jpeg(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _record_all(recordings: list[Recording], workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Episodes of all recordings, keyed; one fresh process per task, `workers` at a time."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, maxtasksperchild=1) as pool:
        for episodes in pool.imap(record, recordings, chunksize=1):
            for episode in episodes:
                metadata = episode["episode_metadata"]
                for step in episode["steps"]:
                    step["observation"]["image"] = io.BytesIO(step["observation"]["image"])
                yield f"{metadata['task']}_{metadata['seed']}", episode


def _features(tfds: Any) -> Any:
    features = tfds.features
    step = {
        "observation": {
            "image": features.Image(shape=(mw.IMAGE_SIZE, mw.IMAGE_SIZE, 3), encoding_format="jpeg"),
            "state": features.Tensor(shape=(mw.PROPRIO_DIM,), dtype=np.float32),
        },
        "action": features.Tensor(shape=(mw.ACTION_DIM,), dtype=np.float32),
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
    }
    return features.FeaturesDict({"steps": features.Dataset(step), "episode_metadata": metadata})


def build(
    out: str,
    name: str,
    tasks: list[str],
    episodes: int,
    val_episodes: int,
    *,
    seed: int = 0,
    noise_share: float = 0.5,
    workers: int = 2,
) -> str:
    """Records and writes an RLDS dataset; returns its folder.

    Args:
        out: the data root (`data_root_dir` of the fine-tuning script).
        name: dataset name in snake case.
        tasks: Meta-World task names.
        episodes, val_episodes: successful episodes a task in `train` and in `val`.
        seed: first seed of `train`; `val` starts `VAL_SEED_OFFSET` later.
        noise_share: share of disturbed episodes in `train`; `val` has none, as a chunk that answers disturbances
            to come cannot be foreseen and would hide how well a policy does.
        workers: simulator processes at a time.

    Raises:
        ValueError: unknown task names, or a dataset of this name is there.
        SimulatorError: simulator or OpenGL missing, or an expert that fails too often.
    """
    if (Path(out) / name).exists():
        raise ValueError(f"{Path(out) / name} exists already: take another name, or delete it")
    # In a child: OSMesa and TensorFlow crash each other when one process loads both.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(mw.check_tasks, (tasks,))
    from vla_energy.data import tensorflow_quiet

    tfds = tensorflow_quiet.tfds()

    # The keyword belongs to tfds' `__init_subclass__`, which pyright cannot see: the module comes as Any.
    class MetaWorldDemonstrations(  # pyright: ignore[reportGeneralTypeIssues]
        tfds.core.GeneratorBasedBuilder,
        skip_registration=True,  # pyright: ignore[reportCallIssue]
    ):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(builder=self, features=_features(tfds), description=f"Tasks: {tasks}")

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            splits = {"train": self._generate_examples(episodes, seed, noise_share)}
            if val_episodes:
                splits["val"] = self._generate_examples(val_episodes, seed + VAL_SEED_OFFSET, 0.0)
            return splits

        def _generate_examples(self, count: int, first_seed: int, share: float) -> Iterator[tuple[str, dict[str, Any]]]:
            return _record_all([Recording(task, count, first_seed, share) for task in tasks], workers)

    MetaWorldDemonstrations.name = name
    builder = MetaWorldDemonstrations(data_dir=out)
    builder.download_and_prepare()
    return str(builder.data_path)


def main() -> None:
    """Runs `build` with the command line's flags and prints the dataset's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True)
    parser.add_argument("--tasks", required=True, help="comma-separated Meta-World task names")
    parser.add_argument("--episodes", type=int, default=20, help="training episodes a task")
    parser.add_argument("--val-episodes", type=int, default=2, help="validation episodes a task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--noise-share", type=float, default=0.5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", required=True, help="data root; the dataset goes to OUT/NAME/1.0.0")
    args = parser.parse_args()
    try:
        print(_build(args))
    except (ValueError, ImportError, mw.SimulatorError) as error:
        sys.exit(f"error: {error}")


def _build(args: argparse.Namespace) -> str:
    return build(
        args.out,
        args.name,
        args.tasks.split(","),
        args.episodes,
        args.val_episodes,
        seed=args.seed,
        noise_share=args.noise_share,
        workers=args.workers,
    )


if __name__ == "__main__":
    main()
