"""What a finished policy makes of a dataset's frames, batch by batch; nothing is trained.

Memories are built from it, preflight measures on it, heads are trained on it.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vla_energy.backbones import LoadedVLA
from vla_energy.backbones.config import OpenVLAConfig
from vla_energy.backbones.diffusion import starting_noise
from vla_energy.backbones.film import has_film
from vla_energy.backbones.openvla import LayerExits
from vla_energy.backbones.tokens import sample_chunks
from vla_energy.config import CandidatesConfig, EnergyConfig
from vla_energy.crops import crop_chunks
from vla_energy.data import DatasetError
from vla_energy.finetune.config import FinetuneConfig
from vla_energy.finetune.setup import autocast, open_split, policy_statistics, prepare, vla_folder
from vla_energy.finetune.setup import data_root as data_root_of

_SEED_STRIDE = 1_000_003  # keeps the crops of neighbouring seeds apart


@dataclass(frozen=True)
class PolicyFrames:
    """B frames.

    Attributes:
        context, context_mask: `(B,S,D)` and `(B,S)`, True = valid; S may differ between batches.
        expert: `(B,H,A)` the demonstration's chunks, in the policy's statistics.
        layer_actions: `(B,L,H,A)`, the policy's chunk last.
        episodes: `(B,)` int64.
        instructions: B.
        crops: `(B,K,H,A)` the policy's chunks for K crops of the images, or None where none were asked for.
        samples: `(B,K,H,A)` K more chunks of a policy that chunks are drawn from (discrete tokens, diffusion), or None
            where none were asked for.
        steps: `(B,)` int64, place of each frame in its stored episode.
    """

    context: Tensor
    context_mask: Tensor
    expert: Tensor
    layer_actions: Tensor
    episodes: Tensor
    instructions: list[str]
    crops: Tensor | None = None
    samples: Tensor | None = None
    steps: Tensor | None = None

    @property
    def policy(self) -> Tensor:
        """`(B,H,A)` the policy's chunks."""
        return self.layer_actions[:, -1]


class NotFiniteError(ValueError):
    """What the policy makes of a frame is not finite; the message names the first such frame."""


def require_finite(frames: PolicyFrames) -> None:
    """Raises NotFiniteError where context (of valid tokens), chunks or layer exits of a frame are not finite."""
    seen = torch.where(frames.context_mask[..., None], frames.context, 0.0)
    for name, value in (("context", seen), ("chunk", frames.layer_actions), ("expert's chunk", frames.expert)):
        bad = ~value.flatten(1).isfinite().all(1)
        if bad.any():
            row = int(bad.nonzero()[0])
            step = "" if frames.steps is None else f", step {int(frames.steps[row])}"
            raise NotFiniteError(
                f"episode {int(frames.episodes[row])}{step}: the {name} is not finite: see to the policy's weights "
                "(vla-energy doctor), or to its precision"
            )


def policy_inputs(folder: Path, stored: OpenVLAConfig) -> dict[str, Any]:
    """Flags of what a checkpoint's policy reads: `num_images_in_input`, `use_proprio` and `use_film`."""
    return {
        "num_images_in_input": stored.num_images,
        "use_proprio": any(folder.glob("proprio_projector--*_checkpoint.pt")),
        "use_film": has_film(folder),
    }


class FrameReader:
    """A checkpoint's policy and a dataset it is run on.

    Args:
        checkpoint: folder, or "embedded" for the tiny one that ships with us.
        data_root, dataset: as `data_root_dir` and `dataset_name` of the fine-tuning.
        statistics_of: which of the checkpoint's statistics normalise the actions; by default the only ones, or those
            under the dataset's name. Never the dataset's own: a checkpoint's actions mean what it was trained on.
        dataset_config: file that names the fields of a dataset we do not know, as `dataset_config` of the fine-tuning.
        device: of the policy.
        seed: of the order of frames.
        precision: "fp32", or "bf16" for autocast, as in the fine-tuning.
        layer_exits: how inner layers are decoded, see `OpenVLA.forward`.

    Attributes:
        folder, data_root: of the checkpoint, and of the datasets.
        vla: the policy, in eval mode.
        statistics: in which actions are normalised.
        device: of the policy.
        num_images: cameras it looks through.
        proprio_dim: P, 0 without.

    Raises:
        DatasetError, CheckpointFolderError, FlagError: what is wrong with either, or that they do not fit.
    """

    def __init__(
        self,
        checkpoint: str,
        data_root: str,
        dataset: str,
        *,
        statistics_of: str | None = None,
        dataset_config: str | None = None,
        device: str = "cpu",
        seed: int = 0,
        precision: str = "fp32",
        layer_exits: LayerExits = "raw",
    ) -> None:
        config = FinetuneConfig(
            vla_path=checkpoint, data_root_dir=data_root, dataset_name=dataset, precision=precision, seed=seed,
            device=device, dataset_config=dataset_config, image_aug=False, energy=EnergyConfig(freeze_backbone=True),
        )  # fmt: skip
        folder = vla_folder(config)
        if not folder.is_dir():
            raise DatasetError(f"{folder} is not a folder: --checkpoint takes a checkpoint's")
        stored = OpenVLAConfig.from_folder(folder)
        for flag, value in policy_inputs(folder, stored).items():
            setattr(config, flag, value)
        config.use_diffusion = any(folder.glob("noisy_action_projector--*_checkpoint.pt"))
        config.use_l1_regression = not config.use_diffusion and stored.discrete_action_dim is None
        config.num_diffusion_steps_train = stored.num_diffusion_steps_train
        config.energy.negatives.samples.steps = 1  # nothing is trained, and T may be small
        self._job, self._config, self._crop = prepare(config), config, stored.center_crop
        self._layer_exits: LayerExits = layer_exits
        self.folder, self.data_root = folder, data_root_of(config)
        self.vla: LoadedVLA = self._job.vla.eval()
        self.device = self._job.device
        self.num_images, self.proprio_dim = (
            config.num_images_in_input,
            self._job.train.proprio_dim if config.use_proprio else 0,
        )
        self.statistics = policy_statistics(self.vla, dataset, statistics_of)

    def read(
        self,
        split: str,
        max_frames: int | None = None,
        batch_size: int = 32,
        candidates: CandidatesConfig | None = None,
        skip: int = 0,
    ) -> Generator[PolicyFrames, None, None]:
        """The frames of a split in random order, each once, at most `max_frames` of them.

        Args:
            split: of the dataset.
            max_frames: None is all.
            batch_size: B.
            candidates: with `crops`, the frames have the policy's chunks for so many crops, at places that depend on
                the reader's seed and on the frame's place in the order; the policy then reads so many more rows. With
                `samples`, the frames of a policy that chunks are drawn from have so many more chunks, drawn likewise; a
                diffusion policy's own sample depends on seed and place, too.
            skip: batches to leave out at the start, which count as read; what follows is the same as without.

        Raises:
            DatasetError: no such split.
            ValueError: samples of an L1 policy.
        """
        if candidates and candidates.samples and not (self.vla.diffuses or self.vla.discrete):
            raise ValueError(f"candidates.samples={candidates.samples}: an L1 head has one chunk")
        data = open_split(self._config, self.vla, split, self.statistics)
        most = data.num_frames if max_frames is None else max_frames
        size = min(batch_size, data.num_frames)
        left = most - skip * size
        shown = min(most, data.num_frames)
        with tqdm(total=shown, initial=shown - max(left, 0), desc=split, disable=None, unit="frame") as bar:
            for raw in data.batches(size, repeat=False, drop_last=False, skip=skip):
                if left <= 0:
                    return
                generators = self._generators(most - left, len(raw["actions"]))
                frames = self._run(raw, left, generators, candidates or CandidatesConfig())
                bar.update(len(frames.expert))
                yield frames
                left -= len(raw["actions"])

    def frames(self, split: str) -> int:
        """Frames of a split."""
        return open_split(self._config, self.vla, split, self.statistics).num_frames

    def tokens(self, split: str, frames: int = 64) -> float:
        """Mean number of context tokens of a split's first `frames` in random order, told without the policy."""
        data = open_split(self._config, self.vla, split, self.statistics)
        raw = next(data.batches(min(frames, data.num_frames), repeat=False))
        texts = raw["instructions"]
        # The last token of the prompt predicts the first action: it is not context.
        prompts = sum(len(self.vla.processor.prompt_ids(text)) - 1 for text in texts) / len(texts)
        patches = self.vla.backbone.vision_backbone.num_patches * self.num_images
        return patches + (self.proprio_dim > 0) + prompts

    def _generators(self, first: int, rows: int) -> list[torch.Generator]:
        seeds = (self._config.seed * _SEED_STRIDE + first + row for row in range(rows))
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def _crops(
        self, raw: dict[str, Any], rows: int, generators: list[torch.Generator], candidates: CandidatesConfig
    ) -> Tensor:
        images, texts, proprio = raw["images"][:rows], list(raw["instructions"])[:rows], raw.get("proprio")
        generators = generators[: len(images)]
        proprio = None if proprio is None else torch.tensor(proprio)[:rows]
        return crop_chunks(self.vla, images, texts, proprio, generators, candidates).float()

    @torch.no_grad()
    def _run(
        self, raw: dict[str, Any], rows: int, generators: list[torch.Generator], candidates: CandidatesConfig
    ) -> PolicyFrames:
        batch, noise = self._job.to_batch(raw, crop=self._crop), None
        drawing = generators[:rows]
        if self.vla.diffuses:
            noise, generators = starting_noise(generators, candidates.samples, self.vla.horizon, self.vla.action_dim)
        with autocast(self._config, self.device):
            output = self.vla(batch, self._layer_exits, noise)
        crops = self._crops(raw, rows, generators, candidates) if candidates.crops else None
        assert output.layer_actions is not None
        samples = None if output.samples is None else output.samples[:rows]
        if output.token_logits is not None and candidates.samples:
            drawn = (candidates.samples, candidates.sample_temperature, drawing)
            samples = sample_chunks(output.token_logits[:rows], *drawn, self.vla.action_dim, self.vla.config)
        length = int(output.context_mask.any(0).nonzero().max()) + 1
        return PolicyFrames(
            output.context[:rows, :length].float(),
            output.context_mask[:rows, :length],
            batch["actions"][:rows].float(),
            output.layer_actions[:rows].float(),
            torch.tensor(raw["episode"], dtype=torch.int64)[:rows],
            list(raw["instructions"])[:rows],
            crops,
            samples,
            torch.tensor(raw["step"], dtype=torch.int64)[:rows],
        )
