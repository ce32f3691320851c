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
from vla_energy.modes import BOTH, MODES, Advisor, split_arm
from vla_energy.noise import noise_scale
from vla_energy.rerank import Reranker, check_statistics

logger = logging.getLogger(__name__)

GATES = "energy_gates.json"
"""File in a checkpoint's folder: `margins`, by mode, null for a gate that stays shut, and `tasks`, the arm that
preflight recommends by instruction, where it recommends one."""

_HEAD = "energy_head--*_checkpoint.safetensors"
_MEND = "mend it, or delete it: vla-energy preflight writes it anew"


def load_advisor(
    folder: str | Path,
    statistics: DatasetStatistics,
    horizon: int,
    action_dim: int,
    context_dim: int,
    device: torch.device | None = None,
) -> Advisor:
    """What a checkpoint's folder holds besides the policy; neither head nor memory is needed.

    Where `GATES` has no margin of `rerank`, it is the head's own, see `Reranker.from_checkpoint`. `retrieve` has none.
    The other modes keep the policy's chunk there.

    Args:
        folder: of the checkpoint.
        statistics: those that the policy's actions are normalised with.
        horizon, action_dim, context_dim: H, A and D of the policy.
        device: of the head.

    Raises:
        CheckpointError, CompatibilityError: a file is damaged, or was made for another policy.
    """
    folder = Path(folder)
    gates, tasks = load_gates(folder)
    if late := sorted(arm for arm in {*tasks.values()} if (split_arm(arm)[1] or 1) > horizon):
        raise CheckpointError(f"{folder / GATES}: arms {', '.join(late)}, but a chunk has {horizon} steps; {_MEND}")
    reranker = Reranker.from_checkpoint(folder) if any(folder.glob(_HEAD)) else None
    if reranker is not None:
        reranker.ensure_compatible(statistics, horizon, action_dim, context_dim)
        if device is not None:
            reranker.head.to(device)  # type: ignore[attr-defined]
    memory = ChunkMemory.load(folder) if any(folder.glob(f"{PREFIX}*")) else None
    if memory is not None:
        check_memory(memory, horizon, action_dim, context_dim)
        check_statistics(memory.statistics, statistics, "the memory")
    if reranker is not None and memory is not None and BOTH not in gates:
        logger.warning("no gate of %s is calibrated in %s, so it stays shut: run vla-energy preflight", BOTH, folder)
    gripper = [dim for dim, used in enumerate(statistics.action.mask) if not used]
    return Advisor(reranker, memory, gates, gripper_dims=gripper, scale=noise_scale(statistics), tasks=tasks)


def save_gates(folder: str | Path, margins: Mapping[str, float], tasks: Mapping[str, str] | None = None) -> Path:
    """Writes `GATES` into a checkpoint's folder.

    Args:
        folder: of the checkpoint.
        margins: by mode; inf keeps the gate shut. `retrieve` has none: 0, or left out.
        tasks: recommended arm by instruction, `ARM` or `ARM@n`.

    Raises:
        ValueError: `load_gates` would refuse the file; nothing is written.
    """
    tasks = dict(tasks or {})
    _check(margins, tasks)
    stored = {mode: margin if math.isfinite(margin) else None for mode, margin in margins.items()}
    text = json.dumps({"margins": stored, "tasks": tasks}, indent=1)
    return atomic_write(Path(folder) / GATES, lambda file: file.write(text.encode() + b"\n"))


def load_gates(folder: str | Path) -> tuple[dict[str, float], dict[str, str]]:
    """Margin by mode and recommended arm by instruction; both empty where nothing was calibrated.

    Raises:
        CheckpointError: the file is damaged, or says what cannot be (an unknown mode or arm, a margin that is no
            number of 0 or more, a gate for `retrieve`); the message names it.
    """
    path = Path(folder) / GATES
    if not path.is_file():
        return {}, {}
    try:
        data = json.loads(path.read_text())
        stored, tasks = data["margins"], data["tasks"]
    except (ValueError, TypeError, KeyError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}); {_MEND}") from error
    for name, part in (("margins", stored), ("tasks", tasks)):
        if not isinstance(part, dict):
            raise CheckpointError(f"{path} is damaged ({name} is {part!r}, no object); {_MEND}")
    gates = {mode: math.inf if margin is None else margin for mode, margin in stored.items()}
    try:
        _check(gates, tasks)
        return {mode: float(margin) for mode, margin in gates.items()}, tasks
    except (ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: {error}; {_MEND}") from error


def _check(margins: Mapping[str, Any], tasks: Mapping[str, Any]) -> None:
    """Raises ValueError naming the first mode, margin, task or arm that no checkpoint can have."""
    for mode, margin in margins.items():
        if mode not in MODES:
            raise ValueError(f"margins has {mode!r}: expected one of {', '.join(MODES)}")
        if not isinstance(margin, (int, float)) or isinstance(margin, bool) or not margin >= 0:
            raise ValueError(f"the margin of {mode} is {margin!r}: expected a number, 0 or more, or a shut gate (null)")
        if mode == "retrieve" and margin != 0:
            shown = "shut (null)" if margin == math.inf else margin
            raise ValueError(f"the margin of retrieve is {shown}: expected 0, plain retrieval has no gate")
    for task, arm in tasks.items():
        if not isinstance(task, str) or not isinstance(arm, str):
            raise ValueError(f"tasks has {task!r}: {arm!r}: expected an arm's name by instruction")
        try:
            known = split_arm(arm)[0] in (*MODES, "policy", "replan")
        except ValueError as error:
            raise ValueError(f"task {task!r}: {error}") from error
        if not known:
            raise ValueError(f"task {task!r} has the arm {arm!r}: expected policy, {', '.join(MODES)} or replan")
