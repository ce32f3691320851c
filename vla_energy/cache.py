"""Features on disk: what a frozen policy makes of a dataset's frames, so that heads are trained without the policy.

A cache is a folder of safetensors shards and a manifest, `cache.json`, which says what they were made of and has the
SHA-256 of each. In a shard of F frames with T context tokens together: `context (T,D)`, bf16 or fp32, each frame's
tokens up to its last valid one, masked ones zero; `mask (T,)`, True = valid; `lengths (F,)` tokens of each frame;
`layer_actions (F,L,H,A)` with the policy's chunk last, and `expert (F,H,A)`, fp32; `episode (F,)` and `step (F,)`.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vla_energy.actions import DatasetStatistics, StatisticsError
from vla_energy.checkpoint import atomic_write

MANIFEST = "cache.json"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_FORMAT, _VERSION = "vla_energy.cache", 1
_TENSORS = ("context", "mask", "lengths", "layer_actions", "expert", "episode", "step")
_CHUNK = 1 << 22


class CacheError(ValueError):
    """A cache is missing, unfinished, damaged, or made of something else; the message says what to do."""


class CachedFrames(NamedTuple):
    """B frames of a cache.

    Attributes:
        context, context_mask: `(B,S,D)` as stored, zero where masked, and `(B,S)`, True = valid.
        expert: `(B,H,A)` fp32.
        layer_actions: `(B,L,H,A)` fp32, the policy's chunk last.
        episodes, steps: `(B,)` int64.
    """

    context: Tensor
    context_mask: Tensor
    expert: Tensor
    layer_actions: Tensor
    episodes: Tensor
    steps: Tensor


@dataclass
class Manifest:
    """What a cache was made of, and its shards.

    Attributes:
        checkpoint: `folder`, as it was given, `fingerprint` of the policy's files, and `kind`: l1, discrete or
            diffusion.
        dataset: `root`, `name`, `split`, `fingerprint` of its files, `statistics_of`, and `config`: the file that
            names its fields, as it was given, or None.
        options: what else the features depend on: `dtype`, `precision`, `layer_exits`, `pool`, `seed`, `batch_size`.
        statistics: in which actions are normalised, in the host's JSON layout.
        shape: `context_dim`, `horizon`, `action_dim`, `num_exits`.
        frames, shard_frames: of the whole cache, and of each shard but the last.
        shards: one a shard: None where it is not written, else `frames`, `tokens`, `bytes`, `sha256`.
    """

    checkpoint: dict[str, Any]
    dataset: dict[str, Any]
    options: dict[str, Any]
    statistics: dict[str, Any]
    shape: dict[str, int]
    frames: int
    shard_frames: int
    shards: list[dict[str, Any] | None]

    def path(self, folder: Path, index: int) -> Path:
        """The file of a shard."""
        return folder / f"features-{index:05d}-of-{len(self.shards):05d}.safetensors"

    def rows(self, index: int) -> range:
        """The frames of a shard."""
        return range(index * self.shard_frames, min((index + 1) * self.shard_frames, self.frames))

    def command(self, folder: str | Path) -> str:
        """The command that builds, continues and mends this cache."""
        flags = {
            "checkpoint": self.checkpoint["folder"],
            "data-root-dir": self.dataset["root"],
            "dataset-name": self.dataset["name"],
            "out": str(folder),
            "split": self.dataset["split"],
            **{name.replace("_", "-"): value for name, value in self.options.items()},
            "shard-frames": self.shard_frames,
            "max-frames": self.frames,
        }
        for flag, name in (("statistics", "statistics_of"), ("dataset-config", "config")):
            if self.dataset.get(name):
                flags[flag] = self.dataset[name]
        return "vla-energy cache " + " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in flags.items())

    def write(self, folder: Path) -> None:
        """Writes the manifest, whole or not at all.

        Raises:
            CheckpointError: the system refused.
        """
        text = json.dumps({"format": _FORMAT, "version": _VERSION, **asdict(self)}, indent=1)
        atomic_write(folder / MANIFEST, lambda file: file.write(text.encode()))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a cache.

        Raises:
            CacheError: there is none, or it is no such file.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise CacheError(f"{folder} is no feature cache: it has no {MANIFEST}; vla-energy cache makes one")
        try:
            data = json.loads(path.read_text())
            if (data.pop("format"), data.pop("version")) != (_FORMAT, _VERSION):
                raise ValueError(f"expected format {_FORMAT}, version {_VERSION}")
            manifest = cls(**data)
            manifest._check()
            return manifest
        except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError) as error:
            raise CacheError(
                f"{path} is damaged or of another version ({error}); delete {folder} and build it again"
            ) from error

    def _check(self) -> None:
        """Raises ValueError, KeyError or TypeError where something has a wrong type or does not fit the rest."""
        for name in ("folder", "fingerprint", "kind"):
            _require(isinstance(self.checkpoint[name], str), f"checkpoint.{name}", self.checkpoint[name], "a text")
        for name in ("root", "name", "split", "fingerprint"):
            _require(isinstance(self.dataset[name], str), f"dataset.{name}", self.dataset[name], "a text")
        dtype, layers = self.options["dtype"], self.options["layer_exits"]
        _require(isinstance(dtype, str) and dtype in DTYPES, "options.dtype", dtype, " or ".join(DTYPES))
        _require(isinstance(layers, str), "options.layer_exits", layers, "a text")
        for name in ("context_dim", "horizon", "action_dim", "num_exits"):
            _require(_counts(self.shape[name], 1), f"shape.{name}", self.shape[name], "an integer, 1 or more")
        _require(_counts(self.frames, 0), "frames", self.frames, "an integer, 0 or more")
        _require(_counts(self.shard_frames, 1), "shard_frames", self.shard_frames, "an integer, 1 or more")
        fit = isinstance(self.shards, list) and len(self.shards) == -(-self.frames // self.shard_frames)
        _require(fit, "shards", self.shards, f"one for each {self.shard_frames} of {self.frames} frames")
        for index, entry in enumerate(self.shards):
            if entry is not None:
                numbers = all(_counts(entry[name], 0) for name in ("frames", "tokens", "bytes"))
                whole = numbers and isinstance(entry["sha256"], str) and entry["frames"] == len(self.rows(index))
                _require(whole, f"shards[{index}]", entry, f"null, or facts of {len(self.rows(index))} frames")

    def differences(self, other: Manifest, *, split: bool = True) -> list[str]:
        """In what `other` was made otherwise, in words; paths do not count.

        Args:
            other: of another cache.
            split: whether split and dataset, number of frames and the layout on disk must agree, too, and how patches
                are pooled: heads are judged on whole contexts as well.
        """
        found = []
        if self.checkpoint["fingerprint"] != other.checkpoint["fingerprint"]:
            found.append(f"the checkpoint ({self.checkpoint['folder']}, here {other.checkpoint['folder']})")
        if self.statistics != other.statistics:
            found.append("the normalisation statistics")
        names = [name for name in self.options if split or name not in ("seed", "batch_size", "pool")]
        pairs = {name: (self.options[name], other.options.get(name)) for name in names}
        if split:
            for name in ("name", "split"):
                pairs[f"dataset {name}"] = (self.dataset[name], other.dataset[name])
            if self.dataset["fingerprint"] != other.dataset["fingerprint"]:
                found.append("the dataset's files")
            pairs |= {name: (getattr(self, name), getattr(other, name)) for name in ("frames", "shard_frames")}
        return found + [f"{name} ({mine}, here {theirs})" for name, (mine, theirs) in pairs.items() if mine != theirs]


def _counts(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r:.100}, expected {expected}")


def frame_bytes(tokens: float, context_dim: int, num_exits: int, horizon: int, action_dim: int, dtype: str) -> float:
    """Bytes that a frame of `tokens` context tokens takes in a shard, without the shard's header of a kilobyte.

    A token is D numbers and its mask; a frame is L + 1 chunks of H x A fp32 numbers and three int64.
    """
    width = torch.empty((), dtype=DTYPES[dtype]).element_size()
    return tokens * (context_dim * width + 1) + 4 * (num_exits + 1) * horizon * action_dim + 3 * 8


def pack(frames: Sequence[CachedFrames], dtype: str) -> tuple[bytes, dict[str, Any]]:
    """A shard's bytes, and its entry in the manifest."""
    rows = [(part.context[i], part.context_mask[i]) for part in frames for i in range(len(part.expert))]
    lengths = [int(mask.nonzero().max()) + 1 for _, mask in rows]
    tensors = {
        "context": torch.cat(
            [c[:n].masked_fill(~m[:n, None], 0.0).to(DTYPES[dtype]) for (c, m), n in zip(rows, lengths, strict=True)]
        ),
        "mask": torch.cat([mask[:n] for (_, mask), n in zip(rows, lengths, strict=True)]),
        "lengths": torch.tensor(lengths),
        "layer_actions": torch.cat([part.layer_actions.float() for part in frames]),
        "expert": torch.cat([part.expert.float() for part in frames]),
        "episode": torch.cat([part.episodes for part in frames]),
        "step": torch.cat([part.steps for part in frames]),
    }
    data = save({name: value.cpu().contiguous() for name, value in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    return data, {"frames": len(rows), "tokens": sum(lengths), "bytes": len(data), "sha256": digest}


def is_whole(path: Path, entry: dict[str, Any] | None) -> bool:
    """Whether a shard's file is the one that the manifest has the checksum of."""
    if entry is None or not path.is_file() or path.stat().st_size != entry["bytes"]:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest() == entry["sha256"]


class FeatureCache:
    """A finished cache; its files are mapped, not read, until frames are asked for.

    Args:
        folder: of the cache.

    Attributes:
        folder, manifest: of the cache.
        statistics: in which actions are normalised.
        context_dim, horizon, action_dim, num_exits: D, H, A and L.

    Raises:
        CacheError: it is not there, not finished, or a shard is damaged; the message has the command that mends it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = manifest = Manifest.read(self.folder)
        paths = [manifest.path(self.folder, index) for index in range(len(manifest.shards))]
        torn = [path for path, entry in zip(paths, manifest.shards, strict=True) if not is_whole(path, entry)]
        if torn:
            raise CacheError(
                f"{len(torn)} of {len(paths)} shards of {self.folder} are missing or damaged, {torn[0].name} first; "
                f"this command builds them and leaves the others: {manifest.command(self.folder)}"
            )
        try:
            self.statistics = DatasetStatistics.from_dict(manifest.statistics, str(self.folder / MANIFEST))
            shape = manifest.shape
            self.context_dim, self.horizon = shape["context_dim"], shape["horizon"]
            self.action_dim, self.num_exits = shape["action_dim"], shape["num_exits"]
            self._shards = [_map(path) for path in paths]
            for path, shard, entry in zip(paths, self._shards, manifest.shards, strict=True):
                self._check(path, shard, entry or {})
        except (SafetensorError, OSError, KeyError, ValueError, StatisticsError) as error:
            raise CacheError(f"{self.folder} cannot be read ({error}); delete it and build it again") from error
        self._first = [manifest.rows(index).start for index in range(len(paths))]
        self._starts = [torch.cumsum(shard["lengths"], 0) - shard["lengths"] for shard in self._shards]

    def _check(self, path: Path, shard: dict[str, Tensor], entry: dict[str, Any]) -> None:
        """Raises ValueError where a shard's tensors are not as the manifest says: checksums do not tell who wrote."""
        frames, tokens, chunk = entry["frames"], entry["tokens"], (self.horizon, self.action_dim)
        expected = {
            "context": ((tokens, self.context_dim), DTYPES[self.manifest.options["dtype"]]),
            "mask": ((tokens,), torch.bool),
            "lengths": ((frames,), torch.int64),
            "layer_actions": ((frames, self.num_exits, *chunk), torch.float32),
            "expert": ((frames, *chunk), torch.float32),
            "episode": ((frames,), torch.int64),
            "step": ((frames,), torch.int64),
        }
        for name, (shape, dtype) in expected.items():
            found = shard[name]
            if tuple(found.shape) != shape or found.dtype != dtype:
                raise ValueError(f"{path.name}: {name} is {tuple(found.shape)} {found.dtype}, expected {shape} {dtype}")
        if bool((shard["lengths"] < 1).any()) or int(shard["lengths"].sum()) != tokens:
            raise ValueError(f"{path.name}: the frames' lengths do not add up to {tokens} tokens")

    def __len__(self) -> int:
        return self.manifest.frames

    @property
    def episodes(self) -> Tensor:
        """`(M,)` int64 episode of each frame."""
        return torch.cat([shard["episode"] for shard in self._shards])

    @property
    def steps(self) -> Tensor:
        """`(M,)` int64 place of each frame in its episode."""
        return torch.cat([shard["step"] for shard in self._shards])

    @property
    def nbytes(self) -> int:
        """Of all shards."""
        return sum(entry["bytes"] for entry in self.manifest.shards if entry is not None)

    def batch(self, rows: Sequence[int] | Tensor, device: torch.device | str = "cpu") -> CachedFrames:
        """The frames with these numbers, on a device.

        Raises:
            IndexError: a number is not of 0 .. M - 1.
        """
        places = [self._place(int(row)) for row in rows]
        lengths = [int(shard["lengths"][i]) for shard, _, i in places]
        width, dtype = max(lengths, default=0), DTYPES[self.manifest.options["dtype"]]
        context = torch.zeros(len(places), width, self.context_dim, dtype=dtype)
        mask = torch.zeros(len(places), width, dtype=torch.bool)
        for row, ((shard, start, _), length) in enumerate(zip(places, lengths, strict=True)):
            context[row, :length] = shard["context"][start : start + length]
            mask[row, :length] = shard["mask"][start : start + length]
        parts = [  # the empty start gives no rows, too, their shape and dtype
            torch.cat([self._shards[0][name][:0], *(shard[name][i : i + 1] for shard, _, i in places)])
            for name in ("expert", "layer_actions", "episode", "step")
        ]
        return CachedFrames(*(part.to(device) for part in (context, mask, *parts)))

    def _place(self, row: int) -> tuple[dict[str, Tensor], int, int]:
        """Shard of a frame, its first token there, and its number there."""
        if not 0 <= row < len(self):
            raise IndexError(f"frame {row}: the cache has {len(self)}")
        shard = bisect_right(self._first, row) - 1
        index = row - self._first[shard]
        return self._shards[shard], int(self._starts[shard][index]), index


def _map(path: Path) -> dict[str, Tensor]:
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in _TENSORS}
