"""The settings: presets, round trips, and errors that name the field."""

from __future__ import annotations

import json

import draccus
import pytest

from vla_energy.config import (
    PRESETS,
    AmplitudeConfig,
    CandidatesConfig,
    EnergyConfig,
    ExpertNoiseConfig,
    GripperFlipConfig,
    GuardConfig,
    HardConfig,
    HeadConfig,
    InBatchConfig,
    LayerExitsConfig,
    LossConfig,
    NegativesConfig,
    PolicyNoiseConfig,
    RangeConfig,
    RolloutsConfig,
    SamplesConfig,
    TemperatureConfig,
)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_survives_json(name: str) -> None:
    config = EnergyConfig.preset(name)
    assert EnergyConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False))) == config


def test_presets_are_fresh_and_original_is_the_reports() -> None:
    config = EnergyConfig.preset("original")
    assert (config.range.name, config.range.constants(), config.temperature.value) == ("sigmoid", (1.0, 1.0, 1e-6), 0.5)
    config.range.name = "linear"
    assert EnergyConfig.preset("original").range.name == "sigmoid"
    assert EnergyConfig.preset("recommended") == EnergyConfig()


def test_defaults_are_those_that_were_measured() -> None:
    """docs/stability.md is about these numbers: who changes one measures again."""
    config = EnergyConfig()
    assert (config.head.name, config.head.reference, config.head.factor_bound) == ("residual", True, 1.5)
    assert (config.range.name, config.range.anchor_weight, config.temperature.value) == ("linear", 1e-3, 1.0)
    assert (config.guard.max_grad_norm, config.guard.skip_grad_norm, config.guard.lr_factor) == (0.5, 100.0, 1.0)
    assert (config.loss.info_nce, config.loss.listwise, config.loss.centre) == (0.002, 0.02, 1.0)
    stages = [EnergyConfig.preset(f"stage{number}").guard for number in (1, 2, 3)]
    assert [(guard.lr_factor, guard.skip_grad_norm) for guard in stages[1:]] == [(0.1, 10.0)] * 2


def test_range_constants_follow_the_name_unless_set() -> None:
    assert RangeConfig(name="softplus_scaled").constants() == (5.0, 0.1, 1e-3)
    assert RangeConfig(name="bounded", scale=2.0).constants() == (2.0, 1.0, 0.1)


def test_draccus_reads_nested_flags() -> None:
    flags = ["--range.name", "bounded", "--range.scale", "3", "--negatives.expert_noise.stds", "[0.2]"]
    config = draccus.parse(EnergyConfig, args=[*flags, "--enabled", "False"])
    assert not config.enabled
    assert config.range.constants() == (3.0, 1.0, 0.1)
    assert config.negatives.expert_noise.stds == (0.2,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EnergyConfig.preset("stage9"), "original, stage1, stage2, stage3, recommended"),
        (lambda: RangeConfig(name="tanh"), "sigmoid, relu_scaled, softplus, bounded, softplus_scaled, linear"),
        (lambda: RangeConfig(scale=0.0), "range.scale"),
        (lambda: TemperatureConfig(mode="warm"), "one of fixed, adaptive, learnable"),
        (lambda: TemperatureConfig(value=float("nan")), "temperature.value"),
        (lambda: HeadConfig(hidden_dim=65), "multiple of head.num_heads"),
        (lambda: ExpertNoiseConfig(stds=(0.1, -1.0)), "negatives.expert_noise.stds"),
        (lambda: LossConfig(info_nce=0.0, listwise=0.0), "at least one weight"),
        (lambda: LossConfig(margin_sources=("layer_exits", "noise")), "loss.margin_sources='noise'.*expert_noise"),
        (lambda: HeadConfig(name="mlp"), "one of residual, original"),
        (lambda: EnergyConfig(head=HeadConfig(name="original")), "loss.centre"),
        (lambda: TemperatureConfig("learnable", 20.0), "within temperature.minimum"),
        (lambda: HardConfig(count=9, pool=8), "at most hard.pool=8"),
        (lambda: GripperFlipConfig(count=2), "0 or 1"),
        (lambda: AmplitudeConfig(factors=(1.0,)), "no factor of 1"),
        (lambda: CandidatesConfig(samples=-1), "candidates.samples=-1: expected an integer, 0 or more"),
        (lambda: CandidatesConfig(sample_temperature=0.0), "candidates.sample_temperature=0.0"),
        (lambda: SamplesConfig(count=-1), "negatives.samples.count=-1: expected an integer, 0 or more"),
        (lambda: SamplesConfig(steps=0), "negatives.samples.steps=0: expected an integer, 1 or more"),
        (lambda: CandidatesConfig(crops=-1), "candidates.crops=-1: expected an integer, 0 or more"),
        (lambda: CandidatesConfig(crop_scale=0.0), "candidates.crop_scale=0.0: expected 0 < crop_scale <= 1"),
        (lambda: CandidatesConfig(crop_scale=1.1), "candidates.crop_scale=1.1"),
        (lambda: GuardConfig(skip_grad_norm=0.1), "at least max_grad_norm"),
        (lambda: RolloutsConfig(dataset=3), "rollouts.dataset=3: expected a dataset's name"),  # type: ignore[arg-type]
        (lambda: RolloutsConfig(batch_size=0), "rollouts.batch_size=0"),
        (lambda: RolloutsConfig(discount=1.1), "0 <= discount <= 1"),
        (lambda: RolloutsConfig(discount=float("nan")), "rollouts.discount"),
        (lambda: RolloutsConfig(outcome=-1.0), "rollouts.outcome"),
        (lambda: RolloutsConfig(failed=-1), "rollouts.failed"),
        (lambda: RolloutsConfig("r", outcome=0.0, failed=0), "at least one above 0"),
        (lambda: RolloutsConfig("r", batch_size=2, failed=3), "at most rollouts.batch_size=2"),
        (lambda: EnergyConfig.from_dict({"head": {"width": 3}}), "energy.head: unknown width; known: name, hidden_dim"),
        (lambda: EnergyConfig.from_dict({"head": 3}), "energy.head=3"),
        (
            lambda: NegativesConfig(LayerExitsConfig(0), ExpertNoiseConfig(0), PolicyNoiseConfig(0), InBatchConfig(0)),
            "at least one source",
        ),
    ],
)
def test_a_wrong_value_is_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
