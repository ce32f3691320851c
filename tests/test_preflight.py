"""Preflight: what each mode would have done, gates, verdicts, the command."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from vla_energy.backbones.tiny import EMBEDDED as TINY
from vla_energy.cli import main
from vla_energy.config import RerankConfig
from vla_energy.finetune.frames import PolicyFrames
from vla_energy.finetune.setup import EMBEDDED_DATA
from vla_energy.fingerprint import fingerprint
from vla_energy.gates import load_gates, save_gates
from vla_energy.modes import Advisor, Proposal
from vla_energy.preflight.command import _text
from vla_energy.preflight.effects import calibrate, effect, halves
from vla_energy.preflight.measure import Measured, ModeRecord, measure
from vla_energy.preflight.trials import TrialsError, read_trials
from vla_energy.preflight.verdict import judge
from vla_energy.report.preflight import write_page

EPISODES, EACH = 80, 5


def record(error: torch.Tensor, gain: torch.Tensor) -> ModeRecord:
    return ModeRecord(error, gain, error, torch.full_like(gain, math.nan), 1.0, {}, None, {})


def measured(modes: dict[str, ModeRecord], policy: torch.Tensor) -> Measured:
    episodes = torch.arange(EPISODES).repeat_interleave(EACH)
    tasks = ["push" if episode % 4 < 2 else "pull" for episode in episodes.tolist()]
    return Measured(policy, torch.tensor([0.1, 0.2]), episodes, tasks, modes, 1.0)


def draws(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    policy = 0.05 + 0.1 * torch.rand(EPISODES * EACH, generator=generator)
    return policy, torch.rand(EPISODES * EACH, generator=generator)


def test_a_mode_that_helps_is_used_with_an_open_gate() -> None:
    policy, gain = draws()
    result = judge(measured({"rerank": record(0.5 * policy, gain)}, policy), RerankConfig())
    assert result["verdict"]["use"] == "rerank" and "use rerank" in result["verdict"]["reasons"][0]
    assert result["gates"]["rerank"] < 0.2
    found = result["modes"]["rerank"]["effect"]
    assert found["l1_gated"] < 0.65 * found["l1_policy"] and found["interval"][1] < -0.3
    assert found["gap_closed"] == pytest.approx((found["l1_policy"] - found["l1_gated"]) / (0.5 * found["l1_policy"]))
    assert {task: row["use"] for task, row in result["tasks"].items()} == {"pull": "rerank", "push": "rerank"}


def test_a_mode_that_harms_has_a_shut_gate_and_is_left_off() -> None:
    policy, gain = draws()
    result = judge(measured({"rerank": record(3 * policy, gain)}, policy), RerankConfig())
    assert result["verdict"]["use"] == "off" and math.isinf(result["gates"]["rerank"])
    found = result["modes"]["rerank"]["effect"]
    assert found["accepted"] == 0 and found["l1_gated"] == found["l1_policy"] and found["worse"] is None
    assert any("shut" in reason for reason in result["verdict"]["reasons"])
    assert "(+0 %), 0 % of chunks replaced" in result["verdict"]["reasons"][1], "no interval where nothing was done"
    assert {row["use"] for row in result["tasks"].values()} == {"off"}


def test_a_mode_that_helps_where_its_gain_is_large_is_gated() -> None:
    policy, gain = draws()
    error = torch.where(gain > 0.6, 0.1 * policy, 3 * policy)
    found = judge(measured({"rerank": record(error, gain)}, policy), RerankConfig())
    assert 0.5 < found["gates"]["rerank"] < 0.75
    assert 0.2 < found["modes"]["rerank"]["effect"]["accepted"] < 0.5


def test_too_small_a_gain_is_not_worth_it() -> None:
    policy, gain = draws()
    result = judge(measured({"rerank": record(0.95 * policy, gain)}, policy), RerankConfig())
    assert result["verdict"]["use"] == "off" and result["modes"]["rerank"]["effect"]["accepted"] > 0.5
    assert math.isinf(result["gates"]["rerank"]), "what is not worth using stays shut, however safe"


def test_retrieve_is_preferred_and_gated_by_task() -> None:
    policy, gain = draws()
    found = measured({"rerank": record(0.4 * policy, gain)}, policy)
    push = torch.tensor([task == "push" for task in found.tasks])
    plain = torch.where(push, 0.5 * policy, 0.95 * policy)  # much better on one task, hardly on the other
    found.modes["retrieve"] = record(plain, torch.full_like(gain, math.inf))
    result = judge(found, RerankConfig())
    assert result["verdict"]["use"] == "retrieve" and result["gates"]["retrieve"] == 0
    assert {task: row["use"] for task, row in result["tasks"].items()} == {"push": "retrieve", "pull": "off"}
    assert result["modes"]["retrieve"]["effect"]["accepted"] == 1


def test_the_half_that_judges_did_not_calibrate() -> None:
    policy, gain = draws()
    ours, rest = halves(measured({}, policy))
    assert (ours ^ rest).all() and ours.sum() == rest.sum()
    error = torch.where(ours, 0.1 * policy, 3 * policy)  # fine in one half, harmful in the other
    seen = measured({"rerank": record(error, gain)}, policy)
    margin = calibrate(seen, seen.modes["rerank"], ours, RerankConfig())
    assert margin < 0.2
    assert effect(seen, seen.modes["rerank"], margin, rest).l1_gated > 2 * float(policy[rest].mean())
    with pytest.raises(ValueError, match="two episodes"):
        halves(Measured(policy[:5], policy[:2], torch.zeros(5, dtype=torch.long), ["push"] * 5, {}, 1.0))


def test_each_task_has_both_halves_where_it_has_two_episodes() -> None:
    episodes, tasks = torch.tensor([3, 0, 0, 1, 2, 2, 4]), ["b", "a", "a", "b", "c", "c", "c"]
    ours, rest = halves(Measured(torch.ones(7), torch.ones(2), episodes, tasks, {}, 1.0))
    # In order of task and episode: a0 judges, b1 calibrates, b3 judges, c2 calibrates, c4 judges.
    assert rest.tolist() == [True, True, True, False, False, False, True] and torch.equal(ours, ~rest)


def test_a_task_whose_only_episode_calibrates_has_no_gated_mode() -> None:
    found = seen_tasks(rerank=0.4, retrieve=0.95)
    alone = found.episodes == 0  # "z" comes last, after an odd number of episodes
    found.tasks = ["z" if mine else task for mine, task in zip(alone.tolist(), found.tasks, strict=True)]
    ours, _ = halves(found)
    assert ours[alone].all()
    result = judge(found, RerankConfig())
    assert result["verdict"]["use"] == "rerank" == result["tasks"]["push"]["use"]
    assert result["tasks"]["z"]["use"] == "off" and set(result["tasks"]["z"]["effects"]) == {"retrieve"}


@pytest.mark.parametrize(("episodes", "use"), [(2, "off"), (3, "retrieve")])
def test_a_task_of_few_episodes_gets_no_advice(episodes: int, use: str) -> None:
    found = seen_tasks(rerank=1.0, retrieve=0.5)
    few_rows = (found.episodes < episodes).tolist()
    found.tasks = ["z" if mine else task for mine, task in zip(few_rows, found.tasks, strict=True)]
    result = judge(found, RerankConfig())
    assert result["verdict"]["use"] == "retrieve" == result["tasks"]["push"]["use"]
    assert result["tasks"]["z"]["use"] == use
    text = _text({**result, "settings": {}}, "out").splitlines()
    (row,) = [line for line in text if line.startswith("z ")]
    assert ("nothing is advised below 3 held-out episodes" in row) == (use == "off")


def test_plain_retrieval_is_judged_on_all_episodes() -> None:
    found = seen_tasks()
    effects = {mode: row["effect"] for mode, row in judge(found, RerankConfig())["modes"].items()}
    assert effects["retrieve"]["episodes"] == EPISODES == 2 * effects["rerank"]["episodes"]
    assert effects["retrieve"]["l1_policy"] == pytest.approx(float(found.policy_error.mean()))


def few(episodes: int, error: float) -> dict:
    """The verdict where `episodes` judge; the mode's errors are `error` times the policy's."""
    rows = torch.arange(episodes).repeat_interleave(EACH)
    policy = 0.1 + 0.1 * torch.rand(len(rows), generator=torch.Generator().manual_seed(1))
    modes = {"retrieve": record(error * policy, torch.full_like(policy, math.inf))}
    return judge(Measured(policy, torch.ones(2), rows, ["push"] * len(rows), modes, 1.0), RerankConfig())


def test_few_episodes_advise_nothing() -> None:
    assert few(5, 0.3)["verdict"]["use"] == "retrieve"
    result = few(4, 0.3)
    assert result["verdict"]["use"] == "off" and {row["use"] for row in result["tasks"].values()} == {"off"}
    assert any(
        "4 held-out episodes judge it, nothing is advised below 5" in reason for reason in result["verdict"]["reasons"]
    )


def test_a_task_must_gain_more_than_all_tasks() -> None:
    assert few(10, 0.88)["verdict"]["use"] == "retrieve"
    assert {row["use"] for row in few(10, 0.76)["tasks"].values()} == {"off"}
    assert {row["use"] for row in few(10, 0.74)["tasks"].values()} == {"retrieve"}


def test_a_gain_that_one_episode_makes_is_not_sure() -> None:
    policy, gain = draws()
    found = measured({"retrieve": record(policy.clone(), torch.full_like(gain, math.inf))}, policy)
    lucky, unlucky = found.episodes == 0, found.episodes == 1
    found.policy_error = torch.where(lucky, 40 * policy, policy)
    found.modes["retrieve"].error = torch.where(unlucky, 9 * policy, policy)
    effects = judge(found, RerankConfig())["modes"]["retrieve"]["effect"]
    assert effects["change"] < -0.1 and effects["interval"][1] >= 0
    assert judge(found, RerankConfig())["verdict"]["use"] == "off"


def test_gates_count_episodes_not_frames() -> None:
    policy, gain = draws()
    many = measured({"rerank": record(0.5 * policy, gain)}, policy)
    ours, _ = halves(many)
    assert math.isfinite(calibrate(many, many.modes["rerank"], ours, RerankConfig()))
    many.episodes = many.episodes // 5  # 16 episodes of 25 frames: as many frames, too few episodes
    many.tasks = ["push"] * len(many.tasks)
    ours, _ = halves(many)
    assert math.isinf(calibrate(many, many.modes["rerank"], ours, RerankConfig()))


def test_the_gate_forgives_what_the_settings_tolerate_and_asks_for_the_risk_they_allow() -> None:
    policy, gain = draws()
    ours, _ = halves(measured({}, policy))
    unit = float(policy[ours].mean())
    seen = measured({"rerank": record(policy + 0.04 * unit, gain)}, policy)  # worse by 4 percent of the mean, each
    margins = {
        tolerance: calibrate(seen, seen.modes["rerank"], ours, RerankConfig(tolerance=tolerance))
        for tolerance in (0.0, 0.03, 0.05)
    }
    assert margins[0.0] == margins[0.03] == math.inf and margins[0.05] < 0.2
    safe = measured({"rerank": record(0.5 * policy, gain)}, policy)
    # Too few episodes to promise one in a hundred, even if none is worse.
    assert calibrate(safe, safe.modes["rerank"], ours, RerankConfig(risk=0.01)) == math.inf
    assert calibrate(safe, safe.modes["rerank"], ours, RerankConfig(risk=0.1)) < 0.2


def test_late_errors_advise_to_ask_more_often() -> None:
    policy, gain = draws()
    reasons = judge(measured({"rerank": record(policy, gain)}, policy), RerankConfig())["verdict"]["reasons"]
    assert any("along the chunk" in reason for reason in reasons)


class Fixed(Advisor):
    """Proposes the expert's chunk in every second row."""

    def __init__(self, expert: torch.Tensor) -> None:
        super().__init__(None)
        self.expert = expert

    @property
    def modes(self) -> tuple[str, ...]:
        return ("retrieve",)

    def propose(self, mode, frame, generators, others=None) -> Proposal:
        half = torch.arange(len(frame.policy)) % 2 == 0
        actions = torch.where(half[:, None, None], self.expert[: len(half)], frame.policy)
        return Proposal(actions, half.float(), torch.full((len(half),), math.nan))


def test_measure_keeps_rows_in_order() -> None:
    expert, layers = torch.randn(6, 8, 4), torch.randn(6, 3, 8, 4)
    context, mask = torch.zeros(6, 5, 2), torch.ones(6, 5, dtype=torch.bool)

    def batches():
        for start in (0, 4):
            rows = slice(start, start + 4)
            names = [f"task {i}" for i in range(6)][rows]
            yield PolicyFrames(context[rows], mask[rows], expert[:4][: len(names)], layers[rows],
                               torch.arange(6)[rows], names)  # fmt: skip

    found = measure(Fixed(expert), batches())
    assert found.tasks == [f"task {i}" for i in range(6)] and found.episodes.tolist() == [0, 1, 2, 3, 4, 5]
    errors = found.modes["retrieve"].error
    assert errors[[0, 2, 4]].tolist() == [0, 0, 0] and torch.equal(errors[[1, 3, 5]], found.policy_error[[1, 3, 5]])
    assert torch.equal(found.modes["retrieve"].oracle, errors)
    slow = torch.stack([(layers[i, -1] - expert[i % 4]).abs().mean() for i in range(6)])
    torch.testing.assert_close(found.policy_error, slow)
    assert found.by_step.shape == (8,)
    with pytest.raises(ValueError, match="no held-out frame"):
        measure(Fixed(expert), [])


def test_the_command_on_the_shipped_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "policy"
    shutil.copytree(TINY, folder)
    data = ["--checkpoint", str(folder), "--data-root-dir", str(EMBEDDED_DATA), "--dataset-name", "metaworld_demo"]
    out = ["--max-frames", "60", "--out", str(tmp_path / "out")]
    assert main(["preflight", *data, *out]) == 2
    assert "neither an energy head nor a memory" in capsys.readouterr().err
    assert main(["memory", *data, "--max-frames", "200"]) == 0
    capsys.readouterr()
    assert main(["preflight", *data, *out, "--split", "train"]) == 2
    assert "the memory holds these very frames" in capsys.readouterr().err
    assert load_gates(folder) == ({}, {})
    assert main(["preflight", *data, *out]) == 0
    text = capsys.readouterr().out
    first = text.splitlines()[0]
    assert "- 60 of " in text and "held-out frames were looked at (--max-frames)" in text
    assert first.startswith(("leave reranking off", "use retrieve"))
    result = json.loads((tmp_path / "out" / "preflight.json").read_text())
    assert result["policy"]["frames"] == 60 and result["modes"]["retrieve"]["effect"]["accepted"] == 1
    gates, tasks = load_gates(folder)
    assert gates == {"retrieve": 0.0}
    wanted = {task: row["use"] for task, row in result["tasks"].items() if row["use"] != "off"}
    assert tasks == wanted and set(tasks.values()) <= {"retrieve"}
    page = (tmp_path / "out" / "preflight.html").read_text()
    assert first.split(":")[0] in page and "<script" not in page
    assert "is replaced" not in caplog.text
    save_gates(folder, gates, {**tasks, "dance": "retrieve@2"})
    assert main(["preflight", *data, *out]) == 0 and load_gates(folder) == (gates, tasks)
    assert "is replaced: dance: retrieve@2 becomes off; if trials told" in caplog.text


def test_the_command_on_a_dataset_of_ones_own(
    own_data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, (root, fields) = shutil.copytree(TINY, tmp_path / "policy"), own_data
    data = ["--checkpoint", str(folder), "--data-root-dir", str(root), "--dataset-name", "my_robot"]
    assert main(["memory", *data, "--max-frames", "64", "--dataset-config", str(fields)]) == 0
    out = ["--max-frames", "32", "--out", str(tmp_path / "out")]
    assert main(["preflight", *data, *out]) == 2 and "--dataset-config FILE" in capsys.readouterr().err
    assert main(["preflight", *data, *out, "--dataset-config", str(fields)]) == 0
    settings = json.loads((tmp_path / "out" / "preflight.json").read_text())["settings"]
    assert settings["dataset_name"] == "my_robot" and settings["dataset_config"] == str(fields)


JUDGED = {"fingerprint": "f", "arms": ("policy", "retrieve", "rerank", "refine"), "horizon": 8}


def rollout_file(
    path: Path, episodes: list[tuple[str, str, int, bool]], complete: bool = True, gates: dict | None = None, **changes
) -> Path:
    names = ("instruction", "arm", "seed", "success")
    rows = [dict(zip(names, episode, strict=True)) for episode in episodes]
    meta = {"checkpoint": {"fingerprint": "f", "gates": gates or {"rerank": 0.25}, "center_crop": False}}
    settings = {"replan_every": 4, "backend": "metaworld", "step_limits": {}, **changes}
    path.write_text(json.dumps({"complete": complete, "settings": settings, "meta": meta, "episodes": rows}))
    return path


def trial_rows(wins: Mapping[str, Mapping[str, int]], episodes: int = 8) -> list[tuple[str, str, int, bool]]:
    """The first so many episodes of each arm are solved."""
    return [(task, arm, seed, seed < count) for task, arms in wins.items() for arm, count in arms.items()
            for seed in range(episodes)]  # fmt: skip


def seen_tasks(rerank: float = 0.95, retrieve: float = 0.5) -> Measured:
    policy, gain = draws()
    found = measured({"rerank": record(rerank * policy, gain)}, policy)
    found.modes["retrieve"] = record(retrieve * policy, torch.full_like(gain, math.inf))
    return found


def test_trials_overrule_the_held_out_error(tmp_path: Path) -> None:
    found = seen_tasks()
    # push: retrieve loses to the policy; pull: all equal; lift: no held-out frame, rerank wins; turn: another interval.
    wins = {"push": (5, 2, 1, 0), "pull": (4, 4, 4, 4), "lift": (1, 2, 3, 0), "turn": (1, 2, 2, 3)}
    arms = ("policy", "retrieve", "rerank", "retrieve@8")
    counts: dict[str, dict[str, int]] = {task: dict(zip(arms, n, strict=True)) for task, n in wins.items()}
    rows = trial_rows(counts)
    rows += [(task, "recommended", seed, True) for task in wins for seed in range(8)]  # what is to be decided
    trials = read_trials([rollout_file(tmp_path / "a.json", rows)], JUDGED)
    plain = judge(found, RerankConfig())
    assert math.isinf(plain["gates"]["rerank"]) and {r["use"] for r in plain["tasks"].values()} == {"retrieve"}
    result = judge(found, RerankConfig(), trials)
    use = {task: row["use"] for task, row in result["tasks"].items()}
    assert use == {"push": "off", "pull": "retrieve", "lift": "rerank", "turn": "retrieve@8"}
    assert result["gates"]["rerank"] == 0.25, "it won behind this margin"
    tried = {"episodes": 8, "successes": counts["push"], "seeds": tuple(range(8)), "replan_every": 4}
    assert result["tasks"]["push"]["trials"] == tried
    assert any("--replan-every 4" in reason for reason in result["verdict"]["reasons"])
    reasons = result["verdict"]["reasons"]
    assert any("32 episodes an arm: the policy succeeds in 11, the best arm of each task in 15" in r for r in reasons)
    assert any("tried, but not among the judging held-out frames: 'lift', 'turn'" in reason for reason in reasons)
    assert result["verdict"]["use"] == "recommended" and "by task" in result["verdict"]["reasons"][0]
    write_page({**result, "settings": {}}, tmp_path / "page.html")
    assert "retrieve@8" in (tmp_path / "page.html").read_text()


def test_no_success_opens_a_gate_that_is_not_safe(tmp_path: Path) -> None:
    rows = trial_rows({"push": {"policy": 0, "rerank": 8}})
    for gate, harm in ((0.0, 3.0), (100.0, 3.0), (0.0, None)):
        found = seen_tasks(retrieve=1.0)
        if harm is None:  # safe only where the gain is large
            gain = found.modes["rerank"].gain
            found.modes["rerank"].error = torch.where(gain > 0.6, 0.1, 3.0) * found.policy_error
        else:
            found.modes["rerank"].error = harm * found.policy_error
        path = rollout_file(tmp_path / "a.json", rows, gates={"rerank": gate})
        result = judge(found, RerankConfig(), read_trials([path], JUDGED))
        # What held-out frames say stays, behind the margin that they found safe.
        assert result["tasks"]["push"]["use"] == ("off" if harm else "rerank") and result["gates"]["rerank"] > 0.5
        assert any("rerank ran behind a gate" in reason for reason in result["verdict"]["reasons"])


def test_an_arm_behind_a_shut_gate_was_the_policy(tmp_path: Path) -> None:
    rows = trial_rows({"push": {"policy": 2, "rerank": 5, "retrieve": 3}})
    path = rollout_file(tmp_path / "a.json", rows, gates={"rerank": None, "retrieve": 0.0})
    result = judge(seen_tasks(), RerankConfig(), read_trials([path], JUDGED))
    assert result["tasks"]["push"]["use"] == "retrieve" and math.isinf(result["gates"]["rerank"])
    assert any("rerank ran behind a gate that was shut" in reason for reason in result["verdict"]["reasons"])


@pytest.mark.parametrize(
    ("wins", "use"),
    [
        ({"policy": 3}, "retrieve"),
        ({"policy": 3, "rerank": 3}, "retrieve"),
        ({"policy": 3, "rerank": 2}, "retrieve"),
        ({"policy": 3, "rerank": 4}, "rerank"),
        ({"policy": 3, "retrieve": 3}, "retrieve"),
        ({"policy": 3, "retrieve": 2}, "off"),
    ],
)
def test_an_arm_that_was_not_tried_is_not_overruled_by_the_policy(tmp_path: Path, wins: dict, use: str) -> None:
    trials = read_trials([rollout_file(tmp_path / "a.json", trial_rows({"push": wins}))], JUDGED)
    result = judge(seen_tasks(), RerankConfig(), trials)
    assert result["tasks"]["push"]["use"] == use and result["tasks"]["pull"]["use"] == "retrieve"
    assert result["verdict"]["use"] == ("recommended" if use == "rerank" else "retrieve")


def test_a_margin_of_the_trials_is_judged_where_the_mode_was_not_tried(tmp_path: Path) -> None:
    found = seen_tasks(rerank=0.5, retrieve=1.0)
    assert {row["use"] for row in judge(found, RerankConfig())["tasks"].values()} == {"rerank"}
    path = rollout_file(tmp_path / "a.json", trial_rows({"lift": {"policy": 2, "rerank": 5}}), gates={"rerank": 0.9})
    result = judge(found, RerankConfig(), read_trials([path], JUDGED))
    # Behind 0.9 only a tenth of the frames is improved, which is not worth it on a task of its own.
    assert {task: row["use"] for task, row in result["tasks"].items()} == {
        "push": "off",
        "pull": "off",
        "lift": "rerank",
    }
    assert result["gates"]["rerank"] == 0.9


def test_trials_take_only_the_seeds_that_all_arms_share(tmp_path: Path) -> None:
    one = rollout_file(tmp_path / "a.json", [("push", "policy", seed, True) for seed in range(12)])
    two = rollout_file(tmp_path / "b.json", [("push", "retrieve", seed, seed != 4) for seed in range(3, 20)])
    found = read_trials([one, two], JUDGED)["push"]
    assert found.seeds == tuple(range(3, 12)) and found.successes == {"policy": 9, "retrieve": 8}
    assert found.best("retrieve") == "policy"


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"replan_every": 8}, "replan_every is 8, in the files before 4"), ({"gates": {"rerank": 0.5}}, "gates is"),
     ({"backend": "libero"}, "backend is libero"), ({"step_limits": {"push": 9}}, "limit of push is 9")],
)  # fmt: skip
def test_trials_of_other_settings_are_not_mixed(tmp_path: Path, changes: dict, message: str) -> None:
    one = rollout_file(tmp_path / "a.json", trial_rows({"push": {"policy": 1}}), step_limits={"push": 150})
    two = rollout_file(tmp_path / "b.json", trial_rows({"push": {"retrieve": 1}}), **changes)
    with pytest.raises(TrialsError, match=message):
        read_trials([one, two], JUDGED)


def test_trials_of_another_checkpoint_are_refused(tmp_path: Path) -> None:
    path = rollout_file(tmp_path / "a.json", trial_rows({"push": {"policy": 1}}))
    with pytest.raises(TrialsError, match="another checkpoint"):
        read_trials([path], {**JUDGED, "fingerprint": "g"})


def test_the_fingerprint_tells_weights_apart_but_not_gates(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "a")
    before = fingerprint(tmp_path / "a")
    (tmp_path / "a" / "energy_gates.json").write_text("{}")
    (tmp_path / "a" / "notes.txt").write_text("x")
    assert fingerprint(tmp_path / "a") == before == fingerprint(TINY)
    weights = tmp_path / "a" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert fingerprint(tmp_path / "a") != before
    content[-1] ^= 1
    weights.write_bytes(content)
    (tmp_path / "a" / "energy_head--1_checkpoint.safetensors").write_bytes(b"")
    assert fingerprint(tmp_path / "a") != before


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("push", "policy", 0, True)] * 2, "comes twice"),
        ([("push", "retrieve", 0, True)], "no episodes of the arm policy"),
        ([("push", "policy", 0, True), ("push", "retrieve", 1, True)], "share 0 seeds"),
        (trial_rows({"push": {"policy": 1, "retrieve": 2}}, episodes=7), "share 7 seeds, which is no evidence"),
        ([("push", "policy", 0, True), ("push", "replan", 0, True)], "replan, which this checkpoint cannot run"),
        ([("push", "policy", 0, True), ("push", "retrieve@9", 0, True)], "retrieve@9: a chunk has 8 actions"),
        ([("push", "policy", 0, 1)], "wrong types"),
        ([], "empty"),
    ],
)
def test_trials_that_are_no_evidence_are_refused(tmp_path: Path, rows: list, message: str) -> None:
    with pytest.raises(TrialsError, match=message):
        read_trials([rollout_file(tmp_path / "a.json", rows)], JUDGED)


def test_files_that_are_no_rollouts_are_refused(tmp_path: Path) -> None:
    for margin in (-1.0, "x"):
        path = rollout_file(tmp_path / "a.json", [("push", "policy", 0, True)], gates={"rerank": margin})
        with pytest.raises(TrialsError, match=r"a\.json is no result"):
            read_trials([path], JUDGED)
    with pytest.raises(TrialsError, match="did not end"):
        read_trials([rollout_file(tmp_path / "a.json", [("push", "policy", 0, True)], complete=False)], JUDGED)
    for number, text in enumerate(("{}", "[]", "no json", '{"complete": true, "episodes": [{}]}')):
        path = tmp_path / f"{number}.json"
        path.write_text(text)
        with pytest.raises(TrialsError, match="is no result of vla-energy rollout"):
            read_trials([path], JUDGED)
    with pytest.raises(TrialsError, match="is no result"):
        read_trials([tmp_path / "missing.json"], JUDGED)
