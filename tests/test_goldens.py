"""The native backbone against stored outputs of the real openvla-oft code, within 2e-5 in fp32."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import golden_towers
import pytest
import torch
from torch import Tensor

from vla_energy.backbones import LoadedVLA, load_openvla
from vla_energy.backbones.processor import Processor

ROOT = Path(__file__).parents[1]
FOLDER = Path(os.environ.get("VLA_ENERGY_GOLDEN", ROOT.parent / "shared" / "golden" / "openvla_oft"))
TOLERANCE = 2e-5
CASES = sorted(FOLDER.glob("[A-Z]_*.pt")) if FOLDER.is_dir() else []
DATASET = "libero_spatial_no_noops"


def test_goldens_are_there() -> None:
    if CASES:
        return
    message = f"no golden cases in {FOLDER}; set VLA_ENERGY_GOLDEN to the folder that has them"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


def _load(golden: dict[str, Any]) -> LoadedVLA:
    golden_towers.register()
    return load_openvla(
        FOLDER / "tiny_ckpt", torch.float32, num_images=golden["num_images"], use_proprio=golden["use_proprio"]
    )


def _close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=TOLERANCE)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> dict[str, Any]:
    return torch.load(request.param, weights_only=True)


@pytest.mark.parametrize("golden", CASES, indirect=True, ids=lambda path: path.stem)
def test_forward_equals_the_host(golden: dict[str, Any]) -> None:
    vla = _load(golden)
    with torch.no_grad():
        out = vla(golden["batch"])
    assert len(out.hidden_states) == len(golden["hidden_states"])
    for actual, expected in zip(out.hidden_states, golden["hidden_states"], strict=True):
        _close(actual, expected)
    _close(out.projector_features, golden["projector_features"])
    assert torch.equal(out.context_mask, ~golden["context_mask"])
    assert out.layer_actions is not None
    _close(out.layer_actions, torch.stack(golden["layer_actions"], dim=1))
    _close(out.actions, golden["predicted_actions"])
    assert torch.equal(out.layer_actions[:, -1], out.actions)
    assert float((out.actions - golden["batch"]["actions"]).abs().mean()) == pytest.approx(
        float(golden["l1_loss"]), abs=TOLERANCE
    )


@pytest.mark.parametrize("golden", CASES, indirect=True, ids=lambda path: path.stem)
def test_inference_equals_the_host(golden: dict[str, Any]) -> None:
    """Unnormalised actions as `predict_action` returns them, one by one as the host does, and batched."""
    vla = _load(golden)
    batch, prompts = golden["batch"], golden["infer"]
    rows = []
    for row, expected in enumerate(prompts):
        single = {
            "pixel_values": batch["pixel_values"][row : row + 1],
            "input_ids": expected["prompt_input_ids"],
            "attention_mask": expected["attention_mask"],
            "proprio": None if batch["proprio"] is None else batch["proprio"][row : row + 1],
        }
        actions = vla.predict(single).actions
        raw = torch.from_numpy(vla.statistics[DATASET].unnormalize(actions[0]).values)
        _close(raw, expected["actions_unnorm"])
        rows.append(actions)
    ids = torch.nn.utils.rnn.pad_sequence(
        [prompt["prompt_input_ids"][0] for prompt in prompts], batch_first=True, padding_value=32000
    )
    lengths = torch.tensor([prompt["prompt_input_ids"].shape[1] for prompt in prompts])
    together = {
        "pixel_values": batch["pixel_values"],
        "input_ids": ids,
        "attention_mask": torch.arange(ids.shape[1]) < lengths[:, None],
        "proprio": batch["proprio"],
    }
    _close(vla.predict(together).actions, torch.cat(rows))


@pytest.mark.parametrize("golden", CASES, indirect=True, ids=lambda path: path.stem)
def test_prompts_and_labels_equal_the_host(golden: dict[str, Any]) -> None:
    processor: Processor = _load(golden).processor
    batch = golden["batch"]
    for row, text in enumerate(golden["prompts"]):
        ids = processor.prompt_ids(text)
        assert ids[:-1] == golden["infer"][row]["prompt_input_ids"][0].tolist()
        assert ids == batch["input_ids"][row, : len(ids)].tolist()
        labels = batch["labels"][row]
        tokens = labels[labels > 31743]
        # The labels are the host's own discretisation of the same actions.
        assert torch.equal(processor.action_ids(batch["actions"][row : row + 1])[0], tokens)
