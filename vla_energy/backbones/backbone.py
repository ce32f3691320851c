"""Vision towers, projector and language model as one module: what LoRA wraps, and the attention mask it needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from vla_energy.backbones.config import OpenVLAConfig
from vla_energy.backbones.film import average_language
from vla_energy.backbones.vision import Projector, VisionBackbone


class OpenVLABackbone(nn.Module):
    """Vision towers, projector and language model under the host's parameter names; LoRA wraps this."""

    def __init__(self, config: OpenVLAConfig, use_film: bool = False) -> None:
        super().__init__()
        llama = LlamaConfig(**config.text, attn_implementation="sdpa")  # pyright: ignore[reportCallIssue]
        self.vision_backbone = VisionBackbone(config, llama.hidden_size if use_film else None)
        self.projector = Projector(
            self.vision_backbone.embed_dim, llama.hidden_size, fused=self.vision_backbone.fused_featurizer is not None
        )
        self.language_model = LlamaForCausalLM(llama)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        action_mask: Tensor,
        extra: Tensor | None,
        features: Tensor | None = None,
        noisy: Tensor | None = None,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """All hidden states, and the features put between BOS and the prompt.

        Args:
            pixel_values: `(B, channels * images, height, width)`.
            input_ids, attention_mask: `(B, T)`.
            action_mask: `(B, T)` bool, True at action placeholders, whose embeddings are zeroed.
            extra: `(B, E, D)` tokens behind the patches, proprio and time step, or None.
            features: `(B, patches, D)` of an earlier pass, in place of the images, which are then not read.
            noisy: `(B, H*A, D)` embeddings of a noised chunk, in place of the placeholders' zeros.
        """
        embeddings = self.language_model.get_input_embeddings()(input_ids)
        if features is None:
            vision: tuple[Tensor, ...] = (pixel_values,)
            if self.vision_backbone.film is not None:
                vision += (average_language(embeddings, attention_mask.bool() & ~action_mask),)
            inputs: Tensor = self.projector(self.vision_backbone(*vision))
        else:
            inputs = features
        if extra is not None:
            inputs = torch.cat([inputs, extra.to(inputs.dtype)], dim=1)
        embeddings = embeddings.masked_fill(action_mask[..., None], 0.0)
        if noisy is not None:
            embeddings = embeddings.masked_scatter(action_mask[..., None], noisy.to(embeddings.dtype))
        sequence = torch.cat([embeddings[:, :1], inputs.to(embeddings.dtype), embeddings[:, 1:]], dim=1)
        visible = attention_mask.bool()
        inserted = visible.new_ones(inputs.shape[:2])
        valid = torch.cat([visible[:, :1], inserted, visible[:, 1:]], dim=1)
        hidden = self.language_model.model(
            inputs_embeds=sequence,
            attention_mask=bidirectional_mask(valid, sequence.dtype),
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        return hidden, inputs


def bidirectional_mask(valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask `(B, 1, S, S)`: every token sees every valid token, later ones included.

    The host's transformers fork is bidirectional on its SDPA path; stock Llama is causal unless it is
    handed a full mask, and loses 40 points of LIBERO success without a word (openvla-oft issues 12, 106).

    Args:
        valid: `(B, S)` bool, True = not padding.
        dtype: of the mask.
    """
    length = valid.shape[1]
    mask = torch.zeros(valid.shape, dtype=dtype, device=valid.device).masked_fill(~valid, torch.finfo(dtype).min)
    return mask[:, None, None, :].expand(-1, 1, length, length)
