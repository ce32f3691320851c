"""The energy head inside the real openvla-oft, on a CPU with a tiny checkpoint: what it changes, and what it does not.

    git clone https://github.com/moojink/openvla-oft && git -C openvla-oft checkout 213c5ff8
    git clone https://github.com/moojink/transformers-openvla-oft; git clone https://github.com/moojink/dlimp_openvla
    python benchmarks/host_plugin.py --python HOST_PYTHON --host openvla-oft --transformers transformers-openvla-oft \
        --dlimp dlimp_openvla --checkpoint TINY_CHECKPOINT --data_root_dir DATA

HOST_PYTHON is the interpreter of an environment with the host's pins. The checkout is copied, the copy patched. Runs
the host's fine-tuning (as it is, twice; patched with the energy off, and on) and compares every file that it
writes; then the host's evaluation call with the gate shut and open. All of it with one image, then with the wrist
camera's and proprioception too. Exits with 1 where something differs that must not, or a metric is not finite.
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
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla_energy.actions import load_statistics
from vla_energy.checkpoint import load_head

ROOT = Path(__file__).parents[1]
DATASET = "libero_spatial_no_noops"
INPUTS = {"1": [], "2": ["--num_images_in_input", "2", "--use_proprio", "True"]}
"""The host's flags by the number of images; its default is one, without proprioception."""


def run(args: argparse.Namespace, checkout: Path, *arguments: str) -> str:
    """One script of the host in `checkout`; its stdout."""
    paths = [ROOT, args.transformers.resolve() / "src", args.dlimp.resolve(), checkout]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled",
        "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3",
    }  # fmt: skip
    command = [str(args.python), str(ROOT / "benchmarks" / "host_cpu.py"), *arguments]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)}\n{done.stderr[-3000:]}")
    return done.stdout


def finetune(args: argparse.Namespace, checkout: Path, target: Path, *flags: str) -> Path:
    """Three optimiser steps (the host's `max_steps` 2) and a checkpoint, moved to `target`."""
    runs = target.parent / "runs"  # always the same: the host writes the path into its files
    shutil.rmtree(runs, ignore_errors=True)
    vla = runs / "vla"
    shutil.copytree(args.checkpoint, vla)  # the host writes into it
    run(
        args, checkout, "finetune", "--vla_path", str(vla), "--data_root_dir", str(args.data_root_dir.resolve()),
        "--dataset_name", DATASET, "--run_root_dir", str(runs), "--run_id_override", "run", "--shuffle_buffer_size",
        "64", "--batch_size", "2", "--max_steps", "2", "--save_freq", "2", "--image_aug", "False", "--lora_rank", "4",
        "--wandb_log_freq", "1", *flags,
    )  # fmt: skip
    return (runs / "run--2_chkpt").rename(target)


def compare(plain: Path, other: Path) -> tuple[list[str], list[str], list[str]]:
    """Names of files that are equal, that differ, and that only `other` has."""
    names = {path.relative_to(plain) for path in plain.rglob("*") if path.is_file()}
    theirs = {path.relative_to(other) for path in other.rglob("*") if path.is_file()}
    if names - theirs:
        sys.exit(f"error: missing in {other}: {sorted(map(str, names - theirs))}")
    same = {name for name in names if _content(plain / name) == _content(other / name)}
    return [sorted(map(str, group)) for group in (same, names - same, theirs - names)]  # type: ignore[return-value]


def _content(path: Path) -> Any:
    if path.name == "adapter_config.json":  # peft writes a set: its order differs from run to run
        data = json.loads(path.read_text())
        return {**data, "target_modules": sorted(data["target_modules"])}
    return path.read_bytes()


def metrics(target: Path) -> tuple[int, bool]:
    """How many steps the head logged in the last run beside `target`, and whether every number is finite."""
    lines = (target.parent / "runs" / "run" / "energy_metrics.jsonl").read_text().splitlines()
    return len(lines), all(math.isfinite(value) for line in lines for value in json.loads(line).values())


def evaluation(args: argparse.Namespace, checkout: Path, checkpoint: Path, images: str) -> tuple[dict[str, Any], bool]:
    """What the host's `get_action` answers, and whether that is as it must be."""
    output = run(args, checkout, "evaluate", str(checkpoint), DATASET, images)
    line = next(line for line in output.splitlines() if "ANSWERS " in line)
    answers = json.loads(line.split("ANSWERS ", 1)[1])
    plain = np.array(answers["plain"])
    statistics = load_statistics(checkpoint / "dataset_statistics.json")[DATASET]
    facts: dict[str, Any] = {"off_is_the_head": answers["off_is_the_head"], "chunk": plain.shape}
    right = bool(facts["off_is_the_head"])
    for mode in ("rerank", "refine"):
        opened, accepted = np.array(answers[f"{mode} open"]), answers[f"{mode} open accepted"]
        equal = bool(np.array_equal(plain, np.array(answers[f"{mode} shut"])))
        ours = statistics.unnormalize(torch.tensor(answers[f"{mode} open normalised"], dtype=torch.float64)).values
        error, moved = float(np.abs(ours - opened).max()), float(np.abs(plain - opened).max())
        facts[f"{mode}, gate shut: equal bits"] = equal
        facts[f"{mode}, gate open: accepted, largest change (robot units)"] = (accepted, moved)
        facts[f"{mode}, gate open: against our unnormalised chunk"] = error
        right &= equal and accepted == 1 and moved > 0 and error < 1e-5
    for instruction, wanted in (("this", answers["rerank open"]), ("another", answers["plain"])):
        equal = answers[f"recommended for {instruction}"] == wanted
        facts[f"rerank recommended for {instruction} instruction: as it must be"] = equal
        right &= equal
    difference = _rescored(checkpoint, answers["scored"])
    facts["the same head and context, host's torch against ours"] = difference
    return facts, right and difference < 1e-5


def _rescored(checkpoint: Path, scored: dict[str, Any]) -> float:
    """Largest difference between the energies that the host's environment gave and this one's, of the same context."""
    head = load_head(checkpoint).head.eval()
    context, mask, chunks, energies = (torch.tensor(scored[key]) for key in ("context", "mask", "chunks", "energies"))
    with torch.no_grad():
        return float((head(head.encode(context, mask, chunks[:, 0]), chunks) - energies).abs().max())


def check(args: argparse.Namespace, work: Path, images: str) -> bool:
    """Fine-tuning and evaluation with this many images; whether all is as it must be."""
    plain, patched, inputs = work / "plain", work / "patched", INPUTS[images]
    folder = work / images
    folder.mkdir()
    reference, made = finetune(args, plain, folder / "reference", *inputs), None
    fine, again = True, [("as it is, again", None)] if images == "1" else []  # that runs repeat at all: shown once
    for name, flags in (
        *again,
        ("patched, energy off", ["--energy.enabled", "False"]),
        ("patched, energy on", ["--energy.enabled", "True"]),
    ):
        target = folder / name.replace(" ", "-").replace(",", "")
        made = finetune(args, plain if flags is None else patched, target, *inputs, *(flags or []))
        same, differing, new = compare(reference, made)
        print(f"{name}: {len(same)} files equal, differing: {differing or 'none'}, new: {new or 'none'}", flush=True)
        fine &= not differing and bool(new) == ("energy on" in name)
    assert made is not None
    logged, finite = metrics(made)
    print(f"steps that the head logged: {logged}, every metric finite: {finite}")
    facts, right = evaluation(args, patched, made, images)
    for key, value in facts.items():
        print(f"{key}: {value}", flush=True)
    return fine and finite and logged == 3 and right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    if "--quick" in sys.argv:  # as the other benchmarks
        print("left out: needs a checkout of openvla-oft, see --help")
        return
    for name in ("python", "host", "transformers", "dlimp", "checkpoint"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--data_root_dir", type=Path, default=ROOT / "tests" / "libero")
    parser.add_argument("--images", default="1,2", help="1: one image; 2: the wrist camera and proprioception too")
    args = parser.parse_args()
    fine = True
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for checkout in (work / "plain", work / "patched"):
            shutil.copytree(args.host, checkout)
        command = [sys.executable, "-m", "vla_energy.cli", "patch", "apply", str(work / "patched")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        for images in args.images.split(","):
            print(f"== {'one image' if images == '1' else 'two images, proprio'}", flush=True)
            fine &= check(args, work, images)
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
