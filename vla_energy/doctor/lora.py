"""Is a merged checkpoint the policy that was trained? Base plus adapter against the merged weights, on a batch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vla_energy.doctor.findings import Finding, NotCheckedError, Subject
from vla_energy.doctor.policy import Policy, make_batch

ADAPTER = "lora_adapter"
WEIGHT_TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-6}
"""Largest difference of a weight, as a fraction of itself plus its tensor's root mean square, by the dtype that the
merged weights were saved in: bf16 rounds the base, the product and their sum by up to 2**-8 each."""
CHUNK_TOLERANCE = 1e-4
"""Largest difference of a normalised action where the merged weights were saved in fp32."""
ROUNDING_FACTOR = 4
"""Weights saved in bf16 may move the chunk so many times as far as rounding the right ones to bf16 does: how far that
is depends on the model, and a merge in bf16 rounds three times."""
_COST = "the policy that is evaluated is not the one that was trained"
_MERGE = "merge again from the base and lora_adapter/, in fp32, and copy the result whole"


def merge(subject: Subject) -> Iterator[Finding]:
    """Compares base + adapter with the checkpoint; without a base, which the folder then holds, with its own merge."""
    folder = subject.folder
    adapter = folder / ADAPTER
    if not (adapter / "adapter_config.json").is_file():
        raise NotCheckedError(f"there is no {ADAPTER}/ beside the checkpoint: nothing to compare it with")
    if any(folder.glob("vision_backbone--*_checkpoint.pt")):
        raise NotCheckedError("a policy with FiLM: its towers' adapters lie in vision_backbone--*, not in the merge")
    policy = subject.loaded
    base, unmerged_here = _base(subject, adapter)
    try:
        from peft import PeftModel
    except ImportError as error:
        raise NotCheckedError(f"peft is missing: {error}", "pip install 'vla-energy[native]'") from error
    trained = policy.sibling(base)
    batch = make_batch(policy, (12, 7))
    wrapped = PeftModel.from_pretrained(trained.backbone, str(adapter)).eval()
    trained.backbone = wrapped  # type: ignore[misc]
    wanted = trained(batch)
    trained.backbone = wrapped.merge_and_unload()  # type: ignore[operator, misc]
    if unmerged_here:
        yield _unapplied(float((policy(batch) - wanted).abs().max()))
        yield from _compare(trained, trained, wanted, batch, "the adapter merged here")
    else:
        yield from _compare(policy, trained, wanted, batch, f"the checkpoint, against {base} + adapter")


def _base(subject: Subject, adapter: Path) -> tuple[Path, bool]:
    """The base's folder, and whether it is the checkpoint itself."""
    folder = subject.folder
    if subject.base is not None:
        return subject.base, subject.base.resolve() == folder.resolve()
    named = json.loads((adapter / "adapter_config.json").read_text()).get("base_model_name_or_path")
    if named and Path(named).is_dir():
        return Path(named), Path(named).resolve() == folder.resolve()
    if not named:  # as our save_openvla(merge=False) writes it: base and adapter side by side
        return folder, True
    raise NotCheckedError(f"the adapter's base, {named}, is no folder here", "pass --base DIR")


def _unapplied(change: float) -> Finding:
    return Finding(
        "LoRA merge", "warning", f"the weights here are the base's; the adapter would move the chunk by {change:.1e}",
        "a program that loads the folder drives the policy as it was before fine-tuning",
        "PeftModel.from_pretrained(vla.backbone, 'lora_adapter'), then save_openvla(vla, ..., merge=True)",
    )  # fmt: skip


def _compare(policy: Policy, trained: Policy, wanted: Tensor, batch: Any, what: str) -> Iterator[Finding]:
    """The policy's weights against those of `trained`, merged here; its chunks against `wanted (B,H,A)`, unmerged."""
    own, merged = policy.backbone.state_dict(), trained.backbone.state_dict()
    dtype = "bfloat16" if _is_bfloat16(own) else "float32"
    odd = sorted(own.keys() ^ merged.keys())
    far = {name: _distance(own[name], merged[name]) for name in own.keys() & merged.keys()}
    limit, chunk_limit = WEIGHT_TOLERANCE[dtype], CHUNK_TOLERANCE
    changed = sorted((name for name in far if not far[name] <= limit), key=lambda name: -far[name])
    moved = float((policy(batch) - wanted).abs().max())
    if dtype == "bfloat16":
        for parameter in trained.backbone.parameters():
            parameter.data = parameter.data.bfloat16().to(parameter.dtype)
        chunk_limit = max(chunk_limit, ROUNDING_FACTOR * float((trained(batch) - wanted).abs().max()))
    if odd or changed or not moved <= chunk_limit:
        names = ", ".join([*changed, *odd][:3])
        text = f"{what}: chunks differ by {moved:.1e} (tolerance {chunk_limit:.1e}), "
        text += f"{len(changed) + len(odd)} of {len(far)} weights do" + (f", first: {names}" if names else "")
        yield Finding("LoRA merge", "problem", text, _COST, _MERGE)
    else:
        text = f"{what}: chunks agree within {moved:.1e} (tolerance {chunk_limit:.1e}, saved in {dtype})"
        yield Finding("LoRA merge", "ok", text)


def _is_bfloat16(state: dict[str, Tensor]) -> bool:
    floating = (value for value in state.values() if value.is_floating_point())
    return all(torch.equal(value.float(), value.bfloat16().float()) for value in floating)


def _distance(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    ours, theirs = ours.float(), theirs.float()
    size = theirs.abs() + theirs.square().mean().sqrt() + 1e-12
    return float(((ours - theirs).abs() / size).max()) if ours.numel() else 0.0
