"""What the benchmarks inside openvla-oft have in common: their flags, and the copy of its checkout that is patched."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
DATASET = "libero_spatial_no_noops"


def host_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser of the flags that name the host and a checkpoint; with `--quick`, as the other benchmarks, it ends here.

    Args:
        doc: of the benchmark.
    """
    if "--quick" in sys.argv:
        print("left out: needs a checkout of openvla-oft, see --help")
        sys.exit()
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("python", "host", "transformers", "dlimp", "checkpoint"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    return parser


def add_data(parser: argparse.ArgumentParser) -> None:
    """The data that the host trains on."""
    parser.add_argument("--data_root_dir", type=Path, default=ROOT / "tests" / "libero")


def chosen(parser: argparse.ArgumentParser, flag: str, value: str, known: Iterable[str]) -> list[str]:
    """Comma-separated names in the order given; the program ends where one is not known."""
    names, known = value.split(","), list(known)
    if unknown := sorted({*names} - {*known}):
        parser.error(f"--{flag} {', '.join(unknown)}: choose from {', '.join(known)}")
    return names


def copy_checkout(host: Path, target: Path, *, patched: bool) -> Path:
    """A copy of the host's checkout, with the energy head's lines or as it is."""
    shutil.copytree(host, target, symlinks=True)
    if patched:
        command = [sys.executable, "-m", "vla_energy.cli", "patch", "apply", str(target)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return target
