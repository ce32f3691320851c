"""Peak memory of a call above what was there before it, of the process itself; for children of the benchmarks."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path


def peak_above(run: Callable[[], object]) -> float:
    """MiB by which this process's largest resident size exceeds its size before `run`.

    The largest size is of the whole life of the process: what was larger before `run` counts too, so this can be too
    much, never too little. Linux.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before = pages * os.sysconf("SC_PAGE_SIZE")
    run()
    return (1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
