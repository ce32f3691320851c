"""The report: one file, every plot drawn, nothing loaded from elsewhere, what is missing said, damaged input named."""

from __future__ import annotations

import json
import random
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from chaos_mutate import damage_json
from sample_run import footage, metrics, preflight, rollout, rows, shapes, write_run

from vla_energy import cli
from vla_energy.fingerprint import fingerprint
from vla_energy.report.compare import differing_settings
from vla_energy.report.curves import ALARM, COLOURS, PLOTS, draw, series_of, spans_not_finite
from vla_energy.report.figures import CHANCE, dots, gate
from vla_energy.report.footage import footage_figure
from vla_energy.report.html import write_report
from vla_energy.report.landscapes import landscape_figures
from vla_energy.report.notes import across
from vla_energy.report.preflight import write_page
from vla_energy.report.runs import ReportError, Run, read_run, read_runs
from vla_energy.results import read_rows

_JUDGED = {
    "verdict": {"reasons": ["use rerank"]}, "modes": {}, "tasks": {},
    "policy": {"forward_ms": 1.0, "frames": 2, "episodes": 2, "by_step": [0.1]},
}  # fmt: skip
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
    for kind in ("plane through policy and expert", "one step of the chunk moved", "Gate by its margin, held out"):
        captions = [text.split("</figcaption>")[0] for text in page.split("<figcaption>")[1:]]
        named = [text.split(":")[0] for text in captions if text.endswith(kind)]
        assert named == (["a", "b"] if kind.startswith("Gate") else ["a", "a", "b", "b"])
    assert "Ranking by kind of negative, last row of training" in _drawings(page)
    assert page.count("<img") == 2 and "<td>learning_rate</td><td>0.001</td><td>0.0005</td>" in page


def test_curves_leave_out_what_was_not_finite() -> None:
    steps, values = series_of(rows(5), {"energy/grad_norm": "norm"})["norm"]
    assert steps == [1, 2, 4, 5] and values == [0.2] * 4


def _spoilt(folder: Path, value: object, after: int = 11, steps: int = 30) -> Path:
    """A run whose energies and validations are `value` after a step."""
    home = write_run(folder)
    spoilt = [
        {k: value if k.startswith(("energy/", "val/")) and row["step"] > after else v for k, v in row.items()}
        for row in rows(steps)
    ]
    (home / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in spoilt))
    return home


@pytest.mark.parametrize("value", [None, float("nan"), float("-inf"), 10**400])
def test_what_is_not_finite_is_said_first_and_marked(tmp_path: Path, value: object) -> None:
    run = read_run(_spoilt(tmp_path / "a", value))
    page = write_report([run], tmp_path / "r.html").read_text(encoding="utf-8")
    _is_whole(page)
    # 19 rows of training and the validation; step 3's gradient norm is null in every one of the fixture's runs.
    told = page.index("21 of 31 rows hold a metric that is not finite, from step 3 on")
    assert told < page.index("<div class='cards'>") and "energy/loss (from step 12 on, 19 rows)" in page
    assert run.not_finite()["val/energy/spearman"] == [30]
    curves = page[page.index("<h2>Curves</h2>") :]
    assert "Not every value is finite (from step 3 on)" in curves
    assert "Not finite (red at the bottom): 19 rows from step 12 to 30." in curves
    drawings = _drawings(page)
    for title in ("Energy loss", "Energies", "Gradient norm of the head"):
        assert ALARM in ElementTree.tostring(drawings[title], encoding="unicode")
    # The last tick of a curve that ends at 11 is that of the whole run.
    assert _ticks(drawings["Energy loss"]) == _ticks(drawings["Speed"]) and "30" in _ticks(drawings["Energy loss"])
    # A metric that is never finite is drawn as such; it does not drop out of the page.
    assert "no value is finite" in ElementTree.tostring(drawings["Win rate, held out"], encoding="unicode")
    assert "<td>energy/loss</td><td>not finite</td>" in page


def _ticks(svg: ElementTree.Element) -> list[str]:
    axis = next(part for part in svg.iter(f"{_SVG}g") if part.get("id", "").endswith("matplotlib.axis_1"))
    return ["".join(text.itertext()) for text in axis.iter(f"{_SVG}text")]


def test_not_finite_by_run_and_not_by_design(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"step": 1, "energy/loss": 1.0, "val/gate/margin": None, "val/gate/worse": None}
    fine = tmp_path / "fine"
    fine.mkdir()
    (fine / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    runs = read_runs([fine, _spoilt(tmp_path / "bad", None)])
    assert runs[0].not_finite() == {} and "<div class='box'" not in write_report(
        runs[:1], tmp_path / "r.html"
    ).read_text(encoding="utf-8")
    page = write_report(runs, tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.count("role='alert'") == 1 and "bad: 21 of 31 rows hold" in page
    assert "Not finite (red at the bottom): bad: 19 rows from step 12 to 30." in page
    assert cli.main(["report", str(tmp_path / "bad")]) == 0
    assert "are not finite in some rows, from step 3 on" in capsys.readouterr().out


def test_spans_not_finite() -> None:
    found = [{"step": n, "a": None if n in (2, 5, 6) else 1.0} for n in range(1, 8)]
    found.insert(5, {"step": 5, "val/b": 1.0})
    assert spans_not_finite(found, {"a": "a"}) == [(2, 2, 1), (5, 6, 2)]
    assert spans_not_finite(found, {"val/b": "b"}) == []


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    _report(tmp_path, False)
    run = read_run(tmp_path)
    assert set(run.missing) == {
        "settings", "landscapes and the gate's curve", "preflight", "closed loop", "frames of an episode",
    }  # fmt: skip
    assert "no OpenGL library" in run.missing["closed loop"] and "--use_val_set True" in str(run.missing.values())
    assert run.missing["settings"] == "no settings.json: flags and versions of this run are not known"
    (tmp_path / "metrics.json").unlink()
    rebuilt = read_run(tmp_path).metrics
    assert rebuilt["finetune"]["l1_val"] == 0.1 and rebuilt["energy"]["win_rate"]["at_0.05"] == 0.6


@pytest.mark.parametrize(
    ("share", "arm", "margin", "told"),
    [
        (0.0, "rerank", None, "rerank: the gate was shut, so that rerank and policy executed the same chunks."),
        (0.0, "rerank", 0.5, "rerank: the gate let no candidate through, so that"),
        (0.1, "rerank", 0.5, ""),
        (0.0, "policy@2", None, ""),
        (None, "rerank", None, ""),
    ],
)
def test_arms_that_are_the_same_policy_are_told(
    tmp_path: Path, share: float | None, arm: str, margin: float | None, told: str
) -> None:
    found = rollout()
    rates = found["overall"]["arms"]["policy"]
    rates |= {} if share is None else {"accepted_share": 0.0}
    same = {"baseline": "policy", "difference": 0.0, "interval": [0.0, 0.0]}
    arms = {"policy": rates, arm: rates | ({} if share is None else {"accepted_share": share})}
    found["overall"] = {"arms": arms, "differences": {arm: same}}
    found["tasks"] = {"reach": found["overall"]}
    run = Run(tmp_path, rollout=found | {"meta": {"checkpoint": {"gates": {"rerank": margin}}}}, label="a")
    page = write_report([run], tmp_path / "r.html").read_text(encoding="utf-8")
    assert ("Both arms are the same policy" in page) == bool(told) and told in page
    assert "An interval that holds 0 does not show a difference" in page


@pytest.mark.parametrize(
    ("change", "cells", "drawn"),
    [
        ({"won": 4, "lost": 0, "p_value": 0.125}, ("+5 to +40", "4 : 0", "0.125"), True),
        ({}, ("+5 to +40", "n/a", "n/a"), True),  # an older file
        (
            {"difference": 0, "interval": [0, 0], "won": 0, "lost": 0, "p_value": 1.0},
            ("n/a (no pair differed)",),
            False,
        ),
        ({"difference": 0, "interval": [0, 0]}, ("n/a (no pair differed)",), False),
        ({"difference": 1, "interval": [1, 1], "won": 2, "lost": 0}, ("n/a (pairs of a task are alike)",), True),
    ],
)
def test_the_paired_test_is_told(tmp_path: Path, change: dict, cells: tuple[str, ...], drawn: bool) -> None:
    home, found = write_run(tmp_path / "a"), rollout()
    found["overall"]["differences"] = {
        "rerank": {"baseline": "policy", "difference": 0.2, "interval": [0.05, 0.4]} | change
    }
    (home / "rollout.json").write_text(json.dumps(found))
    page = write_report([read_run(home)], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "".join(f"<td>{cell}</td>" for cell in cells) in page and "+0 to +0" not in page
    assert ("Paired difference in success" in _drawings(page)) == drawn and "Read p there" in page


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            {"complete": False, "settings": {"tasks": ["reach", "press", "<open>"]}},
            ": 1 of 3 tasks have no results (<open>)",
        ),
        (
            {"complete": True, "settings": {"tasks": ["reach", "press", "<open>"]}},
            ": 1 of 3 tasks have no results (<open>)",
        ),
        ({"complete": False}, ";"),
        ({"complete": True, "settings": {"tasks": ["reach", "press"]}}, None),
        ({}, None),  # an older file
    ],
)
def test_rollouts_that_are_not_finished_are_told(tmp_path: Path, more: dict, told: str | None) -> None:
    home = write_run(tmp_path / "a")
    (home / "rollout.json").write_text(json.dumps(rollout() | more))
    run = read_run(home)
    assert [note[: len(told or "") + 29] for note in run.notes] == (
        [f"the rollouts are not finished{told}"] if told else []
    )
    page = write_report([run], tmp_path / "r.html").read_text(encoding="utf-8")
    assert ("Take care" in page) == bool(told)


def _with(
    label: str, rolled: dict | None = None, energy: dict | None = None, tasks: tuple[str, ...] = ("reach",)
) -> Run:
    found = rollout(tasks) | ({} if rolled is None else {"settings": rolled})
    return Run(Path(label), label=label, rollout=found, settings={"energy": energy or {"loss": {"margin": 0.0}}})


def test_what_cannot_be_compared_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = {"episodes": 10, "seed": 0, "replan_every": 4, "backend": "metaworld"}
    alike = [_with("a", run), _with("b", {**run, "workers": 3}), _with("old")]
    assert across(alike) == across(alike[:1]) == []
    (rolled,) = across([_with("a", run), _with("b", {**run, "seed": 500, "replan_every": 8}, tasks=("reach", "press"))])
    assert "differ in tasks (a: 1, b: 2); seed (a: 0, b: 500); replan_every (a: 4, b: 8):" in rolled
    other = [
        _with("a", energy={"loss": {"margin": 0.0}, "range": {"name": "softplus"}}),
        _with("b", energy={"loss": {"margin": 1.0}, "range": {"name": "tanh"}, "guard": {"clip": 2}}),
    ]
    (scales,) = across(other)
    assert scales.startswith("settings below energy.loss, energy.range differ: losses, energies and win rates")
    assert across([other[0], _with("off", energy={"enabled": False, "loss": {"margin": 1.0}})]) == []
    page = write_report(other, tmp_path / "r.html").read_text(encoding="utf-8")
    assert f"<h2>Take care</h2><ul><li>{scales}</li></ul>" in page
    folders = [write_run(tmp_path / name) for name in "ab"]
    (folders[0] / "settings.json").write_text(json.dumps({"flags": {"energy": {"range": {"name": "tanh"}}}}))
    assert cli.main(["report", *map(str, folders)]) == 0
    assert "settings below energy.range differ" in capsys.readouterr().out


def test_a_legend_names_the_runs_that_have_a_curve() -> None:
    shown = {"first": [{"step": 1, "train/l1": 0.5}], "second": [{"step": n, "energy/loss": 1.0} for n in (1, 2)]}
    drawn = draw(shown, *next(plot for plot in PLOTS if plot[0] == "Energy loss"))
    assert ">second</" in drawn and ">first</" not in drawn and COLOURS[1] in drawn


def test_remedies_fit_the_run(tmp_path: Path) -> None:
    def missing(name: str, energy: dict, head: bool = False) -> dict[str, str]:
        (folder := tmp_path / name).mkdir()
        (folder / "metrics.jsonl").write_text('{"step": 1, "train/l1": 0.5}\n')
        (folder / "settings.json").write_text(json.dumps({"flags": {"energy": energy}}))
        if head:
            (folder / "energy_head--1_checkpoint.safetensors").write_bytes(b"")
        return read_run(folder).missing

    whole = str(missing("whole", {"enabled": True}))
    assert "--use_val_set True" in whole and "--val-cache" not in whole and "written at each validation" in whole
    head = str(missing("head", {"enabled": True, "freeze_backbone": True}, head=True))
    assert "train-head with --val-cache DIR" in head and "--use_val_set" not in head
    live = str(missing("live", {"freeze_backbone": True}))
    assert "--use_val_set" in live and "--val-cache" in live
    assert set(missing("off", {"enabled": False})) == {"energy head", "closed loop", "frames of an episode"}


@pytest.mark.parametrize("name", ["preflight", "rollout"])
@pytest.mark.parametrize("text", ["# notes", "[1]"])
def test_a_named_file_is_not_to_be_deleted(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "notes.md").write_text(text)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(
        ReportError, match=rf"notes\.md .*: name a file that vla-energy {name} wrote after --{name}"
    ) as e:
        read_run(tmp_path, **{name: tmp_path / "notes.md"})
    assert "delete" not in str(e.value)


def test_tables_say_what_they_hold(tmp_path: Path) -> None:
    bare = [Run(tmp_path, rows=[{"step": 1, "energy/win_rate/in_batch": 0.5}], label=label) for label in "ab"]
    page = write_report(bare, tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Ranking in training, last row" in page and "Ranking, held out" not in page
    gates = {"margins": {"rerank": None, "retrieve": 0.0}}
    settings = {"energy": {"rerank": {"margin": 0.25}}}
    run = Run(tmp_path, metrics={"rerank": {"l1_gated": 0.1, "kept": 0.5}}, gates=gates, settings=settings, label="a")
    page = write_report([run], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<td>L1 behind the gate</td>" in page and "energy.rerank.margin (0.25), not the calibrated one" in page
    assert "<td>shut</td>" in page and "<td>retrieve</td><td>none: it has no gate</td>" in page


def test_an_effect_without_width_has_no_interval(tmp_path: Path) -> None:
    found = {"l1_policy": 0.1, "l1_gated": 0.1, "change": 0.0, "interval": [0.0, 0.0], "gap_closed": 0.0}
    found |= {"accepted": 0.0, "worse": None, "episodes": 9}
    mode = {"effect": found, "spearman": 0.5, "ms": 1.0, "sources": {}, "bands": {}}
    other = mode | {"effect": found | {"accepted": 0.5, "episodes": 1}}
    modes = {"rerank": mode, "refine": other, "retrieve": mode | {"effect": found | {"accepted": 0.5}}}
    page = write_page({**_JUDGED, "modes": modes, "settings": {}}, tmp_path / "p.html").read_text()
    told = ("n/a (no chunk replaced)", "n/a (one episode)", "+0 to +0%")
    assert [page.count(f"<td>{text}</td>") for text in told] == [1, 1, 1]
    judged = preflight()
    judged["modes"]["refine"] = mode
    run = Run(tmp_path, preflight=judged, label="a")
    page = write_report([run], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Not drawn, as no chunk was replaced: refine." in page


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


@pytest.mark.parametrize("torn", [b'{"step": 2, "train', b'{"step": 2, "a": 0.5, "\xc3', b"{", b'{"step": 2}'])
def test_a_last_line_without_its_end_is_left_out_and_said(tmp_path: Path, torn: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + torn)
    told: list[str] = []
    found = [row["step"] for row in read_rows(tmp_path, told.append)]
    if torn.endswith(b"}"):  # whole, though its line is not
        assert found == [1, 2] and not told
        return
    assert found == [1] and len(told) == 1 and "metrics.jsonl, ends in its middle and is left out" in told[0]
    assert read_rows(tmp_path) == [{"step": 1}]
    page = write_report(read_runs([tmp_path]), tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Take care" in page and "line 2, the last of " in page


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (None, "it has no arm, decisions, instruction"),
        ({"decisions": []}, "it has no decisions"),
        ({"decisions": [{"step": 0}]}, "its decision 0 has no accepted, energy, energy_policy, image"),
        ({"decisions": [3]}, "its decision 0 has no accepted"),
        ({"decisions": [footage(1)["decisions"][0] | {"image": None}]}, "none of its decisions has a frame"),
        ({"decisions": [footage(1)["decisions"][0] | {"step": "x"}]}, "the step of its decision 0 is no number"),
    ],
)
def test_footage_that_cannot_be_shown_is_said(tmp_path: Path, change: dict | None, told: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "footage.json").write_text(json.dumps({} if change is None else footage() | change))
    page = write_report(read_runs([tmp_path]), tmp_path / "r.html").read_text(encoding="utf-8")
    assert f"footage.json is there, but {told}" in page and "<img" not in page


def test_lines_and_axes_are_seen(tmp_path: Path) -> None:
    home = write_run(tmp_path / "a")
    drawings = _drawings(write_report(read_runs([home]), tmp_path / "r.html").read_text(encoding="utf-8"))
    styles = [path.get("style", "") for path in drawings["Ranking by distance"].iter(f"{_SVG}path")]
    (chance,) = [style for style in styles if CHANCE in style and "stroke-width: 1.8" in style][:1]
    assert "stroke-dasharray: 1.8" in chance
    gate = ElementTree.tostring(drawings["Gate by its margin, held out"], encoding="unicode")
    assert COLOURS[4] in gate and gate.count("stroke-dasharray") >= 2
    assert {"step of the episode", "energy, lower is better"} <= set(
        footage_figure(Run(tmp_path, footage=footage()), 0).replace("</text>", ">").split(">")
    )


def test_the_terms_hold_the_centre_and_say_that_they_are_unweighted(tmp_path: Path) -> None:
    page = write_report(read_runs([write_run(tmp_path / "a")]), tmp_path / "r.html").read_text(encoding="utf-8")
    terms = ElementTree.tostring(_drawings(page)["Terms of the energy loss"], encoding="unicode")
    assert all(f">{name}</" in terms for name in ("info_nce", "chance", "centre 0", "centre 1"))
    assert "Each before its weight" in page and "is usually most of it" in page


@pytest.mark.parametrize("smallest", [0.1, 0.0, -1.0])
def test_the_first_step_does_not_flatten_the_terms(smallest: float) -> None:
    anchors = [500.0, *(2.0 + n / 30 for n in range(29))]
    found = [{"step": n, "energy/anchor": anchor, "energy/hinge": smallest} for n, anchor in enumerate(anchors)]
    plot = next(plot for plot in PLOTS if plot[0] == "Terms of the energy loss")
    drawn = draw({"a": found}, *plot)
    assert "log scale" in drawn
    svg = ElementTree.fromstring(drawn[drawn.index("<svg") :].split("</svg>")[0] + "</svg>")
    drawn_lines = (path.get("d", "") for path in svg.iter(f"{_SVG}path") if COLOURS[0] in path.get("style", ""))
    heights = [float(number) for number in re.findall(r"[ML] \S+ (\S+)", max(drawn_lines, key=len))]
    # On a linear axis the steps after the first share less than a pixel.
    assert heights[1] - heights[-1] > 5 and heights[0] < min(heights[1:])


def test_a_run_without_metrics_and_a_damaged_line_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="metrics.jsonl is missing"):
        read_rows(tmp_path)
    for damaged in ('{"step": 2, "train\n', '{"step": 2, "train\n{"step": 3}', "[1]"):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + damaged)
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not a row of metrics .*; delete that line"):
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
    with pytest.raises(ReportError, match=r"shapes\.json is not what .*the whole: expected an object, found \[1\]"):
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


@pytest.mark.parametrize("values", [(1e308, -1e308), (1e308,), (1e100, -1e100), (0.5, -1e308, 0.4)])
def test_values_that_no_axis_holds_are_left_out_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], values: tuple[float, ...]
) -> None:
    names = ("energy/loss", "energy/info_nce", "energy/win_rate/x", "val/energy/win_rate/x")
    rows = [{"step": step, **dict.fromkeys(names, value)} for step, value in enumerate(values, start=1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["report", str(tmp_path)]) == 0, capsys.readouterr().err
    page = (tmp_path / "report.html").read_text()
    told = "Not finite, or too large for an axis (red at the bottom): "
    assert (told in page) == any(abs(value) > 1e100 for value in values)


def test_a_step_that_no_axis_holds_is_told_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "energy/loss": 1}\n{"step": 1e308, "energy/loss": 1}\n')
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "metrics.jsonl, line 2: not a row of metrics" in capsys.readouterr().err


def test_no_energies_are_drawn_between_steps(tmp_path: Path) -> None:
    kept = shapes()
    time = {"xs": [0.0, 1.0], "energies": [[0.0, 0.0], [None, None], [10.0, 10.0]]}
    kept["frames"] = [kept["frames"][0] | {"time": time}]
    drawn = landscape_figures(Run(tmp_path, shapes=kept, label="a"))[1]
    svg = ElementTree.fromstring(drawn[drawn.index("<svg") :].split("</svg>")[0] + "</svg>")
    plot = next(part for part in svg.iter(f"{_SVG}g") if part.get("id", "").endswith("axes_1"))
    filled = [path for path in plot.iter(f"{_SVG}path") if path.get("d")]
    fills = {found for path in filled for found in re.findall(r"fill: (#\w+)", path.get("style", ""))}
    assert len(fills) == 2, "of the first step and of the last"


def test_the_footage_has_a_legend_of_its_dots(tmp_path: Path) -> None:
    shown = footage()
    assert "another chunk than the policy's is executed</text>" in footage_figure(Run(tmp_path, footage=shown), 0)
    shown["decisions"][2]["accepted"] = False
    assert "is executed</text>" not in footage_figure(Run(tmp_path, footage=shown), 0)


def test_a_gate_says_what_it_counts_as_worse(tmp_path: Path) -> None:
    curve = {"margins": [0.0, 1.0], "accepted": [0.9, 0.0], "worse": [0.3, None], "l1": [0.1, 0.1], "l1_policy": 0.1}
    modes = {"rerank": {"curve": curve | {"chosen": None}}}
    drawn = gate(Run(tmp_path, shapes={"gate": curve | {"chosen": 0.5}}, preflight={"modes": modes}, label="a"))
    validated, judged = drawn.split("</figure>")[:2]
    assert "for the calibrated margin: of what" in validated and "tolerance" not in validated
    assert "the gate stays shut" in judged and "energy.rerank.tolerance (by default 1) times" in judged


@pytest.mark.parametrize("count", [2, 5])
def test_dots_of_a_row_are_nearer_than_those_of_the_next(count: int) -> None:
    names = ("reach", "press", "open")
    series = {f"arm {n}": {name: (float(n), None, None) for name in names} for n in range(count)}
    drawn = dots("Title", series, "percent")
    svg = ElementTree.fromstring(drawn[drawn.index("<svg") :].split("</svg>")[0] + "</svg>")
    marks = [use for use in svg.iter(f"{_SVG}use") if COLOURS[0] in use.get("style", "")]
    last = [use for use in svg.iter(f"{_SVG}use") if COLOURS[count - 1] in use.get("style", "")]
    first, others = ([float(use.get("y", "")) for use in uses][:3] for uses in (marks, last))
    assert len(first) == len(others) == 3 and others[0] - first[0] < 0.6 * (first[1] - others[0])


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_replaced_and_not_followed(tmp_path: Path, there: bool) -> None:
    other, link = tmp_path / "other.html", tmp_path / "report.html"
    if there:
        other.write_text("another run's")
    for write in (
        lambda: write_report([Run(tmp_path, label="a")], link),
        lambda: write_page({**_JUDGED, "settings": {}}, link),
    ):
        link.unlink(missing_ok=True)
        link.symlink_to(other)
        assert "<h1>" in write().read_text() and not link.is_symlink()
        assert other.read_text() == "another run's" if there else not other.exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"other.html", "report.html"}


def test_a_full_disk_is_told_with_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*r\.html: .*No space left"):
        write_report([Run(tmp_path, label="a")], tmp_path / "r.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "place", "value", "told"),
    [
        ("rollout.json", "overall.arms.policy.success", None, "expected a number that can be drawn, found nothing"),
        (
            "rollout.json",
            "tasks.reach.differences.rerank.interval",
            [0.1],
            r"expected two numbers that can be drawn, found \[0.1\]",
        ),
        ("rollout.json", "tasks", 3, "expected an object, found 3"),
        ("preflight.json", "modes.rerank.bands", {"near": 0.5}, r"expected shares by band \(from_0.05\)"),
        ("preflight.json", "verdict.reasons", [], r"expected sentences, found \[\]"),
        ("shapes.json", "frames.1.plane.energies", [[0.0]], "expected xs, ys and as many energies"),
        ("shapes.json", "gate.worse", [0.1], "expected margins, accepted, worse and l1 of one length"),
        ("settings.json", "flags", "seed=7", "expected an object, found 'seed=7'"),
        ("metrics.json", "energy.win_rate.in_batch", "high", "expected a number or null, found 'high'"),
        ("energy_gates.json", "tasks.reach", 2, "expected text, found 2"),
    ],
)
def test_a_file_that_holds_something_else_is_told_with_the_place(
    tmp_path: Path, name: str, place: str, value: object, told: str
) -> None:
    path = write_run(tmp_path / "run") / name
    data = json.loads(path.read_text())
    *way, last = place.split(".")
    node = data
    for key in way:
        node = node[int(key) if isinstance(node, list) else key]
    node[last] = value
    path.write_text(json.dumps(data))
    where = re.escape(place.removesuffix(".energies").removesuffix(".worse"))  # these are told as a whole
    with pytest.raises(ReportError, match=rf"{re.escape(name)} is not what the report reads there \({where}: {told}"):
        read_run(path.parent)


@pytest.mark.parametrize("seed", range(12))
def test_damaged_files_are_told_or_drawn(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    folder = write_run(tmp_path / "run")
    path = draw.choice(sorted(folder.glob("*.json")))
    path.write_text(json.dumps(damage_json(json.loads(path.read_text()), draw)))
    try:
        page = write_report(read_runs([folder]), folder / "report.html").read_text(encoding="utf-8")
    except ReportError as error:
        assert path.name in str(error)
    else:
        _is_whole(page)
