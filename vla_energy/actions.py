"""The action space: statistics, normalisation, and the line between robot units and the library's.

Inside the library an action chunk is a `torch.Tensor` `(..., H, A)` in *normalised* units. In robot
units a chunk only ever exists as `RawActions`, which is no tensor: handing it to a head, a loss or a
reranker fails at once. A head once trained on normalised chunks and scored on raw ones cost its
authors half their success rate; the types are there so that it cannot happen again.

Normalisation is the host's BOUNDS_Q99: `2 (x - q01) / (q99 - q01 + 1e-8) - 1`, clipped to [-1, 1], on
the dimensions of the mask (openvla-oft, `normalize_action_and_proprio`); other dimensions, such as a
binary gripper, pass unchanged.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_energy.results import require_regular

_EPSILON = 1e-8
_LARGEST = 1e30
_FIELDS = ("mean", "std", "min", "max", "q01", "q99")


class StatisticsError(ValueError):
    """Dataset statistics are missing, malformed, or not those that were asked for."""


@dataclass(frozen=True)
class RawActions:
    """Actions in the robot's units.

    Attributes:
        values: `(..., A)` float64.
    """

    values: np.ndarray

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        # torch.as_tensor(raw) would otherwise read the values silently through this very protocol.
        raise TypeError("raw actions are in robot units; call statistics.normalize(raw), or take raw.values")


@dataclass(frozen=True)
class FieldStatistics:
    """Per-dimension statistics of one field (action or proprio), each `(dims,)` float64.

    Attributes:
        mask: `(dims,)` bool, True where the dimension is normalised.
    """

    mean: np.ndarray
    std: np.ndarray
    min: np.ndarray
    max: np.ndarray
    q01: np.ndarray
    q99: np.ndarray
    mask: np.ndarray

    @property
    def dim(self) -> int:
        """Number of dimensions."""
        return len(self.q01)

    @classmethod
    def of(cls, values: np.ndarray, mask: np.ndarray | None = None) -> FieldStatistics:
        """Statistics of `values (n, dims)`; `mask` defaults to all True."""
        values = np.asarray(values, np.float64)
        q01, q99 = np.quantile(values, (0.01, 0.99), axis=0)
        mask = np.ones(values.shape[1], bool) if mask is None else np.asarray(mask, bool)
        return cls(values.mean(0), values.std(0), values.min(0), values.max(0), q01, q99, mask)

    @classmethod
    def from_dict(cls, data: Any, where: str) -> FieldStatistics:
        """Reads the host's JSON layout; `where` names the field in errors.

        Raises:
            StatisticsError: a key is missing, lengths differ, a value is not finite, or q01 > q99.
        """
        if not isinstance(data, dict):
            raise StatisticsError(f"{where}: expected an object with {', '.join(_FIELDS)}")
        missing = [key for key in _FIELDS if key not in data]
        if missing:
            raise StatisticsError(f"{where}: missing {', '.join(missing)}")
        try:
            arrays = {key: np.asarray(data[key], np.float64) for key in _FIELDS}
            mask = np.asarray(data.get("mask", np.ones(arrays["q01"].shape)), bool)
        except (TypeError, ValueError, OverflowError) as error:
            raise StatisticsError(f"{where}: not a list of numbers ({error})") from error
        for key, array in arrays.items():
            if array.ndim != 1 or array.shape != mask.shape or not array.size:
                raise StatisticsError(f"{where}.{key}: shape {array.shape}, expected {mask.shape}")
            if not np.isfinite(array).all():
                raise StatisticsError(f"{where}.{key}: not finite at dimension {int(np.argmin(np.isfinite(array)))}")
            if (np.abs(array) > _LARGEST).any():
                found = array[np.argmax(np.abs(array))]
                raise StatisticsError(
                    f"{where}.{key}: {found:g} is more than fp32 can be normalised with, {_LARGEST:g}"
                )
        if (arrays["q01"] > arrays["q99"]).any():
            raise StatisticsError(f"{where}: q01 > q99 at dimension {int(np.argmax(arrays['q01'] > arrays['q99']))}")
        return cls(**arrays, mask=mask)

    def to_dict(self) -> dict[str, Any]:
        """The host's JSON layout."""
        return {**{key: getattr(self, key).tolist() for key in _FIELDS}, "mask": self.mask.tolist()}

    def _bounds(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, high = (torch.as_tensor(array, dtype=like.dtype, device=like.device) for array in (self.q01, self.q99))
        return low, high, torch.as_tensor(self.mask, device=like.device)

    def _check(self, last: int) -> None:
        if last != self.dim:
            raise StatisticsError(f"got {last} dimensions, the statistics have {self.dim}")

    def normalize(self, values: Tensor) -> Tensor:
        """BOUNDS_Q99 of `values (..., dims)`, clipped to [-1, 1]; a dimension with min = max becomes 0."""
        self._check(values.shape[-1])
        low, high, mask = self._bounds(values)
        scaled = (2 * (values - low) / (high - low + _EPSILON) - 1).clamp(-1, 1)
        constant = torch.as_tensor(self.min == self.max, device=values.device)
        return torch.where(mask, torch.where(constant, torch.zeros_like(scaled), scaled), values)

    def unnormalize(self, values: Tensor) -> Tensor:
        """Inverse of `normalize` up to its clipping; computed in the dtype of `values`."""
        self._check(values.shape[-1])
        low, high, mask = self._bounds(values)
        return torch.where(mask, 0.5 * (values + 1) * (high - low + _EPSILON) + low, values)


@dataclass(frozen=True)
class DatasetStatistics:
    """Statistics of one dataset in the host's JSON layout."""

    action: FieldStatistics
    proprio: FieldStatistics | None
    num_transitions: int
    num_trajectories: int

    @classmethod
    def from_dict(cls, data: Any, where: str = "statistics") -> DatasetStatistics:
        """Raises StatisticsError naming the offending key."""
        if not isinstance(data, dict) or "action" not in data:
            raise StatisticsError(f"{where}: expected an object with 'action' (and 'proprio')")
        proprio = data.get("proprio")
        counts = [data.get(name, 0) for name in ("num_transitions", "num_trajectories")]
        if not all(type(count) in (int, float) and 0 <= count < 2**63 for count in counts):
            raise StatisticsError(
                f"{where}: num_transitions and num_trajectories are {counts!r:.200}, expected numbers"
            )
        return cls(
            FieldStatistics.from_dict(data["action"], f"{where}.action"),
            None if proprio is None else FieldStatistics.from_dict(proprio, f"{where}.proprio"),
            int(counts[0]),
            int(counts[1]),
        )

    def to_dict(self) -> dict[str, Any]:
        """The host's JSON layout; without proprio the key is left out."""
        proprio = {} if self.proprio is None else {"proprio": self.proprio.to_dict()}
        counts = {"num_transitions": self.num_transitions, "num_trajectories": self.num_trajectories}
        return {"action": self.action.to_dict(), **proprio, **counts}

    def normalize(self, raw: RawActions) -> Tensor:
        """Robot units to a float32 tensor of the same shape."""
        return self.action.normalize(torch.as_tensor(raw.values, dtype=torch.float64)).float()

    def unnormalize(self, actions: Tensor) -> RawActions:
        """Normalised actions `(..., A)` to robot units in float64."""
        return RawActions(self.action.unnormalize(actions.detach().cpu().double()).numpy())


def load_statistics(path: str | Path) -> dict[str, DatasetStatistics]:
    """Reads `dataset_statistics.json`: one entry a dataset.

    Raises:
        StatisticsError: the file is missing, is not JSON, or has a malformed entry; the message names the file.
    """
    path = Path(path)
    try:
        require_regular(path)
        data = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise StatisticsError(f"{path} not found: it is written by fine-tuning beside the checkpoint") from error
    except (ValueError, RecursionError) as error:
        raise StatisticsError(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        raise StatisticsError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict) or not data:
        raise StatisticsError(f"{path}: expected an object with one entry a dataset")
    return {name: DatasetStatistics.from_dict(entry, f"{path}: {name}") for name, entry in data.items()}


def select_statistics(statistics: dict[str, DatasetStatistics], name: str | None) -> DatasetStatistics:
    """The entry called `name`, or the only one if `name` is None.

    Raises:
        StatisticsError: no such entry (the message lists those there are), or None with several.
    """
    if name is None and len(statistics) == 1:
        return next(iter(statistics.values()))
    if name is None or name not in statistics:
        raise StatisticsError(f"no statistics for {name!r}; there are: {', '.join(sorted(statistics))}")
    return statistics[name]
