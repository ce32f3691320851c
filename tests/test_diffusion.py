"""The diffusion head: schedule, sequence and context, sampling, training, and the checkpoint as a policy."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rollouts_fixture import NAME, write_rollouts
from torch import Tensor

from vla_energy.backbones import CheckpointFolderError, LoadedVLA, load_openvla, save_openvla
from vla_energy.backbones.denoising import denoise, predict_noise
from vla_energy.backbones.diffusion import NoiseSchedule, starting_noise, time_embedding
from vla_energy.checkpoint import load_head, save_head
from vla_energy.cli import main
from vla_energy.config import EnergyConfig, RolloutsConfig
from vla_energy.finetune import checkpoints
from vla_energy.finetune.config import FinetuneConfig, FlagError
from vla_energy.finetune.diffusion import draw_noise, noise_loss, observe
from vla_energy.finetune.frames import FrameReader, PolicyFrames
from vla_energy.finetune.setup import EMBEDDED_DATA
from vla_energy.finetune.trainer import Trainer
from vla_energy.rollout.interface import Request
from vla_energy.rollout.policy import load_policy
from vla_energy.rollout.world import Observation

H, A, D = 8, 4, 128
TASKS = ["reach", "button press topdown", "a task with a much longer instruction than the others"]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _new(folder: Path, steps: tuple[int, int] = (6, 3)) -> LoadedVLA:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return load_openvla(
            folder, use_proprio=True, action_dim=A, proprio_dim=4, new_head=True, use_diffusion=True,
            diffusion_steps=steps,
        )  # fmt: skip


@pytest.fixture(scope="module")
def vla(tiny_folder: Path) -> LoadedVLA:
    return _new(tiny_folder)


@pytest.fixture(scope="module")
def diffusion_folder(vla: LoadedVLA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diffusion") / "vla"
    return save_openvla(vla, folder, 7, processor_files=vla.folder, statistics=vla.statistics, dtype=torch.float32)


def _batch(vla: LoadedVLA, rows: int = 3) -> dict[str, Tensor]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (rows, 1, 96, 96, 3), dtype=np.uint8)
    actions = rng.uniform(-1, 1, (rows, H, A)).astype(np.float32)
    return vla.processor.batch(images, TASKS[:rows], actions, rng.normal(size=(rows, 4)).astype(np.float32))


def _rows(batch: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {key: value[rows] for key, value in batch.items()}


# The schedule


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.data())
def test_denoising_with_the_true_noise_gives_the_chunk_back(train: int, data: st.DataObject) -> None:
    schedule, steps = NoiseSchedule(train), data.draw(st.integers(1, train))
    times = schedule.timesteps(steps)
    assert len(times) == steps and times[-1] == 0 and times[0] < train
    assert all(first - second == train // steps for first, second in itertools.pairwise(times))
    clean = torch.rand(2, H, A, generator=_generator(train)) * 1.9 - 0.95
    noise = torch.randn(2, H, A, generator=_generator(steps))
    chunk = schedule.add_noise(clean, noise, torch.full((2,), times[0]))
    for time in times:
        predicted = (chunk - schedule.kept[time].sqrt() * clean) / (1 - schedule.kept[time]).sqrt()
        chunk = schedule.step(chunk, predicted, time, steps)
    # Of the last time step next to nothing is left to read the chunk from.
    torch.testing.assert_close(chunk, clean, rtol=0, atol=1e-3)


def test_the_schedule_is_the_squared_cosine_with_bounded_betas() -> None:
    schedule = NoiseSchedule(50)
    level = lambda i: math.cos((i / 50 + 0.008) / 1.008 * math.pi / 2) ** 2  # noqa: E731
    expected = [level(i + 1) / level(0) for i in range(49)]
    torch.testing.assert_close(schedule.kept[:-1], torch.tensor(expected), rtol=1e-4, atol=1e-7)
    assert float(schedule.kept[-1] / schedule.kept[-2]) == pytest.approx(1e-3, rel=1e-3), "a beta of 0.999"
    chunks, noise, times = torch.rand(3, H, A), torch.randn(3, H, A), torch.tensor([0, 20, 49])
    noised = schedule.add_noise(chunks, noise, times)
    for row, time in enumerate(times.tolist()):
        kept = float(schedule.kept[time])
        torch.testing.assert_close(noised[row], math.sqrt(kept) * chunks[row] + math.sqrt(1 - kept) * noise[row])
    with pytest.raises(ValueError, match="8 denoising steps: expected 1 to num_diffusion_steps_train=7"):
        NoiseSchedule(7).timesteps(8)
    with pytest.raises(ValueError, match="num_diffusion_steps_train=0"):
        NoiseSchedule(0)


def test_time_embedding_by_hand() -> None:
    (row,) = time_embedding(torch.tensor([3]), 6).tolist()
    angles = [3 * 10_000 ** -(i / 2) for i in range(3)]
    assert row == pytest.approx([*map(math.sin, angles), *map(math.cos, angles)], abs=1e-6)
    with pytest.raises(ValueError, match="width 5"):
        time_embedding(torch.tensor([3]), 5)


def test_starting_noise_leaves_the_same_state_whatever_is_drawn_besides() -> None:
    states, firsts = [], []
    for count in (0, 5):
        own = _generator(3)
        noise, (other,) = starting_noise([own], count, H, A)
        torch.rand(7, generator=other)
        assert noise.shape == (1, 1 + count, H, A)
        firsts.append(noise[0, 0])
        states.append(own.get_state())
    assert torch.equal(*firsts) and torch.equal(*states)
    assert torch.equal(firsts[0], torch.randn(H, A, generator=_generator(3))), "what one draw from it gives"
    both, _ = starting_noise([_generator(3), _generator(4)], 2, H, A)
    assert torch.equal(both[1:], starting_noise([_generator(4)], 2, H, A)[0])
    assert len(both.flatten(0, 1).flatten(1).unique(dim=0)) == 6


# The sequence


def _embeddings(vla: LoadedVLA, call: Any) -> list[Tensor]:
    """What the language model is fed with while `call` runs."""
    seen: list[Tensor] = []
    hook = vla.backbone.language_model.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["inputs_embeds"].clone()), with_kwargs=True
    )
    with torch.no_grad():
        call()
    hook.remove()
    return seen


def test_the_sequences_of_context_and_noise(vla: LoadedVLA) -> None:
    batch, noisy, times = _batch(vla), torch.randn(3, H, A), torch.tensor([0, 2, 5])
    context, *denoising = _embeddings(vla, lambda: vla(batch, noise=torch.randn(3, 1, H, A)))
    assert len(denoising) == 3, "a pass for each step"
    (noise,) = _embeddings(vla, lambda: predict_noise(vla, batch, noisy, times))
    assert noise.shape[1] == context.shape[1] + 1 == batch["input_ids"].shape[1] + 64 + 2
    torch.testing.assert_close(noise[:, 66], time_embedding(times, D), msg="BOS, 64 patches, proprio, time step")
    placeholders = batch["labels"] > vla.config.action_token_begin
    after = torch.nn.functional.pad(placeholders[:, 1:], (66, 0))
    assert not context[after].any()
    with torch.no_grad():
        embedded = vla.noisy_action_projector(noisy)  # type: ignore[misc]
        one = vla.noisy_action_projector(noisy[:, 2:3, 1:2])  # type: ignore[misc]
    after = torch.nn.functional.pad(placeholders[:, 1:], (67, 0))
    torch.testing.assert_close(noise[after].reshape(3, H * A, D), embedded)
    torch.testing.assert_close(embedded[:, 2 * A + 1], one[:, 0], msg="a token for each number")
    rest = torch.cat([noise[:, :66], noise[:, 67:]], 1)[~torch.nn.functional.pad(placeholders[:, 1:], (66, 0))]
    assert torch.equal(rest, context[~torch.nn.functional.pad(placeholders[:, 1:], (66, 0))])


def test_the_context_knows_no_noised_chunk_and_is_the_l1_policys(tiny_folder: Path, vla: LoadedVLA) -> None:
    batch = _batch(vla)
    with torch.no_grad():
        first, second = (vla(batch, noise=torch.randn(3, 2, H, A, generator=_generator(seed))) for seed in (0, 1))
        other = {**batch, "actions": -batch["actions"]}
        tokens = batch["labels"] > vla.config.action_token_begin
        other["labels"] = torch.where(tokens, vla.config.vocab_size - 1, batch["labels"])
        other["input_ids"] = torch.where(tokens, 9, batch["input_ids"])
        expert = vla(other, noise=torch.randn(3, 1, H, A))
    assert not torch.allclose(first.actions, second.actions)
    for output in (second, expert):
        assert torch.equal(first.context, output.context) and torch.equal(first.context_mask, output.context_mask)
        assert all(torch.equal(*pair) for pair in zip(first.hidden_states, output.hidden_states, strict=True))
    plain = load_openvla(tiny_folder, use_proprio=True)
    plain.proprio_projector = vla.proprio_projector
    with torch.no_grad():
        same = plain(batch)
    assert torch.equal(first.context, same.context) and torch.equal(first.context_mask, same.context_mask)
    with torch.no_grad():
        noises = [predict_noise(vla, batch, torch.full((3, H, A), value), torch.zeros(3)) for value in (0.1, 0.9)]
    assert float((noises[0] - noises[1]).abs().max()) > 1e-4, "the noised chunk is read where it should be"


# Sampling


def test_samples_are_those_of_each_noise_alone_and_images_are_read_once(vla: LoadedVLA) -> None:
    batch, noise = _batch(vla), torch.randn(3, 4, H, A)
    reads: list[int] = []
    hook = vla.backbone.vision_backbone.register_forward_hook(lambda *_: reads.append(1))
    together = vla.predict(batch, "off", noise)
    hook.remove()
    assert len(reads) == 1 and together.samples is not None and together.layer_actions is None
    chunks = torch.cat([together.actions[:, None], together.samples], 1)
    assert chunks.shape == (3, 4, H, A) and float(chunks.abs().max()) <= 1
    schedule = vla.action_head.schedule
    for row in range(3):
        prompt = {**_rows(batch, slice(row, row + 1))}
        length = int(prompt["attention_mask"].sum())
        prompt |= {key: prompt[key][:, :length] for key in ("input_ids", "attention_mask", "labels")}
        for number in range(4):
            chunk = noise[row : row + 1, number]
            for time in schedule.timesteps(3):
                with torch.no_grad():
                    predicted = predict_noise(vla, prompt, chunk, torch.tensor([time]))
                chunk = schedule.step(chunk, predicted, time, 3)
            torch.testing.assert_close(chunks[row, number], chunk[0], atol=2e-5, rtol=0)


def test_the_policys_chunk_does_not_move_with_the_number_of_samples(vla: LoadedVLA) -> None:
    batch, noise = _batch(vla), torch.randn(3, 6, H, A)
    alone = vla.predict(batch, "raw", noise[:, :1])
    assert alone.samples is None and torch.equal(alone.layer_actions, alone.actions[:, None])  # type: ignore[arg-type]
    for count in (2, 6):
        assert torch.equal(vla.predict(batch, "off", noise[:, :count]).actions, alone.actions)
    passes = _embeddings(vla, lambda: vla(batch, noise=noise))
    # Of another number of rows it would be equal here too, by luck: kernels may depend on it.
    assert [len(rows) for rows in passes] == [3, *[3] * 3, *[15] * 3], "context, the policy's denoising, the others'"
    torch.manual_seed(5)
    drawn = vla.predict(batch, "off").actions
    torch.manual_seed(5)
    assert torch.equal(vla.predict(batch, "off", torch.randn(3, H, A)[:, None]).actions, drawn)
    finer = vla.predict(batch, "off", noise[:, :1], steps=6).actions
    assert not torch.allclose(finer, alone.actions)


def test_wrong_noise_is_named(tiny_folder: Path, vla: LoadedVLA) -> None:
    batch = _batch(vla)
    with pytest.raises(ValueError, match=r"noise \(3, 8, 4\): expected \(B,1\+K,H,A\)"):
        vla(batch, noise=torch.randn(3, H, A))
    with pytest.raises(ValueError, match=r"noise \(3, 1, 7, 4\)"):
        vla(batch, noise=torch.randn(3, 1, 7, A))
    with pytest.raises(ValueError, match="7 denoising steps: expected 1 to"):
        vla(batch, steps=7)
    with pytest.raises(ValueError, match=r"noisy \(3, 6, 4\)"):
        predict_noise(vla, batch, torch.randn(3, 6, A), torch.zeros(3))
    plain = load_openvla(tiny_folder, use_proprio=True)
    with pytest.raises(ValueError, match="no diffusion head: it has one chunk"):
        plain(batch, noise=torch.randn(3, 1, H, A))
    with pytest.raises(ValueError, match="L1 head: it predicts no noise"):
        predict_noise(plain, batch, torch.randn(3, H, A), torch.zeros(3))


# Folders


def test_a_saved_folder_has_the_hosts_names_and_loads_to_the_same(
    vla: LoadedVLA, diffusion_folder: Path, tmp_path: Path
) -> None:
    names = {path.name for path in diffusion_folder.glob("*.pt")}
    parts = ("action_head", "noisy_action_projector", "proprio_projector")
    assert names == {f"{part}--7_checkpoint.pt" for part in parts}
    head, noisy = (torch.load(diffusion_folder / f"{part}--7_checkpoint.pt") for part in parts[:2])
    block = "mlp_resnet_blocks.{}.ffn.{}.{}"
    linear = ["layer_norm1", "fc1", "layer_norm2", "fc2"]
    wanted = [f"{name}.{kind}" for name in linear for kind in ("weight", "bias")]
    wanted += [block.format(i, j, kind) for i in (0, 1) for j in (0, 1) for kind in ("weight", "bias")]
    assert set(head) == {f"module.noise_predictor.mlp_resnet.{name}" for name in wanted}
    assert set(noisy) == {f"module.fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    again, batch, noise = load_openvla(diffusion_folder, use_proprio=True), _batch(vla), torch.randn(3, 1, H, A)
    assert again.diffuses and (again.action_head.schedule.num_train, again.action_head.num_steps_inference) == (6, 3)
    assert torch.equal(again.predict(batch, "off", noise).actions, vla.predict(batch, "off", noise).actions)
    # Without our section in config.json, as the host leaves it: its defaults.
    for path in diffusion_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["vla_energy"]["num_diffusion_steps_train"], stored["vla_energy"]["num_diffusion_steps_inference"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    host = load_openvla(tmp_path, use_proprio=True).action_head
    assert (host.schedule.num_train, host.num_steps_inference) == (50, 50)
    (tmp_path / "noisy_action_projector--7_checkpoint.pt").unlink()
    with pytest.raises(CheckpointFolderError, match="exactly one noisy_action_projector"):
        load_openvla(tmp_path, use_proprio=True)


def test_an_l1_policy_from_a_diffusion_folder_leaves_nothing_of_it(diffusion_folder: Path, tmp_path: Path) -> None:
    for path in diffusion_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    vla = load_openvla(tmp_path, action_dim=A, new_head=True)
    assert not vla.diffuses
    save_openvla(vla, tmp_path, 9, processor_files=tmp_path, statistics=vla.statistics)
    assert not any(tmp_path.glob("noisy_action_projector*"))
    assert "num_diffusion_steps_train" not in json.loads((tmp_path / "config.json").read_text())["vla_energy"]
    assert not load_openvla(tmp_path).diffuses


# Training

STEPS: dict[str, Any] = {"num_diffusion_steps_train": 6, "num_diffusion_steps_inference": 2}


def _energy(**changes: Any) -> EnergyConfig:
    energy = EnergyConfig(**changes)
    energy.negatives.layer_exits.count = 0
    energy.negatives.samples.count, energy.negatives.samples.steps = 2, 2
    energy.candidates.samples, energy.candidates.num_candidates = 3, 2
    return energy


def _config(folder: Path, runs: Path, **changes: Any) -> FinetuneConfig:
    base = FinetuneConfig(
        vla_path=str(folder), run_root_dir=runs, run_id_override="run", use_proprio=True, image_aug=False,
        batch_size=4, lora_rank=4, max_steps=2, wandb_log_freq=1, shuffle_buffer_size=64, precision="fp32",
        use_l1_regression=False, use_diffusion=True, diffusion_sample_freq=2, energy=_energy(), **STEPS,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def _run(config: FinetuneConfig) -> Trainer:
    trainer = Trainer(config)
    trainer.run()
    return trainer


def _weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.job.vla.state_dict().items()}


def _different(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def _rows_of(trainer: Trainer) -> list[dict[str, float]]:
    rows = (trainer.config.run_dir / "metrics.jsonl").read_text().splitlines()
    untimed = [
        {k: v for k, v in json.loads(row).items() if k not in ("frames_per_second", "energy/ms")} for row in rows
    ]
    return untimed


def test_the_noise_loss_is_the_hosts(vla: LoadedVLA) -> None:
    batch = _batch(vla)
    torch.manual_seed(0)
    with torch.no_grad():
        loss = noise_loss(vla, batch, *draw_noise(vla, batch["actions"]))
    torch.manual_seed(0)
    noise, times = torch.randn(3, H, A), torch.randint(0, 6, (3,))
    kept = vla.action_head.schedule.kept[times][:, None, None]
    with torch.no_grad():
        predicted = predict_noise(vla, batch, kept.sqrt() * batch["actions"] + (1 - kept).sqrt() * noise, times)
    torch.testing.assert_close(loss, ((predicted - noise) ** 2).mean())


def test_the_policy_is_trained_as_without_an_energy_head(diffusion_folder: Path, tmp_path: Path) -> None:
    plain = Trainer(_config(diffusion_folder, tmp_path / "plain", energy=_energy(enabled=False), lora_dropout=0.1))
    before, batches = _weights(plain), plain.job.train.batches(4)
    torch.manual_seed(plain.config.seed)
    optimizer = torch.optim.AdamW([p for p in plain.job.vla.parameters() if p.requires_grad], lr=5e-4, fused=True)
    for _ in range(2):
        batch = plain.job.to_batch(next(batches))
        noise_loss(plain.job.vla.train(), batch, *draw_noise(plain.job.vla, batch["actions"])).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = _weights(plain)
    moved = {name.split(".")[0] for name in _different(before, expected)}
    assert moved == {"backbone", "action_head", "noisy_action_projector", "proprio_projector"}
    off = _run(_config(diffusion_folder, tmp_path / "off", energy=_energy(enabled=False), lora_dropout=0.1))
    on = _run(_config(diffusion_folder, tmp_path / "on", lora_dropout=0.1))
    assert not _different(expected, _weights(off)) and not _different(expected, _weights(on))
    assert on.head is not None and on.guard is not None and on.guard.counters["steps"] == 2
    first, second = _rows_of(on)
    assert "train/l1" not in first and 0 < second["train/l1"] < 2, "measured every second step"
    assert {"train/noise_mse", "energy/win_rate/samples", "energy/win_rate/policy"} <= first.keys()
    assert [row["train/noise_mse"] for row in _rows_of(off)] == [first["train/noise_mse"], second["train/noise_mse"]]


@pytest.mark.parametrize("rollouts", [False, True])
def test_two_steps_then_resume_equal_four(diffusion_folder: Path, tmp_path: Path, rollouts: bool) -> None:
    flags: dict[str, Any] = {"lora_dropout": 0.1}
    if rollouts:
        flags["data_root_dir"] = str(write_rollouts(tmp_path / "data"))
        flags["energy"] = _energy(rollouts=RolloutsConfig(NAME, batch_size=8))
    whole = _run(_config(diffusion_folder, tmp_path / "whole", max_steps=4, **flags))
    _run(_config(diffusion_folder, tmp_path / "parts", max_steps=2, **flags))
    parts = _run(_config(diffusion_folder, tmp_path / "parts", max_steps=4, resume=True, **flags))
    assert whole.head is not None and parts.head is not None
    assert not _different(_weights(whole), _weights(parts))
    assert not _different(whole.head.state_dict(), parts.head.state_dict())
    assert _rows_of(whole) == _rows_of(parts)


def test_it_learns(diffusion_folder: Path, tmp_path: Path) -> None:
    """The noise loss falls on frames and noise that stay the same."""
    flags: dict[str, Any] = {"learning_rate": 1e-3, "use_lora": False, "energy": _energy(enabled=False)}
    trainer = Trainer(_config(diffusion_folder, tmp_path, max_steps=25, batch_size=8, **flags))
    batch = trainer.job.to_batch(next(trainer.job.train.batches(32)))

    def loss() -> float:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(11)
            drawn = draw_noise(trainer.job.vla, batch["actions"])
            return float(noise_loss(trainer.job.vla.eval(), batch, *drawn))

    before = loss()
    trainer.run()
    assert before > 0.9 and loss() < 0.75 * before


def test_the_energy_head_sees_samples_and_no_expert(diffusion_folder: Path, tmp_path: Path) -> None:
    energy = _energy(freeze_backbone=True)
    energy.negatives.samples.steps = 4  # not the policy's own number
    trainer = Trainer(_config(diffusion_folder, tmp_path, energy=energy))
    job, batch = trainer.job, trainer.job.to_batch(next(trainer.job.train.batches(3)))
    job.vla.train()
    seen = observe(job, batch, trainer.config, _generator(0), 2, steps=4)
    assert job.vla.training and seen.samples is not None and seen.samples.shape == (3, 2, H, A)
    noise = torch.randn(3, 3, H, A, generator=_generator(0))
    with torch.no_grad():
        alone = job.vla.eval()(batch, noise=noise[:, :1], steps=4)
        more = denoise(job.vla, batch, alone.projector_features, noise[:, 1:], 4)
    assert torch.equal(seen.actions, alone.actions) and torch.equal(seen.samples, more)
    assert torch.equal(seen.context, alone.context)
    given: list[Any] = []
    assert trainer.training is not None
    objective = trainer.training.objective
    trainer.training.objective = lambda *args: given.append(args) or objective(*args)  # type: ignore[assignment, misc]
    metrics: dict[str, Any] = {}
    copy = torch.Generator()
    copy.set_state(trainer.generator.get_state())
    drawn = observe(job, batch, trainer.config, copy, 2, steps=4)
    trainer._backward_energy(trainer._forward_policy(batch, metrics), batch, [0, 1, 2], metrics)
    ((context, _, expert, layers, *_, samples),) = given
    assert torch.equal(context, seen.context) and torch.equal(expert, batch["actions"])
    assert drawn.samples is not None
    assert torch.equal(layers, drawn.actions[:, None]) and torch.equal(samples, drawn.samples)
    assert "train/noise_mse" not in metrics and metrics["energy/win_rate/samples"] >= 0


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"use_l1_regression": True}, "use_diffusion True needs --use_l1_regression False"),
        ({"num_diffusion_steps_train": 0}, "--num_diffusion_steps_train 0: must be 1 or more"),
        ({"num_diffusion_steps_inference": 7}, "--num_diffusion_steps_inference 7: .*--num_diffusion_steps_train 6"),
        ({"num_diffusion_steps_train": 5, "num_diffusion_steps_inference": 0}, "train 5: .* was trained with 6; pass"),
        ({"diffusion_sample_freq": 0}, "--diffusion_sample_freq 0"),
        ({"use_diffusion": False, "use_l1_regression": True}, "--energy.negatives.samples.count 2 needs .*--use_diff"),
        (
            {"use_diffusion": False, "use_l1_regression": True, "energy": EnergyConfig()},
            "has a diffusion action head: pass --use_diffusion True --use_l1_regression False, or --new_action_head",
        ),
    ],
)
def test_bad_flags_are_told_before_training(
    diffusion_folder: Path, tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(FlagError, match=text):
        Trainer(_config(diffusion_folder, tmp_path, **changes))


def test_flags_that_do_not_fit_an_l1_checkpoint(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FlagError, match="has an L1 action head: pass --use_diffusion False --use_l1_regression True"):
        Trainer(_config(tiny_folder, tmp_path))
    energy = _energy()
    energy.negatives.samples.steps = 7
    with pytest.raises(FlagError, match=r"--energy.negatives.samples.steps 7: must be at most .*train 6"):
        _config(tiny_folder, tmp_path, energy=energy).check()
    energy = EnergyConfig()
    energy.candidates.samples = 4
    with pytest.raises(FlagError, match="--energy.candidates.samples 4 needs .*--use_diffusion True"):
        FinetuneConfig(energy=energy).check()


def test_layer_exits_are_off_and_told(diffusion_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    energy = EnergyConfig()
    energy.negatives.samples.steps = 2
    Trainer(_config(diffusion_folder, tmp_path, energy=energy))
    assert "--energy.negatives.layer_exits.count 0 turns it off" in caplog.text
    assert "--energy.candidates.samples is 0" in caplog.text


# The checkpoint as a policy


@pytest.fixture(scope="module")
def trained(diffusion_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with head and memory, after two steps and a validation."""
    config = _config(
        diffusion_folder, tmp_path_factory.mktemp("trained"), use_val_set=True, val_freq=2, val_time_limit=1
    )
    trainer = _run(config)
    assert trainer.gate is not None
    row = _rows_of(trainer)[-1]
    assert {"val/energy/win_rate/samples", "val/rerank/l1_oracle", "val/finetune/l1_val"} <= row.keys()
    assert not any(key.startswith("val/energy/win_rate/layer") for key in row)
    folder = checkpoints.folder_of(config, 2)
    data = ["--data-root-dir", str(EMBEDDED_DATA), "--dataset-name", "metaworld_demo"]
    assert main(["memory", "--checkpoint", str(folder), *data, "--max-frames", "60"]) == 0
    return folder


def _requests(count: int, seed: int = 0) -> list[Request]:
    images = np.random.default_rng(1).integers(0, 256, (count, 1, 96, 96, 3), np.uint8)
    return [
        Request(Observation(images[row], np.full(4, 0.1 * row), TASKS[row]), _generator(seed + row))
        for row in range(count)
    ]


def test_best_of_n_in_rollouts(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(str(trained))
    assert {"policy", "rerank", "refine", "replan", "retrieve", "rerank+retrieve"} <= policy.arms
    requests, others = _requests(3), _requests(3)
    for _ in range(2):  # the second decision goes on from the first one's generators
        plain, shut = policy.act(requests, "policy"), policy.act(others, "rerank")
        for first, second in zip(plain, shut, strict=True):
            np.testing.assert_array_equal(first.actions.values, second.actions.values)
            assert not second.accepted
    alone = policy.act(_requests(3)[1:2], "policy")
    np.testing.assert_allclose(policy.act(_requests(3), "policy")[1].actions.values, alone[0].actions.values, atol=1e-4)
    assert not np.array_equal(plain[0].actions.values, policy.act(_requests(3, 9), "policy")[0].actions.values)

    seen, propose = [], policy._advisor.propose
    monkeypatch.setattr(policy._advisor, "propose", lambda *args: seen.append(propose(*args)) or seen[-1])
    policy._advisor.gates["rerank"] = 0.0
    decisions = policy.act(_requests(3), "rerank")
    (proposal,) = seen
    assert proposal.candidates.sources == ("policy", "noise_0.02", "noise_0.05", *["sample"] * 3)
    noise, _ = starting_noise([request.generator for request in _requests(3)], 3, H, A)
    expected = policy._vla.predict(policy._batch(_requests(3)), "off", noise)
    assert torch.equal(proposal.candidates.actions[:, 0], expected.actions)
    assert torch.equal(proposal.candidates.actions[:, 3:], expected.samples.clamp(-1, 1))  # type: ignore[union-attr]
    for row, decision in enumerate(decisions):
        chosen = proposal.candidates.actions[row, proposal.scores[row].argmin()]
        assert decision.memo is not None and torch.equal(decision.memo, chosen)
    for arm in ("refine", "retrieve", "replan", "rerank+retrieve"):
        assert len(policy.act(_requests(2), arm)) == 2


def test_frames_have_samples_that_depend_on_their_place_in_the_order_alone(trained: Path) -> None:
    reader = FrameReader(str(trained), "embedded", "metaworld_demo")
    assert next(reader.read("val", 4)).samples is None
    candidates = _energy().candidates
    candidates.crops = 1
    (whole,) = reader.read("val", 12, batch_size=12, candidates=candidates)
    parts = list(reader.read("val", 12, batch_size=5, candidates=candidates))
    assert whole.samples is not None and whole.samples.shape == (12, 3, H, A) and whole.layer_actions.shape[1] == 1
    for name in ("policy", "samples", "crops"):
        joined = torch.cat([getattr(batch, name) for batch in parts])
        torch.testing.assert_close(joined, getattr(whole, name), atol=1e-4, rtol=0)
    torch.testing.assert_close(next(reader.read("val", 4)).policy, whole.policy[:4], atol=1e-4, rtol=0)
    assert len(whole.samples.flatten(0, 1).flatten(1).unique(dim=0)) == 36


def test_preflight_measures_samples(trained: Path, tmp_path: Path) -> None:
    data = ["--data-root-dir", str(EMBEDDED_DATA), "--dataset-name", "metaworld_demo"]
    flags = ["--checkpoint", str(trained), *data, "--max-frames", "30", "--out", str(tmp_path), "--no-gates"]
    assert main(["preflight", *flags]) == 0
    found = json.loads((tmp_path / "preflight.json").read_text())["modes"]
    assert list(found["rerank"]["sources"]) == ["policy", "noise", "sample"]
    assert found["rerank"]["sources"]["sample"]["oracle_with_policy"] < found["rerank"]["sources"]["policy"]["oracle"]
    assert "rerank+retrieve" in found


def test_the_doctor_examines_a_diffusion_head(trained: Path) -> None:
    from vla_energy.doctor import actions, attention, inputs, statistics
    from vla_energy.doctor.findings import Subject
    from vla_energy.doctor.native_model import NativePolicy

    policy = NativePolicy.load(trained, None, torch.float32, "cpu")
    subject = Subject(trained, policy=policy)
    checks = (attention.attention, inputs.inputs, actions.round_trip, statistics.statistics)
    found = {finding.check: finding.status for check in checks for finding in check(subject)}
    assert {"attention", "padding", "camera 1", "proprioception", "instruction"} < found.keys()
    assert set(found.values()) == {"ok"}
    batch = _batch(policy.vla, 2)
    assert torch.equal(policy.sibling(trained)(batch), policy(batch))


def test_best_of_n_by_hand() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    from samples import best_of  # pyright: ignore[reportMissingImports]

    nothing, expert = torch.zeros(2), torch.zeros(2, H, A)
    policy = torch.tensor([0.4, 0.2])[:, None, None].expand(2, H, A)
    others = torch.tensor([[0.3, -0.1], [0.5, 0.6]])[:, :, None, None].expand(2, 2, H, A)
    frames = PolicyFrames(nothing, nothing, expert, policy[:, None], nothing, [], samples=others)
    table = best_of([frames])
    expected = {"1": 0.3, "2": 0.25, "3": 0.15, "mean": (0.2 + 1.3 / 3) / 2, "spread": (0.1 + 0.5 + 0.3 + 0.4) / 4}
    assert table == pytest.approx(expected)


def test_a_head_for_samples_beside_an_l1_policy_is_refused(trained: Path, tiny_folder: Path, tmp_path: Path) -> None:
    head = load_head(trained)
    for path in tiny_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (statistics,) = load_openvla(tiny_folder, use_proprio=True).statistics.values()
    save_head(tmp_path, head.head, 1, statistics)
    with pytest.raises(ValueError, match="candidates.samples=3.*L1"):
        load_policy(str(tmp_path))
    with pytest.raises(ValueError, match="candidates.samples=3: an L1 head"):
        next(
            FrameReader(str(tiny_folder), "embedded", "metaworld_demo").read(
                "val", 1, candidates=head.config.candidates
            )
        )
