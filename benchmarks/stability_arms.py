"""The variants that `stability.py` trains: presets, ranges and temperatures, each remedy alone and each left out."""

from __future__ import annotations

from typing import Any

from training import Run

from vla_energy.config import PRESETS, RANGES, EnergyConfig

# The originals' width for contexts of 64 in the stored goldens; 512 belongs to contexts of 4096.
SMALL_ORIGINAL = {"name": "original", "hidden_dim": 64, "num_heads": 4, "dropout": 0.2}

Changes = dict[str, Any]


def merged(base: Changes, changes: Changes) -> Changes:
    """`base` with `changes`, dicts merged."""
    result = dict(base)
    for name, value in changes.items():
        nested = isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = merged(result[name], value) if nested else value
    return result


def preset(name: str, wide: bool = False, **changes: Any) -> EnergyConfig:
    """A preset with changes; the original head narrowed for contexts of 128 unless `wide`."""
    base = PRESETS[name]
    if base.get("head", {}).get("name") == "original" and not wide:
        base = merged(base, {"head": SMALL_ORIGINAL})
    return EnergyConfig.from_dict(merged(base, changes))


# The hinge in place of the softmax losses.
HINGE = {"loss": {"info_nce": 0.0, "listwise": 0.0, "margin": 1.0, "margin_sources": (), "mix_steps": 0}}


def presets(steps: int, seeds: int) -> list[Run]:
    """Every preset, with and without warm-up (a third of the steps), InfoNCE and hinge."""
    runs = []
    for name in PRESETS:
        for warm in (0, steps // 3):
            for loss, changes in (("as preset", {}), ("hinge", HINGE)):
                tags = {"warm_up": bool(warm), "loss": loss}
                config = preset(name, **changes)
                runs += [Run(name, config, steps, seed, warm_steps=warm, tags=tags) for seed in range(seeds)]
    return runs


def long(steps: int, seeds: int) -> list[Run]:
    """The original and the recommended, long."""
    return [Run(name, preset(name), steps, seed) for seed in range(seeds) for name in ("recommended", "original")]


def at_preset_width(steps: int, seeds: int) -> list[Run]:
    """The original with the 512 of its preset, on the same features."""
    return [Run("original, width 512", preset("original", wide=True), steps, seed) for seed in range(seeds)]


def ranges(steps: int, seeds: int) -> list[Run]:
    """Every range with the report's temperatures, in the original head and in ours."""
    runs = []
    for name in RANGES:
        anchor = 1e-3 if name == "linear" else 0.0
        for temperature in (0.5, 1.0, 3.0):
            changes = {"range": {"name": name, "anchor_weight": anchor}, "temperature": {"value": temperature}}
            tags = {"temperature": temperature}
            for base in ("original", "recommended"):
                arm = f"{base}: {name}"
                runs += [Run(arm, preset(base, **changes), steps, seed, tags=tags) for seed in range(seeds)]
    return runs


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
    "our head": {"head": {"name": "residual", "num_heads": 2, "dropout": 0.0}, "loss": {"centre": 1.0}},
}
"""Each remedy alone, in the original."""

LEFT_OUT: dict[str, Changes] = {
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
    "listwise (InfoNCE alone)": {"loss": {"listwise": 0.0, "info_nce": 0.1}},
    "InfoNCE (listwise alone)": {"loss": {"info_nce": 0.0}},
    "centre's own loss": {"loss": {"centre": 0.0}},
    "reference": {"head": {"reference": False}},
    "bound of the factor (4)": {"head": {"factor_bound": 4.0}},
    "our head (original's)": {"head": SMALL_ORIGINAL, "loss": {"centre": 0.0}},
}  # fmt: skip
"""The recommended without one part; in parentheses what stands in its place."""


def ablation(steps: int, seeds: int) -> list[Run]:
    """Each remedy alone, and each left out."""
    runs = []
    for base, variants in (("original", ALONE), ("recommended", LEFT_OUT)):
        kind = "alone" if base == "original" else "left out"
        for name, changes in variants.items():
            config = preset(base, **changes)
            runs += [Run(name, config, steps, seed, tags={"kind": kind}) for seed in range(seeds)]
    return runs
