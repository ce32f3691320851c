"""The training objective: it learns, leaves the backbone alone, and is calm with a batch of one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vla_energy.config import PRESETS, EnergyConfig, LossConfig
from vla_energy.head import EnergyHead, HeadOutput
from vla_energy.objective import EnergyObjective

S, D, H, A = 6, 16, 4, 3


def make(config: EnergyConfig) -> tuple[EnergyHead, EnergyObjective]:
    torch.manual_seed(0)
    config.head = replace(config.head, hidden_dim=32, num_heads=2)
    head = EnergyHead(D, A, H, config)
    return head, EnergyObjective(head, config)


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def batch(rows: int, generator: torch.Generator) -> Batch:
    expert = torch.rand(rows, H, A, generator=generator) * 2 - 1
    signal = torch.nn.functional.pad(expert.flatten(1), (0, D - H * A))
    context = signal[:, None] + 0.05 * torch.randn(rows, S, D, generator=generator)
    errors = torch.tensor([0.5, 0.4, 0.2, 0.06])[:, None, None]
    layer_actions = expert[:, None] + errors * torch.randn(rows, 4, H, A, generator=generator)
    return context, torch.ones(rows, S, dtype=torch.bool), expert, layer_actions


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_a_short_training_ranks_held_out_experts_first() -> None:
    head, objective = make(EnergyConfig())
    optimiser = torch.optim.AdamW(head.parameters(), 2e-3)
    draws = generator()
    for step in range(300):
        loss, _ = objective(*batch(16, draws), draws, step)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 0.5)
        optimiser.step()
    _, metrics = objective(*batch(64, draws), draws)
    assert metrics["energy/win_rate/in_batch"] > 0.98
    assert metrics["energy/win_rate/layer_exits"] > 0.9
    assert metrics["energy/spearman"] > 0.8
    assert metrics["energy/spearman/policy_noise"] > 0.3
    assert metrics["energy/centre_l1_1"] < 0.2  # 0.5 at the start


def test_the_centre_is_trained_by_its_own_loss_alone() -> None:
    """Its weight adds `weight * L1(centre, expert)` and nothing else."""
    losses = {}
    for weight in (0.0, 1.0, 2.0):
        _, objective = make(EnergyConfig(loss=LossConfig(centre=weight)))
        loss, metrics = objective(*batch(4, generator()), generator())
        losses[weight] = float(loss.detach())
    error = float(metrics["energy/centre_l1_0"] + metrics["energy/centre_l1_1"])
    assert losses[1.0] == pytest.approx(losses[0.0] + error, rel=1e-5)
    assert losses[2.0] == pytest.approx(losses[0.0] + 2 * error, rel=1e-5)


def test_gradients_reach_the_head_and_nothing_else() -> None:
    head, objective = make(EnergyConfig())
    context, mask, expert, layer_actions = batch(4, generator())
    context.requires_grad_()
    layer_actions.requires_grad_()
    loss, metrics = objective(context, mask, expert, layer_actions, generator())
    loss.backward()
    assert context.grad is None
    assert layer_actions.grad is None
    assert all(p.grad is not None for p in head.parameters())
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())


def test_the_head_is_called_once_a_step_with_the_expert_first() -> None:
    calls = []

    class Spy(torch.nn.Module):
        def forward(self, context, actions, training_output):
            calls.append(actions)
            return HeadOutput(actions.mean((-2, -1)), (), 1.0)

    objective = EnergyObjective(Spy(), EnergyConfig(loss=LossConfig(centre=0.0)))
    context, mask, expert, layer_actions = batch(3, generator())
    objective(context, mask, expert, layer_actions, generator())
    assert len(calls) == 1
    assert torch.equal(calls[0][:, 0], expert)
    assert torch.equal(calls[0][:, 9], layer_actions[:, -1])  # after the expert, 2 exits and 6 noisy chunks


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("rows", [1, 2])
def test_presets_are_finite_with_a_batch_of_one(name: str, rows: int) -> None:
    head, objective = make(EnergyConfig.preset(name))
    loss, metrics = objective(*batch(rows, generator()), generator())
    loss.backward()
    assert all(value.isfinite() for value in metrics.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())
    alone = rows == 1 and name in ("original", "stage1", "stage2")
    assert metrics["energy/no_negatives"] == float(alone)
    assert metrics["energy/empty_sources"] == float(rows == 1)


def test_a_perfect_energy_has_perfect_metrics() -> None:
    context, mask, expert, layer_actions = batch(4, generator())

    def energy(_, actions, training_output):
        return HeadOutput((actions - expert[:, None]).abs().mean((-2, -1)) / 0.03, (), 1.0)

    objective = EnergyObjective(energy, EnergyConfig(loss=LossConfig(centre=0.0)))  # type: ignore[arg-type]
    _, metrics = objective(context, mask, expert, layer_actions, generator())
    assert metrics["energy/top1"] == 1
    assert metrics["energy/win_rate/policy_noise"] == 1
    assert metrics["energy/spearman"] == pytest.approx(1)
    assert metrics["energy/positive"] == 0
    assert metrics["energy/gap"] > 0
