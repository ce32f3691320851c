"""What a dropped connection does to a run: it saves and ends, and goes on under nohup. Others: test_durable.py."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_durable import _config, _folder

from vla_energy.durable import check_seal
from vla_energy.finetune.signals import RunStoppedError, StopSignals
from vla_energy.finetune.trainer import Trainer

RUN = """
import os, signal, sys, time
from vla_energy.finetune.signals import StopSignals
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may do so under nohup, which children inherit
with StopSignals() as stop:
    print("ready", file=sys.stderr, flush=True)
    while stop.number is None:
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGHUP)
    for _ in range(3):
        print("progress", flush=True), print("progress", file=sys.stderr, flush=True)
    open(sys.argv[1], "w").write(str(stop.number))
"""


@contextmanager
def _handler(of: int, handler: Any) -> Iterator[None]:
    before = signal.signal(of, handler)
    try:
        yield
    finally:
        signal.signal(of, before)


def _hung_up_in_a_step(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    trainer = Trainer(_config(tiny_folder, tmp_path, max_steps=3, save_freq=100))
    step = trainer.train_step

    def hung_up(*args: Any) -> Any:
        if trainer.step == 1:
            os.kill(os.getpid(), signal.SIGHUP)
        return step(*args)

    monkeypatch.setattr(trainer, "train_step", hung_up)
    return trainer


def test_a_dropped_connection_saves_the_step_under_way(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vla_energy.finetune.signals._mute", lambda: None)  # pytest's output may be a pipe
    trainer = _hung_up_in_a_step(tiny_folder, tmp_path, monkeypatch)
    with _handler(signal.SIGHUP, signal.SIG_DFL):
        with pytest.raises(RunStoppedError, match="SIGHUP.*--resume True goes on") as raised:
            trainer.run()
        assert raised.value.exit_code == 129 and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    assert check_seal(_folder(trainer.config, 2)) == 2 and trainer.step == 2


def test_under_nohup_a_run_goes_on(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = _hung_up_in_a_step(tiny_folder, tmp_path, monkeypatch)
    with _handler(signal.SIGHUP, signal.SIG_IGN):
        trainer.run()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert trainer.step == 3


def test_signals_of_one_kind_are_still_noted_under_nohup() -> None:
    with _handler(signal.SIGHUP, signal.SIG_IGN), StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM


@pytest.mark.parametrize("where", ["terminal", "pipe"])
def test_what_is_printed_to_a_lost_terminal_ends_no_run(tmp_path: Path, where: str) -> None:
    ours, theirs = pty.openpty() if where == "terminal" else os.pipe()
    command = [sys.executable, "-c", RUN, str(tmp_path / "saved")]
    child = subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL)
    os.close(theirs)
    assert b"ready" in os.read(ours, 100)
    os.close(ours)
    child.send_signal(signal.SIGHUP)
    assert child.wait(60) == 0 and (tmp_path / "saved").read_text() == str(int(signal.SIGHUP))
