"""The harnesses of benchmarks/chaos.py: what they say of runs that are well, and of runs that are not."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import chaos
import chaos_report
import chaos_soak
from chaos_kill import flat
from chaos_soak import Sample, trend, verdict


def _samples(
    count: int = 300, leak: float = 0.0, handles: float = 0.0, slower: float = 0.0, busy: float = 0
) -> list[Sample]:
    """Of a run of two hours; per hour: leaked bytes, handles left open, the parts by which a step, and everything on
    the machine, get slower.
    """
    draw, found, cpu, step, lasting = random.Random(0), [], 0.0, 0, 0.0
    for index in range(count):
        hours = 2 * index / count
        step += 40
        cpu += 40 * 0.1 * (1 + (slower + busy) * hours) * draw.uniform(0.9, 1.1)
        lasting = 0.9 * lasting + draw.gauss(0, 1e5)
        memory = int(700e6 + lasting + leak * hours)
        found.append(
            Sample(
                3600 * hours,
                step,
                memory,
                memory,
                int(8 + handles * hours) + (index % 7 == 0),
                12,
                cpu,
                0.01 * (1 + busy * hours),
            )
        )
    return found


def test_a_run_that_is_well_passes_and_each_trouble_is_found() -> None:
    well = verdict(_samples())
    assert well["ok"] and well["memory"]["within_noise"] and well["step"]["steady"] and not well["handles"]["grows"]
    leaking = verdict(_samples(leak=5e6))
    assert not leaking["ok"] and not leaking["memory"]["within_noise"]
    assert leaking["memory"]["slope_mib_per_hour"] == pytest.approx(5e6 / 2**20, rel=0.1)
    assert verdict(_samples(handles=1.5))["handles"] == {"fewest": [8, 9, 10], "most": 11, "grows": True}
    slow = verdict(_samples(slower=0.2))
    assert not slow["ok"] and not slow["step"]["steady"] and slow["step"]["ratio"] > 1.1
    busy = verdict(_samples(busy=0.2))
    assert busy["ok"] and busy["step"]["cpu_seconds"][1] > 1.1 * busy["step"]["cpu_seconds"][0]
    with pytest.raises(ValueError, match="14 samples are too few"):
        verdict(_samples(14))


def test_the_trend_is_the_least_squares_one_and_its_error_allows_for_noise_that_lasts() -> None:
    draw = np.random.default_rng(0)
    x = np.arange(200.0)
    slopes, errors = [], []
    for _ in range(200):
        noise = np.zeros(200)
        for i in range(1, 200):
            noise[i] = 0.9 * noise[i - 1] + draw.normal()
        slope, error = trend(x.tolist(), (3.0 * x + noise).tolist())
        assert slope == pytest.approx(np.polyfit(x, 3.0 * x + noise, 1)[0])
        slopes.append(slope)
        errors.append(error)
    # The error of white noise is a quarter of the spread here.
    assert 0.5 < np.mean(errors) / np.std(slopes) < 1.3


def test_a_process_is_looked_at_from_outside() -> None:
    before = chaos_soak.look(os.getpid(), 1.0, 2)
    with contextlib.ExitStack() as opened:
        for _ in range(3):
            opened.enter_context(open(os.devnull))
        after = chaos_soak.look(os.getpid(), 1.0, 2)
    assert after.handles == before.handles + 3 and before.anonymous > 2**20 and before.cpu > 0
    with pytest.raises(FileNotFoundError):
        chaos_soak.look(2**22 + 1, 0.0, 0)


def test_states_are_equal_only_bit_for_bit() -> None:
    state = {
        "a": [torch.zeros(2), (1, None)],
        "sums": {"energy/ms": 3.0},
        "nan": float("nan"),
        "mask": torch.ones(2) > 0,
    }
    same = {
        "a": [torch.zeros(2), (1, None)],
        "sums": {"energy/ms": 4.0},
        "nan": float("nan"),
        "mask": torch.ones(2) > 0,
    }
    assert flat(state, "s") == flat(same, "s") and len(flat(state, "s")) == 9
    for other in (torch.tensor([0.0, -0.0]), torch.zeros(1, 2), torch.zeros(2, dtype=torch.int32), [0.0, 0.0]):
        assert flat({**same, "a": [other, (1, None)]}, "s") != flat(state, "s")
    assert flat({"a": {"b": 1}, "c": []}, "s") != flat({"a": {}, "c": []}, "s") != flat({"a": {}, "c": {}}, "s")


def test_a_very_short_mix_survives(tmp_path: Path) -> None:
    """In a process of its own: it forks, which none should do that has other threads."""
    script = str(Path(__file__).parents[1] / "benchmarks" / "chaos.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, "--out", str(tmp_path), "--minutes", "0.1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    result = json.loads((tmp_path / "mix.json").read_text()) if (tmp_path / "mix.json").is_file() else {}
    assert done.returncode == 0, (done.stderr[-2000:], chaos._short(result))
    assert result["kill"]["kills"] == 1 and result["kill"]["compared"]["values"] > 500
    assert result["faults"]["bad_steps"] == 0 and sum(result["faults"]["injected"].values()) == 15
    assert all(row["read"] >= 3 for row in result["fuzz"]["targets"].values())
    assert result["soak"]["saved"] >= result["soak"]["steps"] and not result["soak"]["handles"]["grows"]


def test_what_does_not_survive_fails_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    well: dict[str, Any] = {"ok": True}
    for name in chaos.PARTS:
        monkeypatch.setitem(chaos.PARTS, name, lambda _: well)
    assert chaos.main(["--out", str(tmp_path)]) == 0
    monkeypatch.setitem(chaos.PARTS, "fuzz", lambda _: {"ok": False, "found": [1]})
    assert chaos.main(["--out", str(tmp_path)]) == chaos.main(["--out", str(tmp_path), "fuzz"]) == 1
    assert json.loads((tmp_path / "mix.json").read_text())["fuzz"] == {"ok": False, "found": [1]}
    assert chaos.main(["--out", str(tmp_path), "kill"]) == 0


def test_the_pages_numbers_are_those_of_the_results() -> None:
    page = chaos_report.PAGE.read_text()
    assert f"{chaos_report.START}\n{chaos_report.table()}\n{chaos_report.END}" in page
