"""The in-batch loss at the width of a 7B model, forward and backward, beside what it replaces and beside the limit.

    python benchmarks/loss.py [--quick] [--heads 2] [--threads 1] [--out runs/bench/loss.json]

B contexts of 600 tokens of width 4096, each with all B chunks; InfoNCE; gradients of all weights of the head. The arms:

- ours: the head as it trains, in fp32; and with `head.context_dtype=bfloat16`.
- ours, copied: our head, but every pair has a copy of its context: what is left is the gain of the architecture.
- naive: the original head, every pair a copy of its context, as its loss had it.

All arms and the machine's matmul rate are measured in turns in one run, and ratios are of medians of CPU time: other
load on the machine moves absolute times, not these. The limit is what a head must multiply that projects each context
once (weights' gradients included, the context's left out), divided by the rate measured at those shapes. `--quick` has
B=8 alone. Peak memory is of a child process each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peak_memory import peak_above
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vla_energy.config import EnergyConfig, HeadConfig
from vla_energy.head import EnergyHead
from vla_energy.losses import info_nce
from vla_energy.original import OriginalScorer
from vla_energy.ranges import apply_range

TOKENS, WIDTH, HORIZON, DIMS, HIDDEN = 600, 4096, 8, 7, 512
TEMPERATURE = 0.5


def inputs(batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Contexts `(B,S,D)`, mask `(B,S)`, and `(B,B,H,A)`: each row's own chunk first, then the other rows'."""
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(batch, TOKENS, WIDTH, generator=generator).to(dtype)
    chunks = torch.rand(batch, HORIZON, DIMS, generator=generator) * 2 - 1
    order = (torch.arange(batch)[:, None] + torch.arange(batch)) % batch
    return context, torch.ones(batch, TOKENS, dtype=torch.bool), chunks[order]


def make_head(heads: int, context_dtype: str = "float32") -> EnergyHead:
    torch.manual_seed(0)
    config = EnergyConfig(head=HeadConfig(hidden_dim=HIDDEN, num_heads=heads, context_dtype=context_dtype))
    return EnergyHead(WIDTH, DIMS, HORIZON, config)


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


def wide_products(batch: int) -> Callable[[], object]:
    """The two products that projecting each context once cannot do without: features, and the weights' gradient."""
    context, weight = torch.randn(batch * TOKENS, WIDTH), torch.randn(HIDDEN, WIDTH)
    return lambda: (context @ weight.T) is (torch.randn(1, HIDDEN).expand(batch * TOKENS, -1).T @ context)


def needed_flops(batch: int, heads: int) -> float:
    """Of a head that projects each context once, by formula; the context has no gradient, all else has two products.

    Features: 2 S D h forward, the same for the weight. Keys and values of reader and scorer: 2 * 2 S h 2h, times 3. Two
    attentions with H and N = B queries: 2 * 2 S h (H + N), times 3. The scorer's and reader's MLP, (N + 1) H tokens of
    2 * 4 h h, times 3. What is smaller than these is left out.
    """
    del heads  # the same for any number of them
    features = 2 * 2 * TOKENS * WIDTH * HIDDEN
    memories = 3 * 2 * 2 * TOKENS * HIDDEN * 2 * HIDDEN
    attention = 3 * 2 * 2 * TOKENS * HIDDEN * (HORIZON + batch)
    mlp = 3 * 2 * 4 * HIDDEN * HIDDEN * HORIZON * (batch + 1)
    return float(batch * (features + memories + attention + mlp))


def counted_flops(run: Callable[[], object]) -> float:
    """What the matrix products of `run` amount to, by PyTorch's counter."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def measure(batch: int, args: argparse.Namespace, rounds: int) -> dict[str, Any]:
    """Medians of CPU and wall seconds, FLOPs and ratios at one batch size."""
    batch_inputs, head = inputs(batch), make_head(args.heads)
    half = make_head(args.heads, "bfloat16")
    torch.manual_seed(0)
    naive = OriginalScorer(WIDTH, DIMS, HORIZON, EnergyConfig.preset("original"))
    products = wide_products(batch)
    often: dict[str, Callable[[], object]] = {
        "ours": lambda: step(head, *batch_inputs),
        "ours, bf16": lambda: step(half, *batch_inputs),
        "wide products": products,
    }
    seldom: dict[str, Callable[[], object]] = {
        "ours, copied": lambda: copied_step(head, *batch_inputs),
        "naive": lambda: naive_step(naive, *batch_inputs),
    }
    for run in often.values():
        run()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in (*often, *seldom)}
    for _ in range(rounds):
        for name, run in (*often.items(), *often.items(), *seldom.items(), *often.items()):
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            seconds[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    cpu = {name: statistics.median(value[0] for value in values) for name, values in seconds.items()}
    wall = {name: statistics.median(value[1] for value in values) for name, values in seconds.items()}
    rate = 2 * 2 * batch * TOKENS * WIDTH * HIDDEN / cpu["wide products"]
    flops = {"needed": needed_flops(batch, args.heads), "ours": counted_flops(often["ours"])}
    limit = flops["needed"] / rate
    names = [name for name in cpu if name != "wide products"]
    return {
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "gflops_per_second": rate / 1e9,
        "gflop": {name: value / 1e9 for name, value in flops.items()},
        "limit_seconds": limit,
        "naive_over": {name: cpu["naive"] / cpu[name] for name in names},
        "naive_over_by_wall": {name: wall["naive"] / wall[name] for name in names},
        "of_the_limit": {name: cpu[name] / limit for name in names},
        "rounds": {name: len(values) for name, values in seconds.items()},
    }


def child(args: argparse.Namespace) -> None:
    """Prints the peak memory of two steps above the inputs, in MiB."""
    head, batch_inputs = make_head(args.heads, args.child_dtype), inputs(args.child)
    print(json.dumps(peak_above(lambda: [step(head, *batch_inputs) for _ in range(2)])))


def peaks(args: argparse.Namespace, batches: tuple[int, ...]) -> dict[str, float]:
    """Peak memory above the inputs in MiB, a child process each."""
    found = {}
    for batch in batches:
        command = [sys.executable, __file__, "--child", str(batch), "--heads", str(args.heads)]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        found[str(batch)] = json.loads(lines[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="B=8 alone, one round of the naive twin")
    parser.add_argument("--heads", type=int, default=HeadConfig().num_heads, help="attention heads of ours")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--child-dtype", default="float32", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/loss.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        return child(args)
    rounds = {8: 1} if args.quick else {8: 3, 16: 1}
    result: dict[str, Any] = {"heads": args.heads, "threads": args.threads, "batches": {}}
    result["peak_mib"] = peaks(args, (8,) if args.quick else (8, 16, 64))
    print("| B | arm | CPU s | naive over it (by wall) | of the fp32 limit |\n|---|---|---|---|---|")
    for batch, count in rounds.items():
        found = result["batches"][str(batch)] = measure(batch, args, count)
        for name, ratio in found["naive_over"].items():
            by_wall, of_limit = found["naive_over_by_wall"][name], found["of_the_limit"][name]
            cpu = found["cpu_seconds"][name]
            print(f"| {batch} | {name} | {cpu:.3f} | {ratio:.1f} ({by_wall:.1f}) | {of_limit:.2f} |")
        gflop = found["gflop"]
        print(f"| {batch} | limit: {gflop['needed']:.0f} GFLOP at {found['gflops_per_second']:.0f} a second; "
              f"ours multiplies {gflop['ours']:.0f} | {found['limit_seconds']:.3f} | | 1 |")  # fmt: skip
    print("\n| B | peak above the inputs, MiB |\n|---|---|")
    for batch, peak in result["peak_mib"].items():
        print(f"| {batch} | {peak:.0f} |")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
