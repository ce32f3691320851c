"""FiLM: openvla-oft's own numbers, its files in both directions, and training with it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import film_state
import golden_towers
import numpy as np
import pytest
import torch
from test_finetune import _config, _equal, _policy_weights, _run
from torch import Tensor

from vla_energy.backbones import CheckpointFolderError, LoadedVLA, load_openvla, save_openvla
from vla_energy.backbones.film import from_host, to_host
from vla_energy.backbones.lora import add_lora
from vla_energy.cli import main
from vla_energy.config import EnergyConfig
from vla_energy.doctor.command import diagnose
from vla_energy.doctor.findings import Subject
from vla_energy.finetune import checkpoints
from vla_energy.finetune.config import FlagError
from vla_energy.finetune.frames import FrameReader
from vla_energy.finetune.setup import EMBEDDED_DATA
from vla_energy.finetune.trainer import Trainer
from vla_energy.rollout.policy import load_policy

ROOT = Path(__file__).parents[1]
GOLDEN = Path(os.environ.get("VLA_ENERGY_GOLDEN", ROOT.parent / "shared" / "golden" / "openvla_oft"))
STORED = ROOT / "tests" / "golden" / "host_film.pt"
DATASET = "libero_spatial_no_noops"
TOLERANCE = 2e-5
TASKS = ["reach", "a task with a much longer instruction than the others"]

needs_golden = pytest.mark.skipif(
    not (GOLDEN / "tiny_ckpt").is_dir(), reason=f"no golden checkpoint in {GOLDEN}: set VLA_ENERGY_GOLDEN"
)
HOST_PYTHON, HOST_PATH = os.environ.get("VLA_ENERGY_HOST_PYTHON"), os.environ.get("VLA_ENERGY_HOST_PATH")
needs_host = pytest.mark.skipif(
    not (HOST_PYTHON and HOST_PATH),
    reason="needs VLA_ENERGY_HOST_PYTHON, an interpreter with openvla-oft's pins, and VLA_ENERGY_HOST_PATH, its "
    "checkout and src/ of its transformers fork and its dlimp, joined as in PYTHONPATH",
)


@pytest.fixture
def vla(tiny_folder: Path) -> LoadedVLA:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return load_openvla(tiny_folder, use_proprio=True, use_film=True)


def _batch(vla: LoadedVLA, tasks: list[str] = TASKS) -> dict[str, Tensor]:
    images = np.random.default_rng(0).integers(0, 255, (1, 1, 96, 96, 3), dtype=np.uint8).repeat(len(tasks), 0)
    return vla.processor.batch(images, tasks, None, np.zeros((len(tasks), 4), np.float32))


def _rows(vla: LoadedVLA, golden: dict[str, Any]) -> list[dict[str, Tensor]]:
    """What `host_film.answers` gives, by our backbone."""
    rows, batch = [], golden["batch"]
    for row, prompt in enumerate(golden["infer"]):
        proprio = None if batch["proprio"] is None else batch["proprio"][row : row + 1]
        out = vla.predict(
            {
                "pixel_values": batch["pixel_values"][row : row + 1],
                "input_ids": prompt["prompt_input_ids"],
                "attention_mask": prompt["attention_mask"],
                "proprio": proprio,
            }
        )
        raw = torch.from_numpy(vla.statistics[DATASET].unnormalize(out.actions[0]).values)
        first = int(out.context_mask.sum())
        patches = out.projector_features[0, : out.projector_features.shape[1] - (proprio is not None)]
        rows.append({"actions": raw, "states": out.hidden_states[-1][0, first : first + 56], "patches": patches})
    return rows


def _check(folder: Path, cases: dict[str, list[dict[str, Tensor]]]) -> None:
    golden_towers.register()
    for name, expected in cases.items():
        golden = torch.load(GOLDEN / f"{name}.pt", weights_only=True)
        vla = load_openvla(folder, num_images=golden["num_images"], use_proprio=golden["use_proprio"])
        assert vla.use_film
        for ours, theirs in zip(_rows(vla, golden), expected, strict=True):
            for key, value in theirs.items():
                torch.testing.assert_close(ours[key].float(), value, rtol=0, atol=TOLERANCE)


@pytest.fixture
def host_folder(tmp_path: Path) -> Path:
    """The golden checkpoint with the `vision_backbone` file that the host wrote with FiLM and LoRA of rank 4."""
    folder = film_state.copy_checkpoint(GOLDEN / "tiny_ckpt", tmp_path / "film")
    shapes = torch.load(STORED, weights_only=True)["shapes"]
    torch.save(film_state.film_state(folder, shapes), folder / film_state.NAME)
    return folder


def _host(out: Path, *folder: Path) -> dict[str, Any]:
    script = [str(HOST_PYTHON), str(ROOT / "tests" / "host_film.py"), str(GOLDEN), str(out), *map(str, folder)]
    paths = os.pathsep.join([str(HOST_PATH), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


@needs_golden
def test_equals_the_host(host_folder: Path) -> None:
    """1 and 2 images, with and without proprioception; its file has adapters of linear and convolution layers."""
    _check(host_folder, torch.load(STORED, weights_only=True)["cases"])


@needs_golden
@needs_host
def test_stored_numbers_are_the_hosts(tmp_path: Path) -> None:
    stored, now = torch.load(STORED, weights_only=True), _host(tmp_path / "now.pt")
    assert now["shapes"] == stored["shapes"]
    for name, rows in now["cases"].items():
        for row, expected in zip(rows, stored["cases"][name], strict=True):
            torch.testing.assert_close(row, expected, rtol=0, atol=TOLERANCE)


@needs_golden
@needs_host
@pytest.mark.parametrize("rank", [0, 8])
def test_the_host_runs_what_we_save(host_folder: Path, tmp_path: Path, rank: int) -> None:
    """Read by the host's own function, which takes no FiLM checkpoint without adapters."""
    vla = load_openvla(host_folder)
    if rank:
        torch.manual_seed(0)
        add_lora(vla, rank, 0.0)
        with torch.no_grad():
            for name, parameter in vla.backbone.vision_backbone.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.05)
    folder = save_openvla(
        vla, tmp_path / "ours", 5, processor_files=host_folder, statistics=vla.statistics, dtype=torch.float32
    )
    found = _host(tmp_path / "host.pt", folder)
    # The golden checkpoint's proprio projector is not in a folder that was loaded without.
    _check(folder, {name: rows for name, rows in found["cases"].items() if not name.startswith("B")})


@needs_golden
def test_a_file_of_the_host_keeps_its_names(host_folder: Path) -> None:
    """Ours has the tensors of the host's, by name and shape: it loads strictly."""
    golden_towers.register()
    theirs = torch.load(host_folder / film_state.NAME, weights_only=True)
    vla = load_openvla(host_folder)
    ours = to_host(vla.backbone, torch.float32)
    assert ours.keys() == theirs.keys()
    add_lora(vla, 4, 0.0)
    assert {name: value.shape for name, value in to_host(vla.backbone, torch.float32).items()} == {
        name: value.shape for name, value in theirs.items()
    }


def test_idle_layers_change_nothing_and_others_do(vla: LoadedVLA, tiny_folder: Path) -> None:
    plain = load_openvla(tiny_folder, use_proprio=True)
    assert not plain.use_film
    batch = _batch(plain)
    with torch.no_grad():
        for parameter in vla.backbone.vision_backbone.film.parameters():
            parameter.zero_()
    before = vla.predict(batch)
    torch.testing.assert_close(before.projector_features, plain.predict(batch).projector_features, atol=1e-5, rtol=0)
    for tower in ("featurizer", "fused_featurizer"):
        for part in ("scale", "shift"):
            layer = getattr(vla.backbone.vision_backbone.film[tower][1], part)
            with torch.no_grad():
                layer.weight.fill_(0.5)
            after = vla.predict(batch)
            with torch.no_grad():
                layer.weight.zero_()
            assert float((after.context[:, 1] - before.context[:, 1]).abs().max()) > 1e-4


def test_the_instruction_is_in_the_patches_and_padding_is_not(vla: LoadedVLA) -> None:
    """Both rows have the same image; a row alone gives the same as beside a longer one."""
    batch = _batch(vla)
    together = vla.predict(batch)
    patches = together.projector_features[:, :-1]
    assert float((patches[0] - patches[1]).abs().max()) > 1e-3
    for row, task in enumerate(TASKS):
        alone = vla.predict(_batch(vla, [task]))
        torch.testing.assert_close(together.projector_features[row], alone.projector_features[0], atol=2e-5, rtol=0)
        torch.testing.assert_close(together.actions[row], alone.actions[0], atol=2e-5, rtol=0)
    images = np.zeros((2, 1, 96, 96, 3), np.uint8)
    chunks = np.random.default_rng(1).uniform(-1, 1, (2, 2, 8, 4)).astype(np.float32)
    proprio = np.zeros((2, 4), np.float32)
    with torch.no_grad():
        first, other = (vla(vla.processor.batch(images, TASKS, chunk, proprio)).context for chunk in chunks)
    assert torch.equal(first, other)  # the expert's chunk does not reach the mean embedding


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("merge", [True, False])
def test_saved_folder_loads_to_the_same(vla: LoadedVLA, tmp_path: Path, rank: int, merge: bool) -> None:
    batch = _batch(vla)
    if rank:
        add_lora(vla, rank, 0.0)
        trained = {name for name, parameter in vla.backbone.named_parameters() if parameter.requires_grad}
        assert any(".film." in name for name in trained)
        assert all(".film." in name or ".lora_" in name for name in trained)
        with torch.no_grad():
            for name, parameter in vla.backbone.vision_backbone.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.05)
    expected = vla.predict(batch).actions
    options: dict[str, Any] = {"processor_files": vla.folder, "statistics": vla.statistics, "dtype": torch.float32}
    folder = save_openvla(vla, tmp_path, 5, merge=merge, **options)
    again = load_openvla(folder, use_proprio=True)
    torch.testing.assert_close(again.predict(batch).actions, expected, atol=2e-5, rtol=0)
    with pytest.raises(CheckpointFolderError, match="use_film"):
        load_openvla(folder, use_proprio=True, use_film=False)
    save_openvla(again, folder, 6, **options)
    assert [path.name for path in folder.glob("vision_backbone*")] == ["vision_backbone--6_checkpoint.pt"]
    plain = load_openvla(vla.folder, use_proprio=True)
    save_openvla(plain, folder, 7, **options)
    assert not list(folder.glob("vision_backbone*"))


def test_adapters_are_folded_in(vla: LoadedVLA) -> None:
    """`from_host` against peft's own merge, of linear layers and of a convolution, above rank 16 too."""
    add_lora(vla, 24, 0.0)
    with torch.no_grad():
        for name, parameter in vla.backbone.vision_backbone.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    ours = from_host(to_host(vla.backbone, torch.float32))
    merged = vla.backbone.merge_and_unload().state_dict()
    wanted = {name: value for name, value in merged.items() if name.startswith("vision_backbone.")}
    assert ours.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=0)


def test_damaged_files_are_named(vla: LoadedVLA, tmp_path: Path) -> None:
    save_openvla(vla, tmp_path, 1, processor_files=vla.folder, statistics=vla.statistics)
    path = tmp_path / "vision_backbone--1_checkpoint.pt"
    state = torch.load(path, weights_only=True)
    torch.save({name: value for name, value in state.items() if "blocks.2.shift.bias" not in name}, path)
    with pytest.raises(CheckpointFolderError, match=r"missing vision_backbone\.film\.featurizer\.2\.shift\.bias"):
        load_openvla(tmp_path, use_proprio=True)
    torch.save(state, tmp_path / "vision_backbone--2_checkpoint.pt")
    with pytest.raises(CheckpointFolderError, match="exactly one vision_backbone"):
        load_openvla(tmp_path, use_proprio=True)
    for file in tmp_path.glob("vision_backbone*"):
        file.unlink()
    for asked in (None, True, False):
        with pytest.raises(
            CheckpointFolderError, match=r"trained with FiLM, but has no vision_backbone--\*_checkpoint"
        ):
            load_openvla(tmp_path, use_proprio=True, use_film=asked)


def test_two_steps_then_resume_equal_four(tiny_folder: Path, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"use_film": True, "lora_dropout": 0.1}
    whole = _run(_config(tiny_folder, tmp_path / "whole", max_steps=4, **flags))
    _run(_config(tiny_folder, tmp_path / "parts", max_steps=2, **flags))
    parts = _run(_config(tiny_folder, tmp_path / "parts", max_steps=4, resume=True, **flags))
    _equal(_policy_weights(whole), _policy_weights(parts))
    start = Trainer(_config(tiny_folder, tmp_path / "start", **flags))
    for name, value in _policy_weights(start).items():
        if ".film." in name and ".3." not in name:  # the last block's output is never read
            assert not torch.equal(value, _policy_weights(whole)[name]), name
    off = _run(_config(tiny_folder, tmp_path / "off", max_steps=4, energy=EnergyConfig(enabled=False), **flags))
    _equal(_policy_weights(whole), _policy_weights(off))


def test_every_path_takes_the_checkpoint(tiny_folder: Path, tmp_path: Path) -> None:
    """Validation, memory, a head on the finished policy, rollouts' policy, the doctor."""
    config = _config(tiny_folder, tmp_path / "policy", use_film=True, use_val_set=True, val_freq=2)
    trained = _run(config)
    folder = checkpoints.folder_of(config, 2)
    data = ["--data-root-dir", str(EMBEDDED_DATA), "--dataset-name", "metaworld_demo"]
    assert main(["memory", "--checkpoint", str(folder), *data, "--max-frames", "40"]) == 0
    reader = FrameReader(str(folder), str(EMBEDDED_DATA), "metaworld_demo")
    frames = next(reader.read("train", 8, batch_size=8))
    assert reader.vla.use_film and frames.policy.shape == (8, 8, 4)
    with pytest.raises(FlagError, match="--use_film True"):
        Trainer(_config(folder, tmp_path / "refused"))
    with pytest.raises(FlagError, match=r"--use_film True: .* --energy.freeze_backbone True"):
        energy = EnergyConfig(freeze_backbone=True)
        Trainer(_config(tiny_folder, tmp_path / "refused", use_film=True, energy=energy))
    head = _run(_config(folder, tmp_path / "head", use_film=True, energy=EnergyConfig(freeze_backbone=True)))
    final = checkpoints.folder_of(head.config, 2)
    policy = load_policy(str(final))
    assert policy._vla.use_film and "rerank" in policy.arms
    batch = _batch(trained.job.vla)
    # In bf16 on disk, twice.
    torch.testing.assert_close(
        policy._vla.predict(batch).actions, trained.job.vla.predict(batch).actions, atol=0.1, rtol=0
    )
    (final / "lora_adapter").mkdir()
    (final / "lora_adapter" / "adapter_config.json").write_text("{}")
    found = {finding.check: finding for finding in diagnose(Subject(final))}
    assert {found[name].status for name in ("policy", "instruction", "components")} == {"ok"}
    assert found["LoRA merge"].status == "not checked" and "FiLM" in found["LoRA merge"].text
