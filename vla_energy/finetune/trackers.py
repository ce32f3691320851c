"""Where rows of metrics are shown: TensorBoard always, Weights & Biases and Trackio where they are asked for.

`metrics.jsonl` has every row whatever happens here: a tracker that cannot start, or fails on the way, is said once and
left out from then on, and training goes on. Afterwards the rows can be sent again:

    python -m vla_energy.finetune.trackers runs/mine --wandb_project NAME
    python -m vla_energy.finetune.trackers runs/mine --trackio_project NAME

Names of metrics are the same everywhere, and those of `metrics.jsonl`: `train/l1`, `energy/loss`, `energy/positive`,
`energy/negative`, `energy/gap`, `energy/top1`, `val/...`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from vla_energy.finetune.config import FinetuneConfig, FlagError
from vla_energy.results import SETTINGS, read_rows

logger = logging.getLogger(__name__)

TRACKIO = "TRACKIO_PROJECT"
"""Environment variable with the project's name, where `--trackio_project` does not say it."""


_REMEDIES = {
    "W&B": "log in once with `wandb login`; without a network set WANDB_MODE=offline, and `wandb sync` sends it later",
    "Trackio": "its runs are on this machine: is its folder writable, and `pip install --upgrade trackio` done?",
}
"""What to do when the rows cannot be sent again."""


class Tracker(Protocol):
    """What a tracker does."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Shows one row; values may be NaN or infinite."""

    def close(self) -> None:
        """Ends the run; nothing is logged afterwards."""


class TensorBoard:
    """Events in the folder `tensorboard` of a run.

    Args:
        run_dir: of the run.
        step: a run that is resumed there hides what was logged of later steps.
    """

    def __init__(self, run_dir: Path, step: int = 0) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(run_dir / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """One point a metric."""
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


class Project:
    """A run in a project of wandb or trackio, whose modules have the same functions `log` and `finish`.

    Args:
        module: either, as `installed` gives it.
        init: what its `init` takes.
    """

    def __init__(self, module: Any, **init: Any) -> None:
        self._module = module
        self._run = module.init(**init)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """One row."""
        target = self._run if hasattr(self._run, "log") else self._module
        target.log(dict(metrics), step=step)

    def close(self) -> None:
        """Sends what is left."""
        target = self._run if hasattr(self._run, "finish") else self._module
        target.finish()


class Guarded:
    """A tracker whose failure costs nothing but itself: said once, with the remedy, then left out.

    Args:
        name: for people.
        start: makes the tracker.
        run_dir: whose `metrics.jsonl` keeps the rows.
    """

    def __init__(self, name: str, start: Callable[[], Tracker], run_dir: Path) -> None:
        self.name, self._run_dir = name, run_dir
        self._tracker: Tracker | None = None
        self._attempt(lambda: setattr(self, "_tracker", start()))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """One row, while the tracker works."""
        if (tracker := self._tracker) is not None:
            self._attempt(lambda: tracker.log(metrics, step))

    def close(self) -> None:
        """Ends the tracker's run."""
        if (tracker := self._tracker) is not None:
            self._attempt(tracker.close)
        self._tracker = None

    def _attempt(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # of a library and of a network: there is no list of them
            self._tracker = None
            project = {"W&B": " --wandb_project NAME", "Trackio": " --trackio_project NAME"}.get(self.name)
            again = "" if project is None else (
                f"; send the rows when it works again: python -m vla_energy.finetune.trackers {self._run_dir}{project}"
            )  # fmt: skip
            logger.warning(
                "%s failed and is left out (%s: %s); %s has every row%s",
                self.name, type(error).__name__, error, self._run_dir / "metrics.jsonl", again,
            )  # fmt: skip


def installed(module: str, flag: str) -> Any:
    """The tracker's module.

    Raises:
        FlagError: it is asked for by `flag` and not installed, or its own import fails.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever runs when a library is imported
        if isinstance(error, ImportError) and importlib.util.find_spec(module) is None:
            raise FlagError(f"{flag} is set but {module} is not installed: pip install {module}") from error
        raise FlagError(
            f"{flag} is set but {module}, which is installed, cannot be imported ({type(error).__name__}: {error}): "
            f"mend it, as with pip install --upgrade {module}, or leave the flag out"
        ) from error


def wanted_trackers(
    config: FinetuneConfig, settings: Mapping[str, Any], step: int = 0
) -> dict[str, Callable[[], Tracker]]:
    """Name -> what starts it, of the trackers of a run.

    Args:
        config: its `run_dir` gets TensorBoard's events; `wandb_project` and `wandb_entity` are the original's flags.
        settings: shown beside the run.
        step: that the run goes on from.

    Raises:
        FlagError: W&B or Trackio is asked for and not installed, or cannot be imported.
    """
    run_dir = config.run_dir
    trackio = config.trackio_project or os.environ.get(TRACKIO, "")
    wanted = projects(config.wandb_project, config.wandb_entity, trackio, run_dir, settings)
    return {"TensorBoard": lambda: TensorBoard(run_dir, step), **wanted}


def projects(
    wandb_project: str, wandb_entity: str, trackio_project: str, run_dir: Path, settings: Mapping[str, Any]
) -> dict[str, Callable[[], Tracker]]:
    """Name -> what starts it, of W&B and Trackio where a project is named; the run is called `ft+` and the folder.

    Raises:
        FlagError: it is not installed, or cannot be imported.
    """
    wanted: dict[str, Callable[[], Tracker]] = {}
    run, shown = f"ft+{run_dir.name}", json.loads(json.dumps(dict(settings), default=str))
    if wandb_project:
        wandb = installed("wandb", "--wandb_project")
        owner = wandb_entity or None
        wanted["W&B"] = lambda: Project(wandb, entity=owner, project=wandb_project, name=run, config=shown)
    if trackio_project:
        trackio = installed("trackio", f"--trackio_project (or {TRACKIO})")
        wanted["Trackio"] = lambda: Project(trackio, project=trackio_project, name=run, config=shown)
    return wanted


def send(rows: Sequence[Mapping[str, Any]], tracker: Tracker) -> None:
    """Logs the rows of a `metrics.jsonl`, null as NaN, and closes the tracker."""
    for row in rows:
        values = {key: math.nan if value is None else value for key, value in row.items() if key != "step"}
        tracker.log(values, row["step"])
    tracker.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Sends a run's rows to a tracker again; returns the exit code: 1 where a tracker fails, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder with metrics.jsonl")
    parser.add_argument("--wandb_project", default="", metavar="NAME")
    parser.add_argument("--wandb_entity", default="", metavar="NAME")
    parser.add_argument("--trackio_project", default="", metavar="NAME")
    args = parser.parse_args(argv)
    try:
        rows = read_rows(args.run, lambda note: print(f"note: {note}", file=sys.stderr))
        stored = args.run / SETTINGS
        settings = json.loads(stored.read_text()) if stored.is_file() else {}
        run = args.run.resolve()
        wanted = projects(args.wandb_project, args.wandb_entity, args.trackio_project, run, settings)
        if not wanted:
            raise ValueError("name a project: --wandb_project NAME or --trackio_project NAME")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = False
    for name, start in wanted.items():
        try:
            send(rows, start())
            print(f"{name}: {len(rows)} rows")
        except Exception as error:  # of a library and of a network: there is no list of them
            failed = True
            told = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"error: {name} failed ({told}); {_REMEDIES[name]}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
