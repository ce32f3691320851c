"""What the report draws of a head: landscapes along a chunk, ranking by distance, the gate by its margin."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vla_energy.calibrate import margin_curve
from vla_energy.config import EnergyConfig
from vla_energy.finetune.shapes import FRAMES, FirstBatch, halves, write_shapes
from vla_energy.head import EnergyHead
from vla_energy.landscape import step_slice
from vla_energy.measures import BANDS, pairs_by_band
from vla_energy.monitors import evaluate_ranking
from vla_energy.rerank import choose

B, H, A, D = 12, 4, 2, 6


def _random(seed: int, rows: int = 5, columns: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    energies = torch.randint(0, 4, (rows, columns), generator=generator).float()  # ties come
    return energies, 0.5 * torch.rand(rows, columns, generator=generator).square()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_pairs_by_band_equal_a_count_by_hand(seed: int) -> None:
    scores, distances = _random(seed)
    usable = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)) > 0.2
    distances[0, 1] = distances[0, 0]
    expected = {f"from_{low:g}": [0.0, 0.0] for low in BANDS}
    for b in range(len(scores)):
        for i in range(scores.shape[1]):
            for j in range(scores.shape[1]):
                if not (usable[b, i] and usable[b, j] and distances[b, i] < distances[b, j]):
                    continue
                band = max(low for low in BANDS if low <= float(distances[b, i]))
                tally = expected[f"from_{band:g}"]
                tally[0] += 1.0 if scores[b, i] < scores[b, j] else 0.5 if scores[b, i] == scores[b, j] else 0.0
                tally[1] += 1
    assert {band: [*counts] for band, counts in pairs_by_band(scores, distances, usable).items()} == expected


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_the_gates_curve_is_what_the_gate_does(seed: int) -> None:
    energies, distances = _random(seed)
    energies[1, 2] = math.nan
    curve = margin_curve(energies, distances, points=7)
    assert curve["margins"][0] == 0.0 and len(curve["margins"]) <= 7
    clean = torch.where(energies.isnan(), math.inf, energies)
    for margin, accepted, worse, l1 in zip(*(curve[k] for k in ("margins", "accepted", "worse", "l1")), strict=True):
        assert margin is not None
        index, taken = choose(clean, margin)
        chosen = distances.gather(1, index[:, None])[:, 0]
        assert accepted == pytest.approx(float(taken.float().mean()))
        assert l1 == pytest.approx(float(chosen.mean()), rel=1e-5)
        bad = (chosen > distances[:, 0])[taken]
        assert worse == (pytest.approx(float(bad.float().mean())) if len(bad) else None)
    shares = [share for share in curve["accepted"] if share is not None]
    assert shares == sorted(shares, reverse=True) and shares[-1] == 0


def test_a_curve_without_any_gain_is_one_point() -> None:
    assert margin_curve(torch.zeros(3, 2), torch.ones(3, 2))["margins"] == [0.0]


@pytest.mark.parametrize("block_size", [3, 256])
def test_a_slice_along_the_chunk_moves_one_step_at_a_time(block_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    policy, expert = torch.randn(2, B, H, A, generator=generator)
    weights = torch.randn(H, A, generator=generator)

    def energy_fn(chunks: Tensor) -> Tensor:
        return (chunks * weights).sin().sum((2, 3)) + chunks.square().sum((2, 3))

    xs, energies = step_slice(energy_fn, policy, expert, resolution=7, block_size=block_size)
    assert energies.shape == (B, H, 7) and xs[[0, 2, 4, 6]].tolist() == pytest.approx([-1, 0, 1, 2])
    for h in range(H):
        for index, x in enumerate(xs):
            moved = expert.clone()
            moved[:, h] = policy[:, h] + x * (expert[:, h] - policy[:, h])
            torch.testing.assert_close(energies[:, h, index], energy_fn(moved[:, None])[:, 0])


def test_a_slice_along_the_chunk_refuses_what_does_not_fit() -> None:
    chunks = torch.zeros(1, H, A)
    with pytest.raises(ValueError, match=r"expected equal \(B,H,A\)"):
        step_slice(lambda a: a.sum((2, 3)), chunks, chunks[:, 1:])
    with pytest.raises(ValueError, match="extent=-1: expected a finite number"):
        step_slice(lambda a: a.sum((2, 3)), chunks, chunks, extent=-1)
    with pytest.raises(ValueError, match="resolution=1: expected 2 or more"):
        step_slice(lambda a: a.sum((2, 3)), chunks, chunks, resolution=1)


def test_shapes_are_of_different_episodes_and_pass_over_frames_without_a_plane(tmp_path: Path) -> None:
    torch.manual_seed(0)
    head = EnergyHead(D, A, H, EnergyConfig()).eval()
    context, mask, expert = torch.randn(B, 3, D), torch.ones(B, 3, dtype=torch.bool), torch.randn(B, H, A)
    layers = torch.randn(B, 1, H, A)
    layers[0, -1] = expert[0]  # no plane through one point
    layers[1, -1, 0, 0] = expert[1, 0, 0]
    episodes = torch.tensor([7, 7, 7, 3, 3, 5, 5, 5, 9, 9, 2, 2])
    places = [(f"task {row}", row) for row in range(B)]
    batches = FirstBatch([(context, mask, expert, layers)])
    report = evaluate_ranking(head, batches, EnergyConfig(), torch.Generator().manual_seed(0), scale=torch.ones(H, A))
    path = write_shapes(tmp_path / "new", head, batches, places, report, episodes, None)
    shapes = json.loads(path.read_text())
    assert [(frame["episode"], frame["step"]) for frame in shapes["frames"]] == [(7, 1), (3, 3), (5, 5)]
    assert len(shapes["frames"]) == FRAMES and shapes["frames"][0]["task"] == "task 1"
    plane, time = shapes["frames"][1]["plane"], shapes["frames"][1]["time"]
    encoded = head.encode(context[3:4], mask[3:4], layers[3:4, -1])
    own, best = (float(head(encoded, chunk[3:4, None]).detach()) for chunk in (layers[:, -1], expert))
    row, policy_at, expert_at = len(plane["ys"]) // 2, plane["xs"].index(0.0), plane["xs"].index(1.0)
    assert plane["ys"][row] == 0 and plane["energies"][row][policy_at] == pytest.approx(own, rel=1e-3)
    assert plane["energies"][row][expert_at] == pytest.approx(best, rel=1e-3)
    at = time["xs"].index(1.0)
    assert [line[at] for line in time["energies"]] == pytest.approx([best] * H, rel=1e-3)
    assert shapes["gate"]["chosen"] is None and shapes["gate"]["margins"][0] == 0
    _, rest = halves(episodes)
    assert shapes["gate"]["l1_policy"] == pytest.approx(float((layers[rest, -1] - expert[rest]).abs().mean()), rel=1e-5)


def test_one_episode_has_no_curve_of_the_gate(tmp_path: Path) -> None:
    head = EnergyHead(D, A, H, EnergyConfig()).eval()
    expert = torch.randn(2, H, A)
    batches = FirstBatch([(torch.randn(2, 3, D), torch.ones(2, 3, dtype=torch.bool), expert, expert[:, None].clone())])
    report = evaluate_ranking(head, batches, EnergyConfig(), torch.Generator().manual_seed(0), scale=torch.ones(H, A))
    path = write_shapes(tmp_path, head, batches, [("", -1)] * 2, report, torch.tensor([1, 1]), None)
    shapes = json.loads(path.read_text())
    assert shapes["gate"] is None and shapes["frames"] == []
