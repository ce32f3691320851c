"""Where metrics go: `metrics.jsonl` always, and the trackers beside it."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict

from vla_energy.checkpoint import CheckpointError, atomic_write
from vla_energy.finetune.config import FinetuneConfig
from vla_energy.finetune.trackers import Guarded, wanted_trackers
from vla_energy.results import SETTINGS, versions


class MetricLog:
    """Writes rows of scalars; a context manager.

    Args:
        config: its `run_dir` gets `metrics.jsonl`, `SETTINGS` and TensorBoard's events; see `trackers` for the others.
        step: rows after this step are dropped from an existing `metrics.jsonl`, as a resumed run writes them anew.

    Raises:
        FlagError: W&B or Trackio is asked for and not installed.
        CheckpointError: `metrics.jsonl` of a resumed run is damaged, or cannot be written.
    """

    def __init__(self, config: FinetuneConfig, step: int) -> None:
        self._path = config.run_dir / "metrics.jsonl"
        settings = {"flags": asdict(config), "versions": versions()}
        wanted = wanted_trackers(config, settings, step)  # raises before anything is written
        kept = self._kept(step) if config.resume else []
        # Whole or not at all: a kill while this is written must not lose the rows of the steps before.
        atomic_write(self._path, lambda file: file.write(b"".join(row + b"\n" for row in kept)))
        text = json.dumps(settings, indent=1, default=str) + "\n"
        atomic_write(config.run_dir / SETTINGS, lambda file: file.write(text.encode()))
        self._trackers = [Guarded(name, start, config.run_dir) for name, start in wanted.items()]

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
        for tracker in self._trackers:
            tracker.close()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One row; values that are not finite become null in the file, as JSON has no NaN."""
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")
        for tracker in self._trackers:
            tracker.log(metrics, step)
