"""Several processes: gradients and steps/s of 1 and of several gloo ranks with the same batch; and a plan for GPUs.

    python benchmarks/scaling.py [--quick] [--batch_size 16] [--out runs/bench/scaling.json]
    python benchmarks/scaling.py --plan [--write docs/scaling.md]

Gradients: of the first step of a single process and of 2 and 4 ranks, whole batch the same; relative norm of the
difference. Speed: rank 0 alternates between the step of a single process, while rank 1 waits, and a joint step. Two
ranks on two busy cores say what the exchange costs, not how GPUs scale; that is what the plan computes
(`scaling_plan.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from scaling_plan import BEGIN, END, plan
from torch.multiprocessing.spawn import spawn

from vla_energy.distributed import ALONE, Ranks, start
from vla_energy.finetune.config import FinetuneConfig
from vla_energy.finetune.trainer import Trainer


def _trainer(runs: str, name: str, rows: int, ranks: Ranks) -> Trainer:
    config = FinetuneConfig(
        run_root_dir=Path(runs), run_id_override=name, use_proprio=True, image_aug=False, precision="fp32",
        batch_size=rows, shuffle_buffer_size=256, device="cpu",
    )  # fmt: skip
    return Trainer(config, ranks)


def _first_step(trainer: Trainer | None, batches: Any) -> list[torch.Tensor]:
    """Gradients of policy and head in a step, in double precision."""
    kept: list[torch.Tensor] = []
    average = Ranks.average_gradients

    def keep(ranks: Ranks, parameters: Any) -> None:
        parameters = list(parameters)
        average(ranks, parameters)
        kept.append(torch.cat([p.grad.double().flatten() for p in parameters if p.grad is not None]))

    Ranks.average_gradients = keep
    try:
        if trainer is not None:
            trainer.train_step(batches)
            trainer.step += 1
    finally:
        Ranks.average_gradients = average
    return kept


def _rank(rank: int, world: int, port: int, runs: str, batch_size: int, rounds: int) -> None:
    torch.set_num_threads(1)
    values = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in values.items()})
    with start("cpu") as ranks:
        joint = _trainer(runs, "joint", batch_size // world, ranks)
        alone = _trainer(runs, "alone", batch_size, ALONE) if ranks.is_main else None
        data = joint.job.train.batches(batch_size // world, shard=(rank, world))
        whole = None if alone is None else alone.job.train.batches(batch_size)
        seconds: dict[str, list[float]] = {"1 rank": [], f"{world} ranks": []}
        cpu: dict[str, list[float]] = {name: [] for name in seconds}
        expected, kept = _first_step(alone, whole), _first_step(joint, data)
        apart = [float((a - b).norm() / a.norm()) for a, b in zip(expected, kept, strict=False)]
        for index in range(rounds + 2 if rounds else 0):
            for name, trainer, batches in zip(seconds, (alone, joint), (whole, data), strict=True):
                ranks.share()
                if index == 2:
                    ranks.traffic.clear()
                before = time.perf_counter(), time.process_time()
                if trainer is not None and batches is not None:
                    trainer.train_step(batches)
                    trainer.step += 1
                if index >= 2:
                    seconds[name].append(time.perf_counter() - before[0])
                    cpu[name].append(time.process_time() - before[1])
        # `share` counts too: 4 bytes a call, and two calls of it a round are the benchmark's own.
        traffic = {kind: total / max(rounds, 1) for kind, total in ranks.traffic.items()}
        parameters = [sum(p.numel() for p in module) for module in (joint.parameters, joint.head.parameters())]  # pyright: ignore
        if ranks.is_main:
            found = {
                "apart": dict(zip(("policy", "head"), apart, strict=True)),
                "seconds": seconds,
                "cpu": cpu,
                "bytes": traffic,
                "parameters": parameters,
            }
            (Path(runs) / "found.json").write_text(json.dumps(found))


def _spawn(world: int, batch_size: int, rounds: int) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as runs:
        spawn(_rank, args=(world, port, runs, batch_size, rounds), nprocs=world)
        return json.loads((Path(runs) / "found.json").read_text())


def measure(batch_size: int, rounds: int) -> dict[str, Any]:
    """Gradients apart, medians of both arms, and what one rank contributes to the exchange in a step."""
    found = _spawn(2, batch_size, rounds)
    apart = {"2 ranks": found["apart"], "4 ranks": _spawn(4, batch_size, 0)["apart"]}
    medians = {name: statistics.median(values) for name, values in found["seconds"].items()}
    cpu = {name: statistics.median(values) for name, values in found["cpu"].items()}
    return {
        "gradients_apart": apart,
        "batch_size": batch_size, "rounds": rounds, "cores": os.cpu_count(), "load": os.getloadavg()[0],
        "steps_per_second": {name: 1 / value for name, value in medians.items()},
        "cpu_seconds_of_rank_0": cpu,
        "speed_of_2_ranks": medians["1 rank"] / medians["2 ranks"],
        "bytes_of_a_rank_and_step": found["bytes"],
        "trained_parameters": {"policy": found["parameters"][0], "head": found["parameters"][1]},
    }  # fmt: skip


def _report(result: dict[str, Any]) -> None:
    for ranks, gaps in result["gradients_apart"].items():
        print(
            f"gradients of {ranks} from one process': policy {gaps['policy']:.1e}, head {gaps['head']:.1e}; goal 1e-6"
        )
    for name, value in result["steps_per_second"].items():
        cpu = result["cpu_seconds_of_rank_0"][name]
        print(f"{name:<8} {value:6.2f} steps/s, {cpu:.3f} CPU s a step on rank 0, batch {result['batch_size']} in all")
    print(f"2 ranks are {result['speed_of_2_ranks']:.2f}x as fast (load {result['load']:.1f}, {result['cores']} cores)")
    for kind, count in sorted(result["bytes_of_a_rank_and_step"].items()):
        print(f"  {kind:<10} {count:12,.0f} bytes from each rank a step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 rounds instead of 40")
    parser.add_argument("--batch_size", type=int, default=16, help="frames of a step, over all ranks")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/scaling.json"))
    parser.add_argument("--plan", action="store_true", help="compute memory and communication of GPUs, measure nothing")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="with --plan: put it between the marks in this page")
    args = parser.parse_args()
    if args.write and not args.plan:
        parser.error("--write needs --plan")
    if args.batch_size < 4 or args.batch_size % 4:
        parser.error(f"--batch_size {args.batch_size}: four ranks need a multiple of 4")
    if args.plan:
        text = plan()
        if args.write is None:
            print(text)
            return
        page = args.write.read_text(encoding="utf-8")
        head, rest = page.split(BEGIN, 1)
        args.write.write_text(f"{head}{BEGIN}\n\n{text}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")
        return
    result = measure(args.batch_size, 10 if args.quick else 40)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    _report(result)


if __name__ == "__main__":
    main()
