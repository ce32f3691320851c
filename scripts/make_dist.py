"""Builds the sdist and the wheel of the last commit, byte for byte the same each time, and tries them.

    python scripts/make_dist.py                       # into dist/
    python scripts/make_dist.py --check               # twice, compared; twine; installed into an empty environment
    python scripts/make_dist.py --check --with torch==2.13.0+cpu       # there with a torch that is a small download

What is not committed is not in them. Times in the files are the commit's (SOURCE_DATE_EPOCH overrides); setuptools
and wheel are those of constraints.txt, as another version may write other bytes.
"""

from __future__ import annotations

import argparse
import gzip
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE_MODE, PROGRAM_MODE = 0o644, 0o755


class DistError(ValueError):
    """A build or a check failed; the message says which."""


def call(command: Sequence[str | Path], what: str, cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    """Runs a command and returns what it printed.

    Raises:
        DistError: it failed; the message has `what` and the end of its output.
    """
    merged = {**os.environ, **(env or {})}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=merged, capture_output=True, text=True)
    if done.returncode:
        raise DistError(f"{what} failed ({done.returncode}):\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def epoch() -> int:
    """Seconds since 1970 that the files carry: SOURCE_DATE_EPOCH, else the last commit's."""
    return int(os.environ.get("SOURCE_DATE_EPOCH") or call(["git", "log", "-1", "--format=%ct"], "git log"))


def export(folder: Path) -> Path:
    """The tree of the last commit, unpacked below `folder`."""
    archive = folder / "tree.tar"
    call(["git", "archive", "--format=tar", "-o", archive, "HEAD"], "git archive")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "tree", filter="data")
    return folder / "tree"


def normalise(sdist: Path, seconds: int) -> None:
    """Rewrites a .tar.gz in place: members by name, the same times, owners and modes.

    setuptools honours SOURCE_DATE_EPOCH in wheels alone.
    """
    packed = io.BytesIO()
    with tarfile.open(sdist) as old, tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new:
        for member in sorted(old.getmembers(), key=lambda entry: entry.name):
            content = old.extractfile(member) if member.isfile() else None
            member.mtime, member.uid, member.gid, member.uname, member.gname = seconds, 0, 0, "", ""
            member.mode = PROGRAM_MODE if member.isdir() or member.mode & 0o100 else FILE_MODE
            member.pax_headers = {}
            new.addfile(member, content)
    with sdist.open("wb") as raw, gzip.GzipFile("", "wb", mtime=seconds, fileobj=raw) as zipped:
        zipped.write(packed.getvalue())


def build(out: Path) -> list[Path]:
    """Sdist of the commit, and the wheel that is built from it, as whoever gets the sdist would."""
    seconds = epoch()
    env = {"SOURCE_DATE_EPOCH": str(seconds), "PIP_CONSTRAINT": str(ROOT / "constraints.txt")}
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make = [sys.executable, "-m", "build", "--outdir", folder / "made"]
        call([*make, "--sdist", export(folder)], "building the sdist", env=env)
        (sdist,) = (folder / "made").glob("*.tar.gz")
        normalise(sdist, seconds)
        with tarfile.open(sdist) as tar:
            tar.extractall(folder / "unpacked", filter="data")
        (source,) = (folder / "unpacked").iterdir()
        call([*make, "--wheel", source], "building the wheel", env=env)
        made = [out / path.name for path in sorted((folder / "made").iterdir())]
        for path in made:
            path.write_bytes((folder / "made" / path.name).read_bytes())
    return made


def try_wheel(wheel: Path, versions: Sequence[str]) -> str:
    """Installs the wheel into an environment that has nothing, and returns what `vla-energy doctor` says there.

    Args:
        wheel: the file.
        versions: requirements to install with it; none takes the versions of constraints.txt.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "venv", with_pip=True)
        python, program = folder / "venv" / "bin" / "python", folder / "venv" / "bin" / "vla-energy"
        options = versions or ["-c", ROOT / "constraints.txt"]
        call([python, "-m", "pip", "install", "--quiet", wheel, *options], "pip install", cwd=folder)
        call([python, "-m", "pip", "check"], "pip check", cwd=folder)
        call([program, "--help"], "vla-energy --help", cwd=folder)
        return call([program, "doctor"], "vla-energy doctor", cwd=folder)


def main() -> int:
    """Builds, and checks if asked to. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder (default dist)")
    parser.add_argument("--check", action="store_true", help="build again and compare, twine check, install, doctor")
    parser.add_argument(
        "--with", nargs="+", default=[], dest="versions", metavar="REQUIREMENT", help="instead of constraints.txt"
    )
    args = parser.parse_args()
    try:
        made = build(args.out)
        print("built:", *made, flush=True)
        if args.check:
            with tempfile.TemporaryDirectory() as again:
                for first, second in zip(made, build(Path(again)), strict=True):
                    if first.read_bytes() != second.read_bytes():
                        raise DistError(f"{first.name}: a second build has other bytes")
            print("a second build has the same bytes", flush=True)
            print(call([sys.executable, "-m", "twine", "check", "--strict", *made], "twine check").strip(), flush=True)
            print(try_wheel(made[-1] if made[-1].suffix == ".whl" else made[0], args.versions))
    except DistError as error:
        print("error:", error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
