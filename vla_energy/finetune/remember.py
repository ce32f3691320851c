"""Builds a chunk memory of the training set beside a checkpoint, for retrieval at inference."""

from __future__ import annotations

import argparse

EXAMPLE = """example:
  vla-energy memory --checkpoint runs/mine/latest --data-root-dir data \\
      --dataset-name metaworld_unseen6"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="checkpoint folder; the memory goes there")
    parser.add_argument("--data-root-dir", required=True, metavar="DIR", help="folder with RLDS datasets")
    parser.add_argument("--dataset-name", required=True, help="the dataset that the policy was trained on")
    parser.add_argument("--dataset-config", metavar="FILE", help="JSON or YAML file that names its fields, if unknown")
    parser.add_argument("--statistics", metavar="NAME", help="whose statistics, where the checkpoint has several")
    parser.add_argument("--max-frames", type=int, default=50_000, metavar="N", help="frames to keep (default 50000)")
    parser.add_argument("--device", default="cpu", help="device of the policy (default cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of projection and frames (default 0)")
    parser.add_argument("--json", action="store_true", help="print path, frames and size as JSON instead of words")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    import json
    from pathlib import Path

    from vla_energy.finetune.frames import FrameReader
    from vla_energy.memory import PREFIX, ChunkMemory, MemoryBatch

    if args.max_frames < 1:
        raise ValueError(f"--max-frames {args.max_frames}: must be 1 or more")
    folder = Path(args.checkpoint)
    if not folder.is_dir():
        raise ValueError(f"--checkpoint {folder} is not a folder; the memory is written into it")
    if old := sorted(folder.glob(f"{PREFIX}*")):
        raise ValueError(f"{old[0]} is there already: delete it to build another")
    reader = FrameReader(
        args.checkpoint, args.data_root_dir, args.dataset_name,
        statistics_of=args.statistics, dataset_config=args.dataset_config, device=args.device, seed=args.seed,
    )  # fmt: skip
    batches = (
        MemoryBatch(frames.context, frames.context_mask, frames.policy, frames.expert, frames.episodes)
        for frames in reader.read("train", args.max_frames)
    )
    memory = ChunkMemory.build(batches, reader.statistics, max_frames=args.max_frames, seed=args.seed)
    path = memory.save(folder, step=0)
    told = {"frames": len(memory), "bytes": memory.nbytes, "path": str(path)}
    print(json.dumps(told) if args.json else f"{len(memory)} frames in {memory.nbytes / 1e6:.1f} MB: {path}")
    return 0
