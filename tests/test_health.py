from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_energy.config import SOURCES, EnergyConfig, MonitorConfig
from vla_energy.health import REPEAT_AFTER, SYMPTOMS, WORSE, HealthWatch

HEALTHY = {
    "energy/info_nce": 1.2,
    "energy/chance": math.log(8),
    "energy/saturated": 0.01,
    "energy/std_row": 0.4,
    "energy/nonfinite": 0.0,
    "energy/skips": 0.0,
    "energy/skips/nonfinite": 0.0,
    "energy/win_rate/in_batch": 0.9,
    "energy/win_rate/policy": 0.01,
    "energy/win_rate/policy_noise": 0.2,
    "energy/win_rate/layer_exit_3": 0.1,
    "energy/spearman": 0.5,
    "energy/masked_share": 0.1,
    "energy/no_negatives": 0.0,
    "energy/alignment": 0.3,
    "energy/min": -3.0,
    "energy/max": 12.0,
    "train/l1": 0.1,
}

# name: what makes the run ill, updates until it is told, what the message has to say
CASES: dict[str, tuple[dict[str, float], int, list[str]]] = {
    "flat": (
        {"energy/info_nce": 2.07},
        6,
        ["2.0700", "within 0.02 of ln 8 = 2.0794", "500 steps", "nothing is learned"],
    ),
    "saturated": ({"energy/saturated": 0.61}, 1, ["61.0%", "50.0%", "dead"]),
    "collapse": ({"energy/std_row": 9e-5}, 1, ["9e-05", "0.0001", "same energy"]),
    "nonfinite": (
        {"train/l1": math.nan, "energy/loss": math.inf},
        1,
        ["train/l1=nan", "energy/loss=inf", "non-finite"],
    ),
    "backwards": ({"energy/win_rate/in_batch": 0.39}, 3, ["win_rate/in_batch 0.39", "0.4", "3 updates", "sign"]),
    "masked": ({"energy/masked_share": 0.51}, 1, ["51.0%", "near"]),
    "no_negatives": ({"energy/no_negatives": 2.0}, 1, ["2 rows"]),
    "misaligned": ({"energy/alignment": -0.01}, 3, ["-0.01", "3 updates", "away"]),
    "drift": ({"energy/min": -10001.0}, 1, ["-1e+04", "range.anchor_weight"]),
}


def _anchors(warnings: list[str]) -> list[str]:
    return [re.fullmatch(r".+; see docs/troubleshooting\.md#(\w+)", warning)[1] for warning in warnings]  # type: ignore[index]


class Run:
    """A watch and a step count that goes up by 100 an update."""

    def __init__(self, config: MonitorConfig | None = None) -> None:
        self.watch, self.step = HealthWatch(config or MonitorConfig()), 0

    def update(self, **changed: Any) -> list[str]:
        return self.feed({**HEALTHY, **changed})

    def feed(self, metrics: dict[str, float]) -> list[str]:
        self.step += 100
        return self.watch.update(self.step, metrics)


def test_healthy_or_empty_metrics_give_no_warning() -> None:
    run = Run()
    for _ in range(50):
        assert run.update() == []
    for _ in range(5):
        assert run.feed({}) == []
    assert all(run.feed({key: value}) == [] for key, value in HEALTHY.items())


@pytest.mark.parametrize("name", CASES)
def test_told_when_it_begins_then_every_twentieth_and_again_after_it_had_gone(name: str) -> None:
    changed, delay, words = CASES[name]
    run = Run()
    run.update()
    for _ in range(2):
        for _ in range(delay - 1):
            assert run.update(**changed) == []
        (warning,) = run.update(**changed)
        assert _anchors([warning]) == [name]
        assert all(word in warning for word in words), warning
        for _ in range(REPEAT_AFTER - 1):
            assert run.update(**changed) == []
        assert _anchors(run.update(**changed)) == [name]
        assert run.update(**changed) == []
        assert run.feed({}) == [] and run.update(**changed) == [], "a gap is not a recovery"
        # A metric that the healthy stream lacks has to come back finite to count as well.
        assert run.update(**{key: HEALTHY.get(key, 0.0) for key in changed}) == []


# At the bound itself nothing is wrong yet.
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("saturated", 0.5),
        ("std_row", 1e-4),
        ("win_rate/in_batch", 0.4),
        ("spearman", -0.02),
        ("masked_share", 0.5),
        ("alignment", 0.0),
        ("min", -1e4),
        ("max", 1e4),
        ("info_nce", math.log(8) - 0.021),
        ("info_nce", math.log(8) + 0.021),
    ],
)
def test_bounds(key: str, value: float) -> None:
    run = Run()
    assert [run.update(**{f"energy/{key}": value}) for _ in range(10)] == [[]] * 10


def test_bounds_come_from_the_config() -> None:
    run = Run(MonitorConfig(saturated_share=0.7, flat_steps=100, flat_band=0.2, skipped_share=0.9))
    assert run.update(**{"energy/saturated": 0.65, "energy/skips": 85.0, "energy/info_nce": 1.9}) == []
    (flat,) = run.update(**{"energy/saturated": 0.65, "energy/skips": 170.0, "energy/info_nce": 1.9})
    assert "within 0.2 of ln 8 = 2.0794 (chance) for 100 steps" in flat


def test_flat_needs_every_update_and_a_chance_above_zero() -> None:
    run = Run()
    for i in range(30):
        assert run.update(**{"energy/info_nce": 1.5 if i % 5 == 4 else 2.08}) == []
    run = Run()
    for _ in range(20):
        assert run.update(**{"energy/info_nce": 0.0, "energy/chance": 0.0}) == []
    (told,) = [w for _ in range(10) for w in run.update(**{"energy/info_nce": 500.0, "energy/chance": 500.0})]
    assert "within 0.02 of 500" in told, "the logarithm is not undone where that overflows"


def test_nonfinite_energies_are_told_and_a_metric_that_joins_too() -> None:
    run = Run()
    (warning,) = run.update(**{"energy/nonfinite": 3.0})
    assert warning.startswith("energy/nonfinite=3: ")
    (warning,) = run.update(**{"energy/nonfinite": 3.0, "energy/gap": math.nan})
    assert warning.startswith("energy/nonfinite=3, energy/gap=nan: ")
    assert run.update(**{"energy/nonfinite": 3.0, "energy/gap": math.nan}) == []
    assert run.update(**{"energy/nonfinite": 0.0, "energy/gap": math.nan}) == []
    assert _anchors(run.update(**{"energy/nonfinite": 1.0, "energy/gap": math.nan})) == ["nonfinite"]


def test_a_metric_that_is_not_finite_is_judged_no_further() -> None:
    run = Run()
    for _ in range(2):
        run.update(**{"energy/alignment": -1.0})
    assert _anchors(run.update(**{"energy/alignment": math.nan, "energy/max": math.inf})) == ["nonfinite"]
    assert _anchors(run.update(**{"energy/alignment": -1.0})) == ["misaligned"], "NaN neither counts nor breaks the row"


def test_sources_that_win_are_named_one_by_one() -> None:
    run = Run()
    first = {"energy/win_rate/in_batch": 0.1}
    both = {**first, "energy/win_rate/expert_noise": 0.2}
    run.update(**first)
    run.update(**both)
    (warning,) = run.update(**both)
    assert "in_batch 0.1" in warning and "expert_noise" not in warning
    (warning,) = run.update(**both)
    assert "in_batch 0.1" in warning and "expert_noise 0.2" in warning
    assert run.update(**both) == []


def test_energies_that_fall_with_the_distance_are_backwards_whatever_the_sources() -> None:
    run = Run()
    for _ in range(2):
        assert run.feed({"energy/win_rate/samples": 0.9, "energy/spearman": -0.3}) == []
    (warning,) = run.feed({"energy/win_rate/samples": 0.9, "energy/spearman": -0.3})
    assert warning.startswith("energy/spearman -0.3, below -0.02 for 3 updates: ") and _anchors([warning]) == [
        "backwards"
    ]


def test_a_good_policy_may_win_for_ever() -> None:
    run = Run()
    assert set(WORSE) <= set(SOURCES)
    good = {
        f"energy/win_rate/{name}": 0.0 for name in (*SOURCES, "policy", "layer_exit_1", "failed") if name not in WORSE
    }
    assert [run.update(**good) for _ in range(2 * REPEAT_AFTER)] == [[]] * 2 * REPEAT_AFTER


def test_skips_are_counted_since_the_last_update_and_the_reason_is_named() -> None:
    def skips(nonfinite: float, too_large: float) -> dict[str, float]:
        reasons = {"energy/skips/nonfinite": nonfinite, "energy/skips/too_large": too_large}
        return {"energy/skips": nonfinite + too_large, **reasons}

    run = Run()
    (warning,) = run.update(**skips(2, 9))
    assert warning.startswith("11 of the last 100 steps skipped, 11.0%, most as too_large (9): ")
    assert run.update(**skips(2, 29)) == []  # lasts
    assert run.update(**skips(2, 39)) == []  # 10 of 100 is the bound: gone
    (warning,) = run.update(**skips(40, 39))
    assert "most as nonfinite (38)" in warning
    run.feed({})
    assert run.update(**skips(58, 39)) == []  # 18 of 200: gone
    assert run.update(**skips(0, 0)) == []  # the count began anew
    (warning,) = run.feed({"energy/skips": 50.0})
    assert warning.startswith("50 of the last 100 steps skipped, 50.0%: ")
    assert HealthWatch(MonitorConfig()).update(0, HEALTHY) == []


def test_a_count_that_begins_anew_is_no_recovery_and_a_reason_keeps_its_own_while_not_given() -> None:
    run = Run()
    (_,) = run.feed({"energy/skips": 50.0, "energy/skips/too_large": 50.0})
    assert run.feed({"energy/skips": 10.0, "energy/skips/too_large": 10.0}) == []
    assert run.feed({"energy/skips": 30.0}) == [], "still going on"
    assert run.feed({"energy/skips": 30.0}) == []  # gone
    reasons = {"energy/skips/too_large": 31.0, "energy/skips/nonfinite": 22.0}
    (warning,) = run.feed({"energy/skips": 53.0, **reasons})
    assert "most as nonfinite (22)" in warning, "21 of too_large, since it was last given"


def test_names_that_only_begin_alike_are_not_judged() -> None:
    run = Run()
    assert [run.update(**{"energy/alignment_std": -1.0, "energy/win_rate/in_batches": 0.0}) for _ in range(5)] == [
        []
    ] * 5


def test_bad_input_is_refused_and_changes_nothing() -> None:
    watch = HealthWatch(MonitorConfig())
    watch.update(100, HEALTHY)
    before = watch.state_dict()
    bad: Any = {"energy/gap": torch.zeros(())}
    with pytest.raises(TypeError, match="energy/gap is Tensor"):
        watch.update(200, bad)
    with pytest.raises(ValueError, match="step=100: expected more than 100"):
        watch.update(100, HEALTHY)
    with pytest.raises(ValueError, match="told"):
        watch.load_state_dict({key: value for key, value in before.items() if key != "told"})
    with pytest.raises(ValueError, match="'more'"):
        watch.load_state_dict({**before, "more": 1})
    assert watch.state_dict() == before


def test_state_is_a_copy() -> None:
    run = Run()
    run.update(**{"energy/saturated": 0.9})
    state = run.watch.state_dict()
    text = json.dumps(state)
    other = HealthWatch(MonitorConfig())
    other.load_state_dict(state)
    other.update(200, HEALTHY)
    run.update(**{"energy/alignment": -1.0})
    assert json.dumps(state) == text


def _values(*values: float) -> st.SearchStrategy[float]:
    return st.sampled_from([*values, math.nan])


STREAMS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "energy/info_nce": _values(2.07, 2.08, 1.0),
            "energy/chance": _values(math.log(8), math.log(8), 0.0),
            "energy/saturated": _values(0.1, 0.9),
            "energy/std_row": _values(0.1, 1e-6),
            "energy/nonfinite": _values(0.0, 1.0),
            "energy/skips": st.floats(0, 500),
            "energy/skips/too_large": st.floats(0, 500),
            "energy/skips/nonfinite": st.floats(0, 500),
            "energy/win_rate/in_batch": _values(0.1, 0.3, 0.5),
            "energy/win_rate/shuffle": _values(0.1, 0.3, 0.5),
            "energy/spearman": _values(-0.1, -0.5, 0.5),
            "energy/alignment": _values(-0.5, -0.1, 0.4),
            "energy/min": st.floats(),
            "energy/max": st.floats(),
        },
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=25, deadline=None)
@given(STREAMS, st.data())
def test_resumed_equals_uninterrupted(stream: list[dict[str, float]], data: st.DataObject) -> None:
    config = MonitorConfig(flat_steps=200)
    cut = data.draw(st.integers(0, len(stream)))
    whole, first, second = (HealthWatch(config) for _ in range(3))
    steps = [100 * (i + 1) for i in range(len(stream))]
    expected = [whole.update(step, metrics) for step, metrics in zip(steps, stream, strict=True)]
    found = [first.update(step, metrics) for step, metrics in zip(steps[:cut], stream[:cut], strict=True)]
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    found += [second.update(step, metrics) for step, metrics in zip(steps[cut:], stream[cut:], strict=True)]
    assert found == expected
    assert second.state_dict() == whole.state_dict()


def _naive_told(history: list[float | None], is_ill: list[bool | None]) -> list[bool]:
    """Told or not at each update, from the whole history: by what was told before, was it well since, how long ago?"""
    told: list[bool] = []
    for now in range(len(history)):
        before = [i for i in range(now) if told[i]]
        if not is_ill[now]:
            told.append(False)
        elif not before or any(is_ill[i] is False for i in range(before[-1], now)):
            told.append(True)
        else:
            told.append(now - before[-1] >= REPEAT_AFTER)
    return told


_HISTORY = st.lists(st.sampled_from([-0.5, -0.5, -0.5, -0.5, -0.5, -0.5, 0.5, None]), min_size=1, max_size=70)


@settings(max_examples=25, deadline=None)
@given(_HISTORY, st.sampled_from(["alignment", "win_rate/in_batch", "std_row"]))
def test_what_is_told_equals_the_naive_twin(history: list[float | None], name: str) -> None:
    is_ill: list[bool | None] = []
    for now, value in enumerate(history):
        values = [past for past in history[: now + 1] if past is not None]
        enough = 1 if name == "std_row" else 3
        last = values[-enough:]
        is_ill.append(None if value is None else len(last) == enough and max(last) < 0)
    watch = HealthWatch(MonitorConfig())
    found = [
        bool(watch.update(step, {} if value is None else {f"energy/{name}": value}))
        for step, value in enumerate(history)
    ]
    assert found == _naive_told(history, is_ill)


def test_every_setting_that_a_remedy_names_exists() -> None:
    config = EnergyConfig().to_dict()
    named = [found for symptom in SYMPTOMS for found in re.findall(r"\b([a-z]+)\.([a-z_]+)", symptom.remedy)]
    assert len(named) > 8
    for group, name in named:
        assert name in config[group], f"{group}.{name}"
    assert {symptom.name for symptom in SYMPTOMS} == {*CASES, "skipped"}
