"""The tiny model with Llama's token ids, for openvla-oft: the same answers, and rows where the host looks for them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import embedding

from vla_energy.backbones import CheckpointFolderError, LoadedVLA, host_export, load_openvla, timm_models
from vla_energy.backbones.host_export import export_for_host

TASKS = ["reach", "button press topdown"]


def _predict(vla: LoadedVLA) -> dict[str, torch.Tensor]:
    images = np.random.default_rng(0).integers(0, 255, (2, 1, 96, 96, 3), dtype=np.uint8)
    output = vla.predict(vla.processor.batch(images, TASKS, None, np.zeros((2, 4), np.float32)))
    return {"actions": output.actions, "context": output.context, "mask": output.context_mask}


def test_every_answer_is_the_same(tiny_folder: Path, tmp_path: Path) -> None:
    (folder := tmp_path / "ours").mkdir()
    shutil.copytree(tiny_folder, folder, dirs_exist_ok=True)
    (folder / "energy_gates.json").write_text("{}")
    exported = export_for_host(folder, tmp_path / "host")
    one, other = (_predict(load_openvla(path, use_proprio=True)) for path in (folder, exported))
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    assert {path.name for path in exported.iterdir()} == {path.name for path in folder.iterdir()}


def test_the_host_finds_what_it_asks_for(tiny_folder: Path, tmp_path: Path) -> None:
    """Its ids of the blank (29871), the stop (2) and the actions (31744 on), by a lookup as its code does it."""
    exported = export_for_host(tiny_folder, tmp_path / "host")
    modes = {(exported / name).stat().st_mode for name in ("model.safetensors", "config.json")}
    assert len(modes) == 1, "safetensors makes its files for the owner alone"
    old, new = (load_file(path / "model.safetensors") for path in (tiny_folder, exported))
    vla = load_openvla(tiny_folder, use_proprio=True)
    for key in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        ids = torch.tensor([29871, 2, *range(31744, 32000)])
        ours = torch.tensor([vla.config.empty_token_id, 2, *range(vla.config.action_token_begin + 1, 768)])
        assert torch.equal(embedding(ids, new[key]), embedding(ours, old[key])), key
        assert new[key].shape[0] == 32064
    assert all(torch.equal(old[key], new[key]) for key in old if new[key].shape == old[key].shape)
    assert old.keys() == new.keys()
    assert load_openvla(exported, use_proprio=True).config.action_token_begin == 31743, "the host's constant"


def test_files_are_as_old_libraries_read_them(tiny_folder: Path, tmp_path: Path) -> None:
    exported = export_for_host(tiny_folder, tmp_path / "host")
    merges = json.loads((exported / "tokenizer.json").read_text())["model"]["merges"]
    assert merges and all(isinstance(merge, str) and len(merge.split(" ")) == 2 for merge in merges)
    assert json.loads((exported / "preprocessor_config.json").read_text())["processor_class"] == "PrismaticProcessor"


def test_what_cannot_be_exported_is_refused(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exported = export_for_host(tiny_folder, tmp_path / "host")
    with pytest.raises(FileExistsError):
        export_for_host(tiny_folder, exported)
    config = json.loads((exported / "config.json").read_text())
    del config["vla_energy"]["empty_token_id"]  # what a checkpoint of the host's says
    (exported / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointFolderError, match="Llama's token ids already"):
        export_for_host(exported, tmp_path / "again")
    unmerged = tmp_path / "unmerged"
    shutil.copytree(tiny_folder, unmerged)
    (unmerged / "lora_adapter").mkdir()
    with pytest.raises(CheckpointFolderError, match="export a merged checkpoint"):
        export_for_host(unmerged, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    monkeypatch.setattr(sys, "argv", ["host_export", str(unmerged), str(tmp_path / "again")])
    assert host_export.main() == 2 and "error: " in capsys.readouterr().err


def test_timm_knows_our_towers(tiny_folder: Path) -> None:
    """As the host asks for them: by name, with the arguments it gives."""
    import timm

    timm_models.register()
    timm_models.register()
    backbone = load_openvla(tiny_folder).backbone.vision_backbone
    for name, ours in zip(timm_models.OWN_MODELS, (backbone.featurizer, backbone.fused_featurizer), strict=True):
        tower = timm.create_model(name, pretrained=False, num_classes=0, img_size=(96, 96), act_layer=None)
        assert {k: v.shape for k, v in tower.state_dict().items()} == {k: v.shape for k, v in ours.state_dict().items()}
