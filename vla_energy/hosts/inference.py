"""Reranking inside a host's evaluation: a stand-in for its action head that may answer with another chunk.

The host unnormalises what its action head returns, so chunks are scored before that, in normalised units.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vla_energy.gates import load_advisor
from vla_energy.hosts.hidden_states import (
    HiddenStates,
    HostError,
    infer_horizon,
    layer_actions,
    predicted_positions,
    visible_context,
)
from vla_energy.hosts.training import host_statistics
from vla_energy.modes import Frame

logger = logging.getLogger(__name__)


def rerank_action_head(action_head: Any, host: Any, vla: Any) -> Any:
    """The action head itself where the energy is off, else one that reranks; call it once, before the first episode.

    Args:
        action_head: the host's L1 action head.
        host: its evaluation config, with `energy`, `pretrained_checkpoint` and `unnorm_key`.
        vla: the model, with `norm_stats`.

    Raises:
        HostError: no L1 head, or no statistics of `unnorm_key`.
        CheckpointError, CompatibilityError: head, memory or gates are missing, damaged or of another policy.
        ValueError: a mode that the checkpoint cannot run.
    """
    if not host.energy.enabled:
        return action_head
    with torch.inference_mode(False):  # tensors made in inference mode can never be refined through
        return RerankedActionHead(action_head, host, vla)


class RerankedActionHead:
    """Answers like the host's action head; every other attribute is that head's. See `rerank_action_head`.

    Attributes:
        counts: `chunks` asked for, `accepted` among them.
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
        if self._mode not in self._advisor.modes:
            raise ValueError(
                f"--energy.mode {self._mode}: {folder} allows {', '.join(self._advisor.modes) or 'none'} "
                "(an energy head from fine-tuning, a memory from vla-energy memory)"
            )
        self._generator = torch.Generator().manual_seed(host.energy.seed)
        self._hidden = HiddenStates(vla)
        self.counts: Counter[str] = Counter()
        logger.info("%s with margin %s", self._mode, self._advisor.gates[self._mode])

    def __getattr__(self, name: str) -> Any:
        if name == "_head":  # not yet set: copying and unpickling ask before __init__
            raise AttributeError(name)
        return getattr(self._head, name)

    @torch.no_grad()
    def predict_action(self, states: Tensor) -> Tensor:
        """`(B,H,A)` normalised, in the dtype of the host's head; its own chunk bit for bit where the gate is shut.

        Args:
            states: `(B, H*A, D)` of the action tokens, as the host gives them.
        """
        chunk = self._head.predict_action(states)
        layers = self._hidden.take()
        length = layers[-1].shape[1]
        positions = predicted_positions(len(states), length, self._horizon * self._action_dim).to(states.device)
        exits = layer_actions(layers, positions, self._head, self._horizon)
        policy = chunk.float().reshape(exits[:, -1].shape)
        frame = Frame(
            layers[-1], visible_context(positions, length), policy, torch.cat([exits[:, :-1], policy[:, None]], 1)
        )
        proposal, accepted = self._advisor.decide(self._mode, frame, [self._generator] * len(policy))
        self.counts.update(chunks=len(policy), accepted=int(accepted.sum()))
        chosen = proposal.actions.reshape(chunk.shape).to(chunk)
        return torch.where(accepted.to(chunk.device)[:, None, None], chosen, chunk)
