"""What lies in more samples of a diffusion policy: held-out L1 of its own chunk, and of the best of N, by N.

    python benchmarks/samples.py --checkpoint runs/diffusion/latest --data_root_dir vla_energy/data/bundled \
        --dataset_name metaworld_demo

No head is needed: this is what a perfect chooser among the samples would reach, and what their mean gives without one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from vla_energy.config import CandidatesConfig
from vla_energy.finetune.frames import FrameReader, PolicyFrames
from vla_energy.measures import chunk_distance


def best_of(frames: list[PolicyFrames]) -> dict[str, float]:
    """L1, normalised units: of the policy's chunk (`1`), of the best of the first N samples, of the mean of all."""
    chunks, expert = [], torch.cat([batch.expert for batch in frames])
    for batch in frames:
        assert batch.samples is not None
        chunks.append(torch.cat([batch.policy[:, None], batch.samples], 1))
    samples = torch.cat(chunks)
    distances = chunk_distance(samples, expert)
    sizes = [1, *(n for n in (2, 3, 5, 9, 17, 33) if n < samples.shape[1]), samples.shape[1]]
    table = {str(n): float(distances[:, :n].amin(1).mean()) for n in sizes}
    mean = chunk_distance(samples.mean(1, keepdim=True), expert)
    spread = chunk_distance(samples[:, 1:], samples[:, 0])
    return {**table, "mean": float(mean.mean()), "spread": float(spread.mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data_root_dir", required=True)
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--samples", type=int, default=8, help="besides the policy's own chunk")
    parser.add_argument("--steps", type=int, default=0, help="of a denoising; 0 takes the checkpoint's")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/samples.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    reader = FrameReader(args.checkpoint, args.data_root_dir, args.dataset_name)
    if not reader.vla.diffuses:
        raise SystemExit(f"{args.checkpoint} has an L1 head: there is one chunk for an observation")
    head = reader.vla.action_head
    head.num_steps_inference = args.steps or head.num_steps_inference
    candidates = CandidatesConfig(samples=args.samples)
    frames = list(reader.read("val", args.frames, batch_size=16, candidates=candidates))
    table = best_of(frames)
    print(f"{sum(len(batch.expert) for batch in frames)} frames, {head.num_steps_inference} denoising steps")
    for name, value in table.items():
        print(f"{name if not name.isdigit() else f'best of {name}':12} {value:.4f}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**vars(args), "out": str(args.out), "table": table}, indent=1))


if __name__ == "__main__":
    main()
