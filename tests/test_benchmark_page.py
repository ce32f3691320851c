"""The page of the benchmarks: each goal is judged by its own number, and what is not there is not met."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))

import all as everything  # noqa: E402  # pyright: ignore[reportMissingImports]
import goals  # noqa: E402  # pyright: ignore[reportMissingImports]


def _line(page: str, text: str) -> str:
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {text} |")]
    return line


def test_goals_are_met_missed_or_not_measured(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    values = {
        "cache": {"ratio": {"cpu": 5.5}, "real_width": {}},
        "scaling": {"gradients_apart": {"2 ranks": {"policy": 2e-7, "head": 1e-6}, "4 ranks": {"head": 3e-6}}},
        "peak_memory": {"mib": {"8": {"row blocks": 256.0}}},
        "shapes": {axis: {"ours": {"2": 0.1, "8": 0.3}} for axis in "BNS"},
    }  # fmt: skip
    for name, value in values.items():
        (results / f"{name}.json").write_text(json.dumps(value))
    goals.write_page(results, tmp_path / "docs/page.md", quick=True)
    page = (tmp_path / "docs/page.md").read_text()
    assert "| >= 50x | 5.5x | 0.11 | **missed** |" in _line(
        page, "head training from the cache against online, tiny VLA"
    )
    assert "| | | not measured |" in _line(page, "head training from the cache against online, real width")
    assert "| <= 1e-06 | 1e-06 | 1 | met |" in _line(page, "gradients of 2 ranks from one process'")
    assert "**missed**" in _line(page, "gradients of 4 ranks from one process'")
    assert "| <= 0.5 GiB | 0.25 GiB | 0.5 | met |" in _line(page, "peak memory above the inputs, B=8")
    assert "not measured" in _line(page, "RLDS frames/s against the host's pipeline (wall; it reads goals, too)")
    assert "--quick" in page and page.count("met |") == 2
    for axis in "BNS":
        assert (tmp_path / f"docs/figures/bench-{axis}.svg").read_text().startswith("<?xml")


def test_each_goal_has_a_benchmark_that_runs() -> None:
    assert {goal.name for goal in goals.GOALS} | {"shapes"} == set(everything.BENCHMARKS)
    done = subprocess.run([sys.executable, FOLDER / "all.py", "--only", "loss,speed"], capture_output=True, text=True)
    assert done.returncode == 2 and "--only speed: known are loss" in done.stderr
