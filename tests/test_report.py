"""The report: one file, every plot drawn, nothing loaded from elsewhere, damaged input named."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from vla_energy.report.curves import PLOTS, read_rows
from vla_energy.report.html import write_report

_VOID = {"meta", "br", "link", "img", "input"}


def _rows(steps: int = 30) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        row = {"step": step, "train/l1": 1 / step, "energy/loss": 2 / step, "frames_per_second": 40.0}
        row |= {"energy/positive": -0.1 * step, "energy/negative": 0.1 * step, "energy/spearman": 0.5}
        row |= {"energy/grad_norm": None if step == 3 else 0.2, "energy/skipped": float(step == 3)}
        row |= {"energy/win_rate/in_batch": 0.9, "energy/win_rate/policy": 0.6}
        rows.append(row)
    rows.append({"step": steps, "val/finetune/l1_val": 0.1, "val/energy/win_rate/noise_0.3": 0.99})
    return rows


def _metrics(rollout: bool) -> dict[str, Any]:
    arm = {"episodes": 5, "success": 0.6, "interval": [0.2, 0.9], "milliseconds_per_decision": {"mean": 15.0}}
    change = {"baseline": "policy", "difference": 0.2, "interval": [-0.1, 0.4]}
    compared = {"arms": {"policy": arm, "rerank": arm}, "differences": {"rerank": change}}
    return {
        "finetune": {"l1_val": 0.1, "l1_val_before": 0.5},
        "energy": {"win_rate": {"in_batch": 0.995, "<odd>": 0.5}, "spearman": None},
        "rerank": {"l1_policy": 0.1, "l1_reranked": 0.08, "l1_oracle": 0.05},
        "rollout": {"overall": compared, "tasks": {"reach": compared}} if rollout else None,
        "rollout_reason": None if rollout else "no OpenGL library",
        "seconds": {"total": 12.0},
        "versions": {"python": "3.11"},
    }


class _Balance(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("href", "src", "xlink:href") and value:
                self.links.append(value)
            if name == "id" and value:
                self.ids.append(value)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()


def _report(folder: Path, rollout: bool) -> str:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows()))
    out = write_report(folder, _metrics(rollout), folder / "report.html", {"seed": 7, "run_root_dir": Path("runs")})
    return out.read_text(encoding="utf-8")


@pytest.mark.parametrize("rollout", [True, False])
def test_report_is_whole_and_self_contained(tmp_path: Path, rollout: bool) -> None:
    page = _report(tmp_path, rollout)
    parser = _Balance()
    parser.feed(page)
    assert not parser.open
    assert all(link.startswith("#") and link[1:] in parser.ids for link in parser.links)
    assert len(parser.ids) == len(set(parser.ids))
    assert "prefers-color-scheme: dark" in page and "&lt;odd&gt;" in page and "<odd>" not in page
    assert ("+20 points" in page) == rollout and ("no OpenGL library" in page) != rollout


def test_every_plot_is_drawn(tmp_path: Path) -> None:
    page = _report(tmp_path, True)
    drawings = [text.split("</svg>")[0] + "</svg>" for text in page.split("<figcaption>")[1:]]
    assert len(drawings) == len(PLOTS)
    for (title, *_), drawing in zip(PLOTS, drawings, strict=True):
        assert drawing.startswith(title)
        svg = ElementTree.fromstring(drawing[drawing.index("<svg") :])
        strokes = [
            path for path in svg.iter("{http://www.w3.org/2000/svg}path") if "stroke: #" in path.get("style", "")
        ]
        assert strokes, title


def test_a_run_without_metrics_and_a_torn_line_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="metrics.jsonl is missing"):
        read_rows(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "train')
    with pytest.raises(ValueError, match="line 2: not a row of metrics"):
        read_rows(tmp_path)
