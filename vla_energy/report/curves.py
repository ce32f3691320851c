"""Curves of runs as inline SVG: readable on light and dark pages, nothing to load."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vla_energy.report.expected import drawable
from vla_energy.report.runs import UNDEFINED
from vla_energy.results import finite

COLOURS = ("#3b82f6", "#ef7d1a", "#22a06b", "#c2479a", "#8b6cef", "#a58a2b", "#1aa0b4", "#d9534f", "#7c8798")
INK = "#808890"
"""Of text, ticks and grid while matplotlib draws; on the page it is the ink of the scheme, see `_svg`."""
ALARM = "#e5342b"
_LINE = 70  # characters of a legend that fit below a plot
_DASHES = ("-", "--", ":", "-.")
_TERMS = ("info_nce", "chance", "listwise", "distance_regression", "margin", "hinge", "diversity", "anchor", "outcome")
_CENTRES = {"energy/centre_l1_": "centre "}
PLOTS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Policy L1", "normalised units", {"train/l1": "train", "val/finetune/l1_val": "held out"}),
    ("Energy loss", "weighted sum", {"energy/loss": "loss"}),
    ("Terms of the energy loss", "unweighted, log scale", {f"energy/{t}": t for t in _TERMS} | _CENTRES),
    ("Energies", "lower is better", {"energy/positive": "expert", "energy/negative": "negatives"}),
    ("Energy range", "lowest and highest of a batch", {"energy/min": "lowest", "energy/max": "highest"}),
    ("Logits", "-energy / temperature", {"energy/logits_min": "lowest", "energy/logits_max": "highest"}),
    ("Spread of the energies", "0 is a flat head", {"energy/std": "all", "energy/std_row": "within a frame"}),
    ("Win rate in training", "share won by the expert", {"energy/win_rate/": ""}),
    ("Win rate, held out", "share won by the expert", {"val/energy/win_rate/": ""}),
    ("Rank correlation with the distance", "Spearman", {"energy/spearman": "train", "val/energy/spearman": "held out"}),
    ("Gradient norm of the head", "before clipping", {"energy/grad_norm": "norm"}),
    ("Gradient norm of the policy", "before clipping", {"train/grad_norm": "norm"}),
    (
        "Skipped and clipped steps",
        "1 is yes",
        {"energy/skipped": "skipped", "energy/clipped": "clipped", "train/skipped": "policy's skipped"},
    ),
    ("Speed", "frames / s", {"frames_per_second": "training"}),
)
"""Title, y label, and metric (a trailing / or _ takes all that start so, their rest ends the legend) -> legend."""

_LOG = frozenset({"Terms of the energy loss"})
"""Titles of plots whose first steps, far above all others, would flatten the rest."""

_NOTES = {
    "Terms of the energy loss": "Each before its weight in the loss (energy.loss, energy.range, energy.rollouts). "
    "Where the head has a centre, its regression to the expert's chunk, a term for each centre, is usually most of it. "
    "chance is no term: what info_nce is while all energies are equal."
}
"""By title, a sentence below the plot."""

Series = dict[str, tuple[list[int], list[float]]]
"""Legend -> steps and values."""


def series_of(rows: Sequence[Mapping[str, Any]], wanted: Mapping[str, str]) -> Series:
    """The metrics of one of `PLOTS`; what cannot be drawn is left out, see `spans_not_finite`."""
    series: Series = {}
    for row in rows:
        for key, value in row.items():
            prefix = _prefix(key, wanted)
            if prefix is None or not drawable(value):
                continue
            steps, values = series.setdefault(wanted[prefix] + key.removeprefix(prefix), ([], []))
            steps.append(row["step"])
            values.append(float(value))
    return series


def _prefix(key: str, wanted: Mapping[str, str]) -> str | None:
    """Which of `wanted` a metric belongs to."""
    return next((name for name in wanted if key == name or (name.endswith(("/", "_")) and key.startswith(name))), None)


def spans_not_finite(rows: Sequence[Mapping[str, Any]], wanted: Mapping[str, str]) -> list[tuple[int, int, int]]:
    """First and last step, and number, of the rows in sequence in which a metric of one of `PLOTS` cannot be drawn.

    It is not finite, or too large for an axis. Rows that hold none of the metrics, as those of a validation, do not
    end a sequence.
    """
    spans: list[tuple[int, int, int]] = []
    going = False
    for row in rows:
        values = [value for key, value in row.items() if key not in UNDEFINED and _prefix(key, wanted) is not None]
        if not values:
            continue
        if all(map(drawable, values)):
            going = False
        elif going:
            spans[-1] = (spans[-1][0], row["step"], spans[-1][2] + 1)
        else:
            spans.append((row["step"], row["step"], 1))
            going = True
    return spans


def draw(runs: Mapping[str, Sequence[Mapping[str, Any]]], title: str, label: str, wanted: Mapping[str, str]) -> str:
    """One of `PLOTS` as a `<figure>`; empty text if no run's rows hold any of its metrics.

    All have the steps of the whole run on their axis, whatever is finite; where a metric is not, there is a red bar at
    the bottom and a sentence below.

    Args:
        runs: rows by the run's label. One run has a colour a metric; of several, each has a colour and each metric a
            dash, and metrics by kind are left out: their last values are compared in another plot.
        title, label, wanted: see `PLOTS`.
    """
    if len(runs) > 1 and by_kind(wanted):
        return ""
    found = {run: series_of(rows, wanted) for run, rows in runs.items()}
    spans = {run: spans_not_finite(rows, wanted) for run, rows in runs.items()}
    if not any((*found.values(), *spans.values())):
        return ""
    large = any(
        finite(value) and not drawable(value) and _prefix(key, wanted) is not None
        for rows in runs.values() for row in rows for key, value in row.items()
    )  # fmt: skip
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
    if title in _LOG:
        _log_scale(axes, [value for series in found.values() for _, values in series.values() for value in values])
    if len(runs) > 1:
        _legend_of_runs(figure, found, names)
    elif len(names) > 1:
        legend(figure)
    _whole_run(axes, [row["step"] for rows in runs.values() for row in rows], list(spans.values()))
    if not any(found.values()):
        axes.set_yticks([])
        none = "no value can be drawn" if large else "no value is finite"
        axes.text(0.5, 0.5, none, color=INK, ha="center", transform=axes.transAxes)
    return figure_html(figure, title, note=_NOTES.get(title, ""), alarm=_told(spans, large))


def _log_scale(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic y axis, of values at or below 0 linear around it; labels as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    positive = [value for value in values if value > 0]
    if not positive:
        return
    if min(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_yscale("symlog", linthresh=max(min(positive), 1e-3 * max(positive)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(which="both", colors=INK)


def _whole_run(axes: Any, steps: Sequence[int], spans: Sequence[Sequence[tuple[int, int, int]]]) -> None:
    """The steps from the first row to the last on the x axis, and bars at the bottom, a line of them a run."""
    first, last = min(steps), max(steps)
    pad = max(0.03 * (last - first), 0.5)
    axes.set_xlim(first - pad, last + pad)
    for number, bars in enumerate(spans):
        # One path, however many they are; a single row's bar is wide enough to be seen.
        xs = [x for start, end, _ in bars for x in (start - pad / 6, end + pad / 6, math.nan)]
        height = 0.015 + 0.035 * number
        axes.plot(
            xs, [height] * len(xs), color=ALARM, lw=5, solid_capstyle="butt", transform=axes.get_xaxis_transform()
        )


def _told(spans: Mapping[str, Sequence[tuple[int, int, int]]], large: bool) -> str:
    """A sentence on where values are not finite, or (`large`) too large; empty text where all are drawn."""
    told = []
    for run, bars in spans.items():
        if bars:
            rows = sum(count for *_, count in bars)
            about = f"{run}: " if len(spans) > 1 else ""
            told.append(f"{about}{rows} {'row' if rows == 1 else 'rows'} from step {bars[0][0]} to {bars[-1][1]}")
    what = "Not finite, or too large for an axis" if large else "Not finite"
    return f"{what} (red at the bottom): {'; '.join(told)}." if told else ""


def _legend_of_runs(figure: Any, found: Mapping[str, Series], names: Sequence[str]) -> None:
    """A colour a run that has a curve and a dash a metric: shorter than an entry for each curve."""
    from matplotlib.lines import Line2D

    drawn = [(COLOURS[n % len(COLOURS)], run) for n, (run, series) in enumerate(found.items()) if series]
    entries = [Line2D([], [], color=colour, lw=1.6, label=run) for colour, run in drawn]
    if len(names) > 1:
        dashes = [_DASHES[n % len(_DASHES)] for n in range(len(names))]
        entries += [Line2D([], [], color=INK, lw=1.6, ls=d, label=n) for d, n in zip(dashes, names, strict=True)]
    if entries:
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
    """A matplotlib figure with one plain axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    plain(axes)
    return figure, axes


def plain(axes: Any) -> None:
    """No frame, a faint grid."""
    axes.tick_params(colors=INK)
    axes.ticklabel_format(useOffset=False)
    axes.grid(color=INK, alpha=0.25, lw=0.6)
    for spine in axes.spines.values():
        spine.set_visible(False)


def figure_html(figure: Any, title: str, caption: str | None = None, note: str = "", alarm: str = "") -> str:
    """A `<figure>` of one plot.

    Args:
        figure: matplotlib's.
        title: different from all others on the page: ids are made of it.
        caption: shown, by default the title.
        note: a sentence below.
        alarm: one more, in red.
    """
    shown = html.escape(title if caption is None else caption)
    below = f"<p class='note'>{html.escape(note)}</p>" if note else ""
    below += f"<p class='note alarm'>{html.escape(alarm)}</p>" if alarm else ""
    return f"<figure><figcaption>{shown}</figcaption>{_svg(figure, title)}{below}</figure>"


def _svg(figure: Any, title: str) -> str:
    """Inline SVG on a transparent ground, its text in the page's ink: no one colour is readable on light and dark.

    Its ids carry the title, as all plots share one page.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(rf"((?:fill|stroke): ){INK}", r"\1var(--soft)", text)
    prefix = re.sub(r"\W+", "-", title).lower()
    text = re.sub(r'(?<= id=")', f"{prefix}-", text)
    text = re.sub(r'(?<=url\(#)|(?<=xlink:href="#)', f"{prefix}-", text)
    return text.replace("<svg", f"<svg role='img' aria-label='{html.escape(title, quote=True)}'", 1)
