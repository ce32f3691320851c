"""What a host's language model saw: its hidden states, taken by a hook, and where in them context and actions lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class HostError(ValueError):
    """The host's objects or settings are not what this plugin was written for; the message says what to do."""


class HiddenStates:
    """Keeps the hidden states of the last call of a model's `language_model`.

    A hook on the instance sees training and inference alike, through DDP and peft wrappers, and whatever class
    `trust_remote_code` has loaded.

    Args:
        model: the host's VLA, wrapped or not.
        only_with_grad: keep nothing where gradients are off, as in validation.

    Raises:
        HostError: no module, or several, named `language_model`.
    """

    def __init__(self, model: nn.Module, *, only_with_grad: bool = False) -> None:
        found = {
            id(module): module for name, module in model.named_modules() if name.split(".")[-1] == "language_model"
        }
        if len(found) != 1:
            raise HostError(f"{type(model).__name__} has {len(found)} modules named language_model, expected one")
        self._layers: tuple[Tensor, ...] | None = None
        self._only_with_grad = only_with_grad
        self._handle = next(iter(found.values())).register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._only_with_grad and not torch.is_grad_enabled():
            return
        layers = getattr(output, "hidden_states", None)
        self._layers = None if layers is None else tuple(layer.detach() for layer in layers)

    def take(self) -> tuple[Tensor, ...]:
        """Layers+1 tensors `(B,S,D)` without gradient, the last after the final norm; they are forgotten here.

        Raises:
            HostError: the language model was not called, or without `output_hidden_states=True`.
        """
        layers, self._layers = self._layers, None
        if layers is None:
            raise HostError("the language model gave no hidden states since they were last taken")
        return layers

    def remove(self) -> None:
        """Takes the hook off."""
        self._handle.remove()


def trained_positions(labels: Tensor, length: int, action_token_begin: int, action_dim: int) -> Tensor:
    """`(B, H*A)` where the states that predict the action tokens sit, in a sequence with patches put in.

    Args:
        labels: `(B,T)`, action ids at the placeholders.
        length: S of the hidden states; S - T patches stand before the prompt.
        action_token_begin: ids above it are actions.
        action_dim: A.

    Raises:
        HostError: rows with different numbers of action tokens, or no multiple of A.
    """
    mask = labels > action_token_begin
    counts = mask.sum(1)
    first = int(counts[0])
    if first == 0 or first % action_dim or bool((counts != first).any()):
        raise HostError(f"action tokens a row {counts.tolist()}: expected the same multiple of A = {action_dim}")
    # A state predicts the token after it, so each lies one position before its placeholder.
    return mask.nonzero()[:, 1].reshape(-1, first) - 1 + length - labels.shape[1]


def predicted_positions(batch: int, length: int, count: int) -> Tensor:
    """The same `(B, H*A)` at inference, where prompts are not padded and a stop token ends the sequence."""
    if length < count + 3:
        raise HostError(f"a sequence of {length} is too short for {count} action tokens")
    return torch.arange(length - count - 2, length - 2).expand(batch, count)


def visible_context(positions: Tensor, length: int) -> Tensor:
    """`(B,S)` bool, True for BOS, patches, proprio and prompt: all before the state that predicts the first action."""
    return torch.arange(length, device=positions.device)[None] < positions[:, :1]


@torch.no_grad()
def layer_actions(layers: tuple[Tensor, ...], positions: Tensor, action_head: Any, horizon: int) -> Tensor:
    """`(B,L,H,A)` fp32: the chunk that the action head makes of each layer's states, the policy's own last.

    Args:
        layers: see `HiddenStates.take`.
        positions: `(B, H*A)`.
        action_head: the host's, without wrapper: `predict_action (B,H*A,D) -> (B,H,A)`.
        horizon: H.
    """
    rows = torch.arange(len(positions), device=layers[0].device)[:, None]
    states = torch.stack([layer[rows, positions.to(layer.device)] for layer in layers], 1)
    dtype = next(action_head.parameters()).dtype
    chunks = action_head.predict_action(states.flatten(0, 1).to(dtype))
    return chunks.float().reshape(*states.shape[:2], horizon, -1)


def infer_horizon(action_head: Any, action_dim: int, context_dim: int) -> int:
    """H of an L1 action head, by trying: its first layer reads the A states of a step at once.

    Raises:
        HostError: it gives no chunk `(1, H, A)` for any H up to 100.
    """
    weight = next(action_head.parameters())
    for horizon in range(1, 101):
        states = weight.new_zeros(1, horizon * action_dim, context_dim)
        try:
            with torch.no_grad():
                shape = tuple(action_head.predict_action(states).shape)
        except RuntimeError:  # the head's own chunk length does not divide it
            continue
        if shape == (1, horizon, action_dim):
            return horizon
    raise HostError("the action head gives no chunk (1, H, A) for any H up to 100: is it an L1 head?")
