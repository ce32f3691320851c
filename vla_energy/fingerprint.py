"""Which checkpoint is it? Told by its files, so that results of one are not taken for those of another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from vla_energy.results import require_regular

_SETTINGS = ("config.json", "dataset_statistics.json", "tokenizer.json")
_WEIGHTS = (".safetensors", ".pt", ".bin")
_TO_RESUME = ("training_state", "energy_state")
_OURS = ("energy_head--", "chunk_memory--")
_PIECE, _PIECES = 1 << 20, 64


def fingerprint(folder: str | Path, *, policy_only: bool = False) -> str:
    """16 hex digits of a checkpoint's policy, head and memory; the gates, which are set afterwards, do not count.

    Of each file its name, its size and 64 pieces of 1 MiB, spread evenly, are read: all of a head and most memories,
    and enough of 14 GB of weights to tell that they were trained. What only a resumed training needs does not count.

    Args:
        folder: of the checkpoint.
        policy_only: leave out head and memory, as for features that the policy alone makes.

    Raises:
        OSError: a file cannot be read, or is a folder, a pipe or a device; the message names it.
    """
    skipped = (*_TO_RESUME, *(_OURS if policy_only else ()))
    return fingerprint_files(
        path
        for path in sorted(Path(folder).iterdir())
        if path.name in _SETTINGS or (path.suffix in _WEIGHTS and not path.name.startswith(skipped))
    )


def fingerprint_files(paths: Iterable[Path], more: str = "") -> str:
    """16 hex digits of files, in this order, by name, size and pieces as `fingerprint` says, and of a text.

    Raises:
        OSError: a file cannot be read, or is a folder, a pipe or a device; the message names it.
    """
    digest = hashlib.sha256(more.encode())
    for path in paths:
        require_regular(path)
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for index in range(_PIECES):
                # Up to 64 MiB the pieces are next to each other: the whole file.
                file.seek(max(index * _PIECE, (size - _PIECE) * index // (_PIECES - 1)))
                digest.update(file.read(_PIECE))
    return digest.hexdigest()[:16]
