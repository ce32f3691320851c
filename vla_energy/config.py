"""The energy head's settings: plain dataclasses, parsed by draccus under `--energy.*`, stored with every checkpoint.

Every number that the stabilisation report turns is a field here, none a constant in the code. Values are checked
when a dataclass is made, so a wrong flag fails before a model is loaded. Nothing here needs torch.

No `from __future__ import annotations` here: draccus 0.8, which the host pins, cannot read field types given as text.
"""

import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

RANGES: dict[str, tuple[float, float, float]] = {
    "sigmoid": (1.0, 1.0, 1e-6),
    "relu_scaled": (10.0, 1.0, 1e-3),
    "softplus": (2.0, 0.5, 1e-3),
    "bounded": (9.9, 1.0, 0.1),
    "softplus_scaled": (5.0, 0.1, 1e-3),
    "linear": (1.0, 1.0, 0.0),
}
"""Default (scale, slope, offset) of each range `scale * f(slope * raw) + offset`; report, remedies 1, 1a, 1b, 1c."""

TEMPERATURE_MODES = ("fixed",)


def _require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r}: expected {expected}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _positive(name: str, value: Any) -> None:
    _require(_is_number(value) and value > 0, name, value, "a finite number above 0")


def _not_negative(name: str, value: Any) -> None:
    _require(_is_number(value) and value >= 0, name, value, "a finite number, 0 or more")


def _count(name: str, value: Any, least: int = 0) -> None:
    _require(
        isinstance(value, int) and not isinstance(value, bool) and value >= least,
        name,
        value,
        f"an integer, {least} or more",
    )


def _flag(name: str, value: Any) -> None:
    _require(isinstance(value, bool), name, value, "True or False")


def _stds(name: str, value: Any, count: int) -> None:
    _require(isinstance(value, (tuple, list)), name, value, "a list of numbers")
    _require(len(value) > 0 or count == 0, name, value, "at least one standard deviation")
    for std in value:
        _positive(name, std)


@dataclass
class HeadConfig:
    """Size of the energy head.

    Attributes:
        hidden_dim: width; a multiple of `num_heads`.
        deviation_scale: an action's deviation from the centre that the head predicts from the context is measured in
            this unit (normalised action units): the size of a good policy's error, where candidates must be told apart.
    """

    hidden_dim: int = 64
    num_heads: int = 2
    num_layers: int = 1
    dropout: float = 0.0
    deviation_scale: float = 0.05

    def __post_init__(self) -> None:
        for name in ("hidden_dim", "num_heads", "num_layers"):
            _count(f"head.{name}", getattr(self, name), 1)
        multiple = self.hidden_dim % self.num_heads == 0
        _require(multiple, "head.hidden_dim", self.hidden_dim, f"a multiple of head.num_heads={self.num_heads}")
        _require(_is_number(self.dropout) and 0 <= self.dropout < 1, "head.dropout", self.dropout, "0 <= dropout < 1")
        _positive("head.deviation_scale", self.deviation_scale)


@dataclass
class RangeConfig:
    """Energy range `scale * f(slope * raw) + offset` (report, remedy 1), f given by `name`.

    Attributes:
        name: sigmoid, relu_scaled, softplus, bounded, softplus_scaled or linear.
        scale, slope, offset: the constants; None takes the name's own, see `RANGES`.
        anchor_weight: weight of the mean of E^2 in the loss; removes the null direction of row-wise losses, an offset
            that depends on the context alone.
    """

    name: str = "linear"
    scale: float | None = None
    slope: float | None = None
    offset: float | None = None
    anchor_weight: float = 1e-3

    def __post_init__(self) -> None:
        _require(self.name in RANGES, "range.name", self.name, f"one of {', '.join(RANGES)}")
        scale, slope, offset = self.constants()
        _positive("range.scale", scale)
        _positive("range.slope", slope)
        _require(_is_number(offset), "range.offset", offset, "a finite number")
        _not_negative("range.anchor_weight", self.anchor_weight)

    def constants(self) -> tuple[float, float, float]:
        """(scale, slope, offset), each the field's value or the name's own."""
        scale, slope, offset = RANGES[self.name]
        return (
            scale if self.scale is None else self.scale,
            slope if self.slope is None else self.slope,
            offset if self.offset is None else self.offset,
        )


@dataclass
class TemperatureConfig:
    """Temperature of `logits = -energy / temperature` (report, remedy 2)."""

    mode: str = "fixed"
    value: float = 1.0

    def __post_init__(self) -> None:
        _require(
            self.mode in TEMPERATURE_MODES, "temperature.mode", self.mode, f"one of {', '.join(TEMPERATURE_MODES)}"
        )
        _positive("temperature.value", self.value)


@dataclass
class LayerExitsConfig:
    """Chunks decoded from inner layers; layer 0 (a constant) and the last (the policy) are left out.

    Attributes:
        count: at most so many, spread evenly over the inner layers and ending with the last of them; 0 is off.
        weight: weight of each of these chunks in the losses.
    """

    count: int = 4
    weight: float = 1.0

    def __post_init__(self) -> None:
        _count("negatives.layer_exits.count", self.count)
        _positive("negatives.layer_exits.weight", self.weight)


@dataclass
class ExpertNoiseConfig:
    """Gaussian noise on the expert chunk.

    Attributes:
        stds: standard deviations in normalised action units.
        count: chunks per standard deviation; 0 is off.
    """

    count: int = 2
    weight: float = 1.0
    stds: tuple[float, ...] = (0.1, 0.3, 0.5)

    def __post_init__(self) -> None:
        _count("negatives.expert_noise.count", self.count)
        _positive("negatives.expert_noise.weight", self.weight)
        _stds("negatives.expert_noise.stds", self.stds, self.count)


@dataclass
class PolicyNoiseConfig:
    """The policy's own chunk, and Gaussian noise on it: the region in which inference chooses.

    Attributes:
        stds: standard deviations in normalised action units, around the size of the policy's error.
        count: noisy chunks per standard deviation, beside the policy's own chunk; 0 turns the noise and the chunk off.
    """

    count: int = 2
    weight: float = 1.0
    stds: tuple[float, ...] = (0.02, 0.05, 0.1)

    def __post_init__(self) -> None:
        _count("negatives.policy_noise.count", self.count)
        _positive("negatives.policy_noise.weight", self.weight)
        _stds("negatives.policy_noise.stds", self.stds, self.count)


@dataclass
class InBatchConfig:
    """Expert chunks of other rows of the batch.

    Attributes:
        count: at most so many of the other B - 1 rows, drawn without replacement; 0 is off.
    """

    count: int = 7
    weight: float = 1.0

    def __post_init__(self) -> None:
        _count("negatives.in_batch.count", self.count)
        _positive("negatives.in_batch.weight", self.weight)


@dataclass
class NegativesConfig:
    """Sources of negatives (report, remedy 3).

    Attributes:
        near_positive_threshold: a negative nearer to the expert than this (mean absolute distance, normalised units)
            is no negative: one-hot losses leave it out and count it, graded ones keep it.
    """

    layer_exits: LayerExitsConfig = field(default_factory=LayerExitsConfig)
    expert_noise: ExpertNoiseConfig = field(default_factory=ExpertNoiseConfig)
    policy_noise: PolicyNoiseConfig = field(default_factory=PolicyNoiseConfig)
    in_batch: InBatchConfig = field(default_factory=InBatchConfig)
    near_positive_threshold: float = 0.02

    def __post_init__(self) -> None:
        _not_negative("negatives.near_positive_threshold", self.near_positive_threshold)
        sources = (self.layer_exits, self.expert_noise, self.policy_noise, self.in_batch)
        counts = [source.count for source in sources]
        _require(any(counts), "negatives.*.count", counts, "at least one source above 0")


@dataclass
class LossConfig:
    """Weights of the losses; 0 turns one off.

    The defaults are small because graded energies are steep (1 / distance_scale): with weights of 1 the gradient norm
    sits near 20, above `guard.skip_grad_norm`; Adam's step does not depend on the factor. InfoNCE is the smaller one:
    with equal weights the head learns "expert or not" and ranks chunks around the policy less well (Spearman 0.73
    against 0.82 after 1,000 steps on synthetic contexts, one seed).

    Attributes:
        info_nce: one-hot softmax of the expert against the negatives.
        listwise: cross-entropy to `softmax(-distance / distance_scale)` over expert and negatives.
        margin: `relu(E_expert - E_negative + margin_width)`.
        centre: L1 of the head's centre (the point from which it measures deviations) to the expert's chunk. Row-wise
            losses alone leave the centre far from the expert, where deviations say little.
        distance_scale: mean absolute distance (normalised units) that lowers a chunk's target by a factor e.
    """

    info_nce: float = 0.01
    listwise: float = 0.1
    margin: float = 0.0
    centre: float = 1.0
    distance_scale: float = 0.03
    margin_width: float = 0.5

    def __post_init__(self) -> None:
        for name in ("info_nce", "listwise", "margin", "centre"):
            _not_negative(f"loss.{name}", getattr(self, name))
        weights = (self.info_nce, self.listwise, self.margin)
        _require(any(weights), "loss.info_nce, listwise, margin", weights, "at least one weight above 0")
        _positive("loss.distance_scale", self.distance_scale)
        _positive("loss.margin_width", self.margin_width)


@dataclass
class GuardConfig:
    """The optimiser step of the head (report, remedy 6).

    Attributes:
        max_grad_norm: the gradient's norm is clipped to this.
        skip_grad_norm: above this norm, or where it is not finite, the step is skipped.
    """

    max_grad_norm: float = 0.5
    skip_grad_norm: float = 10.0
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        _positive("guard.max_grad_norm", self.max_grad_norm)
        _positive("guard.skip_grad_norm", self.skip_grad_norm)
        _not_negative("guard.weight_decay", self.weight_decay)
        ordered = self.skip_grad_norm >= self.max_grad_norm
        _require(ordered, "guard.skip_grad_norm", self.skip_grad_norm, f"at least max_grad_norm={self.max_grad_norm}")


@dataclass
class CandidatesConfig:
    """Proposals at inference; the policy's own chunk always comes first.

    Attributes:
        num_candidates: noisy copies of the policy's chunk, spread over `noise_stds`.
        noise_stds: standard deviations in normalised action units.
        layer_exits: add the chunks decoded from inner layers.
    """

    num_candidates: int = 16
    noise_stds: tuple[float, ...] = (0.02, 0.05, 0.1)
    layer_exits: bool = True

    def __post_init__(self) -> None:
        _count("candidates.num_candidates", self.num_candidates)
        _stds("candidates.noise_stds", self.noise_stds, self.num_candidates)
        _flag("candidates.layer_exits", self.layer_exits)


@dataclass
class RerankConfig:
    """The gate of the reranker.

    Attributes:
        margin: a candidate replaces the policy's chunk only if its energy is lower by more than this.
    """

    margin: float = 0.5

    def __post_init__(self) -> None:
        _not_negative("rerank.margin", self.margin)


@dataclass
class MonitorConfig:
    """Monitors.

    Attributes:
        every: optimiser steps between two measurements.
    """

    every: int = 100

    def __post_init__(self) -> None:
        _count("monitor.every", self.every, 1)


@dataclass
class EnergyConfig:
    """Everything about the energy head; `--energy.*` on the command line.

    Attributes:
        enabled: False leaves the fine-tuning bit-identical to a run without the plugin.
        freeze_backbone: train the head alone.
    """

    enabled: bool = True
    freeze_backbone: bool = False
    head: HeadConfig = field(default_factory=HeadConfig)
    range: RangeConfig = field(default_factory=RangeConfig)
    temperature: TemperatureConfig = field(default_factory=TemperatureConfig)
    negatives: NegativesConfig = field(default_factory=NegativesConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    candidates: CandidatesConfig = field(default_factory=CandidatesConfig)
    rerank: RerankConfig = field(default_factory=RerankConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        _flag("enabled", self.enabled)
        _flag("freeze_backbone", self.freeze_backbone)

    @classmethod
    def preset(cls, name: str) -> "EnergyConfig":
        """A stage of the report, or what our own measurements recommend (the defaults).

        Learning rate and warm-up are flags of the training script (`energy_learning_rate`, `energy_warm_steps`), so
        they are not part of a preset.

        Args:
            name: original, stage1, stage2, stage3 or recommended.

        Raises:
            ValueError: no such preset; the message lists those there are.
        """
        _require(name in PRESETS, "preset", name, f"one of {', '.join(PRESETS)}")
        return cls.from_dict(PRESETS[name])

    def to_dict(self) -> dict[str, Any]:
        """Nested dict of JSON types; `from_dict` is its inverse."""
        return _plain(asdict(self))

    @classmethod
    def from_dict(cls, data: Any) -> "EnergyConfig":
        """The config with the values in `data`; what is missing keeps its default.

        Raises:
            ValueError: an unknown key, named with its place, or a value that is not allowed.
        """
        return _build(cls, data, "energy")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _build(cls: Any, data: Any, where: str) -> Any:
    _require(isinstance(data, dict), where, data, "a dict")
    known = [entry.name for entry in fields(cls)]
    unknown = sorted(str(key) for key in data if key not in known)
    if unknown:
        raise ValueError(f"{where}: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    types = {entry.name: entry.type for entry in fields(cls)}
    values = {}
    for name, value in data.items():
        if is_dataclass(types[name]):
            value = _build(types[name], value, f"{where}.{name}")
        values[name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


_IN_BATCH_ONLY = {
    "layer_exits": {"count": 0},
    "expert_noise": {"count": 0},
    "policy_noise": {"count": 0},
    "in_batch": {"count": 1024},
    "near_positive_threshold": 0.0,
}
# AdamW's own weight decay and no bound on the norm: the original passed neither.
_ORIGINAL_GUARD = {"max_grad_norm": 1.0, "skip_grad_norm": 1e30, "weight_decay": 0.01}
_SOFTPLUS = {"name": "softplus_scaled", "anchor_weight": 0.0}
_INFO_NCE_ONLY = {"centre": 0.0, "info_nce": 1.0, "listwise": 0.0}

PRESETS: dict[str, dict[str, Any]] = {
    "original": {
        "range": {"name": "sigmoid", "anchor_weight": 0.0},
        "temperature": {"value": 0.5},
        "negatives": _IN_BATCH_ONLY,
        "loss": _INFO_NCE_ONLY,
        "guard": _ORIGINAL_GUARD,
    },
    "stage1": {
        "range": _SOFTPLUS,
        "temperature": {"value": 3.0},
        "negatives": _IN_BATCH_ONLY,
        "loss": _INFO_NCE_ONLY,
        "guard": {**_ORIGINAL_GUARD, "max_grad_norm": 0.5},
    },
    "stage2": {"range": _SOFTPLUS, "temperature": {"value": 3.0}, "negatives": _IN_BATCH_ONLY, "loss": _INFO_NCE_ONLY},
    "stage3": {
        "range": _SOFTPLUS,
        "temperature": {"value": 3.0},
        "negatives": {"policy_noise": {"count": 0}},
        "loss": {"centre": 0.0, "info_nce": 0.5, "margin": 0.5, "listwise": 0.0},
    },
    "recommended": {},
}
"""What each preset changes in the defaults."""
