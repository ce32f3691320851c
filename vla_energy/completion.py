"""Prints a completion script for your shell, made by shtab from the flags as they are."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from vla_energy.extras import require

EXAMPLE = """examples:
  vla-energy completion bash > ~/.vla-energy.bash
      and in ~/.bashrc:  source ~/.vla-energy.bash
  vla-energy completion zsh > ~/.zfunc/_vla-energy
      and in ~/.zshrc, before compinit:  fpath=(~/.zfunc $fpath)"""

SHELLS = ("bash", "zsh", "tcsh")
_FOLDERS, _FILES = ("DIR", "PATH", "RUN"), ("FILE",)
"""What the metavars of arguments that take a path say it is of."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("shell", choices=SHELLS, help="the shell that the script is for")


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        MissingExtraError: shtab is not installed.
    """
    require("completion", {"shtab": "1.7"})
    import shtab

    from vla_energy.cli import build_parser

    parser = build_parser()
    for action in _arguments(parser):
        # Without it the script completes nothing here, where the shell alone would complete paths.
        if action.metavar in (*_FOLDERS, *_FILES):
            action.complete = shtab.DIRECTORY if action.metavar in _FOLDERS else shtab.FILE
    print(shtab.complete(parser, shell=args.shell))
    return 0


def _arguments(parser: argparse.ArgumentParser) -> Iterator[Any]:
    """Those of all commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _arguments(command)
        else:
            yield action
