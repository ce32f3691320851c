"""Frames a second of our RLDS reader beside openvla-oft's own pipeline: same data, image size and augmentation.

    python benchmarks/data.py [--quick] [--out runs/bench/data.json]        # the bundled data, our reader alone
    python benchmarks/data.py --host openvla-oft --dlimp dlimp_openvla \
        --data_root_dir DATA --dataset_name libero_spatial_no_noops [--quick] [--out runs/bench/data.json]

The host's arm is the `tf.data` pipeline of its `RLDSDataset`, with its settings, from its checkout (see
`host_reader.py`): both end at NumPy arrays of augmented uint8 images, normalised chunks and proprio. The host also
decodes, resizes and augments a goal image for each image, which its training does not use; a second arm leaves that
out. All arms are open in one process and take turns; each waits until the others' buffers are full and idle, so
that CPU time is its own. Ratios of medians. The profile is from readers with less and less to do.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from host_reader import import_host

from vla_energy.data import DatasetError, RldsDataset, tensorflow_quiet
from vla_energy.data.rlds_folder import find_folder
from vla_energy.finetune.setup import EMBEDDED_DATA

BUFFER = 512  # frames of every shuffle buffer: small, as filling it is not what is measured
_AUGMENTATION = {
    "random_resized_crop": {"scale": [0.9, 0.9], "ratio": [1.0, 1.0]},
    "random_brightness": [0.2],
    "random_contrast": [0.8, 1.2],
    "random_saturation": [0.8, 1.2],
    "random_hue": [0.05],
}  # as the host's RLDSDataset has it; ours is in vla_energy.data.augment


def our_reader(args: argparse.Namespace, **changes: Any) -> RldsDataset:
    """Our reader of the data, one or two cameras as stored, with proprio."""
    size = (args.image_size, args.image_size)
    settings = {"num_images": args.cameras, "use_proprio": True, "image_size": size, "image_aug": True}
    settings |= {"shuffle_buffer_size": BUFFER, "num_threads": 1}
    return RldsDataset(args.data_root_dir, args.dataset_name, "train", **{**settings, **changes})


def our_frames(args: argparse.Namespace, **changes: Any) -> Iterator[int]:
    """Number of frames of each batch, for ever."""
    for batch in our_reader(args, **changes).batches(args.batch_size):
        yield len(batch["actions"])


def host_frames(args: argparse.Namespace, host: Any, goals: bool) -> Iterator[int]:
    """1 for each frame of the host's training pipeline, for ever."""
    size = (args.image_size, args.image_size)
    kwargs = host.kwargs(args.dataset_name, args.data_root_dir, load_camera_views=("primary", "wrist"))
    trajectory = {"window_size": 1, "future_action_window_size": host.constants.NUM_ACTIONS_CHUNK - 1}
    trajectory |= {"skip_unlabeled": True, "goal_relabeling_strategy": "uniform" if goals else None}
    frame = {"resize_size": size, "num_parallel_calls": 16}
    frame["image_augment_kwargs"] = {**_AUGMENTATION, "augment_order": list(_AUGMENTATION)}
    dataset, _, _ = sys.modules["prismatic.vla.datasets.rlds.dataset"].make_interleaved_dataset(
        [kwargs], [1.0], train=True, shuffle_buffer_size=BUFFER, traj_transform_kwargs=trajectory,
        frame_transform_kwargs=frame, balance_weights=True, traj_transform_threads=1, traj_read_threads=1,
    )  # fmt: skip
    for found in dataset.as_numpy_iterator():
        assert found["observation"]["image_primary"].shape[1:3] == size
        yield 1


def _linked(args: argparse.Namespace, scratch: Path) -> Path:
    """A data root with links to the dataset's files: both readers keep statistics beside the data."""
    copy = scratch / args.dataset_name / "1.0.0"
    copy.mkdir(parents=True)
    for path in find_folder(args.data_root_dir, args.dataset_name).iterdir():
        if not path.name.startswith("dataset_statistics_"):
            (copy / path.name).symlink_to(path.resolve())
    return scratch


def _take(arm: Iterator[int], frames: int) -> int:
    count = 0
    while count < frames:
        count += next(arm)
    return count


def _settle() -> None:
    """Waits until no thread of this process works any more."""
    for _ in range(200):
        before = time.process_time()
        time.sleep(0.05)
        if time.process_time() - before < 0.003:
            return
    raise RuntimeError("the readers do not come to rest: CPU time could not be told apart")


def measure(arms: dict[str, Iterator[int]], rounds: int, frames: int) -> dict[str, dict[str, float]]:
    """Medians of wall and CPU milliseconds a frame."""
    found: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in arms}
    for index in range(rounds + 1):
        for name, arm in arms.items():
            _take(arm, 96)  # what its buffers hold already
            wall, cpu = time.perf_counter(), time.process_time()
            count = _take(arm, frames)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            _settle()
            if index:
                found[name]["wall"].append(1e3 * wall / count)
                found[name]["cpu"].append(1e3 * cpu / count)
    return {name: {kind: statistics.median(v) for kind, v in lists.items()} for name, lists in found.items()}


def _encoded(reader: RldsDataset, batch_size: int) -> Iterator[int]:
    """As `our_frames`, images left as they are stored."""
    return (batch_size for _ in reader._epoch(0).repeat().batch(batch_size).prefetch(2))


def profile(args: argparse.Namespace, frames: int) -> dict[str, float]:
    """CPU milliseconds a frame of our reader's parts, one thread."""
    encoded = our_reader(args)
    stored = encoded._stored_shapes[0][:2]
    steps: dict[str, Callable[[], Iterator[int]]] = {
        "read, parse, chunk, shuffle": lambda: _encoded(encoded, args.batch_size),
        "decode and batch": lambda: our_frames(args, image_aug=False, image_size=stored),
        "resize": lambda: our_frames(args, image_aug=False),
        "augment": lambda: our_frames(args),
    }
    found, before = {}, 0.0
    for name, start in steps.items():
        arm = {name: start()}
        total = measure(arm, 3, frames)[name]["cpu"]
        found[name], before = total - before, total
    return found


def run(args: argparse.Namespace) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Every arm, and our profile."""
    rounds, frames = (3, 128) if args.quick else (5, 256)
    arms = {"ours, 1 thread": our_frames(args), "ours, 2 threads": our_frames(args, num_threads=2)}
    if args.host is not None:
        tensorflow_quiet.tf()
        host = import_host(args.host.resolve(), args.dlimp and args.dlimp.resolve())
        arms |= {"host": host_frames(args, host, True), "host without goal images": host_frames(args, host, False)}
    return measure(arms, rounds, frames), profile(args, frames)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 rounds of 128 frames instead of 5 of 256")
    parser.add_argument("--host", type=Path, help="checkout of openvla-oft; without it the comparison is left out")
    parser.add_argument("--dlimp", type=Path, help="checkout of dlimp_openvla; not needed where dlimp is installed")
    parser.add_argument("--data_root_dir", type=Path, default=EMBEDDED_DATA)
    parser.add_argument("--dataset_name", default="metaworld_demo")
    parser.add_argument("--cameras", type=int, help="default 2 with --host, which reads two, else 1")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/data.json"))
    args = parser.parse_args()
    args.cameras = args.cameras or (1 if args.host is None else 2)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            args.data_root_dir = _linked(args, Path(scratch))
            table, parts = run(args)
    except DatasetError as error:
        sys.exit(f"error: {error}")
    result: dict[str, Any] = {
        "ms_a_frame": table, "profile_cpu_ms": parts, "dataset": args.dataset_name, "cameras": args.cameras,
        "image_size": args.image_size, "cores": os.cpu_count(), "load": os.getloadavg()[0], "quick": args.quick,
    }  # fmt: skip
    print(f"{args.dataset_name}, {args.cameras} camera(s), {args.image_size} x {args.image_size}, augmented; medians")
    print(f"{'':<26}{'frames/s':>10}{'wall ms':>9}{'CPU ms':>9}")
    for name, values in table.items():
        print(f"{name:<26}{1e3 / values['wall']:10.1f}{values['wall']:9.2f}{values['cpu']:9.2f}")
    print("our reader by part, CPU ms a frame: " + ", ".join(f"{name} {value:.2f}" for name, value in parts.items()))
    if args.host is None:
        print("the comparison with the host's pipeline was left out: it needs --host, see --help")
    else:
        ours = table["ours, 1 thread"]
        for name in ("host", "host without goal images"):
            ratio = {kind: table[name][kind] / ours[kind] for kind in ours}
            result[f"frames_of_ours_for_each_of_{name.replace(' ', '_')}"] = ratio
            print(f"{name}: we read {ratio['wall']:.2f} times as many frames/s, {ratio['cpu']:.2f} per CPU second")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
