"""Between rollouts and a checkpoint: what a policy is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from vla_energy.actions import RawActions

ARMS = ("policy", "rerank")
"""Arms there are. `policy` executes the policy's own chunk, `rerank` the one chosen by the energy head."""


@dataclass(frozen=True)
class Decision:
    """The policy's answer to one observation.

    Attributes:
        actions: chunk `(H, A)` in the robot's units.
        accepted: whether it is another chunk than the policy's own.
        telemetry: numbers worth keeping (energies, margins); averaged over the episode in its record.
    """

    actions: RawActions
    accepted: bool = False
    telemetry: Mapping[str, float] = field(default_factory=dict)


class Policy(Protocol):
    """What rollouts need of a checkpoint."""

    @property
    def horizon(self) -> int:
        """H, the length of a chunk."""
        ...

    @property
    def action_dim(self) -> int:
        """A."""
        ...

    @property
    def arms(self) -> AbstractSet[str]:
        """Arms this checkpoint can run."""
        ...

    @property
    def metadata(self) -> dict[str, Any]:
        """What to write about the checkpoint into the results; JSON."""
        ...

    def act(
        self,
        images: list[np.ndarray],
        proprios: list[np.ndarray],
        instructions: list[str],
        arm: str,
        generators: list[torch.Generator],
    ) -> Sequence[Decision]:
        """Decides for a batch of independent episodes.

        Args:
            images: a row each, `(num_images, h, w, 3)` uint8.
            proprios: a row each, `(P,)` float32 in the robot's units.
            instructions: a row each.
            arm: how to choose, one of `arms`.
            generators: a row each (CPU), the only source of randomness for that row.

        Returns:
            One decision a row, in order.
        """
        ...


def check_arms(arms: list[str], available: AbstractSet[str]) -> None:
    """Raises ValueError naming unknown arms and those this checkpoint cannot run."""
    if unknown := [arm for arm in arms if arm not in available and arm not in ARMS]:
        raise ValueError(f"unknown arm(s): {', '.join(unknown)}; known: {', '.join(sorted({*ARMS, *available}))}")
    if missing := [arm for arm in arms if arm not in available]:
        raise ValueError(
            f"this checkpoint cannot run arm(s) {', '.join(missing)}, only {', '.join(sorted(available))}: "
            "reranking needs an energy head in the checkpoint's folder"
        )
