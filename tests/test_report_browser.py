"""The report in Chromium: every plot is drawn and nothing overflows, on a phone and a desktop, in light and dark."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from browser import HELP, SCHEMES, WIDTHS, find, look

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from sample_run import write_run

from vla_energy.report.html import write_report
from vla_energy.report.runs import read_runs


@pytest.fixture(scope="module", autouse=True)
def _chromium() -> None:
    """Skips where there is no Chromium; in CI there has to be one."""
    if find() is None:
        if os.environ.get("CI"):
            pytest.fail(HELP)
        pytest.skip(HELP)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A page of one run and one of three, with names and settings that are long."""
    folder = tmp_path_factory.mktemp("runs")
    long = "tiny_openvla+metaworld_demo+b16+lr-0.001+lora-r32+dropout-0.0+image_aug+energy"
    runs = [write_run(folder / "one"), write_run(folder / long, 0.1, 5e-4), write_run(folder / f"{long}2", 0.2)]
    return {
        "one": write_report(read_runs(runs[:1]), folder / "one.html").read_text(encoding="utf-8"),
        "three": write_report(read_runs(runs), folder / "three.html").read_text(encoding="utf-8"),
    }


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["one", "three"])
def test_every_plot_is_drawn_and_nothing_overflows(pages: dict[str, str], name: str, scheme: str) -> None:
    page = pages[name]
    for view, width in zip(look(page, scheme), WIDTHS, strict=True):
        assert view["width"] == width and view["wrong"] == []
        assert view["plots"] == page.count("<figure") > 20
        ground, ink = (_luminance(view[key]) for key in ("ground", "ink"))
        assert (ground < ink) == (scheme == "dark")
        # WCAG 2.1's contrast ratio: 7 for its level AAA, 4.5 for AA.
        assert (max(ground, ink) + 0.05) / (min(ground, ink) + 0.05) > 7
        assert all(4.5 <= view["contrasts"][kind] < 21 for kind in ("text", "plots"))


def test_what_is_wrong_is_seen(pages: dict[str, str]) -> None:
    page = pages["one"]
    wide = page.replace("<h2>Curves</h2>", "<h2>Curves</h2><div style='width: 700px'>x</div>")
    phone, desktop = look(wide, "light")
    assert phone["wrong"][0] == "the page is 716 wide in a window of 390" and desktop["wrong"] == []
    hidden = page.replace(
        "<svg role='img' aria-label='Energy loss'", "<svg style='display:none' aria-label='Energy loss'"
    )
    assert hidden != page and all("Energy loss is 0 x 0" in view["wrong"] for view in look(hidden, "light"))
    empty = re.sub(r"(<svg role='img' aria-label='Energies'[^>]*>).*?</svg>", r"\1</svg>", page, flags=re.DOTALL)
    assert empty != page and all("Energies has 0 marks" in view["wrong"] for view in look(empty, "light"))
    pale = re.sub(r"--soft: #\w+", "--soft: #808890", page)
    seen = str(look(pale, "light")[0]["wrong"])
    assert 'text "normalised units" has a contrast of 3' in seen and 'P "Energies are' in seen
    assert look(page.replace("fill: var(--soft)", "fill: #808890"), "light")[0]["contrasts"]["plots"] < 4.5
    unscripted = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert all("the slider moves not" in str(view["wrong"]) for view in look(unscripted, "light"))


def _luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
