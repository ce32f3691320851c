"""The main job on the bundled shard: off is off, resume is exact, checkpoints load, bad input is told early."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rollouts_fixture import NAME, write_rollouts
from torch import Tensor

from vla_energy.actions import DatasetStatistics, FieldStatistics, StatisticsError
from vla_energy.backbones import CheckpointFolderError, load_openvla, weights
from vla_energy.backbones.tiny import EMBEDDED as TINY
from vla_energy.backbones.tiny import write_random_start
from vla_energy.checkpoint import CheckpointError, load_head
from vla_energy.cli import main
from vla_energy.config import (
    EnergyConfig,
    LayerExitsConfig,
    LossConfig,
    MonitorConfig,
    RolloutsConfig,
    TemperatureConfig,
)
from vla_energy.data import DatasetError
from vla_energy.finetune import checkpoints, logs
from vla_energy.finetune.config import FinetuneConfig, FlagError
from vla_energy.finetune.energy import retrieve
from vla_energy.finetune.evaluate import calibrated_gate
from vla_energy.finetune.logs import MetricLog
from vla_energy.finetune.policy_step import rate_factor
from vla_energy.finetune.setup import EMBEDDED_DATA
from vla_energy.finetune.signals import DivergedError
from vla_energy.finetune.trainer import Trainer
from vla_energy.memory import ChunkMemory
from vla_energy.monitors import RankingReport
from vla_energy.rerank import MARGIN_KEY, Reranker
from vla_energy.rollout.interface import Request
from vla_energy.rollout.policy import load_policy
from vla_energy.rollout.world import Observation


def _config(folder: Path, runs: Path, **changes: Any) -> FinetuneConfig:
    base = FinetuneConfig(
        vla_path=str(folder),
        run_root_dir=runs,
        run_id_override="run",
        use_proprio=True,
        image_aug=False,
        batch_size=4,
        lora_rank=4,
        max_steps=2,
        wandb_log_freq=1,
        shuffle_buffer_size=64,
        precision="fp32",
    )
    return dataclasses.replace(base, **changes)


def _policy_weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.job.vla.state_dict().items()}


def _equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def _run(config: FinetuneConfig) -> Trainer:
    trainer = Trainer(config)
    trainer.run()
    return trainer


def test_off_means_off(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy's weights with the head on, and with it off, are bit for bit those of a loop without any head."""
    plain = Trainer(_config(tiny_folder, tmp_path / "plain", energy=EnergyConfig(enabled=False)))
    batches = plain.job.train.batches(4)
    torch.manual_seed(plain.config.seed)
    before = _policy_weights(plain)
    optimizer = torch.optim.AdamW([p for p in plain.job.vla.parameters() if p.requires_grad], lr=5e-4, fused=True)
    for _ in range(2):
        batch = plain.job.to_batch(next(batches))
        out = plain.job.vla.train()(batch, "off")
        (out.actions - batch["actions"]).abs().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = _policy_weights(plain)
    assert any(not torch.equal(before[name], expected[name]) for name in before)
    _equal(expected, _policy_weights(_run(_config(tiny_folder, tmp_path / "off", energy=EnergyConfig(enabled=False)))))
    trained = _run(_config(tiny_folder, tmp_path / "on"))
    _equal(expected, _policy_weights(trained))
    assert trained.guard is not None and trained.guard.counters["steps"] == 2


@pytest.mark.parametrize("rollouts", [False, True])
def test_two_steps_then_resume_equal_four(tiny_folder: Path, tmp_path: Path, rollouts: bool) -> None:
    flags: dict[str, Any] = {"lora_dropout": 0.1}
    if rollouts:
        flags["data_root_dir"] = str(write_rollouts(tmp_path / "data"))
        flags["energy"] = EnergyConfig(rollouts=RolloutsConfig(NAME, batch_size=8))
    whole = _run(_config(tiny_folder, tmp_path / "whole", max_steps=4, **flags))
    _run(_config(tiny_folder, tmp_path / "parts", max_steps=2, **flags))
    parts = _run(_config(tiny_folder, tmp_path / "parts", max_steps=4, resume=True, **flags))
    _equal(_policy_weights(whole), _policy_weights(parts))
    assert whole.head is not None and parts.head is not None
    _equal(whole.head.state_dict(), parts.head.state_dict())
    rows = [
        [json.loads(row) for row in (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert [row["step"] for row in rows[0]] == [1, 2, 3, 4]
    for row in (*rows[0], *rows[1]):
        row.pop("frames_per_second")
        row.pop("energy/ms")
    assert rows[0] == rows[1]
    with pytest.raises(CheckpointError, match="learning_rate"):
        Trainer(_config(tiny_folder, tmp_path / "parts", resume=True, learning_rate=1e-3, **flags))
    other = dataclasses.replace(flags.get("energy", EnergyConfig()), temperature=TemperatureConfig(value=2.0))
    with pytest.raises(CheckpointError, match=r"other values of: energy\.temperature\.value$"):
        Trainer(_config(tiny_folder, tmp_path / "parts", resume=True, **{**flags, "energy": other}))
    with pytest.raises(CheckpointError, match=r"no checkpoint at step 3.*\[2, 4\]"):
        Trainer(_config(tiny_folder, tmp_path / "parts", resume=True, resume_step=3, **flags))


def test_checkpoint_loads_as_a_policy_with_a_head(tiny_folder: Path, tmp_path: Path) -> None:
    trainer = _run(_config(tiny_folder, tmp_path, use_val_set=True, val_freq=2))
    folder = checkpoints.folder_of(trainer.config, 2)
    raw = next(trainer.job.train.batches(3))
    batch = trainer.job.to_batch(raw)
    batch = {key: batch[key] for key in batch}
    with torch.no_grad():
        expected = trainer.job.vla.eval()(batch).actions
    loaded = load_openvla(folder, use_proprio=True)
    with torch.no_grad():
        # Weights are saved merged and in bf16.
        torch.testing.assert_close(loaded(batch).actions, expected, atol=0.1, rtol=0)
    assert load_head(folder).step == 2
    assert trainer.gate is not None and load_head(folder).extra == {MARGIN_KEY: trainer.gate["margin"]}
    # Two steps teach nothing that a calibrated gate would believe.
    assert Reranker.from_checkpoint(folder).margin == math.inf
    policy = load_policy(str(folder))
    assert policy.arms == {"policy", "rerank", "refine", "replan"} and (policy.horizon, policy.action_dim) == (8, 4)

    def request(row: int, images: np.ndarray) -> Request:
        seen = Observation(images, np.zeros(4, np.float32), raw["instructions"][row])
        return Request(seen, torch.Generator().manual_seed(row))

    images = list(raw["images"])
    decisions = policy.act([request(row, image) for row, image in enumerate(images)], "rerank")
    alone = policy.act([request(0, images[0])], "rerank")
    assert decisions[0].actions.values.shape == (8, 4)
    np.testing.assert_allclose(decisions[0].actions.values, alone[0].actions.values, atol=1e-5)
    # A simulator may have more cameras than the policy, and not fewer.
    second = policy.act([request(0, np.concatenate([images[0], 255 - images[0]]))], "rerank")
    np.testing.assert_array_equal(second[0].actions.values, alone[0].actions.values)
    with pytest.raises(ValueError, match="1 cameras, the simulator has 0"):
        policy.act([request(0, images[0][:0])], "rerank")
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 0 < rows[-1]["val/finetune/l1_val"] < 2
    assert {"train/l1", "energy/loss", "energy/grad_norm"} <= rows[0].keys()


def test_gate_is_calibrated_on_one_half_of_the_episodes_and_told_on_the_other() -> None:
    """Even episodes say that low energy means near, odd ones that it means far: the other half must show it."""
    rows = 400
    episodes = torch.arange(rows) // (rows // 50)
    distances = torch.full((rows, 2), 0.5)
    distances[:, 1] = torch.where(episodes % 2 == 0, 0.1, 0.9)
    energies = torch.tensor([1.0, 0.0]).expand(rows, 2)
    report = RankingReport({}, energies, distances, ("policy", "noise"))
    gate = calibrated_gate(report, episodes)
    assert gate["margin"] is not None and gate["accepted"] == gate["worse"] == 1
    assert gate["l1_gated"] == pytest.approx(0.9) and gate["frames"] == rows // 2
    swapped = calibrated_gate(report, episodes + 1)
    assert swapped["margin"] == gate["margin"]  # by rank among the episodes seen, whatever their numbers
    shut = calibrated_gate(dataclasses.replace(report, distances=distances.flip(1)), episodes)
    assert shut["margin"] is None and shut["accepted"] == 0 and shut["l1_gated"] == pytest.approx(shut["l1_policy"])


def test_frozen_backbone_trains_the_head_alone(tiny_folder: Path, tmp_path: Path) -> None:
    config = _config(tiny_folder, tmp_path, energy=EnergyConfig(freeze_backbone=True))
    trainer = Trainer(config)
    assert trainer.head is not None
    before, head = _policy_weights(trainer), {k: v.clone() for k, v in trainer.head.state_dict().items()}
    trainer.run()
    _equal(before, _policy_weights(trainer))
    assert any(not torch.equal(head[name], value) for name, value in trainer.head.state_dict().items())


def test_accumulated_micro_batches_are_one_step(tiny_folder: Path, tmp_path: Path) -> None:
    trainer = _run(_config(tiny_folder, tmp_path, batch_size=2, grad_accumulation_steps=2))
    assert trainer.guard is not None and trainer.guard.counters["steps"] == 2 and trainer.step == 2


def test_rate_follows_the_host() -> None:
    config = FinetuneConfig(lr_warmup_steps=10, num_steps_before_decay=100)
    assert rate_factor(config, 0) == pytest.approx(0.19)
    assert rate_factor(config, 9) == rate_factor(config, 99) == 1
    assert rate_factor(config, 100) == pytest.approx(0.1)


def test_monitors_measure_and_warn_in_words(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A head that cannot learn (its energies sit where a steep sigmoid has no slope) is told within its first steps."""
    energy = EnergyConfig.preset("original")
    energy.head = dataclasses.replace(energy.head, hidden_dim=16, num_heads=2)
    energy.range = dataclasses.replace(energy.range, slope=1e4)
    energy.monitor = MonitorConfig(every=2, flat_steps=2)
    _run(_config(tiny_folder, tmp_path, max_steps=4, energy=energy))
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["energy/alignment" in row for row in rows] == [False, True, False, True]
    assert {"energy/skips", "energy/skips/nonfinite", "energy/saturated", "energy/chance"} <= rows[1].keys()
    warnings = [record.message for record in caplog.records if record.name == "vla_energy.finetune.monitor"]
    assert any(text.startswith("step 2") and "docs/troubleshooting.md#saturated" in text for text in warnings)


def test_sources_that_cannot_give_a_chunk_are_told_at_start(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Trainer(_config(tiny_folder, tmp_path, batch_size=1))
    assert "negatives.in_batch is on but batch_size is 1" in caplog.text
    with pytest.raises(ValueError, match="in_batch"):
        Trainer(_config(tiny_folder, tmp_path, batch_size=1, energy=EnergyConfig.preset("stage2")))
    energy = EnergyConfig()
    energy.negatives.layer_exits.layers = (9,)
    with pytest.raises(ValueError, match="layer_exits.layers.*9"):
        Trainer(_config(tiny_folder, tmp_path, energy=energy))


def test_the_heads_rate_has_its_factor_and_exits_can_be_normed(tiny_folder: Path, tmp_path: Path) -> None:
    energy = EnergyConfig.preset("stage2")
    energy.negatives.layer_exits = LayerExitsConfig(count=2, normed=True)
    trainer = Trainer(_config(tiny_folder, tmp_path, energy=energy))
    assert trainer.guard is not None
    assert trainer.guard.optimizer.param_groups[0]["lr"] == pytest.approx(5e-5)
    batch = trainer.job.to_batch(next(trainer.job.train.batches(2)))
    seen = trainer._backward_energy(trainer._forward_policy(batch, {}), batch, [0, 1], {})
    assert seen is not None
    with torch.no_grad():
        normed, raw = (trainer.job.vla(batch, exits).layer_actions[:, 1] for exits in ("normed", "raw"))
    torch.testing.assert_close(seen[3][:, 1], normed)
    assert (normed - raw).abs().max() > 1e-4


NO_SHUFFLE = EnergyConfig(loss=LossConfig(margin=1.0, margin_sources=("shuffle",)))


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"use_diffusion": True}, FlagError, "use_diffusion True needs --use_l1_regression False"),
        ({"precision": "fp8"}, FlagError, "bf16, fp32"),
        ({"max_steps": 0}, FlagError, "max_steps"),
        ({"horizon": -1}, FlagError, "horizon"),
        ({"learning_rate": math.inf}, FlagError, "--learning_rate inf: must be above 0, and finite"),
        ({"energy_learning_rate": 1e30}, FlagError, r"--energy_learning_rate 1e\+30: must be 1 or less"),
        ({"lora_dropout": math.nan}, FlagError, "--lora_dropout nan: must be 0 or more"),
        ({"shuffle_buffer_size": 0}, FlagError, "--shuffle_buffer_size 0: must be 1 or more"),
        ({"rank_wait_minutes": math.nan}, FlagError, "--rank_wait_minutes nan: must be 0 or more"),
        ({"seed": 10**23}, FlagError, "--seed 1.*: must be 0 or more, and below 2"),
        ({"device": "meta"}, FlagError, "--device meta: "),
        ({"device": "cuda:77"}, FlagError, "--device cuda:77: "),
        ({"horizon": 4000}, FlagError, "positions hold chunks of at most"),
        ({"dataset_name": "metaworld_nothing"}, DatasetError, "metaworld_demo"),
        ({"dataset_name": "unknown"}, DatasetError, "known"),
        ({"data_root_dir": "nowhere"}, DatasetError, "nowhere"),
        ({"vla_path": "nowhere"}, CheckpointFolderError, "nowhere"),
        ({"num_images_in_input": 2}, DatasetError, "wrist"),
        ({"resume": True}, CheckpointError, "resume"),
        ({"resume_step": 3}, FlagError, "--resume True"),
        ({"energy": NO_SHUFFLE}, ValueError, "margin_sources=.'shuffle'.: not drawn.*in_batch"),
        ({"wandb_project": "p"}, FlagError, "pip install wandb"),
    ],
)
def test_bad_flags_are_told_before_training(
    tiny_folder: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        _run(_config(tiny_folder, tmp_path, **changes))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()  # so that the corrected command finds the name free


def test_an_earlier_run_is_not_overwritten(tiny_folder: Path, tmp_path: Path) -> None:
    _run(_config(tiny_folder, tmp_path, max_steps=1))
    rows = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(FlagError, match="--resume True"):
        _run(_config(tiny_folder, tmp_path, max_steps=1))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == rows


def test_a_checkpoint_killed_between_its_two_renames_is_found(tiny_folder: Path, tmp_path: Path) -> None:
    config = _config(tiny_folder, tmp_path, max_steps=1, save_latest_checkpoint_only=True)
    _run(config)
    latest = tmp_path / "run" / "latest"
    latest.rename(tmp_path / "run" / ".latest.old")
    resumed = _run(dataclasses.replace(config, resume=True, max_steps=2))
    assert resumed.step == 2 and (latest / checkpoints.STATE).is_file()
    assert not (tmp_path / "run" / ".latest.old").exists()


def test_steps_survive_a_failed_validation(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(_config(tiny_folder, tmp_path, use_val_set=True, val_freq=2))

    def fail() -> dict[str, Any]:
        raise DatasetError("the shard is torn")

    monkeypatch.setattr(trainer, "validate", fail)
    with pytest.raises(DatasetError, match="torn"):
        trainer.run()
    assert (checkpoints.folder_of(trainer.config, 2) / checkpoints.STATE).is_file()


@pytest.mark.parametrize("enabled", [True, False])
def test_held_out_frames_that_are_not_finite_are_left_out_and_told(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, enabled: bool
) -> None:
    """A file that changes after it was checked: their distances would end the run, or their L1 be no number."""
    config = _config(tiny_folder, tmp_path, use_val_set=True, energy=EnergyConfig(enabled=enabled))
    trainer = Trainer(config)
    assert trainer.held_out is not None
    read, lost = trainer.held_out.batches, [slice(2, 3)]

    def poisoned(*args: Any, **options: Any) -> Any:
        for position, raw in enumerate(itertools.islice(read(*args, **options), 3)):
            raw |= {key: raw[key].copy() for key in ("actions", "proprio")}
            raw["actions"][lost[0], 1, 0] = np.nan if position else np.inf
            raw["proprio"][lost[0]] = np.nan
            yield raw

    monkeypatch.setattr(trainer.held_out, "batches", poisoned)
    results = trainer.validate()
    assert results["finetune"]["frames"] == 3 * 15 and np.isfinite(results["finetune"]["l1_val"])
    assert "validation: 3 held-out frames are left out" in caplog.text
    lost[0] = slice(None)
    with pytest.raises(DatasetError, match=f"{config.dataset_name}: no held-out frame has"):
        trainer.validate()


def _poison(trainer: Any, steps: range) -> None:
    """In these steps one number of the policy's gradient is NaN."""
    real = trainer.train_step

    def step(*args: Any) -> Any:
        first = trainer.parameters[0]
        hook = first.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), torch.nan))
        try:
            return real(*args)
        finally:
            hook.remove()

    trainer.train_step = lambda *args: (step if trainer.step in steps else real)(*args)


def test_a_step_of_the_policy_is_left_out_where_its_gradient_is_not_finite(tiny_folder: Path, tmp_path: Path) -> None:
    trainer: Any = Trainer(_config(tiny_folder, tmp_path, max_steps=3, energy=EnergyConfig(enabled=False)))
    _poison(trainer, range(1, 2))
    seen = [_policy_weights(trainer)]
    real = trainer.train_step

    def noted(*args: Any) -> Any:
        metrics = real(*args)
        seen.append(_policy_weights(trainer))
        return metrics

    trainer.train_step = noted
    trainer.run()
    _equal(seen[1], seen[2])
    changed = [any(not torch.equal(a[n], b[n]) for n in a) for a, b in itertools.pairwise(seen)]
    assert changed == [True, False, True]
    assert all(bool(value.isfinite().all()) for value in seen[3].values())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/skipped"] for row in rows] == [0.0, 1.0, 0.0]
    assert [row["train/grad_norm"] is None for row in rows] == [False, True, False]


def test_a_policy_that_has_diverged_ends_the_run_and_its_last_checkpoint_stays(
    tiny_folder: Path, tmp_path: Path
) -> None:
    config = _config(tiny_folder, tmp_path, max_steps=99, save_freq=2, save_latest_checkpoint_only=True)
    trainer = Trainer(config)
    _poison(trainer, range(3, 99))
    with pytest.raises(DivergedError, match=r"not been finite for 20 steps in a row \(up to step 23\)"):
        trainer.run()
    assert Trainer(dataclasses.replace(config, resume=True)).step == 22


def test_weights_that_are_not_finite_are_not_saved(tiny_folder: Path, tmp_path: Path) -> None:
    config = _config(tiny_folder, tmp_path, max_steps=2, save_freq=1, save_latest_checkpoint_only=True)
    trainer = Trainer(config)
    trainer.run()
    trainer.step = 3
    with torch.no_grad():
        trainer.parameters[0].view(-1)[0] = torch.nan
    with pytest.raises(CheckpointError, match=r"was not written: 1 of \d+ trained weights are not finite \(policy: "):
        checkpoints.save(trainer)
    assert Trainer(dataclasses.replace(config, resume=True)).step == 2


def test_two_processes_do_not_write_one_run(tiny_folder: Path, tmp_path: Path) -> None:
    config = _config(tiny_folder, tmp_path, max_steps=1)
    config.run_dir.mkdir()
    with MetricLog(config, 0) as log:
        log.write(1, {"train/l1": 0.5})
        with pytest.raises(FlagError, match=rf"is being written by another process \(PID {os.getpid()}\)"):
            MetricLog(dataclasses.replace(config, resume=True), 0)
    with MetricLog(dataclasses.replace(config, resume=True), 1):  # it was let go
        pass
    assert '"train/l1": 0.5' in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_lock_that_is_a_link_is_not_followed(tiny_folder: Path, tmp_path: Path) -> None:
    config = _config(tiny_folder, tmp_path, max_steps=1)
    config.run_dir.mkdir()
    (tmp_path / "mine").write_text("kept")
    (config.run_dir / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(CheckpointError, match=r"\.lock is no file that a run can lock .*: delete it"):
        MetricLog(config, 0)
    assert (tmp_path / "mine").read_text() == "kept"


def test_rows_that_an_earlier_resume_cut_are_told(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = _config(tiny_folder, tmp_path, max_steps=9, resume=True)
    config.run_dir.mkdir()
    (config.run_dir / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 6)))
    with MetricLog(config, 5):
        assert "goes on from step" not in caplog.text
    with MetricLog(config, 8):
        assert "ends at step 5 and the run goes on from step 8" in caplog.text


def test_a_row_that_cannot_be_written_is_told_with_its_file(tiny_folder: Path, tmp_path: Path) -> None:
    config = _config(tiny_folder, tmp_path)
    config.run_dir.mkdir()
    with MetricLog(config, 0) as log:
        log._path = Path("/dev/full")
        with pytest.raises(CheckpointError, match=r"step 7: /dev/full cannot be written .*make room, then"):
            log.write(7, {"train/l1": 0.5})


def test_a_run_whose_folder_was_deleted_is_not_told_to_make_room(tiny_folder: Path, tmp_path: Path) -> None:
    config = _config(tiny_folder, tmp_path)
    config.run_dir.mkdir()
    with MetricLog(config, 0) as log:
        shutil.rmtree(config.run_dir)
        with pytest.raises(CheckpointError, match=r"step 7: the run's folder .*run is gone") as raised:
            log.write(7, {"train/l1": 0.5})
    assert "intact" not in str(raised.value)


def test_a_disk_that_is_full_from_the_start_is_told_with_the_file(tmp_path: Path) -> None:
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        with pytest.raises(CheckpointError, match=r"\.lock cannot be written .*make room"):
            logs._lock(tmp_path / ".lock")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_policy_that_is_not_finite_is_not_loaded(tiny_folder: Path) -> None:
    vla = load_openvla(tiny_folder)
    state = vla.action_head.state_dict()
    state["model.fc2.bias"] = torch.full_like(state["model.fc2.bias"], torch.nan)
    with pytest.raises(CheckpointFolderError, match=r"here: weights do not fit: model\.fc2\.bias is not finite"):
        weights.fill(vla.action_head, state, "here")


def test_missing_components_are_told(tiny_folder: Path, tmp_path: Path) -> None:
    for name in ("action_head", "proprio_projector"):
        folder = tmp_path / name
        shutil.copytree(tiny_folder, folder)
        next(folder.glob(f"{name}*")).unlink()
        with pytest.raises(CheckpointFolderError, match=f"{name}.*--new_action_head True"):
            Trainer(_config(folder, tmp_path))
        assert Trainer(_config(folder, tmp_path, new_action_head=True)).job.vla.action_dim == 4


def test_cosine_resumes_to_the_same_end_only(tiny_folder: Path, tmp_path: Path) -> None:
    config = _config(tiny_folder, tmp_path, max_steps=1, lr_schedule="cosine")
    _run(config)
    with pytest.raises(CheckpointError, match="max_steps"):
        Trainer(dataclasses.replace(config, resume=True, max_steps=2))


@pytest.mark.parametrize(
    ("file", "content", "text"),
    [
        ("model.safetensors", None, "model.safetensors not found"),
        ("model.safetensors", b"torn", "model.safetensors is damaged"),
        ("config.json", b"{", "config.json is not valid JSON"),
        ("tokenizer.json", b"{}", "tokenizer.json"),
        ("action_head--0_checkpoint.pt", b"torn", "action_head--0_checkpoint.pt is damaged"),
        ("action_head--1_checkpoint.pt", b"", "exactly one"),
        ("dataset_statistics.json", b"[]", "dataset_statistics.json"),
    ],
)
def test_damaged_checkpoints_are_named(
    tiny_folder: Path, tmp_path: Path, file: str, content: bytes | None, text: str
) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in tiny_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises((CheckpointFolderError, StatisticsError), match=text):
        load_openvla(folder, use_proprio=True)


def test_another_robot_needs_a_new_head(tmp_path: Path) -> None:
    """A checkpoint for 5-dimensional actions on a dataset with 4."""
    five = FieldStatistics.of(np.random.default_rng(0).normal(size=(100, 5)))
    folder = write_random_start(
        tmp_path / "five", ["reach"], {"other": DatasetStatistics(five, None, 100, 1)}, horizon=8, seed=0
    )
    with pytest.raises(FlagError, match="--new_action_head True"):
        Trainer(_config(folder, tmp_path, use_proprio=False))
    vla = Trainer(_config(folder, tmp_path, new_action_head=True)).job.vla
    assert vla.action_dim == 4 and vla.proprio_projector is not None


def test_the_head_learns_from_retrieved_chunks_and_its_checkpoint_takes_the_memory_along(
    tiny_folder: Path, tmp_path: Path
) -> None:
    policy = checkpoints.folder_of(_run(_config(tiny_folder, tmp_path / "policy", lora_dropout=0.1)).config, 2)
    energy = EnergyConfig(freeze_backbone=True)
    energy.negatives.retrieved.count = 3
    config = _config(policy, tmp_path / "head", energy=energy)
    with pytest.raises(FlagError, match="has no memory: run vla-energy memory"):
        Trainer(config)
    data = ["--data-root-dir", str(EMBEDDED_DATA), "--dataset-name", "metaworld_demo"]
    assert main(["memory", "--checkpoint", str(policy), *data, "--max-frames", "300"]) == 0
    trainer = _run(config)
    assert trainer.memory is not None and len(trainer.memory) == 300
    folder = checkpoints.folder_of(config, 2)
    assert len(ChunkMemory.load(folder)) == 300
    assert load_policy(str(folder)).arms >= {"retrieve", "rerank+retrieve"}
    raw = next(trainer.job.train.batches(4))
    with torch.no_grad():
        output = trainer.job.vla(trainer.job.to_batch(raw))
    seen = (output.context, output.context_mask, output.actions)
    found = retrieve(trainer.memory, config, *seen, raw["episode"])
    expected = trainer.memory.nearest(*seen, 3, torch.tensor(raw["episode"]))
    assert found is not None and torch.equal(found, expected.chunks)
    assert not (expected.episodes == torch.tensor(raw["episode"])[:, None]).any()
    trains = dataclasses.replace(energy, freeze_backbone=False)
    with pytest.raises(FlagError, match="freeze_backbone True"):
        Trainer(_config(policy, tmp_path / "both", energy=trains))


def test_a_finished_policy_keeps_its_own_statistics(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    shutil.copytree(tiny_folder, folder)
    entry = json.loads((TINY / "dataset_statistics.json").read_text())
    (folder / "dataset_statistics.json").write_text(json.dumps(entry))
    frozen = Trainer(_config(folder, tmp_path / "head", energy=EnergyConfig(freeze_backbone=True)))
    trained = Trainer(_config(folder, tmp_path / "both"))
    own = DatasetStatistics.from_dict(next(iter(entry.values())))
    assert np.array_equal(frozen.job.statistics.action.mean, own.action.mean)
    assert not np.array_equal(trained.job.statistics.action.mean, own.action.mean)
