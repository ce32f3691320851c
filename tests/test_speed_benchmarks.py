"""What the benchmarks of speed rest on: twins that compute the same, and limits that count every product."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from loss import Shape, copied_step, inputs, make_head, make_naive, naive_step, step
from timing import medians, products_of

from vla_energy.head import EnergyHead

TINY = Shape(tokens=6, width=24, hidden=16, horizon=4, dims=3)


def gradients(head: EnergyHead) -> dict[str, torch.Tensor]:
    """Of every weight; all have one."""
    return {name: p.grad.clone() for name, p in head.named_parameters() if p.grad is not None}


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 5), st.sampled_from([1, 2, 4]), st.sampled_from([TINY, Shape(40, 64, 16, 4, 3)]))
def test_one_context_a_row_gives_the_gradients_of_a_copy_for_every_pair(batch: int, heads: int, shape: Shape) -> None:
    head, found = make_head(shape, heads), []
    for run in (step, copied_step):
        run(head, *inputs(shape, batch))
        found.append(gradients(head))
    assert set(found[0]) == {name for name, _ in head.named_parameters()}
    for name, expected in found[1].items():
        assert (found[0][name] - expected).norm() <= 1e-4 * expected.norm() + 1e-7, name


def test_the_naive_loss_is_the_original_heads_own() -> None:
    scorer, (context, mask, actions) = make_naive(TINY).eval(), inputs(TINY, 3)
    naive_step(scorer, context, mask, actions)
    found = {name: p.grad for name, p in scorer.named_parameters() if p.grad is not None}
    scorer.zero_grad()
    energies = scorer.energies(scorer.encode(context, mask), actions)
    (-torch.log_softmax(-energies / 0.5, 1)[:, 0]).mean().backward()
    for name, parameter in scorer.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("grad", [False, True])
def test_products_are_counted_with_those_of_the_backward(grad: bool) -> None:
    left, right, bias = torch.randn(3, 5), torch.randn(5, 7, requires_grad=grad), torch.randn(7)
    batched = torch.randn(4, 7, 2)

    def run() -> None:
        result = torch.addmm(bias, left, right).expand(4, -1, -1) @ batched
        if grad:
            result.sum().backward()

    replay, flops = products_of(run)
    once = 2 * 3 * 5 * 7 + 4 * 2 * 3 * 7 * 2
    # `right` has a gradient, the other two have none: the result's product has one more, as has the first.
    assert flops == once + (2 * 3 * 5 * 7 + 4 * 2 * 3 * 7 * 2 if grad else 0)
    replay()


def test_medians_take_turns_and_leave_the_first_round_out() -> None:
    calls: list[str] = []
    found = medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, {"b": 2})
    assert calls == ["a", "b", "b"] * 3
    assert all(seconds["cpu"] >= 0 and seconds["wall"] >= 0 for seconds in found.values())
