"""The `vla-energy` command: each subcommand is a module with `EXAMPLE`, `add_arguments(parser)`, `run(args) -> int`.

Command modules keep their heavy imports inside `run`, so that `--help` is answered at once. An error of ours is
one line on stderr and exit code 2; anything else is a defect and keeps its traceback.
"""

from __future__ import annotations

import argparse
import importlib
import os
import select
import sys
import textwrap
import traceback
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NoReturn

COMMANDS = {
    "cache": ("vla_energy.finetune.cache_command", "run the frozen policy once over a dataset"),
    "completion": ("vla_energy.completion", "print a completion script for bash, zsh or tcsh"),
    "doctor": ("vla_energy.doctor.command", "what silently breaks a policy, its cost and remedy"),
    "memory": ("vla_energy.finetune.remember", "remember the training set, for retrieval"),
    "patch": ("vla_energy.hosts.patch_command", "the energy head's lines in an openvla-oft checkout"),
    "preflight": ("vla_energy.preflight.command", "will reranking help? a verdict from held-out data"),
    "report": ("vla_energy.report.command", "an HTML page about runs: curves, energies, gate"),
    "rollout": ("vla_energy.rollout.command", "closed-loop episodes, arms paired by seed"),
    "train-head": ("vla_energy.finetune.head_command", "train energy heads from a feature cache"),
}
"""Subcommand -> its module, and one line of help: `vla-energy --help` fits 24 lines of 80 columns."""

EPILOG = "vla-energy COMMAND --help shows its flags and an example. Fine-tuning: scripts/finetune_energy.py."

_BAD_INPUT = 2
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_UNREAD = 141  # 128 + SIGPIPE


class UsageError(ValueError):
    """The command line cannot be parsed."""


class _Parser(argparse.ArgumentParser):
    """Reports errors as ours instead of printing the usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


class _Command(_Parser):
    """Refuses unknown flags itself: left to the parser above, they would point to its help."""

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        namespace, unknown = super().parse_known_args(*args, **kwargs)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown


class _Version(argparse.Action):
    """Prints the version when asked: looking it up takes longer than the rest of `--help`."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(metadata.version("vla-energy"))
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser with all subcommands."""
    parser = _Parser(prog="vla-energy", description="Energy heads for OpenVLA-style policies.", epilog=EPILOG)
    parser.add_argument("-V", "--version", action=_Version, help="show the installed version and exit")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Command)
    for name, (module, text) in COMMANDS.items():
        command = importlib.import_module(module)
        subparser = subparsers.add_parser(
            name,
            help=text,
            description=textwrap.fill(command.__doc__ or "", 78),
            epilog=command.EXAMPLE,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.add_argument("--traceback", action="store_true", help="show where an error came from")
        subparser.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.

    Returns:
        The exit code: 0, 1 if the doctor found a problem, 2 after bad input, 130 after Ctrl-C, 141 if nobody reads on.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        args = build_parser().parse_args(arguments)
        code = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted; what was already written is kept", file=sys.stderr)
        return getattr(error, "exit_code", _INTERRUPTED)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return _UNREAD
        if not _is_ours(error):
            raise
        if "--traceback" in arguments:
            traceback.print_exc()
        print("error:", " ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
        return _BAD_INPUT


def _nobody_reads() -> bool:
    """Whether it is stdout that broke, and no worker's pipe; then what is left in it goes nowhere."""
    try:
        descriptor = sys.stdout.fileno()
        poll = select.poll()
    except (OSError, ValueError, AttributeError):  # no file, or no such call on this system
        return False
    poll.register(descriptor, select.POLLOUT)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return True


def _is_ours(error: Exception) -> bool:
    """Bad input, or an exception class of this package (SimulatorError and others are no ValueErrors)."""
    return isinstance(error, (ValueError, OSError)) or type(error).__module__.partition(".")[0] == "vla_energy"


if __name__ == "__main__":
    sys.exit(main())
