"""The sources of negatives that a config switches on, drawn and stacked for a batch; the samplers are in `negatives`.

`check_sources` says at the start of a training what cannot work; `build_negatives` draws at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vla_energy import negatives
from vla_energy.actions import DatasetStatistics
from vla_energy.config import SOURCES, NegativesConfig, PolicyNoiseConfig, checks
from vla_energy.measures import chunk_distance
from vla_energy.noise import noise_scale

EnergyFn = Callable[[Tensor], Tensor]
"""Energies `(B,P)` of chunks `(B,P,H,A)` in the batch's own contexts."""


@dataclass(frozen=True)
class ActionTraits:
    """What the samplers need to know of the action space.

    Attributes:
        scale: `(A,)` float32, see `noise_scale`.
        gripper_dims: the dimensions that are not normalised.
        low, high: `(A,)` float32, limits of each dimension inside the library: the demonstrations' extremes where it is
            not normalised, else -1 and 1.
    """

    scale: Tensor
    gripper_dims: tuple[int, ...]
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, statistics: DatasetStatistics) -> ActionTraits:
        """Of a dataset's action statistics.

        Raises:
            ValueError: no dimension is normalised and moves.
        """
        action = statistics.action
        normalised = torch.as_tensor(action.mask)
        low, high = (torch.as_tensor(limit, dtype=torch.float32) for limit in (action.min, action.max))
        one = torch.ones_like(low)
        gripper_dims = tuple(dim for dim, used in enumerate(action.mask) if not used)
        low, high = torch.where(normalised, -one, low), torch.where(normalised, one, high)
        return cls(noise_scale(statistics), gripper_dims, low, high)


@dataclass(frozen=True)
class NegativeSet:
    """Negatives of a batch.

    Attributes:
        chunks: `(B,N,H,A)` normalised, float32, no gradient.
        valid: `(B,N)` bool, False where a chunk is so near the expert's that it is none (one-hot losses leave it out),
            and where a row's pool had no valid chunk left for a column of `hard`, or of `failed`.
        distances: `(B,N)` to the expert's chunk, see `chunk_distance`.
        weight: `(N,)`; `(B,N)` with `failed`, 0 where a row has no such chunk.
        sources: the columns of each source, and those of single layers as `layer_exit_<k>` within `layer_exits`.
        empty: sources that are switched on but gave no column.
    """

    chunks: Tensor
    valid: Tensor
    distances: Tensor
    weight: Tensor
    sources: dict[str, slice]
    empty: tuple[str, ...]


def build_negatives(
    config: NegativesConfig,
    expert: Tensor,
    policy: Tensor,
    layer_actions: Tensor,
    generator: torch.Generator,
    traits: ActionTraits | None = None,
    energy_fn: EnergyFn | None = None,
    retrieved: Tensor | None = None,
    samples: Tensor | None = None,
) -> NegativeSet:
    """Draws all sources that `config` switches on.

    Their order is fixed, and the sources that came later draw last: a config without them draws what it always drew.

    Args:
        expert: `(B,H,A)` normalised.
        policy: `(B,H,A)` the policy's chunk.
        layer_actions: `(B,L,H,A)`, the policy's chunk last.
        traits: needed by `per_dimension=True`, `amplitude` and `gripper_flip`.
        energy_fn: needed by `hard`, which calls it once, without gradient.
        retrieved: `(B,K,H,A)` chunks of the nearest remembered contexts, K at least `retrieved.count`; needed by it.
        samples: `(B,K,H,A)` more samples of the policy, K at least `samples.count`; needed by it.

    Raises:
        ValueError: the shapes do not fit together, or a source lacks what it needs; the message names the setting.
    """
    fits = layer_actions.ndim == 4 and expert.shape == policy.shape == layer_actions[:, -1].shape
    if not fits:
        shapes = (
            f"expert {tuple(expert.shape)}, policy {tuple(policy.shape)}, layer_actions {tuple(layer_actions.shape)}"
        )
        raise ValueError(f"{shapes}: expected (B,H,A), (B,H,A), (B,L,H,A)")
    _check_settings(config, layer_actions.shape[1], expert.shape[-1], traits)
    expert, policy, layer_actions = (chunks.detach().float() for chunks in (expert, policy, layer_actions))
    batch = _Batch(config, expert, policy, layer_actions, generator, traits)
    drawn = _draw(batch)
    filled = None
    if config.hard.count:
        drawn["hard"], filled = _mine(batch, energy_fn)
    if config.retrieved.count:
        drawn["retrieved"] = _given(
            batch, "retrieved", retrieved, "a chunk memory of the training set (vla-energy memory)"
        )
    if config.samples.count:
        needed = "a policy that chunks are drawn from (--use_diffusion True or --use_l1_regression False)"
        drawn["samples"] = _given(batch, "samples", samples, needed)
    return _stack(batch, drawn, filled)


def add_failed(negatives: NegativeSet, chunks: Tensor, there: Tensor, expert: Tensor, threshold: float) -> NegativeSet:
    """With chunks of failed rollouts as a last source, `failed`: graded and masked by distance as the others are.

    Args:
        chunks: `(B,F,H,A)` normalised.
        there: `(B,F)` bool; elsewhere the chunk counts in no loss.
        expert: `(B,H,A)` normalised.
        threshold: `negatives.near_positive_threshold`.

    Raises:
        ValueError: the shapes do not fit.
    """
    distances = chunk_distance(chunks, expert)
    if there.shape != distances.shape or there.dtype != torch.bool:
        raise ValueError(f"there {there.dtype} {tuple(there.shape)}: expected bool {tuple(distances.shape)}")
    start = negatives.chunks.shape[1]
    weight = torch.cat([negatives.weight.expand(len(chunks), -1), there.to(negatives.weight)], 1)
    return NegativeSet(
        torch.cat([negatives.chunks, chunks.detach().to(negatives.chunks)], 1),
        torch.cat([negatives.valid, there & (distances >= threshold)], 1),
        torch.cat([negatives.distances, distances], 1),
        weight,
        {**negatives.sources, "failed": slice(start, start + chunks.shape[1])},
        negatives.empty,
    )


def check_sources(
    config: NegativesConfig,
    batch_size: int,
    num_layers: int,
    horizon: int,
    action_dim: int,
    traits: ActionTraits | None = None,
    margin_sources: Sequence[str] = (),
) -> list[str]:
    """One warning in words for each source that is on but cannot give a chunk that differs from the expert's.

    Args:
        batch_size: B of one process.
        num_layers: L of `layer_actions`, layer 0 and the policy among them; 1 for a policy without layer exits.
        margin_sources: names that the margin loss asks for.

    Raises:
        ValueError: a size is below 1, a setting is impossible, no source that is on can give a chunk, or the margin
            asks for one that is off.
    """
    sizes = {"batch_size": batch_size, "num_layers": num_layers, "horizon": horizon, "action_dim": action_dim}
    for name, size in sizes.items():
        checks.count(name, size, 1)
    _check_settings(config, num_layers, action_dim, traits)
    exits = f"the policy has {num_layers} layers: it needs 3 or more" if num_layers < 3 else None
    if num_layers == 1:
        exits = "the policy has no layer exits (--use_l1_regression False): "
        exits += "--energy.negatives.layer_exits.count 0 turns it off"
        if not config.samples.count:
            exits += ", --energy.negatives.samples.count 2 takes the policy's samples instead"
    few_steps = f"the horizon is {horizon}: it needs 2 or more" if horizon < 2 else None
    idle = {
        "layer_exits": exits,
        "in_batch": f"batch_size is {batch_size}: it needs 2 or more" if batch_size < 2 else None,
        "shuffle": few_steps,
        "shift": few_steps,
    }
    if traits is not None:
        moves = any(traits.low[dim] < traits.high[dim] for dim in traits.gripper_dims)
        others = len(traits.gripper_dims) < action_dim
        idle["gripper_flip"] = None if moves else "the gripper never moves in the statistics"
        idle["amplitude"] = None if others else "every action dimension is a gripper's"
    switched_on = [name for name in SOURCES if getattr(config, name).count]
    warnings = [f"negatives.{name} is on but {idle[name]}" for name in switched_on if idle.get(name)]
    if len(warnings) == len(switched_on):
        raise ValueError(f"no source of negatives can give a chunk: {'; '.join(warnings)}")
    source = config.layer_exits
    layers = negatives.exit_layers(num_layers, source.count, source.layers) if source.count and num_layers > 2 else ()
    drawn = [*switched_on, *(f"layer_exit_{layer}" for layer in layers)]
    drawn += ["policy"] if config.policy_noise.count else []
    if missing := [name for name in margin_sources if name not in drawn]:
        raise ValueError(f"loss.margin_sources={list(missing)}: not drawn with these settings; drawn are {drawn}")
    return warnings


def _check_settings(config: NegativesConfig, num_layers: int, action_dim: int, traits: ActionTraits | None) -> None:
    """Raises a ValueError for settings that cannot work whatever the batch holds."""
    if config.layer_exits.count:
        negatives.exit_layers(num_layers, config.layer_exits.count, config.layer_exits.layers)
    for name in ("expert_noise", "policy_noise"):
        source = getattr(config, name)
        if config.hard.count and not source.stds:
            raise ValueError(f"negatives.{name}.stds is empty: negatives.hard draws its pool with them")
        if source.per_dimension and (source.count or config.hard.count) and traits is None:
            raise ValueError(f"negatives.{name}.per_dimension=True needs the traits of the actions")
    for name in ("amplitude", "gripper_flip"):
        if getattr(config, name).count and traits is None:
            raise ValueError(f"negatives.{name} is on: it needs the traits of the actions")
    if traits is None:
        return
    if not traits.scale.shape == traits.low.shape == traits.high.shape == (action_dim,):
        shapes = ", ".join(str(tuple(part.shape)) for part in (traits.scale, traits.low, traits.high))
        raise ValueError(f"scale, low, high of the traits are {shapes}: the actions have {action_dim} dimensions")
    if config.gripper_flip.count and not traits.gripper_dims:
        raise ValueError("negatives.gripper_flip is on: the actions have no gripper, all dimensions are normalised")


@dataclass(frozen=True)
class _Batch:
    """The arguments of `build_negatives`; chunks are float32 without gradient."""

    config: NegativesConfig
    expert: Tensor
    policy: Tensor
    layer_actions: Tensor
    generator: torch.Generator
    traits: ActionTraits | None


def _draw(batch: _Batch) -> dict[str, Tensor]:
    """Chunks `(B,n,H,A)` of each source that is on, but for `hard`, in the order of the draws."""
    config, expert, generator, traits = batch.config, batch.expert, batch.generator, batch.traits
    drawn: dict[str, Tensor] = {}
    if config.layer_exits.count:
        exits = config.layer_exits
        drawn["layer_exits"] = negatives.layer_exits(batch.layer_actions, exits.count, exits.layers)
    if config.expert_noise.count:
        drawn["expert_noise"] = _noisy(batch, "expert_noise", config.expert_noise.stds, config.expert_noise.count)
    if config.policy_noise.count:
        drawn["policy"] = batch.policy[:, None]
        drawn["policy_noise"] = _noisy(batch, "policy_noise", config.policy_noise.stds, config.policy_noise.count)
    if config.in_batch.count:
        drawn["in_batch"] = negatives.in_batch(expert, config.in_batch.count, generator)
    if config.shuffle.count:
        drawn["shuffle"] = negatives.shuffle(expert, config.shuffle.count, generator)
    if config.shift.count:
        drawn["shift"] = negatives.shift(expert, config.shift.count, config.shift.max_steps, generator)
    # Without traits these two were refused by `_check_settings`.
    if config.amplitude.count and traits is not None:
        drawn["amplitude"] = negatives.amplitude(expert, config.amplitude.factors, traits.gripper_dims)
    if config.gripper_flip.count and traits is not None:
        drawn["gripper_flip"] = negatives.gripper_flip(expert, traits.low, traits.high, traits.gripper_dims)
    return drawn


def _given(batch: _Batch, name: str, chunks: Tensor | None, needed: str) -> Tensor:
    """The caller's chunks of the source `name`, so many as it asks for."""
    count = getattr(batch.config, name).count
    if chunks is None:
        raise ValueError(f"negatives.{name} is on: it needs {needed}")
    if chunks.ndim != 4 or chunks[:, 0].shape != batch.expert.shape or chunks.shape[1] < count:
        shape = tuple(batch.expert.shape)
        raise ValueError(f"{name} {tuple(chunks.shape)}: expected (B,K,H,A), K >= {count}, for expert {shape}")
    return chunks[:, :count].detach().to(batch.expert)


def _noisy(batch: _Batch, name: str, stds: Sequence[float], count: int) -> Tensor:
    """Noise around expert or policy as the source `name` makes it, at these `stds`."""
    source = getattr(batch.config, name)
    centre = batch.expert if name == "expert_noise" else batch.policy
    correlation = source.correlation if isinstance(source, PolicyNoiseConfig) else 0.0
    scale = batch.traits.scale if source.per_dimension and batch.traits is not None else None
    return negatives.gaussian(centre, stds, count, batch.generator, scale, correlation)


def _pool(batch: _Batch) -> Tensor:
    """`(B,P,H,A)` to mine: a third around the expert, a third around the policy, the rest other rows' expert chunks.

    Where the batch is too small for that rest, there is more of both kinds of noise.
    """
    config, size = batch.config, batch.config.hard.pool
    others = min(size - 2 * (size // 3), len(batch.expert) - 1)
    around_expert = (size - others) // 2
    parts = []
    for name, count in (("expert_noise", around_expert), ("policy_noise", size - others - around_expert)):
        stds = getattr(config, name).stds
        parts.append(_noisy(batch, name, [stds[i % len(stds)] for i in range(count)], 1))
    return torch.cat([*parts, negatives.in_batch(batch.expert, others, batch.generator)], 1)


def _mine(batch: _Batch, energy_fn: EnergyFn | None) -> tuple[Tensor, Tensor]:
    """Chunks of `hard` and which of them are valid; near-positives of the pool are not mined."""
    if energy_fn is None:
        raise ValueError("negatives.hard is on: it needs energy_fn, to score its pool")
    pool = _pool(batch)
    with torch.no_grad():
        energies = energy_fn(pool)
    if energies.shape != pool.shape[:2]:
        raise ValueError(f"energy_fn gave {tuple(energies.shape)}: expected (B,P) = {tuple(pool.shape[:2])}")
    valid = ~negatives.near_positive_mask(pool, batch.expert, batch.config.near_positive_threshold)
    return negatives.hard(energies, pool, valid, batch.config.hard.count)


def _stack(batch: _Batch, drawn: dict[str, Tensor], filled: Tensor | None) -> NegativeSet:
    config, expert = batch.config, batch.expert
    weights, sources = [], {}
    for name, part in drawn.items():
        sources[name] = slice(len(weights), len(weights) + part.shape[1])
        weights += [getattr(config, "policy_noise" if name == "policy" else name).weight] * part.shape[1]
        if name == "layer_exits":
            exits, num_layers = config.layer_exits, batch.layer_actions.shape[1]
            layers = negatives.exit_layers(num_layers, exits.count, exits.layers)
            for column, layer in enumerate(layers, sources[name].start):
                sources[f"layer_exit_{layer}"] = slice(column, column + 1)
    chunks = torch.cat(list(drawn.values()), 1)
    distances = chunk_distance(chunks, expert)
    valid = distances >= config.near_positive_threshold
    if filled is not None:
        # They are near-positives anyway, up to the rounding of a mean taken over another shape.
        valid[:, sources["hard"]] &= filled
    empty = tuple(name for name, part in drawn.items() if not part.shape[1])
    return NegativeSet(chunks, valid, distances, expert.new_tensor(weights), sources, empty)
