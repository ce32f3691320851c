"""Files that a fuzzer found unclear words for, one of each kind: every loader refuses them in its own words."""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import draccus
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import chaos_mutate
import chaos_targets
from chaos_fuzz import unclear

from vla_energy import checkpoint
from vla_energy.actions import StatisticsError, load_statistics
from vla_energy.backbones import load_openvla
from vla_energy.backbones.config import CheckpointFolderError, read_json
from vla_energy.backbones.weights import read_component
from vla_energy.cache import CacheError
from vla_energy.checkpoint import CheckpointError, load_head
from vla_energy.config import EnergyConfig
from vla_energy.config.checks import is_number
from vla_energy.data import DatasetError
from vla_energy.data.datasets import dataset_config
from vla_energy.data.rlds_folder import Shard, check_shard
from vla_energy.doctor import policy
from vla_energy.durable import MANIFEST, check_seal
from vla_energy.finetune.config import FlagError
from vla_energy.finetune.flags import parse_flags
from vla_energy.fingerprint import fingerprint, fingerprint_files
from vla_energy.gates import load_gates
from vla_energy.memory import ChunkMemory
from vla_energy.preflight.trials import TrialsError
from vla_energy.results import read_rows
from vla_energy.rollout.spool import load_episode, load_layout

DEEP = "[" * 100_000


def _reseal(folder: Path, **changes: str) -> None:
    path = next(folder.glob("*.safetensors"))
    with safe_open(str(path), framework="pt") as file:
        metadata, tensors = {**file.metadata(), **changes}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, str(path), {**metadata, "sha256": checkpoint.digest(tensors, metadata)})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"config": '{"head": {"hidden_dim": 8, "num_layers": 1000000000}}'}, "num_layers=1000000000"),
        ({"config": DEEP}, "bad metadata"),
        ({"config": '{"head": {"dropout": ' + "9" * 400 + "}}"}, "dropout"),
        ({"config": '{"negatives": {"layer_exits": {"layers": 0.5}}}'}, "layers=0.5: expected a list"),
        ({"context_dim": "9" * 30}, "do not fit"),
        ({"statistics": '{"action": 3}'}, "action"),
        ({"statistics": "[]"}, "expected an object"),
    ],
)
def test_a_strangers_head_with_a_true_checksum(tmp_path: Path, changes: dict[str, str], told: str) -> None:
    chaos_targets._head(tmp_path)
    _reseal(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=told):
        load_head(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("keys", lambda value: value[:-1], "keys is"),
        ("keys", lambda value: value.float(), "float32, expected .* torch.float16"),
        ("keys", lambda value: torch.full_like(value, torch.nan), "keys has numbers that are not finite"),
        ("mean", lambda value: value[:3], "tokens=5"),
        ("basis", lambda value: value.flatten(), "basis is"),
        ("basis", lambda value: value.sum(), "damaged"),
        ("chunks", lambda value: value[:, 0], r"expected \(M,H,A\)"),
        ("chunks", lambda value: value[:0], r"expected \(M,H,A\)"),
        ("episodes", lambda value: value.float(), "episodes is .* expected .* torch.int64"),
        ("projection", lambda value: value[:, :2], "projection is"),
    ],
)
def test_a_memory_whose_parts_do_not_fit(tmp_path: Path, name: str, change: Callable[[Any], Any], told: str) -> None:
    chaos_targets._memory(tmp_path)
    path = next(tmp_path.glob("*.safetensors"))
    with safe_open(str(path), framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, str(path), {**metadata, "sha256": checkpoint.digest(tensors, metadata)})
    with pytest.raises(CheckpointError, match=told):
        ChunkMemory.load(tmp_path)


@pytest.mark.parametrize("text", ["[5, 1.0, NaN]", '["5", 1.0, 1.0]', "[5, -1, 1.0]", "[1e9, 1, 1]", "{}", DEEP])
def test_a_memory_with_an_encoder_that_cannot_be(tmp_path: Path, text: str) -> None:
    chaos_targets._memory(tmp_path)
    path = next(tmp_path.glob("*.safetensors"))
    with safe_open(str(path), framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata = {**metadata, "encoder": text}
    save_file(tensors, str(path), {**metadata, "sha256": checkpoint.digest(tensors, metadata)})
    with pytest.raises(CheckpointError, match=path.name):
        ChunkMemory.load(tmp_path)


def test_a_strangers_cache_with_true_checksums(tmp_path: Path) -> None:
    """Whatever a shard holds, the cache is refused, or answers with frames of the right shapes."""
    refused = 0
    for seed in range(40):
        folder = tmp_path / f"{seed}"
        folder.mkdir()
        chaos_targets._cache(folder)
        done = chaos_targets._reseal_cache(folder, random.Random(seed))
        try:
            chaos_targets._use_cache(folder)
        except CacheError as error:
            assert "cannot be read" in str(error), done
            refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("frames", 7), ("frames", "6"), ("shard_frames", 0), ("shards", {}), ("shards", [None]), ("shards", [3, 4]),
        ("shape", {"context_dim": 6, "horizon": 4, "action_dim": 3}), ("shape", []), ("options", {"dtype": []}),
        ("checkpoint", {"folder": "x"}), ("dataset", 3), ("frames", 10**30),
    ],
)  # fmt: skip
def test_a_caches_manifest_of_wrong_types(tmp_path: Path, key: str, value: Any) -> None:
    chaos_targets._cache(tmp_path)
    data = json.loads((tmp_path / "cache.json").read_text())
    (tmp_path / "cache.json").write_text(json.dumps({**data, key: value}))
    with pytest.raises(CacheError, match=r"cache.json is damaged"):
        chaos_targets._use_cache(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("q99", [10**400] * 3, "not a list of numbers"),
        ("q99", [1e308, 1.0, 1.0], "1e.308 is more than fp32"),
        ("q01", [float("nan"), 0.0, 0.0], "not finite at dimension 0"),
        ("q01", [5.0, 5.0, 5.0], "q01 > q99"),
        ("mean", [[0.0]], "shape"),
    ],
)
def test_statistics_that_cannot_be(tmp_path: Path, field: str, value: Any, told: str) -> None:
    chaos_targets._statistics(tmp_path)
    path = tmp_path / "dataset_statistics.json"
    data = json.loads(path.read_text())
    data["demo"]["action"][field] = value
    path.write_text(json.dumps(data))
    with pytest.raises(StatisticsError, match=told):
        load_statistics(path)


def test_statistics_of_zero_range_normalise_to_finite_numbers(tmp_path: Path) -> None:
    chaos_targets._statistics(tmp_path)
    path = tmp_path / "dataset_statistics.json"
    data = json.loads(path.read_text())
    data["demo"]["action"] |= {key: [0.5, 0.0, -1.0] for key in ("q01", "q99", "min", "max")}
    path.write_text(json.dumps(data))
    entry = load_statistics(path)["demo"].action
    values = torch.tensor([[0.5, 0.0, -1.0], [1e30, -1e30, 3.0]])
    assert bool(
        entry.normalize(values).isfinite().all() and entry.unnormalize(entry.normalize(values)).isfinite().all()
    )


def test_statistics_in_odd_places(tmp_path: Path) -> None:
    path = tmp_path / "dataset_statistics.json"
    path.mkdir()
    with pytest.raises(StatisticsError, match="cannot be read"):
        load_statistics(path)
    path.rmdir()
    path.write_text(DEEP)
    with pytest.raises(StatisticsError, match="not valid JSON"):
        load_statistics(path)
    chaos_targets._statistics(tmp_path)
    data = json.loads(path.read_text())
    for count in ("many", None, float("inf"), -1, 10**30):
        data["demo"]["num_transitions"] = count
        path.write_text(json.dumps(data))
        with pytest.raises(StatisticsError, match="num_transitions"):
            load_statistics(path)


@pytest.mark.parametrize("name", ["x" * 5_000, "\ud800"])
def test_names_that_no_file_system_has_are_missing_files(tmp_path: Path, name: str) -> None:
    chaos_targets._sealed(tmp_path)
    data = json.loads((tmp_path / MANIFEST).read_text())
    data["files"][name] = data["files"]["a.json"]
    (tmp_path / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="is missing"):
        check_seal(tmp_path)


def test_json_that_is_too_deep(tmp_path: Path) -> None:
    (tmp_path / "energy_gates.json").write_text(DEEP)
    with pytest.raises(CheckpointError, match=r"energy_gates.json is damaged"):
        load_gates(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + DEEP)
    with pytest.raises(ValueError, match="line 2: not a row"):
        read_rows(tmp_path)
    (tmp_path / "rollout.json").write_text(DEEP)
    with pytest.raises(TrialsError, match="no result"):
        chaos_targets._use_trials(tmp_path)


@pytest.mark.parametrize("row", [b"\xff\xfe", b'{"step": Infinity}', b"[1]", b'{"step": "x"}'])
def test_rows_of_metrics_that_are_none(tmp_path: Path, row: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + row + b"\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: not a row of metrics"):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    ("where", "value", "told"),
    [
        (("meta", "checkpoint", "gates", "rerank"), 10**400, "no result of vla-energy rollout"),
        (("episodes", 0, "arm"), "rerank@x", r"rollout.json: .*rerank@x"),
        (("episodes", 0, "seed"), None, "wrong types"),
    ],
)
def test_trials_of_wrong_values(tmp_path: Path, where: tuple[Any, ...], value: Any, told: str) -> None:
    chaos_targets._trials(tmp_path)
    data = json.loads((tmp_path / "rollout.json").read_text())
    node = data
    for key in where[:-1]:
        node = node[key]
    node[where[-1]] = value
    (tmp_path / "rollout.json").write_text(json.dumps(data))
    with pytest.raises(TrialsError, match=told):
        chaos_targets._use_trials(tmp_path)


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"proprio_keys": None}, "proprio_keys=None"),
        ({"proprio_keys": [3]}, "bad key 3"),
        ({"proprio_keys": ["state[:" + "9" * 5_000 + "]"]}, "bad key"),
        ({"action_mask": 3}, "action_mask=3"),
        ({"wrist_image_key": 1.5}, "wrist_image_key=1.5"),
        ({"drop_first_step": "yes"}, "drop_first_step='yes'"),
        ({"image_key": []}, r"image_key=\[\]"),
    ],
)
def test_datasets_described_with_wrong_types(tmp_path: Path, entry: dict[str, Any], told: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"demo": entry}))
    with pytest.raises(DatasetError, match=f"data.json: demo: .*{told}"):
        dataset_config("demo", path)
    path.write_text(json.dumps({"demo": {**entry, "": 1}}))
    with pytest.raises(DatasetError, match="unknown"):
        dataset_config("demo", path)


def _bomb(levels: int) -> str:
    """YAML that stands for 10 ** levels values, as the items of a dictionary."""
    rows = [f"a0: &a0 [{', '.join(['1'] * 10)}]"]
    rows += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, levels)]
    return "\n".join(rows) + "\n"


def test_aliases_that_stand_for_too_much(tmp_path: Path) -> None:
    path, flags, started = tmp_path / "data.yaml", tmp_path / "flags.yaml", time.monotonic()
    for text in ("demo: {image_key: *a8}", "demo: *a8", "demo: {proprio_keys: *a8}", "", "*a8 : 1"):
        path.write_text(_bomb(9) + text)
        with pytest.raises(DatasetError, match=rf"{path}, line 2: aliases are not read here"):
            dataset_config("demo", path)
    path.write_text(DEEP)
    with pytest.raises(DatasetError, match="nests more than 100 levels deep"):
        dataset_config("demo", path)
    path.write_text("demo: &a {image_key: &front front}")
    assert dataset_config("demo", path).image_key == "front"
    for text in ("batch_size: *a8", "energy: *a8", "lora_dropout: *a8", "vla_path: *a8", ""):
        flags.write_text(_bomb(9) + text)
        for arguments in ((flags, []), (None, ["--config_path", str(flags)]), (None, [f"--config_path={flags}"])):
            with pytest.raises(FlagError, match="stand for more than 10,000 values"):
                parse_flags(*arguments)
    for text in ("a: &a [*a]", "energy: &a {b: [1, *a]}"):
        flags.write_text(text)
        with pytest.raises((FlagError, draccus.ParsingError)):
            parse_flags(flags, [])
    flags.write_text("batch_size: &two 2\ngrad_accumulation_steps: *two\n")
    assert parse_flags(flags, []).grad_accumulation_steps == 2
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    "entry",
    [
        "x" * 10**6, ["x" * 10**6] * 3, {"image_key": ["x" * 99] * 10**4}, {"gripper": "x" * 10**6},
        {"proprio_keys": "x" * 10**6}, {"proprio_keys": ["[" + "x" * 10**6]}, {"action_mask": [0] * 10**6},
        {"drop_first_step": {f"{i}": [i] * 99 for i in range(10**4)}}, {"x" * 10**6: 1},
        {f"{i}": 1 for i in range(10**5)},
    ],
    ids=range(10),
)  # fmt: skip
def test_errors_of_datasets_show_little_of_long_values(tmp_path: Path, entry: Any) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"demo": entry}))
    with pytest.raises(DatasetError, match=r"data.json: demo") as error:
        dataset_config("demo", path)
    assert len(str(error.value)) < 2_000
    path = path.with_suffix(".yaml")
    path.write_text("demo: {gripper: 0x" + "f" * 10_000 + "}")
    with pytest.raises(DatasetError, match="a very large int|<int instance"):
        dataset_config("demo", path)


@pytest.mark.parametrize("text", ["just words", "a: [", "\0", "- 1\n- 2", DEEP, "{1: {2: 3}}"])
def test_a_flags_file_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "flags.yaml"
    path.write_text(text)
    with pytest.raises((FlagError, draccus.ParsingError)):
        parse_flags(path, [])


@pytest.mark.parametrize("name", ["batch_size", "precision", "run_root_dir", "learning_rate", "energy"])
def test_a_flag_without_a_value(tmp_path: Path, name: str) -> None:
    path = tmp_path / "flags.yaml"
    path.write_text(json.dumps({"batch_size": 2, name: None}))
    with pytest.raises((FlagError, draccus.ParsingError), match=name):
        parse_flags(path, []).check()


def test_recorded_episodes_that_are_damaged(tmp_path: Path) -> None:
    chaos_targets._spool(tmp_path)
    path = next(tmp_path.rglob("*.npz"))
    whole = path.read_bytes()
    assert load_layout(path).action_dim == 3
    with zipfile.ZipFile(path) as archive:
        members = {entry.filename: archive.read(entry) for entry in archive.infolist()}

    def write(changes: Mapping[str, bytes | None], method: int = zipfile.ZIP_STORED) -> None:
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, content in {**members, **changes}.items():
                if content is not None:
                    archive.writestr(name, content)

    huge = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000,), }".ljust(
        117
    )
    for changes in ({"action.npy": None}, {"about.npy": b"x"}, {"action.npy": huge + b"\n"}, {"about.npy": None}):
        write(changes)
        for load in (load_layout, load_episode):
            with pytest.raises(ValueError, match=r"00000.npz is damaged.*record again"):
                load(path)
    write({"action.npy": bytes(10_000_000)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed"):
        load_layout(path)
    spoilt = bytearray(whole)
    spoilt[whole.index("open".encode("utf-32-le"))] ^= 1
    for content in (bytes(spoilt), whole[:-30], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            load_episode(path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"text_config": {"hidden_size": 10**9}}, "hidden_size is 1000000000, the weights have 128"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers is 1000000000, the weights have 4"),
        ({"text_config": {"num_attention_heads": 0}}, "no model can be built"),
        ({"text_config": 3}, "wrong type"),
        ({"image_sizes": [10**6, 10**6]}, "expected at most 2048"),
        ({"vla_energy": []}, "wrong type"),
        ({"timm_model_ids": ["no such tower", "x"]}, "no model can be built"),
    ],
)
def test_a_policys_config_that_cannot_be(tiny_folder: Path, tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = json.loads((tmp_path / "config.json").read_text())
    for key, value in changes.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointFolderError, match=rf"config.json: .*{told}"):
        load_openvla(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "told"),
    [
        ({"a": ["x"]}, "'a': expected a file's name, not list"),
        ({"a": {}}, "'a': expected a file's name, not dict"),
        ({"a": 3}, "'a': expected a file's name, not int"),
        ({"a": None}, "'a': expected a file's name, not NoneType"),
        ({"a": "model.safetensors", "b": 5}, "'b': expected a file's name, not int"),
        ({"a": "x" * 5_000}, "'xxx.* is not the name of a file"),
        ({"a": "../x"}, "'../x' is not the name of a file"),
        ({"a": "/etc/passwd"}, "'/etc/passwd' is not the name of a file"),
        ({"a": ".."}, ".. not found"),
        ({"a": ""}, "'' is not the name of a file"),
        ({"a": "a\0b"}, "is not the name of a file"),
        ({"a": "\ud800"}, "is not the name of a file"),
        ({"a": "é" * 200}, "éé not found"),
        ({"a": "none.safetensors"}, "none.safetensors not found"),
        ([], "no weight_map"),
    ],
)
def test_an_index_of_weights_that_names_no_files(tmp_path: Path, weight_map: Any, told: str) -> None:
    chaos_targets._sharded(tmp_path)
    (tmp_path / chaos_targets.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointFolderError, match=rf"{tmp_path.name}.*{told}") as error:
        load_openvla(tmp_path)
    assert len(str(error.value)) < 1_000


def test_weights_in_two_files_are_the_ones_in_one(tmp_path: Path) -> None:
    chaos_targets._sharded(tmp_path)
    whole, parts = load_openvla(chaos_targets.EMBEDDED), load_openvla(tmp_path)
    assert all(torch.equal(value, parts.state_dict()[name]) for name, value in whole.state_dict().items())
    for text in (DEEP, '{"weight_map": ' + DEEP, "[]", "\0"):
        (tmp_path / chaos_targets.INDEX).write_text(text)
        with pytest.raises(CheckpointFolderError, match=chaos_targets.INDEX):
            load_openvla(tmp_path)


def test_a_policys_parts_that_unpack_to_more_than_they_are(tiny_folder: Path, tmp_path: Path) -> None:
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = next(tmp_path.glob("action_head--*"))
    with zipfile.ZipFile(path) as archive:
        members = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointFolderError, match=rf"{path.name} is damaged.*compressed"):
        load_openvla(tmp_path)


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("proprio_projector", {"x": torch.ones(2)}),
        ("proprio_projector", {"fc1.weight": torch.ones(2)}),
        ("action_head", {"model.fc2.bias": torch.ones(4), "model.layer_norm1.bias": torch.ones(512)}),
        ("action_head", {"model.fc2.bias": torch.ones(())}),
        ("action_head", {3: torch.ones(2)}),
    ],
)
def test_a_policys_parts_that_are_something_else(tiny_folder: Path, tmp_path: Path, name: str, state: Any) -> None:
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(state, next(tmp_path.glob(f"{name}--*")))
    with pytest.raises(CheckpointFolderError, match=rf"{tmp_path.name}.*(action|proprio|dictionary)"):
        load_openvla(tmp_path, use_proprio=True)


@pytest.mark.parametrize("means", [[[0.5] * 3, [0.5] * 22], 3, [["x"]], None, [[10**400] * 3] * 2])
def test_a_policys_image_settings_that_cannot_be(tiny_folder: Path, tmp_path: Path, means: Any) -> None:
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "means": means}))
    with pytest.raises(CheckpointFolderError, match=r"preprocessor_config.json: means and stds"):
        load_openvla(tmp_path)


def _component(name: str) -> Callable[[Path], object]:
    return lambda folder: read_component(folder, name, required=True)


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("energy_head--8_checkpoint.safetensors", fingerprint),
        ("energy_head--8_checkpoint.safetensors", load_head),
        ("chunk_memory--8_checkpoint.safetensors", lambda folder: ChunkMemory.load(next(folder.iterdir()))),
        ("action_head--8_checkpoint.pt", _component("action_head")),
        ("action_head--8_checkpoint.pt", lambda folder: policy.component(folder, "action_head")),
        ("config.json", lambda folder: read_json(folder / "config.json")),
        ("config.json", policy.read_config),
        ("dataset_statistics.json", lambda folder: load_statistics(folder / "dataset_statistics.json")),
        ("x-train.tfrecord-00000-of-00001", lambda folder: check_shard(Shard(str(next(folder.iterdir())), 1, 0, 1, 0))),
        ("x-train.tfrecord-00000-of-00001", lambda folder: fingerprint_files(folder.iterdir())),
    ],
)
def test_a_pipe_in_a_folder_is_told_instead_of_waited_for(
    tmp_path: Path, name: str, use: Callable[[Path], object]
) -> None:
    def let_go() -> None:
        with contextlib.suppress(OSError):  # nobody waits, as it should be
            os.close(os.open(tmp_path / name, os.O_WRONLY | os.O_NONBLOCK))

    os.mkfifo(tmp_path / name)
    timer = threading.Timer(10, let_go)  # no signal ends the waiting of native code
    timer.start()
    with pytest.raises((ValueError, OSError), match=name.split("--")[0]) as raised:
        use(tmp_path)
    timer.cancel()
    assert "no regular file" in str(raised.value) or "no file with" in str(raised.value)


def test_a_link_to_a_file_has_its_fingerprint(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    (tmp_path / "a" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "b" / "model.safetensors").symlink_to(tmp_path / "a" / "model.safetensors")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")


def test_numbers_that_no_float_holds_are_none() -> None:
    assert not is_number(10**400) and is_number(10**300)
    with pytest.raises(ValueError, match="dropout"):
        EnergyConfig.from_dict({"head": {"dropout": 10**400}})
    with pytest.raises(ValueError, match="margin_sources"):
        EnergyConfig.from_dict({"loss": {"margin_sources": [["x"]]}})


def test_the_judge_of_the_fuzzer(tmp_path: Path) -> None:
    def raised(work: Callable[[], Any]) -> BaseException:
        try:
            work()
        except Exception as error:
            return error
        raise AssertionError

    ours = raised(lambda: load_statistics(tmp_path / "none.json"))
    assert unclear(ours, (StatisticsError,), ["none.json"]) is None and unclear(None, ()) is None
    assert unclear(ours, (CheckpointError,), ["none.json"]) is not None
    found = unclear(ours, (StatisticsError,), ["other.json"])
    assert found is not None and found[0].startswith("names no file")
    # A ValueError of a library is none of ours, even where ValueErrors are.
    foreign = raised(lambda: np.zeros(3).reshape(2))
    assert unclear(foreign, (ValueError,)) is not None


def test_a_payload_runs_where_it_is_unpickled_and_damage_is_repeatable(tmp_path: Path) -> None:
    import pickle

    pickle.loads(pickle.dumps(chaos_mutate.Payload(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()
    for seed in range(20):
        found = []
        for attempt in range(2):
            folder = tmp_path / f"{seed}-{attempt}"
            folder.mkdir()
            chaos_targets._head(folder)
            path = next(folder.iterdir())
            done = chaos_mutate.damage_file(path, [path], random.Random(seed), tmp_path / "marker")
            found.append((done, path.read_bytes() if path.is_file() else None))
        assert found[0] == found[1]
