"""A checkpoint folder as a policy for rollouts: the native backbone, and its energy head if it has one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_energy.actions import DatasetStatistics, select_statistics
from vla_energy.backbones import VLAOutput, load_openvla
from vla_energy.backbones.config import OpenVLAConfig
from vla_energy.candidates import noise_scale, propose
from vla_energy.data.augment import center_crop
from vla_energy.rerank import Reranker
from vla_energy.rollout.interface import Decision

_HEAD = "energy_head--*_checkpoint.safetensors"


class CheckpointPolicy:
    """Acts from raw observations; see `rollout.interface.Policy`.

    Args:
        folder: an OpenVLA-OFT checkpoint folder, with or without an energy head.
        device: where to run.
        dataset: whose statistics to use, where the folder has several.

    Raises:
        CheckpointFolderError, CheckpointError, CompatibilityError, StatisticsError: the folder is not usable.
    """

    def __init__(self, folder: str | Path, device: str = "cpu", dataset: str | None = None) -> None:
        folder = Path(folder)
        config = OpenVLAConfig.from_folder(folder)
        use_proprio = any(folder.glob("proprio_projector--*_checkpoint.pt"))
        self._vla = load_openvla(folder, num_images=config.num_images, use_proprio=use_proprio).to(device)
        self._device = torch.device(device)
        self._crop = config.center_crop
        self._num_images = config.num_images
        self._statistics: DatasetStatistics = select_statistics(self._vla.statistics, dataset)
        self._reranker = Reranker.from_checkpoint(folder) if any(folder.glob(_HEAD)) else None
        if self._reranker is not None:
            self._reranker.ensure_compatible(self._statistics, self.horizon, self.action_dim, self._vla.context_dim)
            self._reranker.head.to(self._device)  # type: ignore[attr-defined]
            self._scale = noise_scale(self._statistics)
        self._gripper = [dim for dim, used in enumerate(self._statistics.action.mask) if not used]
        self._folder = folder

    @property
    def horizon(self) -> int:
        """H."""
        return self._vla.horizon

    @property
    def action_dim(self) -> int:
        """A."""
        return self._vla.action_dim

    @property
    def arms(self) -> frozenset[str]:
        """`policy`, and `rerank` with an energy head."""
        return frozenset({"policy"} if self._reranker is None else {"policy", "rerank"})

    @property
    def metadata(self) -> dict[str, Any]:
        """The folder's name and the gate's margin."""
        margin = None if self._reranker is None else self._reranker.margin
        return {"checkpoint": self._folder.name, "margin": margin, "center_crop": self._crop}

    @torch.no_grad()
    def act(
        self,
        images: list[np.ndarray],
        proprios: list[np.ndarray],
        instructions: list[str],
        arm: str,
        generators: list[torch.Generator],
    ) -> list[Decision]:
        """One forward pass for all rows; the `rerank` arm then chooses among each row's candidates."""
        output = self._vla.predict(self._batch(images, proprios, instructions), "raw" if arm == "rerank" else "off")
        if arm == "policy" or self._reranker is None:
            return [Decision(self._statistics.unnormalize(chunk)) for chunk in output.actions]
        result = self._reranker(output.context, output.context_mask, self._candidates(output, generators))
        return [
            Decision(
                self._statistics.unnormalize(chunk),
                bool(accepted),
                {"energy_gain": float(energies[0] - energies.min())},
            )
            for chunk, accepted, energies in zip(result.actions, result.accepted, result.energies, strict=True)
        ]

    def _candidates(self, output: VLAOutput, generators: list[torch.Generator]) -> Tensor:
        """`(B,N,H,A)`; each row draws from its own generator, so that results do not depend on the batching."""
        assert self._reranker is not None and output.layer_actions is not None
        rows = [
            propose(
                output.actions[row : row + 1],
                output.layer_actions[row : row + 1],
                self._reranker.config.candidates,
                generator,
                gripper_dims=self._gripper,
                scale=self._scale,
            ).actions
            for row, generator in enumerate(generators)
        ]
        return torch.cat(rows)

    def _batch(
        self, images: list[np.ndarray], proprios: list[np.ndarray], instructions: list[str]
    ) -> dict[str, Tensor]:
        if images[0].shape[0] < self._num_images:
            raise ValueError(
                f"{self._folder} looks through {self._num_images} cameras, the simulator has {images[0].shape[0]}"
            )
        images = [row[: self._num_images] for row in images]  # a simulator's first camera is the main one
        frames = np.stack([center_crop(row) if self._crop else row for row in images])
        proprio = None
        if self._vla.proprio_projector is not None:
            statistics = self._statistics.proprio
            if statistics is None:
                raise ValueError(f"{self._folder} has a proprio projector but no proprio statistics")
            proprio = statistics.normalize(torch.tensor(np.stack(proprios)))
        batch = self._vla.processor.batch(frames, instructions, proprio=proprio)
        return {key: value.to(self._device) for key, value in batch.items()}


def load_policy(checkpoint: str, device: str = "cpu") -> CheckpointPolicy:
    """The policy in a checkpoint folder."""
    return CheckpointPolicy(checkpoint, device)
