"""The loaders that the fuzzer feeds: for each a good folder, what reads it, and the errors that it may raise."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chaos_run
import draccus
import numpy as np
import torch
from chaos_mutate import damage_json, nasty
from closed_loop_checks import read_preflight
from safetensors import safe_open
from safetensors.torch import save_file
from sample_run import write_run

from vla_energy import actions, cache, checkpoint, durable, gates, memory
from vla_energy.backbones import load_openvla
from vla_energy.backbones.config import CheckpointFolderError
from vla_energy.backbones.tiny import EMBEDDED
from vla_energy.cache import CachedFrames, FeatureCache, Manifest
from vla_energy.checkpoint import CheckpointError
from vla_energy.config import EnergyConfig
from vla_energy.data import DatasetError, RldsDataset
from vla_energy.data.datasets import dataset_config
from vla_energy.finetune import checkpoints
from vla_energy.finetune.flags import parse_flags
from vla_energy.finetune.logs import MetricLog
from vla_energy.finetune.setup import EMBEDDED_DATA
from vla_energy.head import EnergyHead
from vla_energy.preflight.trials import TrialsError, read_trials
from vla_energy.report.html import write_report
from vla_energy.report.runs import read_runs
from vla_energy.results import read_rows
from vla_energy.rollout import spool

D, S, H, A = 6, 5, 4, 3


@dataclass(frozen=True)
class Target:
    """One loader.

    Attributes:
        make: writes a good folder.
        load: reads it and uses what it read.
        errors: may be raised. A plain ValueError or TypeError among them counts only where our own code raises it.
        hostile: changes the folder in a way that its checksums agree with.
        named: an error has to name a file.
    """

    make: Callable[[Path], Any]
    load: Callable[[Path], Any]
    errors: tuple[type[BaseException], ...]
    hostile: Callable[[Path, random.Random], str] | None = None
    named: bool = True


def statistics(dims: int = A) -> actions.DatasetStatistics:
    values = np.random.default_rng(0).normal(size=(50, dims))
    return actions.DatasetStatistics(actions.FieldStatistics.of(values), None, 50, 5)


def _head(folder: Path) -> None:
    config = EnergyConfig()
    config.head.hidden_dim = 8
    torch.manual_seed(0)
    checkpoint.save_head(folder, EnergyHead(D, A, H, config), 1, statistics(), {"rerank_margin": 0.1})


def _use_head(folder: Path) -> None:
    loaded = checkpoint.load_head(folder)
    if loaded.statistics is not None:
        loaded.statistics.action.normalize(torch.zeros(1, loaded.statistics.action.dim))


def _reseal(*keys: str) -> Callable[[Path, random.Random], str]:
    """Tensors or one of the metadata's JSON `keys` changed, the checksum made anew: what a stranger's file may hold."""

    def hostile(folder: Path, draw: random.Random) -> str:
        path = next(folder.glob("*.safetensors"))
        with safe_open(str(path), framework="pt") as file:
            metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        name = draw.choice(sorted(tensors))
        kind = draw.choice(("metadata", "metadata", "shape", "type", "nan", "drop", "more"))
        if kind == "metadata":
            key = draw.choice(keys)
            metadata[key] = json.dumps(damage_json(json.loads(metadata[key]), draw))
        elif kind == "shape":
            tensors[name] = torch.zeros(draw.choice(((0,), (3, 1), (2, 2, 2), ())))
        elif kind == "type":
            tensors[name] = tensors[name].to(draw.choice((torch.int64, torch.float64, torch.bool, torch.bfloat16)))
        elif kind == "nan":
            tensors[name] = torch.full_like(tensors[name].float(), torch.nan)
        elif kind == "drop":
            del tensors[name]
        else:
            tensors["other"] = torch.zeros(2)
        metadata["sha256"] = checkpoint.digest(tensors, metadata)
        save_file(tensors, str(path), metadata)
        return f"resealed {kind}"

    return hostile


def _frames(count: int, seed: int) -> memory.MemoryBatch:
    draw = torch.Generator().manual_seed(seed)
    context = torch.randn(count, S, D, generator=draw)
    policy, expert = (torch.rand(count, H, A, generator=draw) for _ in range(2))
    mask = torch.ones(count, S, dtype=torch.bool)
    return memory.MemoryBatch(context, mask, policy, expert, torch.arange(count) // 4)


def _memory(folder: Path) -> None:
    memory.ChunkMemory.build([_frames(24, 0)], statistics()).save(folder, 1)


def _use_memory(folder: Path) -> None:
    loaded, asked = memory.ChunkMemory.load(folder), _frames(3, 1)
    try:
        memory.check_memory(loaded, H, A, D)
    except ValueError:  # another policy's: told
        return
    found = loaded.nearest(asked.context, asked.context_mask, asked.policy, 2, asked.episodes)
    assert found.chunks.shape == (3, 2, H, A)


def _cache(folder: Path) -> None:
    part = _frames(6, 0)
    layers = torch.stack([part.policy, part.policy], 1)
    shards = []
    for index in range(2):
        rows = slice(3 * index, 3 * index + 3)
        frame = CachedFrames(
            part.context[rows], part.context_mask[rows], part.expert[rows], layers[rows], part.episodes[rows],
            torch.arange(3),
        )  # fmt: skip
        data, entry = cache.pack([frame], "fp32")
        shards.append(entry)
        (folder / f"features-{index:05d}-of-00002.safetensors").write_bytes(data)
    about = {"folder": "policy", "fingerprint": "f", "kind": "l1"}
    dataset = {"root": "data", "name": "demo", "split": "train", "fingerprint": "d", "statistics_of": None}
    options = {
        "dtype": "fp32", "precision": "fp32", "layer_exits": "normed", "pool": 0, "seed": 7, "batch_size": 4,
    }  # fmt: skip
    shape = {"context_dim": D, "horizon": H, "action_dim": A, "num_exits": 2}
    Manifest(about, dataset, options, statistics().to_dict(), shape, 6, 3, shards).write(folder)


def _use_cache(folder: Path) -> None:
    found = FeatureCache(folder)
    _ = found.nbytes, found.episodes, found.steps, found.manifest.differences(found.manifest)
    batch = found.batch(range(min(len(found), 100)))
    if len(found):
        assert batch.context.shape[2] == found.context_dim and len(batch.expert) == min(len(found), 100)


def _reseal_cache(folder: Path, draw: random.Random) -> str:
    """A shard's tensor changed, its checksum in the manifest made anew."""
    path = draw.choice(sorted(folder.glob("*.safetensors")))
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    kind = draw.choice(("shorter", "type", "values", "shape", "drop"))
    if kind == "shorter":
        tensors[name] = tensor[: draw.randrange(len(tensor))].contiguous()
    elif kind == "type":
        tensors[name] = tensor.to(draw.choice((torch.int64, torch.float32, torch.bool)))
    elif kind == "values":
        tensors[name] = torch.full_like(tensor, draw.choice((0, -1, 100)))
    elif kind == "shape":
        tensors[name] = tensor.reshape(draw.choice(((-1,), (1, *tensor.shape))))
    else:
        del tensors[name]
    save_file(tensors, str(path))
    data = json.loads((folder / cache.MANIFEST).read_text())
    content = path.read_bytes()
    entry = data["shards"][int(path.name[9:14])]
    entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / cache.MANIFEST).write_text(json.dumps(data))
    return f"{path.name}: {name} resealed, {kind}"


def _write(name: str, value: Any) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(json.dumps(value))


def _statistics(folder: Path) -> None:
    proprio = actions.FieldStatistics.of(np.random.default_rng(1).normal(size=(50, 2)))
    entry = actions.DatasetStatistics(statistics().action, proprio, 50, 5).to_dict()
    _write("dataset_statistics.json", {"demo": entry, "other": entry})(folder)


def _use_statistics(folder: Path) -> None:
    for entry in actions.load_statistics(folder / "dataset_statistics.json").values():
        chunk = torch.linspace(-2, 2, entry.action.dim)[None, None]
        assert bool(entry.action.normalize(chunk).isfinite().all())
        assert np.isfinite(entry.unnormalize(chunk).values).all()


def _sealed(folder: Path) -> None:
    for name in ("a.json", "b.bin"):
        (folder / name).write_bytes(b'{"a": "' + b"x" * 900 + b'"}')
    (folder / "inner").mkdir()
    (folder / "inner" / "c.bin").write_bytes(b"c" * 1000)
    durable.seal(folder, 7)


def _state(folder: Path) -> None:
    head = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(head.parameters())
    head(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    torch.save({"step": 3, "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}, folder / "state.pt")


class Resume:
    """A trainer whose run is resumed again and again from what lies in the folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @functools.cached_property
    def trainer(self) -> Any:
        """Trained where it is first asked for: other loaders need none."""
        from vla_energy.finetune.trainer import Trainer

        settings = chaos_run.config(self.root, "run", 1, 1)
        settings.energy.freeze_backbone = True
        shutil.rmtree(self.root, ignore_errors=True)
        trainer = Trainer(settings)
        trainer.run()
        trainer.config.resume = True
        return trainer

    def make(self, folder: Path) -> None:
        """Copies the run."""
        shutil.copytree(self.trainer.config.run_dir, folder / "run")

    def load(self, folder: Path) -> None:
        """Resumes from the folder's run, and opens its log."""
        self.trainer.config.run_root_dir = folder
        checkpoints.resume(self.trainer)
        with MetricLog(self.trainer.config, self.trainer.step) as log:
            log.sync()

    def hostile(self, folder: Path, draw: random.Random) -> str:
        """The training state with another value in a place, sealed anew."""
        path = folder / "run" / "latest" / checkpoints.STATE
        state = torch.load(path, weights_only=True)
        node: Any = state
        key: Any = draw.choice(sorted(state))
        while isinstance(node[key], (dict, list)) and node[key] and draw.random() < 0.8:
            node = node[key]
            key = draw.choice(list(node)) if isinstance(node, dict) else draw.randrange(len(node))
        kind = draw.choice(("nasty", "drop", "tensor"))
        if kind == "drop":
            del node[key]
        else:
            node[key] = nasty(draw) if kind == "nasty" else torch.zeros(draw.choice(((), (0,), (2, 3))))
        torch.save(state, path)
        (path.parent / durable.MANIFEST).unlink()
        if draw.random() < 0.5:
            durable.seal(path.parent, 1)
        return f"state[...][{key!r}]: {kind}"


def _policy(folder: Path) -> None:
    shutil.copytree(EMBEDDED, folder, dirs_exist_ok=True)
    for name in ("README.md", "curves.svg"):
        (folder / name).unlink()


INDEX = "model.safetensors.index.json"


def _sharded(folder: Path) -> None:
    """The policy's weights in two files, and the index that says which are where."""
    _policy(folder)
    with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    (folder / "model.safetensors").unlink()
    names, weight_map = list(tensors), dict[str, str]()
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, str(folder / shard), {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    size = sum(tensor.nbytes for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))


def _damage_index(folder: Path, draw: random.Random) -> str:
    """Another value somewhere in the index, mostly where a file's name is expected."""
    data = json.loads((folder / INDEX).read_text())
    kind = draw.choice(("name", "name", "other", "map"))
    if kind == "other":
        data = damage_json(data, draw)
    else:
        keys = [draw.choice(sorted(data["weight_map"]))] if kind == "name" else list(data["weight_map"])
        data["weight_map"] |= dict.fromkeys(keys, nasty(draw))
    (folder / INDEX).write_text(json.dumps(data))
    return f"{INDEX}: {kind}"


def _rlds(folder: Path) -> None:
    shutil.copytree(EMBEDDED_DATA / "metaworld_demo", folder / "metaworld_demo")


def _use_rlds(folder: Path) -> None:
    data = RldsDataset(folder, "metaworld_demo", "val", horizon=4, use_proprio=True, shuffle_buffer_size=8)
    for batch in data.batches(16, repeat=False, drop_last=False):
        assert np.isfinite(batch["actions"]).all()


def _use_config(folder: Path) -> None:
    try:
        data = json.loads((folder / "energy.json").read_text())
    except (OSError, ValueError, RecursionError):  # read here, not by us
        return
    EnergyConfig.from_dict(data)


def _trials(folder: Path) -> None:
    rows = [
        {"instruction": task, "arm": arm, "seed": seed, "success": seed % 2 == 0}
        for task in ("open", "close")
        for arm in ("policy", "rerank")
        for seed in range(8)
    ]
    meta = {"checkpoint": {"fingerprint": "f", "gates": {"rerank": 0.25}, "center_crop": False}}
    settings = {"replan_every": 4, "backend": "metaworld", "step_limits": {"open": 100}}
    _write("rollout.json", {"complete": True, "settings": settings, "meta": meta, "episodes": rows})(folder)


def _use_trials(folder: Path) -> None:
    judged = {"fingerprint": "f", "arms": ("policy", "rerank"), "horizon": 8}
    for trials in read_trials([folder / "rollout.json"], judged).values():
        trials.best("policy", {"rerank": 0.5})


def _metrics(folder: Path) -> None:
    rows = [{"step": step, "train/l1": 0.5, "energy/loss": None} for step in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _spool(folder: Path) -> None:
    written = spool.Spool.create(folder / "x.unfinished", {"name": "demo"})
    trace = spool.Trace(instruction="open", shapes={"image": (4, 4, 3), "state": (2,)})
    for step in range(3):
        trace.observations.append({"image": b"\xff\xd8" + bytes([step + 1]), "state": np.zeros(2, np.float32)})
        trace.actions.append(np.zeros(3, np.float32))
    written.add(trace, {"success": True, "task": "open"})
    written.finish_task()


def _use_spool(folder: Path) -> None:
    found = spool.Spool(folder / "x.unfinished")
    found.about()
    for path in found.episodes():
        spool.load_layout(path)
        spool.load_episode(path)


_SCRIPT = (ValueError, OSError, ImportError, draccus.ParsingError)
"""What scripts/finetune_energy.py turns into a message."""


def _flags(folder: Path) -> None:
    parse_flags(folder / "flags.yaml", []).check()


def targets(scratch: Path) -> dict[str, Target]:
    """All of them, by name; nothing is made before a target's `make`."""
    resume = Resume(scratch / "resume")
    own = EnergyConfig().to_dict()
    task = {"use": "rerank@4", "trials": {"seeds": [1, 2], "replan_every": 4}}
    flags = {"batch_size": 2, "precision": "fp32", "lora_dropout": 0.1, "energy": own}
    overrides = {"demo": {"image_key": "front", "proprio_keys": ["state[:6]"], "action_mask": [True, False]}}
    folder_errors = (CheckpointFolderError, actions.StatisticsError)
    margins = {"margins": {"rerank": 0.1, "refine": None, "retrieve": 0}, "tasks": {"open": "rerank@4"}}
    found = {
        "head": Target(
            _head,
            _use_head,
            (CheckpointError,),
            _reseal(*3 * ["config"], "statistics", "extra", "step", "horizon", "context_dim"),
        ),
        "memory": Target(_memory, _use_memory, (CheckpointError,), _reseal("encoder", "statistics", "step")),
        "cache": Target(_cache, _use_cache, (cache.CacheError,), _reseal_cache),
        "gates": Target(_write(gates.GATES, margins), gates.load_gates, (CheckpointError,)),
        "statistics": Target(_statistics, _use_statistics, (actions.StatisticsError,)),
        "manifest": Target(_sealed, durable.check_seal, (CheckpointError,)),
        "state": Target(_state, lambda folder: durable.read_torch(folder / "state.pt"), (CheckpointError,)),
        "resume": Target(resume.make, resume.load, (CheckpointError,), resume.hostile),
        "config": Target(_write("energy.json", own), _use_config, (ValueError,), named=False),
        "flags": Target(_write("flags.yaml", flags), _flags, _SCRIPT, named=False),
        "dataset": Target(
            lambda folder: [_write(f"data.{end}", overrides)(folder) for end in ("json", "yaml")],
            lambda folder: [dataset_config("demo", folder / f"data.{end}").mask(2) for end in ("json", "yaml")],
            (DatasetError,),
            named=False,  # it may be a known dataset's
        ),
        "policy": Target(_policy, lambda folder: load_openvla(folder, use_proprio=True), folder_errors),
        "sharded": Target(
            _sharded, lambda folder: load_openvla(folder, use_proprio=True), folder_errors, _damage_index
        ),
        "rlds": Target(_rlds, _use_rlds, (DatasetError, actions.StatisticsError)),
        # What is told of a task may come from several files.
        "trials": Target(_trials, _use_trials, (TrialsError,), named=False),
        "preflight": Target(
            _write("preflight.json", {"tasks": {"open": task, "close": {"use": "off"}}}),
            lambda folder: read_preflight(folder / "preflight.json"),
            (ValueError, OSError),
        ),
        "metrics": Target(_metrics, read_rows, (ValueError, FileNotFoundError)),
        "report": Target(
            write_run, lambda folder: write_report(read_runs([folder]), folder / "report.html"), (ValueError,)
        ),
        "spool": Target(_spool, _use_spool, (ValueError,)),
    }
    return found
