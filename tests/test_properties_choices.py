"""What is claimed of candidates, of the gate and of every mode holds for any numbers; what is told of a head, too."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from property_fixture import SEEDS, WILD, A, D, H, batch, few, generator, objective, same_bits, some
from torch import Tensor, nn

from vla_energy.candidates import Source, overlap, propose, source_report
from vla_energy.config import EnergyConfig
from vla_energy.config.model import CandidatesConfig
from vla_energy.crops import crop_chunks, random_crops
from vla_energy.health import SYMPTOMS, HealthWatch
from vla_energy.landscape import descent_alignment, plane_slice, step_slice
from vla_energy.modes import Advisor, Frame, Plan, replan
from vla_energy.monitors import evaluate_ranking, rerank_l1
from vla_energy.refine import refine
from vla_energy.rerank import Reranker, rerank

# Candidates and the choice.


@some
@given(
    seed=SEEDS, rows=st.integers(1, 3), layers=st.integers(0, 5), count=st.integers(0, 4), lent=st.integers(0, 2),
    gripper=st.sampled_from([(), (-1,), (0,), (0, 1)]), poison=WILD,
)  # fmt: skip
def test_candidates_are_within_bounds_beside_the_policys_own(
    seed: int, rows: int, layers: int, count: int, lent: int, gripper: Sequence[int], poison: float
) -> None:
    draws = generator(seed)
    policy = 1.5 * torch.randn(rows, H, A, generator=draws)
    policy[0, 0, 0] = poison
    layer_actions = torch.randn(rows, layers, H, A, generator=draws) if layers else None
    prior = torch.rand(rows, lent, generator=draws)
    others = {"lent": Source(3 * torch.randn(rows, lent, H, A, generator=draws), prior)}
    config = CandidatesConfig(num_candidates=count, noise_stds=(0.1, 0.5))

    def of(where: slice) -> Any:
        own = {name: Source(part.chunks[where], prior[where]) for name, part in others.items()}
        generators = [generator(seed + row) for row in range(rows)][where]
        inner = None if layer_actions is None else layer_actions[where]
        return propose(policy[where], inner, config, generators, gripper_dims=gripper, others=own)

    drawn = of(slice(None))
    exits = max(min(layers - 2, 4), 0)
    width = 1 + exits + count + lent
    assert drawn.actions.shape == (rows, width, H, A) and len(drawn.sources) == width == drawn.prior.shape[1]
    assert drawn.sources[0] == "policy" and same_bits(drawn.actions[:, 0], policy)
    free = torch.ones(A, dtype=torch.bool)
    free[list(gripper)] = False
    rest = drawn.actions[:, 1:, :, free]
    assert bool(((rest.abs() <= 1) | rest.isnan()).all())
    noisy = drawn.actions[:, 1 + exits : 1 + exits + count]
    assert same_bits(noisy[..., ~free].contiguous(), policy[:, None].expand_as(noisy)[..., ~free].contiguous())
    assert torch.equal(drawn.prior[:, width - lent :], prior) and not bool(drawn.prior[:, : width - lent].any())
    last = slice(rows - 1, None)
    assert same_bits(of(last).actions, drawn.actions[last]), "a row does not depend on its batch"
    assume(math.isfinite(poison) and abs(poison) < 1e6)
    expert = torch.zeros(rows, H, A)
    for name, told in source_report(drawn, expert).items():
        assert told["oracle_with_policy"] <= min(told["oracle"], float(policy.abs().mean())) * (1 + 1e-5), name
    assert same_bits(overlap(policy, [None] * rows, [0] * rows), policy)


class Table(nn.Module):
    """A head that says what it is told: the energies are the context."""

    context_dim, action_dim, horizon = D, A, H

    def encode(self, context: Tensor, context_mask: Tensor, reference: Tensor) -> Tensor:
        return context[:, 0]

    def forward(self, encoded: Tensor, actions: Tensor) -> Tensor:
        if bool((encoded[:, 0] == 77).any()):
            raise RuntimeError("broken")
        return encoded[:, : actions.shape[1]]


EIGHTHS = st.integers(-400, 400).map(lambda number: number / 8)  # sums of these are exact


@some
@given(
    energies=st.lists(EIGHTHS, min_size=2, max_size=D, unique=True), margin=EIGHTHS.map(abs) | st.just(math.inf),
    constant=EIGHTHS, poisoned=st.sets(st.integers(0, D - 1), max_size=3), dropped=st.sets(st.integers(0, D - 1)),
    poison=st.sampled_from([math.nan, math.inf, -math.inf]), seed=SEEDS, data=st.data(),
)  # fmt: skip
def test_the_choice_is_a_candidate_bit_for_bit_and_never_one_that_is_not_finite(
    energies: list[float], margin: float, constant: float, poisoned: set[int], dropped: set[int], poison: float,
    seed: int, data: st.DataObject,
) -> None:  # fmt: skip
    count = len(energies)
    table, candidates = torch.tensor([energies]), torch.randn(1, count, H, A, generator=generator(seed))
    for place in poisoned & set(range(count)):
        table[0, place] = poison
    for place in dropped & set(range(count)):
        candidates[0, place, 0, 0] = poison

    def choose(table: Tensor, candidates: Tensor) -> Any:
        context = nn.functional.pad(table, (0, D - count))[:, None]
        reranker = Reranker(Table(), None, EnergyConfig(), margin, strict=False)
        result = reranker(context, torch.ones(1, 1, dtype=torch.bool), candidates)
        plain = rerank(lambda _: table, candidates, margin)
        assert torch.equal(plain.index, result.index) and torch.equal(plain.energies, result.energies)
        counted = (reranker.counters["decisions"], reranker.counters["accepted"], reranker.fallback.total)
        broken = bool((candidates.flatten(2).isfinite().all(2) & ~table.isfinite()).any())
        assert counted == (1, int(result.accepted), int(broken)), "no number for a finite chunk is a failure"
        return result

    result = choose(table, candidates)
    index = int(result.index)
    assert same_bits(result.actions[0], candidates[0, index]) and bool(result.accepted) == (index != 0)
    usable = [i for i in range(count) if i not in poisoned and i not in dropped]
    if 0 not in dropped and 0 in poisoned:
        assert index == 0, "nothing can be compared"
    else:
        assert index == 0 or index in usable
        best = min(usable, key=lambda i: energies[i], default=0)
        gain = energies[0] - energies[best] if 0 in usable else math.inf
        assert index == (best if usable and gain > margin else 0)
    assert int(choose(table + constant, candidates).index) == index, "an offset changes nothing"
    order = [0, *data.draw(st.permutations(range(1, count)))]
    assert order[int(choose(table[:, order], candidates[:, order]).index)] == index
    broken = torch.full((1, 1, D), 77.0)
    reranker = Reranker(Table(), None, EnergyConfig(), margin, strict=False)
    kept = reranker(broken, torch.ones(1, 1, dtype=torch.bool), candidates)
    assert same_bits(kept.actions, candidates[:, 0]) and not bool(kept.accepted) and reranker.fallback.total == 1


def rough(seed: int) -> Callable[[Tensor], Tensor]:
    """Waves with holes: NaN and inf in places, as a head that was trained badly may give."""
    weights = 4 * torch.randn(H, A, generator=generator(seed))

    def energy(actions: Tensor) -> Tensor:
        waves = (weights * actions).sin().sum((2, 3))
        return torch.where(waves > 2, math.nan, torch.where(waves < -3.5, -math.inf, waves)) + 0 * actions.sum((2, 3))

    return energy


@some
@given(
    seed=SEEDS, rows=st.integers(1, 3), radius=st.floats(0.01, 1), steps=st.integers(0, 6), margin=st.floats(0, 2),
    poison=st.sampled_from([0.5, math.nan, math.inf]), values=st.sampled_from([(), (0.0, 1.0)]),
)  # fmt: skip
def test_a_refined_chunk_is_lower_and_near_or_the_policys_bit_for_bit(
    seed: int, rows: int, radius: float, steps: int, margin: float, poison: float, values: tuple[float, ...]
) -> None:
    policy = torch.randn(rows, H, A, generator=generator(seed)).clamp(-1, 1)
    policy[0, 0, 0] = poison
    energy = rough(seed)
    result = refine(energy, policy, radius=radius, margin=margin, steps=steps, gripper_values=values)
    taken = result.accepted
    assert same_bits(result.actions[~taken], policy[~taken])
    finite = policy.isfinite().all(2).all(1) & result.energy_policy.isfinite()
    assert not bool((taken & ~finite).any()) and bool(result.moved.isfinite().all())
    assert bool(result.energy_lowest[taken].isfinite().all()) and not bool(result.unscored[0] & (poison != 0.5))
    assert bool((result.energy_lowest[finite] <= result.energy_policy[finite]).all())
    assert bool((result.energy_policy - result.energy_lowest > margin)[taken].all())
    torch.testing.assert_close(energy(result.actions[:, None])[:, 0][taken], result.energy_lowest[taken])
    moved = (result.actions - policy)[taken]
    assert bool((moved[..., :-1].abs() <= radius * 1.0001).all()) and bool((result.actions[taken].abs() <= 1).all())
    grips = torch.tensor([*values, math.nan])
    kept = (moved[..., -1:] == 0) | (result.actions[taken][..., -1:, None] == grips).any(-1)
    assert bool(kept.all())


# The modes.


@cache
def advisor(margin: float) -> Advisor:
    head = objective(EnergyConfig(), 3)[0]
    return Advisor(Reranker(head, None, head.config, margin), None, {"refine": margin})


@few
@given(SEEDS, st.sampled_from(["rerank", "refine"]), st.sampled_from([0.0, 0.02, math.inf]), st.integers(1, 3))
def test_a_mode_proposes_what_scores_lower_and_the_gate_takes_enough(
    seed: int, mode: str, margin: float, rows: int
) -> None:
    own = advisor(margin)
    context, mask, _, layers = batch(seed, rows)
    frame = Frame(context, mask, layers[:, -1], layers)
    proposal, taken = own.decide(mode, frame, [generator(row) for row in range(rows)])
    assert own.reranker is not None and torch.equal(taken, proposal.gain > margin)
    assert bool((proposal.gain >= 0).all()) and same_bits(
        proposal.actions[proposal.gain == 0], frame.policy[proposal.gain == 0]
    )
    head: Any = own.reranker.head
    with torch.no_grad():
        energies = head((context, mask, frame.policy), torch.stack([frame.policy, proposal.actions], 1))
    torch.testing.assert_close(energies[:, 0] - energies[:, 1], proposal.gain, rtol=1e-3, atol=1e-4)
    assert own.propose(mode, frame, [generator(row) for row in range(rows)]).actions.equal(proposal.actions)


@few
@given(SEEDS, st.lists(st.none() | st.tuples(st.integers(0, H), st.integers(1, 6)), min_size=1, max_size=4))
def test_replanning_keeps_the_rest_or_takes_the_new_chunk(seed: int, started: list[tuple[int, int] | None]) -> None:
    own = advisor(0.0).reranker
    assert own is not None
    config, rows = own.config.replan, len(started)
    context, mask, old, layers = batch(seed, rows)
    plans = [None if plan is None else Plan(chunk, plan[1]) for plan, chunk in zip(started, old, strict=True)]
    done = [0 if plan is None else plan[0] for plan in started]
    new, rise = replan(own, Frame(context, mask, layers[:, -1], layers), plans, done)
    for row, (plan, before) in enumerate(zip(new, plans, strict=True)):
        kept = before is not None and float(rise[row]) <= config.margin
        rest = torch.cat([old[row, done[row] :], layers[row, -1, H - done[row] :]])
        assert torch.equal(plan.chunk, rest if kept else layers[row, -1]) and 1 <= plan.interval <= H
        assert before is not None or abs(float(rise[row])) < 1e-5
        assert not kept or before is None or plan.interval == min(2 * before.interval, config.longest, H - 1)


# What is told of a head.


@few
@given(SEEDS, st.integers(1, 3), st.integers(1, 9), st.integers(0, 4))
def test_slices_hold_the_energies_of_the_chunks_they_go_through(seed: int, rows: int, block: int, extent: int) -> None:
    policy, expert = batch(seed, rows)[3].unbind(1)[:2]
    weights = torch.randn(H, A, generator=generator(seed))

    def energy(chunks: Tensor) -> Tensor:
        return (weights * chunks).sum((2, 3)) + chunks.square().sum((2, 3))

    resolution = 1 + 2 * (1 + 2 * extent)  # 0 and 1 are on the grid, and 0 in the middle
    own, theirs = (energy(chunks[:, None])[:, 0] for chunks in (policy, expert))
    plane = plane_slice(energy, policy, expert, extent, resolution, generator=generator(seed), block_size=block)
    middle, zero, one = resolution // 2, 2 * extent, 2 * extent + 2
    close: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(plane.energies[:, middle, zero], own, **close)
    torch.testing.assert_close(plane.energies[:, middle, one], theirs, **close)
    x, y = plane.lowest(0)
    place = (int((plane.ys - y).abs().argmin()), int((plane.xs - x).abs().argmin()))
    assert plane.energies[0][place] == plane.energies[0].min()
    _, lines = step_slice(energy, policy, expert, extent, resolution, block_size=block)
    torch.testing.assert_close(lines[:, :, one], theirs[:, None].expand(-1, H), **close)
    alignment = descent_alignment(lambda a: (a - expert[:, None]).square().sum((2, 3)), policy[:, None], expert)
    torch.testing.assert_close(alignment, torch.ones(rows, 1), **close)


@few
@given(SEEDS, st.integers(1, 3), st.floats(0, 1))
def test_no_choice_beats_the_best_candidate(seed: int, rows: int, margin: float) -> None:
    head = objective(EnergyConfig(), seed % 5)[0]
    report = evaluate_ranking(
        head, [batch(seed, rows), batch(seed + 1, rows)], head.config, generator(0), margin=margin
    )
    told: dict[str, Any] = report.metrics["rerank"] | report.metrics["energy"]  # type: ignore[operator]
    for name in ("l1_policy", "l1_reranked", "l1_gated"):
        assert told[name] >= told["l1_oracle"] - 1e-6
    assert 0 <= told["kept"] <= 1 and all(0 <= rate <= 1 for rate in told["win_rate"].values())
    plain = rerank_l1(report.energies, report.distances)
    assert float(plain["oracle"]) <= min(float(plain["policy"]), float(plain["chosen"])) + 1e-6
    assert report.energies.shape == report.distances.shape == (2 * rows, len(report.sources))


NAMES = [
    "info_nce",
    "chance",
    "saturated",
    "std_row",
    "nonfinite",
    "skips",
    "skips/nonfinite",
    "spearman",
    "min",
    "max",
]
METRICS = st.dictionaries(st.sampled_from([f"energy/{name}" for name in [*NAMES, "win_rate/shuffle", "new"]]), WILD)


@some
@given(st.lists(METRICS, max_size=12))
def test_any_metrics_give_known_warnings_and_what_is_not_finite_is_told(history: list[dict[str, float]]) -> None:
    watch, ill = HealthWatch(EnergyConfig().monitor), set()
    anchors = [f"see docs/troubleshooting.md#{symptom.name}" for symptom in SYMPTOMS]
    for step, metrics in enumerate(history):
        warnings = watch.update(step, metrics)
        assert all(any(warning.endswith(anchor) for anchor in anchors) for warning in warnings)
        now = {name for name, value in metrics.items() if not math.isfinite(value)}
        now |= {"energy/nonfinite"} if metrics.get("energy/nonfinite", 0) > 0 else set()
        assert any(warning.endswith("#nonfinite") for warning in warnings) == bool(now - ill), "told as it begins"
        ill = ill - set(metrics) | now
        json.dumps(watch.state_dict(), allow_nan=False)


# Crops.


@few
@given(SEEDS, st.integers(1, 3), st.integers(1, 3), st.floats(0.1, 1), st.integers(0, 255))
def test_crops_lie_within_the_image_and_a_row_is_its_own(
    seed: int, rows: int, count: int, side: float, grey: int
) -> None:
    images = np.random.default_rng(seed).integers(0, 256, (rows, 2, 6, 5, 3)).astype(np.uint8)
    crops = random_crops(images[0], count, side, generator(seed))
    assert crops.shape == (count, 2, 6, 5, 3) and crops.dtype == np.uint8
    assert crops.min() >= images[0].min() and crops.max() <= images[0].max()
    assert bool((random_crops(np.full_like(images[0], grey), count, side, generator(seed)) == grey).all())
    assert side < 1 or bool((crops == images[0]).all())

    def predict(inputs: dict[str, Tensor], exits: str, noise: Tensor) -> Any:
        mean = inputs["images"].flatten(1).mean(1)[:, None, None] + inputs["lengths"][:, None, None]
        return SimpleNamespace(actions=noise[:, 0] + mean)

    def of_batch(views: np.ndarray, texts: Sequence[str], proprio: Tensor | None) -> dict[str, Tensor]:
        lengths = torch.tensor([float(len(text)) for text in texts])
        return {"images": torch.from_numpy(views).double(), "lengths": lengths}

    vla: Any = SimpleNamespace(
        processor=SimpleNamespace(batch=of_batch), parameters=lambda: iter([torch.zeros(())]), predict=predict,
        diffuses=True, horizon=H, action_dim=A,
    )  # fmt: skip
    config, texts = CandidatesConfig(crops=count, crop_scale=side), ["a" * row for row in range(rows)]
    generators = [generator(seed + row) for row in range(rows)]
    chunks = crop_chunks(vla, images, texts, None, generators, config)
    assert chunks.shape == (rows, count, H, A)
    alone = crop_chunks(vla, images[-1:], texts[-1:], None, [generator(seed + rows - 1)], config)
    assert torch.equal(alone[0], chunks[-1])
