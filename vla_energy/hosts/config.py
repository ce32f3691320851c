"""Settings that a patched host carries beside its own.

No `from __future__ import annotations`: draccus 0.8, which the host pins, cannot read field types given as text.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from vla_energy.config import EnergyConfig, checks


@dataclass
class HostEnergyConfig(EnergyConfig):
    """`EnergyConfig` with what the host's own flags do not say; `--energy.*` there.

    Attributes:
        enabled: off unless asked for, so that a patched host runs as before.
        learning_rate: of the head.
        warm_steps: over which it rises.
        seed: of the head's weights and of the negatives.
        new_head: with the host's `--resume True`, start a head for a run that had none.
    """

    enabled: bool = False
    learning_rate: float = 5e-4
    warm_steps: int = 200
    seed: int = 7
    new_head: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.positive("learning_rate", self.learning_rate)
        checks.count("warm_steps", self.warm_steps)
        checks.flag("new_head", self.new_head)

    def head_config(self) -> EnergyConfig:
        """The part that goes into the head's file."""
        return EnergyConfig(**{one.name: getattr(self, one.name) for one in fields(EnergyConfig)})


def energy_field() -> Any:
    """A dataclass field for the host's config."""
    return field(default_factory=HostEnergyConfig)


@dataclass
class HostRerankConfig:
    """What the host's evaluation asks of the energy head; `--energy.*` there.

    Attributes:
        enabled: off, the host's action head is used as it is.
        mode: `rerank`, `refine`, `retrieve` or `rerank+retrieve`, what the checkpoint's head and memory allow; or
            `recommended`, for each instruction what preflight recommends.
        seed: of the candidates' noise.
        strict: an exception while a chunk is chosen (hidden states, prompt, candidates, head, memory, gate) ends the
            evaluation (not the host's server, which answers every exception with an error). Else the host's own chunk
            is taken, which is logged and counted.
    """

    enabled: bool = False
    mode: str = "rerank"
    seed: int = 0
    strict: bool = False

    def __post_init__(self) -> None:
        checks.flag("energy.enabled", self.enabled)
        checks.flag("energy.strict", self.strict)


def rerank_field() -> Any:
    """A dataclass field for the host's evaluation config."""
    return field(default_factory=HostRerankConfig)
