"""The whole idea in two dimensions: a policy that is off, experts, a head that learns, reranking behind a gate.

A context is an angle; the expert's action is a point on a circle there. Writes one picture: the energies of three
contexts, and how far policy, reranked choice and best candidate lie from the expert. No robot, no backbone.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure

from vla_energy import EnergyHead, Reranker
from vla_energy.calibrate import calibrate_margin
from vla_energy.candidates import propose
from vla_energy.config import CandidatesConfig, EnergyConfig
from vla_energy.guard import GuardedOptimizer
from vla_energy.landscape import plane_slice, plot_slice
from vla_energy.measures import chunk_distance
from vla_energy.objective import EnergyObjective


def scene(angle: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Angles `(B,)` -> context `(B,1,8)`, its mask, the expert's chunk `(B,1,2)` and that of a policy that is off."""
    context = torch.stack([wave(k * angle) for k in range(1, 5) for wave in (torch.cos, torch.sin)], 1)[:, None]
    expert = 0.6 * torch.stack([angle.cos(), angle.sin()], 1)[:, None]
    off = 0.25 * (3 * angle).sin()  # along the circle, one way here and the other there
    policy = 0.6 * torch.stack([(angle + off).cos(), (angle + off).sin()], 1)[:, None]
    return context, torch.ones(len(angle), 1, dtype=torch.bool), expert, policy


def main() -> dict[str, float]:
    """Trains, calibrates, chooses, draws; returns mean distances to the expert and the share of replaced actions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500, help="of training (default 500, about 15 s of one core)")
    parser.add_argument("--out", type=Path, default=Path("runs/toy_2d.png"), help="the picture")
    args = parser.parse_args()
    draw, config = torch.manual_seed(0), EnergyConfig()
    head = EnergyHead(context_dim=8, action_dim=2, horizon=1, config=config)
    optimiser = GuardedOptimizer.adamw(head.parameter_groups(), 1e-3, config.guard, warm_steps=50)
    objective = EnergyObjective(head, config)
    for step in range(args.steps):
        context, mask, expert, policy = scene(2 * math.pi * torch.rand(32, generator=draw))
        loss, metrics = objective(context, mask, expert, policy[:, None], draw, step)
        loss.backward()
        optimiser.step()  # skips or clips what would do harm
        if step % 100 == 0:
            print(f"step {step:4d}  loss {loss:.3f}  Spearman with distance {metrics['energy/spearman']:.2f}")

    reranker, proposals = Reranker(head, None, config, 0.0, strict=True), CandidatesConfig(64, (0.05, 0.1, 0.2))
    for calibrating in (True, False):  # the gate's margin is set on some contexts and used on others
        context, mask, expert, policy = scene(2 * math.pi * torch.rand(500, generator=draw))
        candidates = propose(policy, None, proposals, draw, gripper_dims=()).actions
        chosen = reranker(context, mask, candidates)
        distances = chunk_distance(candidates, expert)
        if calibrating:
            reranker.margin = calibrate_margin(chosen.energies, distances)
    after, best = distances.gather(1, chosen.index[:, None]), distances.amin(1)
    found = {"policy": float(distances[:, 0].mean()), "reranked": float(after.mean()), "best": float(best.mean())}

    figure = Figure(figsize=(20, 5), layout="constrained")
    *slices, bars = figure.subplots(1, 4)
    encoded = head.eval().encode(context[:3], mask[:3], policy[:3])
    plane = plane_slice(lambda chunks: head(encoded, chunks), policy[:3], expert[:3], generator=draw)
    for row, axis in enumerate(slices):
        plot_slice(plane, row, axis, f"energies, context {row + 1}")
    bars.bar(list(found), list(found.values()))
    bars.set(title=f"distance to the expert; margin {reranker.margin:.3g}", ylabel="mean over 500 new contexts")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out)
    print(*(f"{name} {value:.3f}" for name, value in found.items()), f"written to {args.out}", sep="; ")
    return found | {"replaced": float(chosen.accepted.float().mean())}


if __name__ == "__main__":
    main()
