"""Builds an environment with openvla-oft's versions (constraints-host.txt) and prints its interpreter's path.

`make test-host-pins` runs this, then the tests in it. The environment lies outside the checkout, so that it is built
once a machine: torch 2.2.0 from the registry brings CUDA libraries (2.5 GB to download, 5 GB on disk). Where pip finds
a CPU build of torch 2.2.0 (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS) it takes that one, with no CUDA libraries.

Environment variables: VLA_ENERGY_HOST_ENV, an environment of your own to test instead, which is not changed;
HOST_PYTHON, a Python 3.10; XDG_CACHE_HOME, by default ~/.cache.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

PINS = Path(__file__).parents[1] / "constraints-host.txt"
STAMP = "host-pins.json"
PINNED = ("torch", "torchvision", "draccus", "transformers", "tokenizers", "timm", "peft")
"""What openvla-oft pins."""
OTHERS = ("numpy", "safetensors", "tqdm", "huggingface-hub", "matplotlib", "pytest", "hypothesis", "packaging")
"""What it leaves open, and what tests need: in an environment of your own their versions may be others."""
VERSION = (3, 10)


class HostPinsError(ValueError):
    """The environment cannot be built or is not the host's; the message names the fix."""


def read_pins(path: Path) -> dict[str, str]:
    """Package (normalised name) -> version, of a file of `name==version` lines.

    Raises:
        HostPinsError: another kind of line.
    """
    pins = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        name, equals, version = text.partition("==")
        if not equals or not version.strip():
            raise HostPinsError(f"{path}:{number}: expected name==version, found {text!r}")
        pins[normalise(name)] = version.strip()
    return pins


def normalise(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def differing(pins: Mapping[str, str], installed: Mapping[str, str]) -> list[str]:
    """What is installed in another version than openvla-oft's, or lacks; a local part ("+cpu") may differ."""
    wrong = []
    for name in (*PINNED, *OTHERS):
        version = installed.get(name, "not installed")
        if name not in installed or (name in PINNED and version.split("+")[0] != pins[name]):
            wrong.append(f"{name}=={pins[name]} (found: {version})")
    return wrong


def find_python() -> str:
    """A Python 3.10 that runs and can make environments.

    Raises:
        HostPinsError: there is none; it tells where it looked.
    """
    looked = []
    for candidate in _candidates():
        if candidate not in looked:
            looked.append(candidate)
            if _runs(candidate):
                return candidate
    raise HostPinsError(
        f"no Python 3.10 with venv and ensurepip (looked at: {', '.join(looked)}). Install one (`pyenv install 3.10`, "
        "`uv python install 3.10`, or your distribution's python3.10 and python3.10-venv), or name one: "
        "HOST_PYTHON=/path/to/python3.10"
    )


def _candidates() -> Iterator[str]:
    if named := os.environ.get("HOST_PYTHON"):
        yield named
        return  # what was asked for, or an error
    yield "python3.10"
    root = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
    yield from sorted(glob.glob(f"{root}/versions/3.10*/bin/python3.10"), reverse=True)
    if uv := shutil.which("uv"):
        done = subprocess.run([uv, "python", "find", "3.10"], capture_output=True, text=True)
        if done.returncode == 0:
            yield done.stdout.strip()


def _runs(python: str) -> bool:
    """Whether it starts and is a 3.10: pyenv's stand-in on the PATH may be there without one."""
    code = f"import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != {VERSION})"
    try:
        return subprocess.run([python, "-c", code], capture_output=True).returncode == 0
    except OSError:
        return False


def installed_in(python: str | Path) -> dict[str, str]:
    """Package (normalised name) -> version, of an interpreter's environment.

    Raises:
        HostPinsError: it does not run.
    """
    code = (
        "import importlib.metadata as m, json; "
        "print(json.dumps([[d.metadata['Name'], d.version] for d in m.distributions()]))"
    )
    try:
        done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise HostPinsError(f"{python} does not run: {error}") from error
    return {normalise(name): version for name, version in json.loads(done.stdout)}


def build(folder: Path) -> None:
    """Makes the environment in `folder`, over what an earlier attempt left there; the stamp comes last.

    Raises:
        HostPinsError: no Python 3.10, or pip failed.
    """
    python = find_python()
    start = time.monotonic()
    _say(f"building {folder} with {python}: openvla-oft's versions, up to 2.5 GB to download, once a machine")
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    pip = [
        str(folder / "bin/python"),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--progress-bar",
        "off",
        "-q",
    ]
    for command in ([python, "-m", "venv", str(folder)], [*pip, "-c", str(PINS), *PINNED, *OTHERS]):
        if subprocess.run(command, stdout=sys.stderr).returncode:
            raise HostPinsError(
                f"the environment could not be built (the reason is above); failed: {' '.join(command)}"
            )
    seconds = round(time.monotonic() - start)
    (folder / STAMP).write_text(json.dumps({"recipe": recipe(), "seconds": seconds}) + "\n")
    _say(f"built in {seconds} s")


def recipe() -> str:
    """Fingerprint of what the environment is built from: another one means another environment."""
    pins = read_pins(PINS)
    return hashlib.sha256(json.dumps([sorted(pins.items()), PINNED, OTHERS]).encode()).hexdigest()[:12]


def environment() -> Path:
    """The environment's folder, built if need be.

    Raises:
        HostPinsError: it cannot be built, or VLA_ENERGY_HOST_ENV is not an environment with the pinned versions.
    """
    if own := os.environ.get("VLA_ENERGY_HOST_ENV"):
        folder = Path(own).expanduser().absolute()
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        folder = cache / "vla-energy" / f"host-pins-{recipe()}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.parent / f"{folder.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two runs at once: the second waits and finds it built
            if not (folder / STAMP).is_file():
                build(folder)
    wrong = differing(read_pins(PINS), installed_in(folder / "bin/python"))
    if wrong:
        raise HostPinsError(f"{folder} has not the versions of {PINS.name}: {', '.join(wrong)}")
    return folder


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Prints the interpreter's path on stdout, everything else on stderr. Exit code 2 after an error of ours."""
    try:
        print(environment() / "bin" / "python")
    except (HostPinsError, OSError) as error:
        _say(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
