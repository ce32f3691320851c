"""Retrieval: the training set's contexts and their expert chunks; the nearest ones lend theirs as candidates.

A context becomes a key in three steps: each token is projected to a few numbers by a fixed random matrix (distances
survive it: Johnson and Lindenstrauss, 1984), tokens that the mask hides become zero, and the row of all tokens is
reduced by PCA, fitted on the memory. The policy's own chunk, weighted, stands beside it. Neighbours are exact,
by faiss.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vla_energy.actions import DatasetStatistics, StatisticsError
from vla_energy.checkpoint import CheckpointError, atomic_write, digest, find_one, to_bytes
from vla_energy.results import require_regular

TOKEN_WIDTH = 8
"""Numbers a token is projected to."""
KEY_WIDTH = 256
"""Most numbers of a context's key."""
PREFIX = "chunk_memory--"
_FORMAT, _VERSION = "vla_energy.memory", "1"
_PCA_ROWS = 4_000  # rows that PCA is fitted on
_TENSORS = ("projection", "mean", "basis", "keys", "chunks", "episodes")


class MemoryBatch(NamedTuple):
    """Frames to remember.

    Attributes:
        context: `(B,S,D)` hidden states; S may differ between batches.
        context_mask: `(B,S)` True = valid.
        policy: `(B,H,A)` the policy's chunk, normalised.
        expert: `(B,H,A)` the demonstration's chunk, normalised.
        episodes: `(B,)` int64, the episode of each frame.
    """

    context: Tensor
    context_mask: Tensor
    policy: Tensor
    expert: Tensor
    episodes: Tensor


@dataclass(frozen=True)
class Retrieved:
    """Neighbours of a batch of B contexts, the nearest first.

    Attributes:
        chunks: `(B,K,H,A)` their expert chunks, normalised.
        distances: `(B,K)` between keys; 1 is the typical distance of a remembered frame to the nearest of another
            episode. inf where fewer than K frames are left, and in rows whose context or policy is not finite.
        episodes: `(B,K)`; -1 where the distance is inf (the chunk means nothing there).
    """

    chunks: Tensor
    distances: Tensor
    episodes: Tensor


@dataclass(frozen=True)
class KeyEncoder:
    """Turns contexts into keys.

    Attributes:
        projection: `(D, TOKEN_WIDTH)`.
        tokens: S of a key; longer contexts are cut, shorter ones filled with zeros.
        mean, basis: `(F,)` and `(F,K)` of the PCA, F = tokens * TOKEN_WIDTH.
        policy_weight: factor of the policy's chunk beside the context's key.
        unit: distance that is called 1.
    """

    projection: Tensor
    tokens: int
    mean: Tensor
    basis: Tensor
    policy_weight: float
    unit: float = 1.0

    def __call__(self, context: Tensor, context_mask: Tensor, policy: Tensor) -> Tensor:
        """Keys `(B,K+H*A)` fp32 on the CPU, see `MemoryBatch` for the arguments.

        Raises:
            ValueError: another D than the memory's, or shapes that do not fit.
        """
        rows = (_flatten(context, context_mask, self.projection, self.tokens) - self.mean) @ self.basis
        if policy.ndim != 3 or len(policy) != len(rows):
            raise ValueError(f"policy {tuple(policy.shape)} for context {tuple(context.shape)}: expected (B,H,A)")
        return torch.cat([rows, self.policy_weight * policy.detach().cpu().float().flatten(1)], 1) / self.unit


def _flatten(context: Tensor, mask: Tensor, projection: Tensor, tokens: int) -> Tensor:
    """`(B, tokens * TOKEN_WIDTH)` fp32 on the CPU."""
    if context.ndim != 3 or context.shape[2] != len(projection) or mask.shape != context.shape[:2]:
        raise ValueError(
            f"context {tuple(context.shape)}, mask {tuple(mask.shape)}: expected (B,S,{len(projection)}) and (B,S)"
        )
    # torch.where and not a product: hidden states at hidden positions may be anything, NaN too.
    visible = torch.where(mask[..., None], context.detach().float(), torch.zeros((), device=context.device))
    rows = (visible @ projection.to(visible.device)).cpu()[:, :tokens]
    return torch.nn.functional.pad(rows, (0, 0, 0, tokens - rows.shape[1])).flatten(1)


class ChunkMemory:
    """Remembered contexts with their expert chunks.

    Args:
        encoder: of the keys.
        keys: `(M,K)` fp32.
        chunks: `(M,H,A)` normalised.
        episodes: `(M,)` int64.
        statistics: the dataset's, in which chunks are normalised.
    """

    def __init__(
        self, encoder: KeyEncoder, keys: Tensor, chunks: Tensor, episodes: Tensor, statistics: DatasetStatistics
    ) -> None:
        keys = keys.half().float()  # as the file has them, so that a loaded memory answers alike
        self.encoder, self.keys, self.chunks, self.episodes = encoder, keys, chunks, episodes
        self.statistics = statistics
        self._index = _faiss().IndexFlatL2(keys.shape[1])
        self._index.add(keys.contiguous().numpy())
        self._longest = int(episodes.unique(return_counts=True)[1].max())

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def nbytes(self) -> int:
        """Bytes of the file that `save` writes, less its header of a few kilobytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._stored().values())

    @classmethod
    def build(
        cls,
        batches: Iterable[MemoryBatch],
        statistics: DatasetStatistics,
        *,
        max_frames: int = 50_000,
        policy_weight: float = 1.0,
        seed: int = 0,
    ) -> ChunkMemory:
        """Remembers the frames of `batches`, at most `max_frames` of them.

        Args:
            batches: of the training set.
            statistics: of the dataset.
            max_frames: later frames are left out; bring them in random order.
            policy_weight: of the policy's chunk in a key, in units of the contexts' spread.
            seed: of the projection.

        Raises:
            ValueError: no frame, shapes that do not fit, a frame that is not finite, or frames of fewer than two
                episodes.
        """
        generator = torch.Generator().manual_seed(seed)
        projection, parts, frames = None, [], 0
        for batch in batches:
            if projection is None:
                width = batch.context.shape[2]
                projection = torch.randn(width, TOKEN_WIDTH, generator=generator) / TOKEN_WIDTH**0.5
            rows = _flatten(batch.context, batch.context_mask, projection, batch.context.shape[1])
            numbers = (batch.policy, batch.expert)
            policy, expert = (chunk.detach().cpu().float() for chunk in numbers)
            _require_finite(frames, batch.episodes, {"context": rows, "policy's chunk": policy, "expert": expert})
            parts.append((rows, policy, expert, batch.episodes.cpu().long()))
            frames += len(rows)
            if frames >= max_frames:
                break
        if projection is None:
            raise ValueError("there is no frame to remember")
        longest = max(part[0].shape[1] for part in parts)
        rows = torch.cat([torch.nn.functional.pad(part[0], (0, longest - part[0].shape[1])) for part in parts])
        policy, expert, episodes = (torch.cat([part[i] for part in parts])[:max_frames] for i in (1, 2, 3))
        rows = rows[:max_frames]
        if len(episodes.unique()) < 2:
            raise ValueError("frames of at least two episodes are needed: neighbours come from other episodes")
        mean, basis = _pca(rows, generator)
        reduced = (rows - mean) @ basis
        spread = float(reduced.var(0).sum().sqrt() / policy.flatten(1).var(0).sum().sqrt().clamp_min(1e-6))
        encoder = KeyEncoder(projection, longest // TOKEN_WIDTH, mean, basis, policy_weight * spread)
        keys = torch.cat([reduced, encoder.policy_weight * policy.flatten(1)], 1)
        first = cls(encoder, keys, expert, episodes, statistics)
        probe = torch.randperm(len(keys), generator=generator)[:1_000]
        unit = float(first._nearest(keys[probe], 1, episodes[probe])[0].median().clamp_min(1e-6))
        encoder = KeyEncoder(projection, encoder.tokens, mean, basis, encoder.policy_weight, unit)
        return cls(encoder, keys / unit, expert, episodes, statistics)

    def nearest(
        self, context: Tensor, context_mask: Tensor, policy: Tensor, count: int, exclude: Tensor | None = None
    ) -> Retrieved:
        """The nearest `count` frames of each context; on the context's device.

        Args:
            context, context_mask, policy: see `MemoryBatch`.
            count: K, at least 1.
            exclude: `(B,)` an episode that lends nothing to the row, for queries that are themselves remembered.

        Raises:
            ValueError: shapes that do not fit the memory's, or a count below 1.
        """
        if count < 1:
            raise ValueError(f"count={count}: expected 1 or more")
        if policy.shape[1:] != self.chunks.shape[1:]:
            raise ValueError(f"policy {tuple(policy.shape)}: the memory's chunks are {tuple(self.chunks.shape[1:])}")
        keys = self.encoder(context, context_mask, policy)
        finite = keys.isfinite().all(1)
        # faiss answers NaN with row -1, which would be the last frame's chunk.
        distances, index = self._nearest(keys.masked_fill(~finite[:, None], 0.0), count, exclude)
        distances = distances.masked_fill(~finite[:, None], torch.inf)
        missing = distances.isinf()
        index = torch.where(missing, index[:, :1], index)
        episodes = self.episodes[index].masked_fill(missing, -1)
        return Retrieved(*(part.to(context.device) for part in (self.chunks[index], distances, episodes)))

    def _nearest(self, keys: Tensor, count: int, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
        """`(B,K)` distances, inf where there are fewer, and rows."""
        # So many that enough are left without the longest episode.
        asked = min(count + (self._longest if exclude is not None else 0), len(self.keys))
        squares, index = (torch.from_numpy(part) for part in self._index.search(keys.contiguous().numpy(), asked))
        distances = squares.clamp_min(0).sqrt()
        if exclude is not None:
            own = self.episodes[index] == exclude.cpu()[:, None]
            distances, order = distances.masked_fill(own, torch.inf).sort(dim=1, stable=True)
            index = index.gather(1, order)
        short = max(0, count - asked)
        distances = torch.nn.functional.pad(distances[:, :count], (0, short), value=torch.inf)
        return distances, torch.nn.functional.pad(index[:, :count], (0, short))

    def save(self, path_or_folder: str | Path, step: int) -> Path:
        """Writes `chunk_memory--{step}_checkpoint.safetensors` into a folder, or the file if the path ends so.

        Raises:
            CheckpointError: the file cannot be written; an older one stays as it was.
        """
        path = Path(path_or_folder)
        path = path if path.suffix == ".safetensors" else path / f"{PREFIX}{step}_checkpoint.safetensors"
        encoder = self.encoder
        metadata = {
            "format": _FORMAT, "version": _VERSION, "step": str(step),
            "encoder": json.dumps([encoder.tokens, encoder.policy_weight, encoder.unit]),
            "statistics": json.dumps(self.statistics.to_dict()),
        }  # fmt: skip
        data = to_bytes(self._stored(), metadata | {"sha256": digest(self._stored(), metadata)})
        return atomic_write(path, lambda file: file.write(data))

    def _stored(self) -> dict[str, Tensor]:
        encoder = self.encoder
        tensors = (encoder.projection, encoder.mean, encoder.basis, self.keys.half(), self.chunks, self.episodes)
        return {name: tensor.contiguous() for name, tensor in zip(_TENSORS, tensors, strict=True)}

    @classmethod
    def load(cls, path: str | Path) -> ChunkMemory:
        """Reads a memory from its file, or from a folder with exactly one.

        Raises:
            CheckpointError: missing, ambiguous, damaged, or not a memory.
        """
        path = Path(path)
        path = find_one(path, PREFIX) if path.is_dir() else path
        try:
            require_regular(path)
            with safe_open(str(path), framework="pt") as file:
                metadata: dict[str, Any] = file.metadata() or {}
                if (metadata.get("format"), metadata.get("version")) != (_FORMAT, _VERSION):
                    raise CheckpointError(f"{path} is no chunk memory of version {_VERSION}")
                stored = {name: file.get_tensor(name) for name in _TENSORS}
            # Memories of earlier versions have no checksum.
            if "sha256" in metadata and metadata["sha256"] != digest(stored, metadata):
                raise CheckpointError(f"{path} is damaged: its content does not match its checksum")
            projection, mean, basis, keys, chunks, episodes = stored.values()
            tokens, policy_weight, unit = json.loads(metadata["encoder"])
            statistics = DatasetStatistics.from_dict(json.loads(metadata["statistics"]))
            encoder = KeyEncoder(projection, tokens, mean, basis, policy_weight, unit)
            _check_stored(encoder, keys, chunks, episodes, statistics)
        except (
            SafetensorError, OSError, KeyError, IndexError, ValueError, TypeError, AttributeError, RuntimeError,
            RecursionError, StatisticsError,
        ) as error:  # fmt: skip
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} is damaged or no chunk memory ({error})") from error
        return cls(encoder, keys.float(), chunks, episodes, statistics)


def _check_stored(
    encoder: KeyEncoder, keys: Tensor, chunks: Tensor, episodes: Tensor, statistics: DatasetStatistics
) -> None:
    """Raises ValueError where the parts of a file do not fit each other, or a number cannot be."""
    tokens, weight, unit = encoder.tokens, encoder.policy_weight, encoder.unit
    if type(tokens) is not int or tokens < 1 or tokens * TOKEN_WIDTH != len(encoder.mean):
        raise ValueError(f"tokens={tokens!r:.50}: expected {len(encoder.mean) / TOKEN_WIDTH:g}")
    for name, value in (("policy_weight", weight), ("unit", unit)):
        if type(value) not in (int, float) or not 0 <= value < 1e30 or (name == "unit" and not value):
            raise ValueError(f"{name}={value!r:.50}: expected a number above 0")
    frames, wide = len(chunks), encoder.basis.shape[-1]
    if chunks.ndim != 3 or not chunks.numel():
        raise ValueError(f"chunks are {tuple(chunks.shape)}: expected (M,H,A)")
    expected = {
        "projection": (encoder.projection, (len(encoder.projection), TOKEN_WIDTH), torch.float32),
        "mean": (encoder.mean, (tokens * TOKEN_WIDTH,), torch.float32),
        "basis": (encoder.basis, (tokens * TOKEN_WIDTH, wide), torch.float32),
        "keys": (keys, (frames, wide + chunks.shape[1] * chunks.shape[2]), torch.float16),
        "chunks": (chunks, tuple(chunks.shape), torch.float32),
        "episodes": (episodes, (frames,), torch.int64),
    }
    for name, (tensor, shape, dtype) in expected.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, expected {shape} {dtype}")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} has numbers that are not finite")
    if statistics.action.dim != chunks.shape[2]:
        raise ValueError(f"statistics of {statistics.action.dim} dimensions for chunks {tuple(chunks.shape)}")


def _require_finite(before: int, episodes: Tensor, parts: dict[str, Tensor]) -> None:
    """Raises ValueError naming the first frame of a batch that is not finite, which no PCA can be fitted on."""
    for name, value in parts.items():
        bad = ~value.flatten(1).isfinite().all(1)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"frame {before + row}, of episode {int(episodes[row])}: the {name} is not finite, and nothing can be "
                "remembered by it: see to the policy's weights (vla-energy doctor)"
            )


def check_memory(memory: ChunkMemory, horizon: int, action_dim: int, context_dim: int) -> None:
    """Raises ValueError where H, A or D is not the memory's."""
    asked = {"horizon": horizon, "action_dim": action_dim, "context_dim": context_dim}
    built = (*memory.chunks.shape[1:], len(memory.encoder.projection))
    for (name, value), own in zip(asked.items(), built, strict=True):
        if value != own:
            raise ValueError(f"{name} is {value} here, the memory was built with {own}: build it again")


def _pca(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mean `(F,)` and the directions of largest variance `(F,K)`, K at most `KEY_WIDTH`."""
    some = rows[torch.randperm(len(rows), generator=generator)[:_PCA_ROWS]]
    mean = some.mean(0)
    _, _, directions = torch.linalg.svd(some - mean, full_matrices=False)
    return mean, directions[:KEY_WIDTH].T.contiguous()


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError("retrieval needs faiss: pip install 'vla-energy[retrieval]'") from error
    return faiss
