"""LoRA by peft as the host applies it, and merging that leaves the training weights untouched."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from vla_energy.backbones.film import is_film
from vla_energy.backbones.openvla import OpenVLA

_WRAPPER = "base_model.model."


def add_lora(vla: OpenVLA, rank: int, dropout: float) -> None:
    """Wraps `vla.backbone`: every linear and convolution layer, alpha = min(rank, 16), Gaussian start.

    The output embedding (`lm_head`) is left out where an action head stands in its place: nothing reads it. Action head
    and proprio projector stay outside and are trained in full, as in the host; so are FiLM layers.

    Args:
        vla: is changed in place; only adapters, FiLM layers, action head and proprio projector keep `requires_grad`.
        rank: of the adapters.
        dropout: of the adapters.
    """
    targets = [
        name
        for name, module in vla.backbone.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        and (vla.discrete or not name.endswith("lm_head"))
        and not is_film(name)
    ]
    config = LoraConfig(
        r=rank,
        lora_alpha=min(rank, 16),
        lora_dropout=dropout,
        target_modules=targets,
        init_lora_weights="gaussian",
    )
    vla.backbone = get_peft_model(vla.backbone, config)
    if vla.use_film:
        vla.backbone.vision_backbone.film.requires_grad_(True)


@torch.no_grad()
def merged_state_dict(backbone: nn.Module, *, merge: bool = True) -> dict[str, Tensor]:
    """The backbone's weights under the names they have without LoRA, adapters folded in or (False) left out.

    Nothing is changed in place: merging and unmerging would move the training weights by rounding.
    """
    deltas = {
        name: module.get_delta_weight(module.active_adapters[0])  # pyright: ignore[reportAttributeAccessIssue]
        for name, module in backbone.named_modules()
        if merge and isinstance(module, LoraLayer) and module.active_adapters
    }
    state: dict[str, Tensor] = {}
    for key, value in backbone.state_dict().items():
        if ".lora_" in key:
            continue
        module_name, _, parameter = key.rpartition(".")
        adapted = module_name.removesuffix(".base_layer")
        merged = value
        if parameter == "weight" and adapted in deltas and adapted != module_name:
            merged = (value.float() + deltas[adapted].float()).to(value.dtype)
        state[f"{adapted}.{parameter}".removeprefix(_WRAPPER)] = merged
    return state
