"""OpenVLA-OFT's forward pass on stock transformers: bidirectional attention, parallel action decoding.

Sequence: BOS, vision patches of every image, proprio token if any, prompt, H*A action placeholders whose
embeddings are zero, stop token, right padding. Facts about the host: docs and `design` of openvla-oft at
commit 213c5ff8; equality is measured against stored outputs of the real code in `tests/test_goldens.py`.

With a diffusion head this very sequence gives the context, and another one the predicted noise: a time-step token
stands behind the proprio token, and the placeholders hold the noised chunk. That chunk is made of the expert's in
training, so no state of that pass may reach an energy head.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vla_energy.backbones.action_head import L1ActionHead, ProprioProjector
from vla_energy.backbones.backbone import OpenVLABackbone
from vla_energy.backbones.config import OpenVLAConfig
from vla_energy.backbones.denoising import sample
from vla_energy.backbones.diffusion import DiffusionActionHead, NoisyActionProjector
from vla_energy.backbones.sequence import STOP_ID, action_positions, append_actions, ending_in, without_actions
from vla_energy.backbones.tokens import decode

LayerExits = Literal["raw", "normed", "off"]


@dataclass(frozen=True)
class VLAOutput:
    """What one forward pass gives; actions are normalised.

    Attributes:
        hidden_states: layers+1 tensors `(B, S, D)`; the first is the embeddings, the last is after the final norm.
        context: `(B, S, D)`, the last hidden states.
        context_mask: `(B, S)` bool, True for BOS, patches, proprio and prompt: what an energy head may see.
        actions: `(B, H, A)`, the policy's chunk.
        layer_actions: `(B, L, H, A)`, L = layers+1, chunks decoded from every layer, the policy's last; None if off.
            Discrete tokens and a diffusion head have no layer exits: L = 1, the policy's alone.
        projector_features: `(B, patches, D)`, the proprio token last if there is one.
        token_logits: of discrete tokens, `(B, H*A + 1, V)` float32, the stop token's last; else None.
        samples: `(B, K, H, A)`, K more samples of a diffusion head; None without.
    """

    hidden_states: tuple[Tensor, ...]
    context: Tensor
    context_mask: Tensor
    actions: Tensor
    layer_actions: Tensor | None
    projector_features: Tensor
    token_logits: Tensor | None = None
    samples: Tensor | None = None


class OpenVLA(nn.Module):
    """The policy: backbone, action head (L1, diffusion, none with discrete tokens) and (optional) proprio projector.

    Args:
        config: of the checkpoint.
        action_dim: A.
        head_hidden_dim: width of the action head, default the language model's.
        proprio_dim: P, or None for a policy without proprioception.
        num_images: images an observation has.
        horizon: H, default the config's.
        use_film: the instruction modulates the vision blocks (FiLM).
        discrete: actions are tokens of the language model; there is no action head.
        diffusion: the action head is a diffusion head, with the steps that the config names.
    """

    def __init__(
        self,
        config: OpenVLAConfig,
        action_dim: int,
        head_hidden_dim: int | None = None,
        proprio_dim: int | None = None,
        num_images: int = 1,
        horizon: int | None = None,
        use_film: bool = False,
        discrete: bool = False,
        diffusion: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_images = num_images
        self.horizon = horizon or config.horizon
        self.action_dim = action_dim
        self.backbone: Any = OpenVLABackbone(config, use_film)  # OpenVLABackbone, or peft's wrapper around it
        width = self.backbone.language_model.config.hidden_size
        self.context_dim = int(width)
        self.num_layers = int(self.backbone.language_model.config.num_hidden_layers)
        self.action_head: Any = None
        if not discrete:
            sizes = (width, head_hidden_dim or width, action_dim)
            steps = (config.num_diffusion_steps_train, config.num_diffusion_steps_inference)
            self.action_head = DiffusionActionHead(*sizes, *steps) if diffusion else L1ActionHead(*sizes)
        self.noisy_action_projector = NoisyActionProjector(width) if diffusion else None
        self.proprio_projector = None if proprio_dim is None else ProprioProjector(proprio_dim, width)

    @property
    def use_film(self) -> bool:
        """Whether the instruction modulates the vision blocks."""
        return self.backbone.vision_backbone.film is not None

    @property
    def discrete(self) -> bool:
        """Whether actions are tokens of the language model."""
        return self.action_head is None

    @property
    def diffuses(self) -> bool:
        """Whether the action head is a diffusion head, so that chunks are samples."""
        return self.noisy_action_projector is not None

    @property
    def num_exits(self) -> int:
        """L of `VLAOutput.layer_actions`."""
        return 1 if self.discrete or self.diffuses else self.num_layers + 1

    @property
    def channels(self) -> int:
        """Channels of `pixel_values` for one image."""
        return 3 * len(self.config.timm_model_ids)

    def forward(
        self,
        batch: Mapping[str, Any],
        layer_exits: LayerExits = "raw",
        noise: Tensor | None = None,
        steps: int | None = None,
    ) -> VLAOutput:
        """One pass over prompts that end in action placeholders; with a diffusion head then the denoising.

        Args:
            batch: the host's keys: `pixel_values (B,C,h,w)`, `input_ids (B,T)`, `attention_mask (B,T)`,
                `labels (B,T)` (action ids at the placeholders, -100 elsewhere), `proprio (B,P)` if the policy
                uses it. `actions` is not read.
            layer_exits: "raw" applies the action head to the inner states as they are, "normed" after the
                final norm, "off" leaves `layer_actions` None. Exits carry no gradient, the policy's chunk does.
            noise: of a diffusion head, `(B, 1+K, H, A)` to start from, the policy's own first; its chunks carry no
                gradient. None is drawn from torch's global state, for the policy's chunk alone, as the host does.
            steps: of the denoising, default the action head's.

        Raises:
            ValueError: a key is missing, images or proprio do not fit the policy, padding is not on the right,
                a row's number of action tokens is not a multiple of A or differs from the other rows', or noise is
                given for an L1 head or does not fit.
        """
        self.check(batch)
        hidden, features, rows, positions = self.encode(batch, self.proprio_token(batch))
        token_logits, layer_actions, samples = None, None, None
        if noise is not None and not self.diffuses:
            raise ValueError(
                "noise is given, but the policy has no diffusion head: it has one chunk for an observation"
            )
        if self.diffuses:
            actions, samples = sample(self, batch, features, noise, steps)
        elif self.discrete:
            # The state at the last action token predicts the stop token.
            states = hidden[-1][rows, torch.cat([positions, positions[:, -1:] + 1], dim=1)]
            token_logits = self.backbone.language_model.lm_head(states).float()
            actions = decode(token_logits[:, :-1].argmax(-1), self.action_dim, self.config)
        else:
            head_dtype = self.action_head.model.fc1.weight.dtype
            actions = self.action_head(hidden[-1][rows, positions].to(head_dtype))
        if layer_exits != "off" and (self.diffuses or self.discrete):
            layer_actions = actions[:, None]
        elif layer_exits != "off":
            inner = self._inner_exits(hidden[:-1], rows, positions, normed=layer_exits == "normed")
            layer_actions = torch.cat([inner.to(actions.dtype), actions[:, None]], dim=1)
        return VLAOutput(
            hidden_states=hidden,
            context=hidden[-1],
            # The state before the first action placeholder predicts the first action: it is not context.
            context_mask=torch.arange(hidden[-1].shape[1], device=rows.device)[None] < positions[:, :1],
            actions=actions,
            layer_actions=layer_actions,
            projector_features=features,
            token_logits=token_logits,
            samples=samples,
        )

    def encode(
        self,
        batch: Mapping[str, Any],
        extra: Tensor | None,
        features: Tensor | None = None,
        noisy: Tensor | None = None,
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor]:
        """All hidden states, the features before the prompt, and where the states of the action tokens sit.

        Args:
            batch: as in `forward`, checked.
            extra, features, noisy: see `OpenVLABackbone.forward`.

        Returns:
            layers+1 tensors `(B,S,D)`, `(B,F,D)`, row indices `(B,1)` and positions `(B,H*A)`.
        """
        action_mask = batch["labels"] > self.config.action_token_begin
        pixels = batch["pixel_values"].to(self.backbone.projector.fc1.weight.dtype)
        with self._attention_kernel(batch["input_ids"].device):
            hidden, found = self.backbone(
                pixels, batch["input_ids"], batch["attention_mask"], action_mask, extra, features, noisy
            )
        return hidden, found, *action_positions(action_mask, found.shape[1], self.action_dim)

    def proprio_token(self, batch: Mapping[str, Any]) -> Tensor | None:
        """`(B, 1, D)`, None for a policy without proprioception."""
        if self.proprio_projector is None:
            return None
        return self.proprio_projector(batch["proprio"].to(self.proprio_projector.fc1.weight.dtype))[:, None]

    def _attention_kernel(self, device: torch.device) -> AbstractContextManager[object]:
        """At inference on a CPU the plain kernel: half the rounding error of the blocked one, for 3 ms of 19."""
        if device.type == "cpu" and not self.training:
            return sdpa_kernel(SDPBackend.MATH)
        return nullcontext()

    @torch.no_grad()
    def _inner_exits(self, hidden: tuple[Tensor, ...], rows: Tensor, positions: Tensor, *, normed: bool) -> Tensor:
        states = torch.stack([layer[rows, positions] for layer in hidden], dim=1)
        if normed:
            states = self.backbone.language_model.model.norm(states)
        return self.action_head(states.to(self.action_head.model.fc1.weight.dtype))

    @torch.no_grad()
    def predict(
        self,
        batch: Mapping[str, Any],
        layer_exits: LayerExits = "raw",
        noise: Tensor | None = None,
        steps: int | None = None,
    ) -> VLAOutput:
        """The policy's chunks for a batch of prompts, dropout off.

        Args:
            batch: `pixel_values`, `input_ids`, `attention_mask` of prompts, and `proprio` if the policy uses it. With
                `labels`, as in training, the prompt ends where they have the first action token. A prompt that does
                not end in the empty token gets it, as in the host: the policy was trained with it.
            layer_exits, noise, steps: as in `forward`.
        """
        prompts = ending_in(
            without_actions(batch, self.config.action_token_begin),
            self.config.empty_token_id,
            self.config.pad_token_id,
        )
        count = self.horizon * self.action_dim
        tokens = torch.full((len(batch["input_ids"]), count), self.config.vocab_size - 1)
        tokens = tokens.to(batch["input_ids"].device)
        full = {**batch, **append_actions(prompts, tokens, STOP_ID, self.config.pad_token_id)}
        training = self.training
        self.eval()
        try:
            return self(full, layer_exits, noise, steps)
        finally:
            self.train(training)

    def check(self, batch: Mapping[str, Any]) -> None:
        """Raises the ValueErrors of `forward` for a batch that lacks something or does not fit."""
        wanted = ["pixel_values", "input_ids", "attention_mask", "labels"]
        wanted += ["proprio"] if self.proprio_projector is not None else []
        missing = [key for key in wanted if batch.get(key) is None]
        if missing:
            raise ValueError(f"batch lacks {', '.join(missing)}")
        channels = batch["pixel_values"].shape[1]
        needed = self.channels * self.num_images
        if channels != needed:
            raise ValueError(f"pixel_values has {channels} channels; {self.num_images} image(s) need {needed}")
        mask = batch["attention_mask"].bool()
        if not bool(mask[:, 0].all()) or bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise ValueError("attention_mask must be True up to each row's end: pad on the right")
