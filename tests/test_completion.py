"""The completion script: what shtab makes of our parser."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

from vla_energy import cli


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_and_flags(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "preflight" in script and "--replan-every" in script
    if shell == "bash":
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_a_reader_that_leaves_is_no_error():
    command = [sys.executable, "-m", "vla_energy.cli", "completion", "tcsh"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr and process.stdout.read(1)
        process.stdout.close()
        assert process.wait(60) in (0, 141) and process.stderr.read() == ""


def test_completion_without_shtab_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr("vla_energy.extras.metadata.version", fail_to_find)
    assert cli.main(["completion", "bash"]) == 2
    assert "vla-energy[completion]" in capsys.readouterr().err


def fail_to_find(name: str) -> str:
    raise metadata.PackageNotFoundError(name)
