"""Trains energy heads from a feature cache, one a preset; every setting of the head is a flag --energy.NAME VALUE."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from vla_energy.config import EnergyConfig

EXAMPLE = """example:
  vla-energy train-head --cache runs/cache --out runs/heads --epochs 20 \\
      --energy.loss.listwise 0.2"""

_PREFIX = "energy."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("--cache", required=True, metavar="DIR", help="what vla-energy cache wrote")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="checkpoint folder; with presets, one below it each"
    )
    parser.add_argument("--val-cache", metavar="DIR", help="cache of the split val: ranking, and the gate's margin")
    parser.add_argument("--checkpoint", metavar="DIR", help="the cache's checkpoint (default: where it was)")
    parser.add_argument("--data-root-dir", metavar="DIR", help="the cache's data (default: where they were)")
    parser.add_argument("--dataset-config", metavar="FILE", help="what names their fields (default: where it was)")
    parser.add_argument("--presets", metavar="A,B", help="settings to train one head each with, see configs/")
    parser.add_argument("--epochs", type=float, metavar="E", help="passes over the cache (default 10)")
    parser.add_argument("--max-steps", type=int, metavar="N", help="optimiser steps, instead of --epochs")
    parser.add_argument("--batch-size", type=int, default=16, metavar="B", help="frames a step (default 16)")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of the head (default 5e-4)")
    parser.add_argument("--warm-steps", type=int, default=0, metavar="N", help="steps in which the rate rises")
    parser.add_argument("--val-freq", type=int, default=10_000, metavar="N", help="steps between two validations")
    parser.add_argument("--log-freq", type=int, default=10, metavar="N", help="steps between two rows of metrics")
    parser.add_argument("--seed", type=int, default=7, help="of weights, order and negatives (default 7)")
    parser.add_argument("--device", default="cpu", help="device of the head (default cpu)")
    parser.add_argument("--copy", action="store_true", help="copy the policy's files instead of linking them")
    parser.add_argument("--json", action="store_true", help="print folders and metrics as one JSON object")
    for name in _leaves(EnergyConfig, _PREFIX):
        parser.add_argument(f"--{name}", metavar="VALUE", help=argparse.SUPPRESS)


def _leaves(cls: Any, prefix: str) -> Iterator[str]:
    for entry in fields(cls):
        if is_dataclass(entry.type):
            yield from _leaves(entry.type, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    import json

    from vla_energy.finetune.head_runs import HeadRuns
    from vla_energy.results import to_json

    runs = HeadRuns(args, {name: value for name, value in vars(args).items() if name.startswith(_PREFIX)})
    told = {}
    for name, folder, results, counters in runs:
        told[name] = {"folder": str(folder), "results": to_json(results), "steps": counters}
        if not args.json:
            print(f"{name}: {folder}" + (f"\n{json.dumps(results, indent=1)}" if results else ""), flush=True)
            print(f"{name}: {_steps(counters)}", flush=True)
    if args.json:
        print(json.dumps(told, allow_nan=False))
    return 0


def _steps(counters: dict[str, int]) -> str:
    """How many steps were taken and, so that a head that hardly learnt does not pass for a success, were not."""
    taken = counters["steps"]
    skipped = {kind: count for kind, count in counters.items() if kind not in ("steps", "clipped") and count}
    every = taken + sum(skipped.values())
    if not skipped:
        return f"all {every} steps were taken"
    why = ", ".join(f"{kind} {count}" for kind, count in skipped.items())
    warning = "; WARNING: the head learnt little or nothing" if 2 * taken < every else ""
    return f"{every - taken} of {every} steps were skipped ({why}){warning}"
