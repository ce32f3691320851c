"""Small numbers, batches and heads that the property tests share."""

from __future__ import annotations

import math

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from vla_energy.config import EnergyConfig
from vla_energy.head import EnergyHead
from vla_energy.objective import EnergyObjective
from vla_energy.sources import ActionTraits

S, D, H, A = 3, 6, 3, 2
SEEDS = st.integers(0, 10_000)
WILD = st.sampled_from([0.0, 1e-45, 1e-38, 1e19, 1e38, 3e38, math.inf, -math.inf, math.nan]) | st.floats(width=32)
TRAITS = ActionTraits(torch.tensor([1.0, 0.0]), (1,), torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 1.0]))
few, some = settings(max_examples=20, deadline=None), settings(max_examples=40, deadline=None)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """NaN equals itself, and 0 is not -0."""
    return first.shape == second.shape and torch.equal(first.view(torch.int32), second.view(torch.int32))


def batch(seed: int, rows: int, layers: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draws = generator(seed)
    context = torch.randn(rows, S, D, generator=draws)
    mask = torch.rand(rows, S, generator=draws) < 0.7
    mask[:, 0] = True
    expert, layer_actions = torch.rand(rows, H, A, generator=draws), torch.rand(rows, layers, H, A, generator=draws)
    return context, mask, 2 * expert - 1, 2 * layer_actions - 1


def objective(config: EnergyConfig, seed: int = 0) -> tuple[EnergyHead, EnergyObjective]:
    torch.manual_seed(seed)
    config.head.hidden_dim, config.head.num_heads, config.head.dropout = 4, 1, 0.0
    head = EnergyHead(D, A, H, config)
    with torch.no_grad():
        for weight in head.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return head, EnergyObjective(head, config, TRAITS)
