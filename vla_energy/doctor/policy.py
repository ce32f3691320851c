"""The policy under examination, ours or openvla-oft's own, behind one interface, and a batch to try it on."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vla_energy.doctor import towers
from vla_energy.doctor.findings import Finding, NotCheckedError, Subject
from vla_energy.durable import read_torch
from vla_energy.results import require_regular

Batch = dict[str, Tensor]
LLAMA_VOCABULARY = 32000


class Policy(Protocol):
    """What the checks need of a policy.

    Attributes:
        kind: "native" or "host".
        backbone: vision, projector and language model: what LoRA wraps.
        action_dim, horizon: A and H of its chunks.
        proprio_dim: P, or None without proprioception.
        num_images: images of an observation.
        context_dim: D.
        config: the checkpoint's `config.json`.
    """

    kind: str
    backbone: Any
    action_dim: int
    horizon: int
    proprio_dim: int | None
    num_images: int
    context_dim: int
    config: dict[str, Any]

    def __call__(self, batch: Batch) -> Tensor:
        """Normalised chunks `(B,H,A)` fp32, in eval mode and without gradient."""
        ...

    def unnormalize(self, actions: Tensor, dataset: str) -> Tensor | None:
        """The policy's own un-normalisation of `(H,A)`, or None where it is the library's."""
        ...

    def sibling(self, folder: Path) -> Policy:
        """The same policy on the backbone of another folder."""
        ...


def load(subject: Subject) -> Iterator[Finding]:
    """Loads the checkpoint into `subject.policy`."""
    folder = subject.folder
    if not any("action_head" in path.name for path in folder.iterdir()) and not is_discrete(folder):
        raise NotCheckedError("a base model: there is no action head to run, see 'components'")
    for part in ("action_head", "proprio_projector"):
        if (count := len(list(folder.glob(f"{part}--*_checkpoint.pt")))) > 1:
            raise NotCheckedError(f"there are {count} {part.replace('_', ' ')}s, see 'components'")
    kind = _kind(subject)
    if kind == "host" and is_discrete(folder):
        raise NotCheckedError(
            "a policy with discrete action tokens, which is examined by our model alone", "leave --host out"
        )
    if kind == "host" and any(folder.glob("vision_backbone--*_checkpoint.pt")):
        raise NotCheckedError("a policy with FiLM, which is examined by our model alone", "leave --host out")
    if kind == "host" and (vocabulary := _vocabulary(read_config(folder))) < LLAMA_VOCABULARY:
        yield Finding(
            "policy", "problem", f"{vocabulary} token ids of its own: openvla-oft has Llama-2's ids in its code",
            "in the host every prompt and every action token is out of range",
            "export it with our packages (pip install 'vla-energy[native]'), then examine EXPORTED: "
            f"python -m vla_energy.backbones.host_export {folder} EXPORTED",
        )  # fmt: skip
        return
    try:
        if kind == "host":
            from vla_energy.doctor.host_model import HostPolicy as Chosen
        else:
            from vla_energy.doctor.native_model import NativePolicy as Chosen
    except ImportError as error:
        raise NotCheckedError(
            f"no model can be imported here: {error}",
            "pip install 'vla-energy[native]' (transformers 5), or run with the interpreter of an openvla-oft "
            "environment and pass --host PATH",
        ) from error
    dtype: torch.dtype = getattr(torch, subject.dtype)
    try:
        policy = Chosen.load(folder, subject.num_images, dtype, subject.device)
    except (ValueError, OSError, RuntimeError, NotImplementedError, KeyError, AssertionError) as error:
        what = " ".join(str(error).split()) or type(error).__name__
        text, remedy = (
            f"the {kind} model cannot load it: {what}",
            "mend the file that the message names, or copy it again",
        )
        if strange := _unknown_towers(folder):
            text = f"timm {_import_or_none('timm').__version__} has no vision tower named {', '.join(strange)}"
            remedy = towers.REMEDY
        yield Finding("policy", "problem", text, "nothing of this folder runs", remedy)
        return
    subject.policy = policy
    size = sum(parameter.numel() for parameter in policy.backbone.parameters()) / 1e6
    proprio = "no proprioception" if policy.proprio_dim is None else f"proprioception of {policy.proprio_dim}"
    # The language model, its vision towers and projector: without action head and proprio projector.
    text = f"{kind} model, backbone of {size:.1f} million weights, {policy.num_images} image(s), {proprio}, "
    yield Finding("policy", "ok", text + f"chunks of {policy.horizon} x {policy.action_dim}")


def _kind(subject: Subject) -> str:
    """What is examined: "host" with `--host` or where the host's model alone is installed, else "native"."""
    if subject.host is not None:
        return "host"
    major = getattr(_import_or_none("transformers"), "__version__", "5").partition(".")[0]
    return "host" if int(major) < 5 and importlib.util.find_spec("prismatic") is not None else "native"


def _unknown_towers(folder: Path) -> list[str]:
    with contextlib.suppress(OSError, ValueError):  # then config.json is what the message is about
        return towers.unknown(read_config(folder))
    return []


def _vocabulary(config: dict[str, Any]) -> int:
    """Token ids of the tokenizer; the embedding has some rows more."""
    return int(config.get("text_config", {}).get("vocab_size", 32064)) - int(config.get("pad_to_multiple_of", 64))


def _import_or_none(name: str) -> Any:
    with contextlib.suppress(ImportError):
        return importlib.import_module(name)
    return None


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint; ValueError if it is no JSON object."""
    require_regular(folder / "config.json")
    data = json.loads((folder / "config.json").read_text())
    if not isinstance(data, dict):
        raise ValueError(f"{folder / 'config.json'}: expected a JSON object")
    return data


def is_discrete(folder: Path) -> bool:
    """Whether a checkpoint was trained here with discrete action tokens: it has no action head."""
    return "discrete_action_dim" in read_config(folder).get("vla_energy", {})


def component(folder: Path, name: str) -> dict[str, Tensor] | None:
    """Weights of `name--*_checkpoint.pt` without DDP's prefix, or None where there is no such file, or several.

    Raises:
        CheckpointError: it is damaged, compressed, or holds more than weights.
    """
    found = sorted(folder.glob(f"{name}--*_checkpoint.pt"))
    if len(found) != 1:
        return None
    require_regular(found[0])
    state = read_torch(found[0])
    return {key.removeprefix("module."): value.float() for key, value in state.items()}


def make_batch(policy: Policy, prompts: tuple[int, ...], seed: int = 0) -> Batch:
    """Random images and prompts in the host's keys; rows are padded on the right.

    Args:
        policy: gives sizes.
        prompts: tokens of each row's prompt, BOS among them.
        seed: of everything drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    config = policy.config
    vocabulary = _vocabulary(config)
    actions = policy.horizon * policy.action_dim
    longest = max(prompts) + actions + 1
    ids = torch.full((len(prompts), longest), int(config.get("pad_token_id", 32000)))
    labels = torch.full_like(ids, -100)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, length in enumerate(prompts):
        ids[row, 0] = 1
        ids[row, 1:length] = torch.randint(5, min(200, vocabulary - 256), (length - 1,), generator=generator)
        ids[row, length : length + actions] = labels[row, length : length + actions] = vocabulary - 1
        ids[row, length + actions] = 2
        mask[row, : length + actions + 1] = True
    sizes = config["image_sizes"]
    height, width = (sizes[0], sizes[0]) if isinstance(sizes[0], int) else sizes[0]
    channels = 3 * len(config["timm_model_ids"]) * policy.num_images
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "pixel_values": torch.randn(len(prompts), channels, height, width, generator=generator),
    }
    if policy.proprio_dim is not None:
        batch["proprio"] = torch.rand(len(prompts), policy.proprio_dim, generator=generator) * 2 - 1
    device = next(policy.backbone.parameters()).device
    return {key: value.to(device) for key, value in batch.items()}


def hidden_states(policy: Policy, batch: Batch, bump: tuple[int, int] | None = None) -> Tensor:
    """The language model's last hidden states `(B,S,D)` fp32 on the CPU, as the policy itself runs it.

    Args:
        policy: is run once.
        batch: from `make_batch`.
        bump: `(row, position)` of the token whose embedding is disturbed by noise of the embeddings' own size.

    Raises:
        RuntimeError: the language model was not called, or not with embeddings.
    """
    kept: list[Tensor] = []

    def disturb(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        embeddings = kwargs.get("inputs_embeds")
        if embeddings is None:
            raise RuntimeError("the language model was not called with inputs_embeds: its images do not reach it")
        if bump is not None:
            noise = (
                torch.randn(embeddings.shape[-1], generator=torch.Generator().manual_seed(1))
                * embeddings.float().std().cpu()
            )
            embeddings = embeddings.clone()
            embeddings[bump] += noise.to(embeddings)
        return args, {**kwargs, "inputs_embeds": embeddings}

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        kept.append(output[0].detach().float().cpu())

    inner = policy.backbone.language_model.model
    handles = [inner.register_forward_pre_hook(disturb, with_kwargs=True), inner.register_forward_hook(keep)]
    try:
        policy(batch)
    finally:
        for handle in handles:
            handle.remove()
    if len(kept) != 1:
        raise RuntimeError(f"one pass of the policy called the language model {len(kept)} times, expected once")
    return kept[0]


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """The host prints as it is imported; our JSON must stay alone on stdout."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
