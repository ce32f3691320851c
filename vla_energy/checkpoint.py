"""Files that survive: atomic writes, and the energy head as one safetensors file that proves itself on loading.

The head's file carries its config, dimensions, dataset statistics and step in the header, and a SHA-256 over these and
the weights. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vla_energy.actions import DatasetStatistics
from vla_energy.config import EnergyConfig
from vla_energy.head import EnergyHead
from vla_energy.results import require_replaceable

_FORMAT = "vla_energy.head"
_VERSION = "1"
_PREFIX = "energy_head--"
_KEYS = (
    "format", "version", "config", "context_dim", "action_dim", "horizon", "statistics", "step", "extra", "sha256",
)  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint is missing, ambiguous, damaged, not ours, or could not be written; the message names the file."""


@dataclass(frozen=True)
class LoadedHead:
    """What `load_head` read.

    Attributes:
        head: on the CPU, in training mode as built.
        config: the head's.
        statistics: those the head was trained with; None if it was saved without.
        step: optimiser steps taken.
        extra: the caller's own metadata.
    """

    head: EnergyHead
    config: EnergyConfig
    statistics: DatasetStatistics | None
    step: int
    extra: dict[str, Any]


def atomic_write(path: str | Path, write_fn: Callable[[BinaryIO], Any]) -> Path:
    """Writes a file whole or not at all: `path` holds the old content or the new one, whenever the process dies.

    Args:
        path: its folder is made if missing.
        write_fn: writes the content to an open binary file.

    Raises:
        CheckpointError: the system refused (disk full, no permission), or `path` is a device file or a pipe; what was
            there is untouched.
    """
    path = Path(path)
    # Hosts find components by a substring of the file name: a temporary that outlives a kill must not carry the name.
    temporary = path.parent / f".partial-{secrets.token_hex(8)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        require_replaceable(path)
        with open(temporary, "xb") as file:
            write_fn(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path} was not written ({error}); what was there before is intact") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    sync_folder(path.parent)
    return path


def run_hint(folder: str | Path) -> str:
    """What to say behind an error about a folder that is no checkpoint's: the run's checkpoint, if it is a run's."""
    folder = Path(folder)
    is_run = not (folder / "config.json").exists() and (folder / "latest" / "config.json").is_file()
    return f"; it is a run's folder: name its checkpoint {folder / 'latest'}" if is_run else ""


def find_one(folder: str | Path, substring: str) -> Path:
    """The only file in `folder` whose name contains `substring`.

    Raises:
        CheckpointError: the folder is missing, or no file or several match; the message lists them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    matches = sorted(entry for entry in folder.iterdir() if substring in entry.name and entry.is_file())
    if len(matches) == 1:
        return matches[0]
    if not matches:
        raise CheckpointError(f"{folder}: no file with {substring!r} in its name")
    names = ", ".join(match.name for match in matches)
    raise CheckpointError(f"{folder}: {len(matches)} files with {substring!r} in their names, expected one: {names}")


def save_head(
    path_or_folder: str | Path,
    head: EnergyHead,
    step: int,
    statistics: DatasetStatistics | None,
    extra_metadata: dict[str, Any] | None = None,
) -> Path:
    """Writes `energy_head--{step}_checkpoint.safetensors` into a folder, or the file if the path ends so.

    Args:
        head: without its distributed wrapper.
        step: optimiser steps taken.
        statistics: the dataset's, with which a user can check that the head fits a policy.
        extra_metadata: JSON types.

    Raises:
        CheckpointError: a weight is not finite, or the file cannot be written; an older file stays as it was.
    """
    path = Path(path_or_folder)
    path = path if path.suffix == ".safetensors" else path / f"{_PREFIX}{step}_checkpoint.safetensors"
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in head.state_dict().items()}
    _require_finite(path, tensors)
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "config": json.dumps(head.config.to_dict()),
        "context_dim": str(head.context_dim),
        "action_dim": str(head.action_dim),
        "horizon": str(head.horizon),
        "statistics": json.dumps(None if statistics is None else statistics.to_dict()),
        "step": str(step),
        "extra": json.dumps(extra_metadata or {}),
    }
    data = to_bytes(tensors, {**metadata, "sha256": digest(tensors, metadata)})
    return atomic_write(path, lambda file: file.write(data))


def to_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file whose bytes depend on the content alone: safetensors writes metadata in any order."""
    data = save(tensors, metadata)
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # as safetensors aligns the numbers
    return struct.pack("<Q", len(text)) + text + data[start:]


def load_head(path: str | Path) -> LoadedHead:
    """Reads a head written by `save_head`; leaves the random state as it was.

    Args:
        path: the file, or a folder with exactly one `energy_head--*` in it.

    Raises:
        CheckpointError: missing, ambiguous, truncated, changed, not a head's file, or of other shapes.
    """
    path = Path(path)
    path = find_one(path, _PREFIX) if path.is_dir() else path
    tensors, metadata = _read(path)
    _check_metadata(path, tensors, metadata)
    try:
        config = EnergyConfig.from_dict(json.loads(metadata["config"]))
        context_dim, action_dim, horizon, step = (
            int(metadata[key]) for key in ("context_dim", "action_dim", "horizon", "step")
        )
        entry = json.loads(metadata["statistics"])
        statistics = None if entry is None else DatasetStatistics.from_dict(entry)
        extra = json.loads(metadata["extra"])
        if config.head.num_layers > len(tensors):
            raise ValueError(f"head.num_layers={config.head.num_layers} with {len(tensors)} tensors")
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: bad metadata ({error})") from error
    head = _build(path, tensors, lambda: EnergyHead(context_dim, action_dim, horizon, config))
    return LoadedHead(head, config, statistics, step, extra)


def _build(path: Path, tensors: dict[str, Tensor], make: Callable[[], EnergyHead]) -> EnergyHead:
    _require_finite(path, tensors)
    try:
        # First without memory: absurd dimensions in a header must not allocate.
        with torch.random.fork_rng(devices=[]):
            with torch.device("meta"):
                expected = {name: value.shape for name, value in make().state_dict().items()}
            found = {name: value.shape for name, value in tensors.items()}
            if expected != found:
                odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
                raise CheckpointError(f"{path}: weights do not fit the config stored with them: {', '.join(odd[:5])}")
            head = make()
        head.load_state_dict(tensors)
    except (RuntimeError, ValueError, TypeError, OverflowError, MemoryError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: weights do not fit the config stored with them ({error})") from error
    return head


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise CheckpointError(f"{path} not found")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{path} is truncated, damaged or no safetensors file ({error})") from error


def _check_metadata(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is not an energy head: format {metadata.get('format')!r}, expected {_FORMAT!r}")
    if metadata.get("version") != _VERSION:
        raise CheckpointError(f"{path}: format version {metadata.get('version')!r}, this program reads {_VERSION!r}")
    missing = [key for key in _KEYS if key not in metadata]
    if missing:
        raise CheckpointError(f"{path}: metadata lacks {', '.join(missing)}")
    if metadata["sha256"] != digest(tensors, metadata):
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum; take an older checkpoint")


def digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 over metadata (without itself) and over every tensor's name, dtype, shape and bytes."""
    rest = {key: value for key, value in metadata.items() if key != "sha256"}
    found = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _require_finite(path: Path, tensors: dict[str, Tensor]) -> None:
    bad = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise CheckpointError(f"{path}: weights are not finite: {', '.join(bad[:5])}")


def sync_folder(folder: Path) -> None:
    """Makes the rename itself durable; only POSIX lets a folder be opened."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems refuse this; the file is whole all the same, which is what we promise.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
