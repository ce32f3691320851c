"""RLDS datasets as batches of frames with normalised action chunks.

TensorFlow is imported when a dataset is opened, never on import. Images stay encoded through the shuffle
buffer and are decoded after it; skipping batches, as a resumed training does, decodes nothing.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla_energy.actions import DatasetStatistics, FieldStatistics
from vla_energy.data import tensorflow_quiet
from vla_energy.data.augment import augment
from vla_energy.data.datasets import DatasetConfig, DatasetError, dataset_config, standardize
from vla_energy.data.rlds_folder import check_shard
from vla_energy.data.rlds_source import RldsSource
from vla_energy.data.statistics import instruction, split_statistics

Batch = dict[str, Any]
_FOREVER = 2**62  # epochs
_SEED_STRIDE = 1_000_003  # keeps epochs of neighbouring seeds apart


class RldsDataset:
    """One split of an RLDS dataset. Every frame of every episode with an instruction is a sample.

    Args:
        data_root_dir, dataset_name: the dataset is in `data_root_dir/dataset_name/<version>` (the highest one), or
            directly in `data_root_dir/dataset_name`.
        split: `train` or `val`. A dataset without `val` gives up its last training episodes for it.
        horizon: H, actions a chunk; beyond the episode's end the last action is repeated.
        num_images: 1 main camera; 2 main camera and wrist.
        use_proprio: give proprioception.
        config: names of its fields; by default `dataset_config(dataset_name)`.
        statistics: to normalise with, e.g. a checkpoint's; by default those of the training split.
        image_size: `(h, w)` to resize to; None keeps the stored size.
        image_aug: augment images, see `vla_energy.data.augment`.
        shuffle_buffer_size: frames; 0 or 1 reads in stored order.
        seed: of shuffling and augmentation.
        val_fraction: share of training episodes held out where there is no `val`, at least one; 0 for none.
        num_threads: threads that TensorFlow may use for reading and decoding; the batches are the same.
        outcomes: give each frame its episode's success and the steps that remain of it, where the dataset knows.

    Attributes:
        statistics: what actions and proprio are normalised with.
        num_frames, num_episodes: of this split, after leaving out what has no instruction.
        action_dim: A.
        proprio_dim: P; 0 if the dataset has no proprio.

    Raises:
        DatasetError: anything missing, broken or inconsistent; the message names it and the fix.
        DataDependencyError: tensorflow-datasets is not installed.
    """

    def __init__(
        self,
        data_root_dir: str | Path,
        dataset_name: str,
        split: str = "train",
        horizon: int = 8,
        *,
        num_images: int = 1,
        use_proprio: bool = False,
        config: DatasetConfig | None = None,
        statistics: DatasetStatistics | None = None,
        image_size: tuple[int, int] | None = None,
        image_aug: bool = False,
        shuffle_buffer_size: int = 100_000,
        seed: int = 0,
        val_fraction: float = 0.05,
        num_threads: int = 1,
        outcomes: bool = False,
    ) -> None:
        self._tf = tensorflow_quiet.tf()
        self._plain = self._tf.autograph.experimental.do_not_convert  # for why, see RldsSource.episodes
        for name, value in (("horizon", horizon), ("num_threads", num_threads)):
            if not isinstance(value, int) or value < 1:
                raise DatasetError(f"{name}={value!r}: expected an integer >= 1")
        if image_size is not None and (len(image_size) != 2 or min(image_size) < 1):
            raise DatasetError(f"image_size={image_size}: expected (height, width)")
        config = dataset_config(dataset_name) if config is None else config
        self._source = RldsSource(data_root_dir, dataset_name, config, val_fraction)
        if use_proprio:
            self._source.require_proprio()
        self._outcomes = outcomes and self._source.has_success
        self._image_keys = _select_images(config, num_images)
        self._image_size = self._check_images(image_size)
        self._split, self._shards = split, self._source.shards(split)
        for shard in self._shards:
            check_shard(shard)
        own = split_statistics(self._source, split)
        self.num_frames, self.num_episodes = own.num_transitions, own.num_trajectories
        self.digest = self._source.digest(split)
        self.statistics = statistics or (own if split == "train" else split_statistics(self._source, "train"))
        self.action_dim, self.proprio_dim = self._source.action_dim, self._source.proprio_dim or 0
        self._proprio: FieldStatistics | None = self._check_statistics(use_proprio)
        self._horizon, self._image_aug, self._seed, self._num_threads = horizon, image_aug, seed, num_threads
        self._passes: dict[tuple[int, bool, int], Any] = {}  # pipelines of single passes
        self._buffer = min(shuffle_buffer_size, self.num_frames)

    def episode_outcomes(self) -> np.ndarray:
        """Whether each episode of the split succeeded, `(E,)` bool in stored order, by one pass without images.

        Raises:
            DatasetError: the dataset does not say, or a shard cannot be read.
        """
        if not self._source.has_success:
            raise DatasetError(
                f"{self._source.folder} does not say which episodes succeeded: it has no number "
                "`episode_metadata/success`, as datasets of `vla-energy rollout --record` have"
            )
        with self._source.reading(self._shards):
            episodes = self._source.episodes(self._shards).as_numpy_iterator()
            return np.array([bool(episode["success"]) for episode in episodes])

    def _check_images(self, image_size: tuple[int, int] | None) -> tuple[int, int]:
        """The size of the images given, `(h, w)`."""
        shapes = [self._source.feature(f"observation/{key}", "image key").shape for key in self._image_keys]
        self._stored_shapes = shapes
        sizes = set()
        for key, shape in zip(self._image_keys, shapes, strict=True):
            if len(shape) != 3 or shape[-1] != 3:
                raise DatasetError(f"image key {key!r} has shape {shape}; expected (height, width, 3)")
            sizes.add(tuple(shape[:2]))
        if image_size is not None:
            return (int(image_size[0]), int(image_size[1]))
        size = sizes.pop()
        if sizes or None in size:
            raise DatasetError(f"images are stored in several sizes ({[size, *sizes]}); pass image_size")
        return size

    def _check_statistics(self, use_proprio: bool) -> FieldStatistics | None:
        """The proprio statistics if proprio is used."""
        given = self.statistics
        if given.action.dim != self.action_dim:
            raise DatasetError(
                f"the dataset's actions have {self.action_dim} dimensions, the statistics {given.action.dim}; "
                "are they another dataset's?"
            )
        if not use_proprio:
            return None
        if given.proprio is None or given.proprio.dim != self.proprio_dim:
            have = "none" if given.proprio is None else given.proprio.dim
            raise DatasetError(f"the dataset's proprio has {self.proprio_dim} dimensions, the statistics {have}")
        return given.proprio

    def batches(
        self,
        batch_size: int,
        *,
        repeat: bool = True,
        drop_last: bool = True,
        skip: int = 0,
        shard: tuple[int, int] = (0, 1),
    ) -> Generator[Batch, None, None]:
        """Batches in an order that depends on the seed alone.

        Args:
            batch_size: B.
            repeat: go on for ever, every epoch in another order; batches then span epochs.
            drop_last: leave out a last batch that is not full.
            skip: batches to leave out at the start; what follows is the same as without.
            shard: `(r, n)`: of batches of `n * batch_size` frames the r-th part, so that the n parts in order are what
                one reader takes. Every part reads all frames and decodes its own images. Needs `repeat`.

        Yields:
            `images (B, num_images, h, w, 3)` uint8, main camera first; `actions (B, H, A)` float32 normalised;
            `proprio (B, P)` float32 normalised, if used; `instructions` list of B strings; `episode (B,)` int64
            index within the stored split; `step (B,)` int64 index within the stored episode. With `outcomes`, where the
            dataset has `episode_metadata/success`: `success (B,)` bool of the episode, and `remaining (B,)` int64 steps
            that follow in it, 0 at its last; elsewhere there are no such keys.

        Raises:
            DatasetError: a bad argument, or a shard or image that cannot be read.
        """
        if batch_size < 1 or skip < 0:
            raise DatasetError(f"batch_size={batch_size}, skip={skip}: expected batch_size >= 1 and skip >= 0")
        if not 0 <= shard[0] < shard[1] or (shard[1] > 1 and not repeat):
            raise DatasetError(f"shard={shard}, repeat={repeat}: expected (r, n) with 0 <= r < n, and repeat if n > 1")
        return self._iterate(batch_size, repeat, drop_last, skip, shard)

    def _iterate(
        self, batch_size: int, repeat: bool, drop_last: bool, skip: int, shard: tuple[int, int]
    ) -> Generator[Batch, None, None]:
        asked = (batch_size, drop_last, skip)
        if repeat:
            batches = self._pipeline(batch_size, repeat, drop_last, skip, shard)
        elif (batches := self._passes.get(asked)) is None:
            # Kept: TensorFlow never frees the functions of a pipeline, a megabyte for each validation of a long run.
            batches = self._passes[asked] = self._pipeline(batch_size, repeat, drop_last, skip, shard)
        with self._source.reading(self._shards):
            for batch in batches.as_numpy_iterator():
                texts = zip(batch["instructions"], batch["episode"], strict=True)
                batch["instructions"] = [
                    instruction(text, self._source, self._split, episode) for text, episode in texts
                ]
                yield batch

    def _pipeline(self, batch_size: int, repeat: bool, drop_last: bool, skip: int, shard: tuple[int, int]) -> Any:
        """A `tf.data.Dataset` of batches."""
        tf = self._tf
        part, parts = shard
        start = skip * batch_size * parts
        epoch, offset = divmod(start, self.num_frames) if repeat else (0, start)
        epochs = tf.data.Dataset.range(epoch, _FOREVER if repeat else 1)
        frames = epochs.flat_map(self._plain(self._epoch)).skip(offset).enumerate(start)
        if parts > 1:
            frames = frames.filter(self._plain(lambda position, _: position // batch_size % parts == part))
        calls = self._num_threads if self._num_threads > 1 else None
        batches = frames.map(self._plain(self._decode), num_parallel_calls=calls).batch(
            batch_size, drop_remainder=drop_last
        )
        options = tf.data.Options()
        options.deterministic = True
        options.autotune.enabled = False
        options.threading.private_threadpool_size = self._num_threads
        options.threading.max_intra_op_parallelism = 1
        return batches.prefetch(2).with_options(options)

    def _epoch(self, epoch: Any) -> Any:
        """A `tf.data.Dataset` of one epoch's frames, images encoded."""
        tf = self._tf
        order = None
        if self._buffer > 1:
            noise = tf.random.stateless_uniform(
                [len(self._shards)], tf.stack([tf.constant(self._seed, tf.int64), epoch])
            )
            order = tf.argsort(noise)
        episodes = self._source.episodes(self._shards, self._image_keys, order, self._num_threads)
        chunked = episodes.map(self._plain(self._chunk)).filter(self._plain(lambda labelled, _: labelled))
        frames = chunked.map(self._plain(lambda _, steps: steps)).unbatch()
        if self._buffer > 1:
            seed = epoch + self._seed * _SEED_STRIDE
            frames = frames.shuffle(self._buffer, seed=seed, reshuffle_each_iteration=False)
        return frames

    def _chunk(self, episode: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Whether an episode has an instruction, and its steps `(T, ...)` with chunks and normalised values."""
        tf = self._tf
        inputs = [episode["action"], episode["motion"], episode["proprio"]]
        types = [tf.float32, tf.float32, tf.int64, tf.int64]
        actions, proprio, start, stop = tf.numpy_function(self._chunk_arrays, inputs, types)
        actions.set_shape([None, self._horizon, self.action_dim])
        language = episode["language"][start:stop]
        steps = {
            "images": tuple(images[start:stop] for images in episode["images"]),
            "actions": actions,
            "instructions": language,
            "episode": tf.repeat(episode["episode"], stop - start),
            "step": tf.range(start, stop),
        }
        if self._proprio is not None:
            proprio.set_shape([None, self.proprio_dim])
            steps["proprio"] = proprio
        if self._outcomes:
            steps["success"] = tf.repeat(episode["success"], stop - start)
            steps["remaining"] = tf.shape(episode["action"], tf.int64)[0] - 1 - steps["step"]
        return tf.reduce_any(language != ""), steps

    def _chunk_arrays(self, action: np.ndarray, motion: np.ndarray, proprio: np.ndarray) -> tuple[Any, ...]:
        actions, kept = standardize(self._source.config, action, motion)
        actions = _normalize(self.statistics.action, actions)
        proprio = proprio[kept] if self._proprio is None else _normalize(self._proprio, proprio[kept])
        index = np.arange(len(actions))[:, None] + np.arange(self._horizon)
        chunks = actions[np.minimum(index, max(len(actions) - 1, 0))]
        return chunks, proprio, np.int64(kept.start), np.int64(kept.stop)

    def _decode(self, position: Any, frame: dict[str, Any]) -> dict[str, Any]:
        """Decodes, resizes and augments one frame; `position` in the stream seeds the augmentation."""
        tf = self._tf
        images = []
        for camera, image in enumerate(frame["images"]):
            if image.dtype == tf.string:
                image = tf.io.decode_image(image, channels=3, expand_animations=False)
            image = tf.ensure_shape(image, self._stored_shapes[camera])
            if image.shape[:2] != self._image_size:
                # As the host: Lanczos with antialiasing, which is the identity at the same size.
                pixels = tf.image.resize(image, self._image_size, method="lanczos3", antialias=True)
                image = tf.cast(tf.clip_by_value(tf.round(pixels), 0, 255), tf.uint8)
            if self._image_aug:
                seed = tf.stack([tf.constant(self._seed, tf.int64), position * len(frame["images"]) + camera])
                image = augment(tf, image, seed)
            images.append(image)
        return {**frame, "images": tf.stack(images)}


def _select_images(config: DatasetConfig, num_images: int) -> tuple[str, ...]:
    if num_images == 1:
        return (config.image_key,)
    if num_images != 2:
        raise DatasetError(f"num_images={num_images}: expected 1 (main camera) or 2 (main camera and wrist)")
    if config.wrist_image_key is None:
        raise DatasetError("num_images=2 needs wrist_image_key in the dataset's configuration, which has none")
    return (config.image_key, config.wrist_image_key)


def _normalize(statistics: FieldStatistics, values: np.ndarray) -> np.ndarray:
    """Normalised `values (T, dims)`, float32."""
    return statistics.normalize(torch.from_numpy(np.asarray(values, np.float64))).float().numpy()
