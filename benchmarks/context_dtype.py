"""Whether bfloat16 products with the context harm the ranking: heads trained with them and without, the same seeds.

    python benchmarks/context_dtype.py [--quick] [--seeds 3] [--steps 300] [--out runs/bench/context_dtype.json]

Synthetic contexts (`synthetic.py`: 32 tokens of width 1024, that hold the expert's chunk in noise), 1,000 frames for
training and 400 held out. The fp32 head is also read in bfloat16, which is what serving a trained head in it means. The
products are really bfloat16, on any machine: where it has no instructions for them that is slow, and the head
itself would take float32.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from synthetic import wide_features
from timing import write
from training import Run, evaluate, train

from vla_energy import context_tokens
from vla_energy.config import EnergyConfig, HeadConfig
from vla_energy.config.model import CONTEXT_DTYPES
from vla_energy.head import EnergyHead

COLUMNS = ("spearman", "win rate far", "l1 chosen")


def ranking(head: EnergyHead, held_out: Any, config: EnergyConfig) -> dict[str, float]:
    """What tells whether a ranking is harmed."""
    metrics = evaluate(head, held_out, config)
    values = metrics["energy"]["spearman"], metrics["energy"]["win_rate"]["far"], metrics["rerank"]["l1_reranked"]
    return dict(zip(COLUMNS, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, 20 steps, width 64")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/context_dtype.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    context_tokens.multiplies_bfloat16 = lambda _: True
    width, frames = (64, 100) if args.quick else (1024, 1000)
    train_set, held_out = wide_features(frames, 0, width), wide_features(min(frames, 400), 1, width)
    configs = {dtype: EnergyConfig(head=HeadConfig(context_dtype=dtype)) for dtype in CONTEXT_DTYPES}
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in range(1 if args.quick else args.seeds):
        for dtype, config in configs.items():
            head, _ = train(Run(dtype, config, 20 if args.quick else args.steps, seed), train_set)
            rows.setdefault(f"trained in {dtype}", []).append(ranking(head, held_out, config))
            if dtype == "float32":
                reading = EnergyHead(head.context_dim, head.action_dim, head.horizon, configs["bfloat16"])
                reading.load_state_dict(head.state_dict())
                rows.setdefault("the same, read in bfloat16", []).append(ranking(reading, held_out, config))
    print(f"| mean of {len(next(iter(rows.values())))} seeds (lowest to highest) | {' | '.join(COLUMNS)} |")
    print("|---|---|---|---|")
    for name, found in rows.items():
        cells = [[row[column] for row in found] for column in COLUMNS]
        texts = [f"{statistics.mean(cell):.4f} ({min(cell):.4f} to {max(cell):.4f})" for cell in cells]
        print(f"| {name} | {' | '.join(texts)} |")
    write(args.out, {"rankings": rows, "steps": args.steps, "width": width})


if __name__ == "__main__":
    main()
