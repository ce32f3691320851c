"""The diffusion head beside the real openvla-oft's, on its tiny checkpoint, within 2e-5 in fp32.

Needs openvla-oft at commit 213c5ff8 with its transformers fork and dlimp, in one folder as `oft`, `transformers` and
`dlimp` (VLA_ENERGY_HOST_SOURCES), and the interpreter of an environment with its pins (VLA_ENERGY_HOST_PYTHON).
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import golden_towers
import pytest
import torch

from vla_energy.backbones import LoadedVLA, load_openvla, save_openvla
from vla_energy.backbones.denoising import predict_noise
from vla_energy.backbones.diffusion import NoiseSchedule

ROOT = Path(__file__).parents[1]
GOLDEN = Path(os.environ.get("VLA_ENERGY_GOLDEN", ROOT.parent / "shared" / "golden" / "openvla_oft"))
HOST = Path(os.environ.get("VLA_ENERGY_HOST_SOURCES", ROOT.parent / "host"))
PYTHON = Path(os.environ.get("VLA_ENERGY_HOST_PYTHON", ROOT.parent / "hostenv" / "bin" / "python"))
PATHS = (HOST / "oft", HOST / "transformers" / "src", HOST / "dlimp")
MISSING = [str(path) for path in (GOLDEN / "tiny_ckpt", PYTHON, *PATHS) if not path.exists()]
TOLERANCE = 2e-5
CASES = {
    "A_1img_noproprio_b1.pt": (50, 50),
    "B_2img_proprio_b2_samelen.pt": (50, 10),
    "D_1img_noproprio_b3_rightpad.pt": (20, 7),
}
"""Golden case: steps of training and of the denoising."""

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"openvla-oft is not here: no {', '.join(MISSING)}")


def _new_head(golden: dict[str, Any], steps: tuple[int, int]) -> LoadedVLA:
    """The host's tiny checkpoint with a random diffusion head.

    Its predictions are a quarter of what they would be: those of an untrained head let rounding grow over a denoising
    of 50 steps, to 2.8e-5 beside the host and to 3.6e-5 beside ourselves in float64.
    """
    golden_towers.register()
    torch.manual_seed(0)
    vla = load_openvla(
        GOLDEN / "tiny_ckpt", num_images=golden["num_images"], use_proprio=golden["use_proprio"], action_dim=7,
        proprio_dim=8 if golden["use_proprio"] else None, new_head=True, use_diffusion=True, diffusion_steps=steps,
    )  # fmt: skip
    with torch.no_grad():
        vla.action_head.noise_predictor.mlp_resnet.fc2.weight /= 4
    return vla


def _ask_host(folder: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    """What the host's own classes make of the folder and the inputs."""
    torch.save(inputs, folder / "inputs")
    paths = os.pathsep.join(map(str, (*PATHS, ROOT / "tests", ROOT)))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [PYTHON, ROOT / "tests" / "host_diffusion.py", folder, folder / "inputs", folder / "outputs"]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    return torch.load(folder / "outputs", weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_noise_and_chunks_equal_the_hosts(case: str, tmp_path: Path) -> None:
    golden = torch.load(GOLDEN / case, weights_only=True)
    train, steps = CASES[case]
    vla = _new_head(golden, (train, steps))
    save_openvla(vla, tmp_path, 1, processor_files=GOLDEN / "tiny_ckpt", statistics=vla.statistics, dtype=torch.float32)
    vla = load_openvla(tmp_path, num_images=golden["num_images"], use_proprio=golden["use_proprio"])
    assert vla.diffuses and (vla.action_head.schedule.num_train, vla.action_head.num_steps_inference) == (train, steps)
    batch, rows = golden["batch"], len(golden["batch"]["input_ids"])
    inputs = {
        "batch": batch,
        "num_images": golden["num_images"],
        "noisy": torch.randn(rows, 8, 7),
        "timesteps": torch.randint(0, train, (rows,)),
        "start": torch.randn(rows, 8, 7),
        "prompts": [prompt["prompt_input_ids"] for prompt in golden["infer"]],
        "train": train,
        "steps": steps,
        "predicted": list(torch.randn(steps, rows, 8, 7)),
        "chunks": torch.rand(rows, 8, 7) * 2 - 1,
        "noise": torch.randn(rows, 8, 7),
        "at": torch.randint(0, train, (rows,)),
    }
    host = _ask_host(tmp_path, inputs)

    with torch.no_grad():
        noise = predict_noise(vla, batch, inputs["noisy"], inputs["timesteps"])
    assert float(noise.std()) > 0.05
    torch.testing.assert_close(noise, host["noise"], rtol=0, atol=TOLERANCE)
    other = {key: value for key, value in batch.items() if key in ("pixel_values", "proprio")}
    chunks = [
        vla.predict(
            {
                "input_ids": prompt,
                "attention_mask": torch.ones_like(prompt),
                **{key: None if value is None else value[row : row + 1] for key, value in other.items()},
            },
            noise=inputs["start"][row : row + 1, None],
        ).actions[0]
        for row, prompt in enumerate(inputs["prompts"])
    ]
    for ours, theirs in zip(chunks, host["actions"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
    together = torch.stack(chunks)
    assert float(together.std()) > 0.1 and float((together.abs() < 0.999).float().mean()) > 0.1

    schedule, theirs = NoiseSchedule(train), host["schedule"]
    assert torch.equal(schedule.kept, theirs["kept"])
    assert schedule.timesteps(steps) == theirs["timesteps"].tolist()
    chunk = inputs["start"]
    for timestep, predicted, expected in zip(
        schedule.timesteps(steps), inputs["predicted"], theirs["chunks"], strict=True
    ):
        chunk = schedule.step(chunk, predicted, timestep, steps)
        torch.testing.assert_close(chunk, expected, rtol=0, atol=1e-6)
    noised = schedule.add_noise(inputs["chunks"], inputs["noise"], inputs["at"])
    torch.testing.assert_close(noised, theirs["noised"], rtol=0, atol=1e-6)
