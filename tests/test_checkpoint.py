from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vla_energy.actions import DatasetStatistics, FieldStatistics
from vla_energy.checkpoint import CheckpointError, atomic_write, find_one, load_head, save_head
from vla_energy.config import EnergyConfig, HeadConfig
from vla_energy.head import EnergyHead
from vla_energy.results import check_writable, write_json

CONFIG = EnergyConfig(head=HeadConfig(hidden_dim=8, num_heads=2, num_layers=1))


def _head() -> EnergyHead:
    torch.manual_seed(0)
    return EnergyHead(6, 3, 2, CONFIG)


def _statistics() -> DatasetStatistics:
    field = FieldStatistics.of(np.random.default_rng(0).normal(size=(50, 3)))
    return DatasetStatistics(field, None, 50, 2)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_head(tmp_path, _head(), 7, _statistics(), {"margin": 0.25, "task": "türöffnen"})


def test_round_trip(saved: Path) -> None:
    assert saved.name == "energy_head--7_checkpoint.safetensors"
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    for path in (saved, saved.parent, str(saved)):
        loaded = load_head(path)
        assert loaded.step == 7 and loaded.extra == {"margin": 0.25, "task": "türöffnen"}
        assert loaded.config == CONFIG and loaded.statistics is not None
        assert loaded.statistics.to_dict() == _statistics().to_dict()
        torch.testing.assert_close(loaded.head.state_dict(), _head().state_dict(), rtol=0, atol=0)
        assert (loaded.head.context_dim, loaded.head.action_dim, loaded.head.horizon) == (6, 3, 2)
    torch.manual_seed(3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_loading_leaves_the_random_state_alone(saved: Path) -> None:
    before = torch.random.get_rng_state()
    load_head(saved)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_statistics(tmp_path: Path) -> None:
    assert load_head(save_head(tmp_path, _head(), 0, None)).statistics is None


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_truncated_file_is_named(saved: Path, share: float) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match=saved.name):
        load_head(saved)


def test_any_flipped_bit_is_found(saved: Path) -> None:
    data = saved.read_bytes()
    generator = np.random.default_rng(0)
    header = 8 + int.from_bytes(data[:8], "little")
    positions = [*range(8), *generator.integers(8, header, 150), *generator.integers(header, len(data), 50)]
    for position in positions:
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(generator.integers(8))
        saved.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=saved.name):
            load_head(saved)


def _rewrite(path: Path, drop: str | None = None, **changes: str) -> None:
    """As an editor would: valid safetensors, other metadata."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = {key: value for key, value in header["__metadata__"].items() if key != drop}
    save_file(load_file(path), path, {**metadata, **changes})


@pytest.mark.parametrize(
    ("drop", "changes", "message"),
    [
        ("statistics", {}, "lacks statistics"),
        ("format", {}, "not an energy head"),
        (None, {"version": "99"}, "version '99'"),
        (None, {"horizon": "3"}, "checksum"),
        (None, {"step": "8"}, "checksum"),
    ],
)
def test_changed_metadata(saved: Path, drop: str | None, changes: dict[str, str], message: str) -> None:
    _rewrite(saved, drop, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_head(saved)


def test_weights_of_another_shape_even_absurd_are_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vla_energy.checkpoint.digest", lambda tensors, metadata: "valid")
    for context_dim in ("7", str(10**12), "0", "six"):
        _rewrite(saved, context_dim=context_dim, sha256="valid")
        with pytest.raises(CheckpointError, match=saved.name):
            load_head(saved)


def test_foreign_files(tmp_path: Path) -> None:
    pickled, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    torch.save({"w": torch.ones(2)}, pickled)
    save_file({"w": torch.ones(2)}, other)
    for path in (pickled, other, tmp_path / "missing.safetensors"):
        with pytest.raises(CheckpointError, match=path.name):
            load_head(path)


def test_weights_that_are_not_finite_never_replace_good_ones(saved: Path) -> None:
    head, good = _head(), saved.read_bytes()
    with torch.no_grad():
        head.scorer.factor.bias.fill_(float("nan"))
    with pytest.raises(CheckpointError, match=r"not finite: scorer\.factor\.bias"):
        save_head(saved, head, 7, None)
    assert saved.read_bytes() == good


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("bug")])
def test_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "state.bin"
    atomic_write(path, lambda file: file.write(b"old"))

    def fail(file: BinaryIO) -> Any:
        file.write(b"half of the ne")
        raise error

    with pytest.raises(CheckpointError if isinstance(error, OSError) else type(error)):
        atomic_write(path, fail)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


WRITERS = [check_writable, lambda path: write_json(path, {}), lambda path: atomic_write(path, lambda file: None)]


@pytest.mark.parametrize("write", WRITERS)
def test_pipes_and_device_files_are_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], Any]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)  # the path of a socket has to be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    (tmp_path / "device").symlink_to(os.devnull)
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    for name in ("pipe", "socket", "device", "stdout"):
        before = os.lstat(tmp_path / name)
        with pytest.raises((OSError, CheckpointError), match=rf"{name}.*name another"):
            write(tmp_path / name)
        assert os.path.samestat(os.lstat(tmp_path / name), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["device", "pipe", "socket", "stdout"]


def test_links_to_files_and_to_nothing_are_replaced_themselves(tmp_path: Path) -> None:
    target, link, dangling = tmp_path / "other run's", tmp_path / "link", tmp_path / "dangling"
    target.write_text("theirs")
    link.symlink_to(target)
    dangling.symlink_to(tmp_path / "nowhere")
    for path in (link, dangling):
        check_writable(path)
        write_json(path, {})
        assert path.read_text() == "{}\n" and not path.is_symlink()
    assert target.read_text() == "theirs"


def test_find_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no file"):
        find_one(tmp_path, "action_head")
    first = tmp_path / "action_head--1_checkpoint.pt"
    first.touch()
    assert find_one(tmp_path, "action_head") == first
    (tmp_path / "action_head--2_checkpoint.pt").touch()
    with pytest.raises(CheckpointError, match="2 files.*head--1_checkpoint.pt, action_head--2"):
        find_one(tmp_path, "action_head")
    with pytest.raises(CheckpointError, match="not a folder"):
        find_one(tmp_path / "nowhere", "action_head")


def test_the_same_content_makes_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    """Else a run that goes on after a kill would not end with the files of one that was not killed."""
    for number in range(8):
        again = save_head(tmp_path / f"{number}", _head(), 7, _statistics(), {"margin": 0.25, "task": "türöffnen"})
        assert again.read_bytes() == saved.read_bytes()
    header = saved.read_bytes()[8 : 8 + int.from_bytes(saved.read_bytes()[:8], "little")]
    assert len(header) % 8 == 0 and next(iter(json.loads(header)["__metadata__"])) == "action_dim"
