"""Versions, device, and whether attention can be differentiated twice."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from vla_energy.config import EnergyConfig
from vla_energy.doctor.findings import Finding, Subject
from vla_energy.head import EnergyHead


class Known(NamedTuple):
    """Versions of a package that are known to work, and what another one costs.

    Attributes:
        low, high: `low <= version < high`; empty is no bound.
        cost: of a version outside.
        fatal: whether a version outside surely fails.
    """

    low: str
    high: str
    cost: str
    fatal: bool = False


_BREAKS = "openvla-oft leaves this package without a pin, and today's releases break its imports"
_CAUSAL = "attention may be causal, which takes LIBERO success from 97 to about 55 percent"
_REFUSES = "the model refuses to be built with another timm"

EVERYWHERE = {"torch": Known("2.2", "", "the core needs torch 2.2", True)}
HOST = {
    "transformers": Known("4.40.1", "4.40.2", _CAUSAL),
    "tokenizers": Known("0.19.1", "0.19.2", "openvla-oft warns of regressions at inference"),
    "timm": Known("0.9.10", "0.9.17", _REFUSES, True),
    "peft": Known("0.11.1", "0.12", "adapters of other releases may not load"),
    "numpy": Known("1.24", "2", "torch 2.2 and tensorflow 2.15 were built for numpy 1 and fail with 2", True),
    "draccus": Known("0.8.0", "0.9", "the host's flags were written for draccus 0.8"),
    "huggingface-hub": Known("", "0.26", _BREAKS),
    "diffusers": Known("", "0.31", _BREAKS),
    "tensorflow": Known("2.15.0", "2.16", "the host's data reading was written for tensorflow 2.15"),
    "tensorflow-datasets": Known("4.9.3", "4.9.4", "the host's data reading was written for 4.9.3"),
    "tensorflow-metadata": Known("", "1.16", _BREAKS),
    "protobuf": Known("", "3.21", _BREAKS),
    "wandb": Known("", "0.18", _BREAKS),
}
"""openvla-oft at commit 213c5ff8, as measured; transformers 4.40.1 means its fork."""
_EXTRA = "our backbone was written for newer ones"
NATIVE = {
    "transformers": Known("5", "", _EXTRA, True),
    "tokenizers": Known("0.20", "", _EXTRA),
    "timm": Known("1.0", "", _EXTRA, True),
    "peft": Known("0.17", "", _EXTRA),
    "torchvision": Known("0.17", "", _EXTRA),
    "huggingface-hub": Known("0.30", "", _EXTRA),
}
"""The `native` extra."""


def versions(_subject: Subject) -> Iterator[Finding]:
    """Python and the packages of the stack that the installed transformers belongs to."""
    transformers = installed("transformers")
    on_host = transformers is not None and number(transformers) < (5,)
    stack = HOST if on_host else NATIVE
    found = {name: installed(name) for name in {**EVERYWHERE, **stack}}
    good = [f"Python {sys.version.split()[0]}"]
    for name, known in {**EVERYWHERE, **stack}.items():
        version = found[name]
        if version is None:
            continue
        if fits(version, known):
            good.append(f"{name} {version}")
        else:
            yield _unfit(name, version, known)
    if transformers is not None and (4, 50) <= number(transformers) < (5,):
        yield Finding(
            "transformers", "warning", f"{transformers} is stock and newer than the fork",
            "images can be dropped without a word from 4.50 on: the policy drives blind",
            "look at the findings on cameras below; install the fork, or transformers 5 for our backbone",
        )  # fmt: skip
    missing = [name for name, version in found.items() if version is None]
    label = "openvla-oft's pins" if on_host else "our backbone's packages"
    yield Finding("versions", "ok", f"{label}: {', '.join(good)}")
    if missing:
        remedy = "the host's requirements" if on_host else "pip install 'vla-energy[native]'"
        yield Finding("packages", "not checked", f"not installed: {', '.join(missing)}", remedy=remedy)


def _unfit(name: str, version: str, known: Known) -> Finding:
    bounds = [f">={known.low}"] if known.low else []
    bounds += [f"<{known.high}"] if known.high else []
    wanted = ",".join(bounds)
    text = f"{name} {version}; known to work: {wanted}"
    return Finding(name, "problem" if known.fatal else "warning", text, known.cost, f"pip install '{name}{wanted}'")


def fits(version: str, known: Known) -> bool:
    """Whether a version lies within the bounds."""
    found = number(version)
    return (not known.low or found >= number(known.low)) and (not known.high or found < number(known.high))


def installed(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def number(version: str) -> tuple[int, ...]:
    """The release as numbers, without trailing zeros: 2.2.0+cu121 is (2, 2)."""
    matched = re.match(r"\d+(\.\d+)*", version)
    parts = [int(part) for part in matched[0].split(".")] if matched else [0]
    while len(parts) > 1 and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def device(subject: Subject) -> Iterator[Finding]:
    """Whether the device that was asked for is there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [f"{torch.cuda.get_device_name(i)}, bf16 {torch.cuda.is_bf16_supported()}" for i in range(count)]
    if subject.device.startswith("cuda") and not count:
        yield Finding(
            "device", "problem", f"{subject.device} was asked for, but torch {torch.__version__} sees no GPU",
            "nothing runs, or all of it on the CPU", "install the driver and a torch built for it; see nvidia-smi",
        )  # fmt: skip
        return
    yield Finding("device", "ok", "; ".join(names) or f"CPU only, {torch.get_num_threads()} thread(s)")


BACKENDS = ("math", "efficient", "flash")


def kernels(_subject: Subject) -> Iterator[Finding]:
    """Each attention kernel: forward, backward, and backward of the gradient, on tiny shapes in fp32 and (GPU) bf16."""
    for kind, dtype in _places():
        place = kind if kind == "cpu" else f"{kind}, {str(dtype).removeprefix('torch.')}"
        outcomes = {name: differentiate(name, kind, dtype) for name in BACKENDS}
        broken = [name for name, outcome in outcomes.items() if "not finite" in outcome]
        text = f"{place}: " + "; ".join(f"{name}: {outcome}" for name, outcome in outcomes.items())
        if broken:
            yield Finding(
                "attention kernels", "problem", text, "training ends in NaN, or learns from wrong gradients",
                "switch the kernel off (torch.backends.cuda.enable_mem_efficient_sdp(False), enable_flash_sdp(False)), "
                "or take another torch",
            )  # fmt: skip
        elif outcomes["math"] != TWICE:
            yield Finding(
                "attention kernels", "problem", text, "no kernel of torch can be differentiated twice",
                "take another torch; the energy head itself needs none of them",
            )  # fmt: skip
        else:
            yield Finding("attention kernels", "ok", text)


TWICE = "finite twice"


def differentiate(backend: str, kind: str, dtype: torch.dtype) -> str:
    """What a kernel gives: `TWICE`, "no double backward", "not available", or what is "not finite".

    Args:
        backend: of `BACKENDS`.
        kind: device type.
        dtype: of the inputs.
    """
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 16, 16, generator=generator).to(kind, dtype) for _ in range(3))
    query.requires_grad_(True)
    try:
        with _only(backend):
            out = scaled_dot_product_attention(query, key, value)
    except RuntimeError:
        return "not available"
    (once,) = torch.autograd.grad(out.float().square().sum(), query, create_graph=True)
    if not (out.isfinite().all() and once.isfinite().all()):
        return "gradient not finite"
    try:
        with _only(backend):
            (twice,) = torch.autograd.grad(once.float().square().sum(), query)
    except RuntimeError:
        return "no double backward"
    return TWICE if twice.isfinite().all() else "second gradient not finite"


def head_gradients(_subject: Subject) -> Iterator[Finding]:
    """The energy head's gradient in the actions, and that gradient's: refinement and gradient penalties need them."""
    for kind in dict.fromkeys(kind for kind, _ in _places()):
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(0)
            head = EnergyHead(32, 7, 8, EnergyConfig()).to(kind).eval()
            actions = torch.randn(2, 3, 8, 7).to(kind).requires_grad_(True)
            energies = head((torch.randn(2, 5, 32).to(kind), torch.ones(2, 5, dtype=torch.bool, device=kind)), actions)
            (slope,) = torch.autograd.grad(energies.sum(), actions, create_graph=True)
            slope.square().sum().backward()
        grads = [actions.grad, *(parameter.grad for parameter in head.parameters())]
        finite = bool(slope.isfinite().all()) and all(bool(g.isfinite().all()) for g in grads if g is not None)
        if finite:
            yield Finding("gradient of the gradient", "ok", f"energy head on {kind}: finite")
        else:
            yield Finding(
                "gradient of the gradient", "problem", f"energy head on {kind}: not finite",
                "refinement walks to NaN and a gradient penalty ends training", "take another torch, or the CPU",
            )  # fmt: skip


def _places() -> list[tuple[str, torch.dtype]]:
    cuda = [("cuda", torch.float32), ("cuda", torch.bfloat16)] if torch.cuda.is_available() else []
    return [("cpu", torch.float32), *cuda]


def _only(backend: str) -> AbstractContextManager[object]:
    """Restricts attention to one kernel; torch 2.2 has another switch for it than later ones."""
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        switch: Callable[..., AbstractContextManager[object]] = torch.backends.cuda.sdp_kernel
        names = {"math": "enable_math", "efficient": "enable_mem_efficient", "flash": "enable_flash"}
        return switch(**{flag: name == backend for name, flag in names.items()})
    kernels_ = {
        "math": SDPBackend.MATH,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
    }
    return sdpa_kernel(kernels_[backend])
