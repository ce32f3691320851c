"""In which order a save syncs, renames and deletes: what is on the disk at every moment, and after a power failure."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_durable import _config

from vla_energy.checkpoint import CheckpointError, atomic_write
from vla_energy.durable import MANIFEST, check_seal, seal
from vla_energy.finetune import checkpoints
from vla_energy.finetune.trainer import Trainer


class _KilledError(BaseException):
    """No OSError: what a refused rename does to put things back, a killed process does not do."""


def _kill_at(patch: pytest.MonkeyPatch, moment: int) -> Callable[[], int]:
    """Makes the renames and deletions of folders die at the `moment`-th; returns how many moments there were.

    Each has two: before it and after it. A deletion has a third between them, with some of its files gone.
    """
    replace, rmtree, moments = os.replace, shutil.rmtree, iter(range(1000))
    last = -1

    def tick() -> None:
        nonlocal last
        last = next(moments)
        if last == moment:
            raise _KilledError

    def rename(source: Any, target: Any) -> None:
        tick()
        replace(source, target)
        tick()

    def delete(folder: Path, ignore_errors: bool = False) -> None:
        tick()
        for path in sorted(folder.glob("*"))[:2]:
            path.unlink()
        tick()
        rmtree(folder, ignore_errors=ignore_errors)
        tick()

    patch.setattr(os, "replace", rename)
    patch.setattr(shutil, "rmtree", delete)
    return lambda: last + 1


def test_a_save_killed_at_any_of_its_renames_leaves_a_whole_latest(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tiny_folder, tmp_path / "runs", max_steps=2, save_latest_checkpoint_only=True)
    trainer = Trainer(config)
    trainer.run()
    before = tmp_path / "before"
    shutil.copytree(config.run_dir, before)
    trainer.step, taken, moments = 3, [], 0
    while True:
        with monkeypatch.context() as patch:
            count = _kill_at(patch, moments)
            try:
                checkpoints.save(trainer)
            except _KilledError:
                pass
            else:
                break
        found = checkpoints.find(config)
        assert found == config.run_dir / "latest", f"moment {moments}"
        taken.append(check_seal(found))
        assert not (config.run_dir / "latest.damaged").exists(), f"moment {moments}: neither was whole in its place"
        shutil.rmtree(config.run_dir)
        shutil.copytree(before, config.run_dir)
        moments += 1
    assert moments == count() and taken == sorted(taken) and set(taken) == {2, 3}, "the old one until the new one is in"
    assert check_seal(checkpoints.find(config)) == 3
    assert not [path for path in config.run_dir.iterdir() if path.name.startswith(".latest")]


def test_a_save_that_is_refused_the_second_rename_puts_the_old_one_back(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tiny_folder, tmp_path, max_steps=1, save_latest_checkpoint_only=True)
    trainer = Trainer(config)
    trainer.run()
    trainer.step, replace = 2, os.replace

    def refuse(source: Any, target: Any) -> None:
        if Path(source).name == ".latest.partial":
            raise OSError("no permission")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(CheckpointError, match="no permission.*earlier checkpoints are intact"):
            checkpoints.save(trainer)
    assert sorted(path.name for path in config.run_dir.iterdir() if "latest" in path.name) == ["latest"]
    assert check_seal(config.run_dir / "latest") == 1


Log = list[tuple[str, int]]
"""What was synced or renamed, by its inode, which a rename does not change."""


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """The calls of `os.fsync` and `os.replace` in their order."""
    events: Log = []
    sync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        sync(descriptor)
        events.append(("sync", os.fstat(descriptor).st_ino))

    def renamed(source: Any, target: Any) -> None:
        replace(source, target)
        events.append(("rename", os.stat(target).st_ino))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    return events


def _inode(path: Path) -> int:
    return path.stat().st_ino


def test_a_file_is_synced_before_its_rename_and_its_folder_after_it(tmp_path: Path, log: Log) -> None:
    path = atomic_write(tmp_path / "file", lambda file: file.write(b"content"))
    assert log == [("sync", _inode(path)), ("rename", _inode(path)), ("sync", _inode(tmp_path))]


def test_what_is_synced_is_the_whole_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sync says nothing of what is still in Python's buffer."""
    sizes, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (sizes.append(os.fstat(number).st_size), sync(number)))
    atomic_write(tmp_path / "file", lambda file: file.write(b"content"))
    assert sizes[0] == len(b"content")


def test_a_seal_syncs_every_file_and_folder_before_its_manifest_is_there(tmp_path: Path, log: Log) -> None:
    inner = tmp_path / "inner" / "most"
    inner.mkdir(parents=True)
    files = [tmp_path / "a.bin", tmp_path / "inner" / MANIFEST, inner / "c.bin"]
    for path in files:
        path.write_bytes(b"content")
    seal(tmp_path, 7)
    manifest = _inode(tmp_path / MANIFEST)
    placed = log.index(("rename", manifest))
    before = log[:placed]
    assert {number for _, number in before} == {*map(_inode, files), _inode(inner), _inode(inner.parent), manifest}
    assert log[placed + 1 :] == [("sync", _inode(tmp_path))]


def test_a_checkpoint_is_synced_before_it_takes_its_place_and_its_place_after(
    tiny_folder: Path, tmp_path: Path, log: Log
) -> None:
    config = _config(tiny_folder, tmp_path, max_steps=1, save_latest_checkpoint_only=True)
    trainer = Trainer(config)
    checkpoints.save(trainer)
    log.clear()
    folder = checkpoints.save(trainer)
    placed = log.index(("rename", _inode(folder)))
    missing = [path for path in (folder, *folder.rglob("*")) if ("sync", _inode(path)) not in log[:placed]]
    assert not missing and len([*folder.rglob("*")]) > 5
    assert log[placed + 1 :] == [("sync", _inode(config.run_dir))]
