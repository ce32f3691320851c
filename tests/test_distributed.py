"""Several processes: the step is the one of a single process, and no rank waits for one that is gone."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_fixture import results, run_ranks
from rollouts_fixture import NAME, write_rollouts
from torch import Tensor

from vla_energy import contact
from vla_energy.backbones import load_openvla
from vla_energy.backbones.tiny import EMBEDDED as EMBEDDED_VLA
from vla_energy.config import EnergyConfig, RolloutsConfig, TemperatureConfig
from vla_energy.data import DatasetError, RldsDataset
from vla_energy.distributed import ALONE, RankError, Ranks, start
from vla_energy.finetune import checkpoints, sharding
from vla_energy.finetune.config import FinetuneConfig, FlagError
from vla_energy.finetune.policy_step import scale
from vla_energy.finetune.setup import EMBEDDED_DATA
from vla_energy.finetune.sharding import is_shard, sharded_norm
from vla_energy.finetune.trainer import Trainer
from vla_energy.pulse import Pulse

GLOBAL = 8  # rows of a batch, over all ranks


def _config(runs: Path, world: int, **changes: Any) -> FinetuneConfig:
    base = FinetuneConfig(
        run_root_dir=runs,
        run_id_override="run",
        use_proprio=True,
        image_aug=False,
        batch_size=GLOBAL // world,
        lora_rank=4,
        max_steps=1,
        save_freq=99,
        wandb_log_freq=1,
        shuffle_buffer_size=64,
        precision="fp32",
    )
    return dataclasses.replace(base, **changes)


def _everything(world: int) -> EnergyConfig:
    """Whatever looks at other rows: in-batch, mined, log_q, margins, failed rollouts, their outcome, temperature."""
    energy = EnergyConfig(
        temperature=TemperatureConfig(mode="learnable"), rollouts=RolloutsConfig(NAME, 2 * GLOBAL // world, failed=2)
    )
    energy.negatives.hard.count = energy.negatives.shuffle.count = energy.negatives.shift.count = 2
    energy.loss = dataclasses.replace(energy.loss, log_q=True, margin=0.1, hinge=0.1, diversity=0.1)
    energy.guard = dataclasses.replace(energy.guard, max_grad_norm=1e4, skip_grad_norm=1e5)
    return energy


def _weights(trainer: Trainer) -> dict[str, Tensor]:
    named = {f"policy.{name}": value for name, value in trainer.job.vla.named_parameters() if value.requires_grad}
    named |= {} if trainer.head is None else {f"head.{name}": value for name, value in trainer.head.named_parameters()}
    return {name: value.detach().clone() for name, value in named.items()}


def _gradients(ranks: Ranks, runs: Path, flags: dict[str, Any]) -> dict[str, Any]:
    """Of policy and head after the first step, and its metrics."""
    trainer = Trainer(_config(runs, ranks.world, **flags), ranks)
    kept: list[list[Tensor]] = []
    average = Ranks.average_gradients.__get__(ranks)

    def keep(parameters: Any) -> None:
        parameters = list(parameters)
        average(parameters)
        kept.append([parameter.grad.clone() for parameter in parameters if parameter.grad is not None])

    ranks.average_gradients = keep
    recorded = trainer._start_rollouts()
    shard = (ranks.rank, ranks.world)
    metrics = trainer.train_step(trainer.job.train.batches(trainer.config.batch_size, shard=shard), recorded)
    if recorded is not None:
        recorded.close()
    return {"gradients": kept, "row": trainer._row(metrics), "bytes": dict(ranks.traffic)}


CASES: dict[str, dict[str, Any]] = {
    "l1": {"grad_accumulation_steps": 2},
    "adaptive": {"energy": EnergyConfig(temperature=TemperatureConfig(mode="adaptive"))},
    "off": {"energy": EnergyConfig(enabled=False)},
    "tokens": {"use_l1_regression": False, "new_action_head": True, "use_proprio": False},
    "diffusion": {"use_l1_regression": False, "use_diffusion": True, "new_action_head": True},
}


def _case(name: str, data: Path, world: int) -> dict[str, Any]:
    flags = dict(CASES[name])
    if name == "l1":
        flags |= {"data_root_dir": str(data), "energy": _everything(world)}
    if name in ("tokens", "diffusion"):
        energy = EnergyConfig()
        energy.negatives.samples.count, energy.negatives.samples.steps = 2, 2
        flags |= {"energy": energy, "diffusion_sample_freq": 1}
    return flags


def _all_gradients(ranks: Ranks, runs: Path, data: Path, names: list[str]) -> dict[str, Any]:
    found = {}
    for name in names:
        found[name] = _gradients(ranks, runs / name, _case(name, data, ranks.world))
    return found


def _apart(first: list[Tensor], second: list[Tensor]) -> float:
    """Norm of the difference over the norm, in float64."""
    flat = [torch.cat([part.double().flatten() for part in parts]) for parts in (first, second)]
    return float((flat[0] - flat[1]).norm() / flat[0].norm())


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("single")
    data = write_rollouts(folder / "data")
    return results(1, _all_gradients, folder, folder, data, list(CASES))[0], data


@pytest.mark.parametrize(("world", "names"), [(2, list(CASES)), (4, ["l1", "diffusion"])])
def test_gradients_are_those_of_one_process_with_the_whole_batch(
    single: tuple[dict[str, Any], Path], tmp_path: Path, world: int, names: list[str]
) -> None:
    expected, data = single
    found = results(world, _all_gradients, tmp_path, tmp_path, data, names)
    for name in names:
        one, many = expected[name], [rank[name] for rank in found]
        kinds = ["policy", "head"] if name != "off" else ["policy"]
        assert len(one["gradients"]) == len(kinds)
        for kind, reference, *others in zip(
            kinds, one["gradients"], *(rank["gradients"] for rank in many), strict=True
        ):
            gaps = [_apart(reference, other) for other in others]
            print(f"{world} ranks, {name}, {kind}: {max(gaps):.2e}")
            assert max(gaps) < 1e-6, (name, kind)
            assert all(torch.equal(a, b) for other in others[1:] for a, b in zip(others[0], other, strict=True))
        rows = [dict(rank["row"]) for rank in many]
        for row in (one["row"], *rows):
            row.pop("energy/ms", None)
        assert rows[0].keys() == one["row"].keys() and all(row == rows[0] for row in rows)
        assert rows[0] == pytest.approx(one["row"], rel=1e-3, abs=1e-4, nan_ok=True)


def _train(ranks: Ranks, runs: Path, flags: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
    trainer = Trainer(_config(runs, ranks.world, **flags), ranks)
    trainer.run()
    return _weights(trainer), None if trainer.guard is None else trainer.guard.counters


def test_two_steps_then_resume_equal_four_on_two_ranks_and_ranks_stay_equal(tmp_path: Path) -> None:
    """With dropout, validation and a memoryful shuffle: whatever a rank draws is drawn again."""
    flags = {"lora_dropout": 0.2, "check_ranks_every": 1, "use_val_set": True, "val_freq": 3, "val_time_limit": 1}
    whole = results(2, _train, tmp_path / "a", tmp_path / "whole", {**flags, "max_steps": 4})
    results(2, _train, tmp_path / "b", tmp_path / "parts", {**flags, "max_steps": 2})
    parts = results(2, _train, tmp_path / "c", tmp_path / "parts", {**flags, "max_steps": 4, "resume": True})
    for other in (whole[1], *parts):
        assert other[0].keys() == whole[0][0].keys() and other[1] == whole[0][1]
        assert all(torch.equal(value, other[0][name]) for name, value in whole[0][0].items())
    rows = [json.loads(row) for row in (tmp_path / "whole/run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 3, 4, 4]  # written once, by rank 0
    alone = _config(tmp_path / "parts", 2, **flags, max_steps=5, resume=True)
    with pytest.raises(checkpoints.CheckpointError, match="other values of: processes"):
        Trainer(alone)


@pytest.mark.parametrize(
    ("name", "precision", "tolerance"), [("l1", "fp32", 1e-6), ("diffusion", "fp32", 1e-6), ("adaptive", "bf16", 0.1)]
)
def test_sharded_gradients_are_those_of_one_process(
    single: tuple[dict[str, Any], Path], tmp_path: Path, name: str, precision: str, tolerance: float
) -> None:
    expected, data = single
    (reference, *_), (head, *_) = expected[name]["gradients"], expected[name]["gradients"][1:]
    for rank in results(2, _sharded_gradients, tmp_path, tmp_path, data, name, precision):
        assert rank["sharded"] > 4 and rank["kept"] <= rank["all"] / 2 + rank["sharded"] * 64  # padded by rows at most
        gaps = _apart(reference, rank["policy"]), _apart(head, rank["head"])
        print(f"fsdp, {name}: {gaps[0]:.2e}, head {gaps[1]:.2e}")
        assert max(gaps) < tolerance
        assert rank["clipped"] == pytest.approx(rank["norm"] / 2, rel=1e-4)


def _sharded_gradients(ranks: Ranks, runs: Path, data: Path, name: str, precision: str) -> dict[str, Any]:
    flags = _case(name, data, ranks.world) | {"fsdp": True, "precision": precision}
    trainer: Any = Trainer(_config(runs / name, ranks.world, **flags), ranks)
    found: dict[str, Any] = {}

    def keep(_: int) -> dict[str, Any]:
        plain = [p for p in trainer.parameters if not is_shard(p)]
        ranks.average_gradients(plain)
        shards = [p for p in trainer.parameters if is_shard(p)]
        found["sharded"], found["all"] = len(shards), sum(p.numel() for p in shards)
        found["kept"] = sum(p.to_local().numel() for p in shards)
        found["policy"] = _whole_gradients(trainer.parameters)
        found["norm"] = float(torch.cat([g.flatten() for g in found["policy"]]).norm())
        gradients = [p.grad for p in trainer.parameters if p.grad is not None]
        norm = sharded_norm(gradients, ranks)
        assert float(norm) == pytest.approx(found["norm"], rel=1e-4)
        scale(gradients, found["norm"] / 2 / norm)
        found["clipped"] = float(torch.cat([g.flatten() for g in _whole_gradients(trainer.parameters)]).norm())
        return {}

    trainer.policy_step.take = keep
    real = trainer.training.step

    def step(*args: Any) -> None:
        ranks.average_gradients(trainer.head.parameters())
        found["head"] = _whole_gradients(trainer.head.parameters())
        real(*args)

    trainer.training.step = step
    recorded = trainer._start_rollouts()
    trainer.train_step(trainer.job.train.batches(trainer.config.batch_size, shard=(ranks.rank, ranks.world)), recorded)
    if recorded is not None:
        recorded.close()
    return found


def _whole_gradients(parameters: Any) -> list[Tensor]:
    there: list[Any] = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return [gradient.full_tensor() if is_shard(gradient) else gradient.clone() for gradient in there]


def _folder_weights(folder: Path) -> dict[str, Tensor]:
    vla = load_openvla(folder, use_proprio=True)
    return {name: value.detach() for name, value in vla.named_parameters()}


def test_a_sharded_run_validates_saves_resumes_and_loads_on_one_rank(tmp_path: Path) -> None:
    """Beside the replicated run, whose checkpoint it may go on from, as that from its."""
    results(2, _sharded_runs, tmp_path / "found", tmp_path)
    expected = _folder_weights(tmp_path / "no/run--4_chkpt")
    state = torch.load(tmp_path / "no/run--4_chkpt" / checkpoints.STATE, weights_only=False)
    assert (tmp_path / "whole/run--4_chkpt/lora_adapter").is_dir()
    whole = torch.load(tmp_path / "whole/run--4_chkpt" / checkpoints.STATE, weights_only=False)
    for name in ("yes", "mixed", "back"):
        folder = tmp_path / name / "run--4_chkpt"
        found = _folder_weights(folder)
        assert found.keys() == expected.keys()
        assert all(torch.allclose(value, expected[key], rtol=2e-2, atol=2e-3) for key, value in found.items()), name
        other = torch.load(folder / checkpoints.STATE, weights_only=False)
        for key, value in state["policy"].items():  # fp32; saved weights are bf16
            assert (other["policy"][key] - value).abs().max() < 2e-4, (name, key)
        for index, entry in state["optimizer"]["state"].items():
            for key, value in entry.items():
                assert torch.allclose(other["optimizer"]["state"][index][key], value, rtol=1e-2, atol=1e-5), (name, key)
        if name == "yes":
            assert all(torch.equal(value, whole["policy"][key]) for key, value in other["policy"].items())
        rows = [json.loads(row) for row in (tmp_path / name / "run/metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4]


def _sharded_runs(ranks: Ranks, runs: Path) -> None:
    flags: dict[str, Any] = {
        "use_val_set": True,
        "val_freq": 2,
        "val_time_limit": 1,
        "max_grad_norm": 1.0,
        "save_freq": 2,
    }

    def run(name: str, steps: int, fsdp: bool) -> None:
        going_on = (runs / name).exists()
        ranks.share()
        changes = {**flags, "max_steps": steps, "fsdp": fsdp, "resume": going_on}
        changes["merge_lora_during_training"] = name != "whole"
        Trainer(_config(runs / name, ranks.world, **changes), ranks).run()

    run("no", 2, False)
    run("yes", 2, True)
    ranks.on_main(lambda: [shutil.copytree(runs / a, runs / b) for a, b in (("no", "mixed"), ("yes", "back"))])
    for name, fsdp in (("no", False), ("yes", True), ("mixed", True), ("back", False), ("whole", True)):
        run(name, 4, fsdp)


def test_sharding_that_cannot_be_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FlagError, match="--fsdp True needs several processes"):
        Trainer(_config(tmp_path, 1, fsdp=True))
    monkeypatch.delattr("torch.distributed.fsdp.fully_shard")
    with pytest.raises(FlagError, match=r"--fsdp True needs torch 2\.6 or newer"):
        sharding.shard(load_openvla(EMBEDDED_VLA), Ranks(0, 2), "fp32")


def _poisoned(ranks: Ranks, runs: Path, what: str) -> tuple[list[Any], bool]:
    """Three steps, in the second of which the last rank's contexts, or its robot's state, are NaN."""
    trainer: Any = Trainer(_config(runs, ranks.world, max_steps=3), ranks)
    forward, weights, skipped = trainer._forward_policy, [], []

    def poison(batch: Any, *args: Any) -> Any:
        broken = trainer.step == 1 and ranks.rank == ranks.world - 1
        if broken and what == "state":
            batch["proprio"][0, 0] = torch.nan
        output = forward(batch, *args)
        assert output is not None
        lost = broken and what == "context"
        return dataclasses.replace(output, context=torch.full_like(output.context, torch.nan)) if lost else output

    trainer._forward_policy = poison
    shard = (ranks.rank, ranks.world)
    batches = trainer.job.train.batches(trainer.config.batch_size, shard=shard)
    for trainer.step in range(3):
        metrics = trainer.train_step(batches)
        skipped.append([float(metrics[f"{part}/skipped"]) for part in ("energy", "train")])
        own = "" if what == "state" else "head."  # a NaN in the state is in the policy's gradient, too
        weights.append({name: value.clone() for name, value in _weights(trainer).items() if name.startswith(own)})
    same = all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    return [skipped, same, weights[2]], all(bool(value.isfinite().all()) for value in weights[2].values())


@pytest.mark.parametrize(("world", "what"), [(2, "context"), (4, "context"), (2, "state")])
def test_a_nan_on_one_rank_makes_all_skip(tmp_path: Path, world: int, what: str) -> None:
    found = results(world, _poisoned, tmp_path, tmp_path, what)
    for (skipped, unchanged, weights), finite in found:
        assert skipped == [[0.0, 0.0], [1.0, float(what == "state")], [0.0, 0.0]] and unchanged and finite
        assert all(torch.equal(value, weights[name]) for name, value in found[0][0][2].items())


def _fails(ranks: Ranks, runs: Path, what: str) -> None:
    """One rank's trouble of kind `what`."""
    trainer: Any = Trainer(_config(runs, ranks.world, max_steps=3, save_freq=1), ranks)
    own = ranks.rank == (0 if what == "save" else 1)
    if what == "save" and own:
        checkpoints.save = _refuse("the disk is full")
    if what == "weights" and own:
        with torch.no_grad():
            next(iter(trainer.parameters)).add_(1.0)
    trainer.config.check_ranks_every = 1
    ranks.contact._pulse.patience = 10  # pyright: ignore[reportOptionalMemberAccess]
    real = trainer.train_step

    def step(*args: Any) -> Any:
        if what == "step" and own and trainer.step == 1:
            (runs / "failed_at").write_text(repr(time.time()))
            raise ValueError("no such thing")
        if what == "killed" and own and trainer.step == 1:
            (runs / "failed_at").write_text(repr(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        if what in ("stopped", "main_stopped") and ranks.rank == (1 if what == "stopped" else 0) and trainer.step == 1:
            (runs / "failed_at").write_text(repr(time.time()))
            os.kill(os.getpid(), signal.SIGSTOP)
        return real(*args)

    trainer.train_step = step
    if what == "data" and own:
        trainer.job.train.batches = lambda *_, **__: iter([])
    trainer.run()


def _refuse(text: str) -> Callable[..., Any]:
    def refuse(*_: Any) -> Any:
        raise OSError(text)

    return refuse


@pytest.mark.parametrize(
    ("what", "world", "own", "told"),
    [
        ("save", 2, 0, r"rank 0: OSError: the disk is full"),
        ("data", 2, 1, r"rank 1: StopIteration"),
        ("step", 2, 1, r"rank 1: ValueError: no such thing"),
        ("step", 4, 1, r"rank 1: ValueError: no such thing"),
        ("weights", 2, None, r"after step 1: the ranks' weights differ"),
        ("killed", 2, 1, r"rank 1 ended without a word"),
        ("killed", 4, 1, r"rank 1 ended without a word"),
        ("stopped", 2, 1, r"rank 1 gave no sign of life"),
        ("main_stopped", 4, 0, r"rank 0 gave no sign of life"),
    ],
)
def test_what_ends_one_rank_is_told_by_the_others_and_ends_them(
    tmp_path: Path, what: str, world: int, own: int | None, told: str
) -> None:
    found = run_ranks(world, _fails, tmp_path, tmp_path / "runs", what, left=own if "stopped" in what else None)
    if what in ("step", "killed") or "stopped" in what:
        seconds = time.time() - float((tmp_path / "runs" / "failed_at").read_text())
        print(f"{what}, {world} ranks: all ended {seconds:.1f} s later")
        assert seconds < 60
    for rank, text in enumerate(found):
        if rank == own:
            assert text == "killed" if what == "killed" or "stopped" in what else "RankError" not in text
        else:
            assert text.startswith("RankError: ") and told in text, (rank, text)


def _fails_within_the_model(ranks: Ranks, runs: Path, number: int) -> None:
    """One rank ends while the other waits in an exchange that FSDP began."""
    trainer: Any = Trainer(_config(runs, ranks.world, max_steps=3, fsdp=True), ranks)
    ranks.contact._pulse.patience = 10  # pyright: ignore[reportOptionalMemberAccess]

    def fail(*_: Any) -> None:
        if trainer.step == 1:
            (runs / "failed_at").write_text(repr(time.time()))
            os.kill(os.getpid(), number)

    if ranks.rank == 1:
        trainer.job.vla.backbone.language_model.model.layers[0].mlp.register_forward_pre_hook(fail)
    trainer.run()


@pytest.mark.parametrize(
    ("number", "told"), [(signal.SIGKILL, "ended without a word"), (signal.SIGSTOP, "gave no sign of life")]
)
def test_what_ends_one_rank_of_a_sharded_run_is_told(tmp_path: Path, number: int, told: str) -> None:
    found = run_ranks(2, _fails_within_the_model, tmp_path, tmp_path / "runs", number, left=1)
    seconds = time.time() - float((tmp_path / "runs" / "failed_at").read_text())
    print(f"sharded, {number}: ended {seconds:.1f} s later: {found[0]}")
    assert seconds < 60
    assert found[0].startswith(f"RankError: rank 1 {told}") and found[1] == "killed"


def _other_flags(ranks: Ranks, runs: Path) -> None:
    Trainer(_config(runs, ranks.world, max_steps=3 + ranks.rank), ranks)


def test_ranks_with_other_flags_are_refused_on_all(tmp_path: Path) -> None:
    found = run_ranks(2, _other_flags, tmp_path, tmp_path / "runs")
    assert found == ["FlagError: --max_steps is 3 on rank 0 and 4 on rank 1: start all alike"] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_the_others_never_join_ends(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that failed before: a wrong flag, an import."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("vla_energy.distributed.MEETING", timedelta(seconds=2))
    with (
        pytest.raises(RankError, match=rf"process {rank} met not all 2 .* 127\.0\.0\.1:{port} within 2 s"),
        start("cpu"),
    ):
        pass


def test_the_script_under_torchrun(tmp_path: Path) -> None:
    flags = ["--run_root_dir", str(tmp_path), "--run_id_override", "run", "--max_steps", "2", "--batch_size", "2"]
    flags += ["--shuffle_buffer_size", "16", "--precision", "fp32", "--use_proprio", "True", "--wandb_log_freq", "1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(Path(__file__).parents[1] / "scripts" / "finetune_energy.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, script, *flags], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("trainer: saved") == 1
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 2 and (tmp_path / "run--2_chkpt" / checkpoints.STATE).is_file()


def test_shards_of_the_data_are_what_one_reader_takes() -> None:
    data = RldsDataset(
        EMBEDDED_DATA, "metaworld_demo", horizon=4, image_aug=True, image_size=(16, 16), shuffle_buffer_size=32
    )
    whole = data.batches(6, skip=2)
    parts = [data.batches(2, skip=2, shard=(rank, 3)) for rank in range(3)]
    for _ in range(2):
        expected, found = next(whole), [next(part) for part in parts]
        for key in ("images", "actions", "episode", "step"):
            assert (torch.cat([torch.tensor(part[key]) for part in found]) == torch.tensor(expected[key])).all(), key
        assert [text for part in found for text in part["instructions"]] == expected["instructions"]
    for stream in (whole, *parts):
        stream.close()
    with pytest.raises(DatasetError, match="shard"):
        data.batches(2, shard=(2, 2))
    with pytest.raises(DatasetError, match="repeat"):
        data.batches(2, shard=(0, 2), repeat=False)


def _wait_long(ranks: Ranks) -> list[str]:
    contact._LONG = 3
    heard = io.StringIO()
    contact.logger.addHandler(logging.StreamHandler(heard))
    if ranks.rank == 1:
        time.sleep(4.5)
    ranks.share()
    return heard.getvalue().splitlines()


def test_a_long_wait_is_told_by_who_waits(tmp_path: Path) -> None:
    waited, _ = results(2, _wait_long, tmp_path)
    assert waited[0].startswith("rank 0 has waited 3 s for rank 1, alive but at something else: data, a validation")


def _hang(ranks: Ranks, runs: Path, hangs: int) -> None:
    """The main thread of one rank does not come back, while its pulse goes on: a drive that does not answer."""
    ranks.contact._longest_wait = 5
    trainer = Trainer(_config(runs, ranks.world, max_steps=3), ranks)
    trainer.step = 1
    if ranks.rank == hangs:
        (runs / "failed_at").write_text(repr(time.time()))
        threading.Event().wait()
    ranks.on_main(lambda: None)
    ranks.each(lambda: None)


def test_ranks_are_waited_for_longer_than_a_validation_takes() -> None:
    seconds = [FinetuneConfig(rank_wait_minutes=wait, val_time_limit=180).longest_wait for wait in (60, 1, 0)]
    assert seconds == [3600, 360, math.inf]


@pytest.mark.parametrize(("world", "hangs"), [(2, 1), (4, 0)])
def test_a_rank_that_hangs_while_it_lives_ends_the_others(tmp_path: Path, world: int, hangs: int) -> None:
    (tmp_path / "runs").mkdir()
    found = run_ranks(world, _hang, tmp_path, tmp_path / "runs", hangs, left=hangs)
    assert time.time() - float((tmp_path / "runs" / "failed_at").read_text()) < 60
    for rank, text in enumerate(found):
        told = rf"RankError: rank \d has waited 5 s for rank {hangs}, alive but at something else"
        assert text == "killed" if rank == hangs else re.match(told, text), (rank, text)


def test_a_single_process_exchanges_nothing() -> None:
    rows = torch.arange(6.0).requires_grad_()
    assert ALONE.gather(rows) is ALONE.gather_with_gradient(rows) is ALONE.mean(rows) is ALONE.largest(rows) is rows
    assert ALONE.own(rows).tolist() == rows.tolist() and ALONE.is_main and not ALONE.traffic
    before = torch.get_rng_state()
    with ALONE.own_randomness(3):
        torch.rand(2)
    assert not torch.equal(before, torch.get_rng_state())  # as ever
    with pytest.raises(ValueError, match="mine"):
        ALONE.on_main(lambda: (_ for _ in ()).throw(ValueError("mine")))
    assert issubclass(RankError, RuntimeError)


def test_who_is_silent_is_counted_in_own_beats() -> None:
    class Shelf(dict[str, bytes]):
        def set(self, key: str, value: str) -> None:
            self[key] = value.encode()

        def check(self, keys: list[str]) -> bool:
            return all(key in self for key in keys)

        def get(self, key: str) -> bytes:  # pyright: ignore[reportIncompatibleMethodOverride]
            return self[key]

    shelf = Shelf()
    pulse = Pulse(shelf, 0, 3)
    pulse.end()
    assert pulse.beats >= 1 and shelf["beat/0"] == str(pulse.beats - 1).encode() and not pulse.lost
    pulse.patience = 3
    for beat in range(6):
        shelf.set("beat/1", str(beat))
        if beat < 2:
            shelf.set("beat/2", str(beat))
        pulse._beat()
        assert pulse.silent == ([2] if beat >= 4 else [])  # three looks after the last sign
    shelf.set("beat/2", "back")
    pulse._beat()
    assert not pulse.silent
    others = Pulse(shelf, 0, 4)  # rank 3 was never heard: it may still start
    others.end()
    for _ in range(40):
        others._beat()
    assert others.silent == [1, 2]
