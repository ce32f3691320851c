"""Writes tiny RLDS folders: LIBERO's layout, lossless images whose pixels say which episode and step they show."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

IMAGE_SIZE = 16
LENGTHS = (5, 6, 7, 8, 9, 5)
WRIST_OFFSET = 100

Episode = list[dict[str, Any]]


def make_episode(index: int, length: int, instruction: str | None = None) -> Episode:
    """`observation/{image, wrist_image, state (8,)}`, `action (7,)` with LIBERO's gripper, `language_instruction`."""
    rng = np.random.default_rng(index)
    gripper = np.where(np.arange(length) < length // 2, -1.0, 1.0)
    actions = np.concatenate([rng.normal(size=(length, 6)), gripper[:, None]], 1).astype(np.float32)
    states = rng.normal(size=(length, 8)).astype(np.float32)
    text = f"Put {index} on the plate" if instruction is None else instruction
    return [
        {
            "observation": {
                "image": make_image(index, step),
                "wrist_image": make_image(index, step) + WRIST_OFFSET,
                "state": states[step],
            },
            "action": actions[step],
            "language_instruction": text,
        }
        for step in range(length)
    ]


def make_image(index: int, step: int) -> np.ndarray:
    """A gradient `(16, 16, 3)` uint8 whose first pixel is `(index, step, 0)`."""
    rows, columns = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    return np.stack([index + rows * 5, step + columns * 5, rows + columns], -1).astype(np.uint8)


def write_rlds(root: Path, name: str, splits: dict[str, list[Episode]], num_shards: int | None = None) -> Path:
    """Writes `root/name/1.0.0` with tensorflow-datasets and returns it."""
    from vla_energy.data import tensorflow_quiet

    tfds = tensorflow_quiet.tfds()
    features = tfds.features
    image = {"shape": (IMAGE_SIZE, IMAGE_SIZE, 3), "encoding_format": "png"}
    step = {
        "observation": {
            "image": features.Image(**image),
            "wrist_image": features.Image(**image),
            "state": features.Tensor(shape=(8,), dtype=np.float32),
        },
        "action": features.Tensor(shape=(7,), dtype=np.float32),
        "language_instruction": features.Text(),
    }

    base: Any = tfds.core.GeneratorBasedBuilder

    class Fixture(base, skip_registration=True):  # pyright: ignore[reportGeneralTypeIssues, reportCallIssue]
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                features=features.FeaturesDict({"steps": features.Dataset(step)}),
                disable_shuffling=True,  # stored in the order given
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {split: self._generate_examples(episodes) for split, episodes in splits.items()}

        def _generate_examples(self, episodes: list[Episode]) -> Iterator[tuple[int, dict[str, Any]]]:
            for key, episode in enumerate(episodes):
                yield key, {"steps": episode}

    Fixture.name = name
    builder = Fixture(data_dir=str(root))
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=num_shards))
    return Path(builder.data_path)
