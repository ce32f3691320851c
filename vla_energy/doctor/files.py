"""Files beside the weights: components that the host finds by name, the energy head, the memory, the gates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vla_energy.actions import DatasetStatistics, StatisticsError, load_statistics
from vla_energy.checkpoint import find_one, load_head
from vla_energy.compatibility import CompatibilityError, check_statistics
from vla_energy.doctor.findings import Finding, NotCheckedError, Subject
from vla_energy.doctor.policy import is_discrete
from vla_energy.gates import load_gates

COMPONENTS = (
    "action_head",
    "proprio_projector",
    "noisy_action_projector",
    "vision_backbone",
    "energy_head",
    "chunk_memory",
)
"""Names that a component's file has in it, beside the word "checkpoint"."""
HEAD_REMEDY = (
    "train one, if you want reranking: --energy.enabled True with the host's patched finetune.py, or "
    "scripts/finetune_energy.py"
)


def components(subject: Subject) -> Iterator[Finding]:
    """Each component is found by its name in exactly one file, or in none."""
    folder = subject.folder
    names = sorted(path.name for path in folder.iterdir() if "checkpoint" in path.name)
    matches = {part: [name for name in names if part in name] for part in COMPONENTS}
    for part, found in matches.items():
        if len(found) > 1:
            yield Finding(
                "components", "problem", f"{part}: {len(found)} files match, {', '.join(found)}",
                "host and library take the one file with this in its name, and stop where there are more",
                "keep the one of the step that the folder's weights are of, and move the others out, backups too",
            )  # fmt: skip
    if not matches["action_head"] and not is_discrete(folder):
        yield Finding(
            "components", "warning", "no action_head--*_checkpoint.pt",
            "a base model: it gives discrete tokens, no chunks; fine for starting a fine-tune, not for driving",
            "fine-tune it, or copy the action head's file from the run",
        )  # fmt: skip
    single = [found[0] for found in matches.values() if len(found) == 1]
    if single:
        yield Finding("components", "ok", f"found once: {', '.join(single)}")


def energy_head(subject: Subject) -> Iterator[Finding]:
    """The head's file is readable, fits the policy, and was trained with the policy's statistics; so are its gates."""
    folder = subject.folder
    _one(folder, "energy_head", HEAD_REMEDY)
    loaded = load_head(find_one(folder, "energy_head"))
    head, policy = loaded.head, subject.policy
    gates, _ = load_gates(folder)
    shapes = (head.context_dim, head.action_dim, head.horizon)
    if policy is not None and shapes != (wanted := (policy.context_dim, policy.action_dim, policy.horizon)):
        yield Finding(
            "energy head", "problem", f"context, action and chunk sizes {shapes}, the policy has {wanted}",
            "the head refuses the policy: no reranking", "take the head that was trained with this policy",
        )  # fmt: skip
        return
    open_gates = sorted(mode for mode, margin in gates.items() if margin != float("inf"))
    gated = f"gates open for {', '.join(open_gates)}" if open_gates else "no gate is open: it changes nothing yet"
    yield Finding("energy head", "ok", f"readable, step {loaded.step}, D A H {shapes}; {gated}")
    if loaded.statistics is None:
        yield Finding(
            "energy head's statistics", "warning", "it was saved without",
            "nobody can tell whether it fits the policy: in other units its ranking is noise",
            "save it again with save_head(..., statistics=...)",
        )  # fmt: skip
    else:
        yield _same(subject, loaded.statistics, "energy head")


def memory(subject: Subject) -> Iterator[Finding]:
    """The memory is readable and holds chunks in the policy's statistics."""
    from vla_energy.memory import PREFIX, ChunkMemory, check_memory

    folder = subject.folder
    _one(folder, PREFIX, "vla-energy memory writes one, if you want retrieval")
    try:
        found = ChunkMemory.load(folder)
    except ImportError as error:
        raise NotCheckedError(str(error), "pip install 'vla-energy[retrieval]'") from error
    if subject.policy is not None:
        check_memory(found, subject.policy.horizon, subject.policy.action_dim, subject.policy.context_dim)
    yield Finding("memory", "ok", f"readable, {len(found)} frames")
    yield _same(subject, found.statistics, "memory")


def _one(folder: Path, part: str, remedy: str) -> None:
    """NotCheckedError where there is no such file, or several: that is a problem of `components`, told once."""
    found = [path.name for path in folder.iterdir() if part in path.name]
    if not found:
        raise NotCheckedError("this checkpoint has none", remedy)
    if len([name for name in found if "checkpoint" in name]) > 1:
        raise NotCheckedError(f"there are {len(found)}, see 'components': {', '.join(sorted(found))}")


def _same(subject: Subject, trained: DatasetStatistics, what: str) -> Finding:
    """Whether normalised actions mean the same to `what` as to one of the policy's datasets."""
    try:
        entries = load_statistics(subject.folder / "dataset_statistics.json")
    except StatisticsError as error:
        raise NotCheckedError(f"{what}'s statistics: {error}") from error
    reasons = []
    for name, entry in entries.items():
        try:
            check_statistics(trained, entry, f"the {what}")
            return Finding(f"{what}'s statistics", "ok", f"those of {name}")
        except CompatibilityError as error:
            reasons.append(f"{name}: {error}")
    return Finding(
        f"{what}'s statistics", "problem", "; ".join(reasons),
        "chunks mean other motions to it than to the policy: its ranking is noise, and it is refused at inference",
        f"take the {what} that was made with this policy, or make it again",
    )  # fmt: skip
