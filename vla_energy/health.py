"""The monitors that warn in words: metrics of the training go in, sentences come out.

Each symptom is a row of `SYMPTOMS`: how it is judged, what it means, what to try. Its name is also its anchor in
docs/troubleshooting.md. The symptoms are those of the report (F1 flat, F2 NaN, F4 the margin loss alike) and their
measured causes: an offset that drifts into saturation, a head that hardly sees the action, batches without negatives.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from numbers import Real
from typing import Any

from vla_energy.config import MonitorConfig

REPEAT_AFTER = 20
"""Updates after which a symptom that lasts is told again."""
IN_A_ROW = 3
"""Updates in a row that a noisy symptom (backwards, misaligned) must last."""
COLLAPSED_STD, LOSING_RATE, REVERSED_ORDER, MASKED_SHARE, DRIFTED = 1e-4, 0.4, -0.02, 0.5, 1e4
"""Bounds that are no settings: of `energy/std_row`, of win rates, of `energy/spearman` (below the noise of a head that
knows nothing), of `energy/masked_share`, of the largest |E|."""
WORSE = ("expert_noise", "shuffle", "shift", "amplitude", "gripper_flip", "in_batch")
"""Sources whose chunks are worse than the expert's by construction: a head that loses to them has it backwards. The
others come from the policy or its like, and nothing is wrong with a head that cannot tell a good policy from the
expert: the residual head measures from the policy's chunk, and wins 1 to 5 percent against it however well it ranks."""

Findings = dict[str, str | None]
"""What was seen by subject (a metric's name): words and numbers where it is ill, None where it is well. A subject that
is missing was not judged, and stays as it was."""


@dataclass
class _Memory:
    """All that lasts from one update to the next, in JSON types.

    `streaks` counts by metric the updates in a row below a bound; `skips` are the running counts at step `skips_step`;
    `told` holds, by symptom and subject, the update at which an ongoing one was last told.
    """

    updates: int = 0
    step: int | None = None
    flat_since: int | None = None
    skips_step: int = 0
    skips: dict[str, float] = field(default_factory=dict)
    streaks: dict[str, int] = field(default_factory=dict)
    told: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Update:
    """One update as the judges see it: `metrics` as given, `finite` the finite ones; `memory` is theirs to change."""

    config: MonitorConfig
    step: int
    metrics: dict[str, float]
    finite: dict[str, float]
    memory: _Memory


@dataclass(frozen=True)
class Symptom:
    """One thing that goes wrong.

    Attributes:
        name: also the anchor in docs/troubleshooting.md.
        judge: looks at every update, also while nothing is wrong.
        meaning, remedy: what it means and what to try.
    """

    name: str
    judge: Callable[[_Update], Findings]
    meaning: str
    remedy: str

    def message(self, seen: Iterable[str]) -> str:
        """The warning, given what was seen."""
        return f"{', '.join(seen)}: {self.meaning}; {self.remedy}; see docs/troubleshooting.md#{self.name}"


class HealthWatch:
    """Turns metrics into warnings.

    A symptom is told when it begins, again after it had gone away, and every `REPEAT_AFTER` updates while it lasts. One
    that several metrics can show (a NaN, a source that wins) is also told when another metric joins in.

    Args:
        config: the bounds; calling `update` every `config.every` optimiser steps is up to the caller.
    """

    def __init__(self, config: MonitorConfig) -> None:
        self.config = config
        self._memory = _Memory()

    def update(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """The warnings that these metrics give rise to, in the order of `SYMPTOMS`; usually none.

        Args:
            step: optimiser steps so far, skipped ones included.
            metrics: floats by name, best as means over the steps since the last update: rates of one small batch are
                noisy. What is missing, or not finite, is not judged beyond being told as not finite.

        Raises:
            TypeError: a metric is no number.
            ValueError: `step` is not above that of the last update.
        """
        memory = self._memory
        for name, value in metrics.items():
            if not isinstance(value, Real):
                raise TypeError(f"metric {name} is {type(value).__name__}: expected a float")
        if memory.step is not None and step <= memory.step:
            raise ValueError(f"step={step}: expected more than {memory.step}, the step of the last update")
        given = {name: float(value) for name, value in metrics.items()}
        finite = {name: value for name, value in given.items() if math.isfinite(value)}
        update = _Update(self.config, step, given, finite, memory)
        memory.updates += 1
        warnings = [self._tell(symptom, symptom.judge(update)) for symptom in SYMPTOMS]
        memory.step = step
        return [warning for warning in warnings if warning]

    def state_dict(self) -> dict[str, Any]:
        """Counts and what was told, a copy in plain JSON types."""
        return asdict(self._memory)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            ValueError: the keys are not those of `state_dict`.
        """
        known = [entry.name for entry in fields(_Memory)]
        if sorted(state) != sorted(known):
            raise ValueError(f"health state has keys {sorted(state)}: expected {sorted(known)}")
        self._memory = _Memory(**copy.deepcopy(dict(state)))

    def _tell(self, symptom: Symptom, findings: Findings) -> str:
        """The warning, or empty text; keeps what was told."""
        now, told = self._memory.updates, self._memory.told.setdefault(symptom.name, {})
        for subject, seen in findings.items():
            if seen is None:
                told.pop(subject, None)
        ill = {subject: seen for subject, seen in findings.items() if seen is not None}
        if all(subject in told and now - told[subject] < REPEAT_AFTER for subject in ill):
            return ""
        told.update(dict.fromkeys(ill, now))
        return symptom.message(ill.values())


def _bound(key: str, is_ill: Callable[[float, MonitorConfig], bool], words: str) -> Callable[[_Update], Findings]:
    """Judges one metric by itself; `words` is filled with its `value` and the `config`."""

    def judge(update: _Update) -> Findings:
        if key not in update.finite:
            return {}
        value = update.finite[key]
        return {key: words.format(value=value, config=update.config) if is_ill(value, update.config) else None}

    return judge


def _below_in_a_row(bounds: Mapping[str, float]) -> Callable[[_Update], Findings]:
    """Judges metrics by name: below the bound at `IN_A_ROW` updates in a row, not counting gaps."""

    def judge(update: _Update) -> Findings:
        streaks, findings = update.memory.streaks, {}
        for key, value in update.finite.items():
            if key in bounds:
                streaks[key] = streaks.get(key, 0) + 1 if value < bounds[key] else 0
                words = f"{key} {value:.3g}, below {bounds[key]:g} for {streaks[key]} updates"
                findings[key] = words if streaks[key] >= IN_A_ROW else None
        return findings

    return judge


def _flat(update: _Update) -> Findings:
    loss, chance = (update.finite.get(f"energy/{name}") for name in ("info_nce", "chance"))
    band, memory = update.config.flat_band, update.memory
    # Chance is 0 where no row has a negative: nothing to learn there, which is another symptom.
    if loss is None or chance is None or chance <= band:
        return {}
    if abs(loss - chance) > band:
        memory.flat_since = None
        return {"flat": None}
    memory.flat_since = update.step if memory.flat_since is None else memory.flat_since
    steps = update.step - memory.flat_since
    if steps < update.config.flat_steps:
        return {"flat": None}
    known = f"ln {math.exp(chance):.4g} = {chance:.4f}" if chance < 100 else f"{chance:.4g}"
    return {"flat": f"energy loss {loss:.4f} within {band:g} of {known} (chance) for {steps} steps"}


def _nonfinite(update: _Update) -> Findings:
    findings: Findings = {
        key: None if key in update.finite else f"{key}={value}" for key, value in update.metrics.items()
    }
    count = update.finite.get("energy/nonfinite", 0.0)
    if count > 0:
        findings["energy/nonfinite"] = f"energy/nonfinite={count:g}"
    return findings


def _skipped(update: _Update) -> Findings:
    """The share of skips since the last update that told their number; since step 0 where there was none."""
    prefix, memory = "energy/skips", update.memory
    counts = {key: value for key, value in update.finite.items() if key == prefix or key.startswith(f"{prefix}/")}
    if prefix not in counts:
        return {}
    new = {key: value - memory.skips.get(key, 0) for key, value in counts.items()}
    steps = update.step - memory.skips_step
    memory.skips, memory.skips_step = memory.skips | counts, update.step
    skips = new.pop(prefix)
    if steps <= 0 or skips < 0:  # the count began anew
        return {}
    if skips / steps <= update.config.skipped_share:
        return {prefix: None}
    reason = max(new, key=lambda key: new[key], default="")
    because = f", most as {reason.removeprefix(f'{prefix}/')} ({new[reason]:g})" if new.get(reason, 0) > 0 else ""
    return {prefix: f"{skips:g} of the last {steps} steps skipped, {skips / steps:.1%}{because}"}


def _drift(update: _Update) -> Findings:
    ends = [update.finite[key] for key in ("energy/min", "energy/max") if key in update.finite]
    if not ends:
        return {}
    furthest = max(ends, key=abs)
    return {"drift": f"an energy of {furthest:.4g}, beyond {DRIFTED:g}" if abs(furthest) > DRIFTED else None}


SYMPTOMS = (
    Symptom(
        "flat",
        _flat,
        "flat, nothing is learned",
        "try range.name=linear, head.name=residual, energy_learning_rate 1e-4 or less",
    ),
    Symptom(
        "saturated",
        _bound(
            "energy/saturated",
            lambda value, config: value > config.saturated_share,
            "{value:.1%} of energies lie where the range has no slope, bound {config.saturated_share:.1%}",
        ),
        "dead, no gradient passes there",
        "try range.name=linear, a larger range.anchor_weight, a lower energy_learning_rate",
    ),
    Symptom(
        "collapse",
        _bound(
            "energy/std_row",
            lambda value, _: value < COLLAPSED_STD,
            f"energy/std_row {{value:.2g}}, below {COLLAPSED_STD:g}",
        ),
        "collapsed, all chunks of a context have the same energy",
        "try loss.diversity above 0, head.name=residual, a lower energy_learning_rate",
    ),
    Symptom(
        "nonfinite",
        _nonfinite,
        "non-finite, and would spread to every weight if the step were taken",
        "check the data and the policy's hidden states first, then lower energy_learning_rate",
    ),
    Symptom(
        "skipped",
        _skipped,
        "the head hardly trains",
        "lower energy_learning_rate or raise energy_warm_steps; compare energy/grad_norm to guard.skip_grad_norm",
    ),
    Symptom(
        "backwards",
        _below_in_a_row(
            {"energy/spearman": REVERSED_ORDER, **{f"energy/win_rate/{source}": LOSING_RATE for source in WORSE}}
        ),
        "worse chunks have the lower energy, an error in the sign or the data (or a collapse: ties count as lost)",
        "check that the expert is in column 0, that low energy is good, that all chunks are normalised alike",
    ),
    Symptom(
        "masked",
        _bound("energy/masked_share", lambda value, _: value > MASKED_SHARE, "{value:.1%} of negatives are not valid"),
        "most are so near to the expert that they are masked, little is left to learn from",
        "lower negatives.near_positive_threshold or draw further away (larger stds of noise, in_batch)",
    ),
    Symptom(
        "no_negatives",
        _bound("energy/no_negatives", lambda value, _: value > 0, "{value:g} rows without a valid negative"),
        "these rows teach nothing",
        "switch on negatives.expert_noise or lower negatives.near_positive_threshold; in_batch needs batch_size 2",
    ),
    Symptom(
        "misaligned",
        _below_in_a_row({"energy/alignment": 0.0}),
        "descent leads away from the expert",
        "do not refine actions with this head; try a larger loss.listwise, negatives.policy_noise",
    ),
    Symptom("drift", _drift, "the offset of the energies drifts", "raise range.anchor_weight"),
)
"""All symptoms, in the order in which they are judged and told."""
