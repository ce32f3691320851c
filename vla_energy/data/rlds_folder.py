"""RLDS folders as tensorflow-datasets writes them: finding one, and checking that its files are whole."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_energy.data.datasets import DatasetError
from vla_energy.results import require_regular

INFO, FEATURES = "dataset_info.json", "features.json"

# Keys of features.json whose text tensorflow-datasets imports as a class: of today's form, in either spelling that
# protobuf reads, and of the older form; then those whose text it reads as JSON once more.
_CLASS, _NESTED = ("pythonClassName", "python_class_name", "type"), ("json", "content")
_ITS_OWN = re.compile(r"tensorflow_datasets\.core\.features(\.[A-Za-z_][A-Za-z_0-9]*)+")


@dataclass(frozen=True)
class Shard:
    """A part of one tfrecord file.

    Attributes:
        path: the file.
        records: episodes in the whole file.
        skip, take: the episodes of the part.
        first: index within the stored split of the first episode taken.
    """

    path: str
    records: int
    skip: int
    take: int
    first: int


def find_folder(data_root_dir: str | Path, name: str) -> Path:
    """The folder with `dataset_info.json`: `root/name/<highest version>`, or `root/name` itself.

    Raises:
        DatasetError: there is none; the message lists the datasets there are.
    """
    root = Path(data_root_dir)
    if not root.is_dir():
        raise DatasetError(f"the data root {root} does not exist or is no folder")
    folder = root / name
    if not folder.is_dir():
        others = sorted(other.name for other in root.iterdir() if other.is_dir() and _versions(other))
        raise DatasetError(f"no dataset {name!r} in {root}; there are: {', '.join(others) or 'none'}")
    versions = _versions(folder)
    if not versions:
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        raise DatasetError(
            f"{folder} holds no version with {INFO} and {FEATURES} (found: {found}); expected {folder}/1.0.0, as "
            "tensorflow-datasets writes it when a build is complete"
        )
    return versions[-1]


def _versions(folder: Path) -> list[Path]:
    """Complete version folders in ascending order; the folder itself if it is one."""
    candidates = [folder, *(entry for entry in folder.iterdir() if entry.is_dir() and "incomplete" not in entry.name)]
    complete = [entry for entry in candidates if (entry / INFO).is_file() and (entry / FEATURES).is_file()]
    return sorted(complete, key=lambda entry: [int(part) if part.isdigit() else -1 for part in entry.name.split(".")])


def check_features(folder: Path) -> None:
    """Proves that tensorflow-datasets, which imports the classes that the file names, will run no code but its own.

    `dataset_info.json` names a module, too: the one that wrote the dataset, which is not imported.

    Raises:
        DatasetError: a class of another package, or a damaged file.
    """
    path = folder / FEATURES
    try:
        for name in _classes(json.loads(path.read_text(encoding="utf-8"))):
            if not _ITS_OWN.fullmatch(name):
                raise DatasetError(
                    f"{path} names the class {name!r:.200}: it would be imported, and its code be run; only "
                    "tensorflow-datasets' own features (tensorflow_datasets.core.features) are read"
                )
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{path} is damaged: {error}") from error


def _classes(node: Any) -> Iterator[str]:
    """The classes' names in features.json, at any depth."""
    if isinstance(node, list):
        for item in node:
            yield from _classes(item)
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if isinstance(value, str):
            if key in _CLASS:
                yield value
            elif key in _NESTED:
                yield from _classes(json.loads(value))
        else:  # features may have these names, too
            yield from _classes(value)


def check_shard(shard: Shard) -> None:
    """Walks the record lengths of a tfrecord file; reads 12 bytes a record, not the data.

    A record is: uint64 length, uint32 CRC, data, uint32 CRC (TensorFlow, `record_writer.h`).

    Raises:
        DatasetError: the file is missing, cut off, or holds another number of records than `dataset_info.json` says.
    """
    try:
        require_regular(Path(shard.path))
        size = Path(shard.path).stat().st_size
        records = end = 0
        with open(shard.path, "rb") as file:
            while end < size:
                header = file.read(12)
                if len(header) < 12:
                    break
                following = end + 16 + struct.unpack("<Q", header[:8])[0]
                if following > size:
                    break
                records, end = records + 1, following
                file.seek(end)
    except OSError as error:
        raise DatasetError(f"cannot read the shard {shard.path} ({error.strerror or error}); copy it again") from error
    if end != size or records != shard.records:
        raise DatasetError(
            f"the shard {shard.path} is truncated or corrupt: {records} whole records in {size} bytes, expected "
            f"{shard.records}; copy it again"
        )
