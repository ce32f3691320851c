"""Vision towers of OpenVLA on timm, and the projector into the language model's width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vla_energy.backbones import timm_models
from vla_energy.backbones.config import CheckpointFolderError, OpenVLAConfig
from vla_energy.backbones.film import film_layers, modulated_features


class VisionBackbone(nn.Module):
    """One or two timm vision transformers; the patch features of two are concatenated by channel.

    Features come from the second-to-last block, without its final norm (Prismatic's choice).

    Args:
        config: of the checkpoint.
        film_dim: width of the language embeddings that modulate every block (FiLM); None is without.
    """

    def __init__(self, config: OpenVLAConfig, film_dim: int | None = None) -> None:
        super().__init__()
        towers = [
            timm_models.create(name, size, act)
            for name, size, act in zip(config.timm_model_ids, config.image_sizes, config.act_layers, strict=True)
        ]
        if len(towers) > 2:
            raise CheckpointFolderError(f"{len(towers)} vision towers; one or two are supported")
        self.featurizer = towers[0]
        self.fused_featurizer = towers[1] if len(towers) == 2 else None
        self.embed_dim = sum(int(tower.embed_dim) for tower in towers)  # type: ignore[arg-type]
        self.num_patches = int(towers[0].patch_embed.num_patches)  # type: ignore[union-attr, arg-type]
        named: dict[str, nn.Module] = dict(zip(("featurizer", "fused_featurizer"), towers, strict=False))
        self.film = None if film_dim is None else film_layers(named, film_dim)

    @property
    def channels(self) -> int:
        """Channels of one image: three a tower."""
        return 3 if self.fused_featurizer is None else 6

    def forward(self, pixel_values: Tensor, language: Tensor | None = None) -> Tensor:
        """`(B, channels * images, height, width)` -> `(B, patches * images, embed_dim)`, images in order.

        Args:
            pixel_values: of all images.
            language: `(B, film_dim)` mean language embedding, with FiLM only.

        Raises:
            ValueError: the channel count is not a multiple of `channels`, or `language` is missing or not wanted.
        """
        batch, channels = pixel_values.shape[:2]
        if channels % self.channels:
            raise ValueError(f"pixel_values has {channels} channels, not a multiple of {self.channels}")
        if (language is None) != (self.film is None):
            raise ValueError("a language embedding is needed with FiLM, and with FiLM only")
        images = pixel_values.reshape(-1, self.channels, *pixel_values.shape[2:])
        if language is not None:
            language = language.repeat_interleave(len(images) // batch, dim=0)
        features = self._features("featurizer", images[:, :3], language)
        if self.fused_featurizer is not None:
            fused = self._features("fused_featurizer", images[:, 3:], language)
            features = torch.cat([features, fused], dim=-1)
        return features.reshape(batch, -1, self.embed_dim)

    def _features(self, name: str, images: Tensor, language: Tensor | None) -> Tensor:
        tower = getattr(self, name)
        if self.film is None or language is None:
            return _patch_features(tower, images)
        return modulated_features(tower, self.film[name], images, language)  # type: ignore[arg-type]


def _patch_features(tower: nn.Module, images: Tensor) -> Tensor:
    # stop_early: the last block's output is never read, so it is not computed either.
    (features,) = tower.forward_intermediates(  # type: ignore[operator, misc]
        images,
        indices=[len(tower.blocks) - 2],  # type: ignore[arg-type]
        norm=False,
        stop_early=True,
        output_fmt="NLC",
        intermediates_only=True,
    )
    return features


class Projector(nn.Module):
    """Patch features to language-model width: three layers for fused towers, two for a single one."""

    def __init__(self, vision_dim: int, text_dim: int, *, fused: bool) -> None:
        super().__init__()
        hidden = 4 * vision_dim if fused else text_dim
        self.fc1 = nn.Linear(vision_dim, hidden)
        self.fc2 = nn.Linear(hidden, text_dim)
        self.fc3 = nn.Linear(text_dim, text_dim) if fused else None
        self.activation = nn.GELU()

    def forward(self, features: Tensor) -> Tensor:
        """`(..., vision_dim)` -> `(..., text_dim)`."""
        out = self.fc2(self.activation(self.fc1(features)))
        return out if self.fc3 is None else self.fc3(self.activation(out))
