"""Each loss against a naive loop, forward and backward; signs; rows without negatives; masks, clamp and log_q."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vla_energy import losses

TEMPERATURE, SCALE, WIDTH, CLAMP, MINIMUM = 0.7, 0.03, 0.5, 0.8, 1.0


@dataclass
class Case:
    """Energies `(B,N)` and what goes with them; `weight` and `log_q` are `(B,N)`."""

    energies: Tensor
    distances: Tensor
    valid: Tensor | None
    weight: Tensor | None
    log_q: Tensor | None
    temperature: Any = TEMPERATURE


def case(seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def uniform() -> Tensor:
        return torch.rand(5, 6, generator=generator, dtype=torch.float64)

    energies = torch.randn(5, 6, generator=generator, dtype=torch.float64).requires_grad_()
    distances, weight, log_q = uniform() * 0.2, uniform() + 0.5, uniform().log()
    valid = uniform() < 0.6
    distances[:, 0], weight[:, 0] = 0, 1
    valid[:, 0], valid[0, 1:], valid[1, 1], valid[2, 1:] = True, True, True, False
    return Case(energies, distances, valid, weight, log_q)


def bare(energies: Tensor, distances: Tensor | None = None, valid: Tensor | None = None) -> Case:
    return Case(energies, torch.zeros_like(energies.detach()) if distances is None else distances, valid, None, None)


def fast(name: str, c: Case) -> Tensor:
    if name == "info_nce":
        return losses.info_nce(c.energies, c.temperature, c.valid, c.weight)
    if name == "info_nce_log_q":
        return losses.info_nce(c.energies, c.temperature, c.valid, c.weight, log_q=c.log_q)
    if name == "info_nce_clamped":
        return losses.info_nce(c.energies, c.temperature, c.valid, c.weight, log_q=c.log_q, logit_clamp=CLAMP)
    if name == "listwise":
        return losses.listwise(c.energies, c.distances, c.temperature, SCALE, c.valid, c.weight)
    if name == "distance_regression":
        return losses.distance_regression(c.energies, c.distances, c.temperature, SCALE, c.valid, c.weight)
    if name == "diversity":
        return losses.diversity(c.energies, MINIMUM, c.valid)
    return {"margin": losses.margin, "hinge": losses.hinge}[name](c.energies, WIDTH, c.valid, c.weight)


def row_info_nce(e, d, w, q, clamp: float = math.inf):
    terms = [w[j] * torch.exp(torch.clamp(-e[j] / TEMPERATURE, -clamp, clamp) - q[j]) for j in range(len(e))]
    return -torch.log(terms[0] / sum(terms))


def row_listwise(e, d, w, q):
    target = [w[j] * torch.exp(-d[j] / SCALE) for j in range(len(e))]
    model = [w[j] * torch.exp(-e[j] / TEMPERATURE) for j in range(len(e))]
    pairs = [(t / sum(target), m / sum(model)) for t, m in zip(target, model, strict=True)]
    return sum(t * (t / m).log() for t, m in pairs)


def row_distance_regression(e, d, w, q):
    total = 0.0
    for i in range(len(e)):
        for j in range(len(e)):
            total = total + w[i] * w[j] * ((e[i] - e[j]) / TEMPERATURE - (d[i] - d[j]) / SCALE) ** 2
    return total / sum(w) ** 2


def row_margin(e, d, w, q):
    return sum(w[j] * torch.clamp(e[0] - e[j] + WIDTH, min=0) for j in range(1, len(e))) / sum(w[1:])


def row_hinge(e, d, w, q):
    return max(w[j] * torch.clamp(e[0] - e[j] + WIDTH, min=0) for j in range(1, len(e))) / max(w[1:])


def row_diversity(e, d, w, q):
    mean = sum(e) / len(e)
    return torch.clamp(MINIMUM - torch.stack([(x - mean) ** 2 for x in e]).mean().sqrt(), min=0)


ROWS = {
    "info_nce": lambda e, d, w, q: row_info_nce(e, d, w, [0.0] * len(e)),
    "info_nce_log_q": row_info_nce,
    "info_nce_clamped": lambda e, d, w, q: row_info_nce(e, d, w, q, CLAMP),
    "listwise": row_listwise,
    "distance_regression": row_distance_regression,
    "margin": row_margin,
    "hinge": row_hinge,
    "diversity": row_diversity,
}
RANKING = [name for name in ROWS if name != "diversity"]


def naive(name: str, c: Case) -> Tensor:
    assert c.valid is not None and c.weight is not None and c.log_q is not None
    rows = []
    for i in range(len(c.energies)):
        columns = [0] + [j for j in range(1, c.energies.shape[1]) if c.valid[i, j]]
        if len(columns) > 1:
            parts = ([values[i, j] for j in columns] for values in (c.energies, c.distances, c.weight, c.log_q))
            rows.append(ROWS[name](*parts))
    return torch.stack(rows).mean()


def value_and_gradient(name: str, c: Case) -> tuple[Tensor, Tensor]:
    energies = c.energies.detach().clone().requires_grad_()
    loss = fast(name, replace(c, energies=energies))
    return loss.detach(), torch.autograd.grad(loss, energies)[0]


def cast(c: Case, dtype: torch.dtype) -> Case:
    parts = {name: getattr(c, name).to(dtype) for name in ("energies", "distances", "weight", "log_q")}
    return replace(c, **parts)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", range(3))
def test_equals_its_naive_twin(name: str, dtype: torch.dtype, seed: int) -> None:
    c = case(seed)
    slow = naive(name, c)
    (expected,) = torch.autograd.grad(slow, c.energies)
    assert slow > 0 and expected.abs().sum() > 0
    loss, gradient = value_and_gradient(name, cast(c, dtype))
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(loss.double(), slow.detach(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(gradient.double(), expected, atol=tolerance, rtol=tolerance)
    assert c.valid is not None and (gradient[~c.valid] == 0).all() and (gradient[2] == 0).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(-50, 50), st.permutations(range(1, 6)))
def test_an_offset_and_the_order_of_negatives_change_nothing(seed: int, offset: float, order: list[int]) -> None:
    c, columns = case(seed), [0, *order]
    for name in ROWS:
        loss, gradient = value_and_gradient(name, c)
        parts = {key: getattr(c, key)[:, columns] for key in ("energies", "distances", "valid", "weight", "log_q")}
        permuted, permuted_gradient = value_and_gradient(name, replace(c, **parts))
        torch.testing.assert_close(permuted, loss, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(permuted_gradient, gradient[:, columns], atol=1e-12, rtol=1e-12)
        if name != "info_nce_clamped":  # the clamp alone sees absolute energies
            per_row = offset * torch.arange(1, 6, dtype=torch.float64)[:, None] / 5
            moved, moved_gradient = value_and_gradient(name, replace(c, energies=c.energies + per_row))
            torch.testing.assert_close(moved, loss, atol=1e-9, rtol=1e-9)
            torch.testing.assert_close(moved_gradient, gradient, atol=1e-9, rtol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([math.inf, -math.inf, math.nan, 1e30, 0.0]), st.integers(1, 3))
def test_padding_by_invalid_columns_changes_nothing(seed: int, poison: float, count: int) -> None:
    c = case(seed)
    assert c.valid is not None
    held = c.energies.detach().masked_fill(~c.valid, poison)
    held[2] = poison  # the row without a negative, its expert included
    pads = {"energies": poison, "distances": poison, "valid": False, "weight": math.nan, "log_q": poison}
    parts = {key: getattr(replace(c, energies=held), key) for key in pads}
    padded = {key: torch.nn.functional.pad(parts[key], (0, count), value=value) for key, value in pads.items()}
    for name in ROWS:
        wanted = torch.tensor(TEMPERATURE, dtype=torch.float64, requires_grad=True)
        temperature = torch.tensor(TEMPERATURE, dtype=torch.float64, requires_grad=True)
        energies = padded["energies"].clone().requires_grad_()
        plain = fast(name, replace(c, temperature=wanted))
        loss = fast(name, replace(c, **{**padded, "energies": energies}, temperature=temperature))
        torch.testing.assert_close(loss, plain, atol=1e-12, rtol=1e-12)
        before = torch.autograd.grad(plain, (c.energies, wanted), allow_unused=True, materialize_grads=True)
        after = torch.autograd.grad(loss, (energies, temperature), allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(after[0][:, :-count], before[0], atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(after[1], before[1], atol=1e-12, rtol=1e-12)
        assert (after[0][:, -count:] == 0).all()


@pytest.mark.parametrize("name", RANKING)
def test_weight_0_is_not_valid_and_a_weight_a_column_is_one_for_all_rows(name: str) -> None:
    c = case()
    assert c.valid is not None and c.weight is not None
    loss, gradient = value_and_gradient(name, c)
    zeroed = replace(c, valid=None, weight=torch.where(c.valid, c.weight, torch.zeros_like(c.weight)))
    torch.testing.assert_close(value_and_gradient(name, zeroed), (loss, gradient))
    shared = value_and_gradient(name, replace(c, weight=c.weight[1]))
    torch.testing.assert_close(shared, value_and_gradient(name, replace(c, weight=c.weight[1].expand(5, -1))))


@pytest.mark.parametrize("name", RANKING)
def test_one_step_lowers_the_expert_against_its_negatives(name: str) -> None:
    distances = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4]).expand(3, -1)
    flat = Case(torch.zeros(3, 5), distances, None, None, torch.zeros(3, 5))
    stepped = flat.energies - 0.1 * value_and_gradient(name, flat)[1]
    assert (stepped[:, :1] < stepped[:, 1:]).all()
    if name not in ("listwise", "distance_regression"):  # these may also ask for less of a gap
        energies = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) * 0.3
        move = -value_and_gradient(name, replace(flat, energies=energies))[1]
        assert (move[:, 0] < 0).all() and (move[:, 1:] >= 0).all()


def test_the_reports_margin_trains_backwards() -> None:
    energies = torch.zeros(3, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(torch.relu(energies[:, 1:] - energies[:, :1] + WIDTH).mean(), energies)
    stepped = energies - 0.1 * gradient
    assert (stepped[:, :1] > stepped[:, 1:]).all()


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 1), (2, 4)])
def test_no_negatives_is_zero_and_counted(name: str, rows: int, columns: int) -> None:
    energies = torch.randn(rows, columns)
    valid = torch.zeros(rows, columns, dtype=torch.bool)
    valid[:, 0] = True
    for mask in (valid, None) if columns == 1 else (valid,):
        c = replace(bare(energies, energies.abs(), mask), log_q=torch.zeros(rows, columns))
        loss, gradient = value_and_gradient(name, c)
        assert loss == 0 and (gradient == 0).all()
        assert losses.count_no_negatives(energies, mask) == rows
        assert losses.chance(energies, mask) == 0


@pytest.mark.parametrize("name", ROWS)
def test_extreme_energies_stay_finite(name: str) -> None:
    rows = [[1e30, -1e30, 0.0, 5.0], [-1e30, 1e30, 1e30, 0.0], [1e30, 1e30, 1e30, 1e30]]
    for valid in (None, torch.tensor([[True, True, True, False]]).expand(3, -1)):
        c = replace(bare(torch.tensor(rows), valid=valid), log_q=torch.zeros(3, 4), temperature=0.05)
        loss, gradient = value_and_gradient(name, c)
        assert gradient.isfinite().all()
        assert loss.isfinite() or (name == "distance_regression" and loss == math.inf)


def test_a_mask_lies_below_every_used_logit() -> None:
    energies, valid = torch.tensor([[1e30, 1e30, 0.0]]), torch.tensor([[True, True, False]])
    assert losses.info_nce(energies, 0.05, valid).item() == pytest.approx(math.log(2))


def test_known_values() -> None:
    assert losses.info_nce(torch.zeros(5, 8), 0.5).item() == pytest.approx(math.log(8))
    distances = torch.rand(5, 8)
    for loss in (losses.listwise, losses.distance_regression):
        assert loss(2 * distances / SCALE + 3, distances, 2.0, SCALE).item() == pytest.approx(0, abs=1e-5)
    assert losses.distance_regression(torch.tensor([[0.0, 3.0]]), torch.zeros(1, 2), 1.0, 1.0) == 4.5
    assert losses.hinge(torch.tensor([[1.0, 0.8, 4.0, -2.0]]), 0.5, None) == 3.5
    assert losses.anchor(torch.tensor([[3.0, 9.0]]), torch.tensor([[True, False]])) == 9
    assert losses.anchor(torch.full((2, 2), -3.0)) == 9


def test_chance_is_info_nce_of_equal_energies() -> None:
    c = case()
    assert c.valid is not None and c.weight is not None
    sums = [1 + sum(c.weight[i, j] for j in range(1, 6) if c.valid[i, j]) for i in (0, 1, 3, 4)]
    expected = sum(math.log(total) for total in sums) / 4
    assert losses.chance(c.energies * math.nan, c.valid, c.weight).item() == pytest.approx(expected)
    flat = losses.info_nce(c.energies * 0 + 7, 0.3, c.valid, c.weight, c.log_q)
    torch.testing.assert_close(losses.chance(c.energies, c.valid, c.weight, c.log_q), flat.detach())
    assert losses.chance(torch.zeros(2, 8)).item() == pytest.approx(math.log(8))


def test_the_clamp_kills_the_gradient_where_it_acts_and_is_counted() -> None:
    wrong = bare(torch.tensor([[90.0, 0.0, -90.0]]))  # the expert is far too high
    free = value_and_gradient("info_nce", wrong)[1]
    clamped = wrong.energies.clone().requires_grad_()
    (dead,) = torch.autograd.grad(losses.info_nce(clamped, 1.0, logit_clamp=50.0), clamped)
    assert free[0, 0] > 0.5 and dead[0, 0] == 0
    assert losses.clamp_count(wrong.energies, 1.0, 50.0) == 2
    assert losses.clamp_count(wrong.energies, 0.5, 180.0) == 0  # at the bound is not beyond it
    assert losses.clamp_count(wrong.energies, 1.0, 50.0, torch.tensor([[True, True, False]])) == 1


def test_a_duplicated_negative_adds_ln_2_and_log_q_takes_it_away() -> None:
    expert, common, rare = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0)).unbind()
    energies = torch.tensor([[0.3, -0.4, 0.9]], dtype=torch.float64)
    doubled = energies[:, [0, 1, 1, 2]]
    log_q = losses.log_frequency(torch.stack([expert, common, common, rare]), 1e-3).double()[None]
    torch.testing.assert_close(log_q.exp() * 4, torch.tensor([[1.0, 2, 2, 1]], dtype=torch.float64))
    single = losses.info_nce(energies, TEMPERATURE)
    assert losses.info_nce(doubled, TEMPERATURE) > single + 0.1
    torch.testing.assert_close(losses.info_nce(doubled, TEMPERATURE, log_q=log_q), single)
    # Where the duplicate decides the loss, all of ln 2.
    low = torch.tensor([[0.0, -40.0, -40.0]], dtype=torch.float64)
    added = losses.info_nce(low, 1.0) - losses.info_nce(low[:, :2], 1.0)
    assert added.item() == pytest.approx(math.log(2))


def test_a_duplicate_of_the_expert_itself_is_for_the_mask_not_for_log_q() -> None:
    energies = torch.tensor([[-60.0, -60.0, 0.0]])
    log_q = torch.tensor([[2 / 3, 2 / 3, 1 / 3]]).log()
    for corrected in (None, log_q):
        assert losses.info_nce(energies, 1.0, log_q=corrected).item() == pytest.approx(math.log(2))
    assert losses.info_nce(energies, 1.0, torch.tensor([[True, False, True]])) < 1e-6


def test_log_frequency_equals_its_naive_twin() -> None:
    chunks = torch.randn(7, 4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    plain = chunks.detach()
    kernel = [[math.exp(-float((a - b).abs().mean()) / 0.3) for b in plain] for a in plain]
    expected = torch.tensor([math.log(sum(row) / 7) for row in kernel])
    found = losses.log_frequency(chunks, 0.3)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad
    assert losses.log_frequency(chunks[:1], 0.3) == 0
    far = losses.log_frequency(chunks.detach().half() * 1e3, 1e-6)
    torch.testing.assert_close(far, torch.full((7,), -math.log(7)))


@pytest.mark.filterwarnings("ignore:std")
def test_diversity_is_per_row_and_safe_at_zero_spread() -> None:
    offsets = torch.tensor([[0.0], [5.0]]).expand(2, 4).contiguous()
    assert torch.relu(MINIMUM - offsets.std()) == 0  # the report's term is content with an offset per context
    loss, gradient = value_and_gradient("diversity", bare(offsets))
    assert loss == MINIMUM and (gradient == 0).all()
    assert torch.zeros(1, 1).std().isnan()  # the report's F2
    assert value_and_gradient("diversity", bare(torch.zeros(1, 1))) == (0, 0)
    start = torch.tensor([[0.0, 0.01, -0.02]])
    spread = start - 0.1 * value_and_gradient("diversity", bare(start))[1]
    assert spread.std() > start.std()


def test_mixed_alpha_rises_to_1() -> None:
    assert [losses.mixed_alpha(step, 4) for step in (0, 1, 4, 9)] == [0, 0.25, 1, 1]
    assert losses.mixed_alpha(0, 0) == 1


def test_bad_input_is_named() -> None:
    energies, short = torch.zeros(2, 3), torch.zeros(3)
    with pytest.raises(ValueError, match="log_q"):
        losses.info_nce(energies, 1.0, log_q=short)
    with pytest.raises(ValueError, match="logit_clamp=-1"):
        losses.info_nce(energies, 1.0, logit_clamp=-1.0)
    for loss in (losses.listwise, losses.distance_regression):
        with pytest.raises(ValueError, match="distances"):
            loss(energies, short, 1.0, 1.0)
    for chunks, width in ((torch.zeros(2, 3), 1.0), (torch.zeros(0, 2, 2), 1.0), (torch.zeros(2, 2, 2), 0.0)):
        with pytest.raises(ValueError, match="width"):
            losses.log_frequency(chunks, width)
    with pytest.raises(ValueError, match="mix_steps=-1"):
        losses.mixed_alpha(0, -1)
