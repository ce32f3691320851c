"""Frames of recorded rollouts: what the head is told of them, and which of their chunks become negatives."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vla_energy.distributed import Ranks
from vla_energy.measures import chunk_distance


@dataclass(frozen=True)
class RolloutFrames:
    """R frames of recorded rollouts beside a batch of B demonstrations.

    Attributes:
        context, context_mask: `(R,S,D)` and `(R,S)`, True = valid; S need not be the demonstrations'.
        policy: `(R,H,A)` the policy's chunk there, now; the head's reference.
        executed: `(R,H,A)` normalised, the actions that were executed from there on.
        success: `(R,)` bool, of the episode.
        remaining: `(R,)` int64, steps that follow in the episode.
        same_instruction: `(B,R)` bool, where the demonstration's frame has the rollout's instruction.
    """

    context: Tensor
    context_mask: Tensor
    policy: Tensor
    executed: Tensor
    success: Tensor
    remaining: Tensor
    same_instruction: Tensor

    def __post_init__(self) -> None:
        rows = len(self.context)
        own = (self.context_mask, self.policy, self.executed, self.success, self.remaining)
        alike = self.policy.ndim == 3 and self.policy.shape == self.executed.shape
        bools = self.success.dtype == self.same_instruction.dtype == torch.bool
        per_frame = self.success.shape == self.remaining.shape == (rows,)
        fits = self.same_instruction.ndim == 2 and self.same_instruction.shape[1] == rows
        if not (alike and bools and per_frame and fits and all(len(part) == rows for part in own)):
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in vars(self).items())
            raise ValueError(
                f"{shapes}: expected R frames, chunks (R,H,A), bool success (R,) and same_instruction (B,R)"
            )

    @property
    def whole(self) -> Tensor:
        """`(R,)` bool: the chunk was executed to its end.

        Beyond an episode's end its last action is repeated, which nobody executed; and as solved episodes are short,
        the head would know success by it.
        """
        return self.remaining >= self.executed.shape[1] - 1


def failed_chunks(frames: RolloutFrames, policy: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For each demonstration's frame, chunks that were executed in failed episodes of the same instruction.

    Among the rollout frames of this step, those come first where the policy proposes nearly what it proposes here: it
    sees nearly the same. Nothing is drawn, so that the other sources draw what they draw without rollouts.

    Args:
        policy: `(B,H,A)` the policy's chunks in the demonstrations' frames.
        count: F, at most R.

    Returns:
        Chunks `(B,F,H,A)`, float32 without gradient, and `(B,F)` bool, False where the step has no such frame left:
        any chunk stands there.

    Raises:
        ValueError: a count above R, or another number of demonstrations.
    """
    rows = len(frames.executed)
    if not 0 < count <= rows or frames.same_instruction.shape != (len(policy), rows):
        matched = tuple(frames.same_instruction.shape)
        raise ValueError(
            f"failed={count}, same_instruction {matched}: expected 1 to R={rows}, and ({len(policy)},{rows})"
        )
    usable = frames.same_instruction & (~frames.success & frames.whole)
    proposals = frames.policy.detach().float()
    unlike = chunk_distance(proposals.expand(len(policy), -1, -1, -1), policy.detach())
    nearest = unlike.masked_fill(~usable, torch.inf).argsort(stable=True, dim=1)[:, :count]
    return frames.executed.detach().float()[nearest], usable.gather(1, nearest)


def gather_chunks(frames: RolloutFrames, ranks: Ranks) -> RolloutFrames:
    """All ranks' rollout frames but for their contexts, which stay where they are: S = 0; `frames` on one process.

    Args:
        frames: this rank's R; `same_instruction (B,R)` has a row for each of all ranks' demonstrations.
    """
    if ranks.world == 1:
        return frames
    names = ("policy", "executed", "success", "remaining")
    whole = {name: ranks.gather(getattr(frames, name)) for name in names}
    rows = len(whole["policy"])
    context = frames.context.new_zeros(rows, 0, frames.context.shape[2])
    mask = frames.context_mask.new_zeros(rows, 0)
    same = ranks.gather(frames.same_instruction.T).T
    return replace(frames, context=context, context_mask=mask, same_instruction=same, **whole)


def join_contexts(
    first: tuple[Tensor, Tensor, Tensor], second: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Two batches `(context, context_mask, reference)` as one, shorter contexts filled up with masked tokens."""
    length = max(first[0].shape[1], second[0].shape[1])
    contexts, masks = [], []
    for context, mask, _ in (first, second):
        missing = length - context.shape[1]
        contexts.append(torch.nn.functional.pad(context.float(), (0, 0, 0, missing)))
        masks.append(torch.nn.functional.pad(mask, (0, missing), value=False))
    return torch.cat(contexts), torch.cat(masks), torch.cat([first[2], second[2]])
