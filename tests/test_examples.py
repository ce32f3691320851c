"""The examples run, and show what they say they show."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

TOY = Path(__file__).parents[1] / "examples" / "toy_2d.py"
NOTEBOOK = TOY.with_name("energy_head.ipynb")


def test_the_toy_in_two_dimensions_beats_its_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "new" / "toy.png"
    monkeypatch.setattr(sys, "argv", [str(TOY), "--steps", "100", "--out", str(picture)])
    found = runpy.run_path(str(TOY))["main"]()
    assert found["best"] <= found["reranked"] < 0.7 * found["policy"]
    assert found["replaced"] > 0.5  # the gate was calibrated, and opens
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "written to" in capsys.readouterr().out


def test_the_toy_is_short() -> None:
    assert len(TOY.read_text(encoding="utf-8").splitlines()) < 80


def _cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_the_notebook_runs_and_shows_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    """Its cells in one namespace, in order, as Jupyter would run them; with fewer frames."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cell for cell in _cells() if cell["cell_type"] == "code"):
        source = "".join(cell["source"]).replace(" = 320, 320, 15", " = 128, 64, 6")
        exec(compile(source, f"{NOTEBOOK.name}, cell {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert "Spearman of energy and distance" in printed and names["TRAIN_FRAMES"] == 128
    assert names["expert_wins"] > 0.7  # it has learnt something
    assert names["l1"]["best candidate"] < names["l1"]["policy"]
    assert len(names["picture"].axes) == 4


def test_the_notebook_has_no_outputs() -> None:
    code = [cell for cell in _cells() if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
