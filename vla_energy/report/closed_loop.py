"""The closed loop on the page: success of each arm, and its paired difference to the first."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vla_energy.report.figures import Point, dots
from vla_energy.report.page import table
from vla_energy.report.runs import Run

_MOST_TASKS = 24
_COLUMNS = (
    "task", "arm", "episodes", "success", "95% interval", "difference", "95% interval", "won : lost", "p, exact",
    "ms a decision",
)  # fmt: skip
_PAIRED = (
    "Arms are paired by seed; the difference is to the first arm. An interval that holds 0 does not show a difference, "
    "nor that there is none. Won and lost are pairs that only this or only the first arm solved, p is of the exact "
    "paired test (McNemar) on them. Below about 30 pairs the interval is too narrow: 4 won to 0 lost already exclude "
    "0, while p is 0.125. Read p there."
)


def closed_loop(runs: Sequence[Run]) -> str:
    """The section: plots, then a table a run with the paired test of each arm."""
    parts = ["<h2>Closed loop</h2>"]
    plots = [_success(runs), _differences(runs)]
    if not any(run.rollout for run in runs):
        return parts[0] + f"<p>No rollout: {html.escape(str(runs[0].metrics.get('rollout_reason') or 'not run'))}</p>"
    parts.append(f"<div class='plots'>{''.join(plots)}</div>")
    for run in runs:
        if run.rollout is not None:
            parts.append(f"<h3>{html.escape(run.label)}</h3>" if len(runs) > 1 else "")
            parts += [f"<p class='verdict'>{html.escape(text)}</p>" for text in _same_as_baseline(run)]
            parts.append(f"<p>{html.escape(_PAIRED)}</p>")
            parts.append(table(_COLUMNS, _rollout_rows(run.rollout)))
    return "".join(parts)


def _rollout_rows(rollout: Mapping[str, Any]) -> Iterable[tuple[Any, ...]]:
    for task, summary in [*rollout["tasks"].items(), ("overall", rollout["overall"])]:
        for arm, values in summary["arms"].items():
            low, high = values["interval"]
            row = (
                task,
                arm,
                values["episodes"],
                f"{100 * values['success']:.0f}%",
                f"{100 * low:.0f} to {100 * high:.0f}",
            )
            paired = _paired(summary["differences"].get(arm))
            yield (*row, *paired, f"{values['milliseconds_per_decision']['mean']:.1f}")


def _paired(change: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Difference, its interval, pairs won and lost, and p of the exact test; empty cells for the first arm."""
    if change is None:
        return ("",) * 4
    low, high = change["interval"]
    if _no_pair_differed(change):
        interval = "n/a (no pair differed)"
    elif low == high:
        interval = "n/a (pairs of a task are alike)"
    else:
        interval = f"{100 * low:+.0f} to {100 * high:+.0f}"
    won, lost, p = (change.get(key) for key in ("won", "lost", "p_value"))
    counts = "n/a" if won is None or lost is None else f"{won} : {lost}"
    return f"{100 * change['difference']:+.0f} points", interval, counts, "n/a" if p is None else f"{p:.3g}"


def _no_pair_differed(change: Mapping[str, Any]) -> bool:
    """Whether no seed was solved by one of the arms alone; files without counts tell it by their interval."""
    if change.get("won") is not None and change.get("lost") is not None:
        return change["won"] == change["lost"] == 0
    return change["difference"] == 0 and not any(change["interval"])


def _success(runs: Sequence[Run]) -> str:
    """Success by arm with its interval, overall and by task."""
    overall, parts = {}, []
    for run in runs:
        if run.rollout is None:
            continue
        overall[run.label] = _rates(run.rollout["overall"])
        tasks = run.rollout["tasks"]
        if 1 < len(tasks) <= _MOST_TASKS:
            arms = list(run.rollout["overall"]["arms"])
            by_arm = {arm: {task: _rates(part)[arm] for task, part in tasks.items()} for arm in arms}
            title = "Success by task" if len(runs) == 1 else f"Success by task, {run.label}"
            parts.append(dots(title, by_arm, "percent of episodes", (0, 100)))
    note = "95 % intervals (Wilson) of each arm alone; the paired differences are in the table."
    whole = dots("Success in closed loop", overall, "percent of episodes", (0, 100), note=note, single=len(runs) == 1)
    return whole + "".join(parts)


def _differences(runs: Sequence[Run]) -> str:
    """Paired difference of each arm to the first, with its interval; those of which no pair differed have none."""
    points: dict[str, dict[str, Point]] = {}
    idle = []
    for run in runs:
        for arm, values in (run.rollout or {}).get("overall", {}).get("differences", {}).items():
            name = f"{arm} - {values['baseline']}"
            if _no_pair_differed(values):
                idle.append(name if len(runs) == 1 else f"{run.label}, {name}")
            else:
                ends = (100 * end for end in values["interval"])
                points.setdefault(run.label, {})[name] = (100 * values["difference"], *ends)
    note = "Arms ran the same seeds."
    note += f" Not drawn, as no pair differed: {'; '.join(idle)}." if idle else ""
    return dots("Paired difference in success", points, "points", None, 0.0, note, single=len(runs) == 1)


def _same_as_baseline(run: Run) -> list[str]:
    """A sentence for each arm that executed the chunks of the arm it is compared with, as its gate let nothing through.

    Arms that decide at other steps (`policy@2`) execute other chunks of the same policy and are left out.
    """
    if run.rollout is None:
        return []
    arms = run.rollout["overall"]["arms"]
    margins = ((run.rollout.get("meta") or {}).get("checkpoint") or {}).get("gates") or {}
    told = []
    for arm, values in run.rollout["overall"]["differences"].items():
        baseline = values["baseline"]
        (mode, _, every), (_, _, every_baseline) = arm.partition("@"), baseline.partition("@")
        replaced = [arms.get(name, {}).get("accepted_share") for name in (arm, baseline)]
        if replaced == [0, 0] and every == every_baseline and values["difference"] == 0:
            shut = mode in margins and margins[mode] is None
            why = "the gate was shut" if shut else "the gate let no candidate through"
            told.append(
                f"{arm}: {why}, so that {arm} and {baseline} executed the same chunks. Both arms are the same policy: "
                "this says nothing about what the head would do."
            )
    return told


def _rates(part: Mapping[str, Any]) -> dict[str, Point]:
    return {
        arm: (100 * values["success"], *(100 * end for end in values["interval"]))
        for arm, values in part["arms"].items()
    }
