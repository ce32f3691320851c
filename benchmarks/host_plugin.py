"""The energy head inside the real openvla-oft, on a CPU with a tiny checkpoint: what it changes, and what it does not.

    git clone https://github.com/moojink/openvla-oft && git -C openvla-oft checkout 213c5ff8
    git clone https://github.com/moojink/transformers-openvla-oft; git clone https://github.com/moojink/dlimp_openvla
    python benchmarks/host_plugin.py --python HOST_PYTHON --host openvla-oft --transformers transformers-openvla-oft \
        --dlimp dlimp_openvla --checkpoint TINY_CHECKPOINT --data_root_dir DATA

HOST_PYTHON is the interpreter of an environment with the host's pins. The checkout is copied, the copy patched. Runs
the host's fine-tuning (as it is, twice; patched with the energy off, and on) and compares every file that it
writes; then the host's evaluation call, and its deploy.py, with the gate shut and open, and its energies against the
native path's. All of it with one image, then with the wrist camera's and proprioception too, then with FiLM as well;
last, what the plugin refuses to train beside. Exits with 1 where something differs that must not, or a metric is not
finite.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from host_cpu import register
from host_flags import DATASET, ROOT, add_data, chosen, copy_checkout, host_parser
from host_server import HostServer

from vla_energy.actions import load_statistics
from vla_energy.backbones import load_openvla
from vla_energy.checkpoint import load_head

_TWO = ["--num_images_in_input", "2", "--use_proprio", "True"]
INPUTS = {"1": [], "2": _TWO, "film": [*_TWO, "--use_film", "True"]}
"""The host's flags; its default is one image, without proprioception."""
NAMES = {"1": "one image", "2": "two images, proprio", "film": "two images, proprio, FiLM"}
REFUSED = {
    "discrete tokens": (["--use_l1_regression", "False"], "needs --use_l1_regression True"),
    "diffusion": (["--use_l1_regression", "False", "--use_diffusion", "True"], "would tell the head the answer"),
}
"""What the plugin cannot train beside: the host's flags, and words of the reason."""
TOLERANCE = 1e-5
"""Largest difference of an energy between the host in fp32 and the native path."""


def finetune(args: argparse.Namespace, checkout: Path, target: Path, *flags: str) -> Path:
    """Three optimiser steps (the host's `max_steps` 2) and a checkpoint, moved to `target`."""
    runs = target.parent / "runs"  # always the same: the host writes the path into its files
    shutil.rmtree(runs, ignore_errors=True)
    args.server.run(checkout, command(args, runs, *flags))
    return (runs / "run--2_chkpt").rename(target)


def command(args: argparse.Namespace, runs: Path, *flags: str) -> list[str]:
    """Three optimiser steps in the folder `runs`, from a fresh copy of the checkpoint there."""
    vla = runs / "vla"
    shutil.copytree(args.checkpoint, vla)  # the host writes into it
    return [
        "host_cpu.py", "finetune", "--vla_path", str(vla), "--data_root_dir", str(args.data_root_dir.resolve()),
        "--dataset_name", DATASET, "--run_root_dir", str(runs), "--run_id_override", "run", "--shuffle_buffer_size",
        "64", "--batch_size", "2", "--max_steps", "2", "--save_freq", "2", "--image_aug", "False", "--lora_rank", "4",
        "--wandb_log_freq", "1", *flags,
    ]  # fmt: skip


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
    (output,) = args.server.run(checkout, ["host_cpu.py", "evaluate", str(checkpoint), DATASET, images])
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
    for name, wanted in (("off", answers["plain"]), ("shut", answers["plain"]), ("open", answers["rerank open"])):
        equal = answers["deploy"][name] == wanted
        facts[f"deploy.py, rerank {name}: as get_action"] = equal
        right &= equal
    scored, equal = scores(checkpoint, answers)
    return facts | scored, right and equal


def scores(checkpoint: Path, answers: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The same head in the host and in the native path, and whether its energies are equal to 1e-5."""
    facts: dict[str, Any] = {"energies up to": float(np.abs(answers["scored"]["energies"]).max())}
    differences = [_rescored(checkpoint, answers["scored"])]
    facts["energies of the same context, host's torch against ours"] = differences[0]
    for name, answer in (("fp32", "scored in fp32"), ("bf16", "scored")):
        energy, context = _native(checkpoint, answers[answer])
        facts[f"the host in {name} against the native path in fp32, each with its own context"] = (
            f"energies {energy:.1e}, context {context:.1e}"
        )
        if name == "fp32":
            differences.append(energy)
    return facts, max(differences) < TOLERANCE


def _rescored(checkpoint: Path, scored: dict[str, Any]) -> float:
    """Largest difference between the energies that the host's environment gave and this one's, of the same context."""
    head = load_head(checkpoint).head.eval()
    context, mask, chunks, energies = (torch.tensor(scored[key]) for key in ("context", "mask", "chunks", "energies"))
    with torch.no_grad():
        return float((head(head.encode(context, mask, chunks[:, 0]), chunks) - energies).abs().max())


def _native(checkpoint: Path, scored: dict[str, Any]) -> tuple[float, float]:
    """Largest differences of energies and visible context: the native path reads what the host's model was given."""
    batch = {key: torch.tensor(scored[key]) for key in ("pixel_values", "input_ids", "attention_mask")}
    images = batch["pixel_values"].shape[1] // 6  # two vision towers
    vla = load_openvla(checkpoint, torch.float32, num_images=images, use_proprio="proprio" in scored)
    if "proprio" in scored:
        batch["proprio"] = torch.tensor(scored["proprio"])
    out = vla.predict(batch, layer_exits="off")
    head = load_head(checkpoint).head.eval()
    theirs, mask, chunks, energies = (torch.tensor(scored[key]) for key in ("context", "mask", "chunks", "energies"))
    if not torch.equal(mask, out.context_mask):
        sys.exit(f"error: the host shows {int(mask.sum())} tokens to the head, ours {int(out.context_mask.sum())}")
    with torch.no_grad():
        ours = head(head.encode(out.context, mask, chunks[:, 0]), chunks)
    return float((ours - energies).abs().max()), float((out.context - theirs)[mask].abs().max())


def refuse(args: argparse.Namespace, work: Path) -> bool:
    """Whether the host stops where the plugin cannot train beside it, and says why."""
    fine = True
    for name, (flags, words) in REFUSED.items():
        runs = work / name.replace(" ", "-")
        asked = command(args, runs, *flags, "--energy.enabled", "True")
        ((code, text),) = args.server.attempt(work / "patched", asked)
        told = next((line for line in text.splitlines() if "HostError: " in line and words in line), None)
        print(f"{name}: {told or f'exit code {code}, without the reason'}", flush=True)
        fine &= bool(code and told) and not list(runs.glob("run--*"))
    return fine


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
    parser = host_parser(__doc__)
    add_data(parser)
    parser.add_argument(
        "--images", default="1,2,film,refused",
        help="1: one image; 2: the wrist camera and proprioception too; film: these with FiLM; refused: what cannot be",
    )  # fmt: skip
    args = parser.parse_args()
    names = chosen(parser, "images", args.images, [*NAMES, "refused"])
    register(ROOT / "tests" / "golden_towers.py")  # for the native path, in this process
    args.server = HostServer(args)
    fine = True
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name in ("plain", "patched"):
            copy_checkout(args.host, work / name, patched=name == "patched")
        for images in names:
            print(f"== {NAMES.get(images, images)}", flush=True)
            fine &= refuse(args, work) if images == "refused" else check(args, work, images)
    args.server.close()
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
