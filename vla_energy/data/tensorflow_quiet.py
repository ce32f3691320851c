"""The one place that imports TensorFlow: late, quiet, and blind to GPUs."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any


class DataDependencyError(ImportError):
    """TensorFlow or tensorflow-datasets is missing."""


def _import(name: str) -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataDependencyError(f"{name} is missing: pip install 'vla-energy[data]'") from error


def require() -> None:
    """Raises DataDependencyError if TensorFlow or tensorflow-datasets is not installed; imports neither."""
    for name in ("tensorflow", "tensorflow_datasets"):
        if importlib.util.find_spec(name) is None:
            raise DataDependencyError(f"{name} is missing: pip install 'vla-energy[data]'")


def tf() -> Any:
    """The tensorflow module; it never claims a GPU, which belongs to torch."""
    tensorflow = _import("tensorflow")
    tensorflow.config.set_visible_devices([], "GPU")
    return tensorflow


def tfds() -> Any:
    """The tensorflow_datasets module, with tensorflow already confined to the CPU.

    Raises:
        DataDependencyError: the `data` extra is not installed.
    """
    tf()
    return _import("tensorflow_datasets")
