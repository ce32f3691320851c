"""Tables and plots of `results.jsonl`, written by `stability.py`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from features import Features

from vla_energy.checkpoint import load_head
from vla_energy.landscape import plane_slice, plot_slice

Row = dict[str, Any]


def rate(row: Row, kind: str) -> float:
    return row["held_out"]["energy"]["win_rate"].get(kind, math.nan)


COLUMNS: dict[str, Callable[[Row], float]] = {
    "Spearman": lambda row: row["held_out"]["energy"]["spearman"],
    "far": lambda row: rate(row, "far"),
    "at 0.05": lambda row: rate(row, "at_0.05"),
    "in-batch": lambda row: rate(row, "in_batch"),
    "exits": lambda row: rate(row, "layer_exits"),
    "L1 chosen / policy": lambda row: row["held_out"]["rerank"]["l1_reranked"] / row["held_out"]["rerank"]["l1_policy"],
    "saturated": lambda row: row["curve"][-1]["saturated"] if row["curve"] else math.nan,
    "loss, end / start": lambda row: row["curve"][-1]["loss"] / row["curve"][0]["loss"] if row["curve"] else math.nan,
}


def group(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        tags = ", ".join(f"{name} {value}" for name, value in row["tags"].items())
        groups.setdefault((row["arm"], tags), []).append(row)
    return groups


def table(rows: list[Row]) -> str:
    """One line an arm: means over seeds, seeds flat, steps with a non-finite loss, non-finite parameters."""
    lines = ["| arm | | flat | non-finite losses / skips / parameters | " + " | ".join(COLUMNS) + " |"]
    lines.append("|" + "---|" * (4 + len(COLUMNS)))
    for (arm, tags), members in group(rows).items():
        flat = "" if members[0]["flat"] is None else f"{sum(row['flat'] for row in members)} of {len(members)}"
        broken = [sum(row["nonfinite_losses"] for row in members)]
        broken.append(sum(row["counters"][name] for row in members for name in ("nonfinite", "too_large")))
        broken.append(sum(row["nonfinite_parameters"] for row in members))
        values = [mean(column(row) for row in members) for column in COLUMNS.values()]
        cells = " | ".join(f"{value:.3f}" for value in values)
        lines.append(f"| {arm} | {tags} | {flat} | {' / '.join(map(str, broken))} | {cells} |")
    return "\n".join(lines)


def report(out: Path, held_out: Features) -> str:
    """Writes `tables.md` and the plots; returns the tables."""
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    parts = dict.fromkeys(row["part"] for row in rows)
    text = []
    for part in parts:
        members = [row for row in rows if row["part"] == part]
        plain, steps = members[0]["held_out"]["energy"]["spearman_to_policy"], max(row["steps"] for row in members)
        text.append(f"## {part} ({steps} steps; plain distance to the policy: Spearman {plain:.3f})\n")
        text.append(table(members) + "\n")
    (out / "tables.md").write_text("\n".join(text))
    plot_curves(rows, out / "curves.png")
    plot_landscapes(out, held_out)
    return "\n".join(text)


COLOURS = {"original": "tab:red", "stage1": "tab:orange", "stage2": "tab:green", "stage3": "tab:purple"}


def plot_curves(rows: list[Row], path: Path) -> None:
    """InfoNCE over what knowing nothing gives, every seed: the presets without warm-up, and the long runs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plain = [row for row in rows if row["part"] == "presets" and row["tags"] == {"warm-up": 0, "loss": "as preset"}]
    panels = {"presets": plain, "long runs": [row for row in rows if row["part"] == "long"]}
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained", sharey=True)
    for axis, (title, members) in zip(axes, panels.items(), strict=True):
        for row in members:
            colour = COLOURS.get(row["arm"].split(",")[0], "tab:blue")
            share = [point["info_nce"] / point["chance"] for point in row["curve"]]
            steps = [point["step"] for point in row["curve"]]
            axis.plot(steps, share, color=colour, lw=1, label=row["arm"] if row["seed"] == 0 else None)
        axis.axhline(1, color="grey", lw=0.6, ls=":")
        axis.set(title=title, xlabel="optimiser step", ylim=(0, 1.3))
        if members:
            axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("InfoNCE / that of knowing nothing")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_landscapes(out: Path, held_out: Features, extent: float = 1.5) -> None:
    """Original and recommended on the plane through policy and expert, three held-out frames with an error near 0.1."""
    import matplotlib.pyplot as plt

    files = {}
    for name in ("original", "recommended"):
        found = [out / f"{part}-{name}-0.safetensors" for part in ("long", "presets")]
        found = [file for file in found if file.exists()]
        if not found:
            return
        files[name] = found[0]
    errors = (held_out.layers[:, -1] - held_out.expert).abs().mean((1, 2))
    rows = (errors - 0.1).abs().argsort()[:3]
    context, mask, expert, layers = held_out.batch(rows)
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for line, (name, file) in zip(axes, files.items(), strict=True):
        head = load_head(file).head.eval()
        policy = layers[:, -1]
        with torch.no_grad():
            encoded = head.encode(context, mask, policy)
            generator = torch.Generator().manual_seed(0)
            plane = plane_slice(lambda chunks: head(encoded, chunks), policy, expert, extent, generator=generator)  # noqa: B023
        for index, axis in enumerate(line):
            plot_slice(plane, index, axis, f"{name} {index + 1}")
            if index or line is axes[0]:  # one legend is enough
                axis.get_legend().remove()
    figure.savefig(out / "landscape.png", dpi=90)
    plt.close(figure)
