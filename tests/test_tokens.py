"""Discrete action tokens: openvla-oft's own numbers, sampling, and the whole job with `--use_l1_regression False`."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import golden_towers
import host_tokens
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_film import GOLDEN, HOST_PATH, HOST_PYTHON, ROOT, needs_golden, needs_host
from test_finetune import _config, _equal, _policy_weights, _run
from torch import Tensor

from vla_energy.backbones import CheckpointFolderError, LoadedVLA, load_openvla, save_openvla
from vla_energy.backbones.lora import add_lora, merged_state_dict
from vla_energy.backbones.tokens import bin_centers, decode, expected_chunks, sample_chunks, token_loss, token_metrics
from vla_energy.cli import main
from vla_energy.config import CandidatesConfig, EnergyConfig
from vla_energy.doctor.command import diagnose
from vla_energy.doctor.findings import Subject
from vla_energy.finetune import checkpoints
from vla_energy.finetune.config import FinetuneConfig, FlagError
from vla_energy.finetune.frames import FrameReader
from vla_energy.finetune.setup import EMBEDDED_DATA
from vla_energy.finetune.trainer import Trainer
from vla_energy.rollout.interface import Request
from vla_energy.rollout.policy import load_policy
from vla_energy.rollout.world import Observation

STORED = ROOT / "tests" / "golden" / "host_tokens.pt"
TOLERANCE = 2e-5
TASKS = ["reach", "a task with a much longer instruction than the others"]
DATA = ["--data-root-dir", str(EMBEDDED_DATA), "--dataset-name", "metaworld_demo"]


@pytest.fixture
def vla(tiny_folder: Path) -> LoadedVLA:
    return load_openvla(tiny_folder, use_proprio=True, discrete=True, action_dim=4)


def _tokens_config(folder: Path, runs: Path, **changes: Any) -> FinetuneConfig:
    return _config(folder, runs, use_l1_regression=False, **changes)


def _samples(count: int = 2) -> EnergyConfig:
    energy = EnergyConfig(candidates=CandidatesConfig(samples=count))
    energy.negatives.samples.count = count
    energy.negatives.layer_exits.count = 0
    return energy


def _batch(vla: LoadedVLA, *, train: bool = True) -> dict[str, Tensor]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (2, 1, 96, 96, 3), dtype=np.uint8)
    actions, proprio = rng.uniform(-1, 1, (2, 8, 4)).astype(np.float32), rng.normal(size=(2, 4)).astype(np.float32)
    return vla.processor.batch(images, TASKS, actions if train else None, proprio)


@needs_golden
@pytest.mark.parametrize("name", host_tokens.CASES)
def test_equals_the_host(name: str) -> None:
    """Loss and metrics of padded and unpadded batches, raw actions of each row."""
    golden_towers.register()
    golden, expected = (torch.load(path, weights_only=True) for path in (GOLDEN / f"{name}.pt", STORED))
    expected = expected[name]
    images, proprio = golden["num_images"], golden["use_proprio"]
    vla = load_openvla(GOLDEN / "tiny_ckpt", num_images=images, use_proprio=proprio, discrete=True)
    assert vla.action_dim == 7  # of the statistics
    batch = golden["batch"]
    with torch.no_grad():
        vla.backbone.language_model.lm_head.weight[host_tokens.ACTION_IDS] *= host_tokens.FACTOR
        out = vla(batch)
    assert out.token_logits is not None and out.layer_actions is not None and out.layer_actions.shape[1] == 1
    torch.testing.assert_close(token_loss(out.token_logits, batch["labels"]), expected["loss"], rtol=0, atol=TOLERANCE)
    for metric, value in token_metrics(out.token_logits, batch["labels"], 7, vla.config).items():
        torch.testing.assert_close(value, expected[metric], rtol=0, atol=TOLERANCE)
    for row, prompt in enumerate(golden["infer"]):
        single = {
            "pixel_values": batch["pixel_values"][row : row + 1],
            "input_ids": prompt["prompt_input_ids"],
            "attention_mask": prompt["attention_mask"],
            "proprio": None if batch["proprio"] is None else batch["proprio"][row : row + 1],
        }
        raw = vla.statistics[host_tokens.DATASET].unnormalize(vla.predict(single).actions[0]).values
        torch.testing.assert_close(torch.from_numpy(raw).float(), expected["rows"][row], rtol=0, atol=TOLERANCE)


@needs_golden
@needs_host
def test_stored_numbers_are_the_hosts(tmp_path: Path) -> None:
    script = [str(HOST_PYTHON), str(ROOT / "tests" / "host_tokens.py"), str(GOLDEN), str(tmp_path / "now.pt")]
    paths = os.pathsep.join([str(HOST_PATH), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    now, stored = (torch.load(path, weights_only=True) for path in (tmp_path / "now.pt", STORED))
    for name, expected in stored.items():
        torch.testing.assert_close(now[name], expected, rtol=0, atol=TOLERANCE)


def test_bins_there_and_back(vla: LoadedVLA) -> None:
    """What is encoded decodes to the centre of its bin; the slow twin counts edges one by one."""
    actions = torch.rand(3, 8, 4, generator=torch.Generator().manual_seed(0)) * 2.2 - 1.1
    ids = vla.processor.action_ids(actions)
    back = decode(ids, 4, vla.config)
    assert float((back - actions.clamp(-1, 1)).abs().max()) <= 1 / 255 + 1e-6
    edges, centers = np.linspace(-1, 1, 256), bin_centers(vla.config)
    for token, value in zip(ids.flatten().tolist(), back.flatten().tolist(), strict=True):
        index = min(max(vla.config.vocab_size - token - 1, 0), 254)
        assert value == pytest.approx((edges[index] + edges[index + 1]) / 2, abs=1e-6)
    assert float(decode(torch.tensor([5] * 4), 4, vla.config)[0, 0]) == pytest.approx(float(centers[-1]))


def _logits(vla: LoadedVLA, rows: int = 2, steps: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(rows, steps * 4 + 1, vla.config.vocab_size + 64, generator=generator) * 3
    logits[..., : vla.config.vocab_size - 256] += 100.0  # text is likelier by far, and must never be drawn
    return logits


def test_samples_follow_the_distribution(vla: LoadedVLA) -> None:
    logits, config, count = _logits(vla), vla.config, 40_000
    for temperature in (1.0, 0.5, 2.0):
        drawn = sample_chunks(logits, count, temperature, torch.Generator().manual_seed(0), 4, config)
        assert drawn.shape == (2, count, 1, 4) and drawn.dtype == torch.float32
        bins = logits[:, :-1, config.vocab_size - 256 : config.vocab_size].double()
        wanted = (bins / temperature).exp()
        wanted = (wanted / wanted.sum(-1, keepdim=True)).flip(-1)  # ascending actions
        wanted = torch.cat([wanted[..., :254], wanted[..., 254:].sum(-1, keepdim=True)], -1)
        found = torch.stack(
            [(drawn.flatten(2) == centre).double().mean(1) for centre in bin_centers(config).float()], -1
        )
        torch.testing.assert_close(found.sum(-1), torch.ones(2, 4, dtype=torch.float64))
        sigma = (wanted * (1 - wanted) / count).sqrt()
        assert float(((found - wanted).abs() / (sigma + 1e-4)).max()) < 6
        assert torch.allclose(drawn.mean(1), expected_chunks(logits / temperature, 4, config), atol=0.02)


def test_a_cold_sample_is_the_policys_chunk(vla: LoadedVLA) -> None:
    logits, config = _logits(vla), vla.config
    logits[..., : config.vocab_size - 256] -= 200.0
    logits[..., config.vocab_size :] = -100.0
    drawn = sample_chunks(logits, 3, 1e-6, torch.Generator(), 4, config)
    assert torch.equal(drawn, decode(logits[:, :-1].argmax(-1), 4, config)[:, None].expand_as(drawn))


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 4), count=st.integers(1, 5))
def test_a_row_samples_alone_as_in_a_batch(rows: int, count: int) -> None:
    vla = _shared_vla()
    logits = _logits(vla, rows, 2)

    def draw(picked: list[int]) -> Tensor:
        return sample_chunks(
            logits[picked], count, 1.0, [torch.Generator().manual_seed(row) for row in picked], 4, vla.config
        )

    together = draw(list(range(rows)))
    for row in range(rows):
        assert torch.equal(draw([row])[0], together[row])


_SHARED: list[LoadedVLA] = []


def _shared_vla() -> LoadedVLA:
    if not _SHARED:
        from vla_energy.backbones.tiny import EMBEDDED

        _SHARED.append(load_openvla(EMBEDDED, use_proprio=True, discrete=True, action_dim=4))
    return _SHARED[0]


def test_bad_arguments(vla: LoadedVLA) -> None:
    logits, config = _logits(vla), vla.config
    with pytest.raises(ValueError, match="temperature=0"):
        sample_chunks(logits, 1, 0.0, torch.Generator(), 4, config)
    with pytest.raises(ValueError, match="3 generators for 2 rows"):
        sample_chunks(logits, 1, 1.0, [torch.Generator()] * 3, 4, config)
    with pytest.raises(ValueError, match="expected 5, the chunk's and the stop"):
        token_loss(logits, torch.full((2, 9), -100))


def test_one_pass_gives_chunk_tokens_and_context(vla: LoadedVLA) -> None:
    """The prediction is the likeliest token's; neither it nor the logits nor the context see the expert's chunk."""
    batch = _batch(vla)
    with torch.no_grad():
        trained = vla(batch)
    predicted = vla.predict(_batch(vla, train=False))
    assert trained.token_logits is not None and predicted.token_logits is not None
    torch.testing.assert_close(trained.token_logits, predicted.token_logits)
    assert torch.equal(predicted.actions, decode(predicted.token_logits[:, :-1].argmax(-1), 4, vla.config))
    full = vla.backbone.language_model.lm_head(trained.hidden_states[-1])
    for row, first in enumerate(trained.context_mask.sum(1).tolist()):
        torch.testing.assert_close(trained.token_logits[row], full[row, first : first + 33])


def test_loss_is_the_language_models(vla: LoadedVLA) -> None:
    """The slow twin shifts whole sequences, as a language model is trained."""
    batch = _batch(vla)
    out = vla(batch)
    logits = vla.backbone.language_model.lm_head(out.hidden_states[-1])[:, out.projector_features.shape[1] :]
    slow = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert out.token_logits is not None
    torch.testing.assert_close(token_loss(out.token_logits, batch["labels"]), slow)


def test_saved_folder_loads_to_the_same(vla: LoadedVLA, tmp_path: Path) -> None:
    """With adapters of the output embedding, which nothing reads beside an action head."""
    torch.manual_seed(0)
    add_lora(vla, 4, 0.0)
    with torch.no_grad():
        for name, parameter in vla.backbone.named_parameters():
            if "lm_head.lora_B" in name:
                parameter.normal_(0, 0.05)
    batch = _batch(vla, train=False)
    expected = vla.predict(batch)
    base = load_openvla(vla.folder, use_proprio=True)
    key = "language_model.lm_head.weight"
    assert not torch.equal(merged_state_dict(vla.backbone)[key], base.backbone.state_dict()[key])
    options: dict[str, Any] = {"processor_files": vla.folder, "statistics": vla.statistics, "dtype": torch.float32}
    (tmp_path / "action_head--1_checkpoint.pt").write_bytes(b"of an earlier run")
    folder = save_openvla(vla, tmp_path, 5, **options)
    assert not list(folder.glob("action_head*"))
    again = load_openvla(folder, use_proprio=True)
    assert again.discrete and again.action_dim == 4
    torch.testing.assert_close(again.predict(batch).token_logits, expected.token_logits, atol=2e-5, rtol=0)
    with pytest.raises(CheckpointFolderError, match="exactly one action_head"):
        load_openvla(folder, use_proprio=True, discrete=False)
    save_openvla(base, folder, 6, **options)
    assert "discrete_action_dim" not in json.loads((folder / "config.json").read_text())["vla_energy"]
    assert not load_openvla(folder, use_proprio=True).discrete


def test_it_learns_and_is_the_same_beside_a_head(tiny_folder: Path, tmp_path: Path) -> None:
    """A few steps on few frames: the loss falls, and the policy's weights do not depend on the energy head."""
    flags: dict[str, Any] = {"max_steps": 12, "learning_rate": 3e-3, "lora_dropout": 0.1, "save_freq": 100}
    on = _run(_tokens_config(tiny_folder, tmp_path / "on", energy=_samples(), **flags))
    off = _run(_tokens_config(tiny_folder, tmp_path / "off", energy=EnergyConfig(enabled=False), **flags))
    _equal(_policy_weights(on), _policy_weights(off))
    rows = [json.loads(row) for row in (tmp_path / "on" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all("energy/win_rate/layer_exits" not in row for row in rows), "nothing was ranked"
    assert any("energy/win_rate/policy" in row for row in rows)
    assert rows[-1]["train/cross_entropy"] < rows[0]["train/cross_entropy"] - 0.5
    assert {"train/accuracy_current", "train/binned_l1_next", "train/l1", "energy/negative/samples"} <= rows[0].keys()
    assert not any("layer_exit" in key for key in rows[0])


def test_two_steps_then_resume_equal_four(tiny_folder: Path, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"lora_dropout": 0.1, "energy": _samples()}
    whole = _run(_tokens_config(tiny_folder, tmp_path / "whole", max_steps=4, **flags))
    _run(_tokens_config(tiny_folder, tmp_path / "parts", max_steps=2, **flags))
    parts = _run(_tokens_config(tiny_folder, tmp_path / "parts", max_steps=4, resume=True, **flags))
    _equal(_policy_weights(whole), _policy_weights(parts))
    assert whole.head is not None and parts.head is not None
    _equal(whole.head.state_dict(), parts.head.state_dict())


def test_every_path_takes_the_checkpoint(tiny_folder: Path, tmp_path: Path) -> None:
    """Validation, memory, a head on the finished policy, rollouts with samples, preflight, the doctor; FiLM too."""
    config = _tokens_config(tiny_folder, tmp_path / "policy", use_film=True, use_val_set=True, energy=_samples(3))
    _run(config)
    folder = checkpoints.folder_of(config, 2)
    assert main(["memory", "--checkpoint", str(folder), *DATA, "--max-frames", "40"]) == 0
    energy = dataclasses.replace(_samples(3), freeze_backbone=True)
    head = _run(_tokens_config(folder, tmp_path / "head", use_film=True, use_val_set=True, energy=energy))
    final = checkpoints.folder_of(head.config, 2)

    reader = FrameReader(str(final), str(EMBEDDED_DATA), "metaworld_demo")
    candidates = CandidatesConfig(samples=3)
    whole = next(reader.read("val", 8, batch_size=8, candidates=candidates)).samples
    parts = [frames.samples for frames in reader.read("val", 8, batch_size=4, candidates=candidates)]
    assert reader.vla.discrete and whole is not None and whole.shape == (8, 3, 8, 4)
    assert torch.equal(whole, torch.cat([part for part in parts if part is not None]))
    assert main(["preflight", "--checkpoint", str(final), *DATA, "--max-frames", "16", "--out", str(tmp_path)]) == 0
    modes = json.loads((tmp_path / "preflight.json").read_text())["modes"]
    assert "sample" in modes["rerank"]["sources"] and "layer_exit" not in modes["rerank"]["sources"]

    policy = load_policy(str(final))
    assert {"policy", "rerank", "rerank+retrieve", "refine", "replan"} <= policy.arms
    seen, decide = [], policy._advisor.decide

    def keep(*args: Any) -> Any:
        seen.append(args[3])
        return decide(*args)

    policy._advisor.decide = keep  # type: ignore[method-assign]
    images = np.random.default_rng(0).integers(0, 255, (1, 96, 96, 3), dtype=np.uint8)
    request = Request(Observation(images, np.zeros(4, np.float32), TASKS[0]), torch.Generator())
    for arm in ("rerank", "rerank", "refine"):
        request.generator.manual_seed(5)
        policy.act([request], arm)
    assert seen[0]["sample"].chunks.shape == (1, 3, 8, 4) and "sample" not in seen[2]
    assert torch.equal(seen[0]["sample"].chunks, seen[1]["sample"].chunks)
    found = {finding.check: finding.status for finding in diagnose(Subject(final))}
    assert {found[name] for name in ("policy", "camera 1", "instruction", "components")} == {"ok"}


def test_the_hosts_folder_gets_marked(tiny_folder: Path, tmp_path: Path) -> None:
    """It does not say that it has tokens; a pass with the flag, here one that trains the head alone, says so."""
    options: dict[str, Any] = {"processor_files": tiny_folder, "statistics": load_openvla(tiny_folder).statistics}
    source = load_openvla(tiny_folder, use_proprio=True, discrete=True)
    folder = save_openvla(source, tmp_path / "host", 3, **options)
    config = json.loads((folder / "config.json").read_text())
    del config["vla_energy"]["discrete_action_dim"]
    (folder / "config.json").write_text(json.dumps(config))
    energy = EnergyConfig(freeze_backbone=True)
    with pytest.raises(CheckpointFolderError, match="discrete action tokens needs --use_l1_regression False"):
        Trainer(_config(folder, tmp_path / "l1", energy=energy))
    run = _run(_tokens_config(folder, tmp_path / "head", energy=energy, max_steps=1))
    marked = load_policy(str(checkpoints.folder_of(run.config, 1)))
    assert marked._vla.discrete and marked.action_dim == 4 and "rerank" in marked.arms


def test_bad_flags(tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(FlagError, match="--energy.negatives.samples.count 2 needs --use_l1_regression False"):
        Trainer(_config(tiny_folder, tmp_path, energy=_samples()))
    with pytest.raises(FlagError, match="--energy.candidates.samples 8 needs --use_l1_regression False"):
        Trainer(_config(tiny_folder, tmp_path, energy=EnergyConfig(candidates=CandidatesConfig(samples=8))))
    with pytest.raises(FlagError, match="has an L1 action head: pass --use_diffusion False"):
        Trainer(_config(tiny_folder, tmp_path, use_l1_regression=False, use_diffusion=True))
    with pytest.raises(FlagError, match=r"action head, and --energy.freeze_backbone True trains no tokens"):
        Trainer(_tokens_config(tiny_folder, tmp_path, energy=EnergyConfig(freeze_backbone=True)))
    layers = EnergyConfig()
    layers.negatives.layer_exits.layers = (1,)
    with pytest.raises(ValueError, match=r"layer 1 of layer_exits\.layers=\(1,\).*no inner layer"):
        Trainer(_tokens_config(tiny_folder, tmp_path, energy=layers))
    trainer = _run(_tokens_config(tiny_folder, tmp_path))
    assert "no layer exits" in caplog.text and "--energy.negatives.layer_exits.count 0" in caplog.text
    folder = checkpoints.folder_of(trainer.config, 2)
    with pytest.raises(FlagError, match="needs --use_l1_regression False, or --new_action_head True"):
        Trainer(_config(folder, tmp_path / "l1"))
    assert not Trainer(_config(folder, tmp_path / "l1", new_action_head=True)).job.vla.discrete
