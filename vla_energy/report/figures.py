"""Plots of held-out measures, preflight and rollouts; curves over the steps are in `curves`."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from vla_energy.report.curves import COLOURS, INK, figure_html, legend, new_figure, plain
from vla_energy.report.expected import drawable
from vla_energy.report.runs import Run
from vla_energy.results import finite

_MARKERS = "osD^v<>P"

_SPREAD = 0.35  # of a row's dots, in rows: neighbouring rows stay well apart

# See `finetune.evaluate.calibrated_gate` and `preflight.effects.calibrate`.
_WORSE_IN_VALIDATION = (
    "Worse is any L1 above the policy's, for the curve and for the calibrated margin: of what that accepts in an "
    "episode at most 10 % is worse on average, with 90 % confidence."
)
_WORSE_IN_PREFLIGHT = (
    "The curve counts any L1 above the policy's as worse. The calibrated margin counts only one that is above it by "
    "more than energy.rerank.tolerance (by default 1) times the policy's mean L1: at most energy.rerank.risk (by "
    "default 10 %) of what it accepts in an episode on average, with 90 % confidence."
)

CHANCE = "#d9534f"

Point = tuple[float | None, float | None, float | None]
"""Value (None: not finite, left out), and the ends of its interval where it has one."""


def win_rates(runs: Sequence[Run]) -> str:
    """The expert against each kind of negative, held out: a row a kind, a colour a run."""
    found = {run.label: (run.metrics.get("energy") or {}).get("win_rate") or {} for run in runs}
    points = {name: {kind: (rate, None, None) for kind, rate in rates.items()} for name, rates in found.items()}
    return dots("Ranking by kind of negative", points, "share won by the expert, held out", (0, 1), 0.5)


def training_win_rates(runs: Sequence[Run]) -> str:
    """The same in training, the last value; for a page of several runs, whose curves by kind are not drawn."""
    start = "energy/win_rate/"
    points = {
        run.label: {
            key[len(start) :]: (value, None, None) for key, value in run.last().items() if key.startswith(start)
        }
        for run in runs
    }
    return dots("Ranking by kind of negative, last row of training", points, "share won by the expert", (0, 1), 0.5)


def bands(runs: Sequence[Run]) -> str:
    """Share of pairs of candidates in the right order, by the distance of the nearer one to the expert."""
    series: dict[str, Mapping[str, float]] = {}
    for run in runs:
        start = f"{run.label}: " if len(runs) > 1 else ""
        if run.shapes and run.shapes.get("bands"):
            series[f"{start}held out"] = run.shapes["bands"]
        for mode, values in ((run.preflight or {}).get("modes") or {}).items():
            if values.get("bands"):
                series[f"{start}preflight, {mode}"] = values["bands"]
    if not series:
        return ""
    names = sorted({band for values in series.values() for band in values}, key=lambda name: float(name[5:]))
    figure, axes = new_figure(5.2, 3.2)
    for index, (name, values) in enumerate(series.items()):
        places = [place for place, band in enumerate(names) if finite(values.get(band))]
        shares = [values[names[place]] for place in places]
        marker = _MARKERS[index % len(_MARKERS)]
        axes.plot(places, shares, color=COLOURS[index % len(COLOURS)], marker=marker, ms=5, lw=1.4, label=name)
    # In a colour of its own, above the grid, which has a line at the same height.
    axes.axhline(0.5, color=CHANCE, lw=1.8, ls=":", zorder=2.5, label="chance")
    axes.set_xticks(range(len(names)), [f"{band[5:]} on" for band in names])
    axes.set_xlabel("distance of the nearer candidate to the expert, normalised units", color=INK)
    axes.set_ylabel("pairs in the right order", color=INK)
    legend(figure)
    return figure_html(figure, "Ranking by distance", note="Dotted: chance. Near pairs are what reranking needs.")


def effects(run: Run) -> str:
    """What each mode does to the held-out L1 behind its gate, with preflight's intervals over episodes."""
    modes = (run.preflight or {}).get("modes") or {}
    found = {mode: values["effect"] for mode, values in modes.items()}
    idle = [mode for mode, values in found.items() if values["change"] == 0 and not any(values["interval"])]
    points = {
        mode: (100 * values["change"], *(100 * end for end in values["interval"]))
        for mode, values in found.items()
        if mode not in idle
    }
    note = "95 % intervals over episodes; negative is better. A lower L1 is no promise of success."
    note += f" Not drawn, as no chunk was replaced: {', '.join(idle)}." if idle else ""
    title = f"Preflight: change of the held-out L1, {run.label}"
    return dots(title, {run.label: points}, "percent of the policy's L1", None, 0.0, note, single=True)


def gate(run: Run, several: bool = False) -> str:
    """What each margin would accept on the frames that did not set the gate, and the L1 that follows.

    Args:
        run: with `shapes` or `preflight`.
        several: whether the captions name the run.
    """
    start = f"{run.label}: " if several else ""
    curves = {"held out": (run.shapes or {}).get("gate")}
    for mode, values in ((run.preflight or {}).get("modes") or {}).items():
        curves[f"preflight, {mode}"] = values.get("curve")
    return "".join(_gate(run, name, curve, start) for name, curve in curves.items() if curve)


def _gate(run: Run, name: str, curve: Mapping[str, Any], start: str) -> str:
    from matplotlib.figure import Figure

    if len(curve["margins"]) < 2:
        about = html.escape(f"{start}Gate, {name}")
        return f"<p>{about}: no candidate had a lower energy than the policy's own chunk.</p>"
    figure = Figure(figsize=(5.2, 4.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes in (upper, lower):
        plain(axes)
    margins, chosen = curve["margins"], curve.get("chosen")
    upper.plot(margins, curve["accepted"], color=COLOURS[0], lw=1.6, label="accepted")
    worse = [(margin, share) for margin, share in zip(margins, curve["worse"], strict=True) if finite(share)]
    upper.plot(*zip(*worse, strict=True), color=COLOURS[1], lw=1.6, ls="--", label="worse, of the accepted")
    upper.set_ylabel("share of frames", color=INK)
    upper.set_ylim(-0.03, 1.03)
    lower.plot(margins, curve["l1"], color=COLOURS[2], lw=1.6, label="L1 behind the gate")
    lower.axhline(curve["l1_policy"], color=COLOURS[4], lw=1.6, ls="--", zorder=3, label="L1 of the policy")
    lower.set_ylabel("L1", color=INK)
    bounds = [curve["l1_policy"], *curve["l1"]]
    # A change that is next to nothing is to look so.
    lower.set_ylim(min(0.98 * curve["l1_policy"], *bounds), max(1.02 * curve["l1_policy"], *bounds))
    lower.set_xlabel("margin, units of energy", color=INK)
    if finite(chosen):
        for axes in (upper, lower):
            axes.axvline(chosen, color=COLOURS[3], lw=1.2, label="calibrated margin" if axes is upper else None)
    legend(figure)
    note = _WORSE_IN_PREFLIGHT if name.startswith("preflight") else _WORSE_IN_VALIDATION
    if not finite(chosen):
        note = f"No margin was shown to be safe: the gate stays shut, whatever the curve says. {note}"
    return figure_html(figure, f"Gate, {run.label}, {name}", f"{start}Gate by its margin, {name}", note)


def dots(
    title: str,
    series: Mapping[str, Mapping[str, Point]],
    label: str,
    limits: tuple[float, float] | None = None,
    line: float | None = None,
    note: str = "",
    single: bool = False,
) -> str:
    """A row a name, a dot a series, bars for intervals; empty text where no value is finite and has room on an axis.

    Args:
        title: of the figure.
        series: legend -> name -> point.
        label: of the x axis.
        limits: of the x axis.
        line: where to draw a dotted line.
        note: a sentence below.
        single: a legend would say nothing.
    """
    names = list(dict.fromkeys(name for points in series.values() for name, p in points.items() if drawable(p[0])))
    if not names:
        return ""
    shown = {key: points for key, points in series.items() if any(drawable(p[0]) for p in points.values())}
    rows = len(names) * max(1.0, 0.75 * len(shown))
    figure, axes = new_figure(5.2, 1.1 + 0.27 * rows)
    for index, (key, points) in enumerate(shown.items()):
        offset = 0.0 if len(shown) == 1 else _SPREAD * (index / (len(shown) - 1) - 0.5)
        colour, marker = COLOURS[index % len(COLOURS)], _MARKERS[index % len(_MARKERS)]
        placed = [(names.index(name) + offset, point) for name, point in points.items() if drawable(point[0])]
        axes.plot([p[0] for _, p in placed], [y for y, _ in placed], marker, color=colour, ms=5, label=key)
        for y, (_, low, high) in placed:
            if low is not None and high is not None:
                axes.plot([low, high], [y, y], color=colour, lw=1.6)
    if line is not None:
        axes.axvline(line, color=CHANCE, lw=1.6, ls=":", zorder=1.5)
    axes.set_yticks(range(len(names)), [name if len(name) <= 30 else f"{name[:29]}…" for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(label, color=INK)
    if limits is not None:
        pad = 0.03 * (limits[1] - limits[0])
        axes.set_xlim(limits[0] - pad, limits[1] + pad)
    if len(shown) > 1 and not single:
        legend(figure)
    return figure_html(figure, title, note=note)
