"""Whether a head or a memory and a policy mean the same by a normalised action."""

from __future__ import annotations

import numpy as np

from vla_energy.actions import DatasetStatistics

_TOLERANCE = 1e-4  # relative; the same statistics written by two programs


class CompatibilityError(ValueError):
    """The head was trained for other actions or another context than the policy's."""


def check_statistics(trained: DatasetStatistics, used: DatasetStatistics, what: str) -> None:
    """Checks that normalised actions mean the same under two statistics.

    Args:
        trained: those that `what` was made with.
        used: the policy's.
        what: "the head", "the memory".

    Raises:
        CompatibilityError: they do not; the message names the first dimension that differs.
    """
    ours, theirs = trained.action, used.action
    if ours.dim != theirs.dim:
        raise CompatibilityError(f"{what}'s statistics have {ours.dim} dimensions, the policy's {theirs.dim}")
    unit = np.maximum(ours.q99 - ours.q01, 1e-8)
    same = {
        "mask": ours.mask == theirs.mask,
        "q01": ~ours.mask | (np.abs(ours.q01 - theirs.q01) <= _TOLERANCE * unit),
        "q99": ~ours.mask | (np.abs(ours.q99 - theirs.q99) <= _TOLERANCE * unit),
        "min = max": ~ours.mask | ((ours.min == ours.max) == (theirs.min == theirs.max)),
    }
    for name, equal in same.items():
        if not equal.all():
            raise CompatibilityError(
                f"{what} was trained with other action statistics: {name} differs at dimension "
                f"{int(np.argmin(equal))}; use the checkpoint's own dataset_statistics.json, or make {what} again"
            )
