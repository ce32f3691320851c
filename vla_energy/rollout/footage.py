"""Frames of one episode with the energy of what was executed: `vla-energy rollout --footage FILE`, for the report.

Layout of the file (JSON):
    task, instruction, arm, seed, success, steps
    decisions   `step`, `image` (JPEG, base64; of more than `MOST` decisions only every second, third ... has one, the
                others null), `accepted`, and with an energy head `energy` of the executed chunk and `energy_policy`
                of the policy's own, else null
"""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_energy.extras import require
from vla_energy.results import check_writable, write_json
from vla_energy.rollout.interface import Policy, Request

if TYPE_CHECKING:
    from vla_energy.rollout.episode import Episode

MOST = 40
"""Images kept at most."""
_SIDE, _QUALITY = 160, 70


class Footage:
    """Keeps one episode: the first one of a task with an arm.

    Args:
        path: of the file; written when the episode ends.
        task, arm, seed: of the episode.

    Raises:
        MissingExtraError: pillow is not installed.
        OSError: the file cannot be written; found now and not after the episode.
    """

    def __init__(self, path: str | Path, task: str, arm: str, seed: int) -> None:
        require("native", {"pillow": "10"})
        check_writable(path)
        self._path, self._which = Path(path), (task, arm, seed)
        self._decisions: list[dict[str, Any]] = []

    def add(self, policy: Policy, episode: Episode, request: Request) -> None:
        """Keeps what is seen and decided, if it is this episode's; call it after the decision, before its execution.

        Args:
            policy: with a method `energies(request, decision)`, see `CheckpointPolicy`, the energies are kept, too.
            episode: whose last decision answers `request`.
            request: what the policy was asked.
        """
        if not self._is_mine(episode):
            return
        decision, energies = episode.decisions[-1], getattr(policy, "energies", None)
        found = None if energies is None else energies(request, decision)
        executed, own = (None, None) if found is None else found
        kept = {"step": episode.steps, "image": encode(request.observation.images[0]), "accepted": decision.accepted}
        self._decisions.append({**kept, "energy": executed, "energy_policy": own})

    def finish(self, episode: Episode) -> None:
        """Writes the file, if the episode that has ended is this one.

        Raises:
            OSError: it cannot be written.
        """
        if not self._is_mine(episode):
            return
        every = math.ceil(len(self._decisions) / MOST)
        for number, decision in enumerate(self._decisions):
            if number % every:
                decision["image"] = None
        task, arm, seed = self._which
        about = {"task": task, "instruction": episode.instruction, "arm": arm, "seed": seed}
        outcome = {"success": episode.success, "steps": episode.steps}
        write_json(self._path, {**about, **outcome, "decisions": self._decisions})

    def _is_mine(self, episode: Episode) -> bool:
        return (episode.simulator.task, episode.arm, episode.seed) == self._which


def encode(image: np.ndarray) -> str:
    """An image `(h, w, 3)` uint8 as JPEG in base64, made smaller where a side is longer than 160 pixels."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=_QUALITY)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
