"""The training objective: it learns, leaves the backbone alone, and is calm with a batch of one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from vla_energy.config import PRESETS, SOURCES, EnergyConfig, HeadConfig, LossConfig
from vla_energy.head import EnergyHead, HeadOutput
from vla_energy.health import HealthWatch
from vla_energy.objective import EnergyObjective
from vla_energy.sources import ActionTraits, build_negatives
from vla_energy.training_metrics import energy_metrics

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


class HighIsGood(torch.nn.Module):
    """A head with a sign error: its energies are negated once too often."""

    def __init__(self, head: EnergyHead) -> None:
        super().__init__()
        self.module = head

    def forward(self, *args: Any, **kwargs: Any) -> HeadOutput:
        output = self.module(*args, **kwargs)
        return output._replace(energies=-output.energies)


@pytest.mark.parametrize("sign_error", [False, True])
def test_a_sign_error_is_told_and_a_policy_that_wins_is_not(sign_error: bool) -> None:
    config = EnergyConfig()
    head, objective = make(config)
    if sign_error:
        objective = EnergyObjective(HighIsGood(head), config)
    optimiser = torch.optim.AdamW(head.parameters(), 2e-3)
    draws, watch, told = generator(), HealthWatch(config.monitor), []
    for step in range(5):
        loss, metrics = objective(*batch(16, draws), draws, step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        told += watch.update(step + 1, {name: float(value) for name, value in metrics.items()})
    backwards = [warning for warning in told if "#backwards" in warning]
    if sign_error:
        assert len(backwards) == 1 and "energy/win_rate/expert_noise 0.0" in backwards[0] and "sign" in backwards[0]
        assert "energy/spearman -0.9" in backwards[0] and metrics["energy/win_rate/policy"] > 0.8
    else:
        assert not backwards and metrics["energy/win_rate/policy"] < 0.4, "a young head beside a good policy"


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


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_an_energy_that_is_not_finite_is_no_success(broken: float) -> None:
    _, _, expert, layer_actions = batch(4, generator())
    config = EnergyConfig()
    negatives = build_negatives(config.negatives, expert, layer_actions[:, -1], layer_actions, generator())
    energies = torch.cat([torch.zeros(4, 1), 1 + negatives.distances], 1)
    rates = [f"energy/win_rate/{name}" for name in negatives.sources if name not in negatives.empty]

    def metrics(row: int, column: int) -> dict[str, float]:
        changed = energies.clone()
        changed[row, column] = broken
        found = energy_metrics(HeadOutput(changed, (), 1.0), negatives, config)  # type: ignore[arg-type]
        return {name: float(found[name]) for name in ("energy/top1", *rates)}

    assert all(math.isnan(value) for value in metrics(2, 0).values()), "the expert's energy is part of every pair"
    source, columns = next(iter(negatives.sources.items()))
    found = metrics(1, 1 + int(negatives.valid[1, columns].int().argmax()) + columns.start)
    assert math.isnan(found["energy/top1"]) and math.isnan(found[f"energy/win_rate/{source}"])
    apart = [
        name for name, other in negatives.sources.items() if other.start >= columns.stop and name not in negatives.empty
    ]
    assert apart and all(found[f"energy/win_rate/{name}"] == 1 for name in apart), "the other sources are known"
    negatives.valid[1, columns] = False
    assert set(metrics(1, 1 + columns.start).values()) == {1.0}, "what is not compared changes nothing"


def changed(**loss: object) -> EnergyConfig:
    config = EnergyConfig.preset("stage3")
    config.head = HeadConfig("original", hidden_dim=16, num_heads=2)
    config.loss = replace(config.loss, **loss)
    return config


def parts(config: EnergyConfig, step: int = 0, rows: int = 6) -> tuple[float, dict[str, float]]:
    torch.manual_seed(0)
    head = EnergyHead(D, A, H, config).eval()
    loss, metrics = EnergyObjective(head, config)(*batch(rows, generator()), generator(), step)
    return float(loss.detach()), {name.removeprefix("energy/"): float(value) for name, value in metrics.items()}


@pytest.mark.parametrize("step", [0, 2_500, 10_000, 20_000])
def test_the_mixed_loss_follows_its_schedule(step: int) -> None:
    loss, found = parts(changed(), step)
    alpha = min(1.0, step / 10_000)
    expected = alpha * found["info_nce"] + (1 - alpha) * found["margin"] + 0.01 * found["diversity"]
    assert loss == pytest.approx(expected, rel=1e-5)


def test_the_margin_looks_at_its_sources_alone() -> None:
    config = changed()
    head = EnergyHead(D, A, H, config).eval()
    objective = EnergyObjective(head, config)
    data = batch(4, generator())
    _, metrics = objective(*data, generator())
    expert, first_exit = (head((data[0], data[1]), chunks[:, None]) for chunks in (data[2], data[3][:, 1]))
    by_hand = torch.relu(expert - first_exit + config.loss.margin_width).mean()
    assert metrics["energy/margin"] == pytest.approx(float(by_hand.detach()), rel=1e-4)
    config.loss.margin_sources = ("layer_exit_9",)
    with pytest.raises(ValueError, match="layer_exit_9.*among what is drawn here: layer_exits, layer_exit_1"):
        objective(*data, generator())


def test_log_q_leaves_distinct_chunks_alone_and_takes_a_copys_ln_2_away() -> None:
    """With one duplicated row among distant ones, its copy counts half for the others."""
    config = changed(log_q=True, log_q_width=1e-3)
    config.negatives = EnergyConfig.preset("original").negatives
    objective = EnergyObjective(EnergyHead(D, A, H, config), config)
    _, _, expert, layer_actions = batch(4, generator())
    expert[3] = expert[2]
    drawn = build_negatives(config.negatives, expert, layer_actions[:, -1], layer_actions, generator())
    log_q = objective._log_q(torch.cat([expert[:, None], drawn.chunks], 1), drawn)
    is_copy = (drawn.chunks == expert[2]).flatten(2).all(2)
    torch.testing.assert_close(log_q[:, 0], torch.tensor([1.0, 1.0, 2.0, 2.0]).log())
    torch.testing.assert_close(log_q[:, 1:], torch.where(is_copy, 2.0, 1.0).log())


def test_every_source_and_loss_at_once_is_finite_and_named() -> None:
    config = EnergyConfig()
    config.head = replace(config.head, hidden_dim=16)
    for name in SOURCES:
        getattr(config.negatives, name).count = max(1, getattr(config.negatives, name).count)
    for name in ("distance_regression", "margin", "hinge", "diversity"):
        setattr(config.loss, name, 0.1)
    config.temperature.mode = "learnable"
    traits = ActionTraits(torch.ones(A), (2,), -torch.ones(A), torch.ones(A))
    head = EnergyHead(D, A, H, config)
    lent = torch.randn(5, 2, H, A, generator=generator())
    loss, metrics = EnergyObjective(head, config, traits)(
        *batch(5, generator()), generator(), retrieved=lent, samples=lent
    )
    loss.backward()
    assert all(value.isfinite() and not value.requires_grad for value in metrics.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    drawn = {"policy", "layer_exit_1", "layer_exit_2", *SOURCES}
    assert drawn == {name.removeprefix("energy/win_rate/") for name in metrics if "/win_rate/" in name}
    expected = {"info_nce", "listwise", "distance_regression", "margin", "hinge", "diversity", "temperature", "chance"}
    assert expected <= {name.removeprefix("energy/") for name in metrics}


def test_rows_without_a_reference_are_the_share_asked_for() -> None:
    config = EnergyConfig()
    config.head.blind_share = 0.25
    objective = EnergyObjective(None, config)
    rows = objective._reference(torch.zeros(4000, H, A), generator()).isnan().flatten(1)
    assert torch.equal(rows.any(1), rows.all(1))
    assert rows.any(1).float().mean() == pytest.approx(0.25, abs=0.03)


def test_alignment_is_of_the_policys_chunk_and_leaves_the_gradients_alone() -> None:
    head, objective = make(EnergyConfig(loss=LossConfig(centre=0.0)))
    context, mask, expert, layer_actions = batch(8, generator())
    # An untrained head pulls to the policy's chunk itself; with the expert's as reference it pulls there.
    pulled = torch.cat([layer_actions[:, :-1], expert[:, None]], 1)
    assert objective.alignment(context, mask, expert, layer_actions).abs() < 0.5
    assert objective.alignment(context, mask, layer_actions[:, 0], pulled).abs() < 0.5
    assert all(p.grad is None for p in head.parameters())
    assert head.training
