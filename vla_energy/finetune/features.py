"""Builds a feature cache: the frozen policy over a split, once, shard by shard."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vla_energy.cache import DTYPES, MANIFEST, CachedFrames, CacheError, Manifest, frame_bytes, is_whole, pack
from vla_energy.checkpoint import CheckpointError, atomic_write
from vla_energy.config import checks
from vla_energy.data import dataset_config
from vla_energy.data.rlds_folder import FEATURES, INFO, find_folder
from vla_energy.finetune.frames import FrameReader, NotFiniteError, PolicyFrames, require_finite
from vla_energy.finetune.pooling import patch_grid, pool_patches
from vla_energy.fingerprint import fingerprint, fingerprint_files


@dataclass(frozen=True)
class CacheOptions:
    """How a cache is built.

    Attributes:
        split: of the dataset.
        dtype: of the stored contexts: bf16 or fp32.
        pool: P: the mean of P x P neighbouring image patches is stored in their place; 1 stores each.
        batch_size: frames that the policy reads at once; results differ in the last bits with it.
        shard_frames: frames a shard, a multiple of `batch_size`.
        max_frames: so many frames, drawn over all episodes; None is all.
    """

    split: str = "train"
    dtype: str = "bf16"
    pool: int = 1
    batch_size: int = 32
    shard_frames: int = 512
    max_frames: int | None = None

    def __post_init__(self) -> None:
        checks.one_of("--dtype", self.dtype, DTYPES)
        for name in ("pool", "batch_size", "shard_frames"):
            checks.count(f"--{name.replace('_', '-')}", getattr(self, name), 1)
        if self.max_frames is not None:
            checks.count("--max-frames", self.max_frames, 1)
        # So that a build that goes on at a shard runs the policy on the same batches.
        whole = self.shard_frames % self.batch_size == 0
        checks.require(whole, "--shard-frames", self.shard_frames, f"a multiple of --batch-size {self.batch_size}")


class CacheBuilder:
    """Plans and builds one cache.

    Args:
        checkpoint, data_root, dataset, statistics_of, dataset_config, device, seed, precision, layer_exits: see
            `FrameReader`.
        out: folder of the cache.
        options: everything else.

    Attributes:
        manifest: with the shards that are there and whole.
        todo: numbers of the others.
        size: bytes of the whole cache, as planned: from the prompts of some frames.
        left: of them, those not written yet.

    Raises:
        CacheError: `out` holds a cache of something else.
        ValueError: see `FrameReader`, or patches that cannot be pooled.
    """

    def __init__(
        self,
        checkpoint: str,
        data_root: str,
        dataset: str,
        out: str | Path,
        options: CacheOptions | None = None,
        **reading: Any,
    ) -> None:
        self.options, self.folder = options or CacheOptions(), Path(out)
        self._reader = FrameReader(checkpoint, data_root, dataset, **reading)
        self.manifest = self._plan(checkpoint, data_root, dataset, reading)
        self._tokens = self._reader.tokens(self.options.split)
        if self.options.pool > 1:
            self._grid = patch_grid(self._reader.vla.backbone.vision_backbone.num_patches, self.options.pool)
            pooled_away = self._grid**2 - (self._grid // self.options.pool) ** 2
            self._tokens -= self._reader.num_images * pooled_away
        self._resume()

    def _plan(self, checkpoint: str, data_root: str, dataset: str, reading: dict[str, Any]) -> Manifest:
        reader, options, vla = self._reader, self.options, self._reader.vla
        there = reader.frames(options.split)
        frames = there if options.max_frames is None else min(there, options.max_frames)
        kept = {name: value for name, value in asdict(options).items() if name in ("dtype", "pool", "batch_size")}
        asked = {"precision": "fp32", "layer_exits": "raw", "seed": 0} | reading
        kept |= {name: asked[name] for name in ("precision", "layer_exits", "seed")}
        kind = "diffusion" if vla.diffuses else "discrete" if vla.discrete else "l1"
        return Manifest(
            {"folder": checkpoint, "fingerprint": fingerprint(reader.folder, policy_only=True), "kind": kind},
            {
                "root": data_root,
                "name": dataset,
                "split": options.split,
                "fingerprint": dataset_fingerprint(reader.data_root, dataset, asked.get("dataset_config")),
                "config": asked.get("dataset_config"),
                "statistics_of": asked.get("statistics_of"),
            },
            kept,
            reader.statistics.to_dict(),
            {name: int(getattr(vla, name)) for name in ("context_dim", "horizon", "action_dim", "num_exits")},
            frames,
            options.shard_frames,
            [None] * math.ceil(frames / options.shard_frames),
        )

    def _resume(self) -> None:
        """Takes over the whole shards of an earlier build of the same cache."""
        if (self.folder / MANIFEST).exists():
            old = Manifest.read(self.folder)
            if other := old.differences(self.manifest):
                raise CacheError(
                    f"{self.folder} holds a cache made otherwise: {'; '.join(other)}; name another --out, or delete it"
                )
            self.manifest.shards = [
                entry if is_whole(self.manifest.path(self.folder, index), entry) else None
                for index, entry in enumerate(old.shards)
            ]
        self.todo = [index for index, entry in enumerate(self.manifest.shards) if entry is None]
        a_frame = frame_bytes(self._tokens, **self.manifest.shape, dtype=self.options.dtype)
        self.size = a_frame * self.manifest.frames
        self.left = a_frame * sum(map(self._frames_of, self.todo))

    def describe(self) -> str:
        """Size and what is left, for a user."""
        manifest, done = self.manifest, len(self.manifest.shards) - len(self.todo)
        there = f"; {done} are there" if done else ""
        return (
            f"{manifest.frames} frames of {self._tokens:.1f} tokens x {manifest.shape['context_dim']} in "
            f"{self.options.dtype}: {_size(self.size)} in {len(manifest.shards)} shards{there}; "
            f"{_size(self.left)} to write, {_size(self._free())} free"
        )

    def build(self, on_shard: Callable[[int], None] | None = None) -> Manifest:
        """Writes the shards that are missing or damaged; others stay as they are.

        Args:
            on_shard: called with the number of each shard that was written.

        Raises:
            CacheError: the disk is full, before or while it is written, or what the policy makes of a frame is not
                finite; what is there stays.
            DatasetError: the data cannot be read.
        """
        if self.todo and self.left > self._free():
            raise CacheError(f"{self.folder}: {_size(self._free())} free, too little. {self._what_is_left()}")
        with tqdm(total=sum(map(self._frames_of, self.todo)), disable=None, unit="frame") as bar:
            for first, last in _runs(self.todo):
                self._build_run(first, last, bar, on_shard)
        return self.manifest

    def _build_run(self, first: int, last: int, bar: tqdm, on_shard: Callable[[int], None] | None) -> None:
        """Writes the shards `first` .. `last`, from the batches that every build of this cache reads."""
        start, stop = self.manifest.rows(first).start, self.manifest.rows(last).stop
        size = self.options.batch_size
        reading = self._reader.read(self.options.split, stop, size, skip=start // size)
        parts: list[CachedFrames] = []
        with contextlib.closing(reading):
            for frames in reading:
                try:
                    require_finite(frames)
                except NotFiniteError as error:
                    raise CacheError(f"{error}; {self.folder} gets no shard with it") from error
                parts.append(self._stored(frames))
                bar.update(len(frames.expert))
                if sum(len(part.expert) for part in parts) == self._frames_of(first):
                    self._write(first, parts)
                    if on_shard is not None:
                        on_shard(first)
                    parts, first = [], first + 1

    def _stored(self, frames: PolicyFrames) -> CachedFrames:
        context, mask = frames.context, frames.context_mask
        if self.options.pool > 1:
            context, mask = pool_patches(context, mask, self._grid, self._reader.num_images, self.options.pool)
        assert frames.steps is not None
        parts = (context, mask, frames.expert, frames.layer_actions, frames.episodes, frames.steps)
        return CachedFrames(*(part.cpu() for part in parts))

    def _write(self, index: int, parts: list[CachedFrames]) -> None:
        data, entry = pack(parts, self.options.dtype)
        self.manifest.shards[index] = entry
        try:
            atomic_write(self.manifest.path(self.folder, index), lambda file: file.write(data))
            self.manifest.write(self.folder)
        except CheckpointError as error:
            self.manifest.shards[index] = None
            raise CacheError(f"{error}. {self._what_is_left()}") from error
        self.todo.remove(index)

    def _frames_of(self, index: int) -> int:
        return len(self.manifest.rows(index))

    def _what_is_left(self) -> str:
        frames = sum(map(self._frames_of, self.todo))
        return (
            f"Left to do: {frames} of {self.manifest.frames} frames, {len(self.todo)} of {len(self.manifest.shards)} "
            f"shards, {_size(self.size * frames / self.manifest.frames)}; what is written stays. Free the "
            f"space and go on with the same command: {self.manifest.command(self.folder)}; or take a smaller cache in "
            "another --out: --dtype bf16, --max-frames N, --pool 2"
        )

    def _free(self) -> int:
        place = self.folder.absolute()
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free


def dataset_fingerprint(data_root: str | Path, dataset: str, config: str | Path | None = None) -> str:
    """16 hex digits of a dataset's files and of how its fields are named; see `fingerprint_files`.

    Args:
        data_root: folder with the dataset's.
        dataset: its name.
        config: file that names the fields of a dataset we do not know.

    Raises:
        DatasetError: there is no such dataset, or nothing names its fields.
    """
    folder = find_folder(data_root, dataset)
    shards = sorted(path for path in folder.iterdir() if ".tfrecord" in path.name)
    return fingerprint_files([folder / INFO, folder / FEATURES, *shards], repr(dataset_config(dataset, config)))


def _runs(indices: Iterable[int]) -> list[tuple[int, int]]:
    """First and last of each run of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and runs[-1][1] == index - 1:
            runs[-1] = (runs[-1][0], index)
        else:
            runs.append((index, index))
    return runs


def _size(count: float) -> str:
    """Bytes, in words."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
