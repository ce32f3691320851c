"""The energy head's settings: plain dataclasses, parsed by draccus under `--energy.*`, stored with every checkpoint.

Every number that the stabilisation report turns is a field here, none a constant in the code. Values are checked
when a dataclass is made, so a wrong flag fails before a model is loaded. Nothing here needs torch.

No `from __future__ import annotations` in this package: draccus 0.8, which the host pins, cannot read field types
given as text.
"""

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, get_origin

from vla_energy.config import checks
from vla_energy.config.model import (
    RANGES,
    CandidatesConfig,
    HeadConfig,
    RangeConfig,
    RefineConfig,
    ReplanConfig,
    RerankConfig,
    RetrievalConfig,
)
from vla_energy.config.negatives import (
    SOURCES,
    AmplitudeConfig,
    ExpertNoiseConfig,
    GripperFlipConfig,
    HardConfig,
    InBatchConfig,
    LayerExitsConfig,
    NegativesConfig,
    PolicyNoiseConfig,
    RetrievedConfig,
    SamplesConfig,
    ShiftConfig,
    ShuffleConfig,
)
from vla_energy.config.presets import PRESETS
from vla_energy.config.training import GuardConfig, LossConfig, MonitorConfig, RolloutsConfig, TemperatureConfig

__all__ = [
    "PRESETS",
    "RANGES",
    "SOURCES",
    "AmplitudeConfig",
    "CandidatesConfig",
    "EnergyConfig",
    "ExpertNoiseConfig",
    "GripperFlipConfig",
    "GuardConfig",
    "HardConfig",
    "HeadConfig",
    "InBatchConfig",
    "LayerExitsConfig",
    "LossConfig",
    "MonitorConfig",
    "NegativesConfig",
    "PolicyNoiseConfig",
    "RangeConfig",
    "RefineConfig",
    "ReplanConfig",
    "RerankConfig",
    "RetrievalConfig",
    "RetrievedConfig",
    "RolloutsConfig",
    "SamplesConfig",
    "ShiftConfig",
    "ShuffleConfig",
    "TemperatureConfig",
]


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
    rollouts: RolloutsConfig = field(default_factory=RolloutsConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    candidates: CandidatesConfig = field(default_factory=CandidatesConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    replan: ReplanConfig = field(default_factory=ReplanConfig)
    rerank: RerankConfig = field(default_factory=RerankConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        checks.flag("enabled", self.enabled)
        checks.flag("freeze_backbone", self.freeze_backbone)
        has_centre = self.head.name != "original" or not self.loss.centre
        checks.require(has_centre, "loss.centre", self.loss.centre, "0 with head.name='original', which has no centre")

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
        checks.one_of("preset", name, PRESETS)
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
    checks.require(isinstance(data, dict), where, data, "a dict")
    known = [entry.name for entry in fields(cls)]
    unknown = sorted(str(key) for key in data if key not in known)
    if unknown:
        raise ValueError(f"{where}: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    types = {entry.name: entry.type for entry in fields(cls)}
    values = {}
    for name, value in data.items():
        if is_dataclass(types[name]):
            value = _build(types[name], value, f"{where}.{name}")
        elif get_origin(types[name]) is tuple:
            checks.require(isinstance(value, (list, tuple)), f"{where}.{name}", value, "a list")
        values[name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)
