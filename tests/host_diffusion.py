"""openvla-oft's own diffusion head on a folder of ours, for `test_diffusion_host.py`; run by the host's Python.

    PYTHONPATH=CHECKOUT:TRANSFORMERS/src:DLIMP:HERE:REPOSITORY python host_diffusion.py FOLDER INPUTS OUTPUTS

FOLDER has the model and its components; INPUTS is what the host is asked, OUTPUTS what it answers, by torch.save.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import golden_towers
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler  # type: ignore[import-not-found]

from vla_energy.doctor.host_model import _heads, _projectors, _vla
from vla_energy.doctor.policy import component, read_config


def schedule(inputs: dict[str, Any]) -> dict[str, Any]:
    """What the host's scheduler makes of given chunks and predicted noise."""
    scheduler = DDIMScheduler(num_train_timesteps=inputs["train"], beta_schedule="squaredcos_cap_v2")
    scheduler.set_timesteps(inputs["steps"])
    chunk, chunks = inputs["start"], []
    for timestep, predicted in zip(scheduler.timesteps, inputs["predicted"]):  # noqa: B905
        chunk = scheduler.step(predicted, timestep, chunk).prev_sample
        chunks.append(chunk)
    noised = scheduler.add_noise(inputs["chunks"], inputs["noise"], inputs["at"])
    return {"kept": scheduler.alphas_cumprod, "timesteps": scheduler.timesteps, "chunks": chunks, "noised": noised}


@torch.no_grad()
def main(folder: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    """Predicted noise of the batch, and a chunk for each row's prompt and starting noise."""
    golden_towers.register()
    vla = _vla(folder, torch.float32, read_config(folder)).eval()
    vla._unnormalize_actions = lambda chunk, key: chunk
    vla.vision_backbone.set_num_images_in_input(inputs["num_images"])
    width, train = vla.llm_dim, inputs["train"]
    head = _heads.DiffusionActionHead(width, width, 7, num_diffusion_steps_train=train)
    head.load_state_dict(component(folder, "action_head"))
    noisy = _projectors.NoisyActionProjector(width)
    noisy.load_state_dict(component(folder, "noisy_action_projector"))
    proprio = None
    if (weights := component(folder, "proprio_projector")) is not None:
        proprio = _projectors.ProprioProjector(width, weights["fc1.weight"].shape[1])
        proprio.load_state_dict(weights)
    batch = inputs["batch"]
    out = vla(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        pixel_values=batch["pixel_values"],
        labels=batch["labels"],
        output_hidden_states=True,
        output_projector_features=True,
        proprio=batch["proprio"],
        proprio_projector=proprio,
        noisy_actions=inputs["noisy"],
        noisy_action_projector=noisy,
        diffusion_timestep_embeddings=head.time_encoder(inputs["timesteps"])[:, None],
    )
    patches = out.projector_features.shape[1]
    actions = batch["labels"][:, 1:] > 31743
    states = out.hidden_states[-1][:, patches:-1][actions].reshape(len(actions), -1, width)
    head.noise_scheduler.set_timesteps(inputs["steps"])
    chunks = []
    for row, prompt in enumerate(inputs["prompts"]):
        # The host draws its starting noise in the middle of this call: it gets ours. Actions stay normalised.
        with mock.patch("torch.randn", return_value=inputs["start"][row : row + 1]):
            chunk, _ = vla.predict_action(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                pixel_values=batch["pixel_values"][row : row + 1],
                proprio=None if proprio is None else batch["proprio"][row : row + 1],
                proprio_projector=proprio,
                action_head=head,
                noisy_action_projector=noisy,
            )
        chunks.append(torch.as_tensor(chunk))
    return {"noise": head.predict_noise(states), "actions": chunks, "schedule": schedule(inputs)}


if __name__ == "__main__":
    asked = torch.load(sys.argv[2])
    torch.save(main(Path(sys.argv[1]), asked), sys.argv[3])
