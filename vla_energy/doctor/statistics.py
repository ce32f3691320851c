"""Are the action statistics there, sound, and the same everywhere?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vla_energy.actions import DatasetStatistics, FieldStatistics, StatisticsError, load_statistics
from vla_energy.compatibility import CompatibilityError, check_statistics
from vla_energy.doctor.findings import Finding, NotCheckedError, Subject
from vla_energy.doctor.policy import component, read_config

FILE = "dataset_statistics.json"
_WRITE = f"take the {FILE} that fine-tuning wrote beside this checkpoint"
_LAST_BIASES = ("model.fc2.bias", "noise_predictor.mlp_resnet.fc2.bias")  # of L1 and of diffusion heads


def statistics(subject: Subject) -> Iterator[Finding]:
    """`dataset_statistics.json` is readable, of the policy's dimensions, and has an extent where it normalises."""
    folder = subject.folder
    try:
        entries = load_statistics(folder / FILE)
    except StatisticsError as error:
        cost = "nobody can turn chunks into motions: the policy cannot be driven"
        yield Finding("statistics", "problem", str(error), cost, _WRITE)
        return
    head, projector = component(folder, "action_head"), component(folder, "proprio_projector")
    last = next((bias for key, bias in (head or {}).items() if key in _LAST_BIASES), None)
    action_dim = None if last is None else len(last)
    proprio_dim = None if projector is None else projector["fc1.weight"].shape[1]
    for name, entry in entries.items():
        bad = [
            *_shapes(entry, action_dim, proprio_dim),
            *_extent(entry.action, "action"),
            *_extent(entry.proprio, "proprio"),
        ]
        yield from (Finding(f"statistics: {name}", *rest) for rest in bad)
        if not any(rest[0] == "problem" for rest in bad):
            raw = [dim for dim, used in enumerate(entry.action.mask) if not used]
            proprio = "none" if entry.proprio is None else entry.proprio.dim
            text = f"{entry.action.dim} action dimensions, not normalised: {raw or 'none'}; proprioception: {proprio}"
            yield Finding(f"statistics: {name}", "ok", text)
    if len(entries) > 1:
        text = f"{len(entries)} datasets: every program must be told which (--statistics NAME, the host's unnorm_key)"
        yield Finding("statistics", "ok", text)


def _shapes(entry: DatasetStatistics, action_dim: int | None, proprio_dim: int | None) -> Iterator[tuple]:
    if action_dim is not None and entry.action.dim != action_dim:
        text = f"action has {entry.action.dim} dimensions, the action head {action_dim}"
        yield "problem", text, "chunks cannot be un-normalised", _WRITE
    if proprio_dim is None:
        return
    if entry.proprio is None:
        yield "problem", "no proprio, though there is a proprio projector", "the policy gets no state", _WRITE
    elif entry.proprio.dim != proprio_dim:
        text = f"proprio has {entry.proprio.dim} dimensions, the projector reads {proprio_dim}"
        yield "problem", text, "the policy stops at the first observation", _WRITE


def _extent(field: FieldStatistics | None, what: str) -> Iterator[tuple]:
    """Masked dimensions without extent: harmless where the data never moved, a division by 1e-8 where it did."""
    if field is None:
        return
    flat = field.mask & (field.q01 >= field.q99)
    constant = flat & (field.min == field.max)
    if (sharp := flat & ~constant).any():
        yield (
            "problem", f"{what}: q01 = q99 at dimensions {np.flatnonzero(sharp).tolist()}, though min < max",
            "normalising divides by 1e-8: the dimension jumps between -1 and 1",
            "take the dimension out of the mask, or compute the statistics from more data",
        )  # fmt: skip
    if constant.any() and what == "action":
        yield (
            "warning", f"{what}: dimensions {np.flatnonzero(constant).tolist()} are constant in the data",
            "the policy cannot move them", "fine if the robot lacks them; else record data that moves them",
        )  # fmt: skip


def config_statistics(subject: Subject) -> Iterator[Finding]:
    """`norm_stats` in `config.json`, which the host's model starts with, says the same as `dataset_statistics.json`."""
    folder = subject.folder
    norm_stats = read_config(folder).get("norm_stats")
    if not norm_stats:
        raise NotCheckedError(f"it has no norm_stats; {FILE} stands alone")
    try:
        entries = load_statistics(folder / FILE)
    except StatisticsError as error:
        raise NotCheckedError(f"nothing to compare its norm_stats with: {error}") from error
    common = sorted(entries.keys() & norm_stats.keys())
    reasons = []
    for name in common:
        try:
            theirs = DatasetStatistics.from_dict(norm_stats[name], f"norm_stats.{name}")
            check_statistics(theirs, entries[name], "config.json")
        except (CompatibilityError, StatisticsError) as error:
            reasons.append(f"{name}: {error}")
    if reasons:
        yield Finding(
            "config.json", "warning", "; ".join(reasons),
            f"the host's evaluation takes {FILE}; a program that does not reads config.json and moves otherwise",
            f"write the entries of {FILE} into norm_stats",
        )  # fmt: skip
    else:
        text = f"norm_stats equal {FILE}: {', '.join(common)}" if common else f"norm_stats has no dataset of {FILE}"
        yield Finding("config.json", "ok", text)
