"""`scripts/host_pins.py` with stand-ins for Python and pip: what is built when, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import host_pins
from host_pins import HostPinsError

VERSIONS = {name: host_pins.read_pins(host_pins.PINS)[name] for name in (*host_pins.PINNED, *host_pins.OTHERS)}


def _script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def _interpreter(versions: dict[str, str], pip: int = 0) -> str:
    """An environment's python: `-m pip` ends with `pip`, anything else prints what is installed."""
    return f"""[ "$2" = pip ] && exit {pip}\necho '{json.dumps(list(versions.items()))}'"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A 3.10 that makes environments with the pinned versions; the file has a line for each that it made."""
    log = tmp_path / "log"
    inner = _script(tmp_path / "inner", _interpreter(VERSIONS))
    _script(
        tmp_path / "python3.10",
        f"""[ "$2" = venv ] || exit 0\necho made >>{log}\nmkdir -p "$3/bin" && cp {inner} "$3/bin/python" """,
    )
    monkeypatch.setenv("HOST_PYTHON", str(tmp_path / "python3.10"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("VLA_ENERGY_HOST_ENV", raising=False)
    return log


def test_built_once_and_again_when_the_pins_change(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = host_pins.environment()
    assert host_pins.environment() == folder and log.read_text() == "made\n"
    pins = tmp_path / "pins.txt"
    pins.write_text("# another comment\n" + host_pins.PINS.read_text(encoding="utf-8"))
    monkeypatch.setattr(host_pins, "PINS", pins)
    assert host_pins.environment() == folder and log.read_text() == "made\n"
    pins.write_text(pins.read_text() + "another==1.0\n")
    assert host_pins.environment() != folder and log.read_text() == "made\nmade\n"


def test_a_failed_attempt_leaves_no_stamp_and_is_repeated(log: Path, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.write_text(f"#!/bin/sh\n{_interpreter(VERSIONS, pip=1)}\n")
    with pytest.raises(HostPinsError, match=r"could not be built .* pip install .*torch"):
        host_pins.environment()
    inner.write_text(f"#!/bin/sh\n{_interpreter(VERSIONS)}\n")
    assert (host_pins.environment() / host_pins.STAMP).is_file() and log.read_text() == "made\nmade\n"


def test_no_python_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for broken in (tmp_path / "absent", _script(tmp_path / "pyenv's stand-in", "exit 127")):
        monkeypatch.setenv("HOST_PYTHON", str(broken))
        with pytest.raises(HostPinsError, match=f"no Python 3.10 .*{broken.name}.*HOST_PYTHON="):
            host_pins.find_python()


def test_an_environment_of_ones_own_is_checked_and_left_alone(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    monkeypatch.setenv("VLA_ENERGY_HOST_ENV", str(own))
    assert host_pins.main() == 2
    assert "does not run" in capsys.readouterr().err
    python = _script(own / "bin/python", _interpreter({**VERSIONS, "torch": "2.3.1", "numpy": "1.24.0"}))
    assert host_pins.main() == 2
    message = capsys.readouterr().err
    assert "torch==2.2.0 (found: 2.3.1)" in message and "numpy" not in message
    _script(python, _interpreter({**VERSIONS, "torch": "2.2.0+cpu"}))
    assert host_pins.main() == 0
    assert capsys.readouterr().out.strip() == str(python) and not log.exists()


def test_pins_are_exact(tmp_path: Path) -> None:
    (tmp_path / "pins.txt").write_text("torch==2.2.0  # exact\n\nnumpy<2\n")
    with pytest.raises(HostPinsError, match=r"pins.txt:3: expected name==version, found 'numpy<2'"):
        host_pins.read_pins(tmp_path / "pins.txt")
