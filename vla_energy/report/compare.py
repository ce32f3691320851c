"""Numbers of runs side by side: headlines, last metrics, settings that differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vla_energy.report.notes import flat_settings
from vla_energy.report.page import table
from vla_energy.report.runs import UNDEFINED, Run
from vla_energy.results import finite

_HEADLINES = {
    "L1 before": ("finetune", "l1_val_before"),
    "L1 held out": ("finetune", "l1_val"),
    "L1 lowest energy, ungated": ("rerank", "l1_reranked"),
    "L1 best candidate": ("rerank", "l1_oracle"),
    "Spearman": ("energy", "spearman"),
    "Spearman of the distance to the policy's chunk": ("energy", "spearman_to_policy"),
}
_ABSENT = "not a setting of this run"


def headlines(run: Run) -> dict[str, Any]:
    """The few numbers to look at first, by name; None where there is none."""
    values: dict[str, Any] = {name: (run.metrics.get(part) or {}).get(key) for name, (part, key) in _HEADLINES.items()}
    if gate := run.metrics.get("gate"):
        values["gate"] = f"margin {gate['margin']:.2f}" if finite(gate.get("margin")) else "shut"
    for arm, found in ((run.rollout or {}).get("overall", {}).get("arms", {})).items():
        values[f"success, {arm}"] = f"{100 * found['success']:.0f}%"
    if run.preflight is not None:
        values["preflight"] = run.preflight["verdict"]["use"]
    return values


def last_metrics(runs: Sequence[Run]) -> str:
    """A folded table of every metric's last value."""
    found = [run.last() for run in runs]
    names = sorted({name for values in found for name in values})
    if not names:
        return ""
    rows = [(name, *(_last(values, name) for values in found)) for name in names]
    last = ", ".join(f"{run.label}: step {run.rows[-1]['step']}" for run in runs if run.rows)
    shown = table(("metric", *(run.label for run in runs)), rows)
    return f"<details><summary>Last metrics</summary><p>{last}</p>{shown}</details>"


def _last(values: Mapping[str, Any], name: str) -> Any:
    value = values.get(name)
    return "not finite" if name in values and name not in UNDEFINED and not finite(value) else value


def differing_settings(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Name and value in each run that stored its settings, for those that are not the same in all of them."""
    flat = [flat_settings(run.settings) for run in runs if run.settings]
    if len(flat) < 2:
        return []
    names = sorted({name for values in flat for name in values})
    rows = [(name, *(_text(values, name) for values in flat)) for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def _text(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name], default=str) if name in values else _ABSENT
