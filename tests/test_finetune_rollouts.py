"""Training on recorded rollouts, end to end: the head alone learns, what does not fit is told before training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rollouts_fixture import NAME, OUTCOMES, TASKS, write_rollouts
from test_finetune import _config, _equal, _policy_weights, _run

from vla_energy.backbones import load_openvla
from vla_energy.checkpoint import load_head
from vla_energy.config import EnergyConfig, RolloutsConfig
from vla_energy.data import DatasetError, RldsDataset
from vla_energy.finetune import checkpoints
from vla_energy.finetune.config import FinetuneConfig, FlagError
from vla_energy.finetune.setup import open_rollouts, prepare
from vla_energy.finetune.trainer import Trainer
from vla_energy.rerank import Reranker


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rollouts(tmp_path_factory.mktemp("rollouts") / "data")


def energy(**changes: Any) -> EnergyConfig:
    return EnergyConfig(rollouts=RolloutsConfig(NAME, **{"batch_size": 8, "failed": 2, **changes}))


def config(folder: Path, runs: Path, root: Path, made: EnergyConfig, **changes: Any) -> FinetuneConfig:
    return _config(folder, runs, data_root_dir=str(root), energy=made, **changes)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_policy_is_trained_as_without_rollouts(
    tiny_folder: Path, tmp_path: Path, data_root: Path, accumulate: int
) -> None:
    """Bit for bit, dropout on: the rollouts' forward draws nothing and leaves the mode of the policy alone."""
    changes = {"lora_dropout": 0.1, "grad_accumulation_steps": accumulate}
    plain = _run(config(tiny_folder, tmp_path / "plain", data_root, EnergyConfig(), **changes))
    taught = _run(config(tiny_folder, tmp_path / "taught", data_root, energy(), **changes))
    _equal(_policy_weights(plain), _policy_weights(taught))
    assert plain.head is not None and taught.head is not None and taught.head.outcome_bias is not None
    assert not torch.equal(plain.head.scorer.certainty.weight, taught.head.scorer.certainty.weight)
    assert taught.head.outcome_bias != 0
    rows = [json.loads(row) for row in (tmp_path / "taught" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"energy/outcome", "energy/outcome_auc", "energy/win_rate/failed"} <= rows[0].keys()
    assert 0 <= rows[0]["energy/outcome_auc"] <= 1 and rows[0]["energy/outcome"] > 0


def test_a_head_beside_a_frozen_policy_is_saved_and_loads(tiny_folder: Path, tmp_path: Path, data_root: Path) -> None:
    made = dataclasses.replace(energy(outcome=1.0), freeze_backbone=True)
    trainer = Trainer(config(tiny_folder, tmp_path, data_root, made))
    before = _policy_weights(trainer)
    trainer.run()
    _equal(before, _policy_weights(trainer))
    folder = checkpoints.folder_of(trainer.config, 2)
    loaded = load_head(folder)
    assert loaded.config.rollouts == made.rollouts and trainer.head is not None
    _equal(loaded.head.state_dict(), trainer.head.state_dict())
    assert "outcome_bias" in loaded.head.state_dict()
    assert load_openvla(folder, use_proprio=True).horizon == 8
    Reranker.from_checkpoint(folder)


def test_the_second_stream_is_read_as_the_first_and_matches_instructions(
    tiny_folder: Path, tmp_path: Path, data_root: Path
) -> None:
    trainer = Trainer(config(tiny_folder, tmp_path, data_root, energy()))
    assert trainer.rollouts is not None
    # No episode is held out, and chunks are in the policy's own units.
    assert trainer.rollouts.num_episodes == len(TASKS) * len(OUTCOMES)
    assert trainer.rollouts.statistics is trainer.job.statistics
    trainer.step = 3
    resumed = trainer._start_rollouts()
    trainer.step = 0
    stream = trainer._start_rollouts()
    assert stream is not None and resumed is not None
    instructions = next(trainer.job.train.batches(4))["instructions"]
    seen = [stream.next(instructions, torch.Generator()) for _ in range(4)]
    again = resumed.next(instructions, torch.Generator())
    for name, value in vars(again).items():
        assert torch.equal(value, getattr(seen[3], name))
    raw = next(trainer.rollouts.batches(8))
    for row, text in enumerate(instructions):
        expected = [text.lower() == other.lower() for other in raw["instructions"]]
        assert seen[0].same_instruction[row].tolist() == expected
    assert any(batch.same_instruction.any() for batch in seen)
    torch.testing.assert_close(seen[0].executed, torch.tensor(raw["actions"]))
    assert seen[0].success.tolist() == raw["success"].tolist()
    assert not seen[0].context.requires_grad and not seen[0].policy.requires_grad
    stream.close()
    resumed.close()


@pytest.mark.parametrize(
    ("outcomes", "changes", "text"),
    [
        ((True,), {}, "all 6 episodes succeeded: --energy.rollouts.failed must be 0"),
        ((True,), {"failed": 0}, "all 6 episodes succeeded: there is no outcome to tell apart"),
        ((False,), {}, "all 6 episodes failed: there is no outcome to tell apart.*outcome 0"),
        ((False,), {"outcome": 0.0}, None),
    ],
)
def test_outcomes_that_are_missing_are_told(
    tiny_folder: Path, tmp_path: Path, outcomes: tuple[bool, ...], changes: dict[str, Any], text: str | None
) -> None:
    root = write_rollouts(tmp_path / "data", outcomes=outcomes)
    flags = config(tiny_folder, tmp_path / "run", root, energy(**changes))
    job = prepare(flags)
    if text is None:
        assert open_rollouts(flags, job.vla, job.statistics) is not None
        return
    with pytest.raises(FlagError, match=f"--energy.rollouts.dataset {NAME}: {text}"):
        open_rollouts(flags, job.vla, job.statistics)


@pytest.mark.parametrize(("name", "value"), [("batch_size", 8), ("discount", 0.9), ("outcome", 0.1), ("failed", 3)])
def test_settings_of_rollouts_without_a_dataset_are_refused_by_their_flag(name: str, value: float) -> None:
    made = EnergyConfig(rollouts=RolloutsConfig(**{name: value}))  # type: ignore[arg-type]
    with pytest.raises(FlagError, match=f"--energy.rollouts.{name} {value} does nothing without .*rollouts.dataset"):
        FinetuneConfig(energy=made).check()
    FinetuneConfig(energy=dataclasses.replace(made, rollouts=dataclasses.replace(made.rollouts, dataset=NAME))).check()
    default = dataclasses.replace(made.rollouts, **{name: getattr(RolloutsConfig(), name)})
    FinetuneConfig(energy=EnergyConfig(rollouts=default)).check()


def test_datasets_that_do_not_fit_are_told(tiny_folder: Path, tmp_path: Path, data_root: Path) -> None:
    for name, text in (
        ("metaworld_nothing", f"dataset metaworld_nothing: .*{NAME}"),
        ("mystery", "dataset mystery: unknown dataset"),
        ("metaworld_five", "the dataset's actions have 5 dimensions, the statistics 4"),
    ):
        if name == "metaworld_five":
            fields = {name: {"action_mask": [True] * 5}}
            (tmp_path / "fields.json").write_text(json.dumps(fields))
            write_rollouts(data_root, action_dim=5, name=name)
        changes = {"dataset_config": str(tmp_path / "fields.json")} if name == "metaworld_five" else {}
        made = EnergyConfig(rollouts=RolloutsConfig(name))
        with pytest.raises(FlagError, match=text):
            Trainer(config(tiny_folder, tmp_path / name, data_root, made, **changes))
    off = EnergyConfig(enabled=False, rollouts=RolloutsConfig("mystery"))
    assert Trainer(config(tiny_folder, tmp_path / "off", data_root, off)).rollouts is None


def test_a_dataset_says_which_episodes_succeeded(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = RldsDataset(data_root, NAME, val_fraction=0.0, outcomes=True)
    frames = {
        int(episode): bool(success)
        for batch in data.batches(8, repeat=False, drop_last=False)
        for episode, success in zip(batch["episode"], batch["success"], strict=True)
    }
    assert [frames[episode] for episode in sorted(frames)] == data.episode_outcomes().tolist()
    assert data.episode_outcomes().sum() == len(TASKS)
    monkeypatch.setattr(data._source, "has_success", False)
    with pytest.raises(DatasetError, match="does not say which episodes succeeded.*--record"):
        data.episode_outcomes()
