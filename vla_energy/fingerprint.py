"""Which checkpoint is it? Told by its files, so that results of one are not taken for those of another."""

from __future__ import annotations

import hashlib
from pathlib import Path

_WHOLE = ("config.json", "dataset_statistics.json")
_WEIGHTS = (".safetensors", ".pt", ".bin")
_EDGE = 1 << 16


def fingerprint(folder: str | Path) -> str:
    """16 hex digits of a checkpoint's policy, head and memory; the gates, which are set afterwards, do not count.

    Of each file of weights its name, its size, its first and its last 64 KiB are read: any training changes them, and
    14 GB need not be read. A file that is neither weights, configuration nor statistics does not count.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.name not in _WHOLE and path.suffix not in _WEIGHTS:
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(_EDGE))
            file.seek(max(0, size - _EDGE))
            digest.update(file.read(_EDGE))
    return digest.hexdigest()[:16]
