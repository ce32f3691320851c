"""Stability of the energy head's training: the failures of the original, and what makes them go away.

    python benchmarks/stability.py --quick                  # under 2 minutes, the shipped policy and demonstrations
    python benchmarks/stability.py --checkpoint runs/unseen6/latest --data_root_dir data --dataset_name metaworld_head6

Heads are trained on frozen features. Parts (`--parts`): `presets` (each with and without warm-up, InfoNCE and hinge),
`long` (20,000 steps), `stages` (5,000), `wide` (contexts of 4096, synthetic), `ranges` (with temperatures), `left_out`
(the recommended without one part each), `alone` (the original with one remedy each), `faults` (NaN, Inf, 1e38, B = 1,
bf16).

Every run is one line of `results.jsonl` in `--out`, with its curve; a second call goes on where the first stopped.
Tables (`tables.md`) and plots are drawn from that file, also while it grows: `--parts none`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import stability_arms as arms
import torch
from features import Features, load_or_extract
from stability_faults import faults
from stability_report import report
from synthetic import wide_features
from training import Run, evaluate, is_flat, train

from vla_energy.checkpoint import save_head
from vla_energy.finetune.config import EMBEDDED

PARTS = ("long", "stages", "faults", "wide", "presets", "ranges", "left_out", "alone")


def run_one(part: str, run: Run, train_set: Features, held_out: Features, out: Path) -> dict[str, Any]:
    head, facts = train(run, train_set)
    metrics = evaluate(head, held_out, run.config)
    if part == "long" or run.tags == {"warm-up": 0, "loss": "as preset"}:
        save_head(out / f"{part}-{run.arm}-{run.seed}.safetensors", head, run.steps, None)
    flat = is_flat(facts["curve"], run.config.loss.margin_width)
    row = {"part": part, "arm": run.arm, "seed": run.seed, "steps": run.steps, "tags": run.tags, "flat": flat}
    return {**row, **facts, "held_out": metrics}


def runs_of(part: str, args: argparse.Namespace) -> list[Run]:
    if args.quick:
        arm_steps = {"original": 120, "recommended": 400}
        return [Run(arm, arms.preset(arm), steps, seed) for arm, steps in arm_steps.items() for seed in range(2)]
    if part == "long":
        return arms.long(args.long_steps, args.seeds or 5)
    builders = {
        "presets": (arms.presets, 5),
        "wide": (arms.wide, 2),
        "stages": (arms.stages, 1),
        "ranges": (arms.ranges, 2),
    }
    build, seeds = {**builders, "left_out": (arms.left_out, 2), "alone": (arms.alone, 2)}[part]
    return build(args.seeds or seeds)


def key(row: dict[str, Any]) -> str:
    return json.dumps([row[name] for name in ("part", "arm", "seed", "steps", "tags")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="original and recommended, two seeds, a few hundred steps")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--checkpoint", default=EMBEDDED)
    parser.add_argument("--data_root_dir", default=EMBEDDED)
    parser.add_argument("--dataset_name", default="metaworld_demo")
    parser.add_argument("--frames", type=int, default=12_000)
    parser.add_argument("--val_frames", type=int, default=1_500)
    parser.add_argument(
        "--seeds", type=int, default=0, help="seeds a variant; 0: 5 for presets and long, 1 for stages, else 2"
    )
    parser.add_argument("--long_steps", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    parts = [part for part in args.parts.split(",") if part != "none"]
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        parser.error(f"unknown parts {', '.join(unknown)}; known: {', '.join(PARTS)}, none")
    torch.set_num_threads(1)
    out = args.out or Path("runs/stability-quick" if args.quick else "runs/stability")
    if args.quick:
        args.frames, args.val_frames, parts = 600, 300, ["long"]
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    if args.quick:
        results.unlink(missing_ok=True)  # it is quick: always measured anew
    if not parts and not results.exists():
        parser.error(f"there is no {results} to draw tables from")
    source = (args.checkpoint, args.data_root_dir, args.dataset_name)
    train_set = load_or_extract(out, *source, "train", args.frames)
    held_out = load_or_extract(out, *source, "val", args.val_frames)
    print(f"policy's L1: {train_set.policy_l1:.4f} on {len(train_set)} training frames, ", end="")
    print(f"{held_out.policy_l1:.4f} on {len(held_out)} held-out ones", flush=True)
    done = {key(json.loads(line)) for line in results.read_text().splitlines()} if results.exists() else set()

    def keep(row: dict[str, Any]) -> None:
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        energy = row["held_out"]["energy"]
        print(
            f"{row['part']:9} {row['arm']:45} {json.dumps(row['tags']):45} seed {row['seed']} flat {row['flat']!s:5} "
            f"spearman {energy['spearman']:6.3f} in-batch {energy['win_rate'].get('in_batch', float('nan')):.3f} "
            f"{row['ms_per_step']:.0f} ms",
            flush=True,
        )

    started = time.perf_counter()
    for part in parts:
        if part == "faults":
            keep(faults(train_set, held_out, 10_000)) if not any('"faults"' in name for name in done) else None
            continue
        data = (wide_features(2_000, 0), wide_features(400, 1)) if part == "wide" else (train_set, held_out)
        todo = runs_of(part, args)
        for run in todo:
            probe = {"part": part, "arm": run.arm, "seed": run.seed, "steps": run.steps, "tags": run.tags}
            if key(probe) not in done:
                keep(run_one(part, run, *data, out))
    print(f"{time.perf_counter() - started:.0f} s of training")
    print(report(out, held_out))


if __name__ == "__main__":
    main()
