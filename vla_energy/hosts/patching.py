"""Adds a patch's lines to a checkout and takes them out again, byte for byte.

Every added line ends with `MARKER`, so that reverting needs no backup. All files are computed and checked before the
first is written, and what was written is put back if a later one fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vla_energy.hosts.anchors import AnchorError, parse
from vla_energy.hosts.checkout import commit_of, replace_files, uncommitted
from vla_energy.hosts.patch_file import FilePatch, Patch, PatchError
from vla_energy.hosts.patch_lines import add_lines, find_lines, is_known, misplaced, remove_lines

EXACT = "exact"
DIVERGED = "diverged"
APPLIED = "applied"
HALF = "half applied"
UNFIT = "unfit"
UNCOMMITTED = "uncommitted changes"
ABSENT = "absent"
"""States of a file: the known version; another one in which every anchor was found; has our lines; has some of them, or
edited or moved ones; an anchor is missing; git says that it was changed; it is not there."""


@dataclass(frozen=True)
class FileReport:
    """How a patch stands to one file.

    Args:
        path: of the file in the checkout.
        state: one of the states.
        lines: the line after which each text goes, or the line that each has, where the file fits.
        problem: why it does not fit, or what to know of it; empty if there is nothing to say.
        ok: whether applying would work or is done.
    """

    path: str
    state: str
    lines: tuple[int, ...] = ()
    problem: str = ""
    ok: bool = True


@dataclass(frozen=True)
class Report:
    """How a patch stands to a checkout; `problem` concerns it as a whole."""

    root: str
    commit: str
    patch: str
    files: tuple[FileReport, ...]
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Whether applying would work, or is done."""
        return not self.problem and all(file.ok for file in self.files)

    @property
    def applied(self) -> bool:
        """Whether every file that is there has our lines."""
        return self.ok and all(file.state in (APPLIED, ABSENT) for file in self.files)


def check(root: str | Path, patch: Patch) -> Report:
    """How the patch stands to each file; changes nothing.

    Raises:
        PatchError: `root` is no checkout of the host, or git cannot tell what was changed in it.
    """
    return _survey(Path(root), patch)[0]


def apply(root: str | Path, patch: Patch) -> Report:
    """Adds the lines; nothing happens where they are there already.

    Returns:
        The report from before: `report.applied` tells that nothing was to be done.

    Raises:
        PatchError: it does not fit, naming each file and why; nothing was changed.
        OSError: a file cannot be written; what was written is put back.
    """
    report, results = _survey(Path(root), patch)
    if not report.ok:
        problems = [f"{file.path}: {file.problem}" for file in report.files if not file.ok]
        raise PatchError("; ".join(filter(None, [report.problem, *problems])) + "; nothing was changed")
    replace_files(results)
    return report


def revert(root: str | Path, patch: Patch) -> list[str]:
    """Takes the lines out; files that were not edited since are what they were, byte for byte.

    Returns:
        The files that had them; empty if none had.

    Raises:
        PatchError: lines are missing or were edited, or without them a file would not parse; nothing was changed.
        OSError: a file cannot be written; what was written is put back.
    """
    root = Path(root)
    results, problems = {}, []
    for file in _present(root, patch):
        source = (root / file.path).read_bytes()
        numbers, problem = find_lines(source, file)
        if problem:
            problems.append(f"{file.path}: {problem}")
        elif numbers:
            results[root / file.path] = remove_lines(source, file)
            try:
                parse(results[root / file.path])
            except AnchorError as error:
                problems.append(f"{file.path}: without the added lines (from {numbers[0]} on): {error}")
    if problems:
        raise PatchError("; ".join(problems) + "; nothing was changed")
    replace_files(results)
    return [path.relative_to(root).as_posix() for path in results]


def _survey(root: Path, patch: Patch) -> tuple[Report, dict[Path, bytes]]:
    present = _present(root, patch)
    changed = uncommitted(root, [file.path for file in present])
    reports, results = [], {}
    for file in patch.files:
        if file not in present:
            reports.append(FileReport(file.path, ABSENT, problem="not there", ok=file.optional))
            continue
        report, result = _inspect((root / file.path).read_bytes(), file, file.path in changed)
        reports.append(report)
        if result is not None:
            results[root / file.path] = result
    states = {report.state for report in reports}
    mixed = APPLIED in states and bool(states & {EXACT, DIVERGED})
    text = "half applied: some files have the lines and others do not; apply --only the others, or revert, then apply"
    problem = text if mixed else ""
    return Report(str(root), commit_of(root), patch.name, tuple(reports), problem), results


def _present(root: Path, patch: Patch) -> list[FilePatch]:
    if not root.is_dir():
        raise PatchError(f"{root} is no folder; expected a checkout of {patch.host}")
    present = [file for file in patch.files if (root / file.path).is_file()]
    if not present:
        names = ", ".join(file.path for file in patch.files)
        raise PatchError(f"{root} is no checkout of {patch.host}: none of {names} is there")
    for file in present:
        if (root / file.path).resolve() != root.resolve() / file.path:
            raise PatchError(f"{root / file.path} is a symbolic link to elsewhere; expected a file of the checkout")
    return present


def _inspect(source: bytes, file: FilePatch, changed: bool) -> tuple[FileReport, bytes | None]:
    lines, problem = find_lines(source, file)
    if problem:
        return FileReport(file.path, HALF, lines, problem, ok=False), None
    if lines:
        if problem := misplaced(source, file):
            return FileReport(file.path, HALF, lines, f"{problem}; revert, then apply", ok=False), None
        return FileReport(file.path, APPLIED, lines), None
    exact = is_known(source, file)
    if changed and not exact:
        problem = "has uncommitted changes; commit or stash them, so that git can tell them from the added lines"
        return FileReport(file.path, UNCOMMITTED, (), problem, ok=False), None
    try:
        result, lines = add_lines(source, file)
    except AnchorError as error:
        return FileReport(file.path, UNFIT, (), str(error), ok=False), None
    return FileReport(file.path, EXACT if exact else DIVERGED, lines), result
