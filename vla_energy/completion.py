"""Prints a completion script for your shell, made by shtab from the flags as they are."""

from __future__ import annotations

import argparse

from vla_energy.extras import require

EXAMPLE = """examples:
  vla-energy completion bash > ~/.vla-energy.bash
  vla-energy completion zsh > ~/.zfunc/_vla-energy"""

SHELLS = ("bash", "zsh", "tcsh")


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

    print(shtab.complete(build_parser(), shell=args.shell))
    return 0
