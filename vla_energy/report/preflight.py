"""The preflight's page: verdict first, then the numbers behind it. One file, no network, no script."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vla_energy.report.page import details, page, table
from vla_energy.results import write_whole


def write_page(result: Mapping[str, Any], out: str | Path) -> Path:
    """Writes what `preflight.verdict.judge` gives, with `settings`, as a page.

    Raises:
        OSError: the file cannot be written.
    """
    first, *rest = result["verdict"]["reasons"]
    policy = result["policy"]
    body = [
        f"<h1>{html.escape(first)}</h1>",
        "<p>L1 to the expert's chunk on held-out frames, normalised units; half of the episodes set the gates, the "
        "other half is told; plain retrieval, which has none, is told on all. Whether a lower L1 means more success "
        "only rollouts tell.</p>",
        "<ul>" + "".join(f"<li>{html.escape(reason)}</li>" for reason in rest) + "</ul>",
        "<h2>Modes</h2>",
        table(("mode", "L1 policy", "L1 gated", "change", "95% interval", "gap closed", "replaced", "of these worse",
               "Spearman", "ms a frame"), [_mode(mode, values) for mode, values in result["modes"].items()]),
        f"<p>The policy itself: {policy['forward_ms']:.1f} ms a frame, {policy['frames']} frames of "
        f"{policy['episodes']} episodes.</p>",
        "<h2>What each source of candidates offers</h2>",
        table(("mode", "source", "spread", "L1 of its best", "with the policy's"), _sources(result["modes"])),
        "<h2>Ranking by distance to the expert</h2>"
        "<p>Share of pairs of candidates in the right order, by the distance of the nearer one.</p>",
        table(("mode", "band", "right"), _bands(result["modes"])),
        "<h2>The policy's error along the chunk</h2>",
        table(("step", "L1"), enumerate(policy["by_step"], start=1)),
        "<h2>Tasks</h2>",
        table(("task", "use", "mode", "L1 policy", "L1 gated", "95% interval"), _tasks(result["tasks"])),
        *_trials(result["tasks"]),
        details("Settings", result.get("settings", {})),
    ]  # fmt: skip
    write_whole(out, page("Preflight", body))
    return Path(out)


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.0f}%"


def _span(found: Mapping[str, Any]) -> str:
    """An effect's interval; one without width says nothing of other episodes."""
    if not found["accepted"]:
        return "n/a (no chunk replaced)"
    if found["episodes"] < 2:
        return "n/a (one episode)"
    low, high = found["interval"]
    return f"{100 * low:+.0f} to {100 * high:+.0f}%"


def _mode(mode: str, values: Mapping[str, Any]) -> tuple[Any, ...]:
    found = values["effect"]
    return (
        mode, found["l1_policy"], found["l1_gated"], f"{100 * found['change']:+.0f}%", _span(found),
        _percent(found["gap_closed"]), _percent(found["accepted"]), _percent(found["worse"]), values["spearman"],
        f"{values['ms']:.2f}",
    )  # fmt: skip


def _sources(modes: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    return [
        (mode, source, *(numbers.get(key) for key in ("spread", "oracle", "oracle_with_policy")))
        for mode, values in modes.items()
        for source, numbers in values["sources"].items()
    ]


def _bands(modes: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    return [(mode, band, _percent(share)) for mode, values in modes.items() for band, share in values["bands"].items()]


def _tasks(tasks: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    return [
        (task, values["use"], mode, found["l1_policy"], found["l1_gated"], _span(found))
        for task, values in tasks.items()
        for mode, found in values["effects"].items()
    ]


def _trials(tasks: Mapping[str, Any]) -> list[str]:
    tried = {task: values["trials"] for task, values in tasks.items() if values["trials"]}
    rows = [
        (task, tasks[task]["use"], arm, f"{count} of {found['episodes']}")
        for task, found in tried.items()
        for arm, count in found["successes"].items()
    ]
    return ["<h2>Trials</h2>", table(("task", "use", "arm", "successes"), rows)] if rows else []
