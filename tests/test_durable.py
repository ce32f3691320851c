"""Checkpoints that are killed, cut short, changed, or have no room: what is whole is taken, the rest is named."""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import shutil
import signal
import threading
import time
import weakref
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vla_energy.backbones import load_openvla
from vla_energy.backbones.config import CheckpointFolderError
from vla_energy.backbones.tiny import EMBEDDED
from vla_energy.checkpoint import CheckpointError
from vla_energy.config import EnergyConfig
from vla_energy.durable import MANIFEST, check_seal, read_torch, seal
from vla_energy.finetune import checkpoints
from vla_energy.finetune import evaluate as evaluate_module
from vla_energy.finetune.checkpoint_folders import check_place
from vla_energy.finetune.config import FinetuneConfig, FlagError
from vla_energy.finetune.logs import MetricLog
from vla_energy.finetune.setup import EMBEDDED_DATA
from vla_energy.finetune.signals import RunStoppedError
from vla_energy.finetune.trainer import Trainer


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """A folder of two files and one inside a folder, sealed at step 7."""
    folder = tmp_path / "sealed"
    (folder / "inner").mkdir(parents=True)
    for name, content in (("a.bin", b"abc"), ("b.json", b"{}"), ("inner/c.bin", b"c" * 3000)):
        (folder / name).write_bytes(content)
    seal(folder, 7)
    return folder


def test_a_sealed_folder_says_its_step_and_files_that_came_later_do_not_count(sealed: Path) -> None:
    (sealed / "energy_gates.json").write_text("{}")
    assert check_seal(sealed) == 7
    (sealed / MANIFEST).unlink()
    assert check_seal(sealed) is None


@pytest.mark.parametrize("name", ["a.bin", "b.json", "inner/c.bin"])
def test_every_file_that_is_missing_cut_or_changed_is_named(sealed: Path, name: str) -> None:
    path = sealed / name
    content = path.read_bytes()
    for damaged in (content[:-1], bytes([content[0] ^ 1]) + content[1:], content + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{name}.*damaged"):
            check_seal(sealed)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        check_seal(sealed)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "inner/../../secret", "", MANIFEST, "a\0b"])
def test_names_that_lead_out_of_the_folder_are_refused(sealed: Path, name: str) -> None:
    data = json.loads((sealed / MANIFEST).read_text())
    data["files"] = {name: data["files"]["a.bin"]}
    (sealed / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="not one of a file in this folder"):
        check_seal(sealed)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"version":2}', '{"version":1,"step":"7","files":{}}', "[" * 100_000])
def test_a_damaged_manifest_is_told(sealed: Path, text: str) -> None:
    (sealed / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=f"{MANIFEST} is damaged"):
        check_seal(sealed)


READ = ["model.safetensors", "action_head--*", "proprio_projector--*", "dataset_statistics.json", "tokenizer.json"]


@pytest.mark.parametrize("pattern", [*READ, "preprocessor_config.json"])
def test_a_flipped_bit_of_a_sealed_policy_is_told_before_it_acts(tmp_path: Path, pattern: str) -> None:
    """One of an exponent makes an action of 1e36, which is finite."""
    folder = tmp_path / "policy"
    shutil.copytree(EMBEDDED, folder)
    (folder / "training_state.pt").write_bytes(b"state")
    seal(folder, 7)
    (folder / "training_state.pt").unlink()  # no part of the policy
    load_openvla(folder, use_proprio=True)
    (path,) = folder.glob(pattern)
    content = bytearray(path.read_bytes())
    digit = re.search(rb"\.\d", content) if path.suffix == ".json" else None  # of a number, which stays one
    place = digit.start() + 1 if digit else len(content) - 5
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointFolderError, match=rf"{path.name} is damaged.*delete its {MANIFEST}"):
        load_openvla(folder, use_proprio=True)
    (folder / MANIFEST).unlink()
    if path.name != "tokenizer.json":  # whose version it is
        load_openvla(folder, use_proprio=True)


@pytest.mark.parametrize("name", [MANIFEST, "training_state.pt"])
def test_a_pipe_is_told_instead_of_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    # Opens the other end should somebody wait in it: native code cannot be interrupted.
    waker = threading.Timer(20, lambda: (tmp_path / name).write_bytes(b""))
    waker.start()
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=name):
        check_seal(tmp_path) if name == MANIFEST else read_torch(tmp_path / name)
    assert time.monotonic() - started < 15
    waker.cancel()


def test_hostile_states_are_refused_before_they_cost_memory(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    torch.save({"w": torch.ones(3)}, path)
    assert torch.equal(read_torch(path)["w"], torch.ones(3))
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            zeros = bytes(10_000_000) if entry.filename.endswith("data/0") else old.read(entry)
            new.writestr(entry.filename, zeros)
    with pytest.raises(CheckpointError, match="packed.pt.*compressed"):
        read_torch(packed)
    torch.save({"w": torch.ones(1).expand(10**12)}, path)
    with pytest.raises(CheckpointError, match="not stored whole"):
        read_torch(path)
    torch.save({"run": print}, path)
    with pytest.raises(CheckpointError, match="more than weights"):
        read_torch(path)
    for content in (b"", b"torn", tmp_path):
        path = tmp_path / "missing.pt" if isinstance(content, Path) else path
        path.write_bytes(content) if isinstance(content, bytes) else None
        with pytest.raises(CheckpointError, match=path.name):
            read_torch(path)


def _config(folder: Path, runs: Path, **changes: Any) -> FinetuneConfig:
    values: dict[str, Any] = {
        "vla_path": str(folder), "run_root_dir": runs, "run_id_override": "run", "use_proprio": True,
        "image_aug": False, "batch_size": 4, "max_steps": 3, "save_freq": 1, "wandb_log_freq": 1,
        "shuffle_buffer_size": 16, "precision": "fp32", "energy": EnergyConfig(freeze_backbone=True),
    }  # fmt: skip
    return FinetuneConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FinetuneConfig:
    """A run of three steps with a checkpoint each."""
    config = _config(tiny_folder, tmp_path_factory.mktemp("finished"))
    Trainer(config).run()
    return config


@pytest.fixture
def run(finished: FinetuneConfig, tmp_path: Path) -> FinetuneConfig:
    """A copy of that run, to resume."""
    shutil.copytree(finished.run_root_dir, tmp_path / "runs")
    values = {**vars(finished), "run_root_dir": tmp_path / "runs", "resume": True}
    return FinetuneConfig(**values)


def _folder(config: FinetuneConfig, step: int) -> Path:
    return config.run_root_dir / f"run--{step}_chkpt"


def _exchange(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    for source, target in ((one, aside), (other, one), (aside, other)):
        source.rename(target)


def _damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_newest_checkpoint_is_never_passed_over_in_silence(run: FinetuneConfig) -> None:
    _damage(_folder(run, 3) / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged.*--resume_step.*\[1, 2\]"):
        checkpoints.find(run)
    run.resume_step = 2
    assert checkpoints.find(run) == _folder(run, 2)


@pytest.mark.parametrize("sealed", [True, False])
def test_folders_whose_names_were_exchanged_are_refused(run: FinetuneConfig, sealed: bool) -> None:
    """Each is whole by its checksums: the run would go on from another step than it was told."""
    two, three = _folder(run, 2), _folder(run, 3)
    _exchange(two, three)
    for folder in () if sealed else (two, three):
        (folder / MANIFEST).unlink()  # then the training state says its step
    told = r"run--3_chkpt holds step 2, not step 3 as its name says: rename it back to run--2_chkpt, and what lies"
    with pytest.raises(CheckpointError, match=told):
        Trainer(run)
    run.resume_step = 2
    with pytest.raises(CheckpointError, match=r"run--2_chkpt holds step 3, not step 2"):
        Trainer(run)
    _exchange(two, three)
    assert Trainer(run).step == 2
    run.resume_step = None
    three.rename(_folder(run, 9))
    with pytest.raises(CheckpointError, match=r"run--9_chkpt holds step 3, .*rename it back to run--3_chkpt$"):
        Trainer(run)


@pytest.mark.parametrize("latest", [False, True])
def test_a_checkpoint_that_lost_its_training_state_is_told_and_nothing_is_overwritten(
    run: FinetuneConfig, latest: bool
) -> None:
    """Passed over, an earlier step would be taken anew without a word, or the run begun anew over its own files."""
    folder = _folder(run, 3)
    if latest:
        run.save_latest_checkpoint_only = True
        folder = folder.rename(run.run_dir / "latest")
        for step in (1, 2):
            shutil.rmtree(_folder(run, step))
    (folder / checkpoints.STATE).unlink()
    rows = (run.run_dir / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=f"{checkpoints.STATE} is missing"):
        Trainer(run)
    (folder / MANIFEST).unlink()
    if latest:
        with pytest.raises(CheckpointError, match=f"latest holds no {checkpoints.STATE}"):
            Trainer(run)
    else:
        assert checkpoints.find(run) == _folder(run, 2)
    assert (run.run_dir / "metrics.jsonl").read_bytes() == rows


def test_a_newer_folder_that_is_no_checkpoint_is_passed_over_aloud(
    run: FinetuneConfig, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (checkpoints.STATE, MANIFEST):
        (_folder(run, 3) / name).unlink()
    assert checkpoints.find(run) == _folder(run, 2)
    assert "run--3_chkpt has neither training_state.pt nor a manifest.json, and is passed over" in caplog.text


def test_a_run_whose_checkpoints_are_elsewhere_does_not_begin_anew(run: FinetuneConfig) -> None:
    """Only the run's folder was copied: its checkpoints lie beside it."""
    for step in (1, 2, 3):
        shutil.rmtree(_folder(run, step))
    path = run.run_dir / "metrics.jsonl"
    rows = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"metrics.jsonl goes to step 3 and a checkpoint was due every 1"):
        Trainer(run)
    assert path.read_bytes() == rows
    path.write_bytes(rows.splitlines(keepends=True)[0])  # killed before its first save
    assert Trainer(run).step == 0


def test_resume_compares_what_lies_there_and_not_where(run: FinetuneConfig, tmp_path: Path) -> None:
    data, policy = tmp_path / "data", tmp_path / "policy"
    shutil.copytree(EMBEDDED_DATA, data)
    shutil.copytree(run.vla_path, policy)
    run.data_root_dir, run.vla_path = str(data), str(policy)
    assert Trainer(run).step == 3
    info = next(data.rglob("dataset_info.json"))
    content = json.loads(info.read_text())
    info.write_text(json.dumps({**content, "description": "other data"}))
    with pytest.raises(CheckpointError, match=r"was made with another dataset \(--data_root_dir\)"):
        Trainer(run)
    run.data_root_dir = FinetuneConfig().data_root_dir
    (action_head,) = policy.glob("action_head--*")
    weights = torch.load(action_head, weights_only=True)
    torch.save({name: value + 1 for name, value in weights.items()}, action_head)
    with pytest.raises(CheckpointError, match=r"was made with another policy \(--vla_path\)"):
        Trainer(run)


def test_a_place_that_takes_no_checkpoint_is_told_before_the_first_step(tiny_folder: Path, tmp_path: Path) -> None:
    config = _config(tiny_folder, tmp_path / "new" / "runs", run_id_override="r" * 236, max_steps=1_000_000)
    with pytest.raises(CheckpointError, match=r"no checkpoint could be written to .*too long.*--run_id_override"):
        Trainer(config)
    assert not list(tmp_path.iterdir()), "what was tried is gone"
    config.run_id_override = "r" * 200
    check_place(config)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_save_left_goes_when_the_run_goes_on(run: FinetuneConfig) -> None:
    other = run.run_root_dir / ".other--7_chkpt.partial"
    left = [run.run_root_dir / ".run--7_chkpt.partial", run.run_dir / ".latest.partial"]
    for folder in (other, *left):
        (folder / "inner").mkdir(parents=True)
    Trainer(run).run()
    assert other.is_dir() and not any(folder.exists() for folder in left)


def test_a_damaged_latest_is_put_aside_only_for_the_one_before_it(
    run: FinetuneConfig, caplog: pytest.LogCaptureFixture
) -> None:
    latest, old = run.run_dir / "latest", run.run_dir / ".latest.old"
    _folder(run, 3).rename(latest)
    _folder(run, 2).rename(old)
    shutil.rmtree(_folder(run, 1))
    _damage(latest / checkpoints.STATE)
    assert check_seal(checkpoints.find(run)) == 2
    assert "put aside" in caplog.text and checkpoints.STATE in caplog.text
    assert (run.run_dir / "latest.damaged").is_dir() and not old.exists()
    _damage(latest / "config.json")
    with pytest.raises(CheckpointError, match="config.json is damaged"):
        checkpoints.find(run)


def test_killed_between_the_two_renames_of_a_save_the_one_before_is_taken(run: FinetuneConfig) -> None:
    latest, old = run.run_dir / "latest", run.run_dir / ".latest.old"
    _folder(run, 2).rename(old)
    _folder(run, 3).rename(run.run_dir / ".latest.partial")
    shutil.rmtree(_folder(run, 1))
    assert checkpoints.find(run) == latest and check_seal(latest) == 2
    assert Trainer(run).step == 2


def test_states_of_other_runs_and_types_are_refused(run: FinetuneConfig) -> None:
    path = _folder(run, 3) / checkpoints.STATE
    good = read_torch(path)
    (path.parent / MANIFEST).unlink()
    changes: list[Any] = [
        {**good, "step": -1}, {**good, "step": "3"}, {**good, "policy": {"w": torch.ones(2)}},
        {**good, "head": None}, {**good, "guard": {}}, {**good, "generator": torch.ones(3)},
        {**good, "monitor": 3}, {key: value for key, value in good.items() if key != "random"}, [], {"step": 3},
    ]  # fmt: skip
    for state in changes:
        torch.save(state, path)
        with pytest.raises(CheckpointError, match=checkpoints.STATE):
            Trainer(run)


def test_old_checkpoints_go_by_policy(tiny_folder: Path, tmp_path: Path) -> None:
    config = _config(tiny_folder, tmp_path, keep_checkpoints=2)
    other = tmp_path / "run-2--1_chkpt"
    other.mkdir()
    Trainer(config).run()
    assert sorted(path.name for path in tmp_path.glob("*_chkpt")) == ["run--2_chkpt", "run--3_chkpt", other.name]
    with pytest.raises(FlagError, match="keep_checkpoints"):
        _config(tiny_folder, tmp_path, keep_checkpoints=2, save_latest_checkpoint_only=True).check()


def test_the_gate_of_the_last_validation_outlives_a_resume(run: FinetuneConfig) -> None:
    path = _folder(run, 3) / checkpoints.STATE
    (path.parent / MANIFEST).unlink()
    torch.save({**read_torch(path), "gate": {"margin": 0.25, "frames": 3}}, path)
    trainer = Trainer(run)
    assert trainer.gate == {"margin": 0.25, "frames": 3}
    from vla_energy.checkpoint import load_head

    assert load_head(checkpoints.save(trainer)).extra == {"rerank_margin": 0.25}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_the_step_under_way_and_say_how_to_go_on(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    config = _config(tiny_folder, tmp_path, max_steps=9, save_freq=100)
    trainer = Trainer(config)
    step = trainer.train_step

    def interrupted(*args: Any) -> Any:
        if trainer.step == 1:
            os.kill(os.getpid(), number)
        return step(*args)

    monkeypatch.setattr(trainer, "train_step", interrupted)
    before = signal.getsignal(number)
    with pytest.raises(RunStoppedError, match="--resume True goes on") as raised:
        trainer.run()
    assert raised.value.exit_code == code and signal.getsignal(number) == before
    assert check_seal(_folder(config, 2)) == 2 and trainer.step == 2


def test_a_signal_breaks_off_a_validation_and_the_step_is_saved(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that is taken back gives half a minute; a validation may take three."""
    config = _config(
        tiny_folder, tmp_path, max_steps=3, save_freq=100, use_val_set=True, val_freq=1, val_time_limit=600
    )
    trainer = Trainer(config)
    took, real = [], evaluate_module.held_out

    def interrupted(*args: Any) -> Iterator[Any]:
        for batch in real(*args):
            took.append(trainer.step)
            if took.count(2) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(evaluate_module, "held_out", interrupted)
    with pytest.raises(RunStoppedError, match="SIGTERM.*--resume True goes on"):
        trainer.run()
    assert took.count(1) > 1 and took.count(2) == 1, "one batch, not all"
    assert check_seal(_folder(config, 2)) == 2 and trainer.step == 2 and trainer.gate is not None
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val/finetune/l1_val" in row] == [1]
    monkeypatch.setattr(evaluate_module, "held_out", real)
    config.resume = True
    assert Trainer(config).run()["finetune"]["frames"] > 0


def test_a_signal_in_a_save_ends_the_run_after_it(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another step and another save of 15 GB are not what half a minute is for."""
    trainer = Trainer(_config(tiny_folder, tmp_path, max_steps=9, save_freq=2))
    saved, real = [], checkpoints.save

    def interrupted(trainer: Trainer) -> Path:
        saved.append(trainer.step)
        os.kill(os.getpid(), signal.SIGTERM)
        return real(trainer)

    monkeypatch.setattr(checkpoints, "save", interrupted)
    with pytest.raises(RunStoppedError, match="SIGTERM"):
        trainer.run()
    assert saved == [2] and trainer.step == 2 and check_seal(_folder(trainer.config, 2)) == 2


def test_the_last_validation_is_finished_in_spite_of_a_signal(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No later run would make up for it."""
    config = _config(tiny_folder, tmp_path, max_steps=1, use_val_set=True)
    trainer = Trainer(config)
    real = evaluate_module.held_out

    def interrupted(*args: Any) -> Iterator[Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        yield from real(*args)

    monkeypatch.setattr(evaluate_module, "held_out", interrupted)
    assert "gate" in trainer.run() and check_seal(_folder(config, 1)) == 1


class _Cycle:
    def __init__(self) -> None:
        self.me = self


def test_the_garbage_of_a_validation_is_gone_after_it(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to the collector's own time it would hold the heap apart: memory grew over hours."""
    trainer = Trainer(_config(tiny_folder, tmp_path, max_steps=1, use_val_set=True))
    left: list[weakref.ref[_Cycle]] = []

    def evaluated(*_: Any) -> dict[str, Any]:
        left.append(weakref.ref(_Cycle()))
        return {}

    monkeypatch.setattr("vla_energy.finetune.trainer.evaluate", evaluated)
    gc.disable()
    try:
        trainer.validate()
    finally:
        gc.enable()
    assert left[0]() is None


@pytest.fixture
def no_room() -> Iterator[Any]:
    """Files cannot grow beyond a limit, as on a full disk: Python, torch and safetensors each fail in their own way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [100, 4_000, 60_000, 400_000])
@pytest.mark.parametrize("latest", [False, True])
def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(
    run: FinetuneConfig, no_room: Any, size: int, latest: bool
) -> None:
    run.save_latest_checkpoint_only = latest
    trainer = Trainer(run)
    checkpoints.save(trainer)
    before = checkpoints.find(run)
    with pytest.raises(CheckpointError, match="not written.*intact.*--resume True"):
        no_room(size)
        try:
            checkpoints.save(trainer)
        finally:
            no_room(resource.RLIM_INFINITY if size < 0 else 2**40)
    assert checkpoints.find(run) == before
    assert not list(run.run_root_dir.rglob("*.partial"))


def test_a_torn_row_of_metrics_is_dropped_and_a_damaged_one_told(run: FinetuneConfig) -> None:
    path = run.run_dir / "metrics.jsonl"
    rows = path.read_text().splitlines()
    path.write_text("\n".join(rows) + '\n{"step": 4, "tra')
    with MetricLog(run, 3) as log:
        log.sync()
    assert path.read_text().splitlines() == rows
    path.write_text('{"step"\n' + "\n".join(rows))
    with pytest.raises(CheckpointError, match="line 1 is damaged"):
        MetricLog(run, 3)
