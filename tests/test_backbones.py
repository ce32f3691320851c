"""The native backbone without the goldens: attention, batching, padding, saving, LoRA."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vla_energy.actions import DatasetStatistics
from vla_energy.backbones import CheckpointFolderError, LoadedVLA, load_openvla, save_openvla
from vla_energy.backbones.lora import add_lora, merged_state_dict

TASKS = ["reach", "button press topdown", "a task with a much longer instruction than the others"]


@pytest.fixture
def vla(tiny_folder: Path) -> LoadedVLA:
    return load_openvla(tiny_folder, use_proprio=True)


def _images(count: int, cameras: int = 1) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 255, (count, cameras, 96, 96, 3), dtype=np.uint8)


def _batch(vla: LoadedVLA, *, train: bool) -> dict[str, Tensor]:
    rng = np.random.default_rng(0)
    proprio = rng.normal(size=(3, 4)).astype(np.float32)
    actions = rng.uniform(-1, 1, (3, 8, 4)).astype(np.float32) if train else None
    return vla.processor.batch(_images(3), TASKS, actions, proprio)


def test_batched_prediction_equals_one_by_one(vla: LoadedVLA) -> None:
    batch = _batch(vla, train=False)
    together = vla.predict(batch)
    for row, task in enumerate(TASKS):
        single = vla.processor.batch(_images(3)[row : row + 1], [task], None, batch["proprio"][row : row + 1])
        alone = vla.predict(single)
        torch.testing.assert_close(together.actions[row : row + 1], alone.actions, atol=2e-5, rtol=0)
        length = int(alone.context_mask.sum())
        assert int(together.context_mask[row].sum()) == length
        torch.testing.assert_close(together.context[row, :length], alone.context[0, :length], atol=2e-5, rtol=0)


def test_training_and_inference_see_the_same(vla: LoadedVLA) -> None:
    """The expert's chunk is in the labels alone: it must leak neither into the context nor into the prediction."""
    with torch.no_grad():
        trained = vla(_batch(vla, train=True))
    predicted = vla.predict(_batch(vla, train=False))
    torch.testing.assert_close(trained.actions, predicted.actions)
    torch.testing.assert_close(trained.layer_actions, predicted.layer_actions)
    assert torch.equal(trained.context_mask, predicted.context_mask)
    again = vla.predict(_batch(vla, train=True))  # a batch with labels: the prompt is cut out of it
    torch.testing.assert_close(again.actions, predicted.actions)


def test_attention_is_bidirectional_and_padding_is_not_seen(vla: LoadedVLA) -> None:
    batch = _batch(vla, train=True)
    with torch.no_grad():
        before = vla(batch)
        changed = {**batch, "input_ids": batch["input_ids"].clone()}
        last_prompt = int(before.context_mask[0].sum()) - before.projector_features.shape[1] - 1
        changed["input_ids"][0, last_prompt] += 1
        after = vla(changed)
        padded = {**batch, "input_ids": torch.where(batch["attention_mask"], batch["input_ids"], 7)}
        other_padding = vla(padded)
    # The state of the first patch moves when a later prompt token changes: a causal model would not notice.
    assert float((after.context[0, 1] - before.context[0, 1]).abs().max()) > 1e-4
    assert torch.equal(after.context[1], before.context[1])
    torch.testing.assert_close(other_padding.actions, before.actions)


def test_vision_and_proprio_are_used(vla: LoadedVLA) -> None:
    batch = _batch(vla, train=False)
    base = vla.predict(batch).actions
    for key in ("pixel_values", "proprio"):
        assert float((vla.predict({**batch, key: -batch[key]}).actions - base).abs().max()) > 1e-4


def test_layer_exits(vla: LoadedVLA) -> None:
    batch = _batch(vla, train=True)
    with torch.no_grad():
        raw, normed, off = (vla(batch, exits) for exits in ("raw", "normed", "off"))
    assert raw.layer_actions is not None and normed.layer_actions is not None and off.layer_actions is None
    assert raw.layer_actions.shape == (3, vla.num_layers + 1, 8, 4) and len(raw.hidden_states) == vla.num_layers + 1
    assert torch.equal(raw.layer_actions[:, -1], off.actions) and torch.equal(normed.layer_actions[:, -1], off.actions)
    # The embeddings are zero at the action positions but for the prompt's last token: the same for every sample.
    inner = [vla.backbone.language_model.model.norm(layer) for layer in raw.hidden_states[:-1]]
    rows, start = torch.arange(3)[:, None], raw.context_mask.sum(1, keepdim=True)
    for layer, states in enumerate(inner):
        with torch.no_grad():
            slow = vla.action_head(states[rows, start + torch.arange(32)])
        torch.testing.assert_close(normed.layer_actions[:, layer], slow)


def test_saved_folder_loads_to_the_same(vla: LoadedVLA, tmp_path: Path) -> None:
    batch = _batch(vla, train=False)
    expected = vla.predict(batch).actions
    folder = save_openvla(vla, tmp_path, 5, processor_files=vla.folder, statistics=vla.statistics, dtype=torch.float32)
    again = load_openvla(folder, use_proprio=True)
    assert torch.equal(again.predict(batch).actions, expected)
    assert again.horizon == vla.horizon and again.statistics.keys() == vla.statistics.keys()
    save_openvla(again, folder, 6, processor_files=folder, statistics=vla.statistics)
    assert [path.name for path in folder.glob("action_head*")] == ["action_head--6_checkpoint.pt"]
    torch.testing.assert_close(
        load_openvla(folder, use_proprio=True).predict(batch).actions, expected, atol=0.1, rtol=0
    )


@pytest.mark.parametrize("merge", [True, False])
def test_who_may_read_the_folder_may_read_its_weights(tiny_folder: Path, merge: bool, tmp_path: Path) -> None:
    """safetensors makes its files for the owner alone: on a shared machine nobody else could load the checkpoint."""
    vla = load_openvla(tiny_folder)
    add_lora(vla, rank=2, dropout=0.0)
    before = os.umask(0o027)
    try:
        save_openvla(vla, tmp_path, 1, processor_files=tiny_folder, statistics=vla.statistics, merge=merge)
    finally:
        os.umask(before)
    names = ["model.safetensors", *([] if merge else ["lora_adapter/adapter_model.safetensors"])]
    assert [oct((tmp_path / name).stat().st_mode & 0o777) for name in names] == ["0o640"] * len(names)


def test_sharded_weights_and_bare_component_keys(tiny_folder: Path, vla: LoadedVLA, tmp_path: Path) -> None:
    for path in tiny_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(state)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in halves.items():
        save_file({key: state[key] for key in keys}, tmp_path / file)
    weight_map = {key: file for file, keys in halves.items() for key in keys}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name in ("action_head", "proprio_projector"):
        path = tmp_path / f"{name}--0_checkpoint.pt"
        bare = {k.removeprefix("module."): v for k, v in torch.load(path, weights_only=True).items()}
        torch.save(bare, path)
    batch = _batch(vla, train=False)
    assert torch.equal(load_openvla(tmp_path, use_proprio=True).predict(batch).actions, vla.predict(batch).actions)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointFolderError, match="model-00002-of-00002"):
        load_openvla(tmp_path, use_proprio=True)


def test_fresh_lora_changes_nothing_and_merging_is_equal(vla: LoadedVLA) -> None:
    batch = _batch(vla, train=False)
    base, keys = vla.predict(batch).actions, set(vla.backbone.state_dict())
    add_lora(vla, rank=32, dropout=0.0)
    assert torch.equal(vla.predict(batch).actions, base)
    with torch.no_grad():
        for name, parameter in vla.backbone.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    adapted = vla.predict(batch).actions
    assert float((adapted - base).abs().max()) > 1e-3
    before = {name: value.clone() for name, value in vla.backbone.state_dict().items()}
    merged = merged_state_dict(vla.backbone)
    assert set(merged) == keys
    assert all(torch.equal(value, before[name]) for name, value in vla.backbone.state_dict().items())
    plain = load_openvla(vla.folder, use_proprio=True)
    plain.backbone.load_state_dict(merged)
    torch.testing.assert_close(plain.predict(batch).actions, adapted, atol=2e-5, rtol=0)


def test_two_images(tiny_folder: Path, statistics: DatasetStatistics) -> None:
    vla = load_openvla(tiny_folder, num_images=2, use_proprio=True)
    proprio = np.zeros((2, 4), np.float32)
    batch = vla.processor.batch(_images(2, cameras=2), TASKS[:2], None, proprio)
    out = vla.predict(batch)
    assert out.projector_features.shape[1] == 2 * 64 + 1
    swapped = vla.processor.batch(_images(2, cameras=2)[:, ::-1].copy(), TASKS[:2], None, proprio)
    assert float((vla.predict(swapped).actions - out.actions).abs().max()) > 1e-4
    with pytest.raises(ValueError, match="2 image"):
        vla.predict(vla.processor.batch(_images(2), TASKS[:2], None, proprio))


def test_bad_batches(vla: LoadedVLA) -> None:
    batch = _batch(vla, train=True)
    with pytest.raises(ValueError, match="lacks proprio"):
        vla({key: value for key, value in batch.items() if key != "proprio"})
    with pytest.raises(ValueError, match="pad on the right"):
        vla({**batch, "attention_mask": batch["attention_mask"].flip(1)})
    with pytest.raises(ValueError, match="action tokens a row"):
        vla({**batch, "labels": torch.full_like(batch["labels"], -100)})
    with pytest.raises(ValueError, match="uint8"):
        vla.processor.pixel_values(np.zeros((1, 1, 96, 96, 3), np.float32))
    with pytest.raises(ValueError, match="3 dimensions"):
        vla({**batch, "proprio": torch.zeros(3, 3)})
