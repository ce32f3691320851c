"""A checkpoint folder's head, memory and calibrated gates as one `Advisor`."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vla_energy.actions import DatasetStatistics
from vla_energy.checkpoint import CheckpointError, atomic_write
from vla_energy.memory import PREFIX, ChunkMemory, check_memory
from vla_energy.modes import BOTH, Advisor
from vla_energy.noise import noise_scale
from vla_energy.rerank import Reranker, check_statistics

logger = logging.getLogger(__name__)

GATES = "energy_gates.json"
"""File in a checkpoint's folder: `margins`, by mode, null for a gate that stays shut, and `tasks`, the mode that
preflight recommends by instruction, where it recommends one."""

_HEAD = "energy_head--*_checkpoint.safetensors"


def load_advisor(
    folder: str | Path,
    statistics: DatasetStatistics,
    horizon: int,
    action_dim: int,
    context_dim: int,
    device: torch.device | None = None,
) -> Advisor:
    """What a checkpoint's folder holds besides the policy; neither head nor memory is needed.

    Args:
        folder: of the checkpoint.
        statistics: those that the policy's actions are normalised with.
        horizon, action_dim, context_dim: H, A and D of the policy.
        device: of the head.

    Raises:
        CheckpointError, CompatibilityError: a file is damaged, or was made for another policy.
    """
    folder = Path(folder)
    reranker = Reranker.from_checkpoint(folder) if any(folder.glob(_HEAD)) else None
    if reranker is not None:
        reranker.ensure_compatible(statistics, horizon, action_dim, context_dim)
        if device is not None:
            reranker.head.to(device)  # type: ignore[attr-defined]
    memory = ChunkMemory.load(folder) if any(folder.glob(f"{PREFIX}*")) else None
    if memory is not None:
        check_memory(memory, horizon, action_dim, context_dim)
        check_statistics(memory.statistics, statistics, "the memory")
    gates, tasks = load_gates(folder)
    if reranker is not None and memory is not None and BOTH not in gates:
        logger.warning("no gate of %s is calibrated in %s, so it stays shut: run vla-energy preflight", BOTH, folder)
    gripper = [dim for dim, used in enumerate(statistics.action.mask) if not used]
    return Advisor(reranker, memory, gates, gripper_dims=gripper, scale=noise_scale(statistics), tasks=tasks)


def save_gates(folder: str | Path, margins: Mapping[str, float], tasks: Mapping[str, str] | None = None) -> Path:
    """Writes `GATES` into a checkpoint's folder.

    Args:
        folder: of the checkpoint.
        margins: by mode; inf keeps the gate shut.
        tasks: recommended mode by instruction.
    """
    stored = {mode: margin if math.isfinite(margin) else None for mode, margin in margins.items()}
    text = json.dumps({"margins": stored, "tasks": dict(tasks or {})}, indent=1)
    return atomic_write(Path(folder) / GATES, lambda file: file.write(text.encode() + b"\n"))


def load_gates(folder: str | Path) -> tuple[dict[str, float], dict[str, str]]:
    """Margin by mode and recommended mode by instruction; both empty where nothing was calibrated.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = Path(folder) / GATES
    if not path.is_file():
        return {}, {}
    try:
        data = json.loads(path.read_text())
        stored: dict[str, Any] = dict(data["margins"])
        gates = {mode: math.inf if margin is None else float(margin) for mode, margin in stored.items()}
        tasks = {str(task): str(mode) for task, mode in dict(data["tasks"]).items()}
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); vla-energy preflight writes it") from error
    if wrong := [mode for mode, margin in gates.items() if not margin >= 0]:
        raise CheckpointError(f"{path}: margins of {', '.join(wrong)} are not 0 or more")
    return gates, tasks
