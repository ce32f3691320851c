"""Curves of runs as inline SVG: readable on light and dark pages, nothing to load."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

COLOURS = ("#3b82f6", "#ef7d1a", "#22a06b", "#c2479a", "#8b6cef", "#a58a2b", "#1aa0b4", "#d9534f", "#7c8798")
INK = "#808890"  # mid-tone: readable on white and on black
_LINE = 70  # characters of a legend that fit below a plot
_DASHES = ("-", "--", ":", "-.")
_TERMS = ("info_nce", "chance", "listwise", "distance_regression", "margin", "hinge", "diversity", "anchor", "outcome")
PLOTS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Policy L1", "normalised units", {"train/l1": "train", "val/finetune/l1_val": "held out"}),
    ("Energy loss", "weighted sum", {"energy/loss": "loss"}),
    ("Terms of the energy loss", "unweighted", {f"energy/{term}": term for term in _TERMS}),
    ("Energies", "lower is better", {"energy/positive": "expert", "energy/negative": "negatives"}),
    ("Energy range", "lowest and highest of a batch", {"energy/min": "lowest", "energy/max": "highest"}),
    ("Logits", "-energy / temperature", {"energy/logits_min": "lowest", "energy/logits_max": "highest"}),
    ("Spread of the energies", "0 is a flat head", {"energy/std": "all", "energy/std_row": "within a frame"}),
    ("Win rate in training", "share won by the expert", {"energy/win_rate/": ""}),
    ("Win rate, held out", "share won by the expert", {"val/energy/win_rate/": ""}),
    ("Rank correlation with the distance", "Spearman", {"energy/spearman": "train", "val/energy/spearman": "held out"}),
    ("Gradient norm of the head", "before clipping", {"energy/grad_norm": "norm"}),
    ("Skipped and clipped steps", "1 is yes", {"energy/skipped": "skipped", "energy/clipped": "clipped"}),
    ("Speed", "frames / s", {"frames_per_second": "training"}),
)
"""Title, y label, and metric (a trailing / takes all below it) -> legend."""

Series = dict[str, tuple[list[int], list[float]]]
"""Legend -> steps and values."""


def series_of(rows: Sequence[Mapping[str, Any]], wanted: Mapping[str, str]) -> Series:
    """The metrics of one of `PLOTS`; null values are left out."""
    series: Series = {}
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


def draw(runs: Mapping[str, Sequence[Mapping[str, Any]]], title: str, label: str, wanted: Mapping[str, str]) -> str:
    """One of `PLOTS` as a `<figure>`; empty text if no run's rows hold any of its metrics.

    Args:
        runs: rows by the run's label. One run has a colour a metric; of several, each has a colour and each metric a
            dash, and metrics by kind are left out: their last values are compared in another plot.
        title, label, wanted: see `PLOTS`.
    """
    if len(runs) > 1 and by_kind(wanted):
        return ""
    found = {run: series_of(rows, wanted) for run, rows in runs.items()}
    if not any(found.values()):
        return ""
    figure, axes = new_figure(5.2, 3.2)
    names = list(dict.fromkeys(name for series in found.values() for name in series))
    for number, series in enumerate(found.values()):
        for name, (steps, values) in series.items():
            index = names.index(name)
            colour = COLOURS[(number if len(runs) > 1 else index) % len(COLOURS)]
            # Of one run, more metrics than colours are told apart by the dash.
            dash = _DASHES[(index if len(runs) > 1 else index // len(COLOURS)) % len(_DASHES)]
            marker = "o" if len(steps) < 12 else ""
            axes.plot(steps, values, color=colour, label=name, lw=1.6, ls=dash, marker=marker, ms=4)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(label, color=INK)
    if len(runs) > 1:
        _legend_of_runs(figure, list(runs), names)
    elif len(names) > 1:
        legend(figure)
    return figure_html(figure, title)


def _legend_of_runs(figure: Any, runs: Sequence[str], names: Sequence[str]) -> None:
    """A colour a run and a dash a metric: shorter than an entry for each curve."""
    from matplotlib.lines import Line2D

    entries = [Line2D([], [], color=COLOURS[n % len(COLOURS)], lw=1.6, label=run) for n, run in enumerate(runs)]
    if len(names) > 1:
        dashes = [_DASHES[n % len(_DASHES)] for n in range(len(names))]
        entries += [Line2D([], [], color=INK, lw=1.6, ls=d, label=n) for d, n in zip(dashes, names, strict=True)]
    legend(figure, entries)


def legend(figure: Any, entries: Sequence[Any] | None = None) -> None:
    """Below the plot, in as many columns as the longest label leaves room for; by default of what is drawn."""
    if entries is None:
        entries = [handle for axes in figure.axes for handle in axes.get_legend_handles_labels()[0]]
    longest = max(len(str(entry.get_label())) for entry in entries)
    columns = max(1, min(3, _LINE // (longest + 8)))
    figure.legend(
        handles=list(entries), loc="outside lower center", ncols=columns, frameon=False, labelcolor=INK, fontsize=9
    )


def by_kind(wanted: Mapping[str, str]) -> bool:
    """Whether a plot has a curve a kind of negative or term."""
    return any(name.endswith("/") for name in wanted)


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A matplotlib figure with one plain axes, for both grounds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    plain(axes)
    return figure, axes


def plain(axes: Any) -> None:
    """No frame, a faint grid, mid-tone ink."""
    axes.tick_params(colors=INK)
    axes.ticklabel_format(useOffset=False)
    axes.grid(color=INK, alpha=0.25, lw=0.6)
    for spine in axes.spines.values():
        spine.set_visible(False)


def figure_html(figure: Any, title: str, caption: str | None = None, note: str = "") -> str:
    """A `<figure>` of one plot.

    Args:
        figure: matplotlib's.
        title: different from all others on the page: ids are made of it.
        caption: shown, by default the title.
        note: a sentence below.
    """
    shown = html.escape(title if caption is None else caption)
    below = f"<p class='note'>{html.escape(note)}</p>" if note else ""
    return f"<figure><figcaption>{shown}</figcaption>{_svg(figure, title)}{below}</figure>"


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
