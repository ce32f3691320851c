"""Between rollouts and a checkpoint: what a policy is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from vla_energy.actions import RawActions
from vla_energy.arms import split_arm
from vla_energy.rollout.world import Observation

ARMS = {
    "policy": "the policy's own chunk",
    "retrieve": "the chunk of the training set's nearest context, no gate",
    "rerank": "lowest energy among the policy's chunk, inner layers' and noise, or more samples of it, gated",
    "rerank+retrieve": "the same with retrieved chunks among the candidates, gated",
    "refine": "descent on the energy from the policy's chunk, gated",
    "recommended": "for each task what preflight recommends, else the policy's chunk",
    "replan": "the policy's chunk, executed for as long as the energy of its rest stays low",
}
"""Arms there are. `ARM@n` asks for a new chunk every n steps instead of every `replan_every`."""
_NEEDS = (
    "rerank, refine and replan need an energy head beside it, retrieve a memory (vla-energy memory), recommended "
    "a verdict (vla-energy preflight)"
)


@dataclass(frozen=True)
class Decision:
    """The policy's answer to one observation.

    Attributes:
        actions: chunk `(H, A)` in the robot's units.
        accepted: whether it is another chunk than the policy's own.
        telemetry: numbers worth keeping (energies, margins); averaged over the episode in its record.
        execute: how many actions to execute before the next decision; None leaves it to the settings.
        memo: what the policy wants to see again at the episode's next decision.
    """

    actions: RawActions
    accepted: bool = False
    telemetry: Mapping[str, float] = field(default_factory=dict)
    execute: int | None = None
    memo: Any = None


@dataclass(frozen=True)
class Request:
    """What a policy is asked.

    Attributes:
        observation: what the robot sees.
        generator: on the CPU; the only source of randomness for this row.
        previous: the episode's last decision, None at its start.
        executed: actions of `previous` that were executed.
    """

    observation: Observation
    generator: torch.Generator
    previous: Decision | None = None
    executed: int = 0


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

    def act(self, requests: Sequence[Request], arm: str) -> Sequence[Decision]:
        """Decides for a batch of independent episodes: one decision a request, in order.

        Args:
            requests: a row each.
            arm: how to choose, one of `arms`, without `@n`.
        """
        ...


def check_arms(arms: Sequence[str], available: AbstractSet[str]) -> None:
    """Raises ValueError naming unknown arms, those this checkpoint cannot run, and what `split_arm` refuses."""
    names = [split_arm(arm)[0] for arm in arms]
    if unknown := [name for name in names if name not in available and name not in ARMS]:
        raise ValueError(f"unknown arm(s): {', '.join(unknown)}; known: {', '.join(sorted({*ARMS, *available}))}")
    if missing := [name for name in names if name not in available]:
        raise ValueError(
            f"this checkpoint cannot run arm(s) {', '.join(missing)}, only {', '.join(sorted(available))}: {_NEEDS}"
        )
