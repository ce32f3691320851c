"""Reranking inside a host's evaluation: a stand-in for its action head that may answer with another chunk.

The host unnormalises what its action head returns, so chunks are scored before that, in normalised units.
"""

from __future__ import annotations

import atexit
import logging
import sys
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vla_energy.advisor import load_advisor
from vla_energy.arms import BOTH, MODES, split_arm
from vla_energy.fallback import Fallback
from vla_energy.hosts.hidden_states import (
    HiddenStates,
    HostError,
    infer_horizon,
    layer_actions,
    predicted_positions,
    visible_context,
)
from vla_energy.hosts.prompts import Instructions
from vla_energy.hosts.training import host_statistics
from vla_energy.modes import Frame

logger = logging.getLogger(__name__)

RECOMMENDED = "recommended"
"""Mode: for each instruction what preflight recommends, else the policy's chunk."""


def rerank_action_head(action_head: Any, host: Any, vla: Any) -> Any:
    """The action head itself where the energy is off, else one that reranks; call it once, before the first episode.

    Args:
        action_head: the host's L1 action head.
        host: its evaluation config, with `energy`, `pretrained_checkpoint` and `unnorm_key`.
        vla: the model, with `norm_stats`.

    Raises:
        HostError: no L1 head, or no statistics of `unnorm_key`.
        CheckpointError, CompatibilityError: head, memory or gates are missing, damaged or of another policy.
        ValueError: a mode that the checkpoint cannot run, or a recommended one that the host cannot.
    """
    if not host.energy.enabled:
        return action_head
    with torch.inference_mode(False):  # tensors made in inference mode can never be refined through
        return RerankedActionHead(action_head, host, vla)


def _needed(mode: str) -> str:
    """What is missing for a mode."""
    head = "energy_head--*_checkpoint.safetensors (fine-tuning with --energy.enabled True writes it)"
    memory = "chunk_memory--*_checkpoint.safetensors (vla-energy memory writes it)"
    if mode not in MODES:
        return f"the modes are {', '.join(MODES)} and {RECOMMENDED}"
    return f"it needs {({'retrieve': memory, BOTH: f'{head} and {memory}'}).get(mode, head)} in that folder"


class RerankedActionHead:
    """Answers like the host's action head; every other attribute is that head's. See `rerank_action_head`.

    Any exception while it chooses gives the host's own chunk, a `HostError` too (no hidden states, another prompt).
    With `--energy.strict True` it ends the program: as an exception the host would count it as a failed episode.

    Attributes:
        counts: `chunks` asked for, `accepted` among them.
        fallback: what failed so far.
    """

    def __init__(self, action_head: Any, host: Any, vla: Any) -> None:
        if action_head is None or hasattr(action_head, "noise_scheduler"):
            raise HostError("--energy.enabled True needs the L1 action head (--use_l1_regression True)")
        self._head = action_head
        statistics: Mapping[str, Any] = vla.norm_stats
        self._statistics = host_statistics(statistics, str(host.unnorm_key))
        hidden_size = int(vla.config.text_config.hidden_size)
        self._action_dim = self._statistics.action.dim
        self._mode = host.energy.mode
        self._horizon = infer_horizon(action_head, self._action_dim, hidden_size)
        device = next(action_head.parameters()).device
        folder = Path(host.pretrained_checkpoint)
        self._advisor = load_advisor(folder, self._statistics, self._horizon, self._action_dim, hidden_size, device)
        self._tasks: dict[str, str] = {}
        self._instructions: Instructions | None = None
        if self._mode == RECOMMENDED:
            self._tasks = recommended_modes(self._advisor.tasks, self._advisor.modes, self._horizon)
            self._instructions = Instructions(vla, folder)
        elif self._mode not in self._advisor.modes:
            raise ValueError(
                f"--energy.mode {self._mode}: {folder} allows {', '.join(self._advisor.modes) or 'none'}; "
                f"{_needed(self._mode)}"
            )
        self._generator = torch.Generator().manual_seed(host.energy.seed)
        self._hidden = HiddenStates(vla)
        self.counts: Counter[str] = Counter()
        self._strict = bool(getattr(host.energy, "strict", False))
        self.fallback = Fallback(self._strict)
        used = dict.fromkeys(self._tasks.values()) if self._instructions else [self._mode]
        logger.info("%s, margins %s", self._mode, {mode: self._advisor.gates[mode] for mode in used})
        atexit.register(_say_counts, weakref.ref(self))

    def __getattr__(self, name: str) -> Any:
        if name == "_head":  # not yet set: copying and unpickling ask before __init__
            raise AttributeError(name)
        return getattr(self._head, name)

    @torch.no_grad()
    def predict_action(self, states: Tensor) -> Tensor:
        """`(B,H,A)` normalised, in the dtype of the host's head; its own chunk bit for bit where the gate is shut.

        Args:
            states: `(B, H*A, D)` of the action tokens, as the host gives them.

        Raises:
            SystemExit: with `--energy.strict True`, choosing failed.
        """
        chunk = self._head.predict_action(states)
        self.counts.update(chunks=len(chunk), accepted=0)
        try:
            return self.fallback(lambda: self._choose(states, chunk), lambda: chunk, f"--energy.mode {self._mode}")
        except Exception as error:
            logger.exception("--energy.strict True: the evaluation ends here")
            raise SystemExit(f"error: --energy.mode {self._mode} failed: {type(error).__name__}: {error}") from error

    def _choose(self, states: Tensor, chunk: Tensor) -> Tensor:
        layers = self._hidden.take()
        mode = self._mode_now()
        if mode is None:
            return chunk
        length = layers[-1].shape[1]
        positions = predicted_positions(len(states), length, self._horizon * self._action_dim).to(states.device)
        exits = layer_actions(layers, positions, self._head, self._horizon)
        policy = chunk.float().reshape(exits[:, -1].shape)
        frame = Frame(
            layers[-1], visible_context(positions, length), policy, torch.cat([exits[:, :-1], policy[:, None]], 1)
        )
        proposal, accepted = self._advisor.decide(mode, frame, [self._generator] * len(policy))
        chosen = proposal.actions.reshape(chunk.shape).to(chunk)
        answer = torch.where(accepted.to(chunk.device)[:, None, None], chosen, chunk)
        if accepted.any() and not answer.isfinite().all():
            raise ValueError("a chunk that it chose is not finite")
        self.counts["accepted"] += int(accepted.sum())
        return answer

    def summary(self) -> str:
        """What became of the chunks that were asked for, in a line."""
        failed = f", {self.fallback.total} failed: {dict(self.fallback.counts)}" if self.fallback.total else ""
        return (
            f"--energy.mode {self._mode}: {self.counts['chunks']} chunks asked for, {self.counts['accepted']} replaced"
            f"{failed}"
        )

    def _mode_now(self) -> str | None:
        """The mode for the observation at hand, None for the policy's own chunk."""
        if self._instructions is None:
            return self._mode
        modes = {self._tasks.get(instruction) for instruction in self._instructions.take()}
        if len(modes) > 1:
            raise HostError("--energy.mode recommended takes one observation at a time, as the host's evaluation does")
        return modes.pop()


def _say_counts(reference: weakref.ref[RerankedActionHead]) -> None:
    """At the end of the program: a gate that never opened and a reranker that always failed look alike in success."""
    if (head := reference()) is not None and head.counts["chunks"]:
        print(head.summary(), file=sys.stderr)


def recommended_modes(tasks: Mapping[str, str], modes: Sequence[str], horizon: int) -> dict[str, str]:
    """Mode by instruction in lower case, as the host's prompt has it; left out where the policy's chunk is best.

    Args:
        tasks: arm by instruction, see `modes.Advisor`.
        modes: those that the checkpoint allows.
        horizon: H; the host executes whole chunks.

    Raises:
        ValueError: nothing is recommended, or an arm that asks for a new chunk earlier than the host does.
    """
    if not tasks:
        raise ValueError("--energy.mode recommended: energy_gates.json recommends nothing; vla-energy preflight does")
    found: dict[str, str] = {}
    for instruction, arm in tasks.items():
        name, every = split_arm(arm)
        if (name != "policy" and name not in modes) or every not in (None, horizon):
            raise ValueError(
                f"--energy.mode recommended: {arm} for {instruction!r} decides when to ask for a new chunk, and the "
                f"host executes all {horizon} steps of one; use vla-energy rollout, or --energy.mode {', '.join(modes)}"
            )
        if found.setdefault(instruction.lower(), name) != name:
            raise ValueError(f"--energy.mode recommended: two arms for {instruction.lower()!r}, in other upper case")
    return {instruction: name for instruction, name in found.items() if name != "policy"}
