"""The closed-loop study's tables against sums done by hand, and its command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import closed_loop
from closed_loop_tables import ARMS, Row, agreement, arm_table, assemble, paired, report, task_table

from vla_energy.actions import RawActions
from vla_energy.arms import split_arm
from vla_energy.rollout.interface import ARMS as KNOWN
from vla_energy.rollout.interface import Decision, Request

NONE, ALL = [0] * 10, [1] * 10
WON, LOST = [1] + [0] * 9, [0] + [1] * 9  # one pair more than none, one less than all


def episodes(task: str, arm: str, successes: Sequence[int], first: int = 0, **more: Any) -> list[dict[str, Any]]:
    return [
        {"task": task, "arm": arm, "seed": first + i, "success": bool(success), "decisions": 8, **more}
        for i, success in enumerate(successes)
    ]


def result(tasks: Mapping[str, Mapping[str, Sequence[int]]], verdicts: dict[str, str] | None = None) -> dict[str, Any]:
    """A study of successes by task and arm; `verdicts` by instruction."""
    rows = [row for task, arms in tasks.items() for arm, found in arms.items() for row in episodes(task, arm, found)]
    timed = {arm: {"milliseconds_per_decision": {"mean": 5.0}} for arms in tasks.values() for arm in arms}
    made: dict[str, Any] = {
        "complete": True,
        "settings": {"episodes": 10},
        "overall": {"arms": timed},
        "tasks": {task: {} for task in tasks},
        "episodes": rows,
    }
    return (
        made if verdicts is None else {**made, "preflight": {"tasks": {t: {"use": use} for t, use in verdicts.items()}}}
    )


# Pairs.


def test_a_difference_is_the_mean_over_tasks_of_the_pairs_that_both_arms_have() -> None:
    rows = [
        *episodes("a", "policy", [0, 0, 0, 0]),
        *episodes("a", "new", [1, 1, 1, 1]),
        *episodes("b", "policy", [1, 1], first=3),
        *episodes("b", "new", [0, 1, 0, 0], first=4)[:1],
        *episodes("b", "new", [1, 0, 0], first=5),
        *episodes("b", "policy", [0], first=90),
        *episodes("c", "policy", [1]),
    ]
    # b: the arms share seed 4 alone, which the policy solved; pooled over all five pairs it would be 3 / 5.
    found = paired(rows, "new", "policy")
    assert found is not None and (found.won, found.lost, found.pairs) == (4, 1, 5)
    assert found.difference == pytest.approx((1 - 1) / 2)
    back = paired(rows, "policy", "new")
    assert back is not None and (back.won, back.lost) == (1, 4)
    assert paired(rows, "new", "other") is None and paired([], "new", "policy") is None


def test_studies_are_not_paired_with_each_other() -> None:
    rows = [
        *episodes("a", "policy", [0, 0], study="study 1"),
        *episodes("a", "new", [1, 1], study="study 1"),
        *episodes("a", "policy", [1, 0], study="study 2"),
        *episodes("a", "new", [0, 0], study="study 2"),
    ]
    found = paired(rows, "new", "policy")
    assert found is not None and found.pairs == 4 and found.difference == pytest.approx((1 - 0.5) / 2)


# Tables.


def test_the_table_of_arms_has_known_arms_first_and_no_time_for_an_arm_that_was_not_run() -> None:
    study = result({"a": {"zeta": NONE, "retrieve": ALL, "policy": NONE}, "b": {"retrieve": ALL, "policy": ALL}})
    study["overall"]["arms"]["retrieve"]["milliseconds_per_decision"]["mean"] = 7.25
    study["episodes"] += episodes("a", "recommended", ALL)
    study["episodes"][0]["decisions"] = 18
    assert arm_table([study]).splitlines()[2:] == [
        "| policy | 50.0 % |  | -50.0 (-50.0 to -50.0) | 8.0 | 5.0 |",
        "| retrieve | 100.0 % | +50.0 (+50.0 to +50.0) |  | 8.0 | 7.2 |",
        "| recommended | 100.0 % | +100.0 (+100.0 to +100.0) | +0.0 (+0.0 to +0.0) | 8.0 |  |",
        "| zeta | 0.0 % | +0.0 (+0.0 to +0.0) | -100.0 (-100.0 to -100.0) | 9.0 | 5.0 |",
    ]


def test_the_table_of_tasks_marks_what_differs_surely() -> None:
    study = result(
        {
            "a": {"policy": NONE, "retrieve": [1] * 6 + [0] * 4, "rerank": [1] * 5 + [0] * 5},
            "b": {"policy": ALL, "rerank": NONE},
        }
    )
    # McNemar, exact: 6 of 6 pairs give p = 2 / 64, 5 of 5 give 2 / 32.
    assert task_table(study).splitlines() == [
        "| task | policy | retrieve | rerank |",
        "|---|---|---|---|",
        "| a | 0 | 60* | 50 |",
        "| b | 100 |  | 0* |",
    ]


# The verdict.


def test_recommended_repeats_the_arm_that_the_verdict_names() -> None:
    study = result(
        {
            "use": {"policy": NONE, "retrieve": ALL},
            "off": {"policy": NONE, "retrieve": ALL},
            "unknown": {"policy": WON, "retrieve": ALL},
            "run": {"policy": NONE, "retrieve": ALL, "recommended": WON},
            "not-run": {"policy": NONE, "retrieve": ALL},
            "no-policy": {"retrieve": ALL},
        },
        {"do use": "retrieve", "do off": "off", "do run": "retrieve", "do not": "retrieve@1", "none": "off"},
    )
    told = {task: f"do {task}" for task in study["tasks"]} | {"not-run": "do not", "no-policy": "none"}
    before = [dict(episode) for episode in study["episodes"]]
    assert assemble(study, told) == {
        "not-run": "retrieve@1, which the verdict names, was not run",
        "no-policy": "policy, which the verdict names, was not run",
    }
    assert study["episodes"][: len(before)] == before, "what was run is as it was"
    made = [episode for episode in study["episodes"] if episode["arm"] == "recommended"]
    expected = {"use": ALL, "off": NONE, "unknown": WON, "run": WON}
    assert {task: [int(e["success"]) for e in made if e["task"] == task] for task in expected} == expected
    assert len(made) == 40
    again = len(study["episodes"])
    assemble(study, told)
    assert len(study["episodes"]) == again, "nothing is put together twice"


@pytest.mark.parametrize(
    ("use", "arms", "change", "surely", "strictly"),
    [
        ("retrieve", {"policy": NONE, "retrieve": ALL}, 1.0, True, True),
        ("retrieve", {"policy": NONE, "retrieve": WON}, 0.1, True, True),
        ("retrieve", {"policy": ALL, "retrieve": ALL, "rerank": NONE}, 0.0, True, True),
        ("retrieve", {"policy": WON, "retrieve": WON}, 0.0, True, False),
        ("retrieve", {"policy": ALL, "retrieve": LOST}, -0.1, True, False),  # the interval reaches 0
        ("retrieve", {"policy": ALL, "retrieve": NONE}, -1.0, False, False),
        ("retrieve@1", {"policy": NONE, "retrieve": ALL, "retrieve@1": NONE}, 0.0, True, False),
        ("retrieve", {"policy": ALL, "retrieve": NONE, "recommended": ALL}, -1.0, False, False),
        ("off", {"policy": NONE, "rerank": NONE, "retrieve": ALL, "zeta": NONE}, 1.0, False, False),
        ("off", {"policy": NONE, "retrieve": WON}, 0.1, True, False),
        ("off", {"policy": WON, "retrieve": WON, "rerank": NONE}, 0.0, True, True),
        ("off", {"policy": ALL, "retrieve": LOST}, -0.1, True, True),
        ("off", {"policy": NONE, "retrieve": NONE, "recommended": ALL}, 0.0, True, True),
    ],
)
def test_a_verdict_is_right_surely_and_strictly(
    use: str, arms: dict[str, Sequence[int]], change: float, surely: bool, strictly: bool
) -> None:
    (row,), missing = agreement(result({"a": arms}, {"do a": use}), {"a": "do a"})
    assert row == Row("a", use, row.change, surely, strictly) and row.change == pytest.approx(change) and not missing


def test_what_cannot_be_judged_is_told_with_the_reason() -> None:
    study = result(
        {
            "judged": {"policy": NONE, "retrieve": ALL},
            "unknown": {"policy": NONE, "retrieve": ALL},
            "not-run": {"policy": NONE, "retrieve": ALL},
            "alone": {"policy": NONE},
            "apart": {"retrieve": ALL},
        },
        {"judged": "retrieve", "not-run": "retrieve@1", "alone": "off", "apart": "retrieve"},
    )
    study["episodes"] += episodes("apart", "policy", NONE, first=50)
    rows, missing = agreement(study, {task: task for task in study["tasks"]})
    assert [row.task for row in rows] == ["judged"]
    assert missing == {
        "unknown": "the preflight has no verdict on 'unknown'",
        "not-run": "retrieve@1, which the verdict names, was not run",
        "alone": "no episode of the policy shares its seed with one of an arm",
        "apart": "no episode of the policy shares its seed with one of retrieve",
    }


def test_the_report_adds_studies_up_and_tells_what_is_left_out() -> None:
    verdicts = {"go a": "retrieve", "b": "retrieve@1", "c d": "off", "e": "retrieve"}
    first = result({"a": {"policy": NONE, "retrieve": ALL}, "b": {"policy": NONE, "retrieve": ALL}}, verdicts)
    for episode in first["episodes"]:
        episode["instruction"] = {"a": "go a", "b": "b"}[episode["task"]]
    tasks = {"b": {"policy": ALL, "retrieve": NONE}, "c-d": {"policy": NONE, "retrieve": ALL}}
    # The second is without instructions, as results of earlier versions.
    second = result({**tasks, "e": {"policy": WON, "retrieve": WON}}, verdicts)
    lines = report([first, second]).splitlines()
    assert "| retrieve | 62.0 % | +40.0 (+40.0 to +40.0) |  | 8.0 | 5.0 |" in lines, "(1 + 1 - 1 + 1 + 0) / 5"
    assert "| recommended | 36.7 % | +33.3 (+33.3 to +33.3) | -33.3 (-33.3 to -33.3) | 8.0 |  |" in lines
    assert "| b | 0 | 100* |  |" in lines and "| a | 0 | 100* | 100* |" in lines and "| c-d | 0 | 100* | 0 |" in lines
    where = lines.index("`recommended` is over fewer tasks than the other arms:")
    assert lines[where + 1] == "- b: retrieve@1, which the verdict names, was not run"
    assert "The verdict is not refuted on 1 of 1 tasks, strictly right on 1:" in lines
    assert "- a: retrieve, measured +100" in lines and "- c-d: off, measured +100" in lines
    assert lines.count("- b: not judged, retrieve@1, which the verdict names, was not run") == 2
    assert "The verdict is not refuted on 1 of 2 tasks, strictly right on 0:" in lines
    assert lines[-1] == "All studies: The verdict is not refuted on 2 of 3 tasks, strictly right on 1"


def test_the_report_of_one_study_has_no_sums_and_without_a_preflight_no_verdict() -> None:
    tasks = {"a": {"policy": NONE, "retrieve": ALL}}
    told = report([result(tasks, {"a": "retrieve"})])
    assert "The verdict is not refuted on 1 of 1" in told and "All studies" not in told and "fewer tasks" not in told
    plain = report([result(tasks)])
    assert "recommended" not in plain and "verdict" not in plain


# The command.


class Walker:
    """Walks; `policy@2` looks twice as often."""

    horizon, action_dim = 6, 1
    arms = frozenset({"policy"})
    metadata: dict[str, Any] = {}  # noqa: RUF012

    def act(self, requests: Sequence[Request], arm: str) -> list[Decision]:
        return [Decision(RawActions(np.full((6, 1), 0.1))) for _ in requests]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Checkpoints that were loaded; the policy is a `Walker`."""
    seen: list[str] = []
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setattr("vla_energy.rollout.policy.load_policy", lambda path, strict: seen.append(path) or Walker())
    return seen


def _written(path: Path, data: Any) -> str:
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return str(path)


STUDY = ["--checkpoint", "some", "--sim", "point_world:PointWorld", "--arms", "policy, policy@2", "--episodes", "2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "is no JSON"),
        ([1], "expected a JSON object"),
        ({}, "holds no preflight.json.*KeyError"),
        ({"tasks": []}, "holds no preflight.json"),
        ({"tasks": {"go near": "retrieve"}}, "holds no preflight.json"),
        ({"tasks": {"go near": {"use": None}}}, "holds no preflight.json"),
        ({"tasks": {"go near": {"use": "retrieve@04"}}}, "holds no preflight.json.*'retrieve@04'"),
        ({"tasks": {"go near": {"use": "recommended"}}}, "holds no preflight.json.*'recommended'"),
        ({"tasks": {"go near": {"use": "policy"}}}, "holds no preflight.json.*'policy'"),
    ],
)
def test_a_preflight_that_cannot_be_used_costs_no_episode(
    tmp_path: Path, loaded: list[str], content: Any, message: str
) -> None:
    path, out = tmp_path / "preflight.json", tmp_path / "out.json"
    if content is not None:
        _written(path, content)
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        closed_loop.main([*STUDY, "--tasks", "near", "--preflight", str(path), "--out", str(out)])
    assert not loaded and not out.exists()


def test_a_study_keeps_its_preflight_and_a_report_may_bring_another(
    tmp_path: Path, loaded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out.json")
    given = _written(tmp_path / "preflight.json", {"tasks": {"go near": {"use": "policy@2"}}})
    closed_loop.main([*STUDY, "--tasks", "near", "--preflight", given, "--out", out])
    told = capsys.readouterr().out
    assert loaded == ["some"] and "- near: policy@2, measured +0" in told and "| recommended | 100.0 % |" in told
    kept = json.loads(Path(out).read_text())
    assert kept["preflight"] == {"tasks": {"go near": {"use": "policy@2"}}}
    assert {episode["arm"] for episode in kept["episodes"]} == {"policy", "policy@2"}, "what was run, no more"
    closed_loop.main(["--report", out])
    assert capsys.readouterr().out == told
    other = _written(tmp_path / "other.json", {"tasks": {"go near": {"use": "off"}}})
    closed_loop.main(["--report", out, "--preflight", other])
    assert "- near: off, measured +0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("preflight", "message"),
    [
        ({"fingerprint": "a"}, "another checkpoint"),
        ({"fingerprint": "b", "seeds": [7, 8, 30]}, "seeds 7 to 8 are those of the trials"),
        ({"seeds": [9, 10], "replan_every": 4}, "seeds 9 to 9"),
        ({"seeds": [10, 11], "replan_every": 8}, "tried with a decision every 8 steps.*--replan-every 8"),
    ],
)
def test_a_preflight_of_other_things_is_refused(tmp_path: Path, preflight: dict[str, Any], message: str) -> None:
    ran = result({"near": {"policy": NONE, "retrieve": ALL}}, {"near": "off"})  # seeds 0 to 9
    ran["meta"], ran["settings"]["replan_every"] = {"checkpoint": {"fingerprint": "b"}}, 4
    given = dict(preflight)
    tried = {name: given.pop(name) for name in ("seeds", "replan_every") if name in given}
    given["tasks"] = {"near": {"use": "retrieve", "trials": tried or None}}
    flags = ["--report", _written(tmp_path / "a.json", ran), "--preflight", _written(tmp_path / "b.json", given)]
    with pytest.raises(SystemExit, match=message):
        closed_loop.main(flags)
    given |= {"fingerprint": "b"}
    given["tasks"]["near"]["trials"] = {"seeds": [10, 11], "replan_every": 4}
    _written(tmp_path / "b.json", given)
    closed_loop.main(flags)


def test_trials_on_the_studys_seeds_cost_no_episode(tmp_path: Path, loaded: list[str]) -> None:
    trials = {"seeds": [1_000_001], "replan_every": 4}
    given = _written(tmp_path / "p.json", {"tasks": {"go near": {"use": "policy@2", "trials": trials}}})
    with pytest.raises(SystemExit, match="seeds 1000001 to 1000001"):
        closed_loop.main([*STUDY, "--tasks", "near", "--preflight", given, "--out", str(tmp_path / "out.json")])
    assert not loaded


def test_episodes_do_not_count_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = result({"near": {"policy": NONE, "retrieve": ALL}})
    one = _written(tmp_path / "a.json", ran)
    with pytest.raises(SystemExit, match="task near, arm policy, seed 0 comes twice"):
        closed_loop.main(["--report", one, one])
    other = _written(tmp_path / "b.json", {**ran, "meta": {"checkpoint": {"fingerprint": "c"}}})
    closed_loop.main(["--report", one, other])
    assert "study 2" in capsys.readouterr().out


def test_unknown_tasks_and_wrong_arms_are_told_in_a_line(tmp_path: Path, loaded: list[str]) -> None:
    for flags, message in (
        (["--tasks", "near,nowhere"], "unknown .*task.*nowhere; known: dies, far"),
        (["--tasks", "near", "--arms", "policy,@2"], "arm '@2': expected ARM or ARM@n"),
        (["--tasks", "near", "--arms", "policy@04,policy@4"], "arm 'policy@04': expected"),
    ):
        with pytest.raises(SystemExit, match=f"error: {message}"):
            closed_loop.main([*STUDY, "--out", str(tmp_path / "out.json"), *flags])


def test_results_that_are_none_are_refused(tmp_path: Path) -> None:
    whole = result({"a": {"policy": NONE}})
    for content, message in (
        ("", "is no JSON"),
        ({"complete": True}, "is no result of this study"),
        ({**whole, "complete": False}, "did not end"),
        ({**whole, "preflight": {}}, "holds no preflight.json"),
    ):
        path = _written(tmp_path / "result.json", content)
        with pytest.raises(SystemExit, match=f"error: .*result.json.*{message}"):
            closed_loop.main(["--report", path])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "one of the arguments"),
        (["--quick", "--report", "x"], "not allowed with"),
        (["--checkpoint", "x"], "needs --tasks"),
        (["--quick", "--preflight", "x"], "makes its own"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        closed_loop.main(flags)
    assert message in capsys.readouterr().err


def test_the_quick_study_runs_every_arm_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`recommended` is put together from the others' episodes, by the verdict of the preflight that it makes."""
    out, asked = tmp_path / "quick", {}
    verdict = {"tasks": {"button press topdown": {"use": "off"}}}

    def command(*arguments: str) -> None:
        if "preflight" in arguments:
            (out / "preflight").mkdir()
            _written(out / "preflight" / "preflight.json", verdict)

    def study(checkpoint: Path, tasks: list[str], count: int, arms: list[str], *_: Any, **__: Any) -> dict[str, Any]:
        asked.update(arms=arms, tasks=tasks)
        return result({task: {arm: [0] * count for arm in arms} for task in tasks})

    monkeypatch.setattr(closed_loop, "_run", command)
    monkeypatch.setattr(closed_loop, "study", study)
    made = closed_loop.quick(out)
    assert made["preflight"] == verdict and asked["arms"] == list(ARMS)
    assert {split_arm(arm)[0] for arm in ARMS} | {"recommended"} == set(KNOWN)
    assert "| recommended |" in report([made])
    with pytest.raises(FileExistsError, match="is there already"):
        closed_loop.quick(out)
