"""Measures of an energy as a function of the action: where does descent lead, and what does the landscape look like?

Ranking says whether chunks are told apart; these say whether the slope between them can be followed. One does not
follow from the other: in the report's follow-up, refinement along the slope ruined success although every training
criterion was met.

`energy_fn` gives the energies `(B,N)`, lower is better, of normalised chunks `(B,N,H,A)`; for a head
`lambda actions: head(encoded, actions)`. Put the head into eval mode first: with dropout a landscape is noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EnergyFn = Callable[[Tensor], Tensor]
"""Normalised chunks `(B,N,H,A)` -> energies `(B,N)`; a chunk's energy depends on its row and itself alone."""


@dataclass(frozen=True)
class Slice:
    """A plane through the landscape of B contexts; see `plane_slice`.

    Attributes:
        xs: `(R,)` along expert - policy: 0 is the policy's chunk, 1 the expert's.
        ys: `(R,)` along a random orthogonal direction, in the same unit.
        energies: `(B,R,R)`, fp32; `[b,j,i]` is row b at `(xs[i], ys[j])`.
    """

    xs: Tensor
    ys: Tensor
    energies: Tensor

    def lowest(self, row: int) -> tuple[float, float]:
        """`(x, y)` of the grid's lowest energy; where it is NaN it is left out.

        Raises:
            ValueError: every energy of the row is NaN.
        """
        energies = self.energies[row]
        if energies.isnan().all():
            raise ValueError(f"row {row}: every energy of the slice is NaN")
        j, i = divmod(int(energies.nan_to_num(math.inf, math.inf, -math.inf).argmin()), len(self.xs))
        return float(self.xs[i]), float(self.ys[j])


def descent_alignment(
    energy_fn: EnergyFn, actions: Tensor, expert: Tensor, dims: Sequence[int] | None = None
) -> Tensor:
    """Cosine of `-dE/da` and `expert - action` for each chunk: 1 leads to the expert, below 0 leads away.

    Works under `torch.no_grad()`, and under `torch.inference_mode()` unless `energy_fn` holds tensors that were made
    there (torch refuses these with a RuntimeError; `no_grad` is the way out). No parameter gets a gradient.

    Args:
        energy_fn: see the module; scored with all N chunks at once.
        actions: `(B,N,H,A)`, normalised.
        expert: `(B,H,A)`, normalised.
        dims: action dimensions that count, None: all.

    Returns:
        `(B,N)` fp32 within [-1, 1]; 0 where the gradient or the difference is zero, NaN where one of them, or the
        energy, is not finite.

    Raises:
        ValueError: the shapes do not fit together, `dims` are not among the A, or the energies have no gradient to
            the actions.
    """
    if actions.ndim != 4 or expert.shape != (len(actions), *actions.shape[2:]):
        raise ValueError(f"actions {tuple(actions.shape)}, expert {tuple(expert.shape)}: expected (B,N,H,A), (B,H,A)")
    picked = _pick(dims, actions.shape[-1])
    # A clone outside inference mode is an ordinary tensor again.
    with torch.inference_mode(False):
        with torch.enable_grad():
            leaf = actions.detach().float().clone().requires_grad_()
            energies = _score(energy_fn, leaf)
            # Chunks do not see each other: the sum's gradient holds each one's own.
            gradient = (
                torch.autograd.grad(energies.sum(), leaf, allow_unused=True)[0] if energies.requires_grad else None
            )
        if gradient is None:
            raise ValueError("the energies have no gradient to the actions: is there a detach or no_grad in energy_fn?")
        with torch.no_grad():
            # Both vectors are turned round, which leaves the cosine as it is.
            cosine = _cosine(gradient[..., picked], (leaf - expert[:, None].float())[..., picked])
            return cosine.masked_fill(~energies.isfinite(), math.nan)


def plane_slice(
    energy_fn: EnergyFn,
    policy: Tensor,
    expert: Tensor,
    extent: float = 1.0,
    resolution: int = 41,
    *,
    generator: torch.Generator,
    block_size: int = 256,
) -> Slice:
    """Energies in a plane through the policy's and the expert's chunk, after Li et al. 2018 (arXiv 1712.09913).

    x runs along `expert - policy`, from `-extent` to `1 + extent` in units where the policy is 0 and the expert 1; y
    along a random direction, orthogonal to it and as long, from `-(0.5 + extent)` to `0.5 + extent`. With extent 1, a
    resolution of 1 more than a multiple of 3 puts both chunks' x on the grid; an odd one puts their y there.

    Args:
        energy_fn: see the module; called without gradient.
        policy, expert: `(B,H,A)`, normalised.
        extent: how far the plane goes past the two chunks, 0 or more.
        resolution: R, points a side, at least 2.
        generator: draws y's directions.
        block_size: points scored in one call, for all rows: `B * block_size` chunks are held at a time.

    Raises:
        ValueError: the shapes do not fit together or have but one number a chunk, a setting is out of its range, or
            in a row policy and expert are equal or not finite; the rows are named.
    """
    if policy.ndim != 3 or policy.shape != expert.shape or policy[:1].numel() == 1:
        raise ValueError(f"policy {tuple(policy.shape)}, expert {tuple(expert.shape)}: expected equal (B,H,A), H*A > 1")
    _check_grid(extent, resolution, block_size)
    with torch.no_grad():
        policy, expert = policy.float(), expert.float()
        across = expert - policy
        up = _orthogonal(across, generator)
        xs = torch.linspace(-extent, 1 + extent, resolution, device=policy.device)
        ys = torch.linspace(-(0.5 + extent), 0.5 + extent, resolution, device=policy.device)
        points = torch.cartesian_prod(ys, xs)  # y is the slow one
        blocks = []
        for block in points.split(block_size):
            y, x = block[:, :1, None], block[:, 1:, None]
            blocks.append(_score(energy_fn, policy[:, None] + x * across[:, None] + y * up[:, None]).float())
    return Slice(xs, ys, torch.cat(blocks, 1).unflatten(1, (resolution, resolution)))


def step_slice(
    energy_fn: EnergyFn,
    policy: Tensor,
    expert: Tensor,
    extent: float = 1.0,
    resolution: int = 41,
    *,
    block_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """Energies along the time axis of a chunk: the expert's chunk with one step moved along expert - policy.

    Where a row of the picture is flat, an error at that step is not seen; where its valley is not at 1, the head
    prefers another action there.

    Args:
        energy_fn: see the module; called without gradient.
        policy, expert: `(B,H,A)`, normalised.
        extent: how far a step is moved past the two, 0 or more.
        resolution: R, places of each step, at least 2.
        block_size: as in `plane_slice`.

    Returns:
        `xs (R,)`: 0 is the policy's action at that step, 1 the expert's; and energies `(B,H,R)`, fp32: `[b,h,i]` is of
        the expert's chunk with its step h at `xs[i]`.

    Raises:
        ValueError: the shapes do not fit, or a setting is out of its range.
    """
    if policy.ndim != 3 or policy.shape != expert.shape:
        raise ValueError(f"policy {tuple(policy.shape)}, expert {tuple(expert.shape)}: expected equal (B,H,A)")
    _check_grid(extent, resolution, block_size)
    with torch.no_grad():
        policy, expert = policy.float(), expert.float()
        horizon = expert.shape[1]
        xs = torch.linspace(-extent, 1 + extent, resolution, device=policy.device)
        # (H,R,H): step h alone is moved, by x - 1 times the way from the policy's action to the expert's.
        moved = torch.eye(horizon, device=policy.device)[:, None] * (xs - 1)[None, :, None]
        blocks = []
        for block in moved.flatten(0, 1).split(block_size):
            blocks.append(
                _score(energy_fn, expert[:, None] + block[None, ..., None] * (expert - policy)[:, None]).float()
            )
    return xs, torch.cat(blocks, 1).unflatten(1, (horizon, resolution))


def plot_slice(slice: Slice, row: int, axis: Axes, title: str = "") -> None:
    """Draws one row of a slice on a matplotlib axis (extra `native`): filled contours, policy, expert, lowest point.

    Raises:
        ValueError: no energy of the row is finite.
    """
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    energies = np.ma.masked_invalid(slice.energies[row].cpu().numpy())
    if not energies.count():
        raise ValueError(f"row {row}: no energy of the slice is finite")
    levels = MaxNLocator(20).tick_values(float(energies.min()), float(energies.max()))
    filled = axis.contourf(slice.xs.cpu().numpy(), slice.ys.cpu().numpy(), energies, levels=levels, cmap="viridis")
    marks = {"policy": (0.0, 0.0), "expert": (1.0, 0.0), "lowest": slice.lowest(row)}
    for (name, (x, y)), marker in zip(marks.items(), "os*", strict=True):
        axis.plot([x], [y], marker, color="white", markeredgecolor="black", markersize=9, label=name)
    axis.set_aspect("equal")
    axis.set(title=title, xlabel="policy (0) to expert (1)", ylabel="random orthogonal direction")
    axis.legend(loc="upper right", fontsize=8)
    axis.figure.colorbar(filled, ax=axis, label="energy, lower is better", shrink=0.8)


def _score(energy_fn: EnergyFn, actions: Tensor) -> Tensor:
    energies = energy_fn(actions)
    if energies.shape != actions.shape[:2]:
        raise ValueError(f"energy_fn gave {tuple(energies.shape)}: expected (B,N) = {tuple(actions.shape[:2])}")
    return energies


def _pick(dims: Sequence[int] | None, size: int) -> list[int]:
    """`dims` as indices from 0; all of them for None."""
    if dims is None:
        return list(range(size))
    picked = [dim % size for dim in dims if -size <= dim < size]
    if not picked or len(set(picked)) != len(dims):
        raise ValueError(f"dims={list(dims)}: expected different action dimensions within {-size} and {size - 1}")
    return picked


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """`(B,N)` cosine of two `(B,N,H,A)`, 0 where either is zero and NaN where either is not finite."""
    a, b = a.flatten(2), b.flatten(2)
    undefined = ~(a.isfinite() & b.isfinite()).all(2)
    # Scaled by the largest element first: squares of large gradients overflow fp32, those of small ones vanish.
    a, b = (v / v.abs().amax(2, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny) for v in (a, b))
    lengths = a.norm(dim=2) * b.norm(dim=2)
    cosine = torch.where(lengths > 0, (a * b).sum(2) / lengths.clamp_min(1e-30), torch.zeros_like(lengths))
    return cosine.clamp(-1, 1).masked_fill(undefined, math.nan)


def _orthogonal(across: Tensor, generator: torch.Generator) -> Tensor:
    """A random direction `(B,H,A)` for each row of `across (B,H,A)`, orthogonal to it and as long."""
    lengths = across.flatten(1).norm(dim=1)[:, None]
    bad = (~((lengths > 0) & lengths.isfinite())).nonzero()[:, 0].tolist()
    if bad:
        rows = ", ".join(map(str, bad))
        raise ValueError(f"row {rows}: policy and expert are equal or not finite, so that there is no x axis")
    unit = across.flatten(1) / lengths
    drawn = torch.randn(across.shape, generator=generator, device=generator.device).to(across).flatten(1)
    for _ in range(2):  # twice: rounding of the first leaves a rest along x
        drawn = drawn - (drawn * unit).sum(1, keepdim=True) * unit
        drawn = drawn / drawn.norm(dim=1, keepdim=True)
    return (lengths * drawn).view_as(across)


def _check_grid(extent: float, resolution: int, block_size: int) -> None:
    if not 0 <= extent < math.inf:
        raise ValueError(f"extent={extent}: expected a finite number, 0 or more")
    for name, value, least in (("resolution", resolution, 2), ("block_size", block_size, 1)):
        if value < least:
            raise ValueError(f"{name}={value}: expected {least} or more")
