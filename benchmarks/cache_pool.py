"""What pooling the image patches of a feature cache costs: heads trained from caches of --pool 1, 2, 4 and 8.

    python benchmarks/cache_pool.py [--quick] [--out runs/bench/cache_pool.json]
    python benchmarks/cache_pool.py --data_root_dir data --dataset_name metaworld_unseen6

The same frames, seeds and steps for every pool; the policy runs once. Two heads: `recommended`, which starts as the
distance to the policy's chunk and so ranks well before it has read a context, and `blind`, the same without that
reference, which has only the context. Every head is measured on whole contexts, as a
policy gives them to it at inference; the column `pooled` has the rank correlation on contexts pooled as those it was
trained on. Row `untrained`: the head before its first step. Means over the seeds, ranges in brackets.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from vla_energy.cache import CachedFrames, FeatureCache
from vla_energy.config import EnergyConfig
from vla_energy.finetune.cached import CachedTraining, shuffled
from vla_energy.finetune.config import EMBEDDED, FinetuneConfig
from vla_energy.finetune.features import CacheBuilder, CacheOptions

HEADS = ("recommended", "blind")


def build(args: argparse.Namespace, split: str, frames: int, folder: Path) -> dict[int, FeatureCache]:
    """A cache for each pool, all from one pass of the policy."""
    where = (args.checkpoint, args.data_root_dir, args.dataset_name)
    builders = {
        pool: CacheBuilder(
            *where, folder / f"{split}{pool}", CacheOptions(split, pool=pool, shard_frames=frames, max_frames=frames)
        )
        for pool in args.pools
    }
    parts: dict[int, list[CachedFrames]] = {pool: [] for pool in args.pools}
    for found in builders[args.pools[0]]._reader.read(split, frames, 32):
        for pool, builder in builders.items():
            parts[pool].append(builder._stored(found))
    for pool, builder in builders.items():
        builder._write(0, parts[pool])
    return {pool: FeatureCache(builder.folder) for pool, builder in builders.items()}


def train(
    args: argparse.Namespace, cache: FeatureCache, held_out: list[FeatureCache], head: str, seed: int, steps: int
) -> dict[str, float]:
    """Ranking on the held-out frames, whole and pooled, and CPU milliseconds of a step."""
    energy = EnergyConfig(freeze_backbone=True)
    energy.head.reference = head == "recommended"
    with tempfile.TemporaryDirectory() as runs:
        config = FinetuneConfig(
            vla_path=args.checkpoint, run_root_dir=Path(runs), use_proprio=True, image_aug=False, use_lora=False,
            precision="fp32", batch_size=16, max_steps=max(steps, 1), energy=energy, energy_learning_rate=1e-3,
            energy_warm_steps=50, device="cpu", seed=seed,
        )  # fmt: skip
        training = CachedTraining(config, cache)
        rows = shuffled(len(cache), 16, seed)
        started = time.process_time()
        for training.step in range(steps):
            training.train_step(next(rows))
        spent = 1e3 * (time.process_time() - started) / max(steps, 1)
        found: list[dict[str, Any]] = []
        for training.held_out in held_out:
            found.append(training.validate())
    wins, rerank = found[0]["energy"]["win_rate"], found[0]["rerank"]
    return {
        "spearman": found[0]["energy"]["spearman"], "pooled": found[1]["energy"]["spearman"],
        "far": wins["far"], "at_0.05": wins["at_0.05"],
        "layer_exits": wins.get("layer_exits", float("nan")), "in_batch": wins["in_batch"],
        "l1_chosen": rerank["l1_reranked"] / rerank["l1_policy"], "step_cpu_ms": spent,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few frames and steps: runs, and says nothing")
    parser.add_argument("--checkpoint", default=EMBEDDED)
    parser.add_argument("--data_root_dir", default=EMBEDDED)
    parser.add_argument("--dataset_name", default="metaworld_demo")
    parser.add_argument("--pools", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--frames", type=int, default=2048, help="of training (multiple of 32)")
    parser.add_argument("--held_out", type=int, default=512, help="frames (multiple of 32)")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/cache_pool.json"))
    args = parser.parse_args()
    if args.pools[0] != 1:
        parser.error(f"--pools {args.pools}: the first must be 1, whole contexts")
    if args.quick:
        args.frames, args.held_out, args.steps, args.seeds = 64, 32, 5, 1
    torch.set_num_threads(1)
    result: dict[str, Any] = {"dataset": args.dataset_name, "steps": args.steps, "seeds": args.seeds, "rows": []}
    with tempfile.TemporaryDirectory() as scratch:
        caches = build(args, "train", args.frames, Path(scratch))
        held_out = build(args, "val", args.held_out, Path(scratch))
        first = args.pools[0]
        result |= {"frames": len(caches[first]), "held_out": len(held_out[first])}
        arms = [(head, f"untrained, {head}", first, 0) for head in HEADS]
        arms += [(head, f"{head}, --pool {pool}", pool, args.steps) for head in HEADS for pool in args.pools]
        for head, name, pool, steps in arms:
            both = [held_out[first], held_out[pool]]
            runs = [train(args, caches[pool], both, head, seed, steps) for seed in range(args.seeds)]
            values = {key: [run[key] for run in runs] for key in runs[0]}
            kilobytes = caches[pool].nbytes / len(caches[pool]) / 1e3
            result["rows"].append({"name": name, "head": head, "pool": pool, "kB": kilobytes, "values": values})
            print(f"{name}: {values}", flush=True)
    print(table(result))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")


def table(result: dict[str, Any]) -> str:
    """As Markdown."""
    keys = list(result["rows"][0]["values"])
    lines = [f"| | kB a frame | {' | '.join(keys)} |", f"|---|---|{'---|' * len(keys)}"]
    for row in result["rows"]:
        cells = [_cell(key, values) for key, values in row["values"].items()]
        lines.append(f"| {row['name']} | {row['kB']:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(key: str, values: list[float]) -> str:
    mean = statistics.mean(values)
    if key == "step_cpu_ms":
        return f"{mean:.0f}" if mean else ""
    spread = f" ({min(values):.4f} to {max(values):.4f})" if len(values) > 1 else ""
    return f"{mean:.4f}{spread}"


if __name__ == "__main__":
    main()
