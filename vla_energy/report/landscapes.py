"""Energies around held-out chunks, as `finetune.shapes` stored them, drawn: a plane, and each step of the chunk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vla_energy.report.curves import INK, figure_html
from vla_energy.report.runs import Run

_LEVELS = 14


def landscape_figures(run: Run, several: bool = False) -> list[str]:
    """Two plots a frame: the plane through policy and expert, and the energy when one step of the expert's is moved.

    Args:
        run: see `Run.shapes`.
        several: whether the captions name the run.
    """
    start = f"{run.label}: " if several else ""
    parts = []
    for number, frame in enumerate((run.shapes or {}).get("frames") or [], start=1):
        step = f", step {frame['step']}" if frame["step"] >= 0 else ""
        where = f"{start}{frame['task'] or 'frame'}, episode {frame['episode']}{step}"
        name = f"{run.label}, frame {number}"
        parts.append(_plane(frame["plane"], f"Landscape, {name}", f"{where}: plane through policy and expert"))
        parts.append(_time(frame["time"], f"Along the chunk, {name}", f"{where}: one step of the chunk moved"))
    return parts


def _plane(plane: Mapping[str, Any], title: str, caption: str) -> str:
    figure, axes = _blank(5.2, 3.6)
    _filled(figure, axes, plane["xs"], plane["ys"], plane["energies"])
    lowest = _lowest(plane["energies"])
    marks = {"policy": (0.0, 0.0), "expert": (1.0, 0.0), "lowest": (plane["xs"][lowest[1]], plane["ys"][lowest[0]])}
    for (name, (x, y)), marker in zip(marks.items(), "os*", strict=True):
        axes.plot([x], [y], marker, color="white", markeredgecolor="black", markersize=8, label=name)
    axes.set_aspect("equal")
    axes.set_xlabel("policy (0) to expert (1)", color=INK)
    axes.set_ylabel("across, same unit", color=INK)
    return figure_html(figure, title, caption)


def _time(time: Mapping[str, Any], title: str, caption: str) -> str:
    figure, axes = _blank(5.2, 3.6)
    steps = list(range(1, len(time["energies"]) + 1))
    if len(steps) > 1:
        _filled(figure, axes, time["xs"], steps, time["energies"], bands=True)
        axes.set_yticks(steps if len(steps) <= 16 else steps[:: math.ceil(len(steps) / 16)])
        axes.set_ylabel("step of the chunk", color=INK)
        axes.invert_yaxis()
    else:
        axes.plot(time["xs"], time["energies"][0])
        axes.set_ylabel("energy", color=INK)
    for x in (0.0, 1.0):
        axes.axvline(x, color="white", lw=1, ls="--")
    axes.set_xlabel("that step: policy's (0) to expert's (1)", color=INK)
    return figure_html(figure, title, caption)


def _blank(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(colors=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure, axes


def _filled(
    figure: Any,
    axes: Any,
    xs: Sequence[float],
    ys: Sequence[float],
    energies: Sequence[Sequence[float | None]],
    bands: bool = False,
) -> None:
    """Filled contours with a bar of colours. With `bands` a row each: there are no energies between whole `ys`."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    values = np.ma.masked_invalid(np.array(energies, dtype=float))
    if not values.count():
        axes.text(0.5, 0.5, "no energy is finite", color=INK, ha="center", transform=axes.transAxes)
        return
    levels = MaxNLocator(_LEVELS).tick_values(float(values.min()), float(values.max()))
    parts = [([y - 0.5, y + 0.5], row[None].repeat(2, 0)) for y, row in zip(ys, values, strict=True) if row.count()]
    filled = [axes.contourf(xs, *part, levels=levels, cmap="viridis") for part in (parts if bands else [(ys, values)])]
    bar = figure.colorbar(filled[0], ax=axes, shrink=0.9)
    bar.set_label("energy, lower is better", color=INK)
    bar.ax.tick_params(colors=INK)
    bar.outline.set_visible(False)


def _lowest(energies: list[list[float | None]]) -> tuple[int, int]:
    """Row and column of the lowest energy; null ones are left out."""
    places = [
        (value, row, column)
        for row, line in enumerate(energies)
        for column, value in enumerate(line)
        if value is not None and math.isfinite(value)
    ]
    return min(places)[1:] if places else (len(energies) // 2, len(energies[0]) // 2)
