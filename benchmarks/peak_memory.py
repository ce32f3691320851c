"""Peak memory of the in-batch loss, forward and backward, above its inputs: with row blocks, without, and naive.

    python benchmarks/peak_memory.py [--quick] [--heads 2] [--threads 1] [--out runs/bench/peak_memory.json]

The shapes and steps of `loss.py`, each number of a fresh process: two steps of ours, one of the naive twin, which is
measured at the smallest B alone: it grows with B * B. The head's gradients are in it, its weights are not.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loss import QUICK, Shape, inputs, make_head, make_naive, naive_step, step
from timing import write

from vla_energy.config import HeadConfig

ARMS = ("row blocks", "one block", "naive")


def peak_above(run: Callable[[], object]) -> float:
    """MiB by which this process's largest resident size exceeds its size before `run`.

    The largest size is of the whole life of the process: what was larger before `run` counts too, so this can be too
    much, never too little. Linux.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before = pages * os.sysconf("SC_PAGE_SIZE")
    run()
    return (1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20


def measure_here(arm: str, shape: Shape, batch: int, heads: int) -> float:
    """MiB of two steps in this process."""
    given = inputs(shape, batch)
    if arm == "naive":
        scorer = make_naive(shape)
        return peak_above(lambda: naive_step(scorer, *given))
    head = make_head(shape, heads, block_mib=0 if arm == "one block" else None)
    return peak_above(lambda: [step(head, *given) for _ in range(2)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, B=4 and 8")
    parser.add_argument("--heads", type=int, default=HeadConfig().num_heads)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", nargs=2, metavar=("ARM", "B"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/peak_memory.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = QUICK if args.quick else Shape()
    if args.child:
        print(measure_here(args.child[0], shape, int(args.child[1]), args.heads))
        return
    result: dict[str, Any] = {"shape": vars(shape), "heads": args.heads, "block_mib": HeadConfig().block_mib, "mib": {}}
    print(f"| B | {' | '.join(f'{arm}, MiB' for arm in ARMS)} |\n|---|---|---|---|")
    for batch in (4, 8) if args.quick else (8, 16, 64):
        found: dict[str, float] = {}
        for arm in ARMS[: 1 if batch > 16 else 2] if result["mib"] else ARMS:
            command = [sys.executable, __file__, *sys.argv[1:], "--child", arm, str(batch)]
            found[arm] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        result["mib"][str(batch)] = found
        print(f"| {batch} | {' | '.join(f'{found[arm]:.0f}' if arm in found else '' for arm in ARMS)} |", flush=True)
    write(args.out, result)


if __name__ == "__main__":
    main()
