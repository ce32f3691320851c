"""The demo, shortened: what it writes, and that the settings in `configs/` are its own."""

from __future__ import annotations

import json
from pathlib import Path

import draccus
import pytest

from vla_energy import demo
from vla_energy.data import RldsDataset
from vla_energy.data.metaworld_env import SimulatorError
from vla_energy.finetune.config import FinetuneConfig
from vla_energy.finetune.setup import EMBEDDED_DATA

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random start for the bundled demonstrations, so that the demo is tested without trained weights."""
    from vla_energy.backbones.tiny import write_random_start

    statistics = RldsDataset(EMBEDDED_DATA, "metaworld_demo", horizon=8, use_proprio=True).statistics
    folder = tmp_path_factory.mktemp("start") / "vla"
    names = [task.replace("-", " ") for task in demo.TASKS]
    return str(write_random_start(folder, names, {"metaworld_demo": statistics}, horizon=8, seed=0))


def test_demo_writes_metrics_report_and_checkpoint(start: str, tmp_path: Path, capsys, monkeypatch) -> None:
    class NoSimulator:
        def __init__(self, task: str) -> None:
            raise SimulatorError("apt-get install libosmesa6")

    monkeypatch.setattr(demo, "SimulatorProcess", NoSimulator)
    out = tmp_path / "demo"
    out.mkdir()
    (out / "rollout.json").write_text("{}")  # of an earlier demo
    assert demo.main(["--out", str(out), "--steps", "2", "--vla_path", start]) == 0
    assert not (out / "rollout.json").exists()
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["rollout"] is None and "libosmesa6" in metrics["rollout_reason"]
    assert {"l1_val", "l1_val_before"} <= metrics["finetune"].keys()
    assert {"in_batch", "noise_0.3", "layer_exits"} <= metrics["energy"]["win_rate"].keys()
    assert {"l1_policy", "l1_reranked", "l1_gated", "l1_oracle"} <= metrics["rerank"].keys()
    assert {"finetune", "evaluate_before", "total"} <= metrics["seconds"].keys()
    assert "torch" in metrics["versions"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page and "Energy landscapes, held out" in page and "<h2>Gate</h2>" in page
    shapes = json.loads((out / "shapes.json").read_text())
    assert len({frame["episode"] for frame in shapes["frames"]}) == len(shapes["frames"]) == 3
    assert {frame["task"] for frame in shapes["frames"]} <= {task.replace("-", " ") for task in demo.TASKS}
    assert len(shapes["frames"][0]["time"]["energies"]) == 8 and shapes["bands"]
    settings = json.loads((out / "settings.json").read_text())
    assert settings["flags"]["max_steps"] == 2 and "torch" in settings["versions"]
    assert (out / "latest" / "config.json").is_file()
    printed = capsys.readouterr().out
    assert "best candidate" in printed and "libosmesa6" in printed


def test_bad_start_is_one_line(tmp_path: Path, capsys) -> None:
    assert demo.main(["--out", str(tmp_path / "demo"), "--vla_path", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_config_file_is_the_demo() -> None:
    config = draccus.parse(FinetuneConfig, config_path=CONFIGS / "demo.yaml", args=[])
    assert config == demo.demo_config(Path("runs/demo"))
