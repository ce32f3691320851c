"""What choosing costs on a real policy: its forward, and each mode whole, one observation at a time as a robot asks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vla_energy.advisor import load_advisor
from vla_energy.config import EnergyConfig
from vla_energy.finetune.config import EMBEDDED
from vla_energy.finetune.frames import FrameReader
from vla_energy.head import EnergyHead
from vla_energy.modes import Advisor, Frame
from vla_energy.rerank import Reranker, scoring


def policy_runs(checkpoint: str, data_root: str, dataset: str, candidates: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name; each call does it once for one observation.

    The shipped policy has no head: an untrained one takes its place.
    """
    reader = FrameReader(checkpoint, data_root, dataset)
    vla = reader.vla
    if checkpoint == EMBEDDED:
        head = EnergyHead(vla.context_dim, vla.action_dim, vla.horizon, EnergyConfig()).eval()
        advisor = Advisor(Reranker(head, reader.statistics, EnergyConfig(), strict=True))
    else:
        advisor = load_advisor(checkpoint, reader.statistics, vla.horizon, vla.action_dim, vla.context_dim)
    return _runs(reader, advisor, candidates)


def _runs(reader: FrameReader, advisor: Advisor, candidates: int) -> dict[str, Callable[[], object]]:
    frames = next(reader.read("val", 1, batch_size=1))
    assert advisor.reranker is not None
    frame = Frame(frames.context, frames.context_mask, frames.policy, frames.layer_actions)
    head, vla = advisor.reranker.head, reader.vla
    with scoring(head):
        encoded = head.encode(frames.context, frames.context_mask, frames.policy)
    one = frames.policy[:, None]
    many = one.expand(-1, candidates, -1, -1) + 0.05 * torch.randn(1, candidates, *one.shape[2:])
    size = vla.processor.image_size
    batch = vla.processor.batch(
        torch.zeros(1, reader.num_images, *size, 3, dtype=torch.uint8).numpy(), frames.instructions,
        proprio=torch.zeros(1, reader.proprio_dim) if reader.proprio_dim else None,
    )  # fmt: skip
    table: dict[str, Callable[[], object]] = {
        "policy's forward": lambda: vla.predict(batch, "off"),
        "encode": lambda: head.encode(frames.context, frames.context_mask, frames.policy),
        "score 1": lambda: head(encoded, one),
        f"score {candidates}": lambda: head(encoded, many),
    }
    for mode in advisor.modes:
        table[mode] = lambda mode=mode: advisor.propose(mode, frame, [torch.Generator()])
    return table
