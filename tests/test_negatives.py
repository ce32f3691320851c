"""Samplers of negatives: which chunks they give, and what they do when they have nothing to give."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_energy import negatives

H, A = 4, 3
PROPERTY = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 99)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def steps(rows: int, horizon: int) -> torch.Tensor:
    """Chunks `(rows,horizon,A)` whose values name row and step: `100 row + step`, in every dimension."""
    named = 100.0 * torch.arange(rows)[:, None] + torch.arange(horizon)
    return named[..., None].expand(-1, -1, A).contiguous()


SAMPLERS: dict[str, Callable[[torch.Tensor, torch.Generator], torch.Tensor]] = {
    "layer_exits": lambda x, g: negatives.layer_exits(x[:, None].expand(-1, 5, -1, -1), 2),
    "gaussian": lambda x, g: negatives.gaussian(x, (0.1, 0.2), 2, g),
    "gaussian, smooth": lambda x, g: negatives.gaussian(x, (0.1, 0.2), 2, g, torch.ones(A), 0.9),
    "shuffle": lambda x, g: negatives.shuffle(x, 2, g),
    "shift": lambda x, g: negatives.shift(x, 2, 3, g),
    "amplitude": lambda x, g: negatives.amplitude(x, (0.5, 1.5), (2,)),
    "gripper_flip": lambda x, g: negatives.gripper_flip(x, torch.zeros(A), torch.ones(A), (2,)),
    "in_batch": lambda x, g: negatives.in_batch(x, 2, g),
    "hard": lambda x, g: negatives.hard(
        x.mean(2), x[:, :, None].expand(-1, -1, H, -1), torch.ones(x.shape[:2], dtype=torch.bool), 2
    )[0],
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_repeat_by_seed_in_float32_and_without_gradient(name: str) -> None:
    expert = torch.randn(6, H, A, generator=generator(1)).bfloat16().requires_grad_()
    before = expert.detach().clone()
    drawn, again = (SAMPLERS[name](expert, generator(3)) for _ in range(2))
    assert drawn.shape == (6, drawn.shape[1], H, A) and drawn.shape[1] > 0
    assert drawn.dtype == torch.float32 and not drawn.requires_grad
    assert torch.equal(drawn, again) and torch.equal(expert, before)


@pytest.mark.parametrize("name", ["gaussian", "gaussian, smooth", "shuffle", "shift", "in_batch"])
def test_another_seed_draws_other_chunks(name: str) -> None:
    expert = torch.randn(6, H, A, generator=generator(1))
    assert not torch.equal(SAMPLERS[name](expert, generator(3)), SAMPLERS[name](expert, generator(4)))


@pytest.mark.parametrize("name", ["layer_exits", "amplitude", "gripper_flip", "hard"])
@PROPERTY
@given(st.permutations(range(5)))
def test_samplers_without_draws_follow_their_rows(name: str, order: list[int]) -> None:
    expert = torch.randn(5, H, A, generator=generator(1))
    drawn = SAMPLERS[name](expert, generator())
    assert torch.equal(SAMPLERS[name](expert[order], generator()), drawn[order])


@pytest.mark.parametrize(
    ("layers", "count", "picked"), [(6, 4, [1, 2, 3, 4]), (6, 2, [2, 4]), (5, 9, [1, 2, 3]), (2, 3, []), (1, 3, [])]
)
def test_layer_exits_leave_out_first_and_last(layers: int, count: int, picked: list[int]) -> None:
    layer_actions = torch.arange(layers).float()[None, :, None, None].expand(2, -1, H, A)
    assert negatives.layer_exits(layer_actions, count)[0, :, 0, 0].tolist() == picked
    assert negatives.exit_layers(layers, count) == tuple(picked)


def test_named_layers_replace_the_spread() -> None:
    layer_actions = torch.arange(6).float()[None, :, None, None].expand(2, -1, H, A)
    assert negatives.layer_exits(layer_actions, 1, (4, 1))[1, :, 0, 0].tolist() == [4, 1]
    assert negatives.exit_layers(6, 1, (4, 1)) == (4, 1)


@pytest.mark.parametrize(
    ("num_layers", "layers", "message"),
    [
        (6, (1, 5), r"layer 5 .*1 to L - 2 = 4"),
        (6, (0,), r"layer 0 .*1 to L - 2 = 4"),
        (6, (-1,), r"layer -1 .*1 to L - 2 = 4"),
        (2, (1,), r"layer 1 .*L=2 has no inner layer"),
        (6, (2, 2), r"\(2, 2\).*once"),
    ],
)
def test_layers_that_are_not_inner_are_refused(num_layers: int, layers: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        negatives.layer_exits(torch.zeros(2, num_layers, H, A), 1, layers)


def test_gaussian_has_the_stds_in_order_and_repeats_by_seed() -> None:
    centre = torch.ones(50, 8, 7)
    drawn = negatives.gaussian(centre, (0.1, 0.5), 3, generator())
    assert drawn.shape == (50, 6, 8, 7)
    stds = (drawn - 1).std((0, 2, 3))
    torch.testing.assert_close(stds, torch.tensor([0.1] * 3 + [0.5] * 3), rtol=0.1, atol=0)
    assert torch.equal(drawn, negatives.gaussian(centre, (0.1, 0.5), 3, generator()))


def test_scale_multiplies_the_same_noise_per_dimension() -> None:
    scale = torch.tensor([0.0, 1.0, 3.0])
    for correlation in (0.0, 0.7):
        plain = negatives.gaussian(torch.zeros(5, H, A), (0.1, 0.5), 2, generator(), None, correlation)
        scaled = negatives.gaussian(torch.zeros(5, H, A), (0.1, 0.5), 2, generator(), scale, correlation)
        torch.testing.assert_close(scaled, plain * scale)
    with pytest.raises(ValueError, match=r"scale \(4,\)"):
        negatives.gaussian(torch.zeros(5, H, A), (0.1,), 2, generator(), torch.ones(4))


def test_correlation_is_over_time_and_keeps_the_std() -> None:
    noise = negatives.gaussian(torch.zeros(4000, H, 2), (0.5,), 3, generator(), correlation=0.8) / 0.5
    torch.testing.assert_close(noise.std((0, 1)), torch.ones(H, 2), rtol=0, atol=0.03)
    assert (noise[:, :, 1:] * noise[:, :, :-1]).mean() == pytest.approx(0.8, abs=0.03)
    assert (noise[:, 1:] * noise[:, :-1]).mean() == pytest.approx(0, abs=0.03)  # copies are independent
    with pytest.raises(ValueError, match="correlation"):
        negatives.gaussian(torch.zeros(1, H, A), (0.5,), 1, generator(), correlation=1.5)


@PROPERTY
@given(st.integers(1, 5), st.integers(0, 4), st.integers(2, 9), seeds)
def test_shuffle_is_a_derangement_of_the_rows_own_steps(rows: int, count: int, horizon: int, seed: int) -> None:
    expert = steps(rows, horizon)
    drawn = negatives.shuffle(expert, count, generator(seed))
    assert drawn.shape == (rows, count, horizon, A)
    assert torch.equal(drawn.sort(2).values, expert[:, None].expand_as(drawn))
    assert (drawn != expert[:, None]).all()
    order = torch.rand((rows, count, horizon), generator=generator(seed)).argsort(-1).tolist()
    for row, copies in enumerate(order):
        for copy, cycle in enumerate(copies):
            for here, there in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
                assert torch.equal(drawn[row, copy, here], expert[row, there])


def test_shuffle_draws_every_cycle_about_equally_often_over_rows_and_copies() -> None:
    drawn = negatives.shuffle(steps(1, 4).expand(300, -1, -1), 20, generator())[..., 0]
    seen = Counter(tuple(order) for order in drawn.flatten(0, 1).tolist())
    assert len(seen) == math.factorial(3)
    assert all(count == pytest.approx(1000, abs=150) for count in seen.values())
    longer = negatives.shuffle(steps(1, 12).expand(30, -1, -1), 2, generator())[..., 0]
    assert len({tuple(order) for order in longer.flatten(0, 1).tolist()}) == 60


def test_a_chunk_that_holds_still_shuffles_and_shifts_to_itself_and_is_masked() -> None:
    expert = torch.full((3, H, A), 0.4)
    expert[2] = steps(1, H)[0]
    for drawn in (negatives.shuffle(expert, 2, generator()), negatives.shift(expert, 2, 3, generator())):
        expected = [[True, True], [True, True], [False, False]]
        assert negatives.near_positive_mask(drawn, expert, 0.02).tolist() == expected


@PROPERTY
@given(st.integers(1, 5), st.integers(0, 4), st.integers(2, 7), st.integers(1, 9), seeds)
def test_shift_is_by_a_few_steps_but_never_none(rows: int, count: int, horizon: int, most: int, seed: int) -> None:
    expert = steps(rows, horizon)
    drawn = negatives.shift(expert, count, most, generator(seed))
    assert drawn.shape == (rows, count, horizon, A)
    most = min(most, horizon - 1)
    draws = torch.randint(2 * most, (rows, count), generator=generator(seed)).tolist()
    allowed = [k for k in range(-most, most + 1) if k]
    for row in range(rows):
        for copy in range(count):
            k = allowed[draws[row][copy]]
            slow = torch.stack([expert[row, min(max(t + k, 0), horizon - 1)] for t in range(horizon)])
            assert torch.equal(drawn[row, copy], slow)


def test_shift_draws_every_number_of_steps() -> None:
    drawn = negatives.shift(steps(1, 8).expand(300, -1, -1), 4, 2, generator())[..., 0]
    seen = Counter(int(chunk[4]) - 4 for chunk in drawn.flatten(0, 1))
    assert sorted(seen) == [-2, -1, 1, 2]
    assert all(count == pytest.approx(300, abs=80) for count in seen.values())
    with pytest.raises(ValueError, match="max_steps=0"):
        negatives.shift(steps(1, 8), 1, 0, generator())


def test_one_step_has_no_other_order_and_no_shift() -> None:
    source = generator()
    state = source.get_state()
    for drawn in (negatives.shuffle(steps(2, 1), 3, source), negatives.shift(steps(2, 1), 3, 2, source)):
        assert drawn.shape == (2, 0, 1, A)
    assert torch.equal(source.get_state(), state)


def test_amplitude_scales_all_but_the_gripper() -> None:
    expert = torch.randn(2, H, A, generator=generator(1))
    for gripper_dims in ((2,), (-1,), (0, 1), ()):
        drawn = negatives.amplitude(expert, (0.5, 1.5, 3.0), gripper_dims)
        assert drawn.shape == (2, 3, H, A)
        spared = {dim % A for dim in gripper_dims}
        for column, factor in enumerate((0.5, 1.5, 3.0)):
            for dim in range(A):
                assert torch.equal(drawn[:, column, :, dim], expert[..., dim] * (1 if dim in spared else factor))
    with pytest.raises(ValueError, match=r"gripper_dims \[3\]"):
        negatives.amplitude(expert, (0.5,), (3,))


def test_gripper_flip_opens_what_was_closed() -> None:
    expert = torch.randn(2, H, A, generator=generator(1))
    expert[..., 1], expert[..., 2] = torch.tensor([0.0, 0.0, 1.0, 0.25]), torch.tensor([-1.0, 1.0, -1.0, 1.0])
    low, high = torch.tensor([-9.0, 0.0, -1.0]), torch.tensor([9.0, 1.0, 1.0])
    drawn = negatives.gripper_flip(expert, low, high, (1, -1))
    assert drawn.shape == (2, 1, H, A)
    assert torch.equal(drawn[:, 0, :, 0], expert[..., 0])
    assert drawn[1, 0, :, 1].tolist() == [1.0, 1.0, 0.0, 0.75]
    assert drawn[1, 0, :, 2].tolist() == [1.0, -1.0, 1.0, -1.0]
    assert torch.equal(negatives.gripper_flip(drawn[:, 0], low, high, (1, 2))[:, 0], expert)
    with pytest.raises(ValueError, match="at least one gripper"):
        negatives.gripper_flip(expert, low, high, ())
    with pytest.raises(ValueError, match=r"gripper_dims \[5\]"):
        negatives.gripper_flip(expert, low, high, (5,))
    with pytest.raises(ValueError, match=r"low \(2,\)"):
        negatives.gripper_flip(expert, low[:2], high, (1,))


@PROPERTY
@given(st.integers(1, 6), st.integers(1, 8), seeds)
def test_in_batch_gives_other_rows_once(rows: int, count: int, seed: int) -> None:
    expert = torch.arange(rows).float()[:, None, None].expand(-1, H, A)
    drawn = negatives.in_batch(expert, count, generator(seed))
    assert drawn.shape == (rows, min(count, rows - 1), H, A)
    for row, chunks in enumerate(drawn[:, :, 0, 0].tolist()):
        assert row not in chunks
        assert len(set(chunks)) == len(chunks)


@PROPERTY
@given(st.data())
def test_hard_takes_the_valid_chunks_of_lowest_energy(data: st.DataObject) -> None:
    rows, size = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    count = data.draw(st.integers(0, size))
    value = st.sampled_from([-math.inf, -1.0, 0.5, 2.0, math.inf, math.nan])
    row = st.lists(st.tuples(value, st.booleans()), min_size=size, max_size=size)
    pool = [data.draw(row) for _ in range(rows)]
    energies = torch.tensor([[energy for energy, _ in entries] for entries in pool])
    valid = torch.tensor([[usable for _, usable in entries] for entries in pool])
    chunks = torch.arange(rows * size).float().view(rows, size, 1, 1).expand(-1, -1, H, A)
    mined, filled = negatives.hard(energies, chunks, valid, count)
    assert mined.shape == (rows, count, H, A) and filled.shape == (rows, count)
    for i, entries in enumerate(pool):
        usable = [column for column, (_, good) in enumerate(entries) if good]
        # NaN after all numbers, ties by place.
        best = sorted(usable, key=lambda j: (math.isnan(entries[j][0]), entries[j][0], j))
        best = best[:count]
        assert filled[i].tolist() == [True] * len(best) + [False] * (count - len(best))
        assert (mined[i, : len(best), 0, 0] - i * size).tolist() == best


def test_hard_refuses_what_does_not_fit() -> None:
    chunks, valid = torch.zeros(2, 5, H, A), torch.ones(2, 5, dtype=torch.bool)
    for energies, mask, count in ((torch.zeros(2, 4), valid, 1), (torch.zeros(2, 5), valid.float(), 1)):
        with pytest.raises(ValueError, match="expected \\(B,P\\)"):
            negatives.hard(energies, chunks, mask, count)
    with pytest.raises(ValueError, match="count=6"):
        negatives.hard(torch.zeros(2, 5), chunks, valid, 6)


def test_near_positives_are_masked_by_mean_absolute_distance() -> None:
    expert = torch.zeros(1, H, A)
    chunks = torch.tensor([0.0, 0.019, 0.021])[None, :, None, None].expand(1, -1, H, A)
    assert negatives.near_positive_mask(chunks, expert, 0.02).tolist() == [[True, True, False]]
