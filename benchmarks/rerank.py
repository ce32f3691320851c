"""What reranking costs: beside a 7B backbone at its width, and beside a real small policy with each of its modes.

    python benchmarks/rerank.py [--quick] [--heads 2] [--threads 1] [--out runs/bench/rerank.json]
    python benchmarks/rerank.py --checkpoint DIR --data_root_dir DIR --dataset_name NAME

At width: one Llama-7B decoder layer with random weights (600 tokens, width 4096, 32 heads, MLP 11008, fp32), timed and
taken times 32; what is left out (vision towers, embeddings) would only add to it. Beside it a head of width 512:
encoding a context, scoring 1 and 64 chunks in an encoded one, `Reranker` whole (encode, 64 candidates, gate), its
matrix products alone, which are the limit, and the naive twin: the original head on 64 copies of the context.

The policy: the checkpoint's forward and its modes whole; without one the shipped policy and an untrained head.

All go in turns in one run; medians of CPU time, and of wall time in brackets. `--quick` is small enough for CI.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loss import QUICK, Shape, make_head, make_naive
from rerank_policy import policy_runs
from timing import medians, products_of, write
from torch import Tensor, nn
from torch.nn import functional as F

from vla_energy.config import EnergyConfig, HeadConfig
from vla_energy.finetune.config import EMBEDDED
from vla_energy.finetune.setup import EMBEDDED_DATA
from vla_energy.rerank import Reranker, scoring

CANDIDATES, LAYERS = 64, 32


class DecoderLayer(nn.Module):
    """A Llama layer's arithmetic: RMS norms, rotated queries and keys, causal attention, gated MLP; no biases."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ParameterList(torch.ones(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate_up, self.down = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B,S,width)`, the same shape."""
        queries, keys, values = self.qkv(self._norm(x, 0)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(_rotate(queries), _rotate(keys), values, is_causal=True)
        x = x + self.out(found.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self._norm(x, 1)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)

    def _norm(self, x: Tensor, index: int) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.norms[index]


def _rotate(x: Tensor) -> Tensor:
    """Rotary positions of `(B,heads,S,width)` (Su et al. 2021)."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[2])[:, None] * 10000.0 ** (-torch.arange(half) / half)
    first, second = x.chunk(2, -1)
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def wide_runs(
    shape: Shape, heads: int, layer: DecoderLayer
) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """What is timed at width, by name, and the GFLOP of what has a limit."""
    head, naive = make_head(shape, heads).eval(), make_naive(shape).eval()
    context, mask = torch.randn(1, shape.tokens, shape.width), torch.ones(1, shape.tokens, dtype=torch.bool)
    policy = torch.rand(1, 1, shape.horizon, shape.dims) * 2 - 1
    many = policy + 0.05 * torch.randn(1, CANDIDATES, shape.horizon, shape.dims)
    reranker = Reranker(head, None, EnergyConfig(), strict=True)
    with scoring(head):
        encoded = head.encode(context, mask, policy[:, 0])

    def copies() -> Tensor:
        given = context.repeat_interleave(CANDIDATES, 0), mask.repeat_interleave(CANDIDATES, 0)
        return naive.energies(naive.encode(*given), many.transpose(0, 1))

    table: dict[str, Callable[[], object]] = {
        "decoder layer": lambda: layer(context),
        "encode": lambda: head.encode(context, mask, policy[:, 0]),
        "score 1": lambda: head(encoded, policy),
        f"score {CANDIDATES}": lambda: head(encoded, many),
        f"rerank {CANDIDATES}": lambda: reranker(context, mask, many),
        f"naive {CANDIDATES}": copies,
    }
    gflop = {}
    for name in ("score 1", f"score {CANDIDATES}", f"rerank {CANDIDATES}"):
        table[f"{name}, products"], flops = products_of(table[name])
        gflop[name] = flops / 1e9
    return table, gflop


def show(found: dict[str, dict[str, float]], whole: str, times: int) -> None:
    """The table, and each run's share of `times` the run `whole`."""
    print(f"\n| | CPU ms (wall) | of {times} x {whole} |\n|---|---|---|")
    for name, seconds in found.items():
        share = seconds["cpu"] / (times * found[whole]["cpu"])
        print(
            f"| {name} | {1e3 * seconds['cpu']:.2f} ({1e3 * seconds['wall']:.2f}) | {100 * share:.3f} % |", flush=True
        )


def many_over_one(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """What 64 candidates cost beside one, without and with encoding the context."""
    encode, one, many = (found[name]["cpu"] for name in ("encode", "score 1", f"score {CANDIDATES}"))
    result = {"encoded": many / one, "with_encoding": (encode + many) / (encode + one)}
    print(f"{CANDIDATES} candidates cost {result['encoded']:.2f} times one in an encoded context, "
          f"{result['with_encoding']:.2f} with the encoding")  # fmt: skip
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small width, and 10 rounds of the policy's modes")
    parser.add_argument("--heads", type=int, default=HeadConfig().num_heads, help="of the wide head")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint", default=EMBEDDED)
    parser.add_argument("--data_root_dir", default=str(EMBEDDED_DATA))
    parser.add_argument("--dataset_name", default="metaworld_demo")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/rerank.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = QUICK if args.quick else Shape()
    layer = DecoderLayer(shape.width, 4, 704) if args.quick else DecoderLayer(shape.width, 32, 11008)
    rerank = f"rerank {CANDIDATES}"
    with torch.no_grad():
        table, gflop = wide_runs(shape, args.heads, layer)
        slow = ("decoder layer", f"naive {CANDIDATES}")
        wide = medians(table, 2 if args.quick else 3, {name: 5 for name in table if name not in slow})
        show(wide, "decoder layer", LAYERS)
        result: dict[str, Any] = {"shape": vars(shape), "heads": args.heads, "wide": wide, "gflop": gflop}
        result["wide_many_over_one"] = many_over_one(wide)
        result["rerank_of_backbone"] = wide[rerank]["cpu"] / (LAYERS * wide["decoder layer"]["cpu"])
        result["naive_over_rerank"] = wide[f"naive {CANDIDATES}"]["cpu"] / wide[rerank]["cpu"]
        print(
            f"copies of the context, through the original head, cost {result['naive_over_rerank']:.1f} times reranking"
        )
        for name, count in gflop.items():
            over = wide[name]["cpu"] / wide[f"{name}, products"]["cpu"]
            print(f"{name}: {over:.2f} times its {count:.3f} GFLOP of matrix products alone")
        runs = policy_runs(args.checkpoint, args.data_root_dir, args.dataset_name, CANDIDATES)
        policy = result["policy"] = medians(runs, 10 if args.quick else 60)
        show(policy, "policy's forward", 1)
        result["policy_many_over_one"] = many_over_one(policy)
    write(args.out, result)


if __name__ == "__main__":
    main()
