"""Our backbone as the doctor's `Policy`; needs the `native` extra."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor

from vla_energy.backbones import LoadedVLA, load_openvla
from vla_energy.backbones.config import OpenVLAConfig
from vla_energy.backbones.denoising import predict_noise
from vla_energy.backbones.tokens import expected_chunks
from vla_energy.doctor.policy import Batch, component


class NativePolicy:
    """An `OpenVLA` of ours."""

    kind = "native"

    def __init__(self, vla: LoadedVLA) -> None:
        self.vla = vla.requires_grad_(False).eval()
        self.action_dim, self.horizon, self.context_dim = vla.action_dim, vla.horizon, vla.context_dim
        self.num_images = vla.num_images
        self.proprio_dim = None if vla.proprio_projector is None else vla.proprio_projector.proprio_dim
        self.config = vla.config.raw

    @classmethod
    def load(cls, folder: Path, num_images: int | None, dtype: torch.dtype, device: str) -> NativePolicy:
        """Loads a folder; raises what `load_openvla` raises."""
        images = num_images or OpenVLAConfig.from_folder(folder).num_images
        proprio = component(folder, "proprio_projector") is not None
        return cls(load_openvla(folder, dtype, num_images=images, use_proprio=proprio).to(device))

    @property
    def backbone(self) -> torch.nn.Module:
        """Vision, projector and language model."""
        return self.vla.backbone

    @backbone.setter
    def backbone(self, module: torch.nn.Module) -> None:
        self.vla.backbone = module

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Normalised chunks `(B,H,A)`, or what shows small changes that these hide.

        Of discrete tokens the mean chunk, as the likeliest tokens stay where they are; of a diffusion head, for one
        pass as well, the noise in a fixed chunk.
        """
        if self.vla.diffuses:
            fixed = torch.randn(self.horizon, self.action_dim, generator=torch.Generator().manual_seed(0))
            rows, middle = len(batch["input_ids"]), self.vla.action_head.schedule.num_train // 2
            device = batch["input_ids"].device
            noisy, times = fixed.to(device).expand(rows, -1, -1), torch.full((rows,), middle, device=device)
            return predict_noise(self.vla.eval(), batch, noisy, times).float().cpu()
        out = self.vla.eval()(batch, layer_exits="off")
        if out.token_logits is not None:
            return expected_chunks(out.token_logits, self.action_dim, self.vla.config).cpu()
        return out.actions.float().cpu()

    def unnormalize(self, actions: Tensor, dataset: str) -> Tensor | None:
        """None: the library's is the only one."""
        return None

    def sibling(self, folder: Path) -> NativePolicy:
        """This policy's action head and projectors on the backbone of `folder`."""
        weight = self.vla.backbone.projector.fc1.weight
        other = load_openvla(
            folder, weight.dtype, num_images=self.num_images, use_proprio=self.proprio_dim is not None,
            horizon=self.horizon, action_dim=self.action_dim, proprio_dim=self.proprio_dim, new_head=True,
            discrete=self.vla.discrete, use_diffusion=self.vla.diffuses,
        ).to(weight.device)  # fmt: skip
        other.action_head = copy.deepcopy(self.vla.action_head)
        other.noisy_action_projector = copy.deepcopy(self.vla.noisy_action_projector)
        other.proprio_projector = copy.deepcopy(self.vla.proprio_projector)
        return NativePolicy(other)
