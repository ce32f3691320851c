"""The patch tool on openvla-oft and on forks of it: does it fit, and is everything as before after reverting?

    git clone https://github.com/moojink/openvla-oft && git -C openvla-oft checkout 213c5ff8
    git clone https://github.com/Winsleo/openvla-oft Winsleo && git -C Winsleo checkout d54cda43
    python benchmarks/patch_forks.py openvla-oft Winsleo

The first folder is the version that the patch was made for, also tried with CRLF line ends; commits of other forks are
in docs/patch-tool.md. The patch's files are copied, checked, patched, checked, patched again and reverted; the folders
stay as they are. Prints the table of that page. "Differs" counts lines that `diff` shows against the first folder.
Exits with 1 where a patched file does not compile, lost a line, or is not reverted byte for byte.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from vla_energy.hosts import patching
from vla_energy.hosts.checkout import commit_of
from vla_energy.hosts.patch_file import Patch, PatchError, load_patch

Files = dict[str, bytes]


def read(root: Path, patch: Patch) -> Files:
    """The patch's files in a checkout; those that it has."""
    return {file.path: (root / file.path).read_bytes() for file in patch.files if (root / file.path).is_file()}


def differing(reference: Files, files: Files) -> list[str]:
    """Lines that `diff` shows, for each file of the reference."""
    counts = []
    with tempfile.TemporaryDirectory() as folder:
        one, other = Path(folder, "one"), Path(folder, "other")
        for path, content in reference.items():
            if path not in files:
                counts.append("absent")
                continue
            one.write_bytes(content)
            other.write_bytes(files[path])
            done = subprocess.run(["diff", "-a", str(one), str(other)], capture_output=True, check=False)
            counts.append(str(sum(line[:1] in (b"<", b">") for line in done.stdout.splitlines())))
    return counts


def outcome(files: Files, patch: Patch) -> tuple[list[str], bool]:
    """Columns check, apply, apply again and revert, and whether nothing went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for path, content in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content)
        try:
            report = patching.check(root, patch)
        except PatchError as error:
            return [str(error), "refused", "refused", "not applied"], read(root, patch) == files
        if not report.ok:
            problems = "; ".join(f"{file.path}: {file.problem}" for file in report.files if not file.ok)
            return [problems, *refused(root, patch), "not applied"], read(root, patch) == files
        states = ", ".join(file.state for file in report.files)
        patching.apply(root, patch)
        patched = read(root, patch)
        added = sum(_added(files[path], patched[path]) for path in files)
        fine = _compiles(patched) and patching.check(root, patch).applied
        again = patching.apply(root, patch).applied and read(root, patch) == patched
        reverted = patching.revert(root, patch) and read(root, patch) == files
        columns = [
            states,
            f"{added} lines",
            "nothing changed" if again else "CHANGED",
            "equal bytes" if reverted else "OTHER BYTES",
        ]
        return columns, bool(fine and again and reverted)


def refused(root: Path, patch: Patch) -> list[str]:
    """Two attempts to apply what does not fit."""
    columns = []
    for _ in range(2):
        try:
            patching.apply(root, patch)
            columns.append("APPLIED")
        except PatchError:
            columns.append("refused")
    return columns


def _added(before: bytes, after: bytes) -> int:
    """Number of added lines; fails where another line is gone or was changed."""
    old, new = before.splitlines(keepends=True), iter(after.splitlines(keepends=True))
    if not all(line in new for line in old):  # `in` reads on: the old lines, in order, are among the new ones
        sys.exit("error: a line of the file was removed or changed")
    return len(after.splitlines()) - len(old)


def _compiles(files: Files) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the host's own invalid escapes are not our matter
        for path, content in files.items():
            compile(content, path, "exec", dont_inherit=True)
    return True


def main() -> None:
    if "--quick" in sys.argv:  # as the other benchmarks
        print("left out: needs checkouts of openvla-oft, see docs/patch-tool.md")
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    folders: list[Path] = parser.parse_args().folders
    patch = load_patch(None)
    reference = read(folders[0], patch)
    if shutil.which("diff") is None:
        sys.exit("error: no diff command")
    if len(reference) != len(patch.files):
        sys.exit(f"error: {folders[0]} lacks files of {patch.host} {patch.commit[:8]}; name that checkout first")
    crlf = {path: content.replace(b"\n", b"\r\n") for path, content in reference.items()}
    cases = [(f"{folder.name} {commit_of(folder)[:8]}", read(folder, patch)) for folder in folders]
    cases.insert(1, (f"{folders[0].name}, CRLF line ends", crlf))
    print("| checkout | differs | check | apply | apply again | revert |\n|---|---|---|---|---|---|")
    fine = True
    for name, files in cases:
        columns, right = outcome(files, patch)
        fine &= right
        print(f"| {name} | {' / '.join(differing(reference, files))} | {' | '.join(columns)} |", flush=True)
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
