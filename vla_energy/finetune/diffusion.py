"""Training with a diffusion head: the policy's noise loss, and what the energy head sees of such a policy."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from vla_energy.backbones import LoadedVLA, VLAOutput
from vla_energy.backbones.denoising import predict_noise
from vla_energy.distributed import ALONE, Ranks
from vla_energy.finetune.config import FinetuneConfig
from vla_energy.finetune.setup import Batch, Job, autocast

logger = logging.getLogger(__name__)


def draw_noise(vla: LoadedVLA, actions: Tensor, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor]:
    """Noise `(B,H,A)` and time steps `(B,)` for chunks `actions (B,H,A)`.

    From torch's global state on the CPU, which a resumed run goes on from, and which all ranks have in common.
    """
    rows = ranks.world * len(actions)
    noise = ranks.own(torch.randn(rows, *actions.shape[1:]))
    timesteps = ranks.own(torch.randint(0, vla.action_head.schedule.num_train, (rows,)))
    return noise.to(actions), timesteps.to(actions.device)


def noise_loss(vla: LoadedVLA, batch: Batch, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Mean squared error of the predicted noise, as the host trains its diffusion head.

    Args:
        vla: with a diffusion head.
        batch: with `actions (B,H,A)`, normalised.
        noise, timesteps: from `draw_noise`.
    """
    actions, schedule = batch["actions"], vla.action_head.schedule
    predicted = predict_noise(vla, batch, schedule.add_noise(actions, noise, timesteps), timesteps)
    return (predicted.float() - noise).square().mean()


def say_samples(config: FinetuneConfig) -> None:
    """Says at the start of a training what a diffusion policy's reranking will lack."""
    if not config.energy.candidates.samples:
        logger.warning(
            "--energy.candidates.samples is 0: reranking will choose among noise around one sample of the diffusion "
            "head; 8 makes it best of 9"
        )


@torch.no_grad()
def observe(
    job: Job,
    batch: Batch,
    config: FinetuneConfig,
    generator: torch.Generator,
    count: int,
    steps: int | None = None,
    ranks: Ranks = ALONE,
) -> VLAOutput:
    """A pass without the noised chunk, and from it the policy's chunk and `count` more samples.

    In eval mode, without gradient, and with a generator of its own: a policy is trained beside an energy head as
    without one. The expert's chunk is in no token of this pass.

    Args:
        job: its policy has a diffusion head; its mode is restored.
        batch: as in training.
        config: precision.
        generator: of the starting noise, on the CPU.
        count: K.
        steps: of the denoising, default the action head's.
        ranks: the generator is in the same state on all of them, and `batch` holds this rank's rows.
    """
    vla, training = job.vla, job.vla.training
    rows = ranks.world * len(batch["input_ids"])
    noise = ranks.own(torch.randn(rows, 1 + count, vla.horizon, vla.action_dim, generator=generator))
    vla.eval()
    try:
        with autocast(config, job.device):
            return vla(batch, noise=noise, steps=steps)
    finally:
        vla.train(training)
