"""The feature cache: what is in it, that a build goes on and mends, what is refused; heads from it equal the online."""

from __future__ import annotations

import copy
import errno
import json
import os
import shlex
import shutil
import signal
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vla_energy.cache import CachedFrames, CacheError, FeatureCache, Manifest, frame_bytes, pack
from vla_energy.checkpoint import load_head
from vla_energy.cli import main
from vla_energy.config import EnergyConfig, LossConfig
from vla_energy.finetune import cached, features, head_runs
from vla_energy.finetune.cached import CachedTraining, check_held_out, shuffled
from vla_energy.finetune.config import FinetuneConfig, FlagError
from vla_energy.finetune.features import CacheBuilder, CacheOptions
from vla_energy.finetune.frames import FrameReader
from vla_energy.finetune.head_runs import check_made_of, parse_energy
from vla_energy.finetune.pooling import patch_grid, pool_patches
from vla_energy.finetune.setup import EMBEDDED_DATA
from vla_energy.finetune.signals import RunStoppedError
from vla_energy.finetune.trainer import Trainer
from vla_energy.fingerprint import fingerprint
from vla_energy.rollout.policy import load_policy

DATASET, FRAMES, BATCH, SEED = "metaworld_demo", 28, 4, 7


class Killed(Exception):
    pass


def _builder(checkpoint: Path, out: Path, root: str | Path = "embedded", **changes: Any) -> CacheBuilder:
    options = {"dtype": "fp32", "batch_size": BATCH, "shard_frames": 8, "max_frames": FRAMES} | changes
    return CacheBuilder(str(checkpoint), str(root), DATASET, out, CacheOptions(**options), seed=SEED)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def built(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "cache"
    _builder(tiny_folder, folder).build()
    return folder


@pytest.fixture(scope="module")
def cache(built: Path) -> FeatureCache:
    return FeatureCache(built)


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "copy")
    return tmp_path / "copy"


def _spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("features-*"))


def test_frames_are_the_readers(tiny_folder: Path, cache: FeatureCache, built: Path) -> None:
    reader = FrameReader(str(tiny_folder), "embedded", DATASET, seed=SEED)
    batches = list(reader.read("train", FRAMES, BATCH))
    assert len(cache) == FRAMES == sum(len(batch.expert) for batch in batches) and len(_shards(built)) == 4
    assert cache.statistics.to_dict() == reader.statistics.to_dict()
    for index, batch in enumerate(batches):
        found = cache.batch(range(index * BATCH, (index + 1) * BATCH))
        assert torch.equal(found.context_mask, batch.context_mask)
        assert torch.equal(found.context, batch.context.masked_fill(~batch.context_mask[..., None], 0.0))
        assert torch.equal(found.expert, batch.expert) and torch.equal(found.layer_actions, batch.layer_actions)
        assert torch.equal(found.episodes, batch.episodes) and batch.steps is not None
        assert torch.equal(found.steps, batch.steps)
    mixed = [27, 3, 9]
    assert torch.equal(cache.batch(mixed).expert, torch.cat([batch.expert for batch in batches])[mixed])
    assert torch.equal(cache.batch(mixed).episodes, cache.episodes[mixed])
    with pytest.raises(IndexError, match="frame 28: the cache has 28"):
        cache.batch([28])
    lengths = torch.cat([batch.context_mask.sum(1) for batch in batches]).double()
    assert reader.tokens("train", FRAMES) == float(lengths.mean())


def test_a_mask_with_holes_survives_and_bf16_halves_the_context() -> None:
    mask = torch.tensor([[True, False, True, False], [True, True, True, True]])
    context = torch.arange(2 * 4 * 3.0).view(2, 4, 3).masked_fill(~mask[..., None], float("nan"))
    frames = CachedFrames(context, mask, *(torch.zeros(2, *shape) for shape in ((8, 4), (5, 8, 4), (), ())))
    full, half = (pack([frames], dtype) for dtype in ("fp32", "bf16"))
    assert full[1]["tokens"] == half[1]["tokens"] == 3 + 4, "cut after the last valid token"
    assert len(full[0]) - len(half[0]) == 7 * 3 * 2
    header = 8 + int.from_bytes(full[0][:8], "little")
    assert len(full[0]) - header == pytest.approx(2 * frame_bytes(3.5, 3, 5, 8, 4, "fp32") - 2 * 2 * 4), (
        "episodes and steps are fp32 in this test"
    )


def test_the_size_is_told_before(tiny_folder: Path, built: Path, tmp_path: Path) -> None:
    builder = _builder(tiny_folder, tmp_path / "none")
    written = sum(path.stat().st_size for path in _shards(built))
    assert written - 4 * 1200 < builder.size < written * 1.02
    assert "28 frames of" in builder.describe() and "in 4 shards" in builder.describe()
    assert not (tmp_path / "none").exists()


def test_killed_and_torn_builds_go_on_to_the_same_bytes(tiny_folder: Path, built: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"

    def kill(index: int) -> None:
        if index == 2:
            raise Killed

    with pytest.raises(Killed):
        _builder(tiny_folder, out).build(kill)
    _spoil(_shards(out)[1])
    (out / ".partial-of-a-kill").write_bytes(b"half")
    with pytest.raises(CacheError, match="2 of 4 shards .* missing or damaged, features-00001"):
        FeatureCache(out)
    written: list[int] = []
    builder = _builder(tiny_folder, out)
    assert builder.todo == [1, 3] and builder.left == pytest.approx(builder.size * 12 / 28)
    builder.build(written.append)
    (out / ".partial-of-a-kill").unlink()
    assert written == [1, 3] and _bytes(out) == _bytes(built)
    assert _builder(tiny_folder, out).todo == []


def test_the_command_in_the_message_mends_a_torn_shard(
    copied: Path, built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _spoil(_shards(copied)[3])
    _shards(copied)[0].unlink()
    with pytest.raises(CacheError, match="this command builds them") as caught:
        FeatureCache(copied)
    command = shlex.split(str(caught.value).partition("leaves the others: ")[2])
    assert command[:2] == ["vla-energy", "cache"]
    capsys.readouterr()
    assert main([*command[1:], "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["frames"] == 28 and 0 < told["left"] < told["bytes"]
    assert main([*command[1:], "--json"]) == 0 and _bytes(copied) == _bytes(built)
    assert json.loads(capsys.readouterr().out) == {
        "frames": 28, "bytes": sum(path.stat().st_size for path in _shards(built)), "left": 0
    }  # fmt: skip


def test_a_full_disk_stops_with_what_is_left(
    tiny_folder: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, usage = tmp_path / "cache", namedtuple("usage", "free")
    builder = _builder(tiny_folder, out)
    with monkeypatch.context() as patch:
        patch.setattr(features.shutil, "disk_usage", lambda _: usage(1000))
        with pytest.raises(CacheError, match=r"1 kB free, too little. Left to do: 28 of 28 frames, 4 of 4 shards"):
            builder.build()
    assert not out.exists()
    sync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if (out / "features-00000-of-00004.safetensors").exists() and (out / "cache.json").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CacheError, match="No space left.*Left to do: 20 of 28 frames, 3 of 4 .*vla-energy cache "):
            builder.build()
    assert len(calls) > 1 and sorted(_bytes(out)) == ["cache.json", "features-00000-of-00004.safetensors"]
    _builder(tiny_folder, out).build()
    assert _bytes(out) == _bytes(built)


def _changed(folder: Path, out: Path, name: str) -> Path:
    shutil.copytree(folder, out)
    path = next(out.glob(name))
    if name.endswith(".json"):
        data = json.loads(path.read_text())
        next(iter(data.values()))["action"]["q99"][0] += 0.5
        path.write_text(json.dumps(data))
    else:
        _spoil(path)
    return out


def test_another_checkpoint_dataset_or_normalisation_is_refused(
    tiny_folder: Path, cache: FeatureCache, built: Path, tmp_path: Path
) -> None:
    check_made_of(cache)
    check_made_of(cache, str(shutil.copytree(tiny_folder, tmp_path / "moved")), str(EMBEDDED_DATA))
    trained = _changed(tiny_folder, tmp_path / "trained", "model*.safetensors")
    with pytest.raises(CacheError, match="another checkpoint.*build a cache of these: vla-energy cache"):
        check_made_of(cache, str(trained))
    scaled = _changed(tiny_folder, tmp_path / "scaled", "dataset_statistics.json")
    with pytest.raises(CacheError, match="other normalisation statistics"):
        check_made_of(cache, str(scaled))
    with pytest.raises(CacheError, match="is not there; say with --checkpoint"):
        check_made_of(cache, str(tmp_path / "gone"))
    root = tmp_path / "data"
    shutil.copytree(EMBEDDED_DATA / DATASET, root / DATASET)
    check_made_of(cache, root=str(root))
    _spoil(next(root.rglob("*.tfrecord*")))
    with pytest.raises(CacheError, match="another dataset"):
        check_made_of(cache, root=str(root))
    before = _bytes(built)
    with pytest.raises(CacheError, match=r"made otherwise: the checkpoint .*the normalisation statistics; name anothe"):
        _builder(scaled, built)
    with pytest.raises(CacheError, match=r"made otherwise: dtype \(fp32, here bf16\); name another --out"):
        _builder(tiny_folder, built, dtype="bf16")
    assert _bytes(built) == before


def test_a_cache_of_ones_own_dataset_names_the_file_of_its_fields(
    tiny_folder: Path, built: Path, own_data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root, fields), out = own_data, tmp_path / "cache"
    given = ["cache", "--checkpoint", str(tiny_folder), "--data-root-dir", str(root), "--dataset-name", "my_robot"]
    more = ["--out", str(out), "--max-frames", "8", "--batch-size", str(BATCH), "--shard-frames", "8", "--seed", "7"]
    assert main([*given, *more, "--dtype", "fp32"]) == 2 and not out.exists()
    assert "--dataset-config FILE" in capsys.readouterr().err
    assert main([*given, *more, "--dtype", "fp32", "--dataset-config", str(fields)]) == 0
    cache = FeatureCache(out)
    assert torch.equal(cache.batch(range(8)).context, FeatureCache(built).batch(range(8)).context)
    assert f"--dataset-config {fields}" in cache.manifest.command(out)
    check_made_of(cache)
    fields.rename(tmp_path / "moved.json")
    check_made_of(cache, root=str(root), config=str(tmp_path / "moved.json"))
    with pytest.raises(CacheError, match="cannot read the dataset configuration"):
        check_made_of(cache, root=str(root))
    with pytest.raises(CacheError, match="--dataset-config .*nowhere.json: cannot read the dataset configuration"):
        check_made_of(cache, config=str(tmp_path / "nowhere.json"))
    fields.write_text(json.dumps({"my_robot": {"proprio_keys": []}}))
    with pytest.raises(CacheError, match=f"another dataset than my_robot.*--dataset-config {fields}"):
        check_made_of(cache)
    heads = ["train-head", "--cache", str(out), "--out", str(tmp_path / "heads"), "--max-steps", "1"]
    assert main(heads) == 2 and "another dataset than my_robot" in capsys.readouterr().err
    assert main([*heads, "--dataset-config", str(tmp_path / "moved.json")]) == 0
    flags = json.loads((tmp_path / "heads" / "settings.json").read_text())["flags"]
    shown = ("data_root_dir", "dataset_name", "dataset_config", "use_proprio", "use_lora")
    assert [flags[name] for name in shown] == [str(root), "my_robot", str(tmp_path / "moved.json"), True, False]


def test_a_head_beside_the_policy_does_not_make_another_checkpoint(
    tiny_folder: Path, cache: FeatureCache, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "with-head"))
    (folder / "energy_head--3_checkpoint.safetensors").write_bytes(b"a head")
    (folder / "chunk_memory--0_checkpoint.safetensors").write_bytes(b"a memory")
    check_made_of(cache, str(folder))


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "else", "version": 1}', '{"format": 3}'])
def test_a_broken_manifest_is_told(copied: Path, text: str) -> None:
    (copied / "cache.json").write_text(text)
    with pytest.raises(CacheError, match="cache.json is damaged or of another version"):
        FeatureCache(copied)
    (copied / "cache.json").unlink()
    with pytest.raises(CacheError, match="is no feature cache"):
        Manifest.read(copied)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "fp16"}, "--dtype='fp16': expected one of bf16, fp32"),
        ({"shard_frames": 10, "batch_size": 4}, "--shard-frames=10: expected a multiple of --batch-size 4"),
        ({"max_frames": 0}, "--max-frames=0"),
        ({"pool": 0}, "--pool=0"),
    ],
)
def test_bad_options(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CacheOptions(**changes)


# --- training from it ---


def _config(checkpoint: Path, runs: Path, energy: EnergyConfig | None = None, **changes: Any) -> FinetuneConfig:
    return FinetuneConfig(
        vla_path=str(checkpoint), run_root_dir=runs, run_id_override="run", use_proprio=True, image_aug=False,
        use_lora=False, precision="fp32", batch_size=BATCH, max_steps=FRAMES // BATCH, seed=SEED, wandb_log_freq=1,
        device="cpu", energy_warm_steps=3, energy=energy or EnergyConfig(freeze_backbone=True), **changes,
    )  # fmt: skip


def _weights(head: torch.nn.Module | None) -> dict[str, Tensor]:
    assert head is not None
    return {name: value.detach().clone() for name, value in head.state_dict().items()}


def _rows(runs: Path) -> list[dict[str, float]]:
    rows = [json.loads(row) for row in (runs / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key not in ("frames_per_second", "energy/ms")} for row in rows]


def test_the_head_is_that_of_the_online_training(tiny_folder: Path, cache: FeatureCache, tmp_path: Path) -> None:
    online = Trainer(_config(tiny_folder, tmp_path / "online"))
    start = _weights(online.head)
    online.run()
    offline = CachedTraining(_config(tiny_folder, tmp_path / "offline"), cache)
    offline.run(torch.arange(FRAMES).split(BATCH))
    expected, found = _weights(online.head), _weights(offline.head)
    assert any(not torch.equal(start[name], expected[name]) for name in start)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=0, msg=name)
    assert offline.training.guard.counters == online.training.guard.counters if online.training else False
    theirs, ours = _rows(tmp_path / "online"), _rows(tmp_path / "offline")
    assert [row.keys() for row in theirs] == [row.keys() for row in ours] and len(ours) == FRAMES // BATCH
    for their, our in zip(theirs, ours, strict=True):
        assert our == pytest.approx(their, rel=1e-4, abs=1e-5)
    other = CachedTraining(_config(tiny_folder, tmp_path / "other"), cache)
    other.run(torch.arange(FRAMES).flip(0).split(BATCH))
    assert any((_weights(other.head)[name] - value).abs().max() > 1e-4 for name, value in expected.items())


def test_a_signal_saves_the_head_as_it_is(tiny_folder: Path, cache: FeatureCache, tmp_path: Path) -> None:
    training: Any = CachedTraining(_config(tiny_folder, tmp_path), cache)
    real, wanted = training.train_step, training.config.max_steps

    def step(rows: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(rows)

    training.train_step = step
    with pytest.raises(
        RunStoppedError, match=rf"SIGTERM: stopped and saved .*it has taken 1 of {wanted} steps"
    ) as ended:
        training.run()
    assert ended.value.exit_code == 143 and load_head(training.config.run_dir).step == 1


def test_a_signal_breaks_off_a_validation_of_the_head(tiny_folder: Path, cache: FeatureCache, tmp_path: Path) -> None:
    _builder(tiny_folder, tmp_path / "val", split="val", shard_frames=20, max_frames=40).build()
    val = FeatureCache(tmp_path / "val")
    training: Any = CachedTraining(_config(tiny_folder, tmp_path, val_freq=1), cache, held_out=val)
    real = training._held_out

    def interrupted(frames: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        yield from real(frames)

    training._held_out = interrupted
    with pytest.raises(RunStoppedError, match="SIGTERM: stopped and saved .*it has taken 1 of"):
        training.run()
    assert load_head(training.config.run_dir).step == 1 and training.gate is None


def test_every_epoch_has_each_frame_once_in_another_order() -> None:
    batches = shuffled(10, 4, 0)
    rows = torch.cat([next(batches) for _ in range(5)])
    first, second = rows[:10].tolist(), rows[10:].tolist()
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    again, other = (torch.cat([next(more) for _ in range(5)]) for more in (shuffled(10, 4, 0), shuffled(10, 4, 1)))
    assert torch.equal(again, rows) and not torch.equal(other, rows)


def test_contexts_that_are_not_finite_are_not_stored(tiny_folder: Path, tmp_path: Path) -> None:
    builder = _builder(tiny_folder, tmp_path / "cache", shard_frames=8, max_frames=24)
    read, places = builder._reader.read, []

    def overflowing(*args: Any, **kwargs: Any) -> Any:
        for number, frames in enumerate(read(*args, **kwargs)):
            if number == 1:
                frames.context[3, 0, 0] = torch.inf
                assert frames.steps is not None
                places.extend((int(frames.episodes[3]), int(frames.steps[3])))
            yield frames

    builder._reader.read = overflowing  # type: ignore[method-assign]
    with pytest.raises(CacheError, match=r"episode \d+, step \d+: the context is not finite") as raised:
        builder.build()
    assert str(raised.value).startswith(f"episode {places[0]}, step {places[1]}:")
    builder._reader.read = read  # type: ignore[method-assign]
    builder.build()
    assert len(FeatureCache(tmp_path / "cache")) == 24


def test_skipped_steps_are_told(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["train-head", "--cache", str(built), "--batch-size", "8", "--max-steps", "2"]
    assert main([*flags, "--out", str(tmp_path / "a")]) == 0
    assert "head: all 2 steps were taken" in capsys.readouterr().out
    monkeypatch.setattr("vla_energy.guard.total_norm", lambda gradients: torch.tensor(torch.nan))
    assert main([*flags, "--out", str(tmp_path / "b")]) == 0
    assert "head: 2 of 2 steps were skipped (nonfinite 2); WARNING" in capsys.readouterr().out
    assert main([*flags, "--out", str(tmp_path / "c"), "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)["head"]["steps"]
    assert steps == {"steps": 0, "clipped": 0, "nonfinite": 2, "too_large": 0, "no_gradient": 0}


def test_several_presets_make_checkpoints_that_rollouts_take(
    tiny_folder: Path, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = tmp_path / "val"
    _builder(tiny_folder, held_out, split="val", shard_frames=20, max_frames=40).build()
    out = tmp_path / "heads"
    flags = ["train-head", "--cache", str(built), "--out", str(out), "--batch-size", "8", "--epochs", "1.5"]
    more = ["--val-cache", str(held_out), "--presets", "stage1,recommended", "--energy.loss.listwise", "0.25"]
    assert main([*flags, *more, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {name: one["folder"] for name, one in told.items()} == {
        name: str(out / name) for name in ("stage1", "recommended")
    }
    assert -1 <= told["recommended"]["results"]["energy"]["spearman"] <= 1
    for name in ("stage1", "recommended"):
        assert "rerank" in load_policy(str(out / name)).arms
        head = load_head(out / name)
        assert head.step == 6 and head.config.freeze_backbone and head.config.loss.listwise == 0.25
        assert head.config.range == EnergyConfig.preset(name).range and "gate_margin" not in head.extra
        rows = [json.loads(row) for row in (out / name / "metrics.jsonl").read_text().splitlines()]
        assert rows[-1]["step"] == 6 and "val/rerank/l1_oracle" in rows[-1]
    assert main([*flags, *more]) == 2 and "stage1 is not empty" in capsys.readouterr().err
    wrong = [*flags[:4], str(tmp_path / "wrong")]
    for extra, message in (
        (["--presets", "stage9"], "--presets='stage9': expected one of original, stage1"),
        (["--energy.loss.listwise", "much"], "listwise"),
        (["--energy.loss.listwize", "1"], "--energy.loss.listwize"),
        (["--epochs", "2", "--max-steps", "3"], "leave one out"),
        (["--max-steps", "0"], "--max-steps 0: must be 1 or more"),
        (["--batch-size", "0"], "--batch-size 0: must be 1 or more"),
        (["--val-cache", str(built)], "has the split train, as"),
        (["--energy.negatives.layer_exits.normed", "True"], "build one with --layer-exits normed"),
        (["--energy.rollouts.dataset", "some", "--max-steps", "1"], "a cache has no recorded rollouts"),
    ):
        assert main([*wrong, *extra]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()
    cached.link_policy(tiny_folder, tmp_path / "val", copy=True)
    assert not (tmp_path / "val" / "config.json").is_symlink()


def test_what_is_no_part_of_the_policy_is_not_linked(tiny_folder: Path, tmp_path: Path) -> None:
    """A report that is written beside the new head must not go through a link into the checkpoint."""
    checkpoint, folder = Path(shutil.copytree(tiny_folder, tmp_path / "vla")), tmp_path / "head"
    own = sorted(path.name for path in checkpoint.iterdir())
    theirs = [
        "README.md", "report.html", "preflight.json", "preflight.html", "rollout.json", "footage.json", "shapes.json",
        "settings.json", "metrics.json", "metrics.jsonl", "energy_metrics.jsonl", "energy_gates.json", "curves.svg",
        "energy_head--3_checkpoint.safetensors", "energy_state--3_checkpoint.pt", "training_state.pt", ".cache",
    ]  # fmt: skip
    hosts = [
        "LICENSE", "added_tokens.json", "chunk_memory--0_checkpoint.safetensors", "generation_config.json",
        "manifest.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "modeling_prismatic.py",
        "noisy_action_projector--3_checkpoint.pt", "processor_config.json", "tokenizer.model",
        "vision_backbone--3_checkpoint.pt",
    ]  # fmt: skip
    for name in (*theirs, *hosts):
        (checkpoint / name).write_text("here")
    for name in ("tensorboard", "lora_adapter"):
        (checkpoint / name).mkdir()
    folder.mkdir()
    cached.link_policy(checkpoint, folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*own, *hosts, "lora_adapter"])
    assert fingerprint(folder, policy_only=True) == fingerprint(checkpoint, policy_only=True)


@pytest.mark.parametrize("command", ["cache", "memory", "preflight", "rollout", "doctor", "train-head"])
def test_a_runs_folder_leads_to_its_checkpoint(
    command: str, tiny_folder: Path, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latest = Path(shutil.copytree(tiny_folder, tmp_path / "run" / "latest"))
    out, data = ["--out", str(tmp_path / "out")], ["--data-root-dir", "embedded", "--dataset-name", DATASET]
    more = {
        "rollout": ["--tasks", "reach", "--episodes", "1"], "train-head": ["--cache", str(built)], "doctor": [],
    }.get(command, data)  # fmt: skip
    if command not in ("doctor", "memory"):
        more = [*more, *out]
    assert main([command, "--checkpoint", str(tmp_path / "run"), *more]) == 2
    assert f"it is a run's folder: name its checkpoint {latest}\n" in capsys.readouterr().err


def test_a_held_out_cache_made_otherwise_is_refused(
    tiny_folder: Path, cache: FeatureCache, copied: Path, tmp_path: Path
) -> None:
    manifest = Manifest.read(copied)
    manifest.options["precision"] = "bf16"
    manifest.write(copied)
    with pytest.raises(CacheError, match=r"was not made as .*precision \(fp32, here bf16\)"):
        CachedTraining(_config(tiny_folder, tmp_path), cache, FeatureCache(copied))


def test_a_held_out_cache_is_of_the_other_split_and_the_same_dataset(cache: FeatureCache, copied: Path) -> None:
    def held_out(**dataset: str) -> FeatureCache:
        manifest = Manifest.read(copied)
        manifest.dataset = {**cache.manifest.dataset, **dataset}
        manifest.write(copied)
        return FeatureCache(copied)

    check_held_out(cache, held_out(split="val"))
    with pytest.raises(CacheError, match="has the split train, as .*judged on what they learn"):
        check_held_out(cache, held_out(split="train"))
    with pytest.raises(CacheError, match=r"the dataset's name \(.*, here other\)"):
        check_held_out(cache, held_out(split="val", name="other"))
    with pytest.raises(CacheError, match="the dataset's fingerprint"):
        check_held_out(cache, held_out(split="val", fingerprint="f"))


@pytest.mark.parametrize(("mine", "theirs", "fits"), [(2, 1, True), (2, 2, True), (1, 2, False), (2, 8, False)])
def test_heads_of_pooled_contexts_are_judged_on_whole_ones_too(
    cache: FeatureCache, copied: Path, mine: int, theirs: int, fits: bool
) -> None:
    manifest = Manifest.read(copied)
    manifest.dataset = {**cache.manifest.dataset, "split": "val"}
    manifest.options["pool"] = theirs
    manifest.write(copied)
    whole = FeatureCache(copied)
    pooled = copy.copy(cache)
    pooled.manifest = replace(cache.manifest, options={**cache.manifest.options, "pool": mine})
    if fits:
        check_held_out(pooled, whole)
    else:
        with pytest.raises(CacheError, match=rf"pool \({mine} or 1, here {theirs}\)"):
            check_held_out(pooled, whole)


def test_settings_of_a_preset_and_flags() -> None:
    energy = parse_energy({"loss": {"margin": 1.0, "margin_sources": ["in_batch"]}}, {"energy.loss.listwise": "0.5"})
    assert energy.freeze_backbone
    assert energy.loss == LossConfig(margin=1.0, margin_sources=("in_batch",), listwise=0.5)
    with pytest.raises(FlagError, match="margin"):
        parse_energy({}, {"energy.loss.margin": "-1"})
    assert head_runs.PRESETS


# --- pooled patches ---


def test_pooled_patches_are_means_of_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, grid, images, dim = 3, 4, 2, 5
    length = 1 + images * grid**2 + 6
    context = torch.randn(rows, length, dim, generator=generator)
    mask = torch.arange(length)[None] < torch.tensor([[length], [length - 2], [length - 5]])
    pooled, pooled_mask = pool_patches(context, mask, grid, images, 2)
    expected = [context[:, :1]]
    for image in range(images):
        patches = context[:, 1 + image * grid**2 :][:, : grid**2].view(rows, grid, grid, dim)
        expected += [patches[:, r : r + 2, c : c + 2].mean((1, 2))[:, None] for r in (0, 2) for c in (0, 2)]
    expected.append(context[:, 1 + images * grid**2 :])
    torch.testing.assert_close(pooled, torch.cat(expected, 1))
    assert torch.equal(pooled_mask.sum(1), mask.sum(1) - images * 12)
    with pytest.raises(ValueError, match=r"--pool=3: expected one of \[1, 2, 4\]: an image has 4 x 4 patches"):
        patch_grid(16, 3)
    with pytest.raises(ValueError, match="no square"):
        patch_grid(15, 2)


def test_a_pooled_cache_is_as_large_as_told(tiny_folder: Path, built: Path, tmp_path: Path) -> None:
    builder = _builder(tiny_folder, tmp_path / "pooled", pool=2, max_frames=8)
    builder.build()
    pooled, whole = FeatureCache(tmp_path / "pooled").batch(range(8)), FeatureCache(built).batch(range(8))
    patches = FrameReader(str(tiny_folder), "embedded", DATASET).vla.backbone.vision_backbone.num_patches
    assert torch.equal(pooled.context_mask.sum(1), whole.context_mask.sum(1) - patches * 3 // 4)
    assert torch.equal(pooled.expert, whole.expert) and torch.equal(pooled.context[:, 0], whole.context[:, 0])
    assert abs(FeatureCache(tmp_path / "pooled").nbytes - builder.size) < 0.1 * builder.size
