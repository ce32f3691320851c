"""Vision transformers by timm name, ours among them.

The two towers of the shipped tiny checkpoint are built here under names of their own, as timm has
none that small; any other name goes to `timm.create_model`. Users with towers of their own register
them with timm (`timm.models.register_model`) before loading.
"""

from __future__ import annotations

from typing import Any

import timm
from timm.layers import get_act_layer  # type: ignore[attr-defined]
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

_DINO: dict[str, Any] = {"init_values": 1e-5, "class_token": True, "reg_tokens": 4, "no_embed_class": True}
_SIGLIP: dict[str, Any] = {"class_token": False, "global_pool": "map"}

OWN_MODELS: dict[str, dict[str, Any]] = {
    # LayerScale starts at 1 in the tiny tower: 1e-5, right for fine-tuning, would freeze training from scratch.
    "vla_energy_tiny_dino": {
        **_DINO,
        "init_values": 1.0,
        "patch_size": 12,
        "embed_dim": 96,
        "depth": 4,
        "num_heads": 3,
    },
    "vla_energy_tiny_siglip": {**_SIGLIP, "patch_size": 12, "embed_dim": 64, "depth": 4, "num_heads": 2},
}
"""Arguments of `VisionTransformer` for the tiny checkpoint's towers."""


def create(name: str, image_size: tuple[int, int], act_layer: str | None = None) -> nn.Module:
    """A tower with random weights for images of `(height, width)` pixels.

    Raises:
        ValueError: timm does not know the name.
    """
    act: dict[str, Any] = {} if act_layer is None else {"act_layer": get_act_layer(act_layer)}
    if name in OWN_MODELS:
        return VisionTransformer(img_size=image_size, num_classes=0, **OWN_MODELS[name], **act)
    if not timm.is_model(name):
        raise ValueError(f"timm {timm.__version__} has no model {name!r}; register it with timm before loading")
    return timm.create_model(name, pretrained=False, num_classes=0, img_size=image_size, **act)


def register() -> None:
    """Makes our towers known to timm, for code that asks timm for them by name, as openvla-oft's does."""
    for name in OWN_MODELS:
        if timm.is_model(name):
            continue

        def build(
            pretrained: bool = False, name: str = name, pretrained_cfg: Any = None, pretrained_cfg_overlay: Any = None,
            cache_dir: Any = None, **arguments: Any,
        ) -> nn.Module:  # fmt: skip
            return VisionTransformer(**OWN_MODELS[name], **arguments)

        build.__name__ = name
        register_model(build)
