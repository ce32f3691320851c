"""The harnesses of benchmarks/chaos.py: what they say of runs that are well, and of runs that are not."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import chaos
import chaos_atheris
import chaos_faults
import chaos_report
import chaos_run
import chaos_soak
import chaos_targets
import soak_rules
from chaos_kill import flat
from chaos_soak import Sample, trend, verdict
from chaos_targets import Target

from vla_energy.checkpoint import CheckpointError
from vla_energy.guard import GuardedOptimizer


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


@pytest.mark.parametrize("lasting", [0.0, 0.9])
def test_few_flat_series_have_a_trend_and_leaks_do(lasting: float) -> None:
    """Noise as of a run of two hours, with the peaks of validations; 2.5 percent of flat ones are to be told."""
    draw = np.random.default_rng(0)
    x = np.arange(1200) / 600
    flat, leaks = 0, 0
    for _ in range(200):
        noise = draw.normal(size=1200)
        for i in range(1, 1200):
            noise[i] += lasting * noise[i - 1]
        noise[draw.integers(0, 1200, 120)] += 20
        noise /= noise.std()
        for leak in (0.0, 1.0):
            slope, error = trend(x.tolist(), (leak * x + noise).tolist())
            told = slope > chaos_soak.STUDENT * error
            flat, leaks = flat + (told and not leak), leaks + (told and bool(leak))
    assert flat <= 12 and leaks >= 190


def test_both_rules_are_compared(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(soak_rules, "DRAWS", 3)
    soak_rules.main([])
    said = capsys.readouterr().out
    assert said.count("false alarms") == 5
    assert re.search(r"^soak_first: MiB an hour: before .*\(grows\), medians .*\(grows\)$", said, re.M)


def test_a_trend_is_that_of_the_windows_medians() -> None:
    x = np.arange(240.0)
    y = 3 * x
    y[::7] += 1000  # peaks
    slope, error = trend(x.tolist(), y.tolist())
    assert slope == pytest.approx(3, rel=0.02) and error < 0.05


def test_a_process_is_looked_at_from_outside() -> None:
    before = chaos_soak.look(os.getpid(), 1.0, 2)
    with contextlib.ExitStack() as opened:
        for _ in range(3):
            opened.enter_context(open(os.devnull))
        after = chaos_soak.look(os.getpid(), 1.0, 2)
    assert after.handles == before.handles + 3 and before.anonymous > 2**20 and before.cpu > 0
    with pytest.raises(FileNotFoundError):
        chaos_soak.look(2**22 + 1, 0.0, 0)


def test_what_is_held_is_counted_and_its_trend_told() -> None:
    before = chaos_run.allocations()
    kept = [torch.zeros(2**18), [object() for _ in range(1000)]]
    after = chaos_run.allocations()
    assert before is not None and after is not None and len(kept) == 2
    assert 2**20 <= after["bytes"] - before["bytes"] < 2**21
    assert 1000 <= after["blocks"] - before["blocks"] < 2000
    rows = [{"seconds": 36.0 * n, "bytes": 1e6 + 1000 * n, "blocks": 500 + n % 2} for n in range(100)]
    found = chaos_soak.held(rows)
    assert found is not None and found["rows"] == 80  # the first fifth is left out
    assert found["bytes"]["slope_per_hour"] == pytest.approx(1e5) and found["bytes"]["standard_error"] < 1
    assert abs(found["blocks"]["slope_per_hour"]) < 2 * found["blocks"]["standard_error"] + 0.1
    assert chaos_soak.held(rows[:10]) is None


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
    assert done.returncode == 0, (done.stderr[-2000:], done.stdout[-2000:])
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [*chaos.PARTS, "all passed", "the whole result"]
    assert lines[0].startswith("kill: passed: 1 kill of a run of") and lines[-1].endswith(f"{tmp_path}/mix.json")
    assert result["kill"]["kills"] == 1 and result["kill"]["compared"]["values"] > 500
    assert result["faults"]["bad_steps"] == 0 and sum(result["faults"]["injected"].values()) == 15
    assert all(row["read"] >= 3 for row in result["fuzz"]["targets"].values())
    assert result["soak"]["saved"] >= result["soak"]["steps"] and not result["soak"]["handles"]["grows"]


def test_guided_bytes_change_one_file_and_unclear_errors_are_kept(tmp_path: Path) -> None:
    """What libFuzzer calls, without libFuzzer: it is no part of the development installation."""

    def make(folder: Path) -> None:
        for name in ("a.json", "b.json"):
            (folder / name).write_text("[1]")

    def load(folder: Path) -> None:
        values = [json.loads((folder / name).read_text()) for name in ("a.json", "b.json")]  # another's error: unclear
        if values[0] == 2:
            raise CheckpointError(f"{folder / 'a.json'} holds a 2")  # one of ours, with the file: clear

    work = chaos_atheris.Guided("two", Target(make, load, (CheckpointError,)), tmp_path / "out")
    work.corpus(tmp_path / "corpus")
    assert [path.read_bytes() for path in sorted((tmp_path / "corpus").iterdir())] == [b"\x00[1]", b"\x01[1]"]
    for data in (b"\x00[3]", b"\x002", b"\x01oh", b"\x01no", b""):
        work.one(data)
        assert all((tmp_path / "out/work" / name).read_text() == "[1]" for name in ("a.json", "b.json"))
    work.write()
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert (result["read"], result["refused"], result["accepted"]) == (5, 4, 1)
    assert sum(entry["count"] for entry in result["found"]) == 3, "the clear one is none of them"
    assert {entry["done"] for entry in result["found"]} <= {"a.json", "b.json"}


def test_what_does_not_survive_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [{"target": "gates", "count": 2, "error": "KeyError: 'x'", "where": "", "files": "there"}]
    rows = {"rlds": {"read": 89, "refused": 4}, "gates": {"read": 3500, "refused": 5}}
    fuzz = {"seconds": 90.0, "read": 3589, "targets": rows, "found": list[Any](), "ok": True}
    well = {name: chaos_report.read(name) | {"ok": True} for name in ("kill", "faults", "soak")} | {"fuzz": fuzz}
    for name in chaos.PARTS:
        monkeypatch.setitem(chaos.PARTS, name, lambda _, name=name: well[name])
    assert chaos.main(["--out", str(tmp_path)]) == 0
    monkeypatch.setitem(chaos.PARTS, "fuzz", lambda _: fuzz | {"ok": False, "found": found})
    assert chaos.main(["--out", str(tmp_path)]) == chaos.main(["fuzz", "--out", str(tmp_path)]) == 1
    assert json.loads((tmp_path / "mix.json").read_text())["fuzz"]["found"] == found
    said = capsys.readouterr().out
    assert (
        "fuzz: passed: 3,589 damaged files in 90 seconds, 2 loaders, from 89 (rlds) to 3,500 (gates): 0 kinds" in said
    )
    assert "fuzz: failed:" in said and "gates: KeyError: 'x' (2 times, there)" in said and "all passed" in said
    assert f"FAILED\nthe whole result: {tmp_path}/mix.json" in said
    assert chaos.main(["--out", str(tmp_path), "kill"]) == 0


@pytest.mark.parametrize("guided", [[], ["--guided"]])
def test_what_is_not_there_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], guided: list[str]
) -> None:
    found: dict[str, object] = {"atheris": object()}
    monkeypatch.setattr(chaos_atheris.importlib.util, "find_spec", found.get)
    assert chaos.main(["--out", str(tmp_path), "fuzz", "--targets", "nosuch,gates", *guided]) == 2
    assert "--targets: unknown nosuch; known: head, memory" in capsys.readouterr().err
    found.clear()
    if guided:
        assert chaos.main(["--out", str(tmp_path), "fuzz", *guided]) == 2
        assert "pip install -e '.[fuzz]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_only_the_wanted_targets_are_made(tmp_path: Path) -> None:
    found = chaos_targets.targets(tmp_path / "scratch")
    found["gates"].make(tmp_path)
    assert not (tmp_path / "scratch").exists()
    (tmp_path / "run").mkdir()
    found["resume"].make(tmp_path / "run")
    found["resume"].load(tmp_path / "run")
    assert (tmp_path / "scratch/resume").is_dir()


def test_a_guard_that_counts_wrongly_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(GuardedOptimizer):
        def _count_skip(self, verdict: str, norm: float) -> None:
            super()._count_skip("too_large", norm)

    assert chaos_faults.faults(30, 30, 1)["judged"]["miscounted"] == 0
    monkeypatch.setattr(chaos_faults, "GuardedOptimizer", Wrong)
    result = chaos_faults.faults(30, 30, 1)
    assert result["judged"]["miscounted"] > 0 and not result["ok"]
    old = chaos_report.read("faults")
    assert chaos_faults.miscounted(old) == 0
    old["counters"]["nonfinite"] -= 1
    assert chaos_faults.miscounted(old) == 2


class _SkipsAll(GuardedOptimizer):
    def _joint(self, severity: int) -> int:
        return 3


class _Idle(GuardedOptimizer):
    idle = True

    def _set_learning_rate(self) -> None:
        super()._set_learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] *= not self.idle


class _IdleAfterASkip(_Idle):
    idle = False

    def _count_skip(self, verdict: str, norm: float) -> None:
        super()._count_skip(verdict, norm)
        self.idle = True


@pytest.mark.parametrize(
    ("guard", "reasons"),
    [
        (GuardedOptimizer, []),
        (_SkipsAll, ["skips without a fault", "hardly learned without faults", "hardly learned with faults"]),
        (_Idle, ["hardly learned without faults", "hardly learned with faults"]),
        (_IdleAfterASkip, ["hardly learned with faults"]),
    ],
)
def test_trainings_that_do_not_learn_fail(monkeypatch: pytest.MonkeyPatch, guard: type, reasons: list[str]) -> None:
    monkeypatch.setattr(chaos_faults, "GuardedOptimizer", guard)
    monkeypatch.setattr(chaos_faults, "LEARNS", 60)  # seed 0 has learned enough by then
    result = chaos_faults.faults(60, 60, 1)
    assert result["judged"]["against"] == reasons and result["ok"] == (not reasons)
    words = chaos_report.in_words("faults", result)
    assert not result["bad_steps"] and all(reason in words for reason in reasons)


def _faults_result(each: int | None = None, **arms: list[float]) -> dict[str, Any]:
    """The stored one, in both measures with other values."""
    result = chaos_report.read("faults")
    if each is not None:
        result["each"] = each
    for ranking in result["ranking"].values():
        ranking |= {"untrained": [0.20, 0.22, 0.21, 0.19], "clean": [0.80, 0.81, 0.79, 0.82]} | arms
    return result


def test_the_stored_faults_pass_and_each_loss_of_learning_is_found() -> None:
    judged = chaos_faults.judge(chaos_report.read("faults"))
    met, others = judged["skips"]["with_fault"], judged["skips"]["without_fault"]
    assert judged["ok"] and judged["told"] and met["skipped"] > met["steps"] / 2 and others["skipped"] == 0
    assert (met["steps"], others["steps"]) == (14_300, 85_700)
    assert chaos_faults.judge(_faults_result(faulty=[0.80, 0.80, 0.79, 0.81]))["ok"]
    nothing = {name: [0.20, 0.22, 0.21, 0.19] for name in ("clean", "faulty")}
    for arms in (
        nothing,  # both alike: no difference tells
        {"faulty": [0.48, 0.49, 0.47, 0.48]},  # less than half of the gain
        {"faulty": [0.80, 0.81, 0.79, 0.30]},  # one of four: within the noise that it makes
        {"faulty": [0.80, 0.81, 0.79, float("nan")]},
        {"untrained": [0.80, 0.81, 0.79, 0.82], "faulty": [0.80, 0.81, 0.79, 0.82]},
    ):
        for each in (None, 5_000, 100):
            assert not chaos_faults.judge(_faults_result(each, **arms))["ok"], (arms, each)
    short = _faults_result(99, **nothing)
    assert chaos_faults.judge(short)["ok"] and "too short to judge" in chaos_report.in_words("faults", short)


def test_the_difference_is_judged_where_pairs_are_enough_and_long() -> None:
    worse = {"faulty": [0.76, 0.78, 0.75, 0.79]}
    assert chaos_faults.judge(_faults_result(2_000, **worse))["against"] == [
        f"{name} worse with faults" for name in chaos_faults.MEASURES
    ]
    assert chaos_faults.judge(_faults_result(1_999, **worse))["ok"]
    assert chaos_faults.judge(_faults_result(5_000, faulty=[0.76, 0.83, 0.75, 0.82]))["ok"], "within noise"
    # As measured on two pairs of 300 steps, whose standard deviation happens to be small.
    two = {"untrained": [0.48, 0.54], "clean": [0.8397, 0.8422], "faulty": [0.8340, 0.8258]}
    assert chaos_faults.judge(_faults_result(300, **two))["ok"]


def test_skips_without_a_fault_are_told_and_fail() -> None:
    result = chaos_report.read("faults")
    met = chaos_faults.skips(result)["with_fault"]
    most = result["steps"] - met["steps"]
    for stray in (0, most // 100, most // 100 + 1, most):
        result["answers"] = {"context:nan": {"step": met["steps"] - met["skipped"], "nonfinite": met["skipped"]}}
        result["without_fault"] = {"step": most - stray, "nonfinite": stray}
        skipped = met["skipped"] + stray
        result["counters"] = {"steps": result["steps"] - skipped, "nonfinite": skipped, "clipped": 3}
        judged, words = chaos_faults.judge(result), chaos_report.in_words("faults", result)
        assert judged["against"] == ["skips without a fault"] * (stray > most // 100)
        assert f"of {met['steps']:,} steps with a fault, {stray:,} of {most:,} without" in words
    del result["without_fault"]  # an old result: the guard's counters tell
    assert chaos_faults.judge(result)["against"] == ["steps miscounted", "skips without a fault"]
    for name in ("bad_steps", "nonfinite_state"):
        assert not chaos_faults.judge(chaos_report.read("faults") | {name: 1})["ok"]


def test_the_pages_numbers_are_those_of_the_results() -> None:
    page = chaos_report.PAGE.read_text()
    assert f"{chaos_report.START}\n{chaos_report.table()}\n{chaos_report.END}" in page
