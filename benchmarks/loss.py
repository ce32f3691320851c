"""The in-batch loss at the width of a 7B model, forward and backward, beside what it replaces and beside the limit.

    python benchmarks/loss.py [--quick] [--heads 2] [--threads 1] [--profile] [--out runs/bench/loss.json]

B contexts of 600 tokens of width 4096, each with all B chunks; InfoNCE; gradients of all weights of the head. The arms:

- ours: the head as it trains, in fp32; and with `head.context_dtype=bfloat16`.
- ours, copied: our head, but every pair has a copy of its context: what is left is the gain of the architecture.
- naive: the original head, every pair a copy of its context, as its loss had it.
- projection: features of every context and the gradient of their weight, two products, and nothing else. A head that
  projects each context cannot be faster; ours can, as it does not where queries are few.
- ours, products: the matrix products of ours, at the same shapes, and nothing else.

All arms go in turns in one run, and ratios are of medians of CPU time, with those of wall time in brackets: other load
on the machine moves absolute times, not these. `--quick` is small enough for CI, and says nothing about speed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timing import medians, products_of, write
from torch import Tensor

from vla_energy.config import EnergyConfig, HeadConfig
from vla_energy.head import EnergyHead
from vla_energy.losses import info_nce
from vla_energy.original import OriginalScorer
from vla_energy.ranges import apply_range

TEMPERATURE = 0.5


@dataclass(frozen=True)
class Shape:
    """Tokens S, their width D, and the chunk and head."""

    tokens: int = 600
    width: int = 4096
    hidden: int = 512
    horizon: int = 8
    dims: int = 7


QUICK = Shape(tokens=40, width=256, hidden=64)


def inputs(shape: Shape, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Contexts `(B,S,D)`, mask `(B,S)`, and `(B,B,H,A)`: each row's own chunk first, then the other rows'."""
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(batch, shape.tokens, shape.width, generator=generator)
    chunks = torch.rand(batch, shape.horizon, shape.dims, generator=generator) * 2 - 1
    order = (torch.arange(batch)[:, None] + torch.arange(batch)) % batch
    return context, torch.ones(batch, shape.tokens, dtype=torch.bool), chunks[order]


def make_head(shape: Shape, heads: int, context_dtype: str = "float32", block_mib: int | None = None) -> EnergyHead:
    """Ours, with random weights."""
    torch.manual_seed(0)
    config = HeadConfig(hidden_dim=shape.hidden, num_heads=heads, context_dtype=context_dtype)
    config.block_mib = config.block_mib if block_mib is None else block_mib
    return EnergyHead(shape.width, shape.dims, shape.horizon, EnergyConfig(head=config))


def make_naive(shape: Shape) -> OriginalScorer:
    """The original's, with random weights."""
    torch.manual_seed(0)
    return OriginalScorer(shape.width, shape.dims, shape.horizon, EnergyConfig.preset("original"))


def step(head: EnergyHead, context: Tensor, mask: Tensor, actions: Tensor) -> None:
    """Forward and backward of our loss: InfoNCE, and the centre's own, so that every weight has a gradient."""
    head.zero_grad()
    output = head((context, mask), actions, training_output=True)
    centres = torch.stack([(centre - actions[:, 0]).abs().mean() for centre in output.centres]).sum()
    (info_nce(output.energies, TEMPERATURE) + centres).backward()


def copied_step(head: EnergyHead, context: Tensor, mask: Tensor, actions: Tensor) -> None:
    """`step` with a copy of its context for every chunk."""
    head.zero_grad()
    batch = len(actions)
    copies = context.repeat_interleave(batch, 0), mask.repeat_interleave(batch, 0)
    output = head(copies, actions.flatten(0, 1)[:, None], training_output=True)
    own = actions[:, 0].repeat_interleave(batch, 0)
    centres = torch.stack([(centre - own).abs().mean() for centre in output.centres]).sum()
    (info_nce(output.energies.view(batch, batch), TEMPERATURE) + centres).backward()


def naive_step(scorer: OriginalScorer, context: Tensor, mask: Tensor, actions: Tensor) -> None:
    """The original's loss as it was computed: B*B copies of contexts through its head."""
    scorer.zero_grad()
    batch = len(actions)
    copies = scorer.state_linear(context.repeat_interleave(batch, 0))
    queries = scorer.dropout(scorer.action_linear(actions.flatten(0, 1)) + scorer.positions)
    ignored = ~mask.repeat_interleave(batch, 0)
    answers, _ = scorer.cross(queries, copies, copies, key_padding_mask=ignored, need_weights=False)
    raw = scorer.prediction_head(answers.mean(1)).view(batch, batch)
    info_nce(apply_range(raw, scorer.config.range), TEMPERATURE).backward()


def projection(shape: Shape, batch: int) -> Callable[[], object]:
    """The two products that projecting each context cannot do without: features, and the weight's gradient."""
    context, weight = torch.randn(batch * shape.tokens, shape.width), torch.randn(shape.hidden, shape.width)
    gradient = torch.randn(batch * shape.tokens, shape.hidden)
    return lambda: (context @ weight.T, gradient.T @ context)


def measure(shape: Shape, batch: int, heads: int, rounds: int) -> dict[str, Any]:
    """Seconds, FLOPs and ratios at one batch size."""
    given, naive = inputs(shape, batch), make_naive(shape)
    head, half = make_head(shape, heads), make_head(shape, heads, "bfloat16")
    products, flops = products_of(lambda: step(head, *given))
    found = medians(
        {
            "ours": lambda: step(head, *given),
            "ours, bf16": lambda: step(half, *given),
            "ours, products": products,
            "projection": projection(shape, batch),
            "ours, copied": lambda: copied_step(head, *given),
            "naive": lambda: naive_step(naive, *given),
        },
        rounds,
        {"ours": 4, "ours, bf16": 4, "ours, products": 4, "projection": 2},
    )
    wide = 4 * batch * shape.tokens * shape.width * shape.hidden
    ratios = {
        kind: {name: found["naive"][kind] / seconds[kind] for name, seconds in found.items()}
        for kind in ("cpu", "wall")
    }
    limits = {name: found["ours"]["cpu"] / found[name]["cpu"] for name in ("projection", "ours, products")}
    return {
        "seconds": found,
        "naive_over": ratios,
        "ours_over": limits,
        "gflop": {"ours": flops / 1e9, "projection": wide / 1e9},
        "gflop_per_second": {
            "ours, products": flops / 1e9 / found["ours, products"]["cpu"],
            "projection": wide / 1e9 / found["projection"]["cpu"],
        },
        "rounds": rounds,
    }


def print_profile(shape: Shape, batch: int, heads: int) -> None:
    """Where a step of ours spends its time, by operation."""
    given, head = inputs(shape, batch), make_head(shape, heads)
    step(head, *given)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(head, *given)
    table = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=10, max_name_column_width=32)
    print(f"B={batch}", table, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes and B=4")
    parser.add_argument("--heads", type=int, default=HeadConfig().num_heads, help="attention heads of ours")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/loss.json"))
    parser.add_argument("--profile", action="store_true", help="only print where a step of ours spends its time")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = QUICK if args.quick else Shape()
    if args.profile:
        for batch in (4,) if args.quick else (8, 16):
            print_profile(shape, batch, args.heads)
        return
    result: dict[str, Any] = {"shape": vars(shape), "heads": args.heads, "batches": {}}
    print("| B | arm | CPU s | naive over it (by wall) |\n|---|---|---|---|")
    for batch, rounds in ({4: 2} if args.quick else {8: 4, 16: 2}).items():
        found = result["batches"][str(batch)] = measure(shape, batch, args.heads, rounds)
        for name, seconds in found["seconds"].items():
            by_cpu, by_wall = (found["naive_over"][kind][name] for kind in ("cpu", "wall"))
            print(f"| {batch} | {name} | {seconds['cpu']:.3f} | {by_cpu:.1f} ({by_wall:.1f}) |", flush=True)
        for name, ratio in found["ours_over"].items():
            rate = found["gflop_per_second"][name]
            print(f"B={batch}: ours takes {ratio:.2f} times '{name}' ({rate:.0f} GFLOP a second)")
    write(args.out, result)


if __name__ == "__main__":
    main()
