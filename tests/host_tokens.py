"""What openvla-oft computes with discrete action tokens on the golden cases, in its environment (`test_tokens.py`).

python tests/host_tokens.py GOLDEN_FOLDER OUT
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import golden_towers
import torch
from torch import Tensor

DATASET = "libero_spatial_no_noops"
CASES = ("A_1img_noproprio_b1", "B_2img_proprio_b2_samelen", "D_1img_noproprio_b3_rightpad")
ACTION_IDS = slice(31744, 32000)
FACTOR = 4.0
"""The golden model's output rows of action ids are made so many times larger: random ones would say text."""


@torch.no_grad()
def answers(vla: Any, projector: Any, golden: dict[str, Any]) -> dict[str, Any]:
    """Training's loss and metrics of a batch, computed as its `run_forward_pass` does, and each row's raw actions."""
    utils: Any = importlib.import_module("prismatic.training.train_utils")
    tokenizer: Any = importlib.import_module("prismatic.vla.action_tokenizer")
    batch = golden["batch"]
    vla.vision_backbone.set_num_images_in_input(golden["num_images"])
    out = vla(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"],
        pixel_values=batch["pixel_values"].float(), output_projector_features=True,
        proprio=batch["proprio"], proprio_projector=projector,
    )  # fmt: skip
    truth = batch["labels"][:, 1:]
    chosen = out.logits[:, out.projector_features.shape[1] : -1].argmax(dim=2)
    bins = tokenizer.ActionTokenizer(SimpleNamespace(vocab_size=32000))
    result: dict[str, Any] = {"loss": out.loss, "rows": []}
    masks = {"current": utils.get_current_action_mask(truth), "next": utils.get_next_actions_mask(truth)}
    for name, mask in masks.items():
        result[f"accuracy_{name}"] = utils.compute_token_accuracy(chosen, truth, mask=mask)
        result[f"binned_l1_{name}"] = utils.compute_actions_l1_loss(bins, chosen, truth, mask=mask).float()
    for row, prompt in enumerate(golden["infer"]):
        actions, _ = vla.predict_action(
            input_ids=prompt["prompt_input_ids"], unnorm_key=DATASET, attention_mask=prompt["attention_mask"],
            pixel_values=batch["pixel_values"][row : row + 1].float(), proprio_projector=projector,
            proprio=None if projector is None else batch["proprio"][row].numpy(),
        )  # fmt: skip
        result["rows"].append(torch.as_tensor(actions).float())
    return result


def main() -> None:
    golden, out = Path(sys.argv[1]), Path(sys.argv[2])
    golden_towers.register()
    torch.set_num_threads(1)
    modeling: Any = importlib.import_module("prismatic.extern.hf.modeling_prismatic")
    configuration: Any = importlib.import_module("prismatic.extern.hf.configuration_prismatic")
    projectors: Any = importlib.import_module("prismatic.models.projectors")
    folder = golden / "tiny_ckpt"
    config = configuration.OpenVLAConfig.from_pretrained(folder)
    vla = modeling.OpenVLAForActionPrediction.from_pretrained(folder, config=config, torch_dtype=torch.float32).eval()
    vla.norm_stats = json.loads((folder / "dataset_statistics.json").read_text())
    vla.language_model.lm_head.weight.data[ACTION_IDS] *= FACTOR
    found = {}
    for name in CASES:
        case = torch.load(golden / f"{name}.pt", weights_only=True)
        projector = None
        if case["use_proprio"]:
            (path,) = folder.glob("proprio_projector--*")
            state: dict[str, Tensor] = torch.load(path, weights_only=True)
            projector = projectors.ProprioProjector(vla.llm_dim, case["batch"]["proprio"].shape[1])
            projector.load_state_dict({key.removeprefix("module."): value.float() for key, value in state.items()})
        found[name] = answers(vla, projector, case)
    torch.save(found, out)


if __name__ == "__main__":
    main()
