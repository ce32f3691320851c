"""CPU seconds of the head against B, N and S, one thread: what `docs/benchmarks.md` draws.

    python benchmarks/shapes.py [--quick] [--out runs/bench/shapes.json]

- B: the in-batch loss, forward and backward, B contexts with all B chunks each; beside the original head, which copies
  a context for each of the B x B pairs (up to B=4, as it needs minutes and gigabytes beyond).
- N: the energies of N candidates in one encoded context, and with the encoding.
- S: the in-batch loss at B=8 for contexts of S tokens.

Contexts of 600 tokens of width 4096 where nothing else is said, random. Medians; sizes go in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vla_energy.config import EnergyConfig
from vla_energy.head import EnergyHead
from vla_energy.losses import logits_of

HORIZON, DIMS = 8, 7
Runs = dict[str, dict[int, Callable[[], object]]]


def _context(rows: int, tokens: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(rows, tokens, width, generator=generator)
    chunks = torch.rand(rows, HORIZON, DIMS, generator=generator) * 2 - 1
    return context, torch.ones(rows, tokens, dtype=torch.bool), chunks


def _loss(head: EnergyHead, rows: int, tokens: int, width: int, *, copied: bool = False) -> Callable[[], object]:
    """Forward and backward of the in-batch loss."""
    context, mask, chunks = _context(rows, tokens, width)

    def run() -> None:
        head.zero_grad(set_to_none=True)
        if copied:
            pairs = head.encode(context.repeat_interleave(rows, 0), mask.repeat_interleave(rows, 0))
            energies = head(pairs, chunks.repeat(rows, 1, 1)[:, None]).view(rows, rows)
        else:
            # As training calls it: the head may read the raw tokens, which `encode` never does.
            energies = head((context, mask, chunks), chunks.expand(rows, -1, -1, -1))
        cross_entropy(logits_of(energies, 0.5), torch.arange(rows)).backward()

    return run


def _score(head: EnergyHead, count: int, tokens: int, width: int, *, encode: bool) -> Callable[[], object]:
    """Energies of `count` candidates of one context."""
    context, mask, chunks = _context(1, tokens, width)
    candidates = chunks[:, None] + 0.05 * torch.randn(1, count, HORIZON, DIMS)
    with torch.no_grad():
        kept = head.encode(context, mask, chunks)

    def run() -> None:
        with torch.no_grad():
            head(head.encode(context, mask, chunks) if encode else kept, candidates)

    return run


def runs(quick: bool) -> dict[str, Runs]:
    """What is timed, by axis, curve and size."""
    tokens, width = (40, 128) if quick else (600, 4096)
    config = EnergyConfig()
    config.head.hidden_dim = 64 if quick else 512
    ours = EnergyHead(width, DIMS, HORIZON, config)
    original = EnergyHead(width, DIMS, HORIZON, EnergyConfig.preset("original"))
    return {
        "B": {
            "ours": {rows: _loss(ours, rows, tokens, width) for rows in (2, 4, 8, 16)},
            "original, copied contexts": {rows: _loss(original, rows, tokens, width, copied=True) for rows in (2, 4)},
        },
        "N": {
            "context encoded": {n: _score(ours, n, tokens, width, encode=False) for n in (1, 4, 16, 64, 256)},
            "with the encoding": {n: _score(ours, n, tokens, width, encode=True) for n in (1, 4, 16, 64, 256)},
        },
        "S": {"ours, B=8": {s: _loss(ours, 8, s, width) for s in (75, 150, 300, 600, 1200)}},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small contexts and one round: runs, and says nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/shapes.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rounds = 1 if args.quick else 5
    result: dict[str, dict[str, dict[str, float]]] = {}
    for axis, curves in runs(args.quick).items():
        taken = {(curve, size): [] for curve, sizes in curves.items() for size in sizes}
        for index in range(rounds + 1):
            for (curve, size), seconds in taken.items():
                started = time.process_time()
                curves[curve][size]()
                if index:
                    seconds.append(time.process_time() - started)
        result[axis] = {curve: {} for curve in curves}
        for (curve, size), seconds in taken.items():
            result[axis][curve][str(size)] = statistics.median(seconds)
            print(f"{axis}={size:<5} {curve:<26} {1e3 * result[axis][curve][str(size)]:10.1f} ms", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
