"""Does the energy rank well? Measures on held-out frames, in normalised units.

`evaluate_ranking` applies the pure measures of `measures.py` to a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vla_energy.candidates import Source, propose
from vla_energy.config import EnergyConfig
from vla_energy.measures import chunk_distance, spearman, wins_and_pairs
from vla_energy.rerank import ScoringHead, choose, scoring

NOISE_STDS = (0.1, 0.3, 0.5)
"""Standard deviations of the noise on the expert against which win rates are told (report, remedy 3)."""

NEAR, FAR = 0.05, 0.3
"""Distances (mean absolute, normalised units): of the kind `at_0.05`, about a good policy's error, and from which on a
negative of any kind also counts as `far`."""

Batch = tuple[Tensor, Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""`context (B,S,D)`, `context_mask (B,S)`, `expert (B,H,A)`, `layer_actions (B,L,H,A)` with the policy's chunk last
(L = 1 without layer exits), and of a policy whose chunks are samples K more `(B,K,H,A)`, which join the candidates."""


def rerank_l1(energies: Tensor, distances: Tensor) -> dict[str, Tensor]:
    """Mean distance of the policy's chunk (index 0), of the lowest energy, and of the best candidate there is."""
    chosen = distances.gather(1, energies.argmin(1, keepdim=True))
    return {"policy": distances[:, 0].mean(), "chosen": chosen.mean(), "oracle": distances.min(1).values.mean()}


@dataclass(frozen=True)
class RankingReport:
    """What `evaluate_ranking` measured on M frames.

    Attributes:
        metrics: `energy`: `win_rate` per kind of negative, `spearman` over the candidates, `spearman_to_policy`, the
            same for the plain distance to the policy's chunk, which a head should beat, `nonfinite` share of
            candidates' energies; one makes `spearman` NaN, and one of a pair the `win_rate` of its kind. `rerank`:
            `l1_policy`, `l1_reranked` (ungated), `l1_gated`, `l1_oracle`, and `kept`, the share of frames on which the
            gate keeps the policy's chunk. `frames`. A kind that the data do not offer (no inner layer, one frame a
            batch) is left out.
        energies: `(M,N)` of the candidates, on the CPU; inf where not finite.
        distances: `(M,N)` to the expert; with `energies` what `calibrate_margin` takes.
        sources: N names of the candidates' columns.
    """

    metrics: dict[str, dict[str, float | dict[str, float]] | float]
    energies: Tensor
    distances: Tensor
    sources: tuple[str, ...]


@dataclass
class _Tally:
    wins: dict[str, float] = field(default_factory=dict)
    pairs: dict[str, float] = field(default_factory=dict)
    energies: list[Tensor] = field(default_factory=list)
    distances: list[Tensor] = field(default_factory=list)
    to_policy: list[Tensor] = field(default_factory=list)

    def add(self, kind: str, energies: Tensor, valid: Tensor) -> None:
        wins, pairs = wins_and_pairs(energies, valid)
        self.wins[kind] = self.wins.get(kind, 0.0) + float(wins)
        self.pairs[kind] = self.pairs.get(kind, 0.0) + float(pairs)


def evaluate_ranking(
    head: ScoringHead,
    batches: Iterable[Batch],
    config: EnergyConfig,
    generator: torch.Generator | None = None,
    *,
    gripper_dims: Sequence[int] = (-1,),
    scale: Tensor | None = None,
    margin: float | None = None,
) -> RankingReport:
    """Win rates of the expert against each kind of negative, and ranking among the candidates of inference.

    Negatives within `config.negatives.near_positive_threshold` of the expert are not counted.

    Args:
        batches: held-out frames; see `Batch`.
        config: threshold, candidates and gate.
        generator: of noise and shuffles.
        gripper_dims, scale: of the candidates' noise, see `propose`.
        margin: overrides `config.rerank.margin`.

    Raises:
        ValueError: there is no batch, or shapes do not fit.
    """
    tally, sources = _Tally(), ()
    with scoring(head):
        for context, mask, expert, layer_actions, *samples in batches:
            encoded = head.encode(context, mask, layer_actions[:, -1])
            kinds = _negatives(expert, layer_actions, generator)
            kinds |= {"samples": samples[0].to(expert.dtype)} if samples else {}
            chunks = torch.cat([expert[:, None], *kinds.values()], 1)
            candidates = propose(
                layer_actions[:, -1],
                layer_actions,
                config.candidates,
                generator,
                gripper_dims=gripper_dims,
                scale=scale,
                others={"sample": Source(samples[0])} if samples else None,
            )
            sources = candidates.sources
            both = torch.cat([chunks, candidates.actions.to(chunks.dtype)], 1)
            energies, distances = head(encoded, both).float(), chunk_distance(both, expert)
            valid = distances > config.negatives.near_positive_threshold
            tally.add("far", energies[:, : chunks.shape[1]], (distances >= FAR)[:, : chunks.shape[1]])
            start = 1
            for kind, negatives in kinds.items():
                columns = [0, *range(start, start + negatives.shape[1])]
                tally.add(kind, energies[:, columns], valid[:, columns])
                start += negatives.shape[1]
                if kind.startswith("layer_exit_"):
                    tally.add("layer_exits", energies[:, columns], valid[:, columns])
            tally.energies.append(energies[:, start:].cpu())
            tally.distances.append(distances[:, start:].cpu())
            tally.to_policy.append(chunk_distance(candidates.actions, candidates.actions[:, 0]).cpu())
    if not tally.energies:
        raise ValueError("no held-out batch to evaluate on")
    return _report(tally, sources, config.rerank.margin if margin is None else margin)


def _report(tally: _Tally, sources: tuple[str, ...], margin: float) -> RankingReport:
    raw, distances = torch.cat(tally.energies), torch.cat(tally.distances)
    # Without a number for the policy's chunk nothing can be compared: `rerank` then keeps that chunk.
    usable = raw.isfinite() & raw[:, :1].isfinite()
    energies = torch.where(usable, raw, torch.full_like(raw, math.inf))
    index, accepted = choose(energies, margin)
    l1 = rerank_l1(energies, distances)
    win_rates = {kind: tally.wins[kind] / pairs for kind, pairs in tally.pairs.items() if pairs}
    metrics: dict[str, dict[str, float | dict[str, float]] | float] = {
        "energy": {
            "win_rate": win_rates,
            "spearman": float(spearman(raw, distances)),
            "spearman_to_policy": float(spearman(torch.cat(tally.to_policy), distances)),
            "nonfinite": float((~raw.isfinite()).float().mean()),
        },
        "rerank": {
            "l1_policy": float(l1["policy"]),
            "l1_reranked": float(l1["chosen"]),
            "l1_gated": float(distances.gather(1, index[:, None]).mean()),
            "l1_oracle": float(l1["oracle"]),
            "kept": 1 - float(accepted.float().mean()),
        },
        "frames": float(len(energies)),
    }
    return RankingReport(metrics, energies, distances, sources)


def _negatives(expert: Tensor, layer_actions: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
    """Chunks `(B,M,H,A)` by kind: the B rows' experts, noisy, shuffled, and each inner layer's."""
    rows, horizon = expert.shape[:2]
    source = generator.device if generator is not None else expert.device
    kinds = {}
    if rows > 1:
        kinds["in_batch"] = expert.expand(rows, -1, -1, -1)  # the row's own is at distance 0, thus not valid
    for std in NOISE_STDS:
        noise = torch.randn(expert.shape, generator=generator, device=source).to(expert)
        kinds[f"noise_{std:g}"] = (expert + std * noise)[:, None]
    noise = torch.randn(expert.shape, generator=generator, device=source).to(expert)
    noise = NEAR * noise / noise.abs().mean((1, 2), keepdim=True)
    kinds[f"at_{NEAR:g}"] = (expert + noise)[:, None]
    if horizon > 1:
        # Each step gets the next one's place in a random cycle: a permutation of the row's own without a fixed point.
        order = torch.rand(rows, horizon, generator=generator, device=source).argsort(1).to(expert.device)
        derangement = torch.empty_like(order).scatter_(1, order, order.roll(-1, 1))
        kinds["shuffle"] = expert.gather(1, derangement[..., None].expand_as(expert))[:, None]
    for layer in range(1, layer_actions.shape[1] - 1):
        kinds[f"layer_exit_{layer}"] = layer_actions[:, layer, None].to(expert.dtype)
    return kinds
