"""The plugin in a host's training and evaluation, with a stand-in that has the host's shapes and names."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vla_energy.checkpoint import CheckpointError, load_head, save_head
from vla_energy.config import EnergyConfig
from vla_energy.gates import save_gates
from vla_energy.hosts.hidden_states import HiddenStates, predicted_positions, trained_positions, visible_context
from vla_energy.hosts.openvla_oft import (
    EnergyPlugin,
    HostEnergyConfig,
    HostError,
    HostRerankConfig,
    rerank_action_head,
)

D, H, A, LAYERS, PATCHES, PROMPT = 16, 8, 7, 3, 5, 6
FIRST_ACTION = 31744


class LanguageModel(nn.Module):
    """Layers that mix all positions; gives hidden states as the host's does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(D, D) for _ in range(LAYERS)])

    def forward(self, embeddings: Tensor) -> Any:
        states = [embeddings]
        for layer in self.layers:
            states.append(torch.tanh(layer(states[-1]) + states[-1].mean(1, keepdim=True)))
        return SimpleNamespace(hidden_states=tuple(states))


class ActionHead(nn.Module):
    """Reads the A states of a step at once, with a chunk length of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(D * A, A)

    def predict_action(self, states: Tensor) -> Tensor:
        return self.model(states.reshape(len(states), H, -1))


class Vla(nn.Module):
    """The host's model in its names."""

    def __init__(self, statistics: dict[str, Any]) -> None:
        super().__init__()
        self.language_model = LanguageModel()
        self.embed = nn.Embedding(32100, D)
        self.patches = nn.Parameter(torch.randn(PATCHES, D))
        self.config = SimpleNamespace(text_config=SimpleNamespace(hidden_size=D, num_hidden_layers=LAYERS))
        self.norm_stats = statistics

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def forward(self, ids: Tensor, action: Tensor) -> tuple[Tensor, ...]:
        embeddings = self.embed(ids).masked_fill(action[..., None], 0.0)
        patches = self.patches.expand(len(ids), -1, -1)
        sequence = torch.cat([embeddings[:, :1], patches, embeddings[:, 1:]], 1)
        return self.language_model(sequence).hidden_states

    def predict_action(self, ids: Tensor, action_head: Any) -> Tensor:
        """As the host: pads with action tokens and a stop token, hands the states to the action head."""
        tail = torch.full((len(ids), H * A + 1), FIRST_ACTION)
        action = torch.zeros(len(ids), ids.shape[1] + H * A + 1, dtype=torch.bool)
        action[:, ids.shape[1] : -1] = True
        states = self(torch.cat([ids, tail], 1), action)[-1]
        start = PATCHES + ids.shape[1] - 1
        return action_head.predict_action(states[:, start : start + H * A])


def statistics() -> dict[str, Any]:
    field = {key: np.full(A, value) for key, value in
             dict(mean=0.0, std=0.5, min=-1.0, max=1.0, q01=-0.9, q99=0.9).items()}  # fmt: skip
    field["mask"] = np.array([True] * (A - 1) + [False])
    return {"toy": {"action": field, "num_transitions": np.array(10), "num_trajectories": 2}}


def batch(seed: int, size: int = 4) -> dict[str, Tensor]:
    """Prompts of different length, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 1000, (size, PROMPT + 2 + H * A + 1), generator=generator)
    labels = torch.full_like(ids, -100)
    for row in range(size):
        start = PROMPT + row % 3
        labels[row, start : start + H * A] = FIRST_ACTION + row
        ids[row, start : start + H * A] = FIRST_ACTION + row
    return {"input_ids": ids, "labels": labels, "actions": torch.rand(size, H, A, generator=generator) * 2 - 1}


def host(tmp_path: Path, **energy: Any) -> SimpleNamespace:
    return SimpleNamespace(
        energy=HostEnergyConfig(**{"enabled": True, "warm_steps": 0, "learning_rate": 1e-3, **energy}),
        dataset_name="toy", batch_size=4, resume=False, vla_path=str(tmp_path), save_latest_checkpoint_only=False,
        wandb_log_freq=1, use_l1_regression=True, use_diffusion=False, pretrained_checkpoint=str(tmp_path),
        unnorm_key="toy",
    )  # fmt: skip


class Run:
    """The host's loop around a plugin."""

    def __init__(self, settings: SimpleNamespace, run_dir: Path, rate: float = 1e-2) -> None:
        torch.manual_seed(3)
        self.vla, self.action_head = Vla(statistics()), ActionHead()
        self.optimizer = torch.optim.AdamW([*self.vla.parameters(), *self.action_head.parameters()], lr=rate)
        self.plugin = EnergyPlugin.attach(
            settings, vla=self.vla, action_head=self.action_head, optimizer=self.optimizer, statistics=statistics(),
            run_dir=run_dir,
        )  # fmt: skip

    def steps(self, first: int, count: int, accumulate: int = 1) -> None:
        for index in range(first * accumulate, (first + count) * accumulate):
            one = batch(index)
            states = self.vla(one["input_ids"], one["labels"] > FIRST_ACTION - 1)
            positions = trained_positions(one["labels"], states[-1].shape[1], FIRST_ACTION - 1, A)
            predicted = self.action_head.predict_action(states[-1][torch.arange(4)[:, None], positions])
            loss = (predicted - one["actions"]).abs().mean()
            (self.plugin.add_loss(loss, one) / accumulate).backward()
            if (index + 1) % accumulate == 0:
                self.optimizer.step()
                self.optimizer.zero_grad()

    def policy(self) -> list[Tensor]:
        return [p.detach().clone() for p in [*self.vla.parameters(), *self.action_head.parameters()]]

    def head(self) -> dict[str, Tensor]:
        assert self.plugin.head is not None
        return {name: value.clone() for name, value in self.plugin.head.state_dict().items()}


def test_off_means_off(tmp_path: Path) -> None:
    plain = Run(host(tmp_path, enabled=False), tmp_path / "off")
    state = torch.get_rng_state()
    loss = torch.ones(())
    assert plain.plugin.add_loss(loss, {}) is loss and plain.plugin.head is None
    plain.steps(0, 3)
    plain.plugin.save(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert not list(tmp_path.iterdir())
    assert not plain.vla.language_model._forward_hooks and not plain.optimizer._optimizer_step_post_hooks


def test_the_policy_trains_as_without_the_head(tmp_path: Path) -> None:
    off, on = Run(host(tmp_path, enabled=False), tmp_path / "off"), Run(host(tmp_path), tmp_path / "on")
    before = on.head()
    for run in (off, on):
        run.steps(0, 3, accumulate=2)
    for one, other in zip(off.policy(), on.policy(), strict=True):
        assert torch.equal(one, other)
    after = on.head()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert on.plugin.step == 3 and on.plugin.guard.counters["steps"] == 3
    rows = [json.loads(line) for line in (tmp_path / "on" / "energy_metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2] and "energy/loss" in rows[0] and "energy/grad_norm" in rows[0]


def test_two_steps_and_two_more_are_four(tmp_path: Path) -> None:
    whole = Run(host(tmp_path), tmp_path / "whole", rate=0.0)
    whole.steps(0, 4)
    part = Run(host(tmp_path), tmp_path / "part", rate=0.0)
    part.steps(0, 2)
    part.plugin.save(2)
    folder = Path(f"{tmp_path / 'part'}--2_chkpt")
    assert sorted(path.name for path in folder.iterdir()) == [
        "energy_head--2_checkpoint.safetensors", "energy_state--2_checkpoint.pt",
    ]  # fmt: skip
    settings = host(tmp_path)
    settings.resume, settings.vla_path = True, str(folder)
    rest = Run(settings, tmp_path / "rest", rate=0.0)
    assert rest.plugin.step == 2
    rest.steps(2, 2)
    for name, value in whole.head().items():
        assert torch.equal(value, rest.head()[name]), name


def test_every_micro_batch_of_a_step_draws_anew(tmp_path: Path) -> None:
    run = Run(host(tmp_path), tmp_path / "run")
    losses = []
    for _ in range(2):
        one = batch(0)
        run.vla(one["input_ids"], one["labels"] > FIRST_ACTION - 1)
        losses.append(float(run.plugin.add_loss(torch.zeros(()), one).detach()))
    assert losses[0] != losses[1]
    run.optimizer.step()
    run.vla(one["input_ids"], one["labels"] > FIRST_ACTION - 1)
    first = run.plugin.generator.get_state()
    run.plugin.add_loss(torch.zeros(()), one)
    again = Run(host(tmp_path), tmp_path / "again")
    again.plugin.step = 1
    again.vla(one["input_ids"], one["labels"] > FIRST_ACTION - 1)
    again.plugin.add_loss(torch.zeros(()), one)
    assert not torch.equal(first, again.plugin.generator.get_state())
    assert torch.equal(run.plugin.generator.get_state(), again.plugin.generator.get_state()), "told by step and place"


def test_a_run_that_had_no_head_goes_on_with_a_new_one(tmp_path: Path) -> None:
    def resume(**energy: Any) -> Run:
        settings = host(tmp_path, **energy)
        settings.resume = True
        return Run(settings, tmp_path / "again")

    with pytest.raises(CheckpointError, match=r"has no energy head; --energy\.new_head True starts one"):
        resume()
    started = resume(new_head=True)
    fresh = Run(host(tmp_path), tmp_path / "fresh").head()
    assert started.plugin.step == 0 and all(torch.equal(value, fresh[name]) for name, value in started.head().items())
    (tmp_path / "energy_head--5_checkpoint.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"--energy\.new_head True: .*energy_head--5.* is there"):
        resume(new_head=True)


def test_a_resume_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    part = Run(host(tmp_path), tmp_path / "run")
    part.plugin.save(1)
    folder = Path(f"{tmp_path / 'run'}--1_chkpt")

    def resume(**energy: Any) -> None:
        settings = host(tmp_path, **energy)
        settings.resume, settings.vla_path = True, str(folder)
        Run(settings, tmp_path / "again")

    other = EnergyConfig()
    other.loss.info_nce *= 2
    with pytest.raises(CheckpointError, match=r"other values of --energy\.loss\.info_nce \("):
        resume(loss=other.loss)
    state = folder / "energy_state--1_checkpoint.pt"
    whole = torch.load(state, weights_only=True)
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged"):
        resume()
    for content in ({"step": 1}, [1], {"step": 1, "guard": {"counters": {}}}, {"step": "x", "guard": whole["guard"]}):
        torch.save(content, state)
        with pytest.raises(CheckpointError, match=rf"{state.name} is damaged \("):
            resume()
    torch.save({**whole, "more": torch.zeros(1).expand(2**40)}, state)
    with pytest.raises(CheckpointError, match=rf"{state.name} is damaged.*not stored whole"):
        resume()
    with zipfile.ZipFile(state, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    with pytest.raises(CheckpointError, match=rf"{state.name} is damaged.*compressed"):
        resume()
    state.unlink()
    with pytest.raises(CheckpointError, match="0 files energy_state"):
        resume()
    (folder / "energy_head--1_checkpoint.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no energy head"):
        resume()


def test_attach_refuses_what_it_cannot_train_beside(tmp_path: Path) -> None:
    settings = host(tmp_path)
    settings.use_diffusion = True
    with pytest.raises(HostError, match="noised expert chunk"):
        Run(settings, tmp_path)
    settings = host(tmp_path)
    settings.use_l1_regression = False
    with pytest.raises(HostError, match="use_l1_regression True"):
        Run(settings, tmp_path)
    settings = host(tmp_path)
    settings.dataset_name = "other"
    with pytest.raises(HostError, match="no statistics of 'other'; there are: toy"):
        Run(settings, tmp_path)
    with pytest.raises(HostError, match="no variable optimizer, train_dataset"):
        EnergyPlugin.attach_here(host(tmp_path), {"vla": 1, "run_dir": 1})
    names = {"vla": 1, "optimizer": 1, "run_dir": tmp_path, "train_dataset": SimpleNamespace(dataset_statistics={})}
    assert EnergyPlugin.attach_here(host(tmp_path, enabled=False), names).head is None, "no action head is needed"


def test_the_hook_finds_the_language_model_in_wrappers() -> None:
    vla = Vla(statistics())
    wrapped = nn.Sequential()
    wrapped.module = nn.ModuleDict({"base_model": nn.ModuleDict({"model": vla})})  # type: ignore[assignment]
    hidden = HiddenStates(wrapped, only_with_grad=True)
    one = batch(0)
    with torch.no_grad():
        vla(one["input_ids"], one["labels"] > 0)
    with pytest.raises(HostError, match="no hidden states"):
        hidden.take()
    states = vla(one["input_ids"], one["labels"] > 0)
    taken = hidden.take()
    assert len(taken) == LAYERS + 1 and all(torch.equal(a, b) for a, b in zip(states, taken, strict=True))
    assert not taken[-1].requires_grad
    hidden.remove()
    assert not vla.language_model._forward_hooks
    with pytest.raises(HostError, match="2 modules named language_model"):
        HiddenStates(nn.ModuleList([vla, Vla(statistics())]))


def test_positions_against_a_slow_twin() -> None:
    one = batch(1)
    length = one["labels"].shape[1] + PATCHES
    positions = trained_positions(one["labels"], length, FIRST_ACTION - 1, A)
    for row, labels in enumerate(one["labels"].tolist()):
        slow = [i + PATCHES - 1 for i, label in enumerate(labels) if label >= FIRST_ACTION]
        assert positions[row].tolist() == slow
        assert visible_context(positions, length)[row].tolist() == [i < slow[0] for i in range(length)]
    one["labels"][0, -2] = FIRST_ACTION
    with pytest.raises(HostError, match="action tokens a row"):
        trained_positions(one["labels"], length, FIRST_ACTION - 1, A)
    # At inference: 1 + patches + prompt - 1 tokens, the actions, the stop token.
    total = PATCHES + PROMPT + H * A + 1
    assert predicted_positions(2, total, H * A)[0].tolist() == list(range(PATCHES + PROMPT - 1, total - 2))


def evaluation(tmp_path: Path, margin: float | None, **energy: Any) -> tuple[Vla, ActionHead, SimpleNamespace]:
    run = Run(host(tmp_path), tmp_path / "run")
    run.steps(0, 2)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    run.plugin.hidden.remove()
    with torch.no_grad():
        for parameter in run.plugin._bare.parameters():
            parameter.normal_(0, 0.3)  # energies that vary at random, so that some candidate is below the policy's
    save_head(folder, run.plugin._bare, 2, run.plugin.statistics)
    if margin is not None:
        save_gates(folder, {"rerank": margin, "refine": margin})
    settings = host(tmp_path)
    settings.pretrained_checkpoint = str(folder)
    settings.energy = HostRerankConfig(**{"enabled": True, **energy})
    return run.vla, run.action_head, settings


def test_evaluation_off_gives_the_head_itself(tmp_path: Path) -> None:
    vla, head, settings = evaluation(tmp_path, 0.0, enabled=False)
    assert rerank_action_head(head, settings, vla) is head and not vla.language_model._forward_hooks


@pytest.mark.parametrize("mode", ["rerank", "refine"])
def test_a_shut_gate_changes_no_bit(tmp_path: Path, mode: str) -> None:
    vla, head, settings = evaluation(tmp_path, float("inf"), mode=mode)
    ids = batch(5, 1)["input_ids"][:, :PROMPT]
    with torch.inference_mode():
        plain = vla.predict_action(ids, head)
        reranked = rerank_action_head(head, settings, vla)
        again = vla.predict_action(ids, reranked)
    assert torch.equal(plain, again) and reranked.counts == {"chunks": 1, "accepted": 0}
    assert reranked.model is head.model, "everything else is the host's head"


def test_an_open_gate_takes_the_lowest_energy(tmp_path: Path) -> None:
    vla, head, settings = evaluation(tmp_path, 0.0)
    reranked = rerank_action_head(head, settings, vla)
    ids = batch(5, 1)["input_ids"][:, :PROMPT]
    changed = 0
    with torch.inference_mode():
        for seed in range(8):
            ids = batch(seed, 1)["input_ids"][:, :PROMPT]
            plain, chosen = vla.predict_action(ids, head), vla.predict_action(ids, reranked)
            energy = load_head(Path(settings.pretrained_checkpoint)).head.eval()
            states = vla(torch.cat([ids, torch.full((1, H * A + 1), FIRST_ACTION)], 1), _placeholders())[-1]
            positions = predicted_positions(1, states.shape[1], H * A)
            encoded = energy.encode(states, visible_context(positions, states.shape[1]), plain)
            both = energy(encoded, torch.stack([plain, chosen], 1))[0]
            assert both[1] <= both[0]
            changed += not torch.equal(plain, chosen)
    assert reranked.counts["accepted"] == changed > 0
    assert f"{reranked.counts['chunks']} chunks asked for, {changed} replaced" in reranked.summary()


def _placeholders() -> Tensor:
    mask = torch.zeros(1, PROMPT + H * A + 1, dtype=torch.bool)
    mask[:, PROMPT:-1] = True
    return mask


def _without_hidden_states(reranked: Any, patch: pytest.MonkeyPatch) -> None:
    reranked._hidden.remove()


def _with_a_cache(reranked: Any, patch: pytest.MonkeyPatch) -> None:
    """The last call of the language model then sees the newest token alone."""
    whole = reranked._hidden.take
    patch.setattr(reranked._hidden, "take", lambda: tuple(layer[:, -1:] for layer in whole()))


def _with_a_bug(reranked: Any, patch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise IndexError("a bug")

    patch.setattr(reranked._advisor, "decide", fail)


def _with_a_chunk_that_is_none(reranked: Any, patch: pytest.MonkeyPatch) -> None:
    decide = reranked._advisor.decide

    def broken(*args: Any) -> Any:
        proposal, accepted = decide(*args)
        actions = proposal.actions.clone()
        actions[:, -1, 0] = torch.nan
        return dataclasses.replace(proposal, actions=actions), torch.ones_like(accepted)

    patch.setattr(reranked._advisor, "decide", broken)


BROKEN = {
    "no hidden states": (_without_hidden_states, "HostError", "the language model gave no hidden states"),
    "cache": (_with_a_cache, "HostError", "a sequence of 1 is too short"),
    "bug": (_with_a_bug, "IndexError", "a bug"),
    "not finite": (_with_a_chunk_that_is_none, "ValueError", "a chunk that it chose is not finite"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("what", BROKEN)
def test_what_fails_while_choosing_is_no_failed_episode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str, strict: bool
) -> None:
    """The host's episodes catch every Exception and count a failure: strict has to raise what they do not catch."""
    break_it, kind, text = BROKEN[what]
    vla, head, settings = evaluation(tmp_path, 0.0, strict=strict)
    ids = batch(5, 1)["input_ids"][:, :PROMPT]
    plain = vla.predict_action(ids, head).detach()
    reranked = rerank_action_head(head, settings, vla)
    break_it(reranked, monkeypatch)
    with caplog.at_level(logging.ERROR), torch.inference_mode():
        if strict:
            with pytest.raises(SystemExit, match=rf"error: --energy.mode rerank failed: {kind}: {text}"):
                vla.predict_action(ids, reranked)
            assert "the evaluation ends here" in caplog.text and "Traceback" in caplog.text
            return
        for _ in range(2):
            assert torch.equal(vla.predict_action(ids, reranked), plain)
    assert reranked.fallback.counts == {kind: 2} and reranked.counts == {"chunks": 2, "accepted": 0}
    assert reranked.summary().endswith(f"2 chunks asked for, 0 replaced, 2 failed: {{'{kind}': 2}}")
    assert f"the policy's own chunk is taken (1 times so far): {kind}: {text}" in caplog.text


def test_evaluation_refuses_what_does_not_fit(tmp_path: Path) -> None:
    vla, head, settings = evaluation(tmp_path, 0.0)
    with pytest.raises(HostError, match="L1 action head"):
        rerank_action_head(None, settings, vla)
    for mode, needed in (("retrieve", "it needs chunk_memory"), ("magic", "the modes are rerank, .* and recommended")):
        wrong = copy.copy(settings)
        wrong.energy = HostRerankConfig(enabled=True, mode=mode)
        with pytest.raises(ValueError, match=rf"--energy.mode {mode}: .*allows rerank, refine; {needed}"):
            rerank_action_head(head, wrong, vla)
    vla.norm_stats["toy"]["action"]["q99"] = np.full(A, 0.5)
    with pytest.raises(ValueError, match="the head"):
        rerank_action_head(head, settings, vla)
    settings.unnorm_key = "other"
    with pytest.raises(HostError, match="no statistics of 'other'"):
        rerank_action_head(head, settings, vla)
    settings.unnorm_key, settings.pretrained_checkpoint = "toy", str(tmp_path / "missing")
    with pytest.raises(ValueError, match="none"):
        rerank_action_head(head, settings, vla)


_RANKS = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_hosts import Run, host, batch, trained_positions, FIRST_ACTION, A

rank, world, out = int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
torch.set_num_threads(1)
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=world)
settings = host(out, **SETTINGS)
run = Run(settings, out / "run", rate=0.0)
for step in range(3):
    rows = {key: value.chunk(world)[rank] for key, value in batch(step, 4).items()}
    states = run.vla(rows["input_ids"], rows["labels"] > FIRST_ACTION - 1)
    positions = trained_positions(rows["labels"], states[-1].shape[1], FIRST_ACTION - 1, A)
    chosen = states[-1][torch.arange(len(positions))[:, None], positions]
    loss = (run.action_head.predict_action(chosen) - rows["actions"]).abs().mean()
    run.plugin.add_loss(loss, rows).backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
run.plugin.save(3)
torch.save(run.plugin._bare.state_dict(), out / f"{world}-{rank}.pt")
"""


def _ranks(tmp_path: Path, world: int) -> list[dict[str, Tensor]]:
    """Three steps on `world` gloo ranks; each rank's head."""
    # Without negatives that mix or draw: what two ranks draw for a row is not what one draws.
    settings = "dict(negatives=_quiet())"
    code = """
from vla_energy.config import NegativesConfig, ExpertNoiseConfig, PolicyNoiseConfig, InBatchConfig
from vla_energy.config import HeadConfig
def _quiet():
    return NegativesConfig(expert_noise=ExpertNoiseConfig(count=0, stds=()),
                           policy_noise=PolicyNoiseConfig(count=0, stds=()), in_batch=InBatchConfig(count=0))
""" + _RANKS.replace("**SETTINGS", f"head=HeadConfig(blind_share=0.0), learning_rate=5e-4, **{settings}")
    folder = tmp_path / str(world)
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    processes = [
        subprocess.Popen([*command, str(rank), str(world), str(folder)], env=environment) for rank in range(world)
    ]
    assert [process.wait(300) for process in processes] == [0] * world
    return [torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]


def test_two_ranks_train_one_head_and_the_one_of_a_single_rank(tmp_path: Path) -> None:
    (single,), (first, second) = _ranks(tmp_path, 1), _ranks(tmp_path, 2)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        torch.testing.assert_close(value, single[name], atol=1e-5, rtol=0)
    assert any(not torch.equal(value, _fresh(tmp_path)[name]) for name, value in single.items())
    assert len(list(tmp_path.glob("2/*_chkpt/energy_head--*"))) == 1


def _fresh(tmp_path: Path) -> dict[str, Tensor]:
    return Run(host(tmp_path), tmp_path / "fresh").head()
