"""Vision towers that timm has to know by name before a model is built: ours, and users' own."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

OURS = Path(__file__).parents[1] / "backbones" / "timm_models.py"
"""Loaded by its file: the package around it needs more than openvla-oft's pins have."""
REMEDY = (
    "give --towers MODULE:FUNCTION or --towers FILE.py:FUNCTION, a function that registers them "
    "(timm.models.register_model)"
)


def call(name: str) -> None:
    """Calls the function that `--towers` names, `MODULE:FUNCTION` or `FILE.py:FUNCTION`.

    Raises:
        ValueError: there is none.
    """
    place, _, function = name.rpartition(":")
    try:
        module = _load(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        target = getattr(module, function)
    except (ImportError, AttributeError, OSError, ValueError) as error:
        raise ValueError(f"--towers {name}: expected MODULE:FUNCTION or FILE.py:FUNCTION ({error})") from error
    target()


def register_ours() -> None:
    """The towers of the tiny checkpoint, for a model that asks timm for them."""
    _load(OURS).register()


def unknown(config: dict[str, Any]) -> list[str]:
    """Towers of a `config.json` that neither timm nor this package has."""
    timm = importlib.import_module("timm")
    names = [str(name) for name in config.get("timm_model_ids", ())]
    return [name for name in names if not timm.is_model(name) and name not in _load(OURS).OWN_MODELS]


def _load(path: Path) -> ModuleType:
    name = f"vla_energy_towers_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # timm looks a tower's module up
    spec.loader.exec_module(module)
    return module
