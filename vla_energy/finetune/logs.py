"""Where metrics go: `metrics.jsonl` always, TensorBoard beside it, W&B if a project is named."""

from __future__ import annotations

import importlib
import json
import math
import os
from typing import Any

from vla_energy.checkpoint import CheckpointError, atomic_write
from vla_energy.finetune.config import FinetuneConfig, FlagError


class MetricLog:
    """Writes rows of scalars; a context manager.

    Args:
        config: its `run_dir` gets `metrics.jsonl` and TensorBoard's events.
        step: rows after this step are dropped from an existing `metrics.jsonl`, as a resumed run writes them anew.

    Raises:
        FlagError: a W&B project is named and wandb is not installed.
        CheckpointError: `metrics.jsonl` of a resumed run is damaged, or cannot be written.
    """

    def __init__(self, config: FinetuneConfig, step: int) -> None:
        self._path = config.run_dir / "metrics.jsonl"
        self._wandb = self._start_wandb(config)
        kept = self._kept(step) if config.resume else []
        # Whole or not at all: a kill while this is written must not lose the rows of the steps before.
        atomic_write(self._path, lambda file: file.write(b"".join(row + b"\n" for row in kept)))
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._tensorboard = writer(str(config.run_dir / "tensorboard"), purge_step=step + 1 if step else None)

    def _kept(self, step: int) -> list[bytes]:
        """Rows up to `step`; of a killed run the last one may be torn, and is of a step that is taken again."""
        try:
            rows = self._path.read_bytes().splitlines() if self._path.exists() else []
        except OSError as error:
            raise CheckpointError(f"{self._path} cannot be read: {error}") from error
        kept = []
        for number, row in enumerate(rows, start=1):
            try:
                if json.loads(row)["step"] <= step:
                    kept.append(row)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                if number < len(rows):
                    raise CheckpointError(
                        f"{self._path}: line {number} is damaged ({error}); mend or delete that line, then resume"
                    ) from error
        return kept

    def sync(self) -> None:
        """Makes the rows durable, before a checkpoint says that their steps were taken."""
        with self._path.open("ab") as file:
            os.fsync(file.fileno())

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One row; values that are not finite become null in the file, as JSON has no NaN."""
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")
        for key, value in metrics.items():
            self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)

    @staticmethod
    def _start_wandb(config: FinetuneConfig) -> Any:
        if not config.wandb_project:
            return None
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise FlagError("--wandb_project is set but wandb is not installed: pip install wandb") from error
        return wandb.init(
            entity=config.wandb_entity or None, project=config.wandb_project, name=f"ft+{config.run_dir.name}"
        )
