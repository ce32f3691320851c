"""The reasons of a verdict, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vla_energy.calibrate import fewest_draws
from vla_energy.preflight.effects import FEWEST, WORTH, Effect
from vla_energy.preflight.measure import Measured
from vla_energy.preflight.trials import Trials

_LATE = 1.5  # ratio of late to early error from which shorter chunks are advised
_HEADROOM = 0.1  # an oracle that takes away less than this leaves nothing to choose


def uncounted_trials(trials: Mapping[str, Trials], gates: Mapping[str, float]) -> list[str]:
    """Arms whose trials say nothing, because their gate was shut or another one."""
    arms = {arm: found for found in trials.values() for arm in found.successes}
    names = sorted(arm for arm, found in arms.items() if not found.counts(arm, gates))
    why = "ran behind a gate that was shut, or not safe by the margin calibrated here: these trials say nothing"
    return [f"{', '.join(names)} {why}"] if names else []


def unseen_trials(tasks: Mapping[str, Any]) -> list[str]:
    """Tasks that only the trials know."""
    names = [repr(task) for task, row in tasks.items() if row["trials"] and not row["effects"]]
    return [f"tried, but not among the judging held-out frames: {', '.join(names)}"] if names else []


def reasons_of(
    use: str, effects: dict[str, Effect], gates: dict[str, float], measured: Measured, risk: float
) -> list[str]:
    """What is advised and why, then a sentence a mode."""
    reasons = []
    for mode, found in effects.items():
        low, high = (100 * bound for bound in found.interval)
        # Where nothing was replaced, or one episode judges, an interval would say nothing of other episodes.
        span = f", {low:+.0f} to {high:+.0f}" if found.accepted and found.episodes > 1 else ""
        text = f"{mode}: L1 {found.l1_policy:.4f} to {found.l1_gated:.4f} ({100 * found.change:+.0f} %{span}), "
        text += f"{100 * found.accepted:.0f} % of chunks replaced"
        if found.episodes < FEWEST:
            text += f"; {found.episodes} held-out episodes judge it, nothing is advised below {FEWEST}"
        if not math.isfinite(gates[mode]):
            text += "; no margin was safe on the episodes that calibrate, so its gate stays shut"
            few = fewest_draws(risk)
            text += (
                f" ({few} of them are the fewest that can show it; half of all calibrate, so {2 * few} held-out ones)"
            )
        elif mode != "retrieve" and found.l1_oracle > (1 - _HEADROOM) * found.l1_policy:
            text += (
                f"; even the best candidate has {found.l1_oracle:.4f}, there is little to choose: its gate stays shut"
            )
        elif not found.helps and mode == "retrieve":
            text += f"; less than {100 * WORTH:.0f} % better, or not surely"
        elif not found.helps:
            text += f"; less than {100 * WORTH:.0f} % better, or not surely: its gate stays shut"
        reasons.append(text)
    early, late = _early_and_late(measured.by_step.tolist())
    if late > _LATE * early:
        reasons.append(
            f"the policy's error grows along the chunk ({early:.4f} to {late:.4f}): ask it more often "
            "(--replan-every), or let the arm replan do so where its energy says"
        )
    chosen = "leave reranking off" if use == "off" else f"use {use}"
    return [f"{chosen}: {_why(use, effects)}", *reasons]


def _why(use: str, effects: dict[str, Effect]) -> str:
    if use == "off":
        return "no mode is surely better than the policy on held-out episodes"
    found = effects[use]
    gap = "" if found.gap_closed is None else f", {100 * found.gap_closed:.0f} % of the gap to the best candidate"
    return f"it takes {-100 * found.change:.0f} % off the policy's held-out L1{gap}"


def _early_and_late(errors: Sequence[float]) -> tuple[float, float]:
    half = max(1, len(errors) // 2)
    return float(np.mean(errors[:half])), float(np.mean(errors[half:] or errors))
