"""One RLDS dataset: what it holds, its splits, and its episodes one by one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from vla_energy.data import tensorflow_quiet
from vla_energy.data.datasets import DatasetConfig, DatasetError, parse_key
from vla_energy.data.rlds_folder import FEATURES, INFO, Shard, check_features, check_shard, find_folder

SPLITS = ("train", "val")
_EPISODE = "episode_metadata/"
_SUCCESS = f"{_EPISODE}success"


class RldsSource:
    """One RLDS dataset and its configuration.

    Args:
        data_root_dir, name: see `find_folder`.
        config: names of its fields.
        val_fraction: share of the training episodes, the last ones, held out as `val` if the dataset has no `val`.

    Attributes:
        folder: the version folder.
        action_dim, motion_dim, proprio_dim: widths; `proprio_dim` is None if the dataset lacks a proprio key.
        has_success: whether the dataset says of each episode if it succeeded: a number `episode_metadata/success`.

    Raises:
        DatasetError: no such dataset, an unreadable one, or a missing key.
    """

    def __init__(self, data_root_dir: str | Path, name: str, config: DatasetConfig, val_fraction: float) -> None:
        if not 0.0 <= val_fraction < 1.0:
            raise DatasetError(f"val_fraction={val_fraction}: expected 0 <= val_fraction < 1")
        self.folder = find_folder(data_root_dir, name)
        self.config = config
        self._val_fraction = val_fraction
        check_features(self.folder)
        self._tf, self._tfds = tensorflow_quiet.tf(), tensorflow_quiet.tfds()
        try:
            self._info = self._tfds.builder_from_directory(str(self.folder)).info
        except Exception as error:  # tfds and protobuf raise what they like on a malformed folder
            raise DatasetError(f"{self.folder} is no readable tensorflow-datasets folder: {error}") from error
        if self._info.file_format.value != "tfrecord":
            raise DatasetError(f"{self.folder} is stored as {self._info.file_format.value}; only tfrecord is read")
        if "steps" not in self._info.features:
            raise DatasetError(f"{self.folder} is no RLDS dataset: its features have no 'steps'")
        self._paths = self._list_paths()
        success = self._paths.get(_SUCCESS)  # others may keep text there, or a value a step
        self.has_success = success is not None and success.shape == () and np.dtype(success.np_dtype).kind in "biuf"
        self.action_dim = self._width(config.action_key, "action_key")
        config.mask(self.action_dim)
        self.feature(config.language_key, "language_key")
        self.motion_dim = (
            0 if config.motion_key is None else self._width(f"observation/{config.motion_key}", "motion_key")
        )
        if self.motion_dim > self.action_dim:
            raise DatasetError(f"motion_key {config.motion_key!r} is wider than the actions ({self.action_dim})")
        self.proprio_dim = self._proprio_dim()

    # --- what the dataset holds ---

    def _list_paths(self) -> dict[str, Any]:
        """Features of a step by path; features of the episode by path with the prefix `episode_metadata/`."""

        def flatten(feature: Any, prefix: str) -> Iterator[tuple[str, Any]]:
            if not isinstance(feature, self._tfds.features.FeaturesDict):
                yield prefix.rstrip("/"), feature
                return
            for key in feature:
                yield from flatten(feature[key], f"{prefix}{key}/")

        features = self._info.features
        paths = dict(flatten(features["steps"].feature, ""))
        if _EPISODE.rstrip("/") in features:
            paths.update(flatten(features[_EPISODE.rstrip("/")], _EPISODE))
        return paths

    def feature(self, path: str, role: str) -> Any:
        """The tfds feature at `path`; `role` is the config field that named it.

        Raises:
            DatasetError: no such path; the message lists those there are.
        """
        if path not in self._paths:
            raise DatasetError(
                f"{self.folder.parent.name} has no key {path!r} ({role}); it has: {', '.join(sorted(self._paths))}"
            )
        return self._paths[path]

    def _width(self, key: str, role: str) -> int:
        path, part = parse_key(key)
        shape = self.feature(path, role).shape
        if len(shape) > 1 or None in shape:
            raise DatasetError(f"{role} {key!r} has shape {shape}; expected one value or a vector a step")
        width = len(range(*part.indices(shape[0] if shape else 1)))
        if not width:
            raise DatasetError(f"{role} {key!r} selects nothing of shape {shape}")
        return width

    def _proprio_dim(self) -> int | None:
        keys = [f"observation/{key}" for key in self.config.proprio_keys]
        if not keys or any(parse_key(key)[0] not in self._paths for key in keys):
            return None
        return sum(self._width(key, "proprio_keys") for key in keys)

    def require_proprio(self) -> None:
        """Raises DatasetError if the proprio keys are not configured or not in the dataset."""
        if not self.config.proprio_keys:
            raise DatasetError("use_proprio needs proprio_keys in the dataset's configuration")
        for key in self.config.proprio_keys:
            self._width(f"observation/{key}", "proprio_keys")

    # --- which files ---

    def shards(self, split: str) -> list[Shard]:
        """The files of a split, empty ones left out.

        Raises:
            DatasetError: unknown split, or no episode in it.
        """
        if split not in SPLITS:
            raise DatasetError(f"split={split!r}: expected {' or '.join(SPLITS)}")
        stored = self._info.splits
        name = split if split in stored else "train"
        if name not in stored:
            raise DatasetError(f"{self.folder} has no split 'train'; it has: {', '.join(stored) or 'none'}")
        lengths, files = stored[name].shard_lengths, self._files(name)
        start, stop = 0, sum(lengths)
        if "val" not in stored:
            held_out = max(1, round(self._val_fraction * stop)) if self._val_fraction else 0
            start, stop = (stop - held_out, stop) if split == "val" else (0, stop - held_out)
        shards, first = [], 0
        for path, records in zip(files, lengths, strict=True):
            low, high = max(start, first), min(stop, first + records)
            if low < high:
                shards.append(Shard(path, records, low - first, high - low, low))
            first += records
        if not shards:
            raise DatasetError(f"split {split!r} of {self.folder} is empty ({first} episodes stored as {name!r})")
        return shards

    def _files(self, split: str) -> list[str]:
        try:
            paths = [str(path) for path in self._info.splits[split].filepaths]
        except (ValueError, KeyError) as error:  # tfds' own, about the template of the names
            raise DatasetError(f"{self.folder / INFO}: the file names of split {split!r}: {error}") from error
        for path in paths:
            if os.path.dirname(os.path.abspath(path)) != os.path.abspath(self.folder):
                raise DatasetError(
                    f"{self.folder / INFO}: the file names of split {split!r} lead out of its folder: {path:.200}"
                )
        return paths

    def digest(self, split: str) -> str:
        """Hash of the dataset's description, its configuration and the episodes of `split`; equal for copies."""
        parts = [(self.folder / name).read_bytes() for name in (INFO, FEATURES)]
        parts += [repr(sorted(asdict(self.config).items())).encode()]
        parts += [repr([(Path(s.path).name, s.skip, s.take) for s in self.shards(split)]).encode()]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]

    # --- reading ---

    def episodes(
        self, shards: list[Shard], image_keys: tuple[str, ...] = (), order: Any = None, threads: int = 1
    ) -> Any:
        """A `tf.data.Dataset` of episodes, images not decoded.

        Args:
            shards: from `shards`.
            image_keys: in `observation`.
            order: tensor of indices into `shards`; as they are if None.
            threads: so many episodes are parsed at once, and with several the next shard is opened ahead; the order is
                the same.

        Returns:
            Elements `{"episode": (), "action": (T,A), "motion": (T,M), "proprio": (T,P), "language": (T,),
            "images": tuple of (T,)}` and, if `has_success`, `"success": ()`; encoded images are strings. M and P may
            be 0.
        """
        tf = self._tf
        paths = tf.constant([shard.path for shard in shards])
        ranges = tf.constant([(shard.skip, shard.take, shard.first) for shard in shards], tf.int64)
        subset = self._subset(image_keys)

        def read(index: Any) -> Any:
            skip, take, first = tf.unstack(ranges[index])
            records = tf.data.TFRecordDataset(paths[index]).skip(skip)
            # The range ends the pair: TensorFlow 2.21 crashes on take() of a tensor within flat_map().
            return tf.data.Dataset.zip((tf.data.Dataset.range(first, first + take), records))

        def parse(episode: Any, record: Any) -> dict[str, Any]:
            skip_decoding = {"steps": self._tfds.decode.SkipDecoding()}
            example = subset.deserialize_example(record, decoders=skip_decoding)
            return self._arrange(example, image_keys, episode)

        order = tf.range(len(shards)) if order is None else order
        # AutoGraph has nothing to convert here, and when it stumbles it prints the whole environment.
        plain = tf.autograph.experimental.do_not_convert
        indices = tf.data.Dataset.from_tensor_slices(order)
        if threads == 1:
            return indices.flat_map(plain(read)).map(plain(parse))
        records = indices.interleave(plain(read), cycle_length=1, num_parallel_calls=1, deterministic=True)
        return records.map(plain(parse), num_parallel_calls=threads, deterministic=True)

    def _subset(self, image_keys: tuple[str, ...]) -> Any:
        """The dataset's features reduced to those that are read."""
        config = self.config
        observed = [*image_keys, *([] if config.motion_key is None else [config.motion_key])]
        observed += config.proprio_keys if self.proprio_dim else ()
        paths = {config.action_key, config.language_key, *(f"observation/{parse_key(key)[0]}" for key in observed)}
        paths |= {_SUCCESS} if self.has_success else set()
        tree: dict[str, Any] = {"steps": {}}
        for path in paths:
            *parents, leaf = (path if path.startswith(_EPISODE) else f"steps/{path}").split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = self._paths[path]
        features = self._tfds.features
        return features.FeaturesDict({**tree, "steps": features.Dataset(tree["steps"])})

    def _arrange(self, example: dict[str, Any], image_keys: tuple[str, ...], episode: Any) -> dict[str, Any]:
        tf = self._tf
        config = self.config

        def get(path: str) -> Any:
            node = example if path.startswith(_EPISODE) else example["steps"]
            for part in path.split("/"):
                node = node[part]
            return node

        def vectors(keys: tuple[str, ...]) -> Any:
            parts = []
            for path, part in map(parse_key, keys):
                value = tf.cast(get(path), tf.float32)
                parts.append((value if len(value.shape) == 2 else value[:, None])[:, part])
            return tf.concat(parts, 1) if parts else tf.zeros([length, 0])

        length = tf.shape(get(config.action_key))[0]
        language = get(config.language_key)
        proprio_keys = config.proprio_keys if self.proprio_dim else ()
        return {
            "episode": episode,
            "action": vectors((config.action_key,)),
            "motion": vectors(() if config.motion_key is None else (f"observation/{config.motion_key}",)),
            "proprio": vectors(tuple(f"observation/{key}" for key in proprio_keys)),
            "language": language if len(language.shape) else tf.repeat(language, length),
            "images": tuple(get(f"observation/{key}") for key in image_keys),
            **({"success": tf.cast(get(_SUCCESS), tf.bool)} if self.has_success else {}),
        }

    @contextmanager
    def reading(self, shards: list[Shard]) -> Iterator[None]:
        """Turns TensorFlow's read errors into DatasetErrors that name the shard."""
        read_error, data_loss = self._tf.errors.OpError, self._tf.errors.DataLossError
        try:
            yield
        except read_error as error:
            for shard in shards if isinstance(error, data_loss) else ():
                _read_through(shard)
            raise DatasetError(f"cannot read {self.folder}: {error.message}") from error


def _read_through(shard: Shard) -> None:
    """Raises DatasetError if a record of the file fails its checksum."""
    check_shard(shard)
    tf = tensorflow_quiet.tf()
    position = 0
    try:
        for _ in tf.data.TFRecordDataset(shard.path):
            position += 1
    except tf.errors.OpError as error:
        raise DatasetError(
            f"the shard {shard.path} is corrupt at record {position} of {shard.records} ({error.message}); "
            "copy it again"
        ) from error
