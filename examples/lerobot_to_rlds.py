"""Converts a dataset in LeRobot's format (v2.0, v2.1) to the RLDS that this package reads.

    python examples/lerobot_to_rlds.py --source ~/lerobot/my_robot --name my_robot --out data \
        --image observation.images.front --wrist observation.images.wrist --val-episodes 10

Writes DATA/NAME/1.0.0 and DATA/NAME.json, which names the fields: fine-tune with `--dataset_config DATA/NAME.json`.
LeRobot's converters that we know of go upwards only (v2.1 to v3): of a v3 dataset take the hub's revision "v2.1" where
there is one, or a converter by others. Frames come from image columns, or from the videos (which needs opencv-python).
Nothing is resampled.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
from PIL import Image

from vla_energy.data.recording import Episode, Layout, finish, jpeg, make_step, write_dataset

QUALITY = 92


class LeRobotFolder:
    """A dataset folder in LeRobot's format.

    Raises:
        ValueError: it is of another version, or lacks a field.
    """

    def __init__(self, folder: Path, cameras: dict[str, str]) -> None:
        self.folder, self.cameras = folder, cameras
        self.info = json.loads((folder / "meta" / "info.json").read_text())
        if not self.info["codebase_version"].startswith("v2."):
            raise ValueError(
                f"{folder} is {self.info['codebase_version']}, and v2.0 and v2.1 are read here: take the hub dataset's "
                'revision "v2.1" where it has one, or a converter by others'
            )
        if lacking := {*cameras.values(), "action", "observation.state"} - set(self.info["features"]):
            raise ValueError(f"{folder} lacks {sorted(lacking)}; it has {', '.join(self.info['features'])}")
        lines = (folder / "meta" / "tasks.jsonl").read_text().splitlines()
        self.tasks = {row["task_index"]: row["task"] for row in map(json.loads, lines)}

    def size(self, feature: str) -> tuple[int, ...]:
        """Shape of a feature, as it is stored."""
        return tuple(self.info["features"][feature]["shape"])

    def layout(self) -> Layout:
        """Fields of the RLDS dataset."""
        images = {name: self.size(key) for name, key in self.cameras.items()}
        return Layout({**images, "state": self.size("observation.state")}, self.size("action")[0])

    def episode(self, index: int) -> Episode:
        """One episode as RLDS: every step, its instruction, and the last one marked as solved."""
        place = {"episode_index": index, "episode_chunk": index // self.info["chunks_size"]}
        rows = parquet.read_table(self.folder / self.info["data_path"].format(**place)).to_pylist()
        images = {name: self._frames(key, rows, place) for name, key in self.cameras.items()}
        steps = []
        for number, row in enumerate(rows):
            state = np.asarray(row["observation.state"], np.float32)
            observation = {"state": state, **{name: jpeg(frames[number], QUALITY) for name, frames in images.items()}}
            action = np.asarray(row["action"], np.float32)
            steps.append(make_step(observation, action, self.tasks[row["task_index"]], first=not number))
        metadata = {"task": self.tasks[rows[0]["task_index"]], "seed": index, "success": True, "noise_std": 0.0}
        return {"steps": finish(steps), "episode_metadata": metadata}

    def _frames(self, key: str, rows: list[dict[str, Any]], place: dict[str, int]) -> list[np.ndarray]:
        """Images `(h,w,3)` uint8 of an episode's rows."""
        if self.info["features"][key]["dtype"] == "image":
            return [np.asarray(Image.open(io.BytesIO(row[key]["bytes"])).convert("RGB")) for row in rows]
        import cv2  # pyright: ignore[reportMissingImports]

        path = self.folder / self.info["video_path"].format(**place, video_key=key)
        video = cv2.VideoCapture(str(path))
        frames = [frame[..., ::-1] for read, frame in iter(video.read, (False, None)) if read]
        if len(frames) != len(rows):
            raise ValueError(f"{path} has {len(frames)} frames that can be read for {len(rows)} rows")
        return frames


def main() -> None:
    """Converts; the last `--val-episodes` episodes are the held-out split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="LeRobot dataset folder, with meta/info.json")
    parser.add_argument("--name", required=True, help="of the new dataset, in snake case")
    parser.add_argument("--out", type=Path, required=True, help="data root")
    parser.add_argument("--image", required=True, help="feature of the main camera")
    parser.add_argument("--wrist", help="feature of the wrist camera")
    parser.add_argument("--val-episodes", type=int, default=10, help="held out (default 10; gates need 44)")
    args = parser.parse_args()
    cameras = {"image": args.image} | ({"wrist_image": args.wrist} if args.wrist else {})
    source = LeRobotFolder(args.source, cameras)
    total = source.info["total_episodes"]
    first = total - args.val_episodes
    if not 0 < first < total:
        raise SystemExit(
            f"error: --val-episodes {args.val_episodes}: {total} episodes leave none for one of the splits"
        )

    def read(indices: range) -> Iterator[Episode]:
        return (source.episode(index) for index in indices)

    splits = {"train": lambda: read(range(first)), "val": lambda: read(range(first, total))}
    folder = write_dataset(args.out, args.name, source.layout(), splits, f"Converted from {args.source.name}.")
    names = {"wrist_image_key": "wrist_image"} if args.wrist else {}
    (args.out / f"{args.name}.json").write_text(json.dumps({args.name: {"image_key": "image", **names}}, indent=1))
    print(folder)


if __name__ == "__main__":
    main()
