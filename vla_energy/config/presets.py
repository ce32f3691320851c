"""What each preset changes in the defaults: the report's stages, and the original that fails."""

from typing import Any

_IN_BATCH_ONLY = {
    "layer_exits": {"count": 0},
    "expert_noise": {"count": 0},
    "policy_noise": {"count": 0},
    "in_batch": {"count": 1024},
    "near_positive_threshold": 0.0,
}
# As its code has it: 8 heads of 64, dropout 0.2 that stayed active at inference.
_ORIGINAL_HEAD = {"name": "original", "hidden_dim": 512, "num_heads": 8, "dropout": 0.2}
# AdamW's own weight decay and no bound on the norm: the original passed neither.
_ORIGINAL_GUARD = {"max_grad_norm": 1.0, "skip_grad_norm": 1e30, "weight_decay": 0.01}
_INFO_NCE_ONLY = {"centre": 0.0, "info_nce": 1.0, "listwise": 0.0}

_ORIGINAL: dict[str, Any] = {
    "head": _ORIGINAL_HEAD,
    "range": {"name": "sigmoid", "anchor_weight": 0.0},
    "temperature": {"value": 0.5},
    "negatives": _IN_BATCH_ONLY,
    "loss": _INFO_NCE_ONLY,
    "guard": _ORIGINAL_GUARD,
}
_STAGE1 = {
    **_ORIGINAL,
    "range": {"name": "softplus_scaled", "anchor_weight": 0.0},
    "temperature": {"value": 3.0},
    "guard": {**_ORIGINAL_GUARD, "max_grad_norm": 0.5},
}
_STAGE2 = {**_STAGE1, "guard": {"skip_grad_norm": 10.0, "lr_factor": 0.1}}
_STAGE3 = {
    **_STAGE2,
    # Every inner layer, as the report has it; so there is a layer 1, whatever the depth.
    "negatives": {"layer_exits": {"count": 1024}, "policy_noise": {"count": 0}, "shuffle": {"count": 2}},
    "loss": {
        **_INFO_NCE_ONLY,
        "margin": 1.0,
        "margin_sources": ("layer_exit_1",),
        "mix_steps": 10_000,
        "diversity": 0.01,
    },
}

PRESETS: dict[str, dict[str, Any]] = {
    "original": _ORIGINAL,
    "stage1": _STAGE1,
    "stage2": _STAGE2,
    "stage3": _STAGE3,
    "recommended": {},
}
