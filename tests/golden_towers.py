"""The two vision towers of the golden checkpoint, registered with timm."""

from __future__ import annotations

from typing import Any

from timm.models import is_model, register_model
from timm.models.vision_transformer import VisionTransformer

_TIMM_ONLY = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


def _build(kwargs: dict[str, Any], **fixed: Any) -> VisionTransformer:
    return VisionTransformer(**fixed, **{key: value for key, value in kwargs.items() if key not in _TIMM_ONLY})


def rig_vit_dino_reg4(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    shape = {"patch_size": 14, "embed_dim": 48, "depth": 4, "num_heads": 3, "init_values": 1e-5}
    return _build(kwargs, class_token=True, reg_tokens=4, no_embed_class=True, **shape)


def rig_vit_siglip(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    shape = {"patch_size": 14, "embed_dim": 32, "depth": 4, "num_heads": 2, "mlp_ratio": 3.7362}
    return _build(kwargs, class_token=False, global_pool="map", **shape)


def register() -> None:
    """Registers both, once."""
    for tower in (rig_vit_dino_reg4, rig_vit_siglip):
        if not is_model(tower.__name__):
            register_model(tower)
