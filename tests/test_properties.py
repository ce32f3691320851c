"""What is claimed of training holds for any numbers: guard, fallback, ranges, negatives, losses."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from property_fixture import SEEDS, TRAITS, WILD, A, H, batch, few, generator, objective, some
from torch import Tensor, nn

from vla_energy import losses
from vla_energy.actions import DatasetStatistics, FieldStatistics
from vla_energy.calibrate import fewest_draws
from vla_energy.compatibility import CompatibilityError, check_statistics
from vla_energy.config import PRESETS, SOURCES, EnergyConfig, GuardConfig, RangeConfig, TemperatureConfig
from vla_energy.config.model import RANGES
from vla_energy.fallback import Fallback
from vla_energy.guard import GuardedOptimizer, total_norm
from vla_energy.negatives import near_positive_mask
from vla_energy.noise import noise_scale, smooth_noise
from vla_energy.outcomes import join_contexts
from vla_energy.ranges import apply_range, relative_slope, saturated_share
from vla_energy.row_blocks import in_row_blocks
from vla_energy.sources import add_failed, build_negatives
from vla_energy.temperature import Temperature

# The guard and the fallback.


@some
@given(
    gradients=st.lists(st.lists(WILD, min_size=3, max_size=3) | st.none(), min_size=1, max_size=6),
    bounds=st.sampled_from([(0.5, 100.0), (1.0, 1e30), (1e-6, 1e-6), (1e3, 1e15)]),
    warm=st.integers(0, 3),
)
def test_no_gradient_breaks_what_is_trained_and_every_call_is_counted_once(
    gradients: list[list[float] | None], bounds: tuple[float, float], warm: int
) -> None:
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(()))]
    guarded = GuardedOptimizer.adamw(parameters, 1e-2, GuardConfig(*bounds), warm)
    for calls, values in enumerate(gradients, 1):
        if values is not None:
            parameters[0].grad, parameters[1].grad = torch.tensor(values[:2]), torch.tensor(values[2])
        before = copy.deepcopy((parameters, guarded.optimizer.state_dict()["state"]))
        report = guarded.step()
        now = (parameters, guarded.optimizer.state_dict()["state"])
        numbers = [*parameters, *(part for own in now[1].values() for part in own.values())]
        assert all(bool(part.isfinite().all()) for part in numbers)
        assert all(parameter.grad is None for parameter in parameters)
        if report.skipped:
            assert repr(before) == repr(now), "a skipped step changes nothing"
        exact = math.sqrt(sum(value * value for value in values)) if values is not None else 0.0
        assert report.skipped is not None or exact <= bounds[1] * 1.001
        assert report.skipped is None or values is None or not exact <= min(bounds[1] * 0.999, 1e18)
        counters = dict(guarded.counters)
        assert counters.pop("clipped") <= counters["steps"] and sum(counters.values()) == calls
        place = counters["steps"] + (report.skipped is not None)
        assert report.learning_rate == pytest.approx(1e-2 * min(1, place / max(warm, 1)))
        assert set(report.metrics()) == {f"energy/{name}" for name in vars(report)}
    twin = GuardedOptimizer.adamw(parameters, 1.0, GuardConfig(*bounds), warm)
    twin.load_state_dict(guarded.state_dict())
    ours, theirs = guarded.state_dict(), twin.state_dict()
    assert repr(theirs.pop("optimizer")["state"]) == repr(ours.pop("optimizer")["state"]) and theirs == ours


@some
@given(st.lists(st.lists(st.floats(-(2.0**49), 2.0**49, width=32), min_size=1, max_size=4), max_size=4))
def test_the_norm_is_that_of_all_gradients_together(values: list[list[float]]) -> None:
    norm = float(total_norm(torch.tensor(part) for part in values))
    assert norm == pytest.approx(math.hypot(*(value for part in values for value in part)), rel=1e-4, abs=1e-18)


@some
@given(st.lists(st.sampled_from([None, ValueError, KeyError, ArithmeticError, TypeError]), max_size=20), st.booleans())
def test_a_fallback_answers_every_call_and_counts_what_failed(kinds: list[Any], strict: bool) -> None:
    fallback = Fallback(strict, fatal=(TypeError,))
    failed = 0
    for kind in kinds:

        def attempt(kind: Any = kind) -> str:
            if kind is not None:
                raise kind("broken")
            return "new"

        if kind is TypeError or (strict and kind is not None):
            with pytest.raises(kind):
                fallback(attempt, lambda: "own", "it")
        else:
            failed += kind is not None
            assert fallback(attempt, lambda: "own", "it") == ("new" if kind is None else "own")
        assert fallback.total == failed == sum(fallback.counts.values())


# Ranges, temperature, statistics, noise.


@some
@given(
    st.sampled_from(sorted(RANGES)), st.floats(1e-2, 1e2), st.floats(1e-2, 10), st.floats(-50, 50), SEEDS,
)  # fmt: skip
def test_a_range_is_monotone_and_its_slope_is_told_by_the_energy(
    name: str, scale: float, slope: float, offset: float, seed: int
) -> None:
    config = RangeConfig(name, scale, slope, offset)
    raw = (3 * torch.randn(12, generator=generator(seed), dtype=torch.float64)).sort().values.requires_grad_()
    energies = apply_range(raw, config)
    assert bool(energies.isfinite().all()) and bool((energies.diff() >= 0).all())
    (exact,) = torch.autograd.grad(energies.sum(), raw)
    steepest = scale * slope * (0.25 if name in ("sigmoid", "bounded") else 1.0)
    slopes = relative_slope(energies.detach(), config)
    torch.testing.assert_close(slopes, exact / steepest, rtol=1e-4, atol=1e-6)
    assert float(saturated_share(energies, config, 0.3)) == pytest.approx(float((slopes < 0.3).double().mean()))
    huge = apply_range(torch.tensor([-1e30, 1e30]), config)
    assert not bool(huge.isnan().any()) and bool(huge[0] <= huge[1])


@some
@given(
    energies=st.lists(st.floats(-1e4, 1e4, width=32) | st.sampled_from([math.inf, math.nan]), min_size=1, max_size=8),
    value=st.floats(0.1, 5),
    factor=st.floats(0.1, 5),
    learnt=st.floats(-100, 100),
    seed=SEEDS,
)
def test_the_temperature_is_within_its_bounds_and_turns_energies_to_logits(
    energies: list[float], value: float, factor: float, learnt: float, seed: int
) -> None:
    numbers = torch.tensor(energies)
    valid = torch.rand(len(energies), generator=generator(seed)) < 0.7
    assert Temperature(TemperatureConfig("fixed", value))(numbers, valid) == value
    adaptive = float(Temperature(TemperatureConfig("adaptive", value, factor))(numbers, valid))
    used = numbers[valid & numbers.isfinite()].double()
    spread = float(used.std(unbiased=False)) if len(used) else 0.0
    assert adaptive == pytest.approx(max(value, factor * spread), rel=1e-5)
    learnable = Temperature(TemperatureConfig("learnable", 1.0, 1.0, 0.05, 10.0))
    with torch.no_grad():
        learnable.log_value.fill_(learnt)
    temperature = learnable(numbers)
    assert isinstance(temperature, Tensor) and 0.05 * 0.9999 <= float(temperature.detach()) <= 10 * 1.0001
    temperature.backward()
    assert learnable.log_value.grad is not None and float(learnable.log_value.grad) > 0, "alive at the bound, too"
    finite = numbers[numbers.isfinite()]
    torch.testing.assert_close(-value * losses.logits_of(finite, value), finite, rtol=1e-5, atol=1e-5)


@some
@given(seed=SEEDS, dims=st.integers(1, 4), constant=st.booleans(), scale=st.sampled_from([1e-3, 1.0, 1e5]))
def test_normalising_and_back_gives_what_was_within_the_bounds(
    seed: int, dims: int, constant: bool, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    values = scale * rng.normal(size=(30, dims))
    values[:, 0] = values[0, 0] if constant else values[:, 0]
    field = FieldStatistics.of(values, rng.random(dims) < 0.7)
    assert FieldStatistics.from_dict(json.loads(json.dumps(field.to_dict())), "field").to_dict() == field.to_dict()
    raw = torch.from_numpy(values)
    normal = field.normalize(raw)
    mask = torch.from_numpy(field.mask)
    assert torch.equal(normal[:, ~mask], raw[:, ~mask]) and bool((normal[:, mask].abs() <= 1).all())
    assert not (constant and field.mask[0]) or bool((normal[:, 0] == 0).all())
    low, high = torch.from_numpy(field.q01), torch.from_numpy(field.q99)
    clipped = torch.where(mask, torch.minimum(torch.maximum(raw, low), high), raw)
    torch.testing.assert_close(field.unnormalize(normal), clipped, rtol=1e-9, atol=1e-8)


@some
@given(SEEDS, st.integers(1, 4), st.integers(1, 4), st.floats(0, 1))
def test_a_rows_noise_does_not_depend_on_its_batch(seed: int, rows: int, count: int, correlation: float) -> None:
    shape = (rows, count, H, A)
    noise = smooth_noise(shape, correlation, [generator(seed + row) for row in range(rows)])
    alone = smooth_noise(shape[1:], correlation, generator(seed + rows - 1))
    assert noise.shape == shape and torch.equal(noise[-1], alone)
    assert correlation < 1 or bool((noise == noise[:, :, :1]).all())


@some
@given(st.floats(0.01, 0.9), st.floats(0.01, 0.9))
def test_the_fewest_draws_that_pass_are_the_fewest(risk: float, level: float) -> None:
    count = fewest_draws(risk, level)
    assert (1 - risk) ** count <= level * (1 + 1e-9) and (1 - risk) ** (count - 1) > level * (1 - 1e-9)


@some
@given(SEEDS, st.integers(1, 6), st.integers(1, 7))
def test_blocks_of_rows_and_their_gradients_are_those_of_the_whole(seed: int, rows: int, size: int) -> None:
    numbers = torch.randn(rows, A, generator=generator(seed), dtype=torch.float64, requires_grad=True)

    def function(part: Tensor, none: Tensor | None) -> tuple[Tensor, ...]:
        assert none is None and len(part) <= size
        return part.sin(), part.square().sum(1)

    found = in_row_blocks(function, size, numbers, None)
    torch.testing.assert_close(found, (numbers.sin(), numbers.square().sum(1)))
    (gradient,) = torch.autograd.grad(found[0].sum() + found[1].sum(), numbers)
    torch.testing.assert_close(gradient, numbers.cos() + 2 * numbers)


@some
@given(SEEDS, st.integers(1, 4), st.integers(1, 3), st.floats(0, 1), st.floats(0.01, 1), st.integers(0, 9))
def test_what_losses_are_made_of_keeps_its_bounds(
    seed: int, rows: int, copies: int, discount: float, width: float, steps: int
) -> None:
    chunks = batch(seed, rows)[2].repeat(copies, 1, 1)
    common = losses.log_frequency(chunks, width)
    assert bool((common >= math.log(1 / rows) - 1e-4).all()) and bool((common <= 1e-5).all()), "each is there so often"
    success = torch.rand(rows, generator=generator(seed)) < 0.5
    targets = losses.outcome_targets(success, torch.full((rows,), steps), discount)
    torch.testing.assert_close(targets, success * discount**steps, check_dtype=False)
    alphas = [losses.mixed_alpha(step, steps) for step in range(12)]
    assert alphas == sorted(alphas) and alphas[0] >= 0 and alphas[max(steps, 1)] == 1
    energies, valid = torch.randn(rows, 3, generator=generator(seed)), success[:, None].expand(rows, 3)
    assert int(losses.count_no_negatives(energies, valid)) == rows - int(success.sum())
    assert int(losses.clamp_count(energies, 0.5, 1.0, valid)) == int((energies[success].abs() > 0.5).sum())


@some
@given(SEEDS, st.integers(1, 4), st.floats(1e-2, 1e2))
def test_the_noises_scale_has_mean_1_and_statistics_fit_only_themselves(seed: int, dims: int, factor: float) -> None:
    values = np.random.default_rng(seed).normal(size=(30, dims))
    mask = np.arange(dims) < max(1, dims - 1)
    first, second = (
        DatasetStatistics(FieldStatistics.of(part, mask), None, 30, 1) for part in (values, factor * values)
    )
    scale = noise_scale(first)
    assert not bool(scale[~torch.from_numpy(mask)].any())
    assert float(scale[torch.from_numpy(mask)].mean()) == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(noise_scale(second), scale, rtol=1e-4, atol=1e-5)
    check_statistics(first, first, "it")
    if abs(factor - 1) > 1e-2:
        with pytest.raises(CompatibilityError, match="dimension"):
            check_statistics(first, second, "it")


# Negatives and the objective.


COUNTS = st.fixed_dictionaries({name: st.integers(0, 3) for name in SOURCES})


@some
@given(
    COUNTS.filter(lambda counts: any(counts.values())),
    SEEDS,
    st.integers(1, 4),
    st.just(0.0) | st.floats(0.01, 0.5),
    st.booleans(),
)
def test_what_is_drawn_is_in_its_columns_and_the_expert_is_never_valid(
    counts: dict[str, int], seed: int, rows: int, threshold: float, hold: bool
) -> None:
    changes: dict[str, Any] = {name: {"count": count} for name, count in counts.items()}
    for name in ("amplitude", "gripper_flip"):
        changes[name]["count"] = min(1, counts[name])
    changes["hard"]["pool"] = 6
    config = EnergyConfig.from_dict({"negatives": {**changes, "near_positive_threshold": threshold}}).negatives
    _, _, expert, layer_actions = batch(seed, rows)
    expert = expert[:, :1].expand_as(expert) if hold else expert  # a chunk that holds still shuffles to itself
    lent = torch.cat([expert[:, None], layer_actions], 1)

    def draw() -> Any:
        return build_negatives(
            config, expert, layer_actions[:, -1], layer_actions, generator(seed), TRAITS,
            energy_fn=lambda chunks: chunks.sum((2, 3)), retrieved=lent, samples=lent,
        )  # fmt: skip

    drawn, again = draw(), draw()
    count = drawn.chunks.shape[1]
    assert drawn.chunks.shape == (rows, count, H, A) and drawn.valid.shape == drawn.distances.shape == (rows, count)
    assert torch.equal(drawn.chunks, again.chunks) and torch.equal(drawn.valid, again.valid)
    whole = {name: part for name, part in drawn.sources.items() if not name.startswith("layer_exit_")}
    assert [i for part in whole.values() for i in range(part.start, part.stop)] == list(range(count))
    assert all(whole[name].start == whole[name].stop for name in drawn.empty)
    near = near_positive_mask(drawn.chunks, expert, threshold)
    assert not bool((drawn.valid & near).any())
    assert threshold == 0 or not bool((drawn.valid & (drawn.chunks == expert[:, None]).all(3).all(2)).any())
    there = torch.arange(rows)[:, None] % 2 == torch.zeros(1, 2)
    failed = add_failed(drawn, lent[:, :2], there, expert, threshold)
    assert torch.equal(failed.chunks[:, failed.sources["failed"]], lent[:, :2])
    assert torch.equal(failed.weight[:, -2:] > 0, there) and not bool((failed.valid[:, -2:] & ~there).any())
    assert threshold == 0 or not bool(failed.valid[:, -2].any()), "the expert itself was lent"


@few
@given(
    name=st.sampled_from(sorted(PRESETS)), seed=SEEDS, rows=st.integers(1, 3), step=st.integers(0, 20_000),
    context_scale=st.sampled_from([0.0, 1e-20, 1.0, 1e4]), action_scale=st.sampled_from([0.0, 1.0, 10.0]),
)  # fmt: skip
def test_loss_and_gradients_of_finite_inputs_are_finite_and_the_heads_alone(
    name: str, seed: int, rows: int, step: int, context_scale: float, action_scale: float
) -> None:
    head, training = objective(EnergyConfig.preset(name), seed)
    context, mask, expert, layer_actions = batch(seed, rows)
    inputs = [context_scale * context, action_scale * expert, action_scale * layer_actions]
    context, expert, layer_actions = (part.requires_grad_() for part in inputs)
    loss, metrics = training(context, mask, expert, layer_actions, generator(seed), step)
    loss.backward()
    assert loss.ndim == 0 and bool(loss.isfinite())
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in head.parameters())
    assert all(part.grad is None for part in (context, expert, layer_actions))
    assert all(value.ndim == 0 and not value.requires_grad and bool(value.isfinite()) for value in metrics.values())
    assert all(0 <= float(value) <= 1 for key, value in metrics.items() if "win_rate" in key or "share" in key)


@few
@given(SEEDS, st.permutations(range(4)), st.sampled_from(["residual", "original"]))
def test_the_order_of_rows_and_the_content_of_padding_change_no_loss(seed: int, order: list[int], head: str) -> None:
    off = {name: {"count": 0} for name in SOURCES}
    on = {name: {"count": 3} for name in ("layer_exits", "in_batch", "retrieved")} | {"amplitude": {"count": 1}}
    loss = {"centre": 0.0, "info_nce": 0.5, "margin": 0.3, "diversity": 0.1, "distance_regression": 0.2}
    config = {"negatives": {**off, **on}, "loss": loss, "head": {"name": head, "blind_share": 0.0}}
    training = objective(EnergyConfig.from_dict(config))[1]
    context, mask, expert, layer_actions = batch(seed, 4)
    lent = torch.rand(4, 3, H, A, generator=generator(seed))
    first, metrics = training(context, mask, expert, layer_actions, generator(seed), retrieved=lent)
    context = context.masked_fill(~mask[..., None], math.nan)
    parts = [part[order] for part in (context, mask, expert, layer_actions)]
    second, others = training(*parts, generator(seed + 1), retrieved=lent[order])  # type: ignore[arg-type]
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    for name in ("anchor", "info_nce", "chance", "margin", "diversity", "distance_regression", "std_row"):
        torch.testing.assert_close(metrics[f"energy/{name}"], others[f"energy/{name}"], rtol=1e-3, atol=1e-4)


@few
@given(SEEDS, st.integers(1, 3), st.integers(0, 3), st.integers(0, 3))
def test_joined_contexts_have_the_energies_that_each_has_alone(seed: int, rows: int, first: int, second: int) -> None:
    head = objective(EnergyConfig())[0].eval()
    parts = []
    for extra, own in ((first, seed), (second, seed + 1)):
        context, mask, reference, _ = batch(own, rows)
        context = nn.functional.pad(context, (0, 0, 0, extra), value=math.nan)
        parts.append((context, nn.functional.pad(mask, (0, extra)), reference))
    chunks = torch.rand(2 * rows, 2, H, A, generator=generator(seed))
    with torch.no_grad():
        alone = torch.cat([head(part, own) for part, own in zip(parts, chunks.split(rows), strict=True)])
        joined = head(join_contexts(parts[0], parts[1]), chunks)
    torch.testing.assert_close(joined, alone, rtol=1e-4, atol=1e-5)
