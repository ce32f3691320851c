"""What openvla-oft's own FiLM computes on the golden cases. Runs in the host's environment, see `test_film.py`.

python tests/host_film.py GOLDEN_FOLDER OUT [FOLDER]

Without FOLDER the golden checkpoint gets drawn FiLM layers and adapters of rank 4; with it, that folder's own are
loaded, as the host's evaluation does.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import film_state
import golden_towers
import torch
from torch import Tensor

RANK = 4
DATASET = "libero_spatial_no_noops"
CASES = ("A_1img_noproprio_b1", "B_2img_proprio_b2_samelen", "D_1img_noproprio_b3_rightpad")


def load(folder: Path, film_from: Path | None, rank: int) -> tuple[Any, dict[str, Tensor]]:
    """The host's model in fp32 with FiLM, and the state of its vision backbone."""
    modeling: Any = importlib.import_module("prismatic.extern.hf.modeling_prismatic")
    configuration: Any = importlib.import_module("prismatic.extern.hf.configuration_prismatic")
    config = configuration.OpenVLAConfig.from_pretrained(folder)
    vla = modeling.OpenVLAForActionPrediction.from_pretrained(folder, config=config, torch_dtype=torch.float32)
    if film_from is not None:
        # Its own function, as `run_libero_eval.py` calls it; the towers are cast back to fp32 from the file.
        utils: Any = importlib.import_module("experiments.robot.openvla_utils")
        vla = utils._apply_film_to_vla(vla, SimpleNamespace(lora_rank=rank, pretrained_checkpoint=str(film_from)))
        (path,) = film_from.glob("vision_backbone--*")
        state = torch.load(path, weights_only=True)
        vla.vision_backbone.float().load_state_dict(state)
    else:
        peft: Any = importlib.import_module("peft")
        film: Any = importlib.import_module("prismatic.models.film_vit_wrapper")
        options = {"r": rank, "lora_alpha": min(rank, 16), "init_lora_weights": "gaussian"}
        vla = peft.get_peft_model(vla, peft.LoraConfig(target_modules="all-linear", **options))
        vla.model.vision_backbone = film.FiLMedPrismaticVisionBackbone(vla.model.vision_backbone, vla.llm_dim)
        shapes = {name: tuple(value.shape) for name, value in vla.vision_backbone.state_dict().items()}
        state = film_state.film_state(folder, shapes)
        vla.model.vision_backbone.load_state_dict(state)
        vla = vla.model
    return vla.eval(), state


@torch.no_grad()
def answers(vla: Any, folder: Path, golden: dict[str, Any]) -> list[dict[str, Tensor]]:
    """`predict_action` on every row of a case: raw actions `(H,A)`, its action states and its projected patches."""
    heads: Any = importlib.import_module("prismatic.models.action_heads")
    projectors: Any = importlib.import_module("prismatic.models.projectors")
    head = heads.L1RegressionActionHead(input_dim=vla.llm_dim, hidden_dim=vla.llm_dim, action_dim=7)
    head.load_state_dict(_component(folder, "action_head"))
    projector = None
    if golden["use_proprio"]:
        projector = projectors.ProprioProjector(vla.llm_dim, golden["batch"]["proprio"].shape[1])
        projector.load_state_dict(_component(folder, "proprio_projector"))
        projector.eval()
    vla.norm_stats = json.loads((folder / "dataset_statistics.json").read_text())
    vla.vision_backbone.set_num_images_in_input(golden["num_images"])
    rows = []
    for row, prompt in enumerate(golden["infer"]):
        batch, kept = golden["batch"], []
        handle = vla.projector.register_forward_hook(lambda _module, _args, output, kept=kept: kept.append(output))
        actions, states = vla.predict_action(
            input_ids=prompt["prompt_input_ids"], unnorm_key=DATASET, attention_mask=prompt["attention_mask"],
            pixel_values=batch["pixel_values"][row : row + 1].float(), action_head=head.eval(), use_film=True,
            proprio=None if projector is None else batch["proprio"][row].numpy(), proprio_projector=projector,
        )  # fmt: skip
        handle.remove()
        rows.append(
            {"actions": torch.as_tensor(actions).float(), "states": states[0].clone(), "patches": kept[0][0].clone()}
        )
    return rows


def _component(folder: Path, name: str) -> dict[str, Tensor]:
    (path,) = folder.glob(f"{name}--*")
    return {key.removeprefix("module."): value.float() for key, value in torch.load(path, weights_only=True).items()}


def main() -> None:
    golden, out = Path(sys.argv[1]), Path(sys.argv[2])
    film_from = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    golden_towers.register()
    torch.set_num_threads(1)
    folder = golden / "tiny_ckpt"
    found: dict[str, Any] = {}
    rank = RANK
    if film_from is not None:
        (path,) = film_from.glob("vision_backbone--*")
        rank = len(next(v for k, v in torch.load(path, weights_only=True).items() if ".lora_A." in k))
    vla, state = load(folder, film_from, rank)
    for name in CASES:
        found[name] = answers(vla, folder, torch.load(golden / f"{name}.pt", weights_only=True))
    torch.save({"shapes": {name: list(value.shape) for name, value in state.items()}, "cases": found}, out)


if __name__ == "__main__":
    main()
