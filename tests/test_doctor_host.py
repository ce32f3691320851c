"""The doctor on openvla-oft's own model. Needs its pins, with the fork of transformers, and `prismatic` on the path."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from vla_energy.doctor import actions, attention, inputs, lora
from vla_energy.doctor.findings import Finding, Subject

FOLDER = Path(os.environ.get("VLA_ENERGY_GOLDEN", Path(__file__).parents[2] / "shared" / "golden" / "openvla_oft"))
CHECKPOINT = FOLDER / "tiny_ckpt"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("prismatic") is None or not CHECKPOINT.is_dir(),
    reason=f"needs openvla-oft's package `prismatic` on the path, its pins, and {CHECKPOINT}",
)


def _load(folder: Path, num_images: int = 2) -> Subject:
    import golden_towers

    from vla_energy.doctor.host_model import HostPolicy

    golden_towers.register()
    return Subject(folder, policy=HostPolicy.load(folder, num_images, torch.float32, "cpu"))


def _status(findings: Iterable[Finding]) -> dict[str, str]:
    return {finding.check: finding.status for finding in findings}


def test_the_hosts_model_is_healthy_on_the_fork() -> None:
    subject = _load(CHECKPOINT)
    findings = [*attention.attention(subject), *inputs.inputs(subject), *actions.round_trip(subject)]
    found = _status(findings)
    assert {"attention", "attention, padded batch", "padding", "camera 2", "proprioception"} < found.keys()
    assert set(found.values()) == {"ok"}


def test_the_forks_eager_attention_is_causal() -> None:
    """The fork changed its sdpa path alone."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    subject = _load(CHECKPOINT)
    assert subject.policy is not None
    model: Any = subject.policy.backbone.language_model.model
    model.config._attn_implementation = "eager"
    for layer in model.layers:
        layer.self_attn.__class__ = LlamaAttention
    wanted = {"attention": "problem", "attention, padded batch": "problem", "padding": "ok"}
    assert _status(attention.attention(subject)) == wanted


def test_lora_merge_in_the_host(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    folder = tmp_path / "merged"
    folder.mkdir()
    for path in CHECKPOINT.iterdir():  # not copytree: the goldens may be read-only
        shutil.copyfile(path, folder / path.name)
    policy: Any = _load(CHECKPOINT, 1).policy
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wrapped: Any = get_peft_model(policy.backbone, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    wrapped.save_pretrained(str(folder / lora.ADAPTER))
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(str(folder))
    subject = _load(folder, 1)
    subject.base = CHECKPOINT
    assert [finding.status for finding in lora.merge(subject)] == ["ok"]
    assert subject.policy is not None
    weight = subject.policy.backbone.language_model.model.layers[0].mlp.up_proj.weight
    weight.data[0, 0] += 0.1
    (found,) = lora.merge(subject)
    assert found.status == "problem" and "layers.0.mlp.up_proj.weight" in found.text

    merged.to(torch.bfloat16).save_pretrained(str(folder))  # as the host saves it
    subject = _load(folder, 1)
    subject.base = CHECKPOINT
    (found,) = lora.merge(subject)
    assert found.status == "ok" and "saved in bfloat16" in found.text
