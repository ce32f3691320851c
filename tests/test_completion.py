"""The completion script: what shtab makes of our parser."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

from vla_energy import cli, completion


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_and_flags(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "preflight" in script and "--replan-every" in script
    if shell == "bash":
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["report", ""], {"runs", "other"}),
        (["doctor", "--checkpoint", "r"], {"runs"}),
        (["patch", "check", ""], {"runs", "other"}),
        (["rollout", "--out", ""], {"runs", "other", "arms.json"}),
        (["report", "--rollout", "a"], {"arms.json"}),
        (["doctor", "--dtype", ""], {"float32", "bfloat16"}),
    ],
)
def test_paths_are_completed(words, expected, tmp_path, capsys):
    """In a shell that has sourced the script, its own completion of paths is off."""
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    for name in ("runs", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "arms.json").touch()
    line = " ".join(repr(word) for word in ["vla-energy", *words])
    script += f"COMP_WORDS=({line}); COMP_CWORD={len(words)}\n"
    script += '_shtab_vla_energy 2>/dev/null; printf "%s\\n" "${COMPREPLY[@]}"\n'
    done = subprocess.run(["bash"], input=script, text=True, capture_output=True, cwd=tmp_path)
    assert {word.rstrip("/") for word in done.stdout.split()} == expected


def test_zsh_completes_paths_by_their_kind(capsys):
    assert cli.main(["completion", "zsh"]) == 0
    script = capsys.readouterr().out
    assert 'checkpoint folder, or embedded]:DIR:_files -/"' in script
    assert 'names its fields, if unknown]:FILE:_files"' in script


def test_every_metavar_of_a_path_is_known():
    """One of another name would not be completed, and nobody would see it."""
    metavars = {action.metavar for action in completion._arguments(cli.build_parser()) if action.metavar}
    other = {"A,B", "B", "E", "MODULE:FUNCTION", "N", "NAME", "P", "S", "VALUE"}
    assert metavars == {*completion._FOLDERS, *completion._FILES, *other}


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
