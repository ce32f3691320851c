"""Statistics of a split's actions and proprio, computed once and kept beside the data in the host's JSON layout."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import warnings
from pathlib import Path

import numpy as np

from vla_energy.actions import DatasetStatistics, FieldStatistics, StatisticsError
from vla_energy.data.datasets import DatasetError, standardize
from vla_energy.data.rlds_source import RldsSource

_log = logging.getLogger(__name__)
_LARGEST = 1e15  # its square is still a number in fp32


def split_statistics(source: RldsSource, split: str) -> DatasetStatistics:
    """Statistics of the frames of `split` that are read; from the cache if there.

    The cache is `dataset_statistics_<hash>.json` (`dataset_statistics_val_<hash>.json`) in the dataset's folder, or
    in `~/.cache/vla_energy` if that is read-only; the hash covers the dataset's description, its configuration,
    the episodes of the split, and size and time of its files: what was changed is computed and checked anew. A broken
    cache file is, too, with a warning.

    Raises:
        DatasetError: no labelled frame in the split, values that are not finite or above 1e15, an instruction that is
            not UTF-8, or a broken shard.
    """
    prefix = "dataset_statistics_" if split == "train" else f"dataset_statistics_{split}_"
    name = f"{prefix}{_key(source, split)}.json"
    folders = (source.folder, Path.home() / ".cache" / "vla_energy")
    for folder in folders:
        path = folder / name
        if path.is_file():
            try:
                return DatasetStatistics.from_dict(json.loads(path.read_text()), str(path))
            except (OSError, ValueError, RecursionError, StatisticsError) as error:
                warnings.warn(f"the statistics cache {path} is broken and is computed anew: {error}", stacklevel=2)
    statistics = compute_statistics(source, split)
    _save(statistics, [folder / name for folder in folders])
    return statistics


def compute_statistics(source: RldsSource, split: str) -> DatasetStatistics:
    """One pass over the split without decoding images; actions as `standardize` gives them.

    Raises:
        DatasetError: see `split_statistics`.
    """
    _log.info("computing statistics of %s (%s); this happens once", source.folder, split)
    shards = source.shards(split)
    actions, proprios = [], []
    with source.reading(shards):
        for episode in source.episodes(shards).as_numpy_iterator():
            action, kept = standardize(source.config, episode["action"], episode["motion"])
            proprio = episode["proprio"][kept]
            if not len(action) or not any(episode["language"][kept]):
                continue
            _check_values(source, split, episode["episode"], action, proprio)
            for text in set(episode["language"][kept]):
                instruction(text, source, split, episode["episode"])
            actions.append(action)
            proprios.append(proprio)
    if not actions:
        raise DatasetError(
            f"split {split!r} of {source.folder} has no usable frame: every episode is empty or without an instruction "
            f"(language_key {source.config.language_key!r})"
        )
    all_actions = np.concatenate(actions)
    return DatasetStatistics(
        FieldStatistics.of(all_actions, source.config.mask(source.action_dim)),
        FieldStatistics.of(np.concatenate(proprios)) if source.proprio_dim else None,
        len(all_actions),
        len(actions),
    )


def instruction(text: bytes, source: RldsSource, split: str, episode: int) -> str:
    """The text of a stored instruction.

    Raises:
        DatasetError: it is not UTF-8.
    """
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{source.folder}: episode {episode} of {split!r} has an instruction that is not UTF-8 ({text!r:.60}); "
            "correct it, or remove the episode from the dataset"
        ) from error


def _check_values(source: RldsSource, split: str, episode: int, action: np.ndarray, proprio: np.ndarray) -> None:
    """Raises DatasetError for values that training cannot use."""
    for name, values in (("actions", action), ("proprio", proprio)):
        if np.isfinite(values).all() and (np.abs(values) <= _LARGEST).all():
            continue
        fault = f"above {_LARGEST:g}" if np.isfinite(values).all() else "not finite"
        raise DatasetError(
            f"{source.folder}: episode {episode} of {split!r} has {name} that are {fault}; remove it from the dataset"
        )


def _key(source: RldsSource, split: str) -> str:
    """Hash of the dataset as it lies here: its digest, which copies share, and size and time of each shard.

    Raises:
        DatasetError: a shard is missing.
    """
    files = []
    for shard in source.shards(split):
        try:
            status = os.stat(shard.path)
        except OSError as error:
            raise DatasetError(
                f"cannot read the shard {shard.path} ({error.strerror or error}); copy it again"
            ) from error
        files.append((status.st_size, status.st_mtime_ns))
    return hashlib.sha256(f"{source.digest(split)} {files}".encode()).hexdigest()[:32]


def _save(statistics: DatasetStatistics, paths: list[Path]) -> None:
    """Writes to the first path that can be written, whole or not at all."""
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}_", suffix=".tmp")
        except OSError:
            continue
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(statistics.to_dict(), file)
            os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the cache from the dataset's other users
            os.replace(temporary, path)
            return
        except OSError:
            Path(temporary).unlink(missing_ok=True)
    warnings.warn(
        f"could not keep the dataset's statistics in {' or '.join(str(path) for path in paths)}", stacklevel=3
    )
