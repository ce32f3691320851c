"""Which checkpoint is it? Told by its files, so that results of one are not taken for those of another."""

from __future__ import annotations

import hashlib
from pathlib import Path

_SETTINGS = ("config.json", "dataset_statistics.json", "tokenizer.json")
_WEIGHTS = (".safetensors", ".pt", ".bin")
_TO_RESUME = ("training_state", "energy_state")
_PIECE, _PIECES = 1 << 20, 64


def fingerprint(folder: str | Path) -> str:
    """16 hex digits of a checkpoint's policy, head and memory; the gates, which are set afterwards, do not count.

    Of each file its name, its size and 64 pieces of 1 MiB, spread evenly, are read: all of a head and most memories,
    and enough of 14 GB of weights to tell that they were trained. What only a resumed training needs does not count.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        weights = path.suffix in _WEIGHTS and not path.name.startswith(_TO_RESUME)
        if not weights and path.name not in _SETTINGS:
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for index in range(_PIECES):
                # Up to 64 MiB the pieces are next to each other: the whole file.
                file.seek(max(index * _PIECE, (size - _PIECE) * index // (_PIECES - 1)))
                digest.update(file.read(_PIECE))
    return digest.hexdigest()[:16]
