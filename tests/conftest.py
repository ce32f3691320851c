"""Shared fixtures: one thread for torch, and a random tiny VLA."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

from vla_energy.actions import DatasetStatistics, FieldStatistics

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def statistics() -> DatasetStatistics:
    """Statistics of a 4-d action with an unnormalised gripper, and of a 4-d proprio."""
    rng = np.random.default_rng(0)
    mask = np.array([True, True, True, False])
    return DatasetStatistics(
        FieldStatistics.of(rng.normal(size=(500, 4)), mask), FieldStatistics.of(rng.normal(size=(500, 4))), 500, 5
    )


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, statistics: DatasetStatistics) -> Path:
    """A checkpoint folder of the tiny architecture with random weights, H=8, A=4, proprio 4."""
    from vla_energy.backbones.tiny import write_random_start

    folder = tmp_path_factory.mktemp("tiny") / "vla"
    tasks = ["drawer open", "reach", "button press topdown"]
    return write_random_start(folder, tasks, {"metaworld_test": statistics}, horizon=8, seed=0)


@pytest.fixture(scope="session")
def simulator() -> None:
    """Skips where Meta-World or OpenGL is not installed, with the reason; in CI there has to be one."""
    from vla_energy.data.metaworld_env import GL_HELP, SimulatorError
    from vla_energy.rollout.simulator import SimulatorProcess

    try:
        with SimulatorProcess("reach") as process:
            process.reset(0)
    except SimulatorError as error:
        missing = "pip install" in str(error) or GL_HELP in str(error)
        if not missing or os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture
def own_data(tmp_path: Path) -> tuple[Path, Path]:
    """A data root with the bundled dataset under a name that nobody knows, my_robot, and the file of its fields."""
    from vla_energy.finetune.setup import EMBEDDED_DATA

    root, fields = tmp_path / "own-data", tmp_path / "own-data" / "my_robot.json"
    shutil.copytree(EMBEDDED_DATA / "metaworld_demo", root / "my_robot")
    for path in (root / "my_robot" / "1.0.0").iterdir():
        path.rename(path.with_name(path.name.replace("metaworld_demo", "my_robot")))
    info = root / "my_robot" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("metaworld_demo", "my_robot"))
    fields.write_text(json.dumps({"my_robot": {"action_mask": [True, True, True, False]}}))
    return root, fields
