"""Writes docs/config-reference.md from the dataclasses of the settings and their docstrings.

    python scripts/config_reference.py            # writes the page
    python scripts/config_reference.py --check    # exit code 1 if it is not up to date

Which item of the stabilisation report a field belongs to, and where its effect was measured, stands in `ITEMS`.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from vla_energy.config import EnergyConfig
from vla_energy.finetune.config import FinetuneConfig

PAGE = Path(__file__).parents[1] / "docs" / "config-reference.md"
NOT_MEASURED = "not by itself"

_RANGES = "[no range ranks worse in our head; the original's sigmoid dies](stability.md#ranges-and-temperatures)"
_TEMPERATURE = (
    "[3 for 0.5: in our head the same L1, exits the same to -3 points; in the original's a better L1 in 4 of 6 ranges, "
    "worse in sigmoid and bounded](stability.md#ranges-and-temperatures)"
)
_LEFT_OUT = "[left out: no difference above 0.01](stability.md#ablation)"
_GATE = (
    "[held out](does-it-help.md#held-out), [verdict against outcome](does-it-help.md#the-verdict-against-the-outcome)"
)
_ROLLOUTS = "[one run: no gain held out](does-it-help.md#the-head-learns-from-rollouts)"
_STAGE3 = "not by itself; [in stage 3](stability.md#stages-for-5000-steps)"
_HINGE = "[in place of InfoNCE: never flat](stability.md#presets-with-and-without-warm-up-infonce-and-hinge)"
_SOURCES = (
    "not by itself; [layer exits and both noises left out together: exits -2 to -5 points](stability.md#ablation)"
)
_REPLAN = (
    "[by the clock and by energy](does-it-help.md#replanning-by-the-clock-and-by-energy-rerankretrieve-behind-its-gate)"
)
_REMEDIES = "[alone in the original: flat or next to no ranking](stability.md#ablation)"
_GUARDS = "not by itself; [clip and skip left out together: no difference above 0.01](stability.md#ablation)"

ITEMS: dict[str, tuple[str, str]] = {
    "enabled": ("", "off is bit-identical to training without the head: tests/test_finetune.py"),
    "freeze_backbone": ("follow-up: a frozen policy was stable", NOT_MEASURED),
    "head.name": ("F1, F4", "[the original's head loses 0.5 of Spearman](stability.md#ablation)"),
    "head.reference": ("missed by it", "[without: 0.86 to 0.54 of Spearman](stability.md#ablation)"),
    "head.factor_bound": ("", "[4 for 1.5: exits +3 to +6 points, in-batch -2 to -3](stability.md#ablation)"),
    "head.dropout": ("follow-up: it was active at inference", NOT_MEASURED),
    "head.per_step": ("", "not by itself; reproduces the original's stored numbers: tests/test_original.py"),
    "head": ("", NOT_MEASURED),
    "range.anchor_weight": ("missed by it", "[without: weak policy's exits 0.92 to 0.94](stability.md#ablation)"),
    "range.name": ("1, 1a to 1c", _RANGES),
    "range": ("1, 1a to 1c", NOT_MEASURED),
    "temperature.mode": ("2", "[in the original: not flat, but 82 and 100 percent saturated](stability.md#ablation)"),
    "temperature.value": ("2, corrected", _TEMPERATURE),
    "temperature": ("2", NOT_MEASURED),
    "negatives.layer_exits": ("3", _SOURCES),
    "negatives.expert_noise": ("3", _SOURCES),
    "negatives.policy_noise.count": ("", "[without: exits +1 to +3 points](stability.md#ablation)"),
    "negatives.policy_noise.correlation": ("", "[0: no difference above 0.01](stability.md#ablation)"),
    "negatives.policy_noise": ("", NOT_MEASURED),
    "negatives.shuffle": ("3, corrected", _STAGE3),
    "negatives.in_batch.count": ("4", "[without: no difference above 0.01](stability.md#ablation)"),
    "negatives.in_batch": ("4", NOT_MEASURED),
    "negatives.hard.count": ("", "[alone in the original: 0 of 1 flat, ranks no better](stability.md#ablation)"),
    "negatives.hard": ("", NOT_MEASURED),
    "negatives.retrieved": ("", "[tuned tasks: why not by energy](does-it-help.md#tuned-tasks-why-not-by-energy)"),
    "negatives.near_positive_threshold": ("3, corrected", NOT_MEASURED),
    "negatives": ("", NOT_MEASURED),
    "loss.info_nce": ("4", _LEFT_OUT),
    "loss.listwise": ("", _LEFT_OUT),
    "loss.distance_regression": ("", _REMEDIES),
    "loss.margin_width": ("5", _STAGE3),
    "loss.margin": ("5, sign corrected", _STAGE3),
    "loss.hinge": ("F4, sign corrected", _HINGE),
    "loss.diversity": ("5, corrected", _REMEDIES),
    "loss.centre": ("", "[without: 0.73 to 0.66 of Spearman beside a weak policy](stability.md#ablation)"),
    "loss.mix_steps": ("5", "[with and without](stability.md#stages-for-5000-steps)"),
    "loss.log_q": ("missed by it", _REMEDIES),
    "loss.logit_clamp": ("4, corrected: off", NOT_MEASURED),
    "loss": ("", NOT_MEASURED),
    "rollouts": ("", _ROLLOUTS),
    "guard.max_grad_norm": ("6", _GUARDS),
    "guard.skip_grad_norm": ("6, corrected", "[10 skips half of stage 2's steps](stability.md#stages-for-5000-steps)"),
    "guard.lr_factor": ("6", "[a tenth keeps the original alive](stability.md#ablation)"),
    "guard": ("6", NOT_MEASURED),
    "candidates.crops": ("", "[8 for 0: held-out L1 0.0847 to 0.0845](does-it-help.md#held-out)"),
    "candidates": ("", "[what each source offers](does-it-help.md#held-out)"),
    "retrieval": ("", "[Meta-World +22 points](does-it-help.md#twelve-tasks-looked-at-while-the-thresholds-were-set)"),
    "refine": ("follow-up: refinement ruined success", "[held out](does-it-help.md#held-out)"),
    "replan": ("", _REPLAN),
    "rerank": ("", _GATE),
    "monitor": ("monitoring", NOT_MEASURED),
}  # fmt: skip
"""Field or group (the longest that fits) -> the report's item, and where the effect was measured."""

INTRO = """# Config reference

Every setting of the energy head, `--energy.*` on the command line of `scripts/finetune_energy.py` and of a patched
openvla-oft, and the flags of the fine-tuning. Made by `python scripts/config_reference.py` from the docstrings: do not
edit by hand.

"Report" is the item of the stabilisation report that the field implements (F1 to F4 its symptoms, 1 to 6 its remedies;
see [corrections](corrections.md)); empty where it is ours. "Measured" leads to what a change of the field did; "not by
itself" says that nobody changed this one alone, and what follows it, what its group or it together with others did.
What each preset changes: `vla_energy/config/presets.py`.
"""


class ReferenceError(ValueError):
    """A field has no description, or no entry of `ITEMS`."""


def descriptions(config: type) -> dict[str, str]:
    """Field -> its text in the class docstring's `Attributes`; `a, b: text` describes both.

    Raises:
        ReferenceError: a setting is not described.
    """
    found: dict[str, str] = {}
    _, _, section = inspect.cleandoc(config.__doc__ or "").partition("Attributes:\n")
    for entry in re.split(r"\n(?= {4}\w)", "\n" + section)[1:]:
        names, _, text = " ".join(entry.split()).partition(": ")
        found |= dict.fromkeys((name.strip() for name in names.split(",")), text)
    missing = [entry.name for entry in fields(config) if not _is_group(entry.type) and entry.name not in found]
    if missing:
        raise ReferenceError(f"{config.__name__}: no description of {', '.join(missing)} under Attributes")
    return found


def item(path: str) -> tuple[str, str]:
    """What `ITEMS` has for a field: of what its group did, nothing was measured of the field by itself.

    Raises:
        ReferenceError: nothing.
    """
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        if (key := ".".join(parts[:length])) in ITEMS:
            report, measured = ITEMS[key]
            of_group = key != path and not measured.startswith(NOT_MEASURED)
            return report, f"{NOT_MEASURED}; its group: {measured}" if of_group else measured
    raise ReferenceError(f"{path}: say in ITEMS to which item of the report it belongs, and where it was measured")


def page() -> str:
    """The whole page."""
    parts = [INTRO, *_group(EnergyConfig, EnergyConfig(), "")]
    parts.append(f"## Fine-tuning\n\n{_lead(FinetuneConfig)} Names and defaults are openvla-oft's where it has them.\n")
    texts = descriptions(FinetuneConfig) | {"energy": ""}
    parts.append("| flag | default | |\n|---|---|---|")
    for entry in fields(FinetuneConfig):
        if entry.name != "energy":
            default = _value(getattr(FinetuneConfig(), entry.name))
            parts.append(f"| `--{entry.name}` | {default} | {_cell(texts[entry.name])} |")
    return "\n".join(parts) + "\n"


def _group(config: type, values: Any, path: str) -> Iterator[str]:
    yield f"## energy{'.' * bool(path)}{path}\n\n{_lead(config)}\n"
    texts, own = descriptions(config), [entry for entry in fields(config) if not _is_group(entry.type)]
    if own:
        yield "| field | default | | report | measured |\n|---|---|---|---|---|"
    for entry in own:
        report, measured = item(f"{path}.{entry.name}".lstrip("."))
        default = _value(getattr(values, entry.name))
        yield f"| `{entry.name}` | {default} | {_cell(texts[entry.name])} | {report} | {measured} |"
    yield ""
    for entry in fields(config):
        if _is_group(entry.type):
            group: Any = entry.type
            yield from _group(group, getattr(values, entry.name), f"{path}.{entry.name}".lstrip("."))


def _lead(config: type) -> str:
    """What the class docstring says before its sections."""
    return inspect.cleandoc(config.__doc__ or "").partition("\n\nAttributes:")[0]


def _is_group(kind: Any) -> bool:
    return is_dataclass(kind)


def _value(value: Any) -> str:
    return f"`{value}`" if isinstance(value, str) and value else {"": "empty", None: "none"}.get(value, f"`{value}`")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").rstrip(".")


def main() -> int:
    """Writes the page, or compares it. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is old")
    args = parser.parse_args()
    text = page()
    if args.check:
        current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
        print(f"{PAGE.name} is {'up to date' if current else 'old: run python scripts/config_reference.py'}")
        return 0 if current else 1
    PAGE.write_text(text, encoding="utf-8")
    print(f"written to {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
