"""Resuming and two ranks in the real openvla-oft, on a CPU with a tiny checkpoint: what stays equal, what does not.

    python benchmarks/host_resume.py --python HOST_PYTHON --host openvla-oft --transformers transformers-openvla-oft \
        --dlimp dlimp_openvla --checkpoint TINY_CHECKPOINT

with the folders of `host_plugin.py`. The host's finetune.py, patched, batch 2, runs 4 steps; 2 steps and, resumed from
what they saved, 2 more, once with the host's own resume and once with what that drops put back (LoRA's factors, which
it merges, and the optimiser); then 3 steps on one rank with batch 4 and on two gloo ranks with 2. A resumed run goes on
in the data where the first one stopped, which the host's own does not. Exits with 1 where something differs that
must not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from host_flags import DATASET, add_data, chosen, copy_checkout, host_parser
from host_server import HostServer

State = dict[str, Any]
LEARNING = ["--energy.learning_rate", "0.001", "--energy.warm_steps", "0"]
"""So that the head moves in the first steps as far as it ever does."""
QUIET = [
    "--energy.negatives.expert_noise.count", "0", "--energy.negatives.policy_noise.count", "0",
    "--energy.negatives.in_batch.count", "0", "--energy.head.blind_share", "0",
]  # fmt: skip
"""Nothing that is drawn a rank, or taken from the rank's own rows: one rank draws otherwise than two."""
TOLERANCE = 1e-5
"""Largest difference of a weight between one rank and two."""


def train(
    args: argparse.Namespace, folder: Path, vla: Path, *flags: str, world: int = 1, batch: int = 2, skip: int = 0,
    restore: Path | None = None,
) -> list[State]:  # fmt: skip
    """One run of the host's script on `world` ranks in `folder`; what each has learnt."""
    folder.mkdir()
    settings = [
        "--vla_path", str(vla), "--data_root_dir", str(args.data_root_dir.resolve()), "--dataset_name", DATASET,
        "--run_root_dir", str(folder), "--run_id_override", "run", "--shuffle_buffer_size", "64", "--batch_size",
        str(batch), "--image_aug", "False", "--lora_rank", "4", "--energy.enabled", "True", *LEARNING, *flags,
    ]  # fmt: skip
    commands, notes = [], [folder / f"state-{rank}.pt" for rank in range(world)]
    for rank, note in enumerate(notes):
        job = {"rank": rank, "world": world, "store": str(folder / "store"), "skip": skip, "note": str(note)}
        path = folder / f"job-{rank}.json"
        path.write_text(json.dumps({**job, "restore": None if restore is None else str(restore)}))
        commands.append(["host_steps.py", str(path), *settings])
    args.server.run(args.checkout, *commands)
    return [torch.load(note, weights_only=True) for note in notes]


def steps(first: int, last: int) -> list[str]:
    """Flags of a run whose first step has this number, and which saves and ends after the last."""
    resume = ["--resume", "True", "--resume_step", str(first)] if first else []
    return [*resume, "--max_steps", str(last), "--save_freq", str(last)]


def distance(one: Any, other: Any) -> float:
    """Largest absolute difference of two nested dicts or lists of tensors and numbers; inf where they do not fit."""
    if isinstance(one, torch.Tensor):
        return float((one.double() - other.double()).abs().max()) if one.numel() else 0.0
    if isinstance(one, (dict, list, tuple)):
        pairs = one.items() if isinstance(one, dict) else enumerate(one)
        return max(
            [0.0 if len(one) == len(other) else torch.inf, *(distance(value, other[key]) for key, value in pairs)]
        )
    return 0.0 if one == other else torch.inf


def told(value: float) -> str:
    """A distance in words."""
    return "equal bits" if value == 0 else f"differs by {value:.1e}"


def resumed(args: argparse.Namespace, work: Path) -> bool:
    """4 steps against 2 and 2 more; whether what must be equal is."""
    (whole,) = train(args, work / "whole", _base(args, work / "base"), *steps(0, 3))
    (part,) = train(args, work / "part", _base(args, work / "base"), *steps(0, 1))
    saved = work / "part" / "run--1_chkpt"
    unmerged = _base(args, work / "unmerged")
    for path in unmerged.glob("*_checkpoint.pt"):
        path.unlink()
    for path in saved.glob("*--1_checkpoint.*"):
        shutil.copy(path, unmerged)
    note = work / "part" / "state-0.pt"
    (own,) = train(args, work / "own", saved, *steps(1, 2), skip=2)
    (off,) = train(args, work / "off", saved, *steps(1, 2), "--energy.enabled", "False", skip=2)
    (full,) = train(args, work / "full", unmerged, *steps(1, 2), restore=note, skip=2)
    print(f"2 steps against 4: {_told(part, whole)}")
    print(f"2, save, the host's own resume, 2 more, against 4: {_told(own, whole)}")
    same = distance(own["policy"], off["policy"])
    print(f"the policy of that resumed run against the same with the energy off: {told(same)}")
    print(f"2, save, resume with what the host drops put back, 2 more, against 4: {_told(full, whole)}", flush=True)
    moved = distance(part["head"], whole["head"])
    return moved > 0 and same == 0 and all(distance(full[name], whole[name]) == 0 for name in whole)


def ranked(args: argparse.Namespace, work: Path) -> bool:
    """One rank against two with the same rows; whether what must be equal is."""
    base = _base(args, work / "ranks")
    still = ["--learning_rate", "0", *QUIET]
    ends = steps(0, 2)
    (single,) = train(args, work / "single", base, *ends, *still, batch=4)
    first, second = train(args, work / "two", base, *ends, *still, world=2)
    one, other = train(args, work / "default", base, *ends, world=2)
    equal, close = distance(first["head"], second["head"]), distance(first["head"], single["head"])
    print(f"two ranks, the policy at rest: heads {told(equal)}; against one rank: {told(close)}")
    free = distance(one["head"], other["head"])
    print(f"two ranks, the policy trained, default negatives: heads {told(free)}", end="; ")
    print(f"the host's action heads: {told(distance(one['action head'], other['action head']))}", flush=True)
    moved = distance(one["head"], first["head"])
    return moved > 0 and equal == free == 0 and close <= TOLERANCE


def _base(args: argparse.Namespace, folder: Path) -> Path:
    """A fresh copy of the checkpoint: the host writes into it."""
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(args.checkpoint, folder))


def _told(one: State, other: State) -> str:
    return "; ".join(f"{name} {told(distance(one[name], other[name]))}" for name in other)


def main() -> None:
    parser = host_parser(__doc__)
    add_data(parser)
    parser.add_argument("--parts", default="resume,ranks", help="comma-separated")
    args = parser.parse_args()
    parts = {"resume": resumed, "ranks": ranked}
    names = chosen(parser, "parts", args.parts, parts)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        args.checkout = copy_checkout(args.host, work / "checkout", patched=True)
        args.server = HostServer(args)
        done = [parts[name](args, work) for name in names]
        args.server.close()
    sys.exit(0 if all(done) else 1)


if __name__ == "__main__":
    main()
