"""A self-contained HTML page: style, tables, folded blocks. Nothing is loaded from elsewhere."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6570; --line: #d6dbe0; --page: #ffffff; --card: #f6f8fa;
  --alarm: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaee; --soft: #9aa5b1; --line: #353c44; --page: #14171a; --card: #1c2126;
    --alarm: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
p { color: var(--soft); margin: .3rem 0 .8rem; }
.cards, .plots { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); }
.plots { grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
.plots > p { grid-column: 1 / -1; margin: 0; }
.card, figure { margin: 0; padding: .7rem .9rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; }
.card b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; } .card span { color: var(--soft); }
figcaption { font-weight: 600; } figure svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; overflow-wrap: normal; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
pre { padding: .8rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; overflow-x: auto;
  font-size: .85rem; overflow-wrap: normal; } details { margin-top: 1.5rem; }
.alarm { color: var(--alarm); } .box { padding: .7rem .9rem; margin: .8rem 0; border: 2px solid var(--alarm);
  border-radius: .5rem; } .box p { color: var(--ink); margin: .3rem 0; } .box details { margin-top: .5rem; }
.box .alarm { font-size: 1.15rem; font-weight: 600; }
.verdict { color: var(--ink); font-weight: 600; }
.note { font-size: .85rem; margin: .3rem 0 0; } h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
.footage { max-width: 36rem; }
.footage img { width: 100%; max-width: 20rem; display: block; image-rendering: pixelated; border-radius: .3rem; }
.footage input { width: 100%; margin: .6rem 0; accent-color: #3b82f6; }
.footage output { display: block; min-height: 3em; }
summary { cursor: pointer; font-weight: 600; }
"""


def page(title: str, body: Sequence[str]) -> str:
    """A whole HTML page of escaped `title` and finished parts."""
    head = "<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
    start = f"<!doctype html><html lang='en'><head>{head}<title>{title}</title><style>{_STYLE}</style></head>"
    return f"{start}<body>{''.join(body)}</body></html>\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; its cells are escaped, numbers get four decimals."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    lines = ("<tr>" + "".join(f"<td>{cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def cell(value: Any) -> str:
    """Escaped text; numbers get four decimals, what is not there is n/a."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "n/a"
    return f"{value:.4f}" if isinstance(value, float) else html.escape(str(value))


def details(title: str, values: Mapping[str, Any]) -> str:
    """A folded block of settings."""
    plain = {key: asdict(value) if is_dataclass(value) else value for key, value in values.items()}  # type: ignore[arg-type]
    text = html.escape(json.dumps(plain, indent=1, default=str))
    return f"<details><summary>{title}</summary><pre>{text}</pre></details>" if values else ""
