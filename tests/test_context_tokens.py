"""Reading context tokens: queries that carry the weights, blocks of rows, bfloat16; slow twins and stored numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_head import A, B, D, H, inputs, make_head
from torch import Tensor, nn

from vla_energy import context_tokens, residual
from vla_energy.attention import Memory, attend
from vla_energy.config import EnergyConfig, HeadConfig
from vla_energy.context_tokens import inverse_std, is_harmless, read_tokens, reads_cheaper
from vla_energy.head import EnergyHead
from vla_energy.row_blocks import block_rows, in_row_blocks

GOLDEN = Path(__file__).parent / "golden" / "head_residual.pt"
MODES = {"cheapest": None, "raw tokens": True, "features": False}
HIDDEN, HEADS = 8, 2


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way to read a context, whatever its cost."""
    if MODES[request.param] is not None:
        monkeypatch.setattr(residual, "reads_cheaper", lambda *_: MODES[request.param])
    return request.param


def parts(seed: int, offset: float = 0.0) -> tuple[nn.LayerNorm, nn.Linear, Memory, Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    norm, linear, memory = nn.LayerNorm(D), nn.Linear(D, HIDDEN), Memory(HIDDEN, HEADS)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1.0, 0.5)
    bias = torch.zeros(B, 1, 1, 6)
    bias[1, ..., 4:] = -1e30
    context = (torch.randn(B, 6, D) + offset).requires_grad_()
    return norm, linear, memory, context, bias, torch.randn(B, HEADS, 3, HIDDEN // HEADS, requires_grad=True)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.booleans(), st.sampled_from([0.0, 0.5, 30.0]))
def test_reading_tokens_equals_norm_projection_keys_and_values(seed: int, projected: bool, offset: float) -> None:
    norm, linear, memory, context, bias, queries = parts(seed, offset)
    keys, values = memory(linear(norm(context)))
    slow = attend(queries, keys, values, bias)
    tokens = read_tokens(context, bias, norm, linear, torch.float32)
    fast = memory.read(tokens.project() if projected else tokens, queries)
    leaves = [context, queries, *norm.parameters(), *linear.parameters(), memory.key_value.weight]
    gradients = [torch.autograd.grad(found.square().sum(), leaves, create_graph=True) for found in (slow, fast)]
    torch.testing.assert_close(fast, slow, atol=1e-5 * (1 + offset), rtol=1e-4)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(
            other, one, atol=1e-4 * (1 + offset) * float(1 + one.detach().abs().max()), rtol=1e-3
        )
    # And once more through the gradients.
    second = [torch.autograd.grad(found[1].square().sum(), queries)[0] for found in gradients]
    torch.testing.assert_close(second[1], second[0], atol=1e-3 * float(1 + second[0].abs().max()), rtol=1e-3)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.sampled_from([0.0, 1.0, 1e3]), st.sampled_from([1e-3, 1.0, 1e6]))
def test_the_inverse_std_is_a_layer_norms(seed: int, offset: float, scale: float) -> None:
    context = scale * (torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(seed)) + offset)
    expected = (context.double().var(-1, correction=0) + 1e-5).rsqrt().float()
    torch.testing.assert_close(inverse_std(context, 1e-5), expected, rtol=2e-4 if offset > 1 else 1e-5, atol=0)
    assert inverse_std(torch.zeros(1, 1, 4), 1e-5).isfinite().all()


def test_stored_numbers_of_the_head_before_it_read_tokens_this_way(mode: str) -> None:
    golden = torch.load(GOLDEN, weights_only=True)
    head = make_head(seed=1)
    head.load_state_dict(golden["state"])
    context = (golden["context"], golden["mask"], golden["reference"])
    energies, (centre, blind) = head(context, golden["actions"], training_output=True)[:2]
    torch.testing.assert_close(energies, golden["energies"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head(head.encode(*context), golden["actions"]), golden["energies"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(centre, golden["centre"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(blind, golden["blind"], rtol=1e-5, atol=1e-5)
    (energies.square().mean() + centre.square().mean() + blind.square().mean()).backward()
    for name, parameter in head.named_parameters():
        expected = golden["gradients"][name]
        assert parameter.grad is not None, name  # DDP waits for each
        assert (parameter.grad - expected).norm() <= 1e-5 * expected.norm(), name


def test_double_backward_through_one_call_equals_that_through_keys_and_values(mode: str) -> None:
    head, (context, mask, actions) = make_head(), inputs()

    def curvature(contexts: Any) -> tuple[Tensor, ...]:
        leaf = actions.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(head(contexts, leaf).sum(), leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [leaf, head.scorer.context_in.weight])

    for found, expected in zip(curvature((context, mask)), curvature(head.encode(context, mask)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("layers", [1, 2])
def test_blocks_of_rows_change_neither_energies_nor_gradients(layers: int, mode: str) -> None:
    context, mask, actions = inputs()
    found = []
    for block_mib in (0, 1):
        torch.manual_seed(0)
        config = EnergyConfig(head=HeadConfig(hidden_dim=16, num_layers=layers, block_mib=block_mib))
        head = EnergyHead(D, A, H, config)
        head.scorer.row_bytes = lambda *_: 2**20  # a block holds one row
        leaf, executed = actions.clone().requires_grad_(), actions[:2, 1]
        joined = torch.cat([context, context[:2]]), torch.cat([mask, mask[:2]])
        output = head(joined, leaf, training_output=True, executed=executed)
        total = output.energies.square().sum() + output.executed.sum() + sum(c.square().sum() for c in output.centres)
        first = torch.autograd.grad(total, [leaf, *head.scorer.parameters()], create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), [leaf, head.scorer.action_in.weight])
        with torch.no_grad():
            plain = head((context, mask), actions)
        found.append([output.energies, output.executed, *output.centres, *first, *second, plain])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4 * float(1 + one.detach().abs().max()))


def test_blocks_keep_their_inputs_alone_and_draw_dropout_again_as_it_was() -> None:
    calls, x = [], torch.ones(4, 3, requires_grad=True)

    def double(rows: Tensor, _: None) -> tuple[Tensor, ...]:
        calls.append(len(rows))
        return (nn.functional.dropout(rows * 2, 0.5),)

    (found,) = in_row_blocks(double, 3, x, None)
    assert calls == [3, 1]
    found.sum().backward()
    assert sorted(calls) == [1, 1, 3, 3]
    assert x.grad is not None
    assert torch.equal(x.grad, found.detach())


@given(st.integers(1, 200), st.integers(1, 10**9), st.integers(0, 10**10))
def test_blocks_are_alike_and_within_the_limit(rows: int, row_bytes: int, limit: int) -> None:
    size = block_rows(rows, row_bytes, limit)
    assert 1 <= size <= rows
    assert limit == 0 or size == 1 or size * row_bytes <= limit
    assert limit or size == rows


def test_harmless_padding_is_not_copied() -> None:
    head, (context, mask, _) = make_head(), inputs()
    assert head._visible(context, mask)[0].data_ptr() == context.data_ptr()
    for harm in (float("nan"), float("inf"), 1e30):
        spoilt = context.masked_fill(~mask[..., None], harm)
        assert not is_harmless(spoilt, mask)
        assert torch.equal(head._visible(spoilt, mask)[0], context.masked_fill(~mask[..., None], 0.0))


def test_few_queries_read_raw_tokens_and_many_do_not() -> None:
    assert reads_cheaper(32, 600, 4096, 512)
    assert not reads_cheaper(600, 600, 4096, 512)
    head, (context, mask, _) = make_head(), inputs()
    assert head.scorer.encode(context, mask).tokens is None
    assert head.scorer.encode(context, mask, candidates=100).tokens is None
    assert head.scorer.encode(context, mask, candidates=1).tokens is not None


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in bfloat16 on any machine."""
    monkeypatch.setattr(context_tokens, "multiplies_bfloat16", lambda _: True)


def test_bfloat16_stays_float32_on_a_cpu_without_it_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    norm, linear, _, context, bias, _ = parts(0)
    for supported, expected in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda found=supported: found)
        context_tokens.multiplies_bfloat16.cache_clear()
        for _ in range(2):
            assert read_tokens(context, bias, norm, linear, torch.bfloat16).source.dtype == expected
    context_tokens.multiplies_bfloat16.cache_clear()
    assert [record.message for record in caplog.records if "head.context_dtype" in record.message] == [
        "head.context_dtype=bfloat16: this CPU has no products in bfloat16, they are made in float32"
    ]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 99), st.booleans())
def test_bfloat16_contexts_move_energies_by_little(bfloat16: None, seed: int, at_once: bool) -> None:
    context, mask, actions = inputs(seed)
    found = []
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(seed)
        head = EnergyHead(D, A, H, EnergyConfig(head=HeadConfig(hidden_dim=16, context_dtype=dtype)))
        nn.init.normal_(head.scorer.factor.weight, std=0.2)
        contexts = (context, mask, actions[:, 0])
        found.append(head(contexts if at_once else head.encode(*contexts), actions))
        assert found[-1].dtype == torch.float32
    assert not torch.equal(*found)
    # 8 bits of mantissa; the factor's exponent of up to 1.5 passes such an error on a few times larger.
    assert ((found[1] - found[0]).abs() <= 0.05 * found[0].abs() + 1e-4).all()


def test_bfloat16_contexts_give_fp32_gradients_to_every_weight(mode: str, bfloat16: None) -> None:
    context, mask, actions = inputs()
    head = EnergyHead(D, A, H, EnergyConfig(head=HeadConfig(hidden_dim=16, context_dtype="bfloat16")))
    output = head((context.bfloat16(), mask, actions[:, 0]), actions, training_output=True)
    (output.energies.sum() + sum(centre.sum() for centre in output.centres)).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in head.parameters())
