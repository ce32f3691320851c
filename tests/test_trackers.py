"""Trackers: every row goes to each of them, and one that fails costs nothing but itself."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from vla_energy.finetune import checkpoints, trackers
from vla_energy.finetune.config import FinetuneConfig, FlagError
from vla_energy.finetune.logs import MetricLog


class UsageError(Exception):
    """As wandb has it: of no class that is known here, and of several lines."""

    def __init__(self, _: str) -> None:
        super().__init__("no key:\n  log in")


class Fake:
    """wandb or trackio: notes its calls, and fails where it is told to."""

    def __init__(
        self,
        name: str,
        monkeypatch: pytest.MonkeyPatch,
        fails: str = "",
        with_run: bool = True,
        error: type[Exception] = ConnectionError,
    ) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.fails, self.error, module = fails, error, types.ModuleType(name)
        methods = {key: self._method(key) for key in ("log", "finish")}
        run = types.SimpleNamespace(**methods) if with_run else object()

        def init(**given: Any) -> Any:
            self._note("init", given)
            return run

        for key, value in {"init": init, **methods}.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)

    def _method(self, name: str) -> Any:
        return lambda *args, **kwargs: self._note(name, (*args, kwargs))

    def _note(self, name: str, value: Any) -> None:
        if self.fails == name:
            raise self.error("the network is gone")
        self.calls.append((name, value))


def _config(tmp_path: Path, **changes: Any) -> FinetuneConfig:
    (tmp_path / "run").mkdir(exist_ok=True)
    return FinetuneConfig(run_root_dir=tmp_path, run_id_override="run", **changes)


def _write(config: FinetuneConfig) -> list[dict[str, Any]]:
    with MetricLog(config, 0) as log:
        log.write(1, {"energy/loss": 2.0, "energy/gap": math.nan})
        log.write(2, {"energy/loss": 1.0})
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


ROWS = [{"step": 1, "energy/loss": 2.0, "energy/gap": None}, {"step": 2, "energy/loss": 1.0}]


@pytest.mark.parametrize("with_run", [True, False])
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_rows_go_to_the_project(name: str, with_run: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(name, monkeypatch, with_run=with_run)
    config = _config(tmp_path, **{f"{name}_project": "mine"}, wandb_entity="us")
    assert _write(config) == ROWS
    (_, init), (_, first), second, end = fake.calls
    assert init["project"] == "mine" and init["name"] == "ft+run" and init["config"]["flags"]["seed"] == 7
    assert init.get("entity") == ("us" if name == "wandb" else None)
    assert first[0]["energy/loss"] == 2.0 and math.isnan(first[0]["energy/gap"]) and first[1] == {"step": 1}
    assert second == ("log", ({"energy/loss": 1.0}, {"step": 2})) and end == ("finish", ({},))
    assert list((config.run_dir / "tensorboard").iterdir())


@pytest.mark.parametrize(("flag", "project"), [("", "theirs"), ("mine", "mine")])
def test_trackio_takes_the_flag_else_the_environment(
    flag: str, project: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake("trackio", monkeypatch)
    monkeypatch.setenv("TRACKIO_PROJECT", "theirs")
    _write(_config(tmp_path, trackio_project=flag))
    assert fake.calls[0][1]["project"] == project


def test_a_run_may_be_resumed_with_another_tracker(tmp_path: Path) -> None:
    other = _config(tmp_path, trackio_project="mine", wandb_project="mine", wandb_entity="us")
    assert checkpoints._flags(other, 1) == checkpoints._flags(_config(tmp_path), 1)


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_tracker_that_fails_loses_nothing_and_is_said_once(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken, whole = Fake("wandb", monkeypatch, fails), Fake("trackio", monkeypatch)
    monkeypatch.setenv("TRACKIO_PROJECT", "mine")
    with caplog.at_level(logging.WARNING):
        assert _write(_config(tmp_path, wandb_project="p")) == ROWS
    (said,) = [record.getMessage() for record in caplog.records]
    assert "W&B failed and is left out (ConnectionError: the network is gone)" in said
    assert f"trackers {tmp_path / 'run'} --wandb_project NAME" in said
    assert len(whole.calls) == 4 and [name for name, _ in broken.calls].count("log") == (2 if fails == "finish" else 0)


def test_tensorboard_that_cannot_be_imported_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert _write(_config(tmp_path)) == ROWS
    assert "TensorBoard failed and is left out" in caplog.text and caplog.text.count("WARNING") == 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_what_is_asked_for_and_not_installed_is_told_before_anything_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    config = _config(tmp_path, **{f"{name}_project": "p"})
    with pytest.raises(FlagError, match=f"--{name}_project.* is set but {name} is not installed: pip install {name}"):
        MetricLog(config, 0)
    assert not list(config.run_dir.iterdir())


def test_a_missing_tracker_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    """The checkpoint, which is not there either, would be missed first."""
    script, runs = Path(__file__).parents[1] / "scripts" / "finetune_energy.py", tmp_path / "runs"
    (tmp_path / "wandb.py").write_text("raise ImportError('as if it were not there')")
    flags = ["--vla_path", str(tmp_path / "nowhere"), "--wandb_project", "p", "--run_root_dir", str(runs)]
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, str(script), *flags], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 1 and "error: --wandb_project is set but wandb" in done.stderr and not runs.exists()


@pytest.mark.parametrize("error", ["ImportError('no libfoo.so')", "AttributeError('numpy.float_')"])
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_what_is_installed_and_broken_is_not_said_to_be_missing(
    name: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site" / name).mkdir(parents=True)
    (tmp_path / "site" / name / "__init__.py").write_text(f"raise {error}\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(FlagError, match=f"{name}, which is installed, cannot be imported .{error[:6]}.*: ") as raised:
        MetricLog(_config(tmp_path, **{f"{name}_project": "p"}), 0)
    assert "not installed" not in str(raised.value)


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_tracker_that_fails_again_is_one_line_with_the_remedy(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config(tmp_path)
    _write(config)
    Fake("wandb", monkeypatch, fails, error=UsageError)
    whole = Fake("trackio", monkeypatch)
    flags = ["--wandb_project", "mine", "--trackio_project", "mine"]
    assert trackers.main([str(config.run_dir), *flags]) == 1
    said = capsys.readouterr()
    assert said.out == "Trackio: 2 rows\n" and len(whole.calls) == 4
    assert said.err.count("\n") == 1 and said.err.startswith("error: W&B failed (UsageError: no key: log in); ")
    assert "`wandb login`" in said.err and "WANDB_MODE=offline" in said.err


def test_rows_can_be_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config(tmp_path)
    _write(config)
    fake = Fake("trackio", monkeypatch)
    assert trackers.main([str(config.run_dir), "--trackio_project", "mine"]) == 0
    assert capsys.readouterr().out == "Trackio: 2 rows\n"
    assert [name for name, _ in fake.calls] == ["init", "log", "log", "finish"]
    assert math.isnan(fake.calls[1][1][0]["energy/gap"]) and fake.calls[0][1]["config"]["flags"]["seed"] == 7
    with (config.run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "energy/lo')
    assert trackers.main([str(config.run_dir), "--trackio_project", "mine"]) == 0
    said = capsys.readouterr()
    assert said.out == "Trackio: 2 rows\n" and said.err.startswith("note: line 3, the last of ")
    assert trackers.main([str(config.run_dir)]) == 2
    assert "name a project" in capsys.readouterr().err
    assert trackers.main([str(tmp_path / "nowhere"), "--trackio_project", "mine"]) == 2
    assert "metrics.jsonl is missing" in capsys.readouterr().err and len(fake.calls) == 8
