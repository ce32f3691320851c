"""Chunks that are not the expert's: one small sampler a source; `vla_energy.sources` stacks what they give.

Samplers take normalised chunks of any floating dtype, and a `torch.Generator` where they draw, and return
`(B,n,H,A)` in float32 without gradient. A source that needs other rows, steps or inner layers and has none gives
n = 0 columns. Numbers are drawn on the generator's device and then moved: a CPU generator gives the same negatives on
every accelerator.

In-batch chunks alone teach "which scene is this", not "is this action good here" (report, last section), and noise of
0.3 never shapes the region in which a policy errs by 0.05. So there is a source around the policy's own chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vla_energy.measures import chunk_distance
from vla_energy.noise import smooth_noise


def near_positive_mask(chunks: Tensor, expert: Tensor, threshold: float) -> Tensor:
    """`(B,N)` bool, True where a chunk is nearer to the expert's than `threshold`: a false negative."""
    return chunk_distance(chunks, expert) < threshold


def exit_layers(num_layers: int, count: int, layers: Sequence[int] = ()) -> tuple[int, ...]:
    """Numbers of the layers that `layer_exits` gives, in its order.

    Args:
        num_layers: L, layer 0 (the embeddings) and the last (the policy) among them.

    Raises:
        ValueError: one of `layers` is not an inner layer, 1 to L - 2, or is named twice.
    """
    available = max(num_layers - 2, 0)
    for layer in layers:
        if not 1 <= layer <= available:
            expected = f"1 to L - 2 = {available}" if available else f"none, L={num_layers} has no inner layer"
            raise ValueError(f"layer {layer} of layer_exits.layers={tuple(layers)}: expected {expected}")
    if len(set(layers)) < len(layers):
        raise ValueError(f"layer_exits.layers={tuple(layers)}: expected every layer once")
    if layers:
        return tuple(layers)
    count = min(count, available)
    return tuple(available - (i * available) // count for i in reversed(range(count)))


def layer_exits(layer_actions: Tensor, count: int, layers: Sequence[int] = ()) -> Tensor:
    """At most `count` chunks of inner layers, evenly spread and ending with the last inner one; report, remedy 3.

    Layer 0 is left out (the embeddings are zero at action positions: its chunk is a constant), and so is the last
    layer, which is the policy.

    Args:
        layer_actions: `(B,L,H,A)`.
        layers: exactly these instead, in this order, whatever `count` is; see `exit_layers`.

    Raises:
        ValueError: see `exit_layers`.
    """
    return layer_actions.detach().float()[:, list(exit_layers(layer_actions.shape[1], count, layers))]


def gaussian(
    centre: Tensor,
    stds: Sequence[float],
    count: int,
    generator: torch.Generator,
    scale: Tensor | None = None,
    correlation: float = 0.0,
) -> Tensor:
    """`count` Gaussian copies of `centre (B,H,A)` for each of `stds`: `(B,len(stds)*count,H,A)`, grouped by std.

    Report, remedy 3, is independent noise on the expert chunk.

    Args:
        scale: `(A,)` factor of the noise per dimension, see `noise_scale`; None is 1.
        correlation: of the noise at neighbouring steps, see `smooth_noise`; 0 is independent noise.

    Raises:
        ValueError: `scale` is not `(A,)`, or correlation is outside [0, 1].
    """
    centre = centre.detach().float()
    rows, horizon, dims = centre.shape
    if scale is not None and scale.shape != (dims,):
        raise ValueError(f"scale {tuple(scale.shape)}: expected ({dims},), one factor per action dimension")
    shape = (rows, len(stds), count, horizon, dims)
    if correlation == 0:
        noise = torch.randn(shape, generator=generator, device=generator.device).to(centre)
    else:
        noise = smooth_noise(shape, correlation, generator, centre.device)
    noise = noise * torch.tensor(stds, dtype=centre.dtype, device=centre.device)[:, None, None, None]
    noise = noise if scale is None else noise * scale.to(centre)
    return centre[:, None] + noise.flatten(1, 2)


def shuffle(expert: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` times the steps of `expert (B,H,A)` in another order, none in its own place; n = 0 if H < 2.

    Report, remedy 3, whose one `randperm(H)` for the whole batch can be the identity. Here every row and every draw
    has a derangement of its own: a single cycle through all steps, uniform over the (H - 1)! such cycles. Derangements
    of several shorter cycles are not drawn, and two draws can be alike where H is small. A chunk that holds still
    shuffles to itself: that is for `near_positive_mask` to catch.
    """
    expert = expert.detach().float()
    rows, horizon, dims = expert.shape
    if horizon < 2:
        return expert[:, None][:, :0]
    draws = torch.rand((rows, count, horizon), generator=generator, device=generator.device)
    order = draws.argsort(-1).to(expert.device)
    # Each step is replaced by the one that follows it in the random cycle `order`.
    taken = torch.empty_like(order).scatter_(-1, order, order.roll(-1, -1))
    return expert[:, None].expand(-1, count, -1, -1).gather(2, taken[..., None].expand(-1, -1, -1, dims))


def shift(expert: Tensor, count: int, max_steps: int, generator: torch.Generator) -> Tensor:
    """`count` copies of `expert (B,H,A)`, early or late by up to `min(max_steps, H - 1)` steps; n = 0 if H < 2.

    The number of steps is never 0 and is drawn for each row and copy. Early chunks repeat the last step, late ones the
    first.

    Raises:
        ValueError: max_steps is below 1.
    """
    if max_steps < 1:
        raise ValueError(f"max_steps={max_steps}: expected 1 or more")
    expert = expert.detach().float()
    rows, horizon, dims = expert.shape
    if horizon < 2:
        return expert[:, None][:, :0]
    most = min(max_steps, horizon - 1)
    steps = torch.randint(2 * most, (rows, count), generator=generator, device=generator.device).to(expert.device)
    steps = steps - most
    steps = steps + (steps >= 0)
    taken = (torch.arange(horizon, device=expert.device) + steps[..., None]).clamp(0, horizon - 1)
    return expert[:, None].expand(-1, count, -1, -1).gather(2, taken[..., None].expand(-1, -1, -1, dims))


def amplitude(expert: Tensor, factors: Sequence[float], gripper_dims: Sequence[int]) -> Tensor:
    """`expert (B,H,A)` times each of `factors`, but for the gripper: `(B,len(factors),H,A)`.

    In normalised units: 0 is the middle of a dimension's q01 and q99, not standstill, unless they are symmetric.

    Raises:
        ValueError: a gripper dimension does not exist.
    """
    expert = expert.detach().float()
    factor = expert.new_tensor(factors)[:, None].repeat(1, expert.shape[-1])
    factor[:, _is_gripper(expert, gripper_dims)] = 1.0
    return expert[:, None] * factor[:, None]


def gripper_flip(expert: Tensor, low: Tensor, high: Tensor, gripper_dims: Sequence[int]) -> Tensor:
    """`expert (B,H,A)` with its gripper g at `low + high - g`, open where it was closed: `(B,1,H,A)`.

    Args:
        low, high: `(A,)` limits of the gripper, in the units of `expert`; other dimensions are not looked at.

    Raises:
        ValueError: `gripper_dims` is empty or names a dimension that does not exist, or limits are not `(A,)`.
    """
    expert = expert.detach().float()
    dims = expert.shape[-1]
    if not gripper_dims:
        raise ValueError("gripper_flip: gripper_dims is empty, expected at least one gripper dimension")
    if low.shape != (dims,) or high.shape != (dims,):
        raise ValueError(f"low {tuple(low.shape)}, high {tuple(high.shape)}: expected ({dims},)")
    flipped = low.to(expert) + high.to(expert) - expert
    return torch.where(_is_gripper(expert, gripper_dims), flipped, expert)[:, None]


def in_batch(expert: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Expert chunks of `min(count, B - 1)` other rows, drawn without replacement for each row; none if B = 1."""
    expert = expert.detach().float()
    rows = len(expert)
    count = min(count, rows - 1)
    order = torch.rand((rows, max(rows - 1, 0)), generator=generator, device=generator.device).argsort(1)
    offset = order[:, :count].to(expert.device) + 1
    return expert[(torch.arange(rows, device=expert.device)[:, None] + offset) % rows]


def hard(energies: Tensor, chunks: Tensor, valid: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` valid chunks of lowest energy in each row: what the head now takes for good and is not.

    Args:
        energies: `(B,P)`; NaN counts as highest.
        chunks: `(B,P,H,A)`.
        valid: `(B,P)` bool.

    Returns:
        Chunks `(B,count,H,A)`, lowest energy first, and `(B,count)` bool, False where a row had no valid chunk left: an
        invalid one stands there.

    Raises:
        ValueError: the shapes do not fit, or count is above P.
    """
    pool = tuple(chunks.shape[:2])
    if chunks.ndim != 4 or energies.shape != pool or valid.shape != pool or valid.dtype != torch.bool:
        shapes = f"energies {tuple(energies.shape)}, chunks {tuple(chunks.shape)}, valid {tuple(valid.shape)}"
        raise ValueError(f"{shapes} {valid.dtype}: expected (B,P), (B,P,H,A), bool (B,P)")
    if not 0 <= count <= pool[1]:
        raise ValueError(f"count={count}: expected 0 to P={pool[1]}")
    # By energy (torch sorts NaN last), then stably by validity: a valid NaN still comes before what is not valid.
    order = energies.detach().argsort(stable=True, dim=1)
    order = order.gather(1, (~valid).gather(1, order).byte().argsort(stable=True, dim=1))[:, :count]
    rows = torch.arange(len(order), device=order.device)[:, None]
    return chunks.detach().float()[rows, order], valid.gather(1, order)


def _is_gripper(chunks: Tensor, gripper_dims: Sequence[int]) -> Tensor:
    """`(A,)` bool."""
    dims = chunks.shape[-1]
    outside = [dim for dim in gripper_dims if not -dims <= dim < dims]
    if outside:
        raise ValueError(f"gripper_dims {outside}: the actions have {dims} dimensions")
    gripper = torch.zeros(dims, dtype=torch.bool, device=chunks.device)
    gripper[list(gripper_dims)] = True
    return gripper
