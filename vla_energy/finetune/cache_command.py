"""Runs the frozen policy once over a dataset and keeps what heads are trained on; goes on where it was stopped."""

from __future__ import annotations

import argparse

EXAMPLE = """example:
  vla-energy cache --checkpoint runs/mine/latest --data-root-dir data \\
      --dataset-name metaworld_unseen6 --out runs/cache"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="checkpoint folder, or embedded")
    parser.add_argument("--data-root-dir", required=True, metavar="DIR", help="folder with RLDS datasets, or embedded")
    parser.add_argument("--dataset-name", required=True, help="the dataset that the policy was trained on")
    parser.add_argument("--dataset-config", metavar="FILE", help="JSON or YAML file that names its fields, if unknown")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the cache")
    parser.add_argument("--split", default="train", help="train (default) or val")
    parser.add_argument("--statistics", metavar="NAME", help="whose statistics, where the checkpoint has several")
    parser.add_argument("--dtype", default="bf16", help="of the stored contexts: bf16 (default) or fp32")
    parser.add_argument("--precision", default="fp32", help="of the policy's pass: fp32 (default) or bf16")
    parser.add_argument("--layer-exits", default="raw", help="how inner layers are decoded: raw (default) or normed")
    parser.add_argument("--max-frames", type=int, metavar="N", help="so many frames, over all episodes (default all)")
    parser.add_argument("--shard-frames", type=int, default=512, metavar="N", help="frames a file (default 512)")
    parser.add_argument("--batch-size", type=int, default=32, help="frames the policy reads at once (default 32)")
    parser.add_argument("--pool", type=int, default=1, metavar="P", help="store means of P x P patches (default 1)")
    parser.add_argument("--device", default="cpu", help="device of the policy (default cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of frames (default 0)")
    parser.add_argument("--dry-run", action="store_true", help="tell the size, and write nothing")
    parser.add_argument("--json", action="store_true", help="print frames and sizes as JSON instead of words")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    import json

    from vla_energy.config import checks
    from vla_energy.finetune.features import CacheBuilder, CacheOptions

    checks.one_of("--layer-exits", args.layer_exits, ("raw", "normed"))
    options = CacheOptions(args.split, args.dtype, args.pool, args.batch_size, args.shard_frames, args.max_frames)
    builder = CacheBuilder(
        args.checkpoint, args.data_root_dir, args.dataset_name, args.out, options,
        statistics_of=args.statistics, dataset_config=args.dataset_config, device=args.device, seed=args.seed,
        precision=args.precision, layer_exits=args.layer_exits,
    )  # fmt: skip
    if args.dry_run:
        told = {"frames": builder.manifest.frames, "bytes": builder.size, "left": builder.left}
        print(json.dumps(told) if args.json else builder.describe())
        return 0
    if not args.json:
        print(builder.describe(), flush=True)
    manifest = builder.build()
    written = sum(entry["bytes"] for entry in manifest.shards if entry is not None)
    told = {"frames": manifest.frames, "bytes": written, "left": 0}
    print(json.dumps(told) if args.json else f"{manifest.frames} frames, {written / 1e6:.1f} MB: {args.out}")
    return 0
