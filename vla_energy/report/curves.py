"""Curves of a run as inline SVG: readable on light and dark pages, nothing to load."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COLOURS = ("#3b82f6", "#ef7d1a", "#22a06b", "#c2479a", "#8b6cef", "#a58a2b", "#1aa0b4", "#d9534f", "#7c8798")
_INK = "#808890"  # mid-tone: readable on white and on black
PLOTS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Policy L1", "normalised units", {"train/l1": "train", "val/finetune/l1_val": "held out"}),
    ("Energy loss", "weighted sum", {"energy/loss": "loss"}),
    ("Energies", "lower is better", {"energy/positive": "expert", "energy/negative": "negatives"}),
    ("Win rate in training", "share won by the expert", {"energy/win_rate/": ""}),
    ("Win rate, held out", "share won by the expert", {"val/energy/win_rate/": ""}),
    ("Rank correlation with the distance", "Spearman", {"energy/spearman": "train", "val/energy/spearman": "held out"}),
    ("Gradient norm of the head", "before clipping", {"energy/grad_norm": "norm", "energy/skipped": "skipped step"}),
    ("Speed", "frames / s", {"frames_per_second": "training"}),
)
"""Title, y label, and metric (a trailing / takes all below it) -> legend."""


def read_rows(run_dir: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`, in order.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a line is no JSON object with a step; the message names file and line.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {run_dir} is not the folder of a fine-tuning run")
    rows = []
    # Cut by bytes, so that text that is no UTF-8 is told with its line, too.
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not a row of metrics ({error})") from error
    return rows


def _series(rows: Sequence[Mapping[str, Any]], wanted: Mapping[str, str]) -> dict[str, tuple[list[int], list[float]]]:
    """Legend -> (steps, values); null values are left out."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for key, value in row.items():
            prefix = next(
                (name for name in wanted if key == name or (name.endswith("/") and key.startswith(name))), None
            )
            if prefix is None or value is None:
                continue
            steps, values = series.setdefault(wanted[prefix] or key.removeprefix(prefix), ([], []))
            steps.append(row["step"])
            values.append(float(value))
    return series


def draw(rows: Sequence[Mapping[str, Any]], title: str, label: str, wanted: Mapping[str, str]) -> str:
    """One of `PLOTS` as a `<figure>`; empty text if the rows hold none of its metrics."""
    series = _series(rows, wanted)
    if not series:
        return ""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, (steps, values)) in enumerate(series.items()):
        colour, marker = _COLOURS[index % len(_COLOURS)], "o" if len(steps) < 12 else ""
        axes.plot(steps, values, color=colour, label=name, lw=1.6, marker=marker, ms=4)
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel(label, color=_INK)
    axes.tick_params(colors=_INK)
    axes.grid(color=_INK, alpha=0.25, lw=0.6)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if len(series) > 1:
        figure.legend(loc="outside lower center", ncols=3, frameon=False, labelcolor=_INK, fontsize=9)
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{_svg(figure, title)}</figure>"


def _svg(figure: Any, title: str) -> str:
    """Inline SVG on a transparent ground; its ids carry the title, as all plots share one page."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    prefix = re.sub(r"\W+", "-", title).lower()
    text = re.sub(r'(?<= id=")', f"{prefix}-", text)
    text = re.sub(r'(?<=url\(#)|(?<=xlink:href="#)', f"{prefix}-", text)
    return text.replace("<svg", f"<svg role='img' aria-label='{html.escape(title, quote=True)}'", 1)
