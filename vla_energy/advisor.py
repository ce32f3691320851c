"""A checkpoint folder's head, memory and calibrated gates as one `Advisor`."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from vla_energy.actions import DatasetStatistics
from vla_energy.arms import BOTH, split_arm
from vla_energy.checkpoint import CheckpointError
from vla_energy.compatibility import check_statistics
from vla_energy.gates import GATES, MEND, load_gates
from vla_energy.memory import PREFIX, ChunkMemory, check_memory
from vla_energy.modes import Advisor
from vla_energy.noise import noise_scale
from vla_energy.rerank import Reranker

logger = logging.getLogger(__name__)

_HEAD = "energy_head--*_checkpoint.safetensors"


def load_advisor(
    folder: str | Path,
    statistics: DatasetStatistics,
    horizon: int,
    action_dim: int,
    context_dim: int,
    device: torch.device | None = None,
    *,
    calibrates: bool = False,
) -> Advisor:
    """What a checkpoint's folder holds besides the policy; neither head nor memory is needed.

    Where `GATES` has no margin of `rerank`, it is the head's own, see `Reranker.from_checkpoint`. `retrieve` has none.
    The other modes keep the policy's chunk there.

    Args:
        folder: of the checkpoint.
        statistics: those that the policy's actions are normalised with.
        horizon, action_dim, context_dim: H, A and D of the policy.
        device: of the head.
        calibrates: the caller is about to do so, and need not be told to.

    Raises:
        CheckpointError, CompatibilityError: a file is damaged, or was made for another policy.
    """
    folder = Path(folder)
    gates, tasks = load_gates(folder)
    if late := sorted(arm for arm in {*tasks.values()} if (split_arm(arm)[1] or 1) > horizon):
        raise CheckpointError(f"{folder / GATES}: arms {', '.join(late)}, but a chunk has {horizon} steps; {MEND}")
    reranker = Reranker.from_checkpoint(folder, strict=True) if any(folder.glob(_HEAD)) else None
    if reranker is not None:
        reranker.ensure_compatible(statistics, horizon, action_dim, context_dim)
        if device is not None:
            reranker.head.to(device)  # type: ignore[attr-defined]
    memory = ChunkMemory.load(folder) if any(folder.glob(f"{PREFIX}*")) else None
    if memory is not None:
        check_memory(memory, horizon, action_dim, context_dim)
        check_statistics(memory.statistics, statistics, "the memory")
    if reranker is not None and memory is not None and BOTH not in gates and not calibrates:
        logger.warning("no gate of %s is calibrated in %s, so it stays shut: run vla-energy preflight", BOTH, folder)
    gripper = [dim for dim, used in enumerate(statistics.action.mask) if not used]
    return Advisor(reranker, memory, gates, gripper_dims=gripper, scale=noise_scale(statistics), tasks=tasks)
