"""What a run's folder holds for the report, and what it lacks; nothing of it needs the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vla_energy.report.expected import FILES, difference
from vla_energy.report.notes import tell_missing, tell_others, tell_unfinished
from vla_energy.results import FOOTAGE, SETTINGS, SHAPES, finite, read_rows

_GATES = "energy_gates.json"
_LABEL = 20
UNDEFINED = frozenset({"val/gate/margin", "val/gate/worse"})
"""Null by design: the margin of a gate that is shut, and a share of no frames."""


class ReportError(ValueError):
    """A folder or file cannot be reported on; the message names it."""


@dataclass
class Run:
    """One run.

    Attributes:
        folder: as it was named.
        rows: of `metrics.jsonl`, in order.
        metrics: held-out measures as in the demo's `metrics.json`; else rebuilt from the last validation in `rows`.
        settings: flags of the run.
        versions: of Python and packages.
        rollout: as in `rollout.summary`, None without.
        preflight: as `preflight.verdict.judge` gives it, None without.
        gates: `margins` and `tasks` of the checkpoint, None where preflight has written none.
        shapes: see `finetune.shapes`, None without.
        footage: see `rollout.footage`, None without.
        missing: what is not there -> what would make it.
        notes: what to know before believing the page.
        label: short, different from that of the other runs on the page.
    """

    folder: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    rollout: dict[str, Any] | None = None
    preflight: dict[str, Any] | None = None
    gates: dict[str, Any] | None = None
    shapes: dict[str, Any] | None = None
    footage: dict[str, Any] | None = None
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    label: str = ""

    def last(self) -> dict[str, float | None]:
        """The last value of every metric of `rows`; None where that was not finite."""
        values: dict[str, float | None] = {}
        for row in self.rows:
            values.update({key: value for key, value in row.items() if key != "step"})
        return values

    def not_finite(self) -> dict[str, list[int]]:
        """Metric -> steps of the rows that hold it without a finite number; `UNDEFINED` is left out."""
        steps: dict[str, list[int]] = {}
        for row in self.rows:
            for key, value in row.items():
                if key not in UNDEFINED and not finite(value):
                    steps.setdefault(key, []).append(row["step"])
        return steps


def read_run(folder: str | Path, preflight: str | Path | None = None, rollout: str | Path | None = None) -> Run:
    """Reads a run's folder, or that of one of its checkpoints: then the run's files are looked for beside it.

    Args:
        folder: of a run (`metrics.jsonl` in it) or of a checkpoint (`latest` in a run, or `RUN--{step}_chkpt`).
        preflight: `preflight.json` or the folder it is in, where it is not in the run's.
        rollout: results of `vla-energy rollout`, where they are not `rollout.json` in the run's folder.

    Raises:
        ReportError: the folder is not there, holds nothing of a run, or a file is damaged.
        ValueError: as in `read_rows`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ReportError(f"{folder} is not a folder: name a run's, such as runs/demo, or a checkpoint's")
    places = _places(folder)
    home = next((place for place in places if (place / "metrics.jsonl").is_file()), None)
    run = Run(folder, label=folder.name if folder.name != "latest" else f"{folder.parent.name}/latest")
    if home is None:
        where = " or ".join(str(place) for place in places)
        run.missing["curves and settings"] = f"no metrics.jsonl in {where}: it is written while a run trains"
    else:
        run.rows = read_rows(home, run.notes.append)
    found = {name: _find(places, name) for name in ("metrics.json", "rollout.json", "preflight.json", SETTINGS)}
    found |= {name: _find(places, name) for name in (SHAPES, FOOTAGE)}
    checkpoints = [*places, *_checkpoints(home or folder)]
    gates = _find(checkpoints, _GATES)
    if not any((*found.values(), home, gates, preflight, rollout)):
        raise ReportError(
            f"{folder} holds none of metrics.jsonl, {', '.join(found)}, {_GATES}: nothing to report on; name the "
            "folder of a run of scripts/finetune_energy.py, vla-energy train-head or the demo"
        )
    given = {"preflight.json": _file(preflight, "preflight.json"), "rollout.json": _file(rollout, "rollout.json")}
    texts = {name: _read(given.get(name) or path, name, given.get(name) is not None) for name, path in found.items()}
    run.metrics = texts["metrics.json"] or _from_rows(run.rows)
    stored = texts[SETTINGS] or {}
    run.settings, run.versions = stored.get("flags", {}), stored.get("versions") or run.metrics.get("versions", {})
    run.rollout = texts["rollout.json"] or run.metrics.get("rollout")
    run.preflight, run.shapes, run.footage = texts["preflight.json"], texts[SHAPES], texts[FOOTAGE]
    run.gates = _read(gates, _GATES)
    tell_missing(run, home)
    tell_unfinished(run)
    tell_others(run, [place for place in checkpoints if (place / "config.json").is_file()])
    return run


def read_runs(
    folders: Sequence[str | Path], preflight: Sequence[str | Path] = (), rollout: Sequence[str | Path] = ()
) -> list[Run]:
    """`read_run` of each, with labels that differ; the n-th of `preflight` and of `rollout` is of the n-th folder.

    Raises:
        ReportError: as in `read_run`; a folder comes twice, or there are more files than folders.
    """
    resolved = [Path(folder).resolve() for folder in folders]
    if twice := sorted({str(path) for path in resolved if resolved.count(path) > 1}):
        raise ReportError(f"named twice: {', '.join(twice)}")
    for flag, files in (("--preflight", preflight), ("--rollout", rollout)):
        if len(files) > len(folders):
            raise ReportError(f"{flag} is given {len(files)} times for {len(folders)} runs: the n-th is of the n-th")
    at = lambda files, index: files[index] if index < len(files) else None  # noqa: E731
    runs = [read_run(folder, at(preflight, n), at(rollout, n)) for n, folder in enumerate(folders)]
    names = [run.label for run in runs]
    if len(set(names)) < len(names) or max(map(len, names), default=0) > _LABEL:
        for number, run in enumerate(runs):
            cut = run.label if len(run.label) <= _LABEL else run.label[: _LABEL - 1] + "…"
            run.label = cut if len(runs) == 1 else f"{chr(ord('A') + number % 26)} {cut}"
    return runs


def _places(folder: Path) -> list[Path]:
    """The folder itself, and if it is a checkpoint's the run's."""
    if folder.resolve().name == "latest":
        return [folder, folder.resolve().parent]
    name, mark, step = folder.resolve().name.rpartition("--")
    if mark and step.endswith("_chkpt"):
        return [folder, folder.resolve().with_name(name)]
    return [folder]


def _checkpoints(home: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first."""
    numbered = home.resolve().parent.glob(f"{home.resolve().name}--*_chkpt")
    steps = {path: path.name.rpartition("--")[2].removesuffix("_chkpt") for path in numbered}
    order = sorted((int(step), path) for path, step in steps.items() if step.isdecimal())
    return [home / "latest", *(path for _, path in reversed(order))]


def _find(places: Sequence[Path], name: str) -> Path | None:
    return next((place / name for place in places if (place / name).is_file()), None)


def _file(given: str | Path | None, name: str) -> Path | None:
    if given is None:
        return None
    path = Path(given)
    path = path / name if path.is_dir() else path
    if not path.is_file():
        raise ReportError(f"{path} is not there")
    return path


def _read(path: Path | None, name: str, named: bool = False) -> dict[str, Any] | None:
    """Content of a file of `FILES`; one that was `named` after a flag may be any other and is not to be deleted."""
    if path is None:
        return None
    remedy = "delete it, or write it anew"
    if named:
        command = name.removesuffix(".json")
        remedy = f"name a file that vla-energy {command} wrote after --{command}"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        what = "is no such file" if named else "is damaged"
        raise ReportError(f"{path} {what} ({error}): {remedy}") from error
    if wrong := difference(data, FILES[name]):
        raise ReportError(f"{path} is not what the report reads there ({wrong}): {remedy}")
    return data


def _from_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last validation's `val/a/b` scalars, nested again."""
    nested: dict[str, Any] = {}
    for row in rows:
        for key, value in row.items():
            if not key.startswith("val/"):
                continue
            *path, name = key.split("/")[1:]
            level = nested
            for part in path:
                level = level.setdefault(part, {})
            level[name] = value
    return nested
