"""What chunks retrieved from the training set hold: L1 of the nearest, of simple choices, and of the best of K.

    python benchmarks/retrieval.py --quick
    python benchmarks/retrieval.py --checkpoint runs/unseen6/latest --data_root_dir data --dataset_name metaworld_head6

Two sets of queries: held-out frames (undisturbed episodes), and the remembered frames themselves with their own
episode left out (two fifths of these episodes are disturbed, as a policy's own rollouts are). The oracle gap closed is
(policy - choice) / (policy - best of K with the policy).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from features import Features, load_or_extract
from torch import Tensor

from vla_energy.actions import DatasetStatistics
from vla_energy.backbones.tiny import EMBEDDED as TINY
from vla_energy.finetune.config import EMBEDDED
from vla_energy.memory import ChunkMemory, MemoryBatch

UNIT = 0.05
"""A distance of 1 between keys weighs as much as `WEIGHT` times this distance to the policy's chunk."""
WEIGHT = 3.0


def batches(features: Features, size: int = 500) -> Iterator[MemoryBatch]:
    for rows in torch.arange(len(features)).split(size):
        context, mask, expert, layers = features.batch(rows)
        yield MemoryBatch(context, mask, layers[:, -1], expert, features.episode[rows])


def choices(chunks: Tensor, distances: Tensor, policy: Tensor) -> dict[str, Tensor]:
    """The chunk `(B,H,A)` that each simple rule takes."""
    to_policy = (chunks - policy[:, None]).abs().mean((2, 3))
    rows = torch.arange(len(chunks))
    return {
        "policy": policy,
        "nearest": chunks[:, 0],
        "closest to the policy's": chunks[rows, to_policy.argmin(1)],
        "both": chunks[rows, (to_policy / UNIT + WEIGHT * distances).argmin(1)],
        "mean of K": chunks.mean(1),
    }


def measure(memory: ChunkMemory, features: Features, count: int, leave_out: bool) -> dict[str, Any]:
    errors: dict[str, list[Tensor]] = {}
    nearness = []
    for batch in batches(features):
        exclude = batch.episodes if leave_out else None
        found = memory.nearest(batch.context, batch.context_mask, batch.policy, count, exclude)
        made = choices(found.chunks, found.distances, batch.policy)
        for name, chunk in made.items():
            errors.setdefault(name, []).append((chunk - batch.expert).abs().mean((1, 2)))
        pool = torch.cat([batch.policy[:, None], found.chunks], 1)
        errors.setdefault("best of K and policy", []).append((pool - batch.expert[:, None]).abs().mean((2, 3)).amin(1))
        nearness.append(found.distances[:, 0])
    table = {name: torch.cat(parts) for name, parts in errors.items()}
    fifths = torch.cat(nearness).argsort().tensor_split(5)
    by_distance = [[float(table[name][rows].mean()) for name in ("policy", "nearest")] for rows in fifths]
    return {"l1": {name: float(error.mean()) for name, error in table.items()}, "by_distance": by_distance}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the shipped policy and demonstrations, 600 frames")
    parser.add_argument("--checkpoint", default=EMBEDDED)
    parser.add_argument("--data_root_dir", default=EMBEDDED)
    parser.add_argument("--dataset_name", default="metaworld_demo")
    parser.add_argument("--frames", type=int, default=12_000)
    parser.add_argument("--val_frames", type=int, default=3_000)
    parser.add_argument("--count", type=int, default=8, help="K")
    parser.add_argument("--out", type=Path, default=Path("runs/retrieval"))
    args = parser.parse_args()
    if args.quick:
        args.frames, args.val_frames = 600, 300
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    source = (args.checkpoint, args.data_root_dir, args.dataset_name)
    train_set = load_or_extract(args.out, *source, "train", args.frames)
    held_out = load_or_extract(args.out, *source, "val", args.val_frames)
    folder = TINY if args.checkpoint == EMBEDDED else Path(args.checkpoint)
    entry = next(iter(json.loads((folder / "dataset_statistics.json").read_text()).values()))
    memory = ChunkMemory.build(batches(train_set), DatasetStatistics.from_dict(entry), max_frames=args.frames)
    print(f"{len(memory)} frames remembered in {memory.nbytes / 1e6:.1f} MB")
    results = {}
    for name, features, own in (("held out", held_out, False), ("remembered, own episode left out", train_set, True)):
        result = results[name] = measure(memory, features, args.count, own)
        l1 = result["l1"]
        gap = l1["policy"] - l1["best of K and policy"]
        print(f"\n{name}: {len(features)} frames\n| choice | L1 | gap closed |\n|---|---|---|")
        for choice, error in l1.items():
            print(f"| {choice} | {error:.4f} | {(l1['policy'] - error) / gap:.2f} |")
        print("L1 of policy and nearest, by distance to the nearest, fifths:")
        print("; ".join(f"{policy:.3f} {nearest:.3f}" for policy, nearest in result["by_distance"]))
    (args.out / "retrieval.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
