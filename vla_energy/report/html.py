"""One self-contained HTML page about a run, or several compared. No network; a few lines of script move the footage."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from vla_energy.report import figures
from vla_energy.report.closed_loop import closed_loop
from vla_energy.report.compare import differing_settings, headlines, last_metrics
from vla_energy.report.curves import PLOTS, draw
from vla_energy.report.footage import footage_figure, lack
from vla_energy.report.landscapes import landscape_figures
from vla_energy.report.notes import across, rerank_margin
from vla_energy.report.page import cell, details, page, table
from vla_energy.report.runs import Run
from vla_energy.results import FOOTAGE, finite, write_whole


def write_report(runs: Sequence[Run], out: str | Path) -> Path:
    """Writes the page; what a run lacks is said on it.

    Args:
        runs: from `runs.read_runs`, one or more; their labels differ.
        out: the HTML file.

    Raises:
        ValueError: no run.
        OSError: the file cannot be written.
    """
    if not runs:
        raise ValueError("there is no run to report on")
    title = " and ".join(run.label for run in runs) if len(runs) < 4 else f"{len(runs)} runs"
    parts = tqdm(_parts(runs, title), desc="drawing", disable=None, leave=False)  # silent where stderr is no terminal
    write_whole(out, page(html.escape(title), [part() for part in parts]))
    return Path(out)


def _parts(runs: Sequence[Run], title: str) -> list[Callable[[], str]]:
    """What makes each part of the page, in order."""
    several, rows = len(runs) > 1, {run.label: run.rows for run in runs}
    each = lambda make: [partial(make, run) for run in runs]  # noqa: E731
    folded = [partial(lambda run: details(_of("Settings", run, runs), run.settings), run) for run in runs]
    folded += [partial(lambda run: details(_of("Versions", run, runs), run.versions), run) for run in runs]
    return [
        lambda: (
            f"<h1>{html.escape(title)}</h1><p>Energies are lower-better; actions and L1 are in normalised units.</p>"
        ),
        *each(lambda run: _alarm(run, several)),
        lambda: _comparison(runs) if several else _cards(runs[0]),
        lambda: _told("Take care", _notes(runs), runs),
        lambda: _told("Not on this page", [(run, *lacks) for run in runs for lacks in _lacking(run).items()], runs),
        *each(lambda run: _preflight(run, several)),
        lambda: _section("Curves", [draw(rows, *plot) for plot in PLOTS], _curves_note(runs)),
        lambda: _ranking(runs),
        lambda: _section(
            "Energy landscapes, held out",
            [part for run in runs for part in landscape_figures(run, several)],
            "Dark is low. Policy (o), expert (square) and the lowest point there is (star); what is low far from "
            "both is what a search along the energy would find. Dashed, of a moved step: policy and expert.",
        ),
        lambda: _section(
            "Gate",
            [figures.gate(run, several) for run in runs],
            "What each margin would let through, on episodes that did not set it.",
        ),
        *each(lambda run: _gates(run, several)),
        lambda: closed_loop(runs),
        *(partial(footage_figure, run, number, several) for number, run in enumerate(runs)),
        *each(_seconds),
        *folded,
        lambda: last_metrics(runs),
    ]


def _notes(runs: Sequence[Run]) -> list[tuple[Run | None, str, str]]:
    """What is to be known of all runs, then of each."""
    own = [(run, "", note) for run in runs for note in run.notes]
    return [*((None, "", note) for note in across(runs)), *own]


def _lacking(run: Run) -> dict[str, str]:
    """What is not there, and footage that is but cannot be shown."""
    why = lack(run.footage)
    return run.missing | ({"frames of an episode": f"{FOOTAGE} is there, but {why}: write it anew"} if why else {})


def _of(name: str, run: Run, runs: Sequence[Run]) -> str:
    return name if len(runs) == 1 else f"{name}, {html.escape(run.label)}"


_RERANK = {
    "l1_policy": "L1 of the policy",
    "l1_reranked": "L1 of the lowest energy, no gate",
    "l1_gated": "L1 behind the gate",
    "l1_oracle": "L1 of the best candidate",
    "kept": "share of frames on which that gate keeps the policy's chunk",
}
_NAMED = 6  # metrics in the alarm's sentence


def _alarm(run: Run, several: bool) -> str:
    """A box that cannot be overlooked where metrics are not finite: how many rows, which, and from which step on."""
    found = run.not_finite()
    if not found:
        return ""
    count = sum(any(key in found and not finite(value) for key, value in row.items()) for row in run.rows)
    first = min(steps[0] for steps in found.values())
    names = sorted(found, key=lambda name: (found[name][0], -len(found[name])))
    named = ", ".join(f"{name} (from step {found[name][0]} on, {len(found[name])} rows)" for name in names[:_NAMED])
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    about = f"{run.label}: " if several else ""
    headline = f"{about}{count} of {len(run.rows)} rows hold a metric that is not finite, from step {first} on"
    rows = [(name, len(found[name]), found[name][0], found[name][-1]) for name in names]
    listed = table(("metric", "rows not finite", "first step", "last step"), rows)
    return (
        f"<div class='box' role='alert'><p class='alarm'>{html.escape(headline)}</p>"
        f"<p>{html.escape(f'{named}{more}.')} The curves leave such values out and are marked in red there.</p>"
        f"<details><summary>Metrics that are not finite</summary>{listed}</details></div>"
    )


def _section(title: str, plots: Sequence[str], note: str = "") -> str:
    drawn = "".join(plots)
    below = f"<p>{html.escape(note)}</p>" if note else ""
    return f"<h2>{html.escape(title)}</h2>{below}<div class='plots'>{drawn}</div>" if drawn else ""


def _cards(run: Run) -> str:
    cards = [(name, value) for name, value in headlines(run).items() if value is not None]
    shown = (f"<div class='card'><b>{cell(value)}</b><span>{html.escape(name)}</span></div>" for name, value in cards)
    return f"<div class='cards'>{''.join(shown)}</div>"


def _comparison(runs: Sequence[Run]) -> str:
    columns = ("", *(run.label for run in runs))
    found = [headlines(run) for run in runs]
    names = dict.fromkeys(name for values in found for name in values)
    rows = [(name, *(values.get(name) for values in found)) for name in names]
    folders = table(("run", "folder"), [(run.label, str(run.folder)) for run in runs])
    settings = differing_settings(runs)
    told = [run.label for run in runs if run.settings]
    if settings:
        differ = table(("setting", *told), settings)
    else:
        differ = f"<p>{'None.' if len(told) > 1 else 'Fewer than two of the runs have stored theirs.'}</p>"
    return (
        f"{folders}<h2>Last held-out measures</h2>{table(columns, rows)}<h2>Settings that differ</h2>{differ}"
        "<p>Runs on different data or of different length are drawn over each other all the same.</p>"
    )


def _told(title: str, lines: Sequence[tuple[Run | None, str, str]], runs: Sequence[Run]) -> str:
    """A list of a run (None: all), what it is about (may be empty) and a sentence."""
    shown = []
    for run, name, text in lines:
        about = "" if run is None else _of(name, run, runs) if name else html.escape(run.label)
        about = about if name or len(runs) > 1 else ""
        shown.append(f"<li>{f'<b>{about}</b>: ' if about else ''}{html.escape(text)}</li>")
    return f"<h2>{title}</h2><ul>{''.join(shown)}</ul>" if shown else ""


def _curves_note(runs: Sequence[Run]) -> str:
    said = [] if len(runs) == 1 else ["A colour a run. Win rates by kind are compared below, by their last values."]
    bad = [(run.label, min(steps[0] for steps in found.values())) for run in runs if (found := run.not_finite())]
    if bad:
        where = ", ".join(f"{f'{name}: ' if len(runs) > 1 else ''}from step {step} on" for name, step in bad)
        said.append(f"Not every value is finite ({where}): a red bar at the bottom of a plot marks where.")
    return " ".join(said)


def _preflight(run: Run, several: bool) -> str:
    if run.preflight is None:
        return ""
    first, *rest = run.preflight["verdict"]["reasons"]
    title = f"Preflight, {html.escape(run.label)}" if several else "Preflight"
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in rest)
    plot = figures.effects(run)
    drawn = f"<div class='plots'>{plot}</div>" if plot else ""
    return f"<h2>{title}</h2><p class='verdict'>{html.escape(first)}</p><ul>{reasons}</ul>{drawn}"


def _ranking(runs: Sequence[Run]) -> str:
    section = _section("Ranking, held out", [figures.win_rates(runs), figures.bands(runs)])
    if len(runs) > 1:
        section += _section("Ranking in training, last row", [figures.training_win_rates(runs)])
    rerank = [(run, run.metrics.get("rerank") or {}) for run in runs]
    names = dict.fromkeys(name for _, values in rerank for name in values)
    if names:
        rows = [(_RERANK.get(name, name), *(values.get(name) for _, values in rerank)) for name in names]
        columns = ("measure", *(["value"] if len(runs) == 1 else [run.label for run in runs]))
        margins = ", ".join(f"{f'{run.label}: ' if len(runs) > 1 else ''}{rerank_margin(run)}" for run in runs)
        note = (
            f"The gate here has the margin of the settings, energy.rerank.margin ({margins}), not the calibrated one."
        )
        section += f"<h2>Reranking, held out</h2><p>{html.escape(note)}</p>{table(columns, rows)}"
    return section


def _gates(run: Run, several: bool) -> str:
    if run.gates is None:
        return ""
    title = f"Calibrated gates of the checkpoint, {html.escape(run.label)}" if several else "Calibrated gates"
    margins = run.gates.get("margins") or {}
    shown = {mode: "shut" if margin is None else margin for mode, margin in margins.items()}
    shown |= {"retrieve": "none: it has no gate"} if "retrieve" in shown else {}
    tasks = list((run.gates.get("tasks") or {}).items())
    chosen = table(("task", "recommended arm"), tasks) if tasks else ""
    return f"<h3>{title}</h3>{table(('mode', 'margin'), shown.items())}{chosen}"


def _seconds(run: Run) -> str:
    seconds = run.metrics.get("seconds")
    if not seconds:
        return ""
    rows = ((name, f"{value:.1f}") for name, value in seconds.items())
    return f"<h2>Seconds, {html.escape(run.label)}</h2>" + table(("phase", "seconds"), rows)
