"""openvla-oft's own model as the doctor's `Policy`; needs its checkout on the path, and its packages."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_energy.doctor.policy import Batch, component, read_config, stdout_to_stderr
from vla_energy.doctor.towers import register_ours

with stdout_to_stderr():
    _modeling = importlib.import_module("prismatic.extern.hf.modeling_prismatic")
    _configuration = importlib.import_module("prismatic.extern.hf.configuration_prismatic")
    _constants = importlib.import_module("prismatic.vla.constants")
    _heads = importlib.import_module("prismatic.models.action_heads")
    _projectors = importlib.import_module("prismatic.models.projectors")


class HostPolicy:
    """The host's model with its L1 action head and its proprio projector."""

    kind = "host"

    def __init__(self, vla: Any, head: Any, projector: Any, num_images: int, config: dict[str, Any]) -> None:
        self.backbone, self.head, self.projector = vla.requires_grad_(False).eval(), head, projector
        self.action_dim, self.horizon = head.action_dim, _constants.NUM_ACTIONS_CHUNK
        self.context_dim = vla.llm_dim
        self.num_images = num_images
        self.proprio_dim = None if projector is None else projector.proprio_dim
        self.config = config

    @classmethod
    def load(cls, folder: Path, num_images: int | None, dtype: torch.dtype, device: str) -> HostPolicy:
        """Loads a folder as the host does.

        Raises:
            ValueError: no L1 action head, or one for other dimensions than the host's constants.
        """
        config = read_config(folder)
        state = component(folder, "action_head")
        if state is None or "model.fc2.bias" not in state:
            raise ValueError(
                f"{folder}: the doctor runs L1 action heads, and needs exactly one action_head--*_checkpoint.pt"
            )
        if len(state["model.fc2.bias"]) != _constants.ACTION_DIM:
            raise ValueError(
                f"the action head has {len(state['model.fc2.bias'])} dimensions, the host's constants "
                f"{_constants.ACTION_DIM}: prismatic/vla/constants.py takes them from the command line's words "
                "(libero, aloha, bridge)"
            )
        register_ours()
        vla = _vla(folder, dtype, config)
        vla.vision_backbone.set_num_images_in_input(num_images or 1)
        hidden = len(state["model.fc1.bias"])
        head = _heads.L1RegressionActionHead(input_dim=vla.llm_dim, hidden_dim=hidden, action_dim=_constants.ACTION_DIM)
        head.load_state_dict(state)
        projector, weights = None, component(folder, "proprio_projector")
        if weights is not None:
            projector = _projectors.ProprioProjector(vla.llm_dim, weights["fc1.weight"].shape[1])
            projector.load_state_dict(weights)
            projector.to(device, dtype).eval()
        return cls(vla.to(device), head.to(device, dtype).eval(), projector, num_images or 1, config)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Normalised chunks `(B,H,A)`, through the forward pass that training uses."""
        dtype = next(self.head.parameters()).dtype
        out = self.backbone(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            pixel_values=batch["pixel_values"].to(dtype),
            labels=batch["labels"],
            output_hidden_states=True,
            output_projector_features=True,
            proprio=batch["proprio"].to(dtype) if self.projector is not None else None,
            proprio_projector=self.projector,
        )
        # A state predicts the token after it.
        placed = (batch["labels"] > _constants.ACTION_TOKEN_BEGIN_IDX).nonzero()[:, 1].reshape(len(batch["labels"]), -1)
        positions = placed - 1 + out.projector_features.shape[1]
        states = out.hidden_states[-1].gather(1, positions[..., None].expand(-1, -1, self.context_dim))
        return self.head.predict_action(states).float().cpu()

    def unnormalize(self, actions: Tensor, dataset: str) -> Tensor | None:
        """The model's own `_unnormalize_actions` of `(H,A)`."""
        return torch.as_tensor(np.asarray(self.backbone._unnormalize_actions(actions.numpy(), dataset)))

    def sibling(self, folder: Path) -> HostPolicy:
        """This policy's action head and projector on the backbone of `folder`."""
        weight = next(self.head.parameters())
        vla = _vla(folder, weight.dtype, read_config(folder)).to(weight.device)
        vla.vision_backbone.set_num_images_in_input(self.num_images)
        return HostPolicy(vla, self.head, self.projector, self.num_images, dict(self.config))


def _vla(folder: Path, dtype: torch.dtype, config: dict[str, Any]) -> Any:
    settings = _configuration.OpenVLAConfig.from_pretrained(folder)
    vla = _modeling.OpenVLAForActionPrediction.from_pretrained(folder, config=settings, torch_dtype=dtype)
    path = folder / "dataset_statistics.json"
    if path.is_file():  # as the host's evaluation does
        import json

        vla.norm_stats = json.loads(path.read_text())
    return vla
