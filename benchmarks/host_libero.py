"""LIBERO episodes by openvla-oft's own run_libero_eval.py on a CPU: as it is, patched with the energy off, and on.

    python benchmarks/host_libero.py --python HOST_PYTHON --host openvla-oft --transformers transformers-openvla-oft \
        --dlimp dlimp_openvla --checkpoint CHECKPOINT --tasks 0,7 --episodes 2 --center_crop False --env_img_res 128

HOST_PYTHON is the interpreter of an environment with the host's pins and a LIBERO simulator (docs/openvla-oft.md).
CHECKPOINT needs an energy head; one with the tiny model's own token ids is exported first. Flags that are not this
command's go to the host's script. The checkout is copied, the copy patched; the checkpoint is copied for each run:

    plain        the script as it is                off          patched, energy off
    shut         `rerank`, its gate shut            open         `rerank`, its gate open
    retrieve     `retrieve`, with a chunk memory    recommended  `rerank` for the first task's instruction only

Exits with 1 where an action differs that must not: in `off` and `shut`, in `recommended` after the first task; or where
actions differ and no chunk is said to be replaced. A good policy's head may replace none though the gate is open.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from host_flags import ROOT, chosen, copy_checkout, host_parser

from vla_energy.backbones.config import OpenVLAConfig
from vla_energy.backbones.host_export import export_for_host, has_llama_ids
from vla_energy.gates import load_gates, save_gates
from vla_energy.memory import PREFIX

MODES = {"shut": "rerank", "open": "rerank", "retrieve": "retrieve", "recommended": "recommended"}
RUNS = ("plain", "off", *MODES)


def episodes(args: argparse.Namespace, checkout: Path, checkpoint: Path, flags: list[str]) -> dict[str, Any]:
    """One run of the host's script; the report of `host_episodes.py`, with `success` by the host's own log."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [ROOT, args.transformers.resolve() / "src", args.dlimp.resolve(), checkout]
        environment = {
            "MUJOCO_GL": "osmesa", **os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        report = Path(folder) / "report.json"
        command = [
            str(args.python), str(ROOT / "benchmarks" / "host_episodes.py"), args.tasks, str(report),
            "--pretrained_checkpoint", str(checkpoint), "--num_trials_per_task", str(args.episodes),
            "--local_log_dir", str(Path(folder) / "logs"), *flags,
        ]  # fmt: skip
        start = time.monotonic()
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: {' '.join(command)}\n{done.stderr[-3000:]}")
        (log,) = Path(folder, "logs").glob("*.txt")
        lines = log.read_text().splitlines()
        if errors := [line for line in lines if line.startswith("Episode error")]:  # the host goes on after them
            sys.exit(f"error: {' '.join(command)}\n{errors[0]}")
        success = [line == "Success: True" for line in lines if line.startswith("Success: ")]
        return {**json.loads(report.read_text()), "success": success, "seconds": time.monotonic() - start}


def prepare(args: argparse.Namespace, work: Path, name: str, instructions: list[str]) -> tuple[Path, list[str]]:
    """A copy of the checkpoint with the run's gates, and the flags that ask for its mode."""
    checkpoint = work / "checkpoint"  # always the same: nothing may depend on the path
    shutil.rmtree(checkpoint, ignore_errors=True)
    if has_llama_ids(OpenVLAConfig.from_folder(args.checkpoint)):
        shutil.copytree(args.checkpoint, checkpoint)
    else:
        export_for_host(args.checkpoint, checkpoint)
    if name not in MODES:
        return checkpoint, [] if name == "plain" else ["--energy.enabled", "False"]
    margin = math.inf if name == "shut" else 0.0
    tasks = {instructions[0]: "rerank"} if name == "recommended" else None
    save_gates(checkpoint, {**load_gates(checkpoint)[0], "rerank": margin}, tasks)
    return checkpoint, ["--energy.enabled", "True", "--energy.mode", MODES[name]]


def compare(name: str, plain: dict[str, Any], made: dict[str, Any], episodes_a_task: int) -> tuple[str, bool]:
    """A line about the run, and whether it is as it must be."""
    pairs = zip(plain["episodes"], made["episodes"], strict=True)
    equal = [one["actions"] == other["actions"] for one, other in pairs]
    counts = made["counts"] or {}
    steps = sum(len(one["actions"]) for one in made["episodes"]) / len(equal)
    line = (
        f"{name}: success {sum(made['success'])} of {len(equal)}, {steps:.1f} steps with the waiting ones; episodes "
        f"with the plain run's actions, bit for bit: {sum(equal)}; chunks {counts.get('chunks', '-')}, "
        f"replaced {counts.get('accepted', '-')}; {made['seconds']:.0f} s"
    )
    must = {"off": equal, "shut": equal, "recommended": equal[episodes_a_task:]}
    right = all(must.get(name, [])) and (name != "shut" or counts["accepted"] == 0)
    return line, right and (all(equal) or counts.get("accepted", 0) > 0)


def main() -> None:
    parser = host_parser(__doc__)
    parser.add_argument("--tasks", default="0,7", help="numbers in the suite, comma-separated")
    parser.add_argument("--episodes", type=int, default=2, help="initial states a task")
    parser.add_argument("--runs", default=",".join(RUNS), help="which, comma-separated; plain is always done")
    parser.add_argument(
        "--out", type=Path, help="every run's actions and successes, JSON; runs that it has are not repeated"
    )
    args, flags = parser.parse_known_args()
    asked = chosen(parser, "runs", args.runs, RUNS)
    runs = [name for name in RUNS if name == "plain" or name in asked]
    if "retrieve" in runs and not any(args.checkpoint.glob(f"{PREFIX}*")):
        runs.remove("retrieve")
        print(f"retrieve: left out, {args.checkpoint} has no chunk memory")
    settings = {
        "checkpoint": str(args.checkpoint.resolve()),
        "tasks": args.tasks,
        "episodes": args.episodes,
        "flags": flags,
    }
    results: dict[str, Any] = {"settings": settings}
    if args.out is not None and args.out.is_file():
        results = json.loads(args.out.read_text())
        if results["settings"] != settings:
            parser.error(f"--out {args.out} has runs with other settings: {results['settings']}")
    fine = True
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name in ("plain", "patched"):
            copy_checkout(args.host, work / name, patched=name == "patched")
        for name in runs:
            instructions = results["plain"]["instructions"] if name != "plain" else []
            checkpoint, ours = prepare(args, work, name, instructions)
            checkout = work / ("plain" if name == "plain" else "patched")
            if name not in results:
                results[name] = episodes(args, checkout, checkpoint, [*flags, *ours])
            line, right = compare(name, results["plain"], results[name], args.episodes)
            print(line, flush=True)
            fine &= right
            if args.out is not None:
                args.out.write_text(json.dumps(results))
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
