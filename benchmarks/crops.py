"""What the policy's chunks for cropped images hold as candidates, beside noise, inner layers and retrieved chunks.

    python benchmarks/crops.py --checkpoint runs/seen12/latest --data_root_dir data --dataset_name metaworld_seen12
    python benchmarks/crops.py --checkpoint ... --quick

Held-out frames; nothing is written into the checkpoint. By source: mean distance to the policy's chunk, and L1 of the
best of its chunks to the expert's. By mode: L1 of what the head chooses, without a gate, and behind a margin that the
other half of the episodes set. The mean of policy and crops is what averaging over them gives without a head.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from vla_energy.advisor import load_advisor
from vla_energy.config import CandidatesConfig
from vla_energy.finetune.frames import FrameReader, PolicyFrames
from vla_energy.modes import Advisor
from vla_energy.preflight.measure import measure
from vla_energy.preflight.verdict import calibrate, effect, halves
from vla_energy.rerank import Reranker


def with_candidates(advisor: Advisor, candidates: CandidatesConfig) -> Advisor:
    """The same head and memory, choosing among others."""
    old = advisor.reranker
    assert old is not None
    config = dataclasses.replace(old.config, candidates=candidates)
    new = Reranker(old.head, old.statistics, config, old.margin, strict=True)
    return Advisor(new, advisor.memory, gripper_dims=advisor.gripper_dims, scale=advisor.scale)


def results(advisor: Advisor, frames: list[PolicyFrames]) -> dict[str, Any]:
    """Sources, and each reranking mode's choice."""
    assert advisor.reranker is not None
    measured = measure(advisor, frames)
    ours, rest = halves(measured)
    found: dict[str, Any] = {"policy": float(measured.policy_error.mean())}
    for mode in (name for name in advisor.modes if name.startswith("rerank")):
        record = measured.modes[mode]
        margin = calibrate(measured, record, ours, advisor.reranker.config.rerank)
        gated = dataclasses.asdict(effect(measured, record, margin, rest))
        found[mode] = {"ungated": float(record.error.mean()), "gated": gated, "sources": record.sources}
    return found


def mean_of_crops(frames: list[PolicyFrames]) -> float:
    """L1 of the mean of the policy's chunk and those of its crops."""
    errors = []
    for batch in frames:
        assert batch.crops is not None
        mean = torch.cat([batch.policy[:, None], batch.crops], 1).mean(1)
        errors.append((mean - batch.expert).abs().mean((1, 2)))
    return float(torch.cat(errors).mean())


def show(name: str, found: dict[str, Any]) -> None:
    for mode in (key for key in found if key.startswith("rerank")):
        gated = found[mode]["gated"]
        low, high = (100 * end for end in gated["interval"])
        closed = "none" if gated["gap_closed"] is None else f"{100 * gated['gap_closed']:.0f} %"
        print(
            f"{name}, {mode}: L1 {found['policy']:.4f} -> {found[mode]['ungated']:.4f} ungated; behind its margin "
            f"{gated['l1_policy']:.4f} -> {gated['l1_gated']:.4f} ({low:+.1f} to {high:+.1f} %), best "
            f"{gated['l1_oracle']:.4f}, gap closed {closed}"
        )
        for source, numbers in found[mode]["sources"].items():
            print("   ", source, ", ".join(f"{key} {value:.4f}" for key, value in numbers.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="60 frames and one scale")
    parser.add_argument("--checkpoint", required=True, help="folder with an energy head")
    parser.add_argument("--data_root_dir", required=True)
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--frames", type=int, default=600)
    parser.add_argument("--crops", type=int, default=8)
    parser.add_argument("--scales", default="0.9,0.95,0.98", help="sides of the crops, comma separated")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/crops.json"))
    args = parser.parse_args()
    scales = [float(scale) for scale in args.scales.split(",")]
    if args.quick:
        args.frames, scales = 60, scales[:1]
    torch.set_num_threads(1)
    reader = FrameReader(args.checkpoint, args.data_root_dir, args.dataset_name)
    vla = reader.vla
    advisor = load_advisor(args.checkpoint, reader.statistics, vla.horizon, vla.action_dim, vla.context_dim)
    if advisor.reranker is None:
        raise SystemExit(f"{args.checkpoint} has no energy head: nothing can choose among crops")
    own, table = dataclasses.replace(advisor.reranker.config.candidates, crops=0), {}
    for scale in scales:
        crops = dataclasses.replace(own, crops=args.crops, crop_scale=scale)
        frames = list(reader.read("val", args.frames, candidates=crops))
        if not table:
            plain = [dataclasses.replace(batch, crops=None) for batch in frames]
            table["without crops"] = results(with_candidates(advisor, own), plain)
            show("without crops", table["without crops"])
        alone = dataclasses.replace(crops, num_candidates=0, layer_exits=False)
        for name, config in ((f"crops {scale:g} too", crops), (f"crops {scale:g} alone", alone)):
            table[name] = results(with_candidates(advisor, config), frames)
            show(name, table[name])
        table[f"mean of policy and crops {scale:g}"] = mean_of_crops(frames)
        print(f"mean of policy and crops {scale:g}: L1 {table[f'mean of policy and crops {scale:g}']:.4f}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
