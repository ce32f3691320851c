"""The files of a checkout: what git says of them, and replacing several of them or none."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from vla_energy.hosts.patch_file import PatchError


def commit_of(root: Path) -> str:
    """The commit that is checked out; empty where there is no git."""
    return _git(root, "rev-parse", "HEAD").stdout.strip() if _has_git(root) else ""


def uncommitted(root: Path, paths: Iterable[str]) -> set[str]:
    """Those of the paths whose content is not what git has; empty where there is no git, as it cannot be told then.

    Raises:
        PatchError: there is a git repository, but git cannot read it.
    """
    if not _has_git(root):
        return set()
    changed = set()
    for path in paths:
        done = _git(root, "status", "--porcelain", "--untracked-files=no", "--", path)
        if done.returncode:
            reason = " ".join(done.stderr.split())
            raise PatchError(f"git cannot tell whether {root / path} has uncommitted changes: {reason}")
        if done.stdout.strip():
            changed.add(path)
    return changed


def replace_files(contents: Mapping[Path, bytes]) -> None:
    """Writes all files or none; mode and owner stay. Each file is at any time either the old or the new one.

    Raises:
        OSError: one cannot be written; the others are as before.
    """
    before = {path: path.read_bytes() for path in contents}
    for path in contents:
        if not os.access(path, os.W_OK):
            raise PermissionError(f"{path} is write-protected; nothing was changed")
    temporary: dict[Path, Path] = {}
    done: list[Path] = []
    try:
        for path, content in contents.items():
            temporary[path] = _write_beside(path, content)
        for path, new in temporary.items():
            os.replace(new, path)
            done.append(path)
    except BaseException:
        for path in done:
            os.replace(_write_beside(path, before[path]), path)
        raise
    finally:
        for new in temporary.values():
            new.unlink(missing_ok=True)


def _write_beside(path: Path, content: bytes) -> Path:
    descriptor, name = tempfile.mkstemp(prefix=".vla-energy-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        owner = path.stat()
        if (os.stat(name).st_uid, os.stat(name).st_gid) != (owner.st_uid, owner.st_gid):
            with suppress(PermissionError):  # another user's file in a folder that we may write to: it becomes ours
                os.chown(name, owner.st_uid, owner.st_gid)
        shutil.copymode(path, name)
    except BaseException:
        os.unlink(name)
        raise
    return Path(name)


def _has_git(root: Path) -> bool:
    return any((folder / ".git").exists() for folder in (root.resolve(), *root.resolve().parents))


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Without optional locks, `git status` does not refresh the index: a check changes nothing on disk. Inside a git
    # hook, GIT_DIR and its kind would lead to another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    try:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, env=environment, check=False
        )
    except FileNotFoundError:
        raise PatchError(
            f"{root} is a git repository, but there is no git command to ask for uncommitted changes"
        ) from None
