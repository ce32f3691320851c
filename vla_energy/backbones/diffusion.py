"""The host's diffusion action head, its noisy-action projector, and DDIM on its noise schedule.

The head predicts the noise that is in a chunk. Sampling starts from noise alone and takes out, step by step, what the
head says is noise. We need two formulas of a scheduler, which do not warrant the `diffusers` package.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vla_energy.backbones.action_head import ResidualMLP

_MAX_BETA = 0.999
_MAX_PERIOD = 10_000.0


class NoiseSchedule:
    """Squared-cosine noise schedule (Nichol and Dhariwal, 2021, eq. 17, betas at most 0.999) with DDIM steps.

    DDIM is Song et al., 2021, eq. 12 with sigma 0: no noise is added on the way, so the starting noise decides the
    chunk. The predicted chunk is clamped to [-1, 1] at each step, as in the scheduler that the host takes.

    Args:
        num_train: T, the steps that chunks are noised in at training; time steps are 0 to T - 1.

    Raises:
        ValueError: T is below 1.
    """

    def __init__(self, num_train: int) -> None:
        if num_train < 1:
            raise ValueError(f"num_diffusion_steps_train={num_train}: expected 1 or more")
        self.num_train = num_train
        levels = [math.cos((i / num_train + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(num_train + 1)]
        betas = [min(1 - after / before, _MAX_BETA) for before, after in itertools.pairwise(levels)]
        # In float32, as the host's: at the last steps next to nothing of the chunk is left, and rounding shows.
        self.kept = (1 - torch.tensor(betas, dtype=torch.float32)).cumprod(0)
        """`(T,)` share of the chunk's variance that is left at each time step."""

    def add_noise(self, actions: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Chunks `(B,H,A)` with `noise (B,H,A)` of the time steps `(B,)` in them."""
        kept = self.kept.to(actions)[timesteps.to(actions.device)][:, None, None]
        return kept.sqrt() * actions + (1 - kept).sqrt() * noise

    def timesteps(self, steps: int) -> list[int]:
        """The time steps of a denoising of `steps` steps, in their order: evenly spread, ending with 0.

        Raises:
            ValueError: `steps` is not 1 to T.
        """
        return [i * self._stride(steps) for i in reversed(range(steps))]

    def step(self, chunk: Tensor, noise: Tensor, timestep: int, steps: int) -> Tensor:
        """The chunk one step less noisy; in float32, and after the last step clean.

        Args:
            chunk: at `timestep`, any shape.
            noise: that the head predicts in it, of the same shape.
            timestep: one of `timesteps(steps)`.
            steps: of the whole denoising.
        """
        before = timestep - self._stride(steps)
        kept, kept_before = self.kept[timestep], self.kept[before] if before >= 0 else torch.ones(())
        clean = (chunk.float() - float((1 - kept).sqrt()) * noise.float()) / float(kept.sqrt())
        return float(kept_before.sqrt()) * clean.clamp(-1, 1) + float((1 - kept_before).sqrt()) * noise.float()

    def _stride(self, steps: int) -> int:
        if not 1 <= steps <= self.num_train:
            raise ValueError(f"{steps} denoising steps: expected 1 to num_diffusion_steps_train={self.num_train}")
        return self.num_train // steps


def time_embedding(timesteps: Tensor, width: int) -> Tensor:
    """Sines, then cosines of time steps `(B,)` at frequencies 1 to 1/10000: `(B, width)` float32 (host's layout).

    Raises:
        ValueError: the width is odd or below 4.
    """
    if width % 2 or width < 4:
        raise ValueError(f"width {width}: expected an even one, 4 or more")
    half = width // 2
    rates = torch.exp(torch.arange(half, device=timesteps.device) * -math.log(_MAX_PERIOD) / (half - 1))
    angles = timesteps[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class _NoisePredictor(nn.Module):
    def __init__(self, input_dim: int, hidden_dim: int, action_dim: int) -> None:
        super().__init__()
        self.mlp_resnet = ResidualMLP(input_dim, hidden_dim, action_dim)


class DiffusionActionHead(nn.Module):
    """Action-token states to the noise in a chunk: the A states of a time step are read together (openvla-oft).

    Args:
        state_dim: width D of the language model.
        hidden_dim: width of the MLP.
        action_dim: A.
        num_steps_train: T of the schedule.
        num_steps_inference: of a denoising, at most T; default T.

    Raises:
        ValueError: numbers of steps that do not fit.
    """

    def __init__(
        self,
        state_dim: int,
        hidden_dim: int,
        action_dim: int,
        num_steps_train: int = 50,
        num_steps_inference: int | None = None,
    ) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.schedule = NoiseSchedule(num_steps_train)
        self.num_steps_inference = num_steps_inference or num_steps_train
        self.schedule.timesteps(self.num_steps_inference)
        self.noise_predictor = _NoisePredictor(state_dim * action_dim, hidden_dim, action_dim)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.noise_predictor.mlp_resnet.fc1.weight.dtype

    def forward(self, states: Tensor) -> Tensor:
        """`(..., H*A, D)` -> predicted noise `(..., H, A)`."""
        *lead, tokens, dim = states.shape
        shaped = states.reshape(*lead, tokens // self.action_dim, self.action_dim * dim)
        return self.noise_predictor.mlp_resnet(shaped)


class NoisyActionProjector(nn.Module):
    """Each number of a noised chunk to one token: `(B, H, A)` -> `(B, H*A, D)`."""

    def __init__(self, text_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(1, text_dim)
        self.fc2 = nn.Linear(text_dim, text_dim)
        self.activation = nn.GELU()

    def forward(self, chunk: Tensor) -> Tensor:
        """`(B, H, A)` -> `(B, H*A, D)`."""
        return self.fc2(self.activation(self.fc1(chunk.flatten(1)[..., None])))


def starting_noise(
    generators: Sequence[torch.Generator], count: int, horizon: int, action_dim: int
) -> tuple[Tensor, list[torch.Generator]]:
    """Noise `(B, 1 + count, H, A)` for the policy's chunk and `count` more samples of each of B rows, and B generators.

    Of a row's generator just the policy's noise and a seed are drawn, whatever `count` is. The rest of the noise, and
    what the caller draws after it, comes from the generator with that seed: so the policy's chunks of a whole episode
    are the same whether there are other candidates or not.

    Args:
        generators: B, on the CPU, so that a row's samples do not depend on its batch.
        count, horizon, action_dim: K, H and A.
    """
    noise, others = [], []
    for own in generators:
        first = torch.randn(1, horizon, action_dim, generator=own)
        seed = int(torch.randint(2**63 - 1, (), generator=own))
        others.append(torch.Generator().manual_seed(seed))
        noise.append(torch.cat([first, torch.randn(count, horizon, action_dim, generator=others[-1])]))
    return torch.stack(noise), others
