"""One RLDS dataset through openvla-oft's reader and through ours: normalised chunks, proprio, statistics.

    git clone https://github.com/moojink/openvla-oft; git clone https://github.com/moojink/dlimp_openvla
    python benchmarks/host_reader.py --host openvla-oft --dlimp dlimp_openvla \
        --data_root_dir DATA --dataset_name libero_spatial_no_noops

prints the largest differences and exits with 1 if one is above 1e-6 by more than rounding explains: the host
normalises and averages in 32-bit numbers, which shows where a dimension's range is small beside its values. The
host's code runs as it is in its checkout,
beside this environment's TensorFlow. Not run are the `__init__` files above its RLDS package, which load its
models; `tensorflow_graphics`, which only its transforms for DROID use, is replaced by a module that fails on use.

The host takes its statistics from all splits, ours are the training split's: they are compared over all splits, and
both readers normalise with them. The host leaves out the last H - 1 steps of every episode, ours repeats
the last action there: steps are compared where both have them.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vla_energy.actions import DatasetStatistics, FieldStatistics
from vla_energy.data import DatasetError, RldsDataset, dataset_config, tensorflow_quiet
from vla_energy.data.rlds_folder import Shard, find_folder
from vla_energy.data.rlds_source import RldsSource
from vla_energy.data.statistics import compute_statistics

TOLERANCE = 1e-6
FIELDS = ("mean", "std", "min", "max", "q01", "q99")
_EPSILON = 2.0**-24  # relative error of rounding to 32 bits

Found = dict[str, tuple[float, float]]
"""Largest difference, and its part that rounding does not explain, by what differs."""


class EverySplit(RldsSource):
    """A dataset whose splits are read as one, as the host does for its statistics."""

    def shards(self, split: str) -> list[Shard]:
        """All files of all splits, by the splits' names as tfds orders them for its split `all`."""
        stored = self._info.splits
        return [shard for name in stored for shard in super(EverySplit, self).shards(name)]

    @property
    def names(self) -> tuple[str, ...]:
        """Stored splits."""
        return tuple(self._info.splits)


class _Absent(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{self.__name__}.{name} was asked for, but {self.__name__} is not installed")


def import_host(host: Path, dlimp: Path | None) -> types.SimpleNamespace:
    """The host's RLDS functions, from its checkout.

    Raises:
        SystemExit: a path is no such checkout, or a package is missing.
    """
    for path, part in ((host, "prismatic/vla/datasets/rlds/dataset.py"), (dlimp, "dlimp/dataset.py")):
        if path is not None and not (path / part).is_file():
            sys.exit(f"error: {path} has no {part}; expected a checkout, see {Path(__file__).name} --help")
    sys.path[:0] = [str(path) for path in (host, dlimp) if path is not None]
    for name in ("prismatic", "prismatic.vla", "prismatic.vla.datasets"):
        package = types.ModuleType(name)
        package.__path__ = [str(host / name.replace(".", "/"))]
        sys.modules[name] = package
    for name in ("tensorflow_graphics", "tensorflow_graphics.geometry", "tensorflow_graphics.geometry.transformation"):
        parent, _, leaf = name.rpartition(".")
        sys.modules[name] = _Absent(name)
        if parent:
            setattr(sys.modules[parent], leaf, sys.modules[name])
    base = "prismatic.vla.datasets.rlds"
    try:
        dataset = importlib.import_module(f"{base}.dataset")
    except ModuleNotFoundError as error:
        sys.exit(f"error: the host's reader needs {error.name}; for dlimp give a checkout of it with --dlimp")
    return types.SimpleNamespace(
        read=dataset.make_dataset_from_rlds,
        transform=dataset.apply_trajectory_transforms,
        kwargs=importlib.import_module(f"{base}.oxe.materialize").make_oxe_dataset_kwargs,
        constants=importlib.import_module("prismatic.vla.constants"),
    )


def host_split(host: types.SimpleNamespace, root: Path, name: str, split: str) -> tuple[list[dict[str, Any]], Any]:
    """The host's episodes of a split in stored order, and its statistics; its own settings but for order and images."""
    kwargs = host.kwargs(name, root, load_camera_views=("primary", "wrist"))
    single = {"num_parallel_reads": 1, "num_parallel_calls": 1}
    data, statistics = host.read(**kwargs, **single, shuffle=False, train=split == "train")
    data = host.transform(
        data,
        train=split == "train",
        window_size=1,
        future_action_window_size=host.constants.NUM_ACTIONS_CHUNK - 1,
        skip_unlabeled=True,
        goal_relabeling_strategy="uniform",
        num_parallel_calls=1,
    )
    keep = [
        {
            "actions": episode["action"],
            "proprio": episode["observation"]["proprio"][:, 0],
            "instructions": [text.decode() for text in episode["task"]["language_instruction"]],
        }
        for episode in data.as_numpy_iterator()
    ]
    return keep, statistics


def our_episodes(
    root: Path, name: str, split: str, horizon: int, statistics: DatasetStatistics
) -> Iterator[dict[str, Any]]:
    """The same of our reader, all steps."""
    dataset = RldsDataset(
        root, name, split, horizon, use_proprio=True, statistics=statistics, shuffle_buffer_size=0, val_fraction=0.0
    )
    frames: list[dict[str, Any]] = []
    for frame in dataset.batches(1, repeat=False):
        if frames and frame["episode"][0] != frames[-1]["episode"][0]:
            yield _join(frames)
            frames = []
        frames.append(frame)
    yield _join(frames)


def _join(frames: list[dict[str, Any]]) -> dict[str, Any]:
    arrays = {key: np.concatenate([frame[key] for frame in frames]) for key in ("actions", "proprio")}
    return {**arrays, "instructions": [frame["instructions"][0] for frame in frames]}


def _largest(theirs: Any, ours: Any, rounding: Any = 0.0) -> tuple[float, float]:
    difference = np.abs(np.asarray(theirs, np.float64) - np.asarray(ours, np.float64))
    return float(difference.max()), float(np.maximum(difference - rounding, 0.0).max())


def _normalization_rounding(statistics: FieldStatistics) -> np.ndarray:
    """Error `(dims,)` of a normalised value that 32 bits allow.

    Both bounds are rounded as quantiles, as numbers and in differences; in units of the range, and times 2.
    """
    most = np.maximum(np.abs(statistics.q01), np.abs(statistics.q99))
    scaled = 12 * _EPSILON * most / (statistics.q99 - statistics.q01 + 1e-8)
    return np.where(statistics.mask, scaled, 0.0)


def _statistics_rounding(statistics: FieldStatistics, key: str, count: int) -> Any:
    """Error `(dims,)` of a mean or standard deviation: a sum of `count` rounded numbers, rounded each time."""
    if key not in ("mean", "std"):
        return 0.0
    return 4 * _EPSILON * count**0.5 * np.maximum(np.abs(statistics.min), np.abs(statistics.max))


def compare_statistics(theirs: dict[str, Any], ours: DatasetStatistics) -> Found:
    """Differences by field, and of the counts."""
    found: Found = {}
    for field, mine in (("action", ours.action), ("proprio", ours.proprio)):
        assert mine is not None
        for key in FIELDS:
            rounding = _statistics_rounding(mine, key, ours.num_transitions)
            found[f"statistics: {field}.{key}"] = _largest(theirs[field][key], getattr(mine, key), rounding)
    found["statistics: action.mask"] = _largest(theirs["action"]["mask"], ours.action.mask)
    for key in ("num_transitions", "num_trajectories"):
        found[f"statistics: {key}"] = _largest(theirs[key], getattr(ours, key))
    return found


def compare_split(
    theirs: list[dict[str, Any]], ours: list[dict[str, Any]], split: str, statistics: DatasetStatistics
) -> Found:
    """Differences over the steps that both have.

    Raises:
        SystemExit: the episodes are not the same ones.
    """
    steps, more = sum(len(episode["actions"]) for episode in theirs), sum(len(episode["actions"]) for episode in ours)
    print(f"{split}: {len(theirs)} episodes, {steps} steps of the host, {more} of ours")
    if len(theirs) != len(ours) or not steps:
        sys.exit(f"error: {split}: the host reads {len(theirs)} episodes with {steps} steps, ours {len(ours)}")
    for index, (their, our) in enumerate(zip(theirs, ours, strict=True)):
        if their["instructions"] != our["instructions"][: len(their["actions"])]:
            sys.exit(f"error: {split}: episode {index} has another instruction for the host than for us")
    found: Found = {}
    for key, mine in (("actions", statistics.action), ("proprio", statistics.proprio)):
        assert mine is not None
        our_steps = [our[key][: len(their[key])] for their, our in zip(theirs, ours, strict=True)]
        their_steps = [their[key] for their in theirs]
        rounding = _normalization_rounding(mine)
        found[f"{split}: {key}"] = _largest(np.concatenate(their_steps), np.concatenate(our_steps), rounding)
    return found


def compare(host: types.SimpleNamespace, root: Path, name: str) -> Found:
    """All differences of a dataset."""
    source = EverySplit(root, name, dataset_config(name), val_fraction=0.0)
    statistics = compute_statistics(source, "all")
    horizon = host.constants.NUM_ACTIONS_CHUNK
    found: Found = {}
    for split in source.names:
        theirs, host_statistics = host_split(host, root, name, split)
        ours = list(our_episodes(root, name, split, horizon, statistics))
        found |= compare_split(theirs, ours, split, statistics) | compare_statistics(host_statistics, statistics)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", type=Path, help="checkout of openvla-oft")
    parser.add_argument("--dlimp", type=Path, help="checkout of dlimp_openvla; not needed where dlimp is installed")
    parser.add_argument("--data_root_dir", type=Path)
    parser.add_argument("--dataset_name", default="libero_spatial_no_noops")
    parser.add_argument("--quick", action="store_true", help="as the other benchmarks; without --host nothing is run")
    args = parser.parse_args()
    if args.quick and args.host is None:
        print("left out: needs a checkout of openvla-oft, see --help")
        return
    if args.host is None or args.data_root_dir is None:
        parser.error("--host and --data_root_dir are needed")
    tensorflow_quiet.tf()
    host = import_host(args.host.resolve(), args.dlimp and args.dlimp.resolve())
    try:
        folder = find_folder(args.data_root_dir, args.dataset_name)
        with tempfile.TemporaryDirectory() as scratch:  # both readers keep statistics beside the data
            copy = Path(scratch) / args.dataset_name / "1.0.0"
            copy.mkdir(parents=True)
            for path in folder.iterdir():
                if not path.name.startswith("dataset_statistics_"):
                    (copy / path.name).symlink_to(path.resolve())
            found = compare(host, Path(scratch), args.dataset_name)
    except DatasetError as error:
        sys.exit(f"error: {error}")
    print(f"{'largest difference':<32} {'':8}  beyond rounding")
    for what, (difference, unexplained) in found.items():
        print(f"{what:<32} {difference:.2e}  {unexplained:.2e}{'  TOO LARGE' if unexplained > TOLERANCE else ''}")
    sys.exit(int(max(unexplained for _, unexplained in found.values()) > TOLERANCE))


if __name__ == "__main__":
    main()
