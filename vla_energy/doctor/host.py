"""An openvla-oft checkout, its patch, and what the installed transformers does with the host's attention mask."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vla_energy.doctor.findings import Finding, NotCheckedError, Subject

PINNED = "213c5ff8"
"""Commit of openvla-oft that everything here was measured on."""
CAUSAL_COST = (
    "the policy decodes its chunk in parallel and was trained with every token seeing every other; causal attention "
    "takes LIBERO success from 97 to about 55 percent (openvla-oft issues 12, 106, 135)"
)
CAUSAL_REMEDY = (
    "install openvla-oft's transformers fork (pip install "
    "git+https://github.com/moojink/transformers-openvla-oft.git), keep attn_implementation sdpa, ask for no attention "
    "weights; or use our backbone, which passes a full mask"
)
_FILES = ("vla-scripts/finetune.py", "experiments/robot/libero/run_libero_eval.py", "prismatic/vla/constants.py")


def checkout(subject: Subject) -> Iterator[Finding]:
    """Whether the path is a checkout of openvla-oft, and at which commit; puts it on Python's path."""
    root = _root(subject)
    missing = [name for name in _FILES if not (root / name).is_file()]
    if missing:
        yield Finding(
            "host", "problem", f"{root} is no openvla-oft checkout: it lacks {', '.join(missing)}",
            "nothing can be attached to it", "git clone https://github.com/moojink/openvla-oft, and give its root",
        )  # fmt: skip
        return
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        yield Finding("host", "not checked", f"{root}: git knows no commit", remedy="clone instead of copying")
    elif commit.startswith(PINNED):
        yield Finding("host", "ok", f"openvla-oft at {PINNED}, the commit that everything was measured on")
    else:
        yield Finding(
            "host", "warning", f"commit {commit[:8]}, measured was {PINNED}",
            "line numbers and names may differ; the patch tool then goes by names", "vla-energy patch check PATH",
        )  # fmt: skip


def patch(subject: Subject) -> Iterator[Finding]:
    """Whether the energy head's lines are in the checkout, as the patch tool sees it."""
    root = _root(subject)
    try:
        patching: Any = importlib.import_module("vla_energy.hosts.patching")
        patches: Any = importlib.import_module("vla_energy.hosts.patch_file")
    except ImportError as error:
        raise NotCheckedError("this version of vla-energy has no patch tool") from error
    report = patching.check(root, patches.load_patch())
    files = ", ".join(f"{file.path}: {file.state}" for file in report.files)
    if not report.ok:
        yield Finding(
            "patch", "problem", report.problem or files, "the checkout runs without the energy head, or not at all",
            f"vla-energy patch check {root} names the line; vla-energy patch revert {root} undoes ours",
        )  # fmt: skip
    elif report.applied:
        yield Finding("patch", "ok", f"applied: {files}")
    else:
        yield Finding("patch", "ok", f"not applied, and would fit: {files}")


def transformers_attention(subject: Subject) -> Iterator[Finding]:
    """Whether a tiny Llama of the installed transformers is bidirectional when it is called as the host calls it.

    Only where the host's code runs on it: with `--host`, or under transformers 4. Our backbone passes its own mask.
    """
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise NotCheckedError(f"transformers is missing ({error})", "pip install 'vla-energy[native]'") from error
    version = transformers.__version__
    if subject.host is None and int(version.partition(".")[0]) >= 5:
        raise NotCheckedError(
            f"{version}: our backbone passes its own mask, see 'attention'", "--host PATH for the host's"
        )
    moved = {padded: llama_influence(transformers, padded=padded) for padded in (False, True)}
    text = f"transformers {version}, Llama called as the host does: a later token moves earlier states by "
    text += f"{moved[False]:.1e}, in a padded batch by {moved[True]:.1e}"
    if min(moved.values()) > 0:
        yield Finding("installed transformers", "ok", text)
    else:
        yield Finding("installed transformers", "problem", f"causal: {text}", CAUSAL_COST, CAUSAL_REMEDY)


def llama_influence(transformers: Any, *, padded: bool) -> float:
    """Largest change of earlier hidden states when the last valid embedding changes, in a Llama of two layers.

    Args:
        transformers: the module.
        padded: whether the row ends in padding.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, initializer_range=0.2,
        )  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        embeddings = torch.randn(2, 8, 32, generator=generator)
        mask = torch.ones(2, 8, dtype=torch.bool)
        if padded:
            mask[1, 6:] = False
        last = int(mask[1].sum()) - 1
        changed = embeddings.clone()
        changed[1, last] += 1.0
        before, after = (
            model(inputs_embeds=rows, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states[-1]
            for rows in (embeddings, changed)
        )
    return float((after - before)[1, :last].abs().max())


def _root(subject: Subject) -> Path:
    if subject.host is None:
        raise NotCheckedError("no host was given", "pass --host PATH")
    return subject.host


def _git(root: Path, *arguments: str) -> str | None:
    """What git says, or None: no git, or no repository whose root this is."""
    if not (root / ".git").exists():  # git would answer for a repository around it
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
