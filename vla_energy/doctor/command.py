"""What silently breaks a policy: attention, vision, statistics, LoRA merge, versions. What it costs, how to mend it."""

from __future__ import annotations

import argparse
import json

from vla_energy.doctor import towers
from vla_energy.doctor.findings import Check, Finding, Subject, examine, to_dict, to_text

EXAMPLE = """examples:
  vla-energy doctor                                  the environment alone
  vla-energy doctor --checkpoint runs/demo/latest"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("--checkpoint", metavar="DIR", help="policy's folder, ours or openvla-oft's")
    parser.add_argument("--host", metavar="PATH", help="openvla-oft checkout: its model is examined, not ours")
    parser.add_argument(
        "--base", metavar="DIR", help="what the checkpoint was fine-tuned from, to compare the LoRA merge"
    )
    parser.add_argument(
        "--num-images", type=int, metavar="N", help="images an observation has (default: config.json's)"
    )
    parser.add_argument("--device", default="cpu", help="device of the policy (default cpu)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of its weights")
    parser.add_argument(
        "--towers",
        metavar="MODULE:FUNCTION",
        help="called first: registers vision towers with timm; or FILE.py:FUNCTION",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the command. Returns 1 if there is a problem, else 0."""
    from pathlib import Path

    from vla_energy.checkpoint import run_hint

    def folder(name: str) -> Path | None:
        value = getattr(args, name)
        if value is not None and not Path(value).is_dir():
            raise ValueError(f"--{name} {value} is not a folder")
        if value is not None and (hint := run_hint(value)):
            raise ValueError(f"--{name} {value} is no checkpoint{hint}")
        return None if value is None else Path(value)

    subject = Subject(
        folder("checkpoint"), folder("host"), folder("base"), args.num_images, device=args.device, dtype=args.dtype
    )
    if args.num_images is not None and args.num_images < 1:
        raise ValueError(f"--num-images {args.num_images}: must be 1 or more")
    if args.towers:
        towers.call(args.towers)
    findings = diagnose(subject)
    result = to_dict(findings)
    print(json.dumps(result, indent=1) if args.json else to_text(findings))
    return 0 if result["ok"] else 1


def diagnose(subject: Subject) -> list[Finding]:
    """All findings about a subject: the environment's, then the host's and the checkpoint's where they are given."""
    from tqdm import tqdm

    environment = _environment(subject)
    checkpoint = [] if subject.checkpoint is None else _checkpoint()
    with tqdm(total=len(environment) + len(checkpoint), disable=None, leave=False, unit="check") as bar:
        findings = examine(environment, subject, bar) + examine(checkpoint, subject, bar)
    if subject.checkpoint is None:
        remedy = "pass --checkpoint DIR"
        findings.append(Finding("checkpoint", "not checked", "none was given: the environment alone", remedy=remedy))
    return findings


def _environment(subject: Subject) -> list[Check]:
    from vla_energy.doctor import environment, host, old_torch

    kernels = "gradients that are not finite end a training run, or spoil it without a word"
    checks = [
        Check("versions", environment.versions, "what does not work together fails late, or silently"),
        Check("torch", old_torch.old_torch, "what does not work together fails late, or silently"),
        Check("device", environment.device, "training on the wrong device takes weeks"),
        Check("attention kernels", environment.kernels, kernels),
        Check("gradient of the gradient", environment.head_gradients, kernels),
        Check("installed transformers", host.transformers_attention, host.CAUSAL_COST),
    ]
    if subject.host is not None:
        checks += [
            Check("host", host.checkout, "the patch may not fit"),
            Check("patch", host.patch, "the host may run without the energy head"),
        ]
    return checks


def _checkpoint() -> list[Check]:
    from vla_energy.doctor import actions, attention, files, host, inputs, lora, policy, statistics

    deaf = "a policy that does not read an input cannot act on it"
    other = "chunks in other units than the robot's: half the success rate, or none"
    return [
        Check("components", files.components, "the host stops when it loads the checkpoint"),
        Check("policy", policy.load, "the checkpoint cannot be run"),
        Check("attention", attention.attention, host.CAUSAL_COST),
        Check("inputs", inputs.inputs, deaf),
        Check("statistics", statistics.statistics, other),
        Check("config.json", statistics.config_statistics, other),
        Check("energy head", files.energy_head, "no reranking"),
        Check("memory", files.memory, "no retrieval"),
        Check("action space", actions.round_trip, other),
        Check("LoRA merge", lora.merge, "the merged policy is not the one that was trained"),
    ]
