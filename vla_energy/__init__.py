"""An energy head for vision-language-action models: trained beside the fine-tune, used to choose among candidates."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vla_energy import losses
    from vla_energy.config import EnergyConfig
    from vla_energy.head import EnergyHead
    from vla_energy.rerank import Reranker

__all__ = ["EnergyConfig", "EnergyHead", "Reranker", "losses"]

_HOMES = {"EnergyConfig": "vla_energy.config", "EnergyHead": "vla_energy.head", "Reranker": "vla_energy.rerank"}


def __getattr__(name: str) -> Any:
    # On first use, as simulator processes and `vla-energy --help` import this package without torch.
    if name == "losses":
        return importlib.import_module("vla_energy.losses")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
