"""What openvla-oft's torch 2.2 does not go together with, whatever pip has allowed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from vla_energy.doctor.environment import installed, number
from vla_energy.doctor.findings import Finding, Subject

FOR_NUMPY_2 = (2, 3)
"""The first torch that was built for numpy 2; 2.2 has no arrays then ("Numpy is not available")."""
NATIVE_MAJOR = 5
"""Of the transformers that our backbone runs on."""
CORE = "the energy head, its training on features that are on disk, and reranking run on torch 2.2 too"


def old_torch(_subject: Subject) -> Iterator[Finding]:
    """Whether torch fits the installed numpy, and the installed transformers where that is our backbone's."""
    torch, numpy, transformers = (installed(name) for name in ("torch", "numpy", "transformers"))
    on_host = transformers is not None and number(transformers) < (NATIVE_MAJOR,)
    old = torch is not None and number(torch) < FOR_NUMPY_2
    if old and numpy is not None and number(numpy) >= (2,) and not on_host:  # the host's pins say it themselves
        yield Finding(
            "torch and numpy", "problem", f"torch {torch} was built for numpy 1, installed is {numpy}",
            "tensor.numpy() and torch.from_numpy fail: datasets, statistics and the head's actions cannot be read",
            "pip install 'numpy<2', or torch 2.3 or newer",
        )  # fmt: skip
    if transformers is None or on_host:
        return
    if takes_torch():
        yield Finding("torch and transformers", "ok", f"transformers {transformers} runs on torch {torch}")
    else:
        yield Finding(
            "torch and transformers", "problem", f"transformers {transformers} switches torch {torch} off: too old",
            f"our backbone cannot be imported, so no checkpoint can be run or examined here; {CORE}",
            "our backbone in an environment of its own: pip install -U torch 'vla-energy[native]'; openvla-oft's model "
            "with its fork of transformers (4.40.1)",
        )  # fmt: skip


def takes_torch() -> bool:
    """Whether the installed transformers uses the installed torch: it asks for more from release to release."""
    transformers: Any = importlib.import_module("transformers.utils")
    return bool(transformers.is_torch_available())
