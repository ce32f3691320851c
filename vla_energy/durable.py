"""Folders that survive a kill and prove themselves: fsync, a manifest with checksums, `.pt` files read with care."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vla_energy.checkpoint import CheckpointError, atomic_write, sync_folder
from vla_energy.results import require_regular

MANIFEST = "manifest.json"
"""File in a checkpoint's folder: size and SHA-256 of every file that was saved with it, and the step."""

_PIECE = 1 << 20
_RECORDS = 100_000  # files in a .pt archive, far above any state's


def seal(folder: Path, step: int) -> None:
    """Writes the manifest of all files in `folder` and makes everything in it durable.

    Raises:
        OSError, CheckpointError: something cannot be read or written.
    """
    files = {path.relative_to(folder).as_posix(): _facts(path) for path in _files(folder)}
    text = json.dumps({"version": 1, "step": step, "files": files}, indent=1)
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for inner in (path for path in folder.rglob("*") if path.is_dir()):
        sync_folder(inner)
    atomic_write(folder / MANIFEST, lambda file: file.write(text.encode() + b"\n"))  # which syncs the folder itself


def check_seal(folder: Path, only: Callable[[str], bool] = lambda name: True) -> int | None:
    """The step in the manifest, after comparing every file with it; None without one, as folders had before.

    Files that came later (gates, a memory) are not in it and do not count.

    Args:
        only: whether a file is looked at, by its name in the manifest.

    Raises:
        CheckpointError: the manifest is damaged, or a file is missing, cut short or changed; the message names it.
    """
    path = folder / MANIFEST
    try:
        require_regular(path)
        text = path.read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from error
    for name, facts in _read(path, text)["files"].items():
        file = folder / name
        if not only(name):
            continue
        if not is_file(file):
            raise CheckpointError(f"{file} is missing: the checkpoint is not whole")
        if file.stat().st_size != facts["bytes"]:
            raise CheckpointError(
                f"{file} is damaged: it has {file.stat().st_size} bytes, {facts['bytes']} were written"
            )
        if _digest(file) != facts["sha256"]:
            raise CheckpointError(f"{file} is damaged: its content does not match the checksum in {MANIFEST}")
    return int(_read(path, text)["step"])


def is_sealed_with(folder: Path, name: str) -> bool:
    """Whether the folder's manifest lists the file, there or not; False without a manifest that can be read."""
    try:
        require_regular(folder / MANIFEST)
        return name in _read(folder / MANIFEST, (folder / MANIFEST).read_text())["files"]
    except (OSError, UnicodeDecodeError, CheckpointError):
        return False


def _read(path: Path, text: str) -> dict[str, Any]:
    """The manifest's content with its types checked; names that lead out of the folder are refused."""
    try:
        data = json.loads(text)
        if data["version"] != 1:
            raise ValueError(f"version {data['version']!r}, this program reads 1")
        if type(data["step"]) is not int or not isinstance(data["files"], dict):
            raise ValueError("step is no integer, or files is no object")
        for name, facts in data["files"].items():
            parts = Path(name).parts
            if Path(name).is_absolute() or ".." in parts or not parts or "\0" in name or name == MANIFEST:
                raise ValueError(f"the name {name!r} is not one of a file in this folder")
            if type(facts["bytes"]) is not int or type(facts["sha256"]) is not str:
                raise ValueError(f"{name}: bytes or sha256 has a wrong type")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    return data


def read_torch(path: Path) -> Any:
    """A `.pt` file that PyTorch wrote: tensors and plain values, on the CPU. Nothing is unpickled beyond these.

    Raises:
        CheckpointError: missing, damaged, compressed (which our files are not: it would unpack to any size), tensors
            larger than the file, or objects other than tensors and plain values.
    """
    try:
        require_regular(path)
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if packed or len(entries) > _RECORDS or sum(entry.file_size for entry in entries) > size:
            raise ValueError("it is compressed or says that it is larger than it is")
        data = torch.load(path, map_location="cpu", weights_only=True)
        _check_tensors(data)
    except Exception as error:  # torch and zipfile raise a dozen types for damaged files
        raise CheckpointError(f"{path} is damaged or holds more than weights ({error})") from error
    return data


def _check_tensors(value: Any) -> None:
    """Raises ValueError where a tensor claims more elements than are stored: strides of 0 cost nothing in a file."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"a tensor of shape {tuple(value.shape)} is not stored whole")
    elif isinstance(value, dict):
        for item in value.values():
            _check_tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_tensors(item)


def is_file(path: Path) -> bool:
    """As `Path.is_file`, and False for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with characters that no file system has
        return False


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
