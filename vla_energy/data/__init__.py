"""Demonstrations: RLDS reading, dataset conventions, statistics, augmentation, the Meta-World builder.

Names are resolved on first use: simulator processes import `metaworld_env` from here and need neither
torch nor TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vla_energy.data.datasets import DatasetConfig, DatasetError, dataset_config
    from vla_energy.data.rlds import RldsDataset

__all__ = ["DatasetConfig", "DatasetError", "RldsDataset", "dataset_config"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "rlds" if name == "RldsDataset" else "datasets"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
