"""The examples run, and show what they say they show."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

TOY = Path(__file__).parents[1] / "examples" / "toy_2d.py"


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
