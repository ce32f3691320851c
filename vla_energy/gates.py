"""The calibrated gates of a checkpoint's folder, and the arms that preflight recommends: a file, read with care."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vla_energy.arms import MODES, split_arm
from vla_energy.checkpoint import CheckpointError, atomic_write

GATES = "energy_gates.json"
"""File in a checkpoint's folder: `margins`, by mode, null for a gate that stays shut, and `tasks`, the arm that
preflight recommends by instruction, where it recommends one."""

MEND = "mend it, or delete it: vla-energy preflight writes it anew"


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
        # Taken for no gates, the policy would drive alone, or with the head's own margin, and nobody be told.
        if os.path.lexists(path):
            raise CheckpointError(f"{path} is a folder, a link to nothing or no regular file; {MEND}")
        return {}, {}
    try:
        data = json.loads(path.read_text())
        stored, tasks = data["margins"], data["tasks"]
    except (ValueError, TypeError, KeyError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}); {MEND}") from error
    for name, part in (("margins", stored), ("tasks", tasks)):
        if not isinstance(part, dict):
            raise CheckpointError(f"{path} is damaged ({name} is {part!r}, no object); {MEND}")
    gates = {mode: math.inf if margin is None else margin for mode, margin in stored.items()}
    try:
        _check(gates, tasks)
        return {mode: float(margin) for mode, margin in gates.items()}, tasks
    except (ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: {error}; {MEND}") from error


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
