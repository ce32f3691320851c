"""Learning from rollouts, piece by piece: each function against a slow loop, and what must not change without them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_objective import A, D, H, S, batch, generator
from torch import Tensor

from vla_energy import losses
from vla_energy.config import EnergyConfig, RolloutsConfig
from vla_energy.head import EnergyHead, HeadOutput
from vla_energy.measures import success_auc
from vla_energy.objective import EnergyObjective
from vla_energy.outcomes import RolloutFrames, failed_chunks, join_contexts

R, B = 6, 4
LONG = S + 3  # tokens of a rollout's context


def frames(seed: int = 0, rows: int = R, demonstrations: int = B) -> RolloutFrames:
    draws = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, LONG, dtype=torch.bool)
    mask[0, 4:] = False
    return RolloutFrames(
        torch.randn(rows, LONG, D, generator=draws),
        mask,
        torch.randn(rows, H, A, generator=draws),
        torch.randn(rows, H, A, generator=draws),
        torch.rand(rows, generator=draws) < 0.5,
        torch.randint(0, 3 * H, (rows,), generator=draws),
        torch.rand(demonstrations, rows, generator=draws) < 0.5,
    )


def config(**rollouts: object) -> EnergyConfig:
    made = EnergyConfig(rollouts=RolloutsConfig("recorded", batch_size=R, **rollouts))  # type: ignore[arg-type]
    made.head = replace(made.head, hidden_dim=16, num_heads=2)
    return made


def slow_outcome(energies: Tensor, targets: Tensor, temperature: float, bias: float, valid: Tensor) -> Tensor:
    each = []
    for energy, target, used in zip(energies, targets, valid, strict=True):
        if used:
            p = 1 / (1 + (energy / temperature - bias).exp())
            each.append(-(target * p.log() + (1 - target) * (1 - p).log()))
    return torch.stack(each).mean() if each else energies.new_zeros(())


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), temperature=st.floats(0.3, 3), bias=st.floats(-3, 3))
def test_the_outcome_loss_and_its_gradient_equal_a_loop(seed: int, temperature: float, bias: float) -> None:
    draws = torch.Generator().manual_seed(seed)
    energies = torch.randn(5, generator=draws, dtype=torch.float64).requires_grad_()
    targets = torch.rand(5, generator=draws, dtype=torch.float64)
    valid = torch.rand(5, generator=draws) < 0.7
    fast = losses.outcome(energies, targets, temperature, bias, valid)
    slow = slow_outcome(energies, targets, temperature, bias, valid)
    torch.testing.assert_close(fast, slow)
    if valid.any():
        torch.testing.assert_close(*(torch.autograd.grad(loss, energies)[0] for loss in (fast, slow)))


def test_success_asks_for_low_energy_and_the_bias_takes_a_common_offset() -> None:
    energies = torch.zeros(2, requires_grad=True)
    bias = torch.tensor(0.0, requires_grad=True)
    losses.outcome(energies, torch.tensor([1.0, 0.0]), 1.0, bias).backward()
    assert energies.grad is not None and energies.grad[0] > 0 > energies.grad[1]
    values, targets = torch.randn(5, generator=generator()), torch.rand(5, generator=generator())
    moved = losses.outcome(values + 7.0, targets, 2.0, 1.0 + 7.0 / 2.0)
    torch.testing.assert_close(moved, losses.outcome(values, targets, 2.0, 1.0))


def test_a_frame_that_does_not_count_takes_no_part_whatever_its_energy() -> None:
    energies = torch.tensor([1.0, math.nan, math.inf], requires_grad=True)
    bias = torch.tensor(0.3, requires_grad=True)
    valid = torch.tensor([True, False, False])
    loss = losses.outcome(energies, torch.tensor([1.0, math.nan, 0.0]), 1.0, bias, valid)
    loss.backward()
    assert loss.detach() == pytest.approx(math.log(1 + math.exp(1 - 0.3)), rel=1e-5)
    assert energies.grad is not None and torch.equal(energies.grad[1:], torch.zeros(2)) and energies.grad[0] > 0
    assert bias.grad == pytest.approx(-float(energies.grad[0]))
    assert losses.outcome(energies, torch.zeros(3), 1.0, bias, torch.zeros(3, dtype=torch.bool)) == 0
    with pytest.raises(ValueError, match=r"targets \(2,\): expected the energies' \(3,\)"):
        losses.outcome(energies, torch.zeros(2), 1.0)


def test_targets_are_discounted_success() -> None:
    success, remaining = torch.tensor([True, True, True, False, False]), torch.tensor([0, 1, 30, 0, 5])
    expected = torch.tensor([1.0, 0.9, 0.9**30, 0.0, 0.0])
    torch.testing.assert_close(losses.outcome_targets(success, remaining, 0.9), expected)
    assert losses.outcome_targets(success, remaining, 0.0).tolist() == [1, 0, 0, 0, 0]
    assert losses.outcome_targets(success, remaining, 1.0).tolist() == [1, 1, 1, 0, 0]
    with pytest.raises(ValueError, match=r"discount=1\.5"):
        losses.outcome_targets(success, remaining, 1.5)
    with pytest.raises(ValueError, match=r"remaining \(4,\)"):
        losses.outcome_targets(success, remaining[:4], 0.9)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000))
def test_auc_equals_a_loop_over_pairs(seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    energies = torch.randint(0, 4, (7,), generator=draws).float()  # with ties
    success, valid = torch.rand(7, generator=draws) < 0.5, torch.rand(7, generator=draws) < 0.8
    won = []
    for i in range(7):
        for j in range(7):
            if success[i] and not success[j] and valid[i] and valid[j]:
                won.append(1.0 if energies[i] < energies[j] else 0.5 if energies[i] == energies[j] else 0.0)
    expected = sum(won) / len(won) if won else 0.5
    assert float(success_auc(energies, success, valid)) == pytest.approx(expected)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), count=st.integers(1, R))
def test_failed_chunks_equal_a_loop(seed: int, count: int) -> None:
    data, policy = frames(seed), torch.randn(B, H, A, generator=torch.Generator().manual_seed(seed + 1))
    chunks, there = failed_chunks(data, policy, count)
    assert chunks.shape == (B, count, H, A) and there.shape == (B, count)
    for row in range(B):
        usable = [
            frame
            for frame in range(R)
            if data.same_instruction[row, frame] and not data.success[frame] and data.remaining[frame] >= H - 1
        ]
        usable.sort(key=lambda frame: float((data.policy[frame] - policy[row]).abs().mean()))
        assert there[row].sum() == min(count, len(usable))
        for column, frame in enumerate(usable[:count]):
            assert there[row, column] and torch.equal(chunks[row, column], data.executed[frame])


def test_frames_and_counts_that_do_not_fit_are_named() -> None:
    data = frames()
    for count in (0, R + 1):
        with pytest.raises(ValueError, match=f"failed={count}.*1 to R={R}"):
            failed_chunks(data, torch.zeros(B, H, A), count)
    with pytest.raises(ValueError, match="same_instruction"):
        failed_chunks(data, torch.zeros(B + 1, H, A), 1)
    with pytest.raises(ValueError, match=rf"success \({R - 1},\)"):
        replace(data, success=data.success[:-1])
    with pytest.raises(ValueError, match="bool success"):
        replace(data, success=data.success.float())


def test_one_call_of_the_head_equals_two() -> None:
    """Demonstrations and rollouts together, contexts of different length among them, against each alone."""
    torch.manual_seed(0)
    head, data = EnergyHead(D, A, H, config()).eval(), frames()
    context, mask, expert, layer_actions = batch(B, generator())
    chunks = torch.cat([expert[:, None], layer_actions], 1)
    first = (context, mask, layer_actions[:, -1])
    second = (data.context, data.context_mask, data.policy)
    output: HeadOutput = head(join_contexts(first, second), chunks, training_output=True, executed=data.executed)
    alone: HeadOutput = head(first, chunks, training_output=True)
    torch.testing.assert_close(output.energies, alone.energies, atol=1e-5, rtol=1e-5)
    for centre, expected in zip(output.centres, alone.centres, strict=True):
        torch.testing.assert_close(centre, expected, atol=1e-5, rtol=1e-5)
    theirs = head(second, data.executed[:, None])[:, 0]
    torch.testing.assert_close(output.executed, theirs, atol=1e-5, rtol=1e-5)
    assert alone.executed is None and alone.outcome_bias is None and output.outcome_bias == 0
    with pytest.raises(ValueError, match=f"{B} contexts but {B} rows of actions and {R} executed"):
        head(first, chunks, training_output=True, executed=data.executed)
    with pytest.raises(ValueError, match="training_output=True"):
        head(join_contexts(first, second), chunks, executed=data.executed)


def test_the_bias_is_there_only_where_outcomes_are_learnt_and_never_decays() -> None:
    for settings_, learns in ((config(), True), (config(outcome=0.0), False), (EnergyConfig(), False)):
        head = EnergyHead(D, A, H, settings_)
        assert ("outcome_bias" in head.state_dict()) == learns
        grouped = [parameter for group in head.parameter_groups() for parameter in group["params"]]
        assert len(grouped) == len(list(head.parameters()))
        if head.outcome_bias is not None:
            assert head.parameter_groups()[1] == {"params": [head.outcome_bias], "weight_decay": 0.0}


def _loss(energy: EnergyConfig, rollouts: RolloutFrames | None) -> tuple[Tensor, dict[str, Tensor], EnergyHead]:
    torch.manual_seed(0)
    head = EnergyHead(D, A, H, energy)
    loss, metrics = EnergyObjective(head, energy)(*batch(B, generator()), generator(), rollouts=rollouts)
    return loss, metrics, head


def test_rollouts_add_the_weighted_outcome_and_nothing_else() -> None:
    data = replace(frames(), same_instruction=torch.zeros(B, R, dtype=torch.bool))
    plain = replace(config(), rollouts=RolloutsConfig())
    without, _, _ = _loss(plain, None)
    unmatched, metrics, _ = _loss(config(outcome=0.0, failed=3), data)  # no demonstration has their instruction
    torch.testing.assert_close(unmatched, without, atol=1e-5, rtol=1e-5)
    assert metrics["energy/win_rate/failed"] == 1 and "energy/outcome" not in metrics
    both, metrics, head = _loss(config(outcome=0.5, failed=0), data)
    torch.testing.assert_close(both, without + 0.5 * metrics["energy/outcome"], atol=1e-5, rtol=1e-5)
    theirs = head((data.context, data.context_mask, data.policy), data.executed[:, None])[:, 0]
    targets = losses.outcome_targets(data.success, data.remaining, 0.99)
    by_hand = slow_outcome(theirs.detach(), targets, 1.0, 0.0, data.remaining >= H - 1)
    torch.testing.assert_close(metrics["energy/outcome"], by_hand, atol=1e-5, rtol=1e-5)
    both.backward()
    assert head.outcome_bias is not None and head.outcome_bias.grad


def test_failed_chunks_are_negatives_and_near_the_experts_they_are_graded_and_not_contrasted() -> None:
    data = frames(1)
    data = replace(
        data,
        success=torch.zeros(R, dtype=torch.bool),
        remaining=torch.full((R,), 50),
        same_instruction=torch.ones(B, R, dtype=torch.bool),
    )
    expert = batch(B, generator())[2]
    _, away, _ = _loss(config(outcome=0.0, failed=2), data)
    near = replace(data, executed=expert[:1].expand(R, -1, -1) + 0.001)
    _, masked, _ = _loss(config(outcome=0.0, failed=2), near)
    assert masked["energy/masked"] == away["energy/masked"] + 2  # both columns of the row whose expert it is
    assert {"energy/win_rate/failed", "energy/negative/failed"} <= away.keys()
    _, spread, _ = _loss(replace(config(), rollouts=RolloutsConfig()), None)
    assert away["energy/chance"] > spread["energy/chance"]


def test_rollouts_that_are_missing_or_not_asked_for_are_told() -> None:
    with pytest.raises(ValueError, match="rollouts.dataset='recorded', but no frames"):
        _loss(config(), None)
    with pytest.raises(ValueError, match="rollouts.dataset='', but frames"):
        _loss(EnergyConfig(), frames())


def test_a_short_training_learns_the_outcome() -> None:
    """Success is written in the context: after training the energies of executed chunks tell it."""
    energy = config(outcome=1.0, failed=0)
    torch.manual_seed(0)
    head = EnergyHead(D, A, H, energy)
    objective, draws = EnergyObjective(head, energy), generator()
    optimiser = torch.optim.AdamW(head.parameter_groups(), 3e-3)

    def drawn(rows: int) -> RolloutFrames:
        data = frames(int(torch.randint(0, 10**6, (), generator=draws)), rows, 8)
        context = data.context.clone()
        context[..., 0] = torch.where(data.success, 3.0, -3.0)[:, None]
        return replace(data, context=context, remaining=torch.full((rows,), H))

    for step in range(150):
        loss, _ = objective(*batch(8, draws), draws, step, rollouts=drawn(16))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 0.5)
        optimiser.step()
    _, metrics = objective(*batch(8, draws), draws, rollouts=drawn(200))
    assert metrics["energy/outcome_auc"] > 0.9
    assert metrics["energy/outcome_bias"].abs() > 0.1
