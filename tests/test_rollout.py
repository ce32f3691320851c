"""Closed-loop rollouts: processes, pairing, batching, statistics, results file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vla_energy.actions import RawActions
from vla_energy.data.metaworld_env import SimulatorError
from vla_energy.rollout import statistics
from vla_energy.rollout.interface import Decision
from vla_energy.rollout.run import EVALUATION_SEED_OFFSET, run_rollouts
from vla_energy.rollout.simulator import SimulatorProcess, expand_tasks

BACKEND = "point_world:PointWorld"


@pytest.fixture(autouse=True)
def _backend_path(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


class FakePolicy:
    """`policy` walks to the goal with noise, and turns back if the first noise of the episode is high; `rerank` never
    turns back."""

    horizon, action_dim = 6, 1
    arms = frozenset({"policy", "rerank", "twin"})
    metadata = {"folder": "fake"}  # noqa: RUF012

    def __init__(self):
        self.batches = []

    def act(self, requests, arm):
        self.batches.append(len(requests))
        assert all(request.observation.images.shape == (1, 4, 4, 3) for request in requests)
        decisions = []
        for request in requests:
            proprio = request.observation.proprio
            noise = torch.rand(6, 1, generator=request.generator, dtype=torch.float64).numpy()
            turned = proprio[0] < 0 or (proprio[0] == 0 and noise[0, 0] > 0.5)
            sign = -1.0 if arm != "rerank" and turned else 1.0
            step = sign * np.where(noise > 0.1, 0.15, 0.05)
            decisions.append(Decision(RawActions(step), accepted=arm == "rerank", telemetry={"noise": noise.mean()}))
        return decisions


def rollouts(policy=None, **changes):
    settings = {"tasks": ["near", "far"], "episodes": 5, "arms": ["policy", "rerank"], "seed": 3, "max_steps": 40}
    return run_rollouts(policy or FakePolicy(), **{**settings, "backend": BACKEND, **changes})


def test_deterministic_paired_and_independent_of_batching():
    one, many = FakePolicy(), FakePolicy()
    alone, batched = rollouts(one, workers=1), rollouts(many, workers=3)
    assert set(one.batches) == {1} and max(many.batches) == 3
    assert alone["episodes"] == batched["episodes"]
    seeds = {
        arm: [(e["task"], e["seed"]) for e in batched["episodes"] if e["arm"] == arm] for arm in ("policy", "rerank")
    }
    assert seeds["policy"] == seeds["rerank"] and len(set(seeds["policy"])) == 10
    assert min(seed for _, seed in seeds["policy"]) == 3 + EVALUATION_SEED_OFFSET
    near = batched["tasks"]["near"]
    assert near["arms"]["rerank"]["success"] == 1 and 0 < near["arms"]["policy"]["success"] < 1
    difference = near["differences"]["rerank"]
    assert difference["baseline"] == "policy" and difference["lost"] == 0
    assert difference["difference"] == pytest.approx(difference["won"] / 5)
    assert near["arms"]["rerank"]["accepted_share"] == 1 and near["arms"]["policy"]["accepted_share"] == 0


def test_identical_arms_differ_by_nothing():
    difference = rollouts(arms=["policy", "twin"])["overall"]["differences"]["twin"]
    assert difference["difference"] == 0 and difference["interval"] == (0, 0)
    assert difference["p_value"] == 1 and difference["won"] == difference["lost"] == 0


def test_an_arm_behind_a_shut_gate_is_told(caplog, monkeypatch):
    rollouts(tasks=["near"], episodes=1)
    assert "is shut" not in caplog.text
    monkeypatch.setattr(FakePolicy, "metadata", {"gates": {"rerank": float("inf"), "twin": 0.0}})
    rollouts(tasks=["near"], episodes=1, arms=["policy", "rerank", "twin"])
    assert "the gate of rerank is shut" in caplog.text


def test_an_episode_ends_at_the_limit_or_when_solved():
    limited = rollouts(tasks=["far"], max_steps=7, episodes=2, arms=["rerank"])["episodes"]
    assert [(e["steps"], e["decisions"], e["success"]) for e in limited] == [(7, 2, False)] * 2
    solved = rollouts(tasks=["near"], episodes=2, arms=["rerank"])["episodes"]
    assert all(e["success"] and e["steps"] < 40 for e in solved)


def test_results_are_saved_after_each_task(tmp_path):
    out = tmp_path / "new" / "result.json"
    result = rollouts(out=out)
    saved = json.loads(out.read_text())
    assert saved["complete"] and saved["episodes"] == result["episodes"]
    assert saved["meta"]["checkpoint"] == {"folder": "fake"} and saved["meta"]["versions"]["numpy"]
    with pytest.raises(SimulatorError, match="dies"):
        rollouts(tasks=["near", "dies"], out=out)
    saved = json.loads(out.read_text())
    assert not saved["complete"] and list(saved["tasks"]) == ["near"]
    assert [path.name for path in out.parent.iterdir()] == ["result.json"]


def test_nothing_runs_if_the_results_cannot_be_written(tmp_path):
    policy = FakePolicy()
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file" / "result.json"):
        with pytest.raises(OSError, match="cannot write results to"):
            rollouts(policy, out=out)
    assert not policy.batches


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"episodes": 0}, "episodes must be at least 1"),
        ({"replan_every": 7}, "exceeds the checkpoint's horizon 6"),
        (
            {"arms": ["policy", "magic"]},
            "unknown arm.*magic; known: policy, recommended, refine, .*, twin",
        ),
        ({"arms": ["policy", "policy"]}, "each once"),
        ({"tasks": ["nowhere"]}, "unknown .* nowhere; known: dies, far"),
        ({"seed": EVALUATION_SEED_OFFSET}, "seed must be in"),
        ({"backend": "sim"}, "unknown simulator 'sim'; known: metaworld"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        rollouts(**changes)


def test_an_arm_the_checkpoint_lacks_and_a_wrong_action_dimension():
    policy = FakePolicy()
    policy.arms = frozenset({"policy"})
    with pytest.raises(ValueError, match="need an energy head"):
        rollouts(policy)
    policy = FakePolicy()
    policy.action_dim = 7
    with pytest.raises(ValueError, match="have 7 dimensions.* have 1"):
        rollouts(policy)


@pytest.mark.parametrize(
    "actions, message",
    [
        (RawActions(np.full((6, 1), np.nan)), "not finite"),
        (RawActions(np.zeros((4, 1))), r"shape \(6, 1\)"),
        (np.zeros((6, 1)), "RawActions"),
    ],
)
def test_a_policy_that_answers_nonsense_is_refused(monkeypatch, actions, message):
    policy = FakePolicy()
    monkeypatch.setattr(policy, "act", lambda requests, _: [Decision(actions)] * len(requests))
    with pytest.raises(ValueError, match=f"task near, seed 1000003, step 0.*{message}"):
        rollouts(policy)


def test_errors_of_the_simulator_come_back_with_its_message():
    with SimulatorProcess("no-world", BACKEND) as world, pytest.raises(SimulatorError, match="no such world"):
        world.reset(0)
    with SimulatorProcess("raises", BACKEND) as world:
        world.reset(0)
        with pytest.raises(SimulatorError, match="raises: RuntimeError: physics exploded") as caught:
            world.execute(np.zeros((1, 1)))
        assert "point_world.py" in str(caught.value.__cause__)  # the child's own traceback
        with pytest.raises(ValueError, match="finite actions"):
            world.execute(np.full((1, 1), np.inf))


def test_a_dead_or_hanging_simulator_is_an_error_not_a_hang():
    with SimulatorProcess("dies", BACKEND) as world:
        world.reset(0)
        with pytest.raises(SimulatorError, match=r"ended \(exit code 7\) during execute.*last words"):
            world.execute(np.zeros((1, 1)))
        with pytest.raises(SimulatorError, match="ended"):
            world.reset(0)
    with SimulatorProcess("hangs", BACKEND) as world:
        world.reset(0)
        world._timeout = 0.2
        with pytest.raises(SimulatorError, match="no answer to execute in 0.2 s"):
            world.execute(np.zeros((1, 1)))
    with pytest.raises(SimulatorError, match="No module named 'no_backend'"):
        expand_tasks(["near"], "no_backend:World")


def test_wilson_against_known_values():
    # Newcombe 1998, table I, method 3: 81/263, 15/148, 0/20, 1/29.
    for (successes, trials), expected in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert statistics.wilson_interval(successes, trials) == pytest.approx(expected, abs=5e-5)
    with pytest.raises(ValueError, match="no proportion"):
        statistics.wilson_interval(0, 0)


def test_mcnemar_and_bootstrap():
    assert statistics.mcnemar_exact(10, 2) == pytest.approx(158 / 4096)  # 2 (1 + 12 + 66) / 2^12
    assert statistics.mcnemar_exact(0, 0) == statistics.mcnemar_exact(3, 3) == 1
    other = np.zeros(100, bool)
    arm = np.arange(100) < 20
    result = statistics.paired_difference([(arm, other)])
    # Normal approximation: 0.2 -+ 1.96 sqrt(0.16 / 100).
    assert result.difference == pytest.approx(0.2) and (result.won, result.lost) == (20, 0)
    assert result.interval == pytest.approx((0.1216, 0.2784), abs=0.015)
    strata = statistics.paired_difference([(arm, other), (other, other)])
    assert strata.difference == pytest.approx(0.1) and strata.pairs == 200
    # Half the mean of independent strata, one constant: half the width.
    assert np.ptp(strata.interval) == pytest.approx(np.ptp(result.interval) / 2, rel=0.05)
    with pytest.raises(ValueError, match="not paired"):
        statistics.paired_difference([(arm, other[:50])])


@pytest.mark.usefixtures("simulator")
def test_metaworld_renders_and_agrees_between_processes():
    zeros, right = np.zeros((4, 4)), np.tile([1.0, 0.0, 0.0, 0.0], (4, 1))
    with SimulatorProcess("drawer-open") as used, SimulatorProcess("drawer-open") as fresh:
        used.reset(7)  # an earlier episode must leave no trace
        used.execute(right)
        for seed in (1_000_000, 1_000_001):
            first, second = used.reset(seed), fresh.reset(seed)
            assert first.images.shape == (1, 96, 96, 3) and first.images.dtype == np.uint8
            assert first.images.std() > 10 and first.proprio.shape == (4,) and first.instruction == "drawer open"
            for actions in (zeros, right):
                assert np.array_equal(first.images, second.images) and np.array_equal(first.proprio, second.proprio)
                ahead, behind = used.execute(actions), fresh.execute(actions)
                assert ahead.steps == 4 and not ahead.done
                assert ahead.observation is not None and behind.observation is not None
                first, second = ahead.observation, behind.observation
            assert np.array_equal(first.images, second.images) and np.array_equal(first.proprio, second.proprio)
    with pytest.raises(ValueError, match=r"unknown metaworld task\(s\): drawer-opne; known: .*drawer-open"):
        expand_tasks(["drawer-opne"])
    assert "mujoco" not in sys.modules  # this process stays free of simulators
