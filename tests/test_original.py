"""The original scorer against stored numbers of its own code, and why its training failed."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vla_energy.config import EnergyConfig, HeadConfig, LossConfig, RangeConfig
from vla_energy.losses import info_nce, logits_of
from vla_energy.original import OriginalContext, OriginalScorer, sine_positions
from vla_energy.ranges import apply_range

ROOT = Path(__file__).parents[1]
FOLDER = Path(os.environ.get("VLA_ENERGY_GOLDEN", ROOT.parent / "shared" / "golden" / "openvla_oft"))
FILES = {"energy_golden_vel_sig": False, "energy_golden_vel": True}  # name -> per_step
WEIGHTS = "energy_state_dict"
CASES = sorted(path.stem for path in FOLDER.glob("[A-Z]_*.pt")) if FOLDER.is_dir() else []
RANGE_OF = {False: RangeConfig("sigmoid"), True: RangeConfig("sigmoid", scale=2.0, slope=0.5, offset=0.1)}
TOLERANCE = 1e-5
B, S, D, N, H, A = 3, 7, 12, 4, 5, 3


def make_scorer(head: HeadConfig, energy_range: RangeConfig, sizes: tuple[int, int, int] = (D, A, H)) -> OriginalScorer:
    torch.manual_seed(0)
    config = EnergyConfig(head=head, range=energy_range, loss=LossConfig(centre=0.0))
    return OriginalScorer(*sizes, config)


def small_scorer(per_step: bool = False, dropout: float = 0.0, range_name: str = "linear") -> OriginalScorer:
    """Attention sharper than at the start, so that the action's small effect is far above rounding."""
    head = HeadConfig("original", hidden_dim=12, num_heads=3, dropout=dropout, per_step=per_step)
    scorer = make_scorer(head, RangeConfig(range_name))
    with torch.no_grad():
        scorer.cross.in_proj_weight.mul_(3)
    return scorer


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[1, 4:] = False
    return torch.randn(B, S, D, generator=generator), mask, torch.rand(B, N, H, A, generator=generator) * 2 - 1


def slow_energies(scorer: OriginalScorer, context: Tensor, mask: Tensor, actions: Tensor) -> Tensor:
    """One copy of the context for every chunk, through PyTorch's own attention: `(B,N)`."""
    count = actions.shape[1]
    copies = scorer.state_linear(context.repeat_interleave(count, 0))
    queries = scorer.dropout(scorer.action_linear(actions.flatten(0, 1)) + scorer.positions)
    ignored = ~mask.repeat_interleave(count, 0)
    answers, _ = scorer.cross(queries, copies, copies, key_padding_mask=ignored, need_weights=False)
    if not scorer.config.head.per_step:
        answers = answers.mean(1, keepdim=True)
    steps = apply_range(scorer.prediction_head(answers), scorer.config.range)
    return steps.mean((1, 2)).unflatten(0, (-1, count))


# The original's own numbers


def load(name: str) -> Any:
    return torch.load(FOLDER / f"{name}.pt", weights_only=True)


@pytest.fixture(params=FILES)
def golden_file(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def golden_scorer(golden_file: str) -> OriginalScorer:
    per_step = FILES[golden_file]
    head = HeadConfig("original", hidden_dim=64, num_heads=4, dropout=0.2, per_step=per_step)
    scorer = make_scorer(head, RANGE_OF[per_step], (64, 7, 8)).eval()
    scorer.load_state_dict(load(WEIGHTS))
    return scorer


def close(actual: Tensor, expected: Tensor | float, rtol: float = 0.0) -> None:
    expected = torch.as_tensor(expected).to(actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=TOLERANCE)


def golden_inputs(case: str, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Any], Tensor, Tensor, Tensor]:
    """The stored case, its last hidden states, our mask (the host's is True where ignored) and the expert's chunks."""
    stored = load(case)
    return stored, stored["hidden_states"][-1].to(dtype), ~stored["context_mask"], stored["batch"]["actions"].to(dtype)


def test_goldens_are_there() -> None:
    wanted = [*FILES, WEIGHTS]
    if CASES and all((FOLDER / f"{name}.pt").is_file() for name in wanted):
        assert all(set(load(name)) == set(CASES) for name in FILES)
        return
    message = f"not all of {', '.join(wanted)} and cases in {FOLDER}; set VLA_ENERGY_GOLDEN to the folder that has them"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.mark.parametrize("case", CASES)
def test_energies_equal_the_original(golden_file: str, golden_scorer: OriginalScorer, case: str) -> None:
    expected = load(golden_file)[case]
    stored, context, mask, expert = golden_inputs(case)
    rows = len(expert)
    layers = torch.stack(stored["layer_actions"], 1)
    chunks = torch.cat([expert[:, None], stored["predicted_actions"][:, None], layers], 1)
    with torch.no_grad():
        encoded = golden_scorer.encode(context, mask)
        energies = golden_scorer.energies(encoded, chunks)
        matrix = golden_scorer.energies(encoded, expert.expand(rows, -1, -1, -1))
        unmasked = golden_scorer.energies(golden_scorer.encode(context, torch.ones_like(mask)), expert[:, None])
    close(energies[:, :1], expected["E_gt"])
    close(energies[:, 1:2], expected["E_pred"])
    close(energies[:, 2:], expected["E_layer"][..., 0].T)
    close(unmasked, expected["E_gt_nomask"])
    close(matrix, expected["E_matrix"])
    close(matrix.diagonal().mean(), expected["E_pos"])
    others = matrix[~torch.eye(rows, dtype=torch.bool)]
    close(others.sum() / max(len(others), 1), expected["E_neg"])
    # The same loss twice: ours has the expert in column 0, the original on the diagonal.
    turned = torch.stack([row.roll(-index) for index, row in enumerate(matrix)])
    close(info_nce(turned, 0.5), expected["loss_eval"])
    close(F.cross_entropy(logits_of(matrix, 0.5), torch.arange(rows)), expected["loss_eval"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_equal_the_original(
    golden_file: str, golden_scorer: OriginalScorer, case: str, dtype: torch.dtype
) -> None:
    """In float64 within 1e-5; in fp32, whose rounding is 4e-6 of a norm, on either side, 1e-5 of it more."""
    rtol = 0.0 if dtype == torch.float64 else TOLERANCE
    expected = load(golden_file)[case]
    _, context, mask, expert = golden_inputs(case, dtype)
    scorer = golden_scorer.to(dtype)
    expert.requires_grad_()
    encoded = scorer.encode(context, mask)
    (gradient,) = torch.autograd.grad(scorer.energies(encoded, expert[:, None]).sum(), expert, retain_graph=True)
    close(gradient, expected["dE_da"], rtol)
    matrix = scorer.energies(encoded, expert.detach().expand(len(expert), -1, -1, -1))
    F.cross_entropy(logits_of(matrix, 0.5), torch.arange(len(expert))).backward()
    norms = {name: p.grad.norm() for name, p in scorer.named_parameters() if p.grad is not None}
    assert norms.keys() == expected["gradnorm_eval"].keys()
    for name, norm in norms.items():
        close(norm, expected["gradnorm_eval"][name], rtol)
    close(torch.stack(list(norms.values())).norm(), expected["gradnorm_total_eval"], rtol)


# Encoded once


@pytest.mark.parametrize("per_step", [False, True])
def test_encoding_once_equals_a_copy_of_the_context_for_each_chunk(per_step: bool) -> None:
    scorer = small_scorer(per_step, range_name="sigmoid").double()
    context, mask, actions = inputs()
    results = []
    for fast in (True, False):
        ctx, act = (part.double().requires_grad_() for part in (context, actions))
        energies = scorer.energies(scorer.encode(ctx, mask), act) if fast else slow_energies(scorer, ctx, mask, act)
        weights = torch.linspace(-1, 1, B * N, dtype=torch.float64).view(B, N)
        gradients = torch.autograd.grad((weights * energies).sum(), [ctx, act, *scorer.parameters()])
        results.append((energies, *gradients))
    assert results[0][0].std(1).min() > 1e-5
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 99), st.integers(1, 5), st.floats(-1e3, 1e3), st.booleans())
def test_padding_changes_nothing(seed: int, extra: int, filling: float, per_step: bool) -> None:
    scorer, (context, mask, actions) = small_scorer(per_step), inputs(seed)
    expected = scorer.energies(scorer.encode(context, mask), actions)
    padding = torch.full((B, extra, D), filling)
    wide = torch.cat([context[:, :2], padding, context[:, 2:].masked_fill(~mask[:, 2:, None], filling)], 1)
    holes = torch.cat([mask[:, :2], torch.zeros(B, extra, dtype=torch.bool), mask[:, 2:]], 1)
    torch.testing.assert_close(scorer.energies(scorer.encode(wide, holes), actions), expected, atol=1e-5, rtol=1e-5)


def test_rows_of_encoded_contexts() -> None:
    scorer, (context, mask, actions) = small_scorer(), inputs()
    encoded = scorer.encode(context, mask, reference=actions[:, 0])
    assert isinstance(encoded, OriginalContext)
    assert len(encoded) == B
    assert encoded.centre is None
    assert encoded.reference is None
    assert scorer.centres(encoded) == ()
    assert encoded.keys.shape == encoded.values.shape == (B, 3, S, 4)
    energies = scorer.energies(encoded, actions)
    torch.testing.assert_close(scorer.energies(scorer.encode(context, mask), actions), energies, rtol=0, atol=0)
    for rows in (torch.tensor([2, 0, 2]), [1, 0], slice(1, None)):
        torch.testing.assert_close(scorer.energies(encoded.index(rows), actions[rows]), energies[rows])


def test_sine_positions() -> None:
    table = sine_positions(6, 5)  # any length, an odd width too
    for position in range(6):
        for column in range(5):
            angle = torch.tensor(position / 10000 ** (2 * (column // 2) / 5))
            expected = angle.cos() if column % 2 else angle.sin()
            torch.testing.assert_close(table[position, column], expected, rtol=0, atol=1e-6)
    assert "positions" not in small_scorer().state_dict()


def test_dropout_is_on_in_training_alone_and_on_the_action_alone() -> None:
    scorer, (context, mask, actions) = small_scorer(dropout=0.5), inputs()
    scorer.train()
    encoded = scorer.encode(context, mask)
    assert torch.equal(encoded.keys, scorer.encode(context, mask).keys)
    noisy = [scorer.energies(encoded, actions) for _ in range(2)]
    assert (noisy[0] - noisy[1]).abs().min() > 0
    seeded = []
    for score in (lambda: scorer.energies(encoded, actions), lambda: slow_energies(scorer, context, mask, actions)):
        torch.manual_seed(1)
        seeded.append(score())
    torch.testing.assert_close(*seeded)
    scorer.eval()
    quiet = [scorer.energies(encoded, actions) for _ in range(2)]
    assert torch.equal(*quiet)
    torch.testing.assert_close(quiet[0], small_scorer().energies(encoded, actions))


@pytest.mark.parametrize("per_step", [False, True])
def test_double_backward(per_step: bool) -> None:
    scorer = small_scorer(per_step, range_name="sigmoid").double()
    context, mask, actions = (part[:2] for part in inputs())
    ctx, act = context[:, :3].double().requires_grad_(), actions[:, :2, :2].double().requires_grad_()
    scorer.positions = scorer.positions[:2]

    def energies(ctx: Tensor, act: Tensor) -> Tensor:
        return scorer.energies(scorer.encode(ctx, mask[:, :3]), act)

    assert torch.autograd.gradgradcheck(energies, (ctx, act), fast_mode=True)


# Why the loss stayed flat


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.booleans())
def test_a_layer_norm_on_raw_actions_hides_their_size_and_offset(seed: int, per_step: bool) -> None:
    scorer, (context, mask, actions) = small_scorer(per_step).double(), inputs(seed)
    # Dimensions far apart, so that LayerNorm's eps does not count.
    actions = actions.double() + torch.tensor([-4.0, 0.0, 4.0])
    encoded = scorer.encode(context.double(), mask)
    energies = scorer.energies(encoded, actions)
    moved = scorer.energies(encoded, 3 * actions + 0.4)
    assert (moved - energies).abs().max() < 1e-2 * energies.std(1).min()
    bent = scorer.energies(encoded, 3 * actions + torch.tensor([4.0, 0.0, 0.0]))
    assert (bent - energies).abs().max() > 0.1 * energies.std(1).min()


@pytest.mark.parametrize("per_step", [False, True])
def test_with_one_context_token_the_energy_does_not_depend_on_the_action(per_step: bool) -> None:
    scorer, (context, _, actions) = small_scorer(per_step), inputs()
    actions.requires_grad_()

    def spread_and_slope(tokens: int) -> tuple[float, float]:
        mask = (torch.arange(S) < tokens).expand(B, -1)
        energies = scorer.energies(scorer.encode(context, mask), actions)
        (gradient,) = torch.autograd.grad(energies.sum(), actions)
        return energies.std(1).min().item(), gradient.abs().max().item()

    assert max(spread_and_slope(1)) < 1e-6
    assert min(spread_and_slope(2)) > 1e-4


def test_the_action_enters_only_as_the_query() -> None:
    """Where all values are alike, whatever the keys are, nothing of the action is left in the energy."""
    scorer, (context, mask, actions) = small_scorer(), inputs()
    encoded = scorer.encode(context, mask)
    assert scorer.energies(encoded, actions).std(1).min() > 1e-4
    alike = replace(encoded, values=encoded.values[:, :, :1].expand_as(encoded.values))
    assert scorer.energies(alike, actions).std(1).max() < 1e-6


def test_an_untrained_head_tells_actions_apart_far_less_than_contexts() -> None:
    """At wide contexts the attention starts uniform: hardly any of the action reaches the energy."""
    scorer = make_scorer(HeadConfig("original", hidden_dim=64, num_heads=8), RangeConfig("linear"), (256, A, H))
    generator = torch.Generator().manual_seed(0)
    context, actions = torch.randn(6, 100, 256, generator=generator), torch.randn(8, H, A, generator=generator)
    encoded = scorer.encode(context, torch.ones(6, 100, dtype=torch.bool))
    matrix = scorer.energies(encoded, actions.expand(6, -1, -1, -1))
    assert matrix.std(1).mean() < 0.2 * matrix.std(0).mean()
