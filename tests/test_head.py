"""The energy head: invariances, edges, double backward, and encode-once against one context at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_energy.actions import RawActions
from vla_energy.attention import attend
from vla_energy.config import RANGES, EnergyConfig, HeadConfig, LossConfig, RangeConfig, TemperatureConfig
from vla_energy.head import EnergyHead

B, S, D, N, H, A = 3, 7, 12, 5, 4, 3


def make_head(seed: int = 0, **changes) -> EnergyHead:
    torch.manual_seed(seed)
    # Without a loss of its own the centre learns from the energies, so that all parameters take part.
    config = EnergyConfig(
        head=HeadConfig(hidden_dim=16, num_heads=2, num_layers=2), loss=LossConfig(centre=0.0), **changes
    )
    head = EnergyHead(D, A, H, config)
    torch.nn.init.normal_(head.scorer.factor.weight)  # a factor far from its start of 1, so that errors show
    torch.nn.init.normal_(head.scorer.correction[-1].weight, std=0.1)
    torch.nn.init.normal_(head.scorer.certainty.weight, std=0.3)
    return head


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[1, 4:] = False
    return torch.randn(B, S, D, generator=generator), mask, torch.rand(B, N, H, A, generator=generator) * 2 - 1


def test_energies_start_small_fp32_even_under_autocast_and_bf16_contexts() -> None:
    torch.manual_seed(0)
    head = EnergyHead(D, A, H, EnergyConfig())
    context, mask, actions = inputs()
    plain = head((context.bfloat16(), mask), actions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        energies = head((context.bfloat16(), mask), actions)
    assert energies.dtype == torch.float32
    assert energies.shape == (B, N)
    centre = head.encode(context, mask).centre
    assert centre is not None
    distances = (actions - centre[:, None]).abs().mean((2, 3)) / 0.05
    assert (energies / distances - 1).abs().max() < 0.5
    assert torch.equal(energies, plain)
    with pytest.raises(TypeError, match="float32"):
        head.bfloat16()((context, mask), actions)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 99), st.permutations(range(N)))
def test_permuting_candidates_permutes_energies(seed: int, order: list[int]) -> None:
    head, (context, mask, actions) = make_head(seed), inputs(seed)
    energies = head((context, mask), actions)
    torch.testing.assert_close(head((context, mask), actions[:, order]), energies[:, order], atol=1e-5, rtol=1e-5)
    alone = head((context, mask), actions[:, :1])
    torch.testing.assert_close(alone, energies[:, :1], atol=1e-5, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 99), st.integers(0, 5), st.sampled_from([0.0, 1e6, float("nan"), float("inf")]))
def test_padding_changes_nothing_whatever_it_holds(seed: int, extra: int, filling: float) -> None:
    head, (context, mask, actions) = make_head(seed), inputs(seed)
    expected = head((context, mask), actions)
    padded = torch.cat([context.masked_fill(~mask[..., None], filling), torch.full((B, extra, D), filling)], 1)
    wide = torch.cat([mask, torch.zeros(B, extra, dtype=torch.bool)], 1)
    encoded = head.encode(padded, wide)
    assert encoded.bias.shape[-1] == S
    torch.testing.assert_close(head(encoded, actions), expected, atol=1e-5, rtol=1e-5)
    # In the middle nothing can be cropped.
    middle = torch.cat([padded[:, :2], torch.full((B, 2, D), filling), padded[:, 2:]], 1)
    holes = torch.cat([wide[:, :2], torch.zeros(B, 2, dtype=torch.bool), wide[:, 2:]], 1)
    torch.testing.assert_close(head((middle, holes), actions), expected, atol=1e-5, rtol=1e-5)


def test_encoding_once_equals_one_context_and_one_chunk_at_a_time() -> None:
    head, (context, mask, actions) = make_head(), inputs()
    encoded = head.encode(context, mask)
    assert len(encoded) == B
    slow = torch.stack(
        [
            torch.stack(
                [head((context[b : b + 1], mask[b : b + 1]), actions[b : b + 1, n : n + 1])[0, 0] for n in range(N)]
            )
            for b in range(B)
        ]
    )
    fast = head(encoded, actions)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    parameters = list(head.parameters())
    gradients = [torch.autograd.grad(e.square().sum(), parameters) for e in (slow, fast)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_pairwise_and_index() -> None:
    head, (context, mask, actions) = make_head(), inputs()
    encoded = head.encode(context, mask)
    chunks = actions[0]
    matrix = head.pairwise(encoded, chunks, block_size=2)
    torch.testing.assert_close(matrix, head(encoded, chunks.expand(B, -1, -1, -1)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(head(encoded.index([2, 0]), actions[[2, 0]]), head(encoded, actions)[[2, 0]])
    twice = head(encoded.index([0, 0, 1, 1, 2, 2]), actions.repeat_interleave(2, 0))
    torch.testing.assert_close(twice, head(encoded, actions).repeat_interleave(2, 0), atol=1e-5, rtol=1e-5)


def test_attention_equals_torchs() -> None:
    queries, keys, values = (torch.randn(2, 2, n, 8) for n in (5, 7, 7))
    bias = torch.zeros(2, 1, 1, 7)
    bias[0, ..., 4:] = -1e30
    expected = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, bias.expand(-1, 1, 5, -1))
    torch.testing.assert_close(attend(queries, keys, values, bias), expected, atol=1e-6, rtol=1e-5)


def test_a_centre_with_a_loss_of_its_own_gets_no_gradient_from_energies() -> None:
    torch.manual_seed(0)
    head, (context, mask, actions) = EnergyHead(D, A, H, EnergyConfig()), inputs()
    energies, centres = head((context, mask, actions[:, 0]), actions, training_output=True)[:2]
    own = (*head.scorer.correction.parameters(), *head.scorer.blind.parameters())
    assert all(g is None for g in torch.autograd.grad(energies.sum(), own, retain_graph=True, allow_unused=True))
    assert centres is not None
    loss = torch.stack([centre.square().sum() for centre in centres]).sum()
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(loss, own[2:]))


def test_every_parameter_learns_and_scale_and_shift_of_actions_are_seen() -> None:
    head, (context, mask, actions) = make_head(), inputs()
    energies, centres = head((context, mask, actions[:, 0]), actions, training_output=True)[:2]
    assert centres is not None
    (energies.square().sum() + torch.stack([centre.square().sum() for centre in centres]).sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
    assert (head((context, mask), 3 * actions + 0.4) - energies).abs().min() > 1e-3


def test_double_backward_is_finite_and_equals_finite_differences() -> None:
    head, (context, mask, actions) = make_head(), inputs()
    encoded = head.encode(context, mask)
    actions = actions.requires_grad_()

    def slope(at: torch.Tensor, create_graph: bool = False) -> torch.Tensor:
        return torch.autograd.grad(head(encoded, at).sum(), at, create_graph=create_graph)[0]

    direction = torch.randn(actions.shape, generator=torch.Generator().manual_seed(3))
    gradient = slope(actions, create_graph=True)
    (curvature,) = torch.autograd.grad((gradient * direction).sum(), actions, retain_graph=True)
    (through,) = torch.autograd.grad(gradient.square().sum(), head.scorer.action_in.weight)
    assert curvature.isfinite().all()
    assert through.isfinite().all()
    step = 1e-3
    with torch.no_grad():
        rise = (head(encoded, actions + step * direction) - head(encoded, actions - step * direction)) / (2 * step)
    torch.testing.assert_close(rise, (gradient * direction).sum((-2, -1)), atol=2e-2, rtol=2e-2)
    bend = (slope(actions + step * direction) - slope(actions - step * direction)) / (2 * step)
    agreement = torch.nn.functional.cosine_similarity(bend.flatten(), curvature.flatten(), dim=0)
    assert agreement > 0.98


@pytest.mark.parametrize("name", RANGES)
def test_every_range_gives_finite_energies(name: str) -> None:
    head, (context, mask, actions) = make_head(range=RangeConfig(name=name)), inputs()
    assert head((context, mask), actions).isfinite().all()


def test_the_start_ranks_by_distance_to_the_reference() -> None:
    head, (context, mask, actions) = make_head(), inputs()
    for start in (head.scorer.factor, head.scorer.correction[-1], head.scorer.certainty):
        torch.nn.init.zeros_(start.weight)
    energies = head((context, mask, actions[:, 0]), actions)
    distances = (actions - actions[:, :1]).abs().mean((2, 3))
    assert torch.equal(energies.argsort(1), distances.argsort(1))
    assert energies[:, 0].abs().max() < 1e-6


def test_rows_without_a_reference_get_the_chunk_predicted_from_the_context() -> None:
    head, (context, mask, actions) = make_head(), inputs()
    reference = actions[:, 0].clone()
    reference[1] = float("nan")
    some: Any = head.encode(context, mask, reference)
    none: Any = head.encode(context, mask)
    torch.testing.assert_close(head(some, actions)[1], head(none, actions)[1])
    assert (head(some, actions)[0] - head(none, actions)[0]).abs().max() > 1e-3
    assert torch.equal(none.reference, none.blind)
    assert torch.equal(some.reference[0], reference[0])
    off = EnergyHead(D, A, H, EnergyConfig(head=HeadConfig(hidden_dim=16, reference=False)))
    with_one, without = (off.encode(context, mask, given) for given in (reference, None))
    assert torch.equal(off(with_one, actions), off(without, actions))


@pytest.mark.parametrize("name", ["residual", "original"])
def test_training_output_has_what_the_objective_needs(name: str) -> None:
    ours = name == "residual"
    config = EnergyConfig(
        head=HeadConfig(name=name, hidden_dim=16, num_heads=2),
        temperature=TemperatureConfig("learnable", 0.7),
        loss=LossConfig(centre=float(ours)),
    )
    head, (context, mask, actions) = EnergyHead(D, A, H, config), inputs()
    output = head((context, mask, actions[:, 0]), actions, training_output=True)
    assert torch.equal(output.energies, head((context, mask, actions[:, 0]), actions))
    assert [tuple(centre.shape) for centre in output.centres] == ([(B, H, A)] * 2 if ours else [])
    assert output.temperature.item() == pytest.approx(0.7)
    assert output.temperature.requires_grad
    scorer, temperature = head.parameter_groups()
    assert temperature == {"params": [head.temperature.log_value], "weight_decay": 0.0}
    assert len(scorer["params"]) + 1 == len(list(head.parameters()))


def test_edges_refuse_what_does_not_fit() -> None:
    head, (context, mask, actions) = make_head(), inputs()
    empty = mask.clone()
    empty[2] = False
    with pytest.raises(ValueError, match="row 2"):
        head.encode(context, empty)
    with pytest.raises(ValueError, match="D=12"):
        head.encode(context[..., :5], mask)
    with pytest.raises(ValueError, match="True = valid"):
        head.encode(context, mask.long())
    with pytest.raises(ValueError, match="H=4, A=3"):
        head((context, mask), actions[:, :, :2])
    with pytest.raises(ValueError, match="3 contexts but 2"):
        head((context, mask), actions[:2])
    with pytest.raises(ValueError, match="3 contexts but 2 reference"):
        head.encode(context, mask, actions[:2, 0])
    with pytest.raises(ValueError, match="H=4, A=3"):
        head.encode(context, mask, actions[:, 0, :2])
    with pytest.raises(TypeError, match="RawActions.*normalize"):
        head((context, mask), RawActions(actions.numpy()))
    with pytest.raises(ValueError, match="horizon=0"):
        EnergyHead(D, A, 0, EnergyConfig())
