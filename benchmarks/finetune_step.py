"""What the energy head adds to a fine-tuning step of the tiny VLA: steps with and without it, interleaved in one run.

    python benchmarks/finetune_step.py [--quick] [--batch_size 16] [--threads 1] [--out runs/bench/finetune_step.json]

Prints a table and writes JSON. Ratios of medians, of CPU time and of wall time: other load on the machine moves the
first least.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from vla_energy.config import EnergyConfig
from vla_energy.finetune.config import EMBEDDED, FinetuneConfig
from vla_energy.finetune.trainer import Trainer


def _trainer(args: argparse.Namespace, runs: Path, *, enabled: bool) -> Trainer:
    return Trainer(
        FinetuneConfig(
            vla_path=args.vla_path,
            run_root_dir=runs,
            use_proprio=True,
            image_aug=False,
            precision="fp32",
            use_lora=not args.full,
            batch_size=args.batch_size,
            energy=EnergyConfig(enabled=enabled),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="15 rounds instead of 60")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--full", action="store_true", help="train every weight instead of LoRA")
    parser.add_argument("--vla_path", default=EMBEDDED)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/finetune_step.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rounds, warm = (15, 3) if args.quick else (60, 5)
    seconds: dict[str, list[float]] = {"energy off": [], "energy on": []}
    walls: dict[str, list[float]] = {name: [] for name in seconds}
    with tempfile.TemporaryDirectory() as runs:
        arms = {name: _trainer(args, Path(runs), enabled=name == "energy on") for name in seconds}
        batches = {name: trainer.job.train.batches(args.batch_size) for name, trainer in arms.items()}
        for index in range(rounds + warm):
            for name, trainer in arms.items():
                cpu, wall = time.process_time(), time.perf_counter()
                trainer.train_step(batches[name])
                trainer.step += 1
                if index >= warm:
                    seconds[name].append(time.process_time() - cpu)
                    walls[name].append(time.perf_counter() - wall)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    added = medians["energy on"] / medians["energy off"] - 1
    wall_medians = {name: statistics.median(values) for name, values in walls.items()}
    added_by_wall = wall_medians["energy on"] / wall_medians["energy off"] - 1
    result = {
        "median_cpu_ms": {name: 1e3 * value for name, value in medians.items()},
        "median_wall_ms": {name: 1e3 * value for name, value in wall_medians.items()},
        "energy_adds": added,
        "energy_adds_by_wall": added_by_wall,
        "rounds": rounds,
        "batch_size": args.batch_size,
        "threads": args.threads,
        "lora": not args.full,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    for name, value in medians.items():
        print(f"{name:<12} {1e3 * value:8.1f} ms of CPU a step (median of {rounds}, batch {args.batch_size})")
    print(f"the head adds {100 * added:.1f} percent ({100 * added_by_wall:.1f} by wall time)")


if __name__ == "__main__":
    main()
