"""The stability benchmark's own parts: faults that hit, and a judgement of flatness that can be wrong both ways."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import stability_arms as arms
from stability_faults import BAD, Injector
from synthetic import wide_features
from training import Run, is_flat, train

from vla_energy.head import EnergyHead
from vla_energy.objective import EnergyObjective

FEATURES = wide_features(40, 0, width=16, tokens=3)


@pytest.mark.parametrize("kind", ["context", "expert", "layers", "gradient"])
def test_every_broken_number_makes_the_step_not_finite(kind: str) -> None:
    """Except 1e38 in a layer, which is far away and not broken, and in a context, which may be normalised away."""
    config = arms.preset("recommended")
    torch.manual_seed(0)
    head = EnergyHead(16, 7, 8, config)
    objective = EnergyObjective(head, config, FEATURES.traits)
    injector, index = Injector(0), Injector.kinds.index(kind)
    for turn, value in enumerate(BAD):
        step = 7 * (index + turn * len(Injector.kinds))
        batch = injector.spoil(step, FEATURES.batch(torch.arange(8)), head)
        loss, _ = objective(*batch, torch.Generator().manual_seed(0), step)
        loss.backward()
        injector.after_backward(step, head)
        norm = torch.stack([p.grad.norm() for p in head.parameters() if p.grad is not None]).norm()
        assert not norm.isfinite() or (value == 1e38 and kind in ("layers", "context")), (kind, value)
        head.zero_grad()
    assert injector.counts[kind] == len(BAD)


def test_a_run_with_faults_ends_with_finite_weights_and_counts_them() -> None:
    injector = Injector(0)
    _, facts = train(Run("", arms.preset("recommended"), 200, 0), FEATURES, injector.spoil, injector.after_backward)
    assert facts["nonfinite_parameters"] == 0
    assert facts["counters"]["nonfinite"] >= 12 and injector.counts["padding_refused"] == injector.counts["padding"] > 0


def test_flat_is_chance_at_the_end() -> None:
    def curve(*losses: float) -> list[dict[str, float]]:
        return [{"info_nce": loss, "chance": 2.079} for loss in losses]

    assert is_flat(curve(1.0, 2.079), 0.5) and not is_flat(curve(2.079, 1.0), 0.5)
    assert is_flat([{"margin": 0.5}], 0.5) and not is_flat([{"margin": 0.1}], 0.5)
    assert is_flat([], 0.5) is None and is_flat([{"listwise": 1.0}], 0.5) is None


@pytest.mark.parametrize("part", ["presets", "wide", "stages", "ranges", "left_out", "alone"])
def test_arms_are_different_trainings(part: str) -> None:
    runs = getattr(arms, part)(1)
    told = [(run.arm, run.seed, run.steps, tuple(run.tags.items())) for run in runs]
    assert len(set(told)) == len(told)
    made = {(str(run.config), run.steps, run.warm_steps) for run in runs}
    assert len(made) >= len(runs) - 2  # the base itself may be an arm twice, e.g. its own range
