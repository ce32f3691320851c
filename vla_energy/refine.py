"""Descent on the energy from the policy's chunk, inside a trust region and behind the reranker's gate.

A lower energy is what descent looks for, so it finds it also where the head is wrong: the result says how far the
energy fell and how far the chunk moved, never that it is better. Whether it is, held-out chunks tell (`calibrate.py`
sets the margin from them), and episodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EnergyFn = Callable[[Tensor], Tensor]
"""Normalised chunks `(B,N,H,A)` to energies `(B,N)`, lower is better; differentiable in the chunks."""


@dataclass(frozen=True)
class RefineResult:
    """What to execute, and what descent did.

    Attributes:
        actions: `(B,H,A)`; the policy's chunk bit for bit where not accepted.
        accepted: `(B,)` bool, the energy fell by more than the margin.
        energy_policy, energy_lowest: `(B,)` fp32, of the policy's chunk and the lowest met; equal where none was lower.
        moved: `(B,)` mean absolute distance of the lowest chunk from the policy's, accepted or not.
        unscored: `(B,)` bool, an energy met on the way is not finite, although the policy's chunk is.
    """

    actions: Tensor
    accepted: Tensor
    energy_policy: Tensor
    energy_lowest: Tensor
    moved: Tensor
    unscored: Tensor


def refine(
    energy_fn: EnergyFn,
    policy: Tensor,
    *,
    radius: float | Tensor,
    margin: float,
    steps: int = 10,
    step_size: float = 0.25,
    gripper_dims: Sequence[int] = (-1,),
    gripper_values: Sequence[float] = (),
) -> RefineResult:
    """Projected descent: each step moves every chunk against its gradient, and back into the box around the policy's.

    The step is `step_size * radius` in the element of steepest gradient, and in proportion elsewhere, so that neither
    the energy's scale nor its temperature matters; it shrinks linearly to 0. Grippers are not moved: before the
    descent each row takes the gripper of lowest energy among the policy's own and constants. The lowest chunk met is
    kept, whatever the last one is; -inf is no energy, and never the lowest. A row whose energy or gradient stops being
    finite stays where it was.

    Works under `torch.no_grad()`, and under `torch.inference_mode()` if `energy_fn` holds no tensor made there.
    No parameter gets a gradient.

    Args:
        energy_fn: see `EnergyFn`; called `steps + 1` times, once more with `gripper_values`.
        policy: `(B,H,A)` normalised.
        radius: of the box, in normalised units, above 0; `(A,)` for one a dimension.
        margin: by how much the energy must fall, as in `rerank.choose`; inf accepts nothing.
        steps: of the descent, 0 or more.
        step_size: of the first step, in radii, above 0.
        gripper_dims: dimensions that are not moved and not clamped.
        gripper_values: constants that the gripper dimensions may take instead.

    Raises:
        ValueError: shapes do not fit, or a setting is out of its range.
    """
    reach = _check(policy, radius, margin, steps, step_size, gripper_dims)
    with torch.inference_mode(False), torch.no_grad():
        start = policy.detach().float().clone()
        free = torch.ones(policy.shape[-1], dtype=torch.bool, device=policy.device)
        free[list(gripper_dims)] = False
        reach = (reach.to(start) * free).expand_as(start)
        finite = start.isfinite().all(2).all(1)
        current = torch.where(finite[:, None, None], start, torch.zeros_like(start))
        low, high = current - reach, current + reach
        # Normalised dimensions live in [-1, 1]; a policy's own value outside stays allowed.
        low, high = torch.maximum(low, current.clamp(max=-1)), torch.minimum(high, current.clamp(min=1))
        energy_policy = _score(energy_fn, current[:, None])[:, 0]
        best, energy, unscored = _gripper(energy_fn, current, energy_policy, free, gripper_values)
        current = best
        if steps:
            best, energy, met = _descend(energy_fn, current, best, energy, (low, high), reach, steps, step_size)
            unscored = unscored | met
        usable = finite & energy_policy.isfinite()
        accepted = usable & (energy_policy - energy > margin)
        actions = torch.where(accepted[:, None, None], best.to(policy.dtype), policy.detach())
        moved = (best - start).abs().mean((1, 2))
    return RefineResult(actions, accepted, energy_policy, energy, torch.where(finite, moved, 0.0), finite & unscored)


def _gripper(
    energy_fn: EnergyFn, chunk: Tensor, energy: Tensor, free: Tensor, values: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row with its gripper of lowest energy, that energy, and where one is not finite; ties keep the policy's."""
    if not values or free.all():
        return chunk, energy, ~energy.isfinite()
    options = [chunk, *(torch.where(free, chunk, torch.full_like(chunk, value)) for value in values)]
    stacked = torch.stack(options, 1)
    energies = torch.cat([energy[:, None], _score(energy_fn, stacked[:, 1:])], 1)
    lowest, index = torch.where(energies.isfinite(), energies, torch.full_like(energies, math.inf)).min(1)
    lower = lowest < energy
    index = torch.where(lower, index, torch.zeros_like(index))
    chosen = stacked[torch.arange(len(chunk), device=chunk.device), index]
    return chosen, torch.where(lower, lowest, energy), ~energies.isfinite().all(1)


def _descend(
    energy_fn: EnergyFn,
    current: Tensor,
    best: Tensor,
    energy: Tensor,
    box: tuple[Tensor, Tensor],
    reach: Tensor,
    steps: int,
    step_size: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The lowest chunk met `(B,H,A)`, its energy, and where one met is not finite, both `(B,)`."""
    unscored = torch.zeros_like(energy, dtype=torch.bool)
    for step in range(steps + 1):
        with torch.enable_grad():
            leaf = current.clone().requires_grad_()
            energies = energy_fn(leaf[:, None])[:, 0]
            # Rows do not see each other: the sum's gradient holds each one's own.
            (gradient,) = torch.autograd.grad(energies.sum(), leaf)
        energies = energies.detach().float()
        known = energies.isfinite()
        unscored = unscored | ~known
        lower = known & (energies < energy)
        best = torch.where(lower[:, None, None], current, best)
        energy = torch.where(lower, energies, energy)
        if step == steps:
            break
        # What pushes against the box's wall cannot move, and must not slow down the rest.
        stuck = ((current <= box[0]) & (gradient > 0)) | ((current >= box[1]) & (gradient < 0))
        scaled = torch.where((reach > 0) & ~stuck, gradient, torch.zeros_like(gradient)) * reach
        steepest = scaled.abs().amax((1, 2), keepdim=True)
        share = step_size * (1 - step / steps)
        moved = current - share * reach * scaled / steepest.clamp_min(torch.finfo(scaled.dtype).tiny)
        moved = torch.minimum(torch.maximum(moved, box[0]), box[1])
        going = (steepest[:, 0, 0] > 0) & moved.isfinite().all(2).all(1) & known
        current = torch.where(going[:, None, None], moved, current)
    return best, energy, unscored


def _score(energy_fn: EnergyFn, actions: Tensor) -> Tensor:
    energies = energy_fn(actions)
    if energies.shape != actions.shape[:2]:
        raise ValueError(f"energy_fn gave {tuple(energies.shape)}: expected (B,N) = {tuple(actions.shape[:2])}")
    return energies.detach().float()


def _check(
    policy: Tensor, radius: float | Tensor, margin: float, steps: int, step_size: float, gripper_dims: Sequence[int]
) -> Tensor:
    """The radius as a tensor. Raises ValueError naming what is wrong."""
    if policy.ndim != 3 or not policy.is_floating_point() or 0 in policy.shape:
        raise ValueError(f"policy: expected a floating point (B,H,A), got {policy.dtype} {tuple(policy.shape)}")
    dims = policy.shape[-1]
    reach = torch.as_tensor(radius, dtype=torch.float32)
    if reach.shape not in ((), (dims,)) or not (reach.isfinite() & (reach > 0)).all():
        raise ValueError(f"radius={radius}: expected finite numbers above 0, one or {dims}")
    if not margin >= 0:
        raise ValueError(f"margin={margin}: expected 0 or more")
    if steps < 0 or not 0 < step_size < math.inf:
        raise ValueError(f"steps={steps}, step_size={step_size}: expected 0 or more, and above 0")
    if outside := [dim for dim in gripper_dims if not -dims <= dim < dims]:
        raise ValueError(f"gripper_dims {outside}: the actions have {dims} dimensions")
    return reach
