"""The command line: a quick --help, errors of one line, and the rollout command."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest

from vla_energy import cli
from vla_energy.rollout import command as rollout_command

BACKEND = "point_world:PointWorld"


@pytest.fixture(autouse=True)
def _fakes(monkeypatch):
    """The point world, and a checkpoint loader that gives the fake policy of the rollout tests."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    from test_rollout import FakePolicy

    def load_policy(checkpoint: str, device: str, strict: bool) -> FakePolicy:
        if checkpoint == "missing":
            raise ValueError("missing: no config.json in it")
        return FakePolicy()

    module = types.ModuleType("vla_energy.rollout.policy")
    monkeypatch.setattr(module, "load_policy", load_policy, raising=False)
    monkeypatch.setitem(sys.modules, "vla_energy.rollout.policy", module)


def rollout(tmp_path, *extra: str) -> int:
    out = str(tmp_path / "runs" / "result.json")
    flags = ["--checkpoint", "fake", "--tasks", "near", "--episodes", "3", "--sim", BACKEND, "--out", out]
    return cli.main(["rollout", *flags, *extra])


def test_help_is_quick():
    heavy = {"torch", "numpy", "tensorflow", "transformers", "mujoco"}
    code = f"import sys; from vla_energy.cli import build_parser; build_parser(); print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def help_of(capsys, *command: str) -> list[str]:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out.splitlines()


def test_help_fits_a_screen(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    lines = help_of(capsys)
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    for name, (_, text) in cli.COMMANDS.items():
        assert any(line.split() == [name, *text.split()] for line in lines), f"{name} takes more than its line"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_an_example_that_parses(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    lines = help_of(capsys, name)
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines).replace("\\\n", " ")
    examples = re.findall(rf"^  (vla-energy {name}\b.*)$", text, re.MULTILINE)
    assert examples
    for example in examples:
        words = shlex.split(re.split(r"\s{2,}(?=[a-z])| >", example)[0])
        assert cli.build_parser().parse_args(words[1:]).command == name


def test_what_a_program_may_read_can_be_json():
    (commands,) = [action.choices for action in cli.build_parser()._actions if isinstance(action.choices, dict)]
    told = {name for name, parser in commands.items() if "--json" in parser._option_string_actions}
    assert set(commands) - told == {"completion"}  # a script for a shell


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == metadata.version("vla-energy")


def test_a_difference_of_which_nothing_was_seen_has_no_interval():
    none = {"difference": 0.0, "interval": [0.0, 0.0], "p_value": 1.0, "won": 0, "lost": 0, "pairs": 9}
    assert rollout_command._difference(none) == "+0.0 [n/a] points, p=1 (0 won, 0 lost of 9)"
    some = {**none, "difference": 0.5, "interval": [0.1, 0.9], "won": 5}
    assert "+50.0 [+10.0, +90.0] points" in rollout_command._difference(some)


def test_rollout_prints_a_table_and_writes_the_results(tmp_path, capsys):
    assert rollout(tmp_path) == 0
    printed = capsys.readouterr().out
    assert "100.0%" in printed and "points, p=" in printed and "written to" in printed
    saved = json.loads((tmp_path / "runs" / "result.json").read_text())
    assert saved["complete"] and saved["settings"]["arms"] == ["policy", "rerank"]


def test_rollout_prints_json(tmp_path, capsys):
    assert rollout(tmp_path, "--json", "--arms", "rerank") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "runs" / "result.json").read_text())


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--arms", "policy,magic"], "unknown arm(s): magic; known: policy, recommended, refine, replan"),
        (["--tasks", "nowhere"], f"unknown {BACKEND} task(s): nowhere; known: dies, far, hangs, near"),
        (["--tasks", ","], "tasks must be given"),
        (["--episodes", "0"], "episodes must be at least 1, got 0"),
        (["--episodes", "many"], "argument --episodes: invalid int value: 'many' (see vla-energy rollout --help)"),
        (["--replan-every", "9"], "replan_every 9 exceeds the checkpoint's horizon 6"),
        (["--sim", "gazebo"], "unknown simulator 'gazebo'; known: metaworld"),
        (["--checkpoint", "missing"], "missing: no config.json in it"),
        (["--out", "/"], "cannot write results to /"),
        (["--tasks", "raises"], "raises: RuntimeError: physics exploded"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, extra, message):
    assert rollout(tmp_path, *extra) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # before it at most the progress bar
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "runs" / "result.json").exists()


def test_an_unknown_flag_points_to_the_commands_own_help(capsys):
    given = ["memory", "--checkpoint", "a", "--data-root-dir", "b", "--dataset-name", "c", "--nope", "3"]
    assert cli.main(given) == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --nope 3 (see vla-energy memory --help)\n"


def test_flags_of_the_fine_tuning_that_are_wrong_are_one_line(tmp_path):
    def said(*flags: str) -> tuple[int, str, str]:
        script = str(Path(__file__).parents[1] / "scripts" / "finetune_energy.py")
        done = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True, cwd=tmp_path)
        return done.returncode, done.stdout, done.stderr

    code, _, error = said("--nope", "3")
    assert code == 2 and error.startswith("error: unknown flag or value: --nope 3 (--help") and error.count("\n") == 1
    code, _, error = said("--config_path", "nowhere.yaml")
    assert code == 1 and "error: --config_path nowhere.yaml: No such file or directory; name a YAML file" in error
    code, text, error = said("--help")
    assert (code, error) == (0, "") and "--config_path configs/demo.yaml" in "".join(text.splitlines()[:6])


def test_no_command_and_traceback(tmp_path, capsys):
    assert cli.main([]) == 2
    assert "COMMAND" in capsys.readouterr().err
    assert rollout(tmp_path, "--episodes", "0", "--traceback") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_defect_keeps_its_traceback_and_interruption_is_130(tmp_path, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise AssertionError("a defect")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vla_energy.rollout.command.run", fail)
    with pytest.raises(AssertionError):
        rollout(tmp_path)
    monkeypatch.setattr("vla_energy.rollout.command.run", interrupt)
    assert rollout(tmp_path) == 130
    assert "interrupted" in capsys.readouterr().err
