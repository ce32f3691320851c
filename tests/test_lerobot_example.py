"""examples/lerobot_to_rlds.py: a folder in LeRobot's format becomes a dataset that our reader reads."""

from __future__ import annotations

import io
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from vla_energy.data import RldsDataset
from vla_energy.data.datasets import dataset_config

EXAMPLE = Path(__file__).parents[1] / "examples" / "lerobot_to_rlds.py"
LENGTHS, SIDE = (4, 6, 5), 16


def _png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((SIDE, SIDE, 3), value, np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def lerobot(tmp_path: Path) -> Path:
    """Three episodes; action, state and brightness say which episode and step they are of."""
    folder = tmp_path / "source"
    (folder / "meta").mkdir(parents=True)
    (folder / "data" / "chunk-000").mkdir(parents=True)
    camera = "observation.images.front"
    features = {
        "action": {"dtype": "float32", "shape": [3]},
        "observation.state": {"dtype": "float32", "shape": [2]},
        camera: {"dtype": "image", "shape": [SIDE, SIDE, 3]},
    }
    info = {
        "codebase_version": "v2.1",
        "total_episodes": len(LENGTHS),
        "chunks_size": 1000,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "features": features,
    }
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    tasks = [{"task_index": 0, "task": "push the cube"}, {"task_index": 1, "task": "lift the cube"}]
    (folder / "meta" / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    for episode, length in enumerate(LENGTHS):
        rows = [
            {
                "action": [float(episode), float(step), 0.5],
                "observation.state": [float(step), float(episode)],
                camera: {"bytes": _png(40 * episode + 10 * step), "path": None},
                "task_index": episode % 2,
            }
            for step in range(length)
        ]
        parquet.write_table(
            pa.Table.from_pylist(rows), folder / info["data_path"].format(episode_chunk=0, episode_index=episode)
        )
    return folder


def _convert(monkeypatch: pytest.MonkeyPatch, source: Path, out: Path, *extra: str) -> None:
    flags = ["--source", str(source), "--name", "my_robot", "--out", str(out), "--image", "observation.images.front"]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *flags, *extra])
    runpy.run_path(str(EXAMPLE), run_name="__main__")


def test_what_was_converted_is_read(lerobot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _convert(monkeypatch, lerobot, tmp_path / "data", "--val-episodes", "1")
    config = dataset_config("my_robot", tmp_path / "data" / "my_robot.json")
    train, val = (
        RldsDataset(tmp_path / "data", "my_robot", split, horizon=2, config=config, use_proprio=True)
        for split in ("train", "val")
    )
    assert (train.num_frames, val.num_frames) == (sum(LENGTHS[:2]), LENGTHS[2])
    assert (train.action_dim, train.proprio_dim) == (3, 2)
    frames = [batch for batch in train.batches(5, repeat=False, drop_last=False)]
    assert {text for batch in frames for text in batch["instructions"]} == {"push the cube", "lift the cube"}
    low, high = train.statistics.action.min, train.statistics.action.max
    assert low.tolist() == [0, 0, 0.5] and high.tolist() == [1, 5, 0.5]
    brightness = sorted({round(float(image.mean())) for batch in frames for image in np.asarray(batch["images"])})
    expected = sorted({40 * episode + 10 * step for episode in (0, 1) for step in range(LENGTHS[episode])})
    assert np.abs(np.subtract(brightness, expected)).max() <= 2  # JPEG


def test_what_cannot_be_converted_is_named(lerobot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="3 episodes leave none for one of the splits"):
        _convert(monkeypatch, lerobot, tmp_path / "data", "--val-episodes", "3")
    with pytest.raises(ValueError, match=r"lacks \['observation.images.wrist'\]"):
        _convert(monkeypatch, lerobot, tmp_path / "data", "--wrist", "observation.images.wrist")
    info = lerobot / "meta" / "info.json"
    info.write_text(info.read_text().replace("v2.1", "v3.0"))
    with pytest.raises(ValueError, match=r"is v3.0, and v2.0 and v2.1 are read here: take .*revision .v2.1."):
        _convert(monkeypatch, lerobot, tmp_path / "data")
