"""Recorded rollouts as a second stream of frames, for the head alone: `energy.rollouts`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vla_energy.data import RldsDataset
from vla_energy.finetune.config import FinetuneConfig
from vla_energy.finetune.diffusion import observe
from vla_energy.finetune.setup import Job, autocast
from vla_energy.outcomes import RolloutFrames


class RolloutStream:
    """Batches of rollout frames, in an order that the seed alone decides.

    Args:
        data: from `setup.open_rollouts`.
        job: the policy, as it is at each step.
        config: the flags.
        skip: batches that a resumed run has seen.
    """

    def __init__(self, data: RldsDataset, job: Job, config: FinetuneConfig, skip: int) -> None:
        self._job, self._config = job, config
        shard = (job.ranks.rank, job.ranks.world)
        self._batches = data.batches(config.energy.rollouts.batch_size, skip=skip, shard=shard)

    def next(self, instructions: Sequence[str], generator: torch.Generator) -> RolloutFrames:
        """The next batch, beside the demonstrations' frames with these `instructions`; see `rollout_frames`.

        With several ranks each has its own frames and instructions; `same_instruction` has a row for every rank's
        demonstrations.
        """
        raw, ranks = self._job.ranks.each(lambda: next(self._batches)), self._job.ranks
        everyone = [text for texts in ranks.gather_objects(list(instructions)) for text in texts]
        return rollout_frames(self._job, raw, everyone, self._config, generator)

    def close(self) -> None:
        """Ends the reading."""
        self._batches.close()


@torch.no_grad()
def rollout_frames(
    job: Job,
    raw: dict[str, Any],
    instructions: Sequence[str],
    config: FinetuneConfig,
    generator: torch.Generator,
) -> RolloutFrames:
    """One forward of the policy on a dataset's batch with outcomes.

    Without gradient and in eval mode: dropout would draw from the random state that the policy's own training uses,
    and a run with rollouts must train the policy as one without.

    Args:
        generator: of a diffusion policy's samples; an L1 policy draws nothing.
    """
    batch = job.to_batch(raw)
    vla = job.vla.eval()
    if vla.diffuses:
        output = observe(job, batch, config, generator, 0, config.energy.negatives.samples.steps, job.ranks)
    else:
        with autocast(config, job.device):
            output = vla(batch, "off")
    theirs = [_plain(text) for text in raw["instructions"]]
    same = [[_plain(text) == other for other in theirs] for text in instructions]
    return RolloutFrames(
        output.context,
        output.context_mask,
        output.actions.float(),
        batch["actions"].float(),
        torch.tensor(raw["success"], dtype=torch.bool, device=job.device),
        torch.tensor(raw["remaining"], dtype=torch.int64, device=job.device),
        torch.tensor(same, dtype=torch.bool, device=job.device),
    )


def _plain(instruction: str) -> str:
    """As prompts have it."""
    return instruction.strip().lower()
