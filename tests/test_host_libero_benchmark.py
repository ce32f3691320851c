"""What `benchmarks/host_libero.py` makes of the runs' reports; the runs need openvla-oft and a simulator."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import host_libero
from host_libero import compare, prepare

from vla_energy.gates import load_gates


def _run(actions: list[float], counts: dict[str, int] | None = None) -> dict[str, Any]:
    episodes = [{"actions": [[value] * 7], "done": True} for value in actions]
    return {"episodes": episodes, "success": [True] * len(actions), "counts": counts, "seconds": 1.0}


def test_what_must_be_equal() -> None:
    plain, shut = _run([0.1, 0.2]), {"chunks": 2, "accepted": 0}
    assert compare("off", plain, _run([0.1, 0.2]), 1)[1] and not compare("off", plain, _run([0.1, 0.3]), 1)[1]
    assert compare("shut", plain, _run([0.1, 0.2], shut), 1)[1]
    assert not compare("shut", plain, _run([0.1, 0.2], {"chunks": 2, "accepted": 1}), 1)[1]
    assert not compare("shut", plain, _run([0.2, 0.2], shut), 1)[1]


def test_what_differs_must_have_been_replaced() -> None:
    plain, taken = _run([0.1, 0.2]), {"chunks": 2, "accepted": 1}
    line, right = compare("open", plain, _run([0.5, 0.2], taken), 1)
    assert right and "bit for bit: 1" in line and "chunks 2, replaced 1" in line
    nothing = {"chunks": 2, "accepted": 0}
    assert compare("open", plain, _run([0.1, 0.2], nothing), 1)[1], "no candidate was better"
    assert not compare("open", plain, _run([0.5, 0.2], nothing), 1)[1]
    assert compare("recommended", plain, _run([0.5, 0.2], taken), 1)[1]
    assert not compare("recommended", plain, _run([0.1, 0.5], taken), 1)[1], "another instruction's episodes stay"


def test_gates_and_flags_of_each_run(tiny_folder: Path, tmp_path: Path) -> None:
    args = Namespace(checkpoint=tiny_folder)
    for name in host_libero.RUNS:
        checkpoint, flags = prepare(args, tmp_path, name, ["pick up the bowl"])
        if name in ("plain", "off"):
            assert flags == ([] if name == "plain" else ["--energy.enabled", "False"])
            continue
        margins, tasks = load_gates(checkpoint)
        assert (margins["rerank"] > 0) == (name == "shut")
        assert tasks == ({"pick up the bowl": "rerank"} if name == "recommended" else {})
        assert flags[-1] == host_libero.MODES[name]
        assert json.loads((checkpoint / "config.json").read_text())["text_config"]["vocab_size"] == 32064
