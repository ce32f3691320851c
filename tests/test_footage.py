"""Frames of one episode, and the energies of what was executed in it."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from test_frames import _copy
from test_rollout import BACKEND, FakePolicy

from vla_energy.actions import RawActions
from vla_energy.checkpoint import save_head
from vla_energy.config import EnergyConfig
from vla_energy.head import EnergyHead
from vla_energy.rollout.footage import MOST, encode
from vla_energy.rollout.interface import Decision, Request
from vla_energy.rollout.policy import load_policy
from vla_energy.rollout.run import EVALUATION_SEED_OFFSET, run_rollouts
from vla_energy.rollout.world import Observation


class Scored(FakePolicy):
    """Its energy is the first action; the policy's own one more."""

    def energies(self, request, decision):
        return float(decision.actions.values[0, 0]), float(decision.actions.values[0, 0]) + 1


@pytest.fixture(autouse=True)
def _backend_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def _run(tmp_path: Path, policy: FakePolicy, **changes) -> tuple[dict, dict]:
    path = tmp_path / "new" / "footage.json"
    settings = {"tasks": ["near", "far"], "episodes": 3, "arms": ["policy", "rerank"], "workers": 2, "max_steps": 40}
    result = run_rollouts(policy, backend=BACKEND, footage=path, **{**settings, **changes})
    return json.loads(path.read_text()), result


def test_one_episode_is_kept_and_nothing_else_changes(tmp_path: Path) -> None:
    kept, result = _run(tmp_path, Scored())
    seed = EVALUATION_SEED_OFFSET
    assert (kept["task"], kept["arm"], kept["seed"], kept["instruction"]) == ("near", "rerank", seed, "go near")
    (record,) = [e for e in result["episodes"] if (e["task"], e["arm"], e["seed"]) == ("near", "rerank", seed)]
    assert record["success"] == kept["success"] and record["steps"] == kept["steps"]
    assert [d["step"] for d in kept["decisions"]] == list(range(0, kept["steps"], 4))
    assert len(kept["decisions"]) == record["decisions"]
    assert all(d["energy"] in (0.15, 0.05) and d["energy_policy"] == d["energy"] + 1 for d in kept["decisions"])
    assert all(d["accepted"] and base64.b64decode(d["image"]).startswith(b"\xff\xd8") for d in kept["decisions"])
    assert run_rollouts(
        Scored(), ["near", "far"], 3, ["policy", "rerank"], workers=2, max_steps=40, backend=BACKEND
    )["episodes"] == result["episodes"]  # fmt: skip


class Idle(FakePolicy):
    """Stands still, so that its episodes last."""

    def act(self, requests, arm):
        return [Decision(RawActions(np.zeros((6, 1)))) for _ in requests]


def test_a_policy_without_energies_has_frames_alone_and_long_episodes_fewer(tmp_path: Path) -> None:
    kept, _ = _run(tmp_path, Idle(), tasks=["far"], replan_every=1, arms=["policy@1"], max_steps=100, episodes=1)
    decisions = kept["decisions"]
    assert len(decisions) == 100 and all(d["energy"] is None and d["energy_policy"] is None for d in decisions)
    images = [number for number, d in enumerate(decisions) if d["image"]]
    assert images == list(range(0, 100, 3)) and len(images) <= MOST


def test_large_images_are_made_smaller() -> None:
    from PIL import Image

    stored = Image.open(io.BytesIO(base64.b64decode(encode(np.full((320, 640, 3), 128, np.uint8)))))
    assert stored.size == (160, 80)


def test_energies_are_those_that_the_gate_compared(tmp_path: Path) -> None:
    folder = _copy(tmp_path / "policy")
    plain = load_policy(str(folder))
    image = np.random.default_rng(0).integers(0, 255, (1, 64, 64, 3), np.uint8)
    seen = Observation(image, np.zeros(4, np.float32), "push")
    (own,) = plain.act([Request(seen, torch.Generator())], "policy")
    assert plain.energies(Request(seen, torch.Generator()), own) is None  # no head
    torch.manual_seed(0)
    head = EnergyHead(plain._vla.context_dim, plain.action_dim, plain.horizon, EnergyConfig())
    save_head(folder, head, 0, plain._statistics, {"rerank_margin": 0.0})
    policy = load_policy(str(folder))
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    executed, kept = policy.energies(Request(seen, generator), own) or (0.0, 1.0)
    assert executed == kept and torch.equal(generator.get_state(), before)
    output = policy._vla.predict(policy._batch([Request(seen, generator)]), "off", None)
    other = output.actions[0] + 0.2
    with torch.no_grad():
        encoded = head.eval().encode(output.context, output.context_mask, output.actions)
        expected = head(encoded, torch.stack([other, output.actions[0]])[None])[0].tolist()
    memos = (other, SimpleNamespace(chunk=other))  # of a choice, and of a plan
    for memo in memos:
        decision = dataclasses.replace(own, accepted=True, memo=memo)
        assert policy.energies(Request(seen, generator), decision) == pytest.approx(tuple(expected), rel=1e-4)
    assert abs(expected[0] - expected[1]) > 1e-3
