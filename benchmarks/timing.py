"""Timing side by side, and the limit: the matrix products of a call, alone, on this machine."""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Runs = Mapping[str, Callable[[], object]]
_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default}


def medians(runs: Runs, rounds: int, often: Mapping[str, int] | None = None) -> dict[str, dict[str, float]]:
    """`{"cpu": seconds, "wall": seconds}` of each run, all in turns, so that other load meets all of them alike.

    Args:
        runs: what to time, by name.
        rounds: of all; one more comes first and is not counted.
        often: how many times a run goes in each round; once without.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for index in range(rounds + 1):
        for name, run in runs.items():
            for _ in range((often or {}).get(name, 1)):
                cpu, wall = time.process_time(), time.perf_counter()
                run()
                if index:
                    taken[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return {
        name: {kind: statistics.median(value[place] for value in values) for place, kind in enumerate(("cpu", "wall"))}
        for name, values in taken.items()
    }


class _Recorder(TorchDispatchMode):
    """Keeps each matrix product's operator and the shapes and strides of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[Any, list[tuple[Any, ...]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            self.products.append((func, [(tuple(x.shape), x.stride(), x.dtype) for x in args]))
        return func(*args, **(kwargs or {}))


def products_of(run: Callable[[], object]) -> tuple[Callable[[], object], float]:
    """What is left of `run` when only its matrix products are made, at the same shapes, and their FLOPs.

    No program that makes these products is faster than that, so this is `FLOPs / (the machine's rate at these shapes)`.
    """
    with _Recorder() as recorder:
        run()
    flops = sum(2.0 * math.prod(operands[-2][0]) * operands[-1][0][-1] for _, operands in recorder.products)
    tensors: dict[tuple[Any, ...], Tensor] = {}
    for _, operands in recorder.products:
        for shape, stride, dtype in operands:
            if (shape, stride, dtype) not in tensors:
                blank = torch.empty_strided(shape, stride, dtype=dtype)
                tensors[shape, stride, dtype] = blank.fill_(0.5)
    calls = [(func, [tensors[operand] for operand in operands]) for func, operands in recorder.products]

    def replay() -> None:
        with torch.no_grad():
            for func, operands in calls:
                func(*operands)

    return replay, flops


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """The result as JSON, with the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
