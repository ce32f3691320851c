"""How often LIBERO's scripted experts solve their tasks, and in how many steps.

    python benchmarks/libero_expert.py --suite libero_spatial --episodes 20 --out runs/libero_expert.json

Each episode starts from one of the benchmark's fixed initial states; `--placements random` takes LIBERO's own random
placement, as recordings do, and `--styles drawn` a random style an episode instead of the fixed one. Nothing is drawn.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_energy.data import libero_env as lb
from vla_energy.data.libero_expert import SUITES, Expert, Style, tasks_with_expert
from vla_energy.data.metaworld_env import SimulatorError

_RANDOM_FROM = 900_000  # seeds of random placements: far above those that recordings use


@dataclass(frozen=True)
class Job:
    """One task's episodes."""

    task: str
    episodes: int
    fixed: bool
    drawn: bool
    noise: float


def measure(job: Job) -> dict[str, Any]:
    """Steps of each episode of a task, None where the expert failed."""
    world = lb.Libero(job.task)
    limit = lb.MAX_STEPS[lb.suite_of(job.task)]
    first = lb.FIXED_STATES_FROM if job.fixed else _RANDOM_FROM
    start = time.perf_counter()
    steps = [_episode(world, seed, limit, job) for seed in range(first, first + job.episodes)]
    solved = [count for count in steps if count is not None]
    return {
        "task": job.task,
        "success": len(solved) / job.episodes,
        "mean_steps": float(np.mean(solved)) if solved else None,
        "steps": steps,
        "seconds": time.perf_counter() - start,
    }


def _episode(world: lb.Libero, seed: int, limit: int, job: Job) -> int | None:
    rng = np.random.default_rng(seed)
    world.reset(seed)
    expert = Expert(world, Style.draw(rng) if job.drawn else None)
    noise = np.zeros(lb.ACTION_DIM)
    for step in range(1, limit + 1):
        if job.noise and step % 5 == 1:  # as recordings disturb it: held for five steps, or absent
            noise[:3] = rng.normal(0.0, job.noise, 3) * (rng.random() < 0.5)
        if world.step_raw(expert.action(world) + noise):
            return step
    return None


def _measure_all(jobs: list[Job], workers: int) -> Iterator[dict[str, Any]]:
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=1) as pool:
        yield from pool.imap(measure, jobs, chunksize=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default=SUITES[0], choices=SUITES)
    parser.add_argument("--tasks", default="", help="comma-separated; by default all that have an expert")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--placements", default="fixed", choices=("fixed", "random"))
    parser.add_argument("--styles", default="default", choices=("default", "drawn"))
    parser.add_argument("--noise", type=float, default=0.0, help="standard deviation of a disturbed execution")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    try:
        tasks = args.tasks.split(",") if args.tasks else tasks_with_expert(args.suite)
        lb.check_tasks(tasks)
        fixed, drawn = args.placements == "fixed", args.styles == "drawn"
        rows = []
        print(f"{'success':>7} {'steps':>6}  task")
        for row in _measure_all([Job(task, args.episodes, fixed, drawn, args.noise) for task in tasks], args.workers):
            rows.append(row)
            print(f"{row['success']:7.2f} {row['mean_steps'] or float('nan'):6.1f}  {row['task']}", flush=True)
    except (ValueError, SimulatorError) as error:
        sys.exit(f"error: {error}")
    print(f"{np.mean([row['success'] for row in rows]):7.2f}         all")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in vars(args).items() if key != "out"}
        args.out.write_text(json.dumps({"settings": settings, "tasks": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
