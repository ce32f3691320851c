"""Do actions survive normalising and un-normalising, and does the policy un-normalise as the library does?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from vla_energy.actions import DatasetStatistics, RawActions, StatisticsError, load_statistics
from vla_energy.doctor.findings import Finding, NotCheckedError, Subject

TOLERANCE = 1e-5
"""Of a round trip, as a fraction of a dimension's extent q99 - q01."""
_COST = "the robot executes other motions than the policy meant; such a mix-up once halved a success rate"
_MEND = "min, max, q01, q99 and mask must come from one dataset: take the file that fine-tuning wrote"


def round_trip(subject: Subject) -> Iterator[Finding]:
    """For each dataset: round trip where it normalises, the rest untouched, clipping, and the policy's own inverse."""
    try:
        entries = load_statistics(subject.folder / "dataset_statistics.json")
    except StatisticsError as error:
        raise NotCheckedError(f"no statistics: {error}") from error
    for name, entry in entries.items():
        broken = [*_ours(entry), *_policys(subject, name, entry)]
        if broken:
            yield Finding(f"action space: {name}", "problem", "; ".join(broken), _COST, _MEND)
        else:
            yield Finding(
                f"action space: {name}", "ok", f"round trip within {TOLERANCE:g} of the extent; clips to [-1, 1]"
            )


def _ours(entry: DatasetStatistics) -> Iterator[str]:
    field = entry.action
    mask = field.mask & (field.q99 > field.q01)
    extent = np.where(mask, field.q99 - field.q01, 1.0)
    low = np.where(mask, field.q01, 0.0)
    share = np.random.default_rng(0).uniform(size=(64, field.dim))
    raw = np.where(mask, low + share * extent, share.round())  # others: a binary gripper
    normalised = entry.normalize(RawActions(raw))
    back = entry.unnormalize(normalised).values
    error = np.abs(back - raw) / extent
    if (worst := float(error[:, mask].max(initial=0.0))) > TOLERANCE:
        dim = int(np.argmax(np.where(mask, error.max(0), 0)))
        yield f"round trip off by {worst:.1e} of the extent at dimension {dim}"
    unmasked = ~field.mask
    if not np.array_equal(normalised.numpy()[:, unmasked], raw[:, unmasked].astype(np.float32)):
        yield f"dimensions {np.flatnonzero(unmasked).tolist()} are outside the mask, but change"
    for side, sign in ((field.q99, 1.0), (field.q01, -1.0)):
        beyond = entry.normalize(RawActions((side + sign * extent)[None])).numpy()[0]
        if not np.array_equal(beyond[mask], np.full(mask.sum(), sign, np.float32)):
            yield f"values beyond q{'99' if sign > 0 else '01'} are not clipped to {sign:+.0f}"


def _policys(subject: Subject, name: str, entry: DatasetStatistics) -> Iterator[str]:
    """Where the policy has an inverse of its own (the host's model), it must be the library's."""
    if subject.policy is None:
        return
    chunk = torch.rand(subject.policy.horizon, entry.action.dim, generator=torch.Generator().manual_seed(0)) * 2 - 1
    own = subject.policy.unnormalize(chunk, name)
    if own is None:
        return
    extent = np.where(entry.action.mask, entry.action.q99 - entry.action.q01, 1.0)
    error = float((np.abs(own.numpy() - entry.unnormalize(chunk).values) / np.maximum(extent, 1e-8)).max())
    if error > TOLERANCE:
        yield (
            f"the host un-normalises otherwise, by {error:.1e} of the extent: see ACTION_PROPRIO_NORMALIZATION_TYPE "
            "in its constants"
        )
