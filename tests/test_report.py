"""The report: one file, every plot drawn, nothing loaded from elsewhere, what is missing said, damaged input named."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from report_fixture import footage, metrics, preflight, rollout, rows, write_run

from vla_energy import cli
from vla_energy.fingerprint import fingerprint
from vla_energy.report.compare import differing_settings
from vla_energy.report.curves import PLOTS, series_of
from vla_energy.report.footage import footage_figure
from vla_energy.report.html import write_report
from vla_energy.report.runs import ReportError, Run, read_rows, read_run, read_runs

_VOID = {"meta", "br", "link", "img", "input"}
_SVG = "{http://www.w3.org/2000/svg}"


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


def _is_whole(page: str) -> None:
    parser = _Balance()
    parser.feed(page)
    assert not parser.open
    inside = [link for link in parser.links if not link.startswith("data:image/jpeg;base64,")]
    assert all(link.startswith("#") and link[1:] in parser.ids for link in inside)
    assert len(parser.ids) == len(set(parser.ids))


def _report(folder: Path, driven: bool) -> str:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    (folder / "metrics.json").write_text(json.dumps(metrics(driven)))
    return write_report(read_runs([folder]), folder / "report.html").read_text(encoding="utf-8")


def _drawings(page: str) -> dict[str, ElementTree.Element]:
    parts = page.split("<figcaption>")[1:]
    return {
        part.split("</figcaption>")[0]: ElementTree.fromstring(part[part.index("<svg") :].split("</svg>")[0] + "</svg>")
        for part in parts
    }


@pytest.mark.parametrize("driven", [True, False])
def test_report_is_whole_and_self_contained(tmp_path: Path, driven: bool) -> None:
    page = _report(tmp_path, driven)
    _is_whole(page)
    assert "prefers-color-scheme: dark" in page and "&lt;odd&gt;" in page and "<odd>" not in page
    assert ("+20 points" in page) == driven and ("no OpenGL library" in page) != driven


def test_every_plot_is_drawn(tmp_path: Path) -> None:
    page = write_report(read_runs([write_run(tmp_path / "a")]), tmp_path / "r.html").read_text(encoding="utf-8")
    _is_whole(page)
    drawings = _drawings(page)
    held_out = {"Ranking by kind of negative", "Ranking by distance", "Gate by its margin, held out"}
    closed = {"Success in closed loop", "Success by task", "Paired difference in success"}
    verdict = {"Preflight: change of the held-out L1, a"}
    where = "reach, episode 3, step 7: "
    shapes = {f"{where}plane through policy and expert", f"{where}one step of the chunk moved"}
    assert set(drawings) == {title for title, *_ in PLOTS} | held_out | closed | verdict | shapes
    for title, svg in drawings.items():
        strokes = [path for path in svg.iter(f"{_SVG}path") if "stroke: #" in path.get("style", "")]
        fills = [path for path in svg.iter(f"{_SVG}path") if "fill: #" in path.get("style", "")]
        assert strokes or fills, title
    assert "use rerank: it &lt;helps&gt;" in page and "Not on this page" not in page
    assert page.count("<img") == 1 and "retrieve@2" in page


def test_runs_are_compared(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", 0.2, 5e-4)])
    assert [run.label for run in runs] == ["a", "b"]
    assert differing_settings(runs) == [("learning_rate", "0.001", "0.0005")]
    page = write_report(runs, tmp_path / "r.html").read_text(encoding="utf-8")
    _is_whole(page)
    curve = ElementTree.tostring(_drawings(page)["Policy L1"], encoding="unicode")
    assert all(f">{name}</" in curve for name in ("a", "b", "train", "held out"))
    assert "Win rate in training" not in _drawings(page)
    assert "Ranking by kind of negative, last row of training" in _drawings(page)
    assert page.count("<img") == 2 and "<td>learning_rate</td><td>0.001</td><td>0.0005</td>" in page


def test_curves_leave_out_what_was_not_finite() -> None:
    steps, values = series_of(rows(5), {"energy/grad_norm": "norm"})["norm"]
    assert steps == [1, 2, 4, 5] and values == [0.2] * 4


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    _report(tmp_path, False)
    run = read_run(tmp_path)
    assert set(run.missing) == {
        "settings", "landscapes and the gate's curve", "preflight", "closed loop", "frames of an episode",
    }  # fmt: skip
    assert "no OpenGL library" in run.missing["closed loop"] and "--use_val_set True" in str(run.missing.values())
    (tmp_path / "metrics.json").unlink()
    rebuilt = read_run(tmp_path).metrics
    assert rebuilt["finetune"]["l1_val"] == 0.1 and rebuilt["energy"]["win_rate"]["at_0.05"] == 0.6


def test_a_checkpoint_is_reported_with_its_run(tmp_path: Path) -> None:
    home = write_run(tmp_path / "mine")
    latest, numbered = home / "latest", tmp_path / "mine--20_chkpt"
    latest.mkdir()
    numbered.mkdir()
    (home / "energy_gates.json").rename(numbered / "energy_gates.json")
    assert read_run(latest).rows == read_run(numbered).rows == read_run(home).rows
    assert read_run(home).gates == read_run(numbered).gates != None  # noqa: E711
    assert read_run(latest).label == "mine/latest"


def test_files_elsewhere_belong_to_the_run_of_their_place(tmp_path: Path) -> None:
    whole, bare = write_run(tmp_path / "whole"), tmp_path / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text('{"step": 1, "train/l1": 0.5}\n')
    runs = read_runs([bare, whole], [whole], [whole / "rollout.json"])
    assert runs[0].preflight and runs[0].rollout and runs[1].preflight
    assert cli.main(["report", str(bare), "--preflight", str(whole), "--preflight", str(whole)]) == 2


def test_results_of_another_checkpoint_are_noted(tmp_path: Path) -> None:
    home = write_run(tmp_path / "a")
    (home / "latest").mkdir()
    (home / "latest" / "config.json").write_text("{}")
    for made_with, expected in (("0" * 16, 1), (fingerprint(home / "latest"), 0)):
        (home / "preflight.json").write_text(json.dumps(preflight() | {"fingerprint": made_with}))
        (home / "rollout.json").write_text(json.dumps(rollout() | {"meta": {"checkpoint": {"fingerprint": made_with}}}))
        run = read_run(home / "latest")
        assert [note.split(" were")[0] for note in run.notes] == ["preflight's results", "the rollouts"] * expected
        page = write_report([run], tmp_path / "r.html").read_text(encoding="utf-8")
        assert ("Take care" in page) == bool(expected)


def test_labels_differ_and_stay_short(tmp_path: Path) -> None:
    name = "a-name-that-is-much-longer-than-any-legend-has-room-for"
    runs = read_runs([write_run(tmp_path / "x" / name), write_run(tmp_path / "y" / name)])
    labels = [run.label for run in runs]
    assert len(set(labels)) == 2 and max(map(len, labels)) <= 22


def test_the_footage_needs_no_script_and_its_data_cannot_end_it(tmp_path: Path) -> None:
    shown = footage()
    shown["decisions"][1]["energy"] = None
    shown["decisions"][3]["image"] = None
    page = footage_figure(Run(tmp_path, footage=shown), 0)
    assert page.count("<img src='data:image/jpeg;base64,") == 1 and page.count("data:image/jpeg") == 1 + 5
    assert page.count("</script>") == 1 and "reach &lt;/script&gt;" in page
    assert "max='4'" in page and "energy n/a of what is executed" in page
    assert (
        footage_figure(Run(tmp_path), 0) == "" == footage_figure(Run(tmp_path, footage={**shown, "decisions": []}), 0)
    )


def test_a_run_without_metrics_and_a_torn_line_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="metrics.jsonl is missing"):
        read_rows(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "train')
    with pytest.raises(ValueError, match="line 2: not a row of metrics"):
        read_rows(tmp_path)


def test_what_cannot_be_reported_on_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"holds none of metrics\.jsonl, metrics\.json"):
        read_run(tmp_path)
    with pytest.raises(ReportError, match="is not a folder"):
        read_run(tmp_path / "nowhere")
    home = write_run(tmp_path / "a")
    with pytest.raises(ReportError, match="named twice"):
        read_runs([home, home / ".." / "a"])
    with pytest.raises(ReportError, match=r"pf/preflight\.json is not there"):
        (tmp_path / "pf").mkdir()
        read_run(home, tmp_path / "pf")
    (home / "shapes.json").write_text("[1]")
    with pytest.raises(ReportError, match=r"shapes\.json holds list"):
        read_run(home)
    (home / "shapes.json").write_text("{")
    with pytest.raises(ReportError, match=r"shapes\.json is damaged"):
        read_run(home)


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = write_run(tmp_path / "a")
    assert cli.main(["report", str(home)]) == 0
    assert f"written: {home / 'report.html'}" in capsys.readouterr().out
    assert cli.main(["report", str(home), "--json", "--out", str(tmp_path / "new" / "r.html")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert Path(told["written"]).is_file() and told["runs"][0]["last"]["val/finetune/l1_val"] == 0.1
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
