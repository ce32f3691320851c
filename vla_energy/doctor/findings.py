"""Findings, the checks that make them, and how both are run and printed."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from tqdm import tqdm

    from vla_energy.doctor.policy import Policy

Status = Literal["ok", "warning", "problem", "not checked"]
STATUSES: tuple[Status, ...] = ("problem", "warning", "not checked", "ok")
"""The worst first."""

_STATUS_WIDTH, _NAME_WIDTH = 13, 24


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        check: what was looked at.
        status: "ok", "warning", "problem", or "not checked".
        text: what was found; why it was not checked.
        cost: what it costs the user; needed for warnings and problems.
        remedy: how to mend it, or how to have it checked; needed for warnings and problems.
    """

    check: str
    status: Status
    text: str
    cost: str = ""
    remedy: str = ""

    def __post_init__(self) -> None:
        if self.status in ("warning", "problem") and not (self.cost and self.remedy):
            raise ValueError(f"{self.check}: a {self.status} must say what it costs and how to mend it")


class NotCheckedError(Exception):
    """A check cannot be done here, which is nobody's fault.

    Attributes:
        remedy: how to have it done, or empty.
    """

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.remedy = remedy


@dataclass
class Subject:
    """What is examined, and with what.

    Attributes:
        checkpoint: folder of a policy, or None for the environment alone.
        host: an openvla-oft checkout, or None.
        base: folder that the checkpoint was fine-tuned from, or None if its adapter says it, or not known.
        num_images: images an observation has, or None for what the checkpoint says.
        device: of the policy.
        dtype: of the policy's weights, torch's name.
        policy: set by the check that loads it.
    """

    checkpoint: Path | None = None
    host: Path | None = None
    base: Path | None = None
    num_images: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    policy: Policy | None = None

    @property
    def folder(self) -> Path:
        """The checkpoint's folder. Raises NotCheckedError if there is none."""
        if self.checkpoint is None:
            raise NotCheckedError("no checkpoint was given", "pass --checkpoint DIR")
        return self.checkpoint

    @property
    def loaded(self) -> Policy:
        """The policy. Raises NotCheckedError if it could not be loaded."""
        if self.policy is None:
            raise NotCheckedError("the policy is not loaded, see 'policy'")
        return self.policy


@dataclass(frozen=True)
class Check:
    """A named look at a `Subject`.

    Attributes:
        name: of its findings where it gives none of its own.
        run: the look; may raise.
        cost: what an unknown state may cost, for a check that fails to run.
    """

    name: str
    run: Callable[[Subject], Iterable[Finding]]
    cost: str


def examine(checks: Sequence[Check], subject: Subject, bar: tqdm | None = None) -> list[Finding]:
    """The findings of all checks; a check that raises is itself a problem, and the others go on.

    Args:
        checks: to run, in order.
        subject: what they look at.
        bar: is told each check's name, and moved on after it.
    """
    findings: list[Finding] = []
    for check in checks:
        if bar is not None:
            bar.set_description(check.name)
        try:
            findings += list(check.run(subject))
        except NotCheckedError as reason:
            findings.append(Finding(check.name, "not checked", str(reason), remedy=reason.remedy))
        except Exception as error:  # whatever host code and damaged files raise: the doctor must not fall ill itself
            what = " ".join(str(error).split()) or "no message"
            text = f"could not be checked: {type(error).__name__}: {what}"
            findings.append(Finding(check.name, "problem", text, check.cost, "mend what the message names, run again"))
        if bar is not None:
            bar.update()
    return findings


def to_dict(findings: Sequence[Finding]) -> dict[str, Any]:
    """JSON object: `ok` (no problem), `counts` by status, and `findings`."""
    counts = Counter(finding.status for finding in findings)
    return {
        "ok": not counts["problem"],
        "counts": {status: counts[status] for status in STATUSES},
        "findings": [asdict(finding) for finding in findings],
    }


def to_text(findings: Sequence[Finding], width: int = 100) -> str:
    """One block a finding, at most `width` columns wide, and a last line that counts them."""
    lines: list[str] = []
    for finding in findings:
        parts = [finding.text]
        parts += [f"costs: {finding.cost}"] if finding.cost else []
        label = "to check" if finding.status == "not checked" else "mend"
        parts += [f"{label}: {finding.remedy}"] if finding.remedy else []
        name = textwrap.wrap(finding.check, _NAME_WIDTH - 1)
        body = [line for part in parts for line in textwrap.wrap(part, width - _STATUS_WIDTH - _NAME_WIDTH)]
        for row in range(max(len(name), len(body))):
            first = finding.status if row == 0 else ""
            second = name[row] if row < len(name) else ""
            third = body[row] if row < len(body) else ""
            lines.append(f"{first:{_STATUS_WIDTH}}{second:{_NAME_WIDTH}}{third}".rstrip())
    counts = Counter(finding.status for finding in findings)
    return "\n".join([*lines, "", ", ".join(f"{counts[status]} {status}" for status in STATUSES)])
