"""Frozen features for the benchmarks of the head: contexts, expert chunks, layer exits of a policy on demonstrations.

Kept in memory and in one file beside the results, so that variants of the head are compared on the same numbers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from vla_energy.finetune.config import FinetuneConfig
from vla_energy.finetune.setup import open_split, prepare, vla_folder
from vla_energy.sources import ActionTraits


@dataclass
class Features:
    """M frames.

    Attributes:
        context: `(M,S,D)` half precision, valid columns only.
        mask: `(M,S)` bool, True = valid.
        expert: `(M,H,A)` normalised.
        layers: `(M,L,H,A)` normalised, the policy's chunk last.
        episode: `(M,)`.
        scale, low, high: `(A,)` of the action space, see `ActionTraits`.
        gripper: gripper dimensions.
    """

    context: Tensor
    mask: Tensor
    expert: Tensor
    layers: Tensor
    episode: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor
    gripper: Tensor

    def __len__(self) -> int:
        return len(self.expert)

    @property
    def traits(self) -> ActionTraits:
        """Of the action space."""
        return ActionTraits(self.scale, tuple(self.gripper.tolist()), self.low, self.high)

    @property
    def policy_l1(self) -> float:
        """Mean absolute error of the policy's chunks, normalised units."""
        return float((self.layers[:, -1] - self.expert).abs().mean())

    def first(self, count: int) -> Features:
        """The first `count` frames; they are in random order."""
        parts = ("context", "mask", "expert", "layers", "episode")
        return replace(self, **{name: getattr(self, name)[:count] for name in parts})

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`context, mask, expert, layers` of these rows, fp32."""
        return self.context[rows].float(), self.mask[rows], self.expert[rows], self.layers[rows]


def load_or_extract(
    folder: Path, checkpoint: str, data_root: str, dataset: str, split: str, frames: int, seed: int = 0
) -> Features:
    """Features of at most `frames` frames, drawn over all episodes of the split; from `folder` if they are there."""
    stamp = _stamp(checkpoint, data_root, dataset, split, frames, seed)
    path = folder / f"features-{split}-{stamp}.pt"
    if path.is_file():
        return Features(**torch.load(path, weights_only=True))
    features = extract(checkpoint, data_root, dataset, split, frames, seed)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({entry.name: getattr(features, entry.name) for entry in fields(features)}, path)
    return features


def extract(checkpoint: str, data_root: str, dataset: str, split: str, frames: int, seed: int = 0) -> Features:
    """Runs the policy over the split, without gradient, in eval mode, actions in the policy's own statistics."""
    config = FinetuneConfig(
        vla_path=checkpoint, data_root_dir=data_root, dataset_name=dataset, use_proprio=True, image_aug=False,
        precision="fp32", seed=seed, device="cpu",
    )  # fmt: skip
    config.energy.freeze_backbone = True
    job = prepare(config)
    own = job.vla.statistics
    # A fine-tuned checkpoint holds one entry; the shipped one is applied to data with statistics of their own.
    statistics = next(iter(own.values())) if checkpoint != "embedded" and len(own) == 1 else job.statistics
    data = open_split(config, job.vla, split, statistics)
    batches = data.batches(64, repeat=False, drop_last=False)
    parts: dict[str, list[Tensor]] = {name: [] for name in ("context", "mask", "expert", "layers", "episode")}
    seen = 0
    job.vla.eval()
    for raw in batches:
        batch = job.to_batch(raw)
        with torch.no_grad():
            output = job.vla(batch)
        length = int(output.context_mask.any(0).nonzero().max()) + 1
        parts["context"].append(output.context[:, :length].half())
        parts["mask"].append(output.context_mask[:, :length])
        parts["expert"].append(batch["actions"])
        parts["layers"].append(output.layer_actions)
        parts["episode"].append(torch.as_tensor(raw["episode"]))
        seen += len(batch["actions"])
        if seen >= frames:
            break
    length = max(part.shape[1] for part in parts["mask"])
    padded = {
        "context": [torch.nn.functional.pad(p, (0, 0, 0, length - p.shape[1])) for p in parts["context"]],
        "mask": [torch.nn.functional.pad(p, (0, length - p.shape[1])) for p in parts["mask"]],
    }
    joined = {name: torch.cat(padded.get(name, part))[:frames].contiguous() for name, part in parts.items()}
    traits = ActionTraits.of(statistics)
    gripper = torch.tensor(traits.gripper_dims, dtype=torch.long)
    return Features(**joined, scale=traits.scale, low=traits.low, high=traits.high, gripper=gripper)


def _stamp(checkpoint: str, *rest: object) -> str:
    """Changes when the checkpoint's weights do."""
    folder = vla_folder(FinetuneConfig(vla_path=checkpoint))
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*head--*"))
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((facts, rest)).encode()).hexdigest()[:12]
