"""One self-contained HTML page about a run: curves as inline SVG, tables, the settings. No network, no script."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from vla_energy.report.curves import PLOTS, draw, read_rows

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6570; --line: #d6dbe0; --page: #ffffff; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaee; --soft: #9aa5b1; --line: #353c44; --page: #14171a; --card: #1c2126; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
p { color: var(--soft); margin: .3rem 0 .8rem; }
.cards, .plots { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
.card, figure { margin: 0; padding: .7rem .9rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; }
.card b { display: block; font-size: 1.4rem; font-variant-numeric: tabular-nums; } .card span { color: var(--soft); }
figcaption { font-weight: 600; } figure svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; overflow-wrap: normal; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
pre { padding: .8rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; overflow-x: auto;
  font-size: .85rem; overflow-wrap: normal; } details { margin-top: 1.5rem; }
summary { cursor: pointer; font-weight: 600; }
"""


def write_report(
    run_dir: str | Path, metrics: Mapping[str, Any], out: str | Path, config: Mapping[str, Any] | None = None
) -> Path:
    """Writes the page.

    Args:
        run_dir: has `metrics.jsonl`.
        metrics: `finetune`, and optionally `energy`, `rerank`, `rollout`, `seconds`, `versions`, as in `metrics.json`.
        out: the HTML file.
        config: the run's settings.

    Raises:
        FileNotFoundError, ValueError: as in `read_rows`.
    """
    rows = read_rows(run_dir)
    plots = [draw(rows, *plot) for plot in PLOTS]
    name = html.escape(Path(run_dir).name)
    body = [
        f"<h1>{name}</h1><p>Energies are lower-better; actions and L1 are in normalised units.</p>",
        _cards(metrics),
        f"<h2>Curves</h2><div class='plots'>{''.join(plots)}</div>",
        _tables(metrics),
        details("Settings", {} if config is None else config),
        details("Versions", metrics.get("versions", {})),
    ]
    Path(out).write_text(page(name, body), encoding="utf-8")
    return Path(out)


def page(title: str, body: Sequence[str]) -> str:
    """A whole HTML page of escaped `title` and finished parts."""
    head = "<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
    start = f"<!doctype html><html lang='en'><head>{head}<title>{title}</title><style>{_STYLE}</style></head>"
    return f"{start}<body>{''.join(body)}</body></html>\n"


def _cards(metrics: Mapping[str, Any]) -> str:
    finetune, energy, rerank = (metrics.get(key) or {} for key in ("finetune", "energy", "rerank"))
    cards = [
        ("L1 before", finetune.get("l1_val_before")),
        ("L1 held out", finetune.get("l1_val")),
        ("L1 reranked", rerank.get("l1_reranked")),
        ("L1 best candidate", rerank.get("l1_oracle")),
        ("Spearman", energy.get("spearman")),
    ]
    for arm, values in ((metrics.get("rollout") or {}).get("overall", {}).get("arms", {})).items():
        cards.append((f"success, {arm}", f"{100 * values['success']:.0f}%"))
    shown = (f"<div class='card'><b>{_cell(value)}</b><span>{html.escape(name)}</span></div>" for name, value in cards)
    return f"<div class='cards'>{''.join(shown)}</div>"


def _tables(metrics: Mapping[str, Any]) -> str:
    energy, rerank, rollout = (metrics.get(key) or {} for key in ("energy", "rerank", "rollout"))
    rates = [(kind, f"{100 * rate:.1f}%") for kind, rate in energy.get("win_rate", {}).items()]
    parts = [
        "<h2>The expert against each kind of negative, held out</h2>" + table(("negative", "expert wins"), rates),
        "<h2>Reranking, held out</h2>" + table(("measure", "value"), rerank.items()),
        "<h2>Closed loop</h2>",
    ]
    if rollout:
        parts.append("<p>Arms are paired by seed; the difference is to the first arm.</p>")
        columns = ("task", "arm", "episodes", "success", "95% interval", "difference", "95% interval", "ms a decision")
        parts.append(table(columns, _rollout_rows(rollout)))
    else:
        parts.append(f"<p>No rollout: {html.escape(str(metrics.get('rollout_reason') or 'not run'))}</p>")
    if seconds := metrics.get("seconds"):
        parts.append("<h2>Seconds</h2>" + table(("phase", "seconds"), ((k, f"{v:.1f}") for k, v in seconds.items())))
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
            change = summary["differences"].get(arm)
            if change is None:
                paired = ("", "")
            else:
                low, high = change["interval"]
                paired = (f"{100 * change['difference']:+.0f} points", f"{100 * low:+.0f} to {100 * high:+.0f}")
            yield (*row, *paired, f"{values['milliseconds_per_decision']['mean']:.1f}")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; its cells are escaped, numbers get four decimals."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    lines = ("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "n/a"
    return f"{value:.4f}" if isinstance(value, float) else html.escape(str(value))


def details(title: str, values: Mapping[str, Any]) -> str:
    """A folded block of settings."""
    plain = {key: asdict(value) if is_dataclass(value) else value for key, value in values.items()}  # type: ignore[arg-type]
    text = html.escape(json.dumps(plain, indent=1, default=str))
    return f"<details><summary>{title}</summary><pre>{text}</pre></details>" if values else ""
