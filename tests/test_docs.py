"""What README and docs say: commands have flags that exist, warnings lead to a section, generated pages are current."""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import draccus
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import config_reference

from vla_energy import cli
from vla_energy.data.datasets import dataset_config
from vla_energy.health import SYMPTOMS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL = re.compile(r"```(?:bash|sh)\n(.*?)```", re.DOTALL)
THEIRS = ("experiments/", "vla-scripts/")
"""Programs of openvla-oft: their flags are not ours to know."""
QUICK = ["vla-energy doctor", "python scripts/config_reference.py --check", "vla-energy --help"]
WRAPPERS = {"nice", "env", "time"}


class Parsed(BaseException):
    """The command line was understood."""


def commands(text: str) -> Iterator[str]:
    """Each command of a page's shell blocks that starts one of our programs, from the program on, without comments."""
    for block in SHELL.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.split(" > ")[0], comments=True)
            while words and (re.fullmatch(r"[A-Z_]+=\S*", words[0]) or words[0] in WRAPPERS):
                words.pop(0)
            if words and words[0] in ("python", "vla-energy") and not words[-1].startswith(THEIRS):
                yield shlex.join(words)


DOCUMENTED = sorted(
    {
        (path.name, command)
        for path in PAGES
        for command in commands(path.read_text(encoding="utf-8"))
        if not any(part.startswith(THEIRS) for part in shlex.split(command))
    }
)


def parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a program up to where its flags are parsed.

    Raises:
        Parsed: they were.
        SystemExit: they were not.
    """
    program, *arguments = shlex.split(command)
    if program == "vla-energy":
        cli.build_parser().parse_args(arguments)
        raise Parsed
    parse_args, parse_known, read = (
        argparse.ArgumentParser.parse_args,
        argparse.ArgumentParser.parse_known_args,
        draccus.parse,
    )
    within: list[bool] = []  # `parse_args` calls `parse_known_args`, and refuses what that leaves

    def stop_after_all(*args: Any, **kwargs: Any) -> None:
        within.append(True)
        parse_args(*args, **kwargs)
        raise Parsed

    def stop_after_known(*args: Any, **kwargs: Any) -> Any:
        if within:
            return parse_known(*args, **kwargs)
        parse_known(*args, **kwargs)
        raise Parsed

    def stop_after_config(*args: Any, **kwargs: Any) -> None:
        within.append(True)  # draccus refuses what `parse_known_args` leaves
        if hasattr(config := read(*args, **kwargs), "check"):
            config.check()
        raise Parsed

    # What follows the parsing in a script must not hide that it succeeded.
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_after_all)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop_after_known)
    monkeypatch.setattr(draccus, "parse", stop_after_config)
    for name in ("benchmarks", "scripts", "examples"):
        monkeypatch.syspath_prepend(str(ROOT / name))
    monkeypatch.chdir(ROOT)  # configs/ and constraints are named from there
    if arguments[0] == "-m":
        monkeypatch.setattr(sys, "argv", arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=False)
    else:
        monkeypatch.setattr(sys, "argv", arguments)
        runpy.run_path(arguments[0], run_name="__main__")


def test_there_are_commands_of_every_program() -> None:
    programs = {
        command.split()[0] if command.startswith("vla-energy") else command.split()[1] for _, command in DOCUMENTED
    }
    assert programs >= {"vla-energy", "-m", "scripts/finetune_energy.py", "benchmarks/closed_loop.py"}
    named = {command.split()[1] for _, command in DOCUMENTED if command.startswith("vla-energy")}
    assert named >= set(cli.COMMANDS), "a command that no page shows"


@pytest.mark.filterwarnings("ignore::RuntimeWarning:runpy")  # a module that is imported already
@pytest.mark.parametrize(("page", "command"), DOCUMENTED)
def test_documented_flags_exist(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Parsed):
        parse(command, monkeypatch)


def test_a_flag_that_does_not_exist_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    stale = [
        "vla-energy rollout --checkpoint a --tasks b --out c --episode_count 3",
        "python benchmarks/samples.py --checkpoint a --no_such_flag",
        "python scripts/finetune_energy.py --energy.head.no_such_flag 1",
        "python scripts/finetune_energy.py --energy.loss.info_nce -1",
    ]
    for command in stale:
        with pytest.raises((SystemExit, cli.UsageError)), monkeypatch.context() as patch:
            parse(command, patch)


def _flag(command: str, name: str) -> str:
    words = shlex.split(command)
    return words[words.index(name) + 1] if name in words else ""


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_latest_is_written_by_the_run_before_it(path: Path) -> None:
    """Only --save_latest_checkpoint_only makes runs/NAME/latest; else it is runs/NAME--STEPS_chkpt."""
    only_steps: set[str] = set()
    for command in commands(path.read_text(encoding="utf-8")):
        missing = [name for name in only_steps if f"runs/{name}/latest" in command]
        assert not missing, f"{command}: the run {missing} has no --save_latest_checkpoint_only True"
        if "scripts/finetune_energy.py" in command:
            config, name = _flag(command, "--config_path"), _flag(command, "--run_id_override")
            text = (ROOT / config).read_text() if config else ""
            kept = _flag(command, "--save_latest_checkpoint_only") or str("save_latest_checkpoint_only: true" in text)
            name = name or "".join(re.findall(r"^run_id_override: (.+)$", text, re.MULTILINE))
            (only_steps.discard if kept == "True" else only_steps.add)(name)


def test_all_commands_but_completion_have_json() -> None:
    assert "All but `completion` have `--json`" in (ROOT / "docs" / "quickstart.md").read_text()
    commands = next(action.choices for action in cli.build_parser()._actions if action.dest == "command")
    assert isinstance(commands, dict)
    assert {name for name, one in commands.items() if "--json" not in one._option_string_actions} == {"completion"}


@pytest.mark.parametrize("command", QUICK)
def test_quick_commands_run(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = shlex.split(command)
    monkeypatch.chdir(ROOT)
    if program == "vla-energy":
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        try:
            assert cli.main(arguments) == 0
        except SystemExit as ended:  # --help
            assert not ended.code
    else:
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(arguments[0], run_name="__main__")
        assert ended.value.code == 0, capsys.readouterr().out
    assert capsys.readouterr().out


def test_every_warning_leads_to_its_section() -> None:
    sections = re.findall(r"^### (\w+)$", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sections == [symptom.name for symptom in SYMPTOMS]
    assert all(f"docs/troubleshooting.md#{symptom.name}" in symptom.message(["seen"]) for symptom in SYMPTOMS)


def test_every_field_has_its_item() -> None:
    with pytest.raises(config_reference.ReferenceError, match=r"nowhere\.field: say in ITEMS"):
        config_reference.item("nowhere.field")
    unused = {key for key in config_reference.ITEMS if f"| `{key.rsplit('.')[-1]}` |" not in config_reference.page()}
    assert {key for key in unused if f"## energy.{key}\n" not in config_reference.page()} == set()


def test_the_dataset_file_in_the_docs_is_one(tmp_path: Path) -> None:
    (block,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs/datasets.md").read_text(encoding="utf-8"), re.DOTALL)
    path = tmp_path / "my_robot.json"
    path.write_text(block)
    config = dataset_config("my_robot", path)
    assert config.image_key == "front" and json.loads(block)["my_robot"]["gripper"] == config.gripper


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", path.read_text(encoding="utf-8")):
        assert re.match(r"https?://", target) or (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_site_has_every_page() -> None:
    listed = set(re.findall(r"(\w[\w-]*\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    assert listed == {path.name for path in (ROOT / "docs").glob("*.md")}
