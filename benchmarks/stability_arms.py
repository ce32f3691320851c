"""The variants that `stability.py` trains: presets, ranges and temperatures, each remedy alone and each left out."""

from __future__ import annotations

from typing import Any

from training import Run

from vla_energy.config import PRESETS, RANGES, EnergyConfig

Changes = dict[str, Any]


def merged(base: Changes, changes: Changes) -> Changes:
    """`base` with `changes`, dicts merged."""
    result = dict(base)
    for name, value in changes.items():
        nested = isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = merged(result[name], value) if nested else value
    return result


def preset(name: str, changes: Changes | None = None) -> EnergyConfig:
    """A preset with changes."""
    return EnergyConfig.from_dict(merged(PRESETS[name], changes or {}))


# The hinge in place of the softmax losses.
HINGE = {"loss": {"info_nce": 0.0, "listwise": 0.0, "margin": 1.0, "margin_sources": (), "mix_steps": 0}}


def presets(seeds: int) -> list[Run]:
    """Every preset, with and without warm-up (a third of the steps), InfoNCE and hinge."""
    runs = []
    for name in PRESETS:
        steps = _steps(preset(name))
        for warm in (0, steps // 3):
            for loss, changes in (("as preset", {}), ("hinge", HINGE)):
                tags = {"warm-up": warm, "loss": loss}
                config = preset(name, changes)
                runs += [Run(name, config, steps, seed, warm_steps=warm, tags=tags) for seed in range(seeds)]
    return runs


def _steps(config: EnergyConfig) -> int:
    """The original's head is seven times as dear at its own width, and dead or not after 250 steps."""
    return 250 if config.head.name == "original" else 600


NARROW = {"head": {"hidden_dim": 128}}
"""The original's head at the features' width: long runs of it fit an evening."""


def long(steps: int, seeds: int) -> list[Run]:
    """The recommended, before its first step and after all, and the original narrowed."""
    runs = [Run("untrained", preset("recommended"), 0, seed) for seed in range(seeds)]
    runs += [Run("recommended", preset("recommended"), steps, seed) for seed in range(seeds)]
    narrow = preset("original", NARROW)
    return runs + [Run("original, width 128", narrow, steps, seed) for seed in range(min(seeds, 2))]


def stages(seeds: int) -> list[Run]:
    """The stages for 5,000 steps, narrowed; stage 3 also without its schedule, which keeps InfoNCE low for long."""
    unmixed = {"loss": {"mix_steps": 0}}
    configs = {name: preset(name, NARROW) for name in ("stage1", "stage2", "stage3")}
    configs["stage3, no schedule"] = preset("stage3", merged(NARROW, unmixed))
    configs["stage3, hinge"] = preset("stage3", merged(NARROW, HINGE))
    configs["recommended"] = preset("recommended")
    return [Run(name, config, 5_000, seed) for seed in range(seeds) for name, config in configs.items()]


def wide(seeds: int) -> list[Run]:
    """On contexts of 4096."""
    steps = {"original": 200, "untrained": 0, "recommended": 2_000}
    configs = {name: preset("recommended" if name == "untrained" else name) for name in steps}
    return [Run(name, configs[name], steps[name], seed) for name in steps for seed in range(seeds)]


def ranges(seeds: int) -> list[Run]:
    """Every range with the original's and the report's temperature, in our head (anchored) and in the original's."""
    runs = []
    for base in ("recommended", "original"):
        for name in RANGES:
            for temperature in (0.5, 3.0):
                changes = {"range": {"name": name}, "temperature": {"value": temperature}}
                config, tags = preset(base, changes), {"temperature": temperature}
                arm, steps = f"{base}: {name}", _steps(config)
                runs += [Run(arm, config, steps, seed, tags=tags) for seed in range(seeds)]
    return runs


UNTRAINED = "all training (untrained)"
_RICH = {
    "layer_exits": {"count": 4},
    "expert_noise": {"count": 2},
    "policy_noise": {"count": 2},
    "in_batch": {"count": 7},
    "near_positive_threshold": 0.02,
}
_IN_BATCH = {"layer_exits": {"count": 0}, "expert_noise": {"count": 0}, "policy_noise": {"count": 0}}

ALONE: dict[str, Changes] = {
    "nothing (original)": {},
    "range softplus_scaled": {"range": {"name": "softplus_scaled"}},
    "range linear, anchored": {"range": {"name": "linear", "anchor_weight": 1e-3}},
    "temperature 3": {"temperature": {"value": 3.0}},
    "temperature 0.1": {"temperature": {"value": 0.1}},
    "temperature adaptive": {"temperature": {"mode": "adaptive", "value": 0.01}},
    "temperature learnable": {"temperature": {"mode": "learnable", "value": 0.5}},
    "clip 0.5, skip above 10": {"guard": {"max_grad_norm": 0.5, "skip_grad_norm": 10.0, "weight_decay": 1e-4}},
    "learning rate x 0.1": {"guard": {"lr_factor": 0.1}},
    "negatives of all sources": {"negatives": _RICH},
    "diversity": {"loss": {"diversity": 0.01}},
    "listwise target": {"loss": {"info_nce": 0.0, "listwise": 1.0}, "negatives": _RICH},
    "distance regression": {"loss": {"info_nce": 0.0, "distance_regression": 0.01}, "negatives": _RICH},
    "log-q correction": {"loss": {"log_q": True}},
    "hard negatives": {"negatives": {"hard": {"count": 4}}},
    "our head": {
        "head": {"name": "residual", "hidden_dim": 64, "num_heads": 2, "dropout": 0.0},
        "loss": {"centre": 1.0},
    },
}
"""Each remedy alone, in the original."""

LEFT_OUT: dict[str, Changes] = {
    UNTRAINED: {},
    "nothing (recommended)": {},
    "linear range (sigmoid)": {"range": {"name": "sigmoid"}},
    "linear range (softplus_scaled, temperature 3)": {
        "range": {"name": "softplus_scaled"}, "temperature": {"value": 3.0},
    },
    "anchor": {"range": {"anchor_weight": 0.0}},
    "clip and skip": {"guard": {"max_grad_norm": 1e30, "skip_grad_norm": 1e30}},
    "all negatives but in-batch": {"negatives": _IN_BATCH},
    "in-batch negatives": {"negatives": {"in_batch": {"count": 0}}},
    "negatives around the policy": {"negatives": {"policy_noise": {"count": 0}}},
    "smooth noise (independent steps)": {"negatives": {"policy_noise": {"correlation": 0.0}}},
    "listwise (InfoNCE alone)": {"loss": {"listwise": 0.0, "info_nce": 0.02}},
    "InfoNCE (listwise alone)": {"loss": {"info_nce": 0.0}},
    "centre's own loss": {"loss": {"centre": 0.0}},
    "reference": {"head": {"reference": False}},
    "bound of the factor (4)": {"head": {"factor_bound": 4.0}},
    "our head (original's)": {"head": PRESETS["original"]["head"], "loss": {"centre": 0.0}},
}  # fmt: skip
"""The recommended without one part; in parentheses what stands in its place."""


def left_out(seeds: int) -> list[Run]:
    """The recommended without one part each."""
    return _variants("recommended", LEFT_OUT, seeds)


def alone(seeds: int) -> list[Run]:
    """The original with one remedy each."""
    return _variants("original", ALONE, seeds)


def _variants(base: str, variants: dict[str, Changes], seeds: int) -> list[Run]:
    configs = {name: preset(base, changes) for name, changes in variants.items()}
    # One seed of everything first: a useful table also when stopped early.
    steps = {name: 0 if name == UNTRAINED else _steps(config) for name, config in configs.items()}
    return [Run(name, config, steps[name], seed) for seed in range(seeds) for name, config in configs.items()]
