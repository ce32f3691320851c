"""What is claimed of every file that is written: it comes back as it was, and damage of any kind is refused."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vla_energy.actions import (
    DatasetStatistics,
    FieldStatistics,
    StatisticsError,
    load_statistics,
    select_statistics,
)
from vla_energy.advisor import load_advisor
from vla_energy.arms import BOTH, SELF_TIMED, split_arm
from vla_energy.cache import DTYPES, CachedFrames, CacheError, FeatureCache, Manifest, frame_bytes, is_whole, pack
from vla_energy.checkpoint import CheckpointError, atomic_write, find_one, load_head, save_head, to_bytes
from vla_energy.config import EnergyConfig
from vla_energy.config.model import HEADS, RANGES
from vla_energy.config.training import TEMPERATURE_MODES
from vla_energy.durable import MANIFEST, check_seal, read_torch, seal
from vla_energy.fingerprint import fingerprint, fingerprint_files
from vla_energy.gates import save_gates
from vla_energy.head import EnergyHead
from vla_energy.memory import ChunkMemory, MemoryBatch, check_memory
from vla_energy.results import check_writable, read_rows, to_json, versions, write_json

D, H, A = 6, 2, 3
SEEDS = st.integers(0, 10_000)
WORDS = st.text("ab-_ é語\\\"'\n", min_size=1, max_size=8)
NUMBERS = st.floats(-1e30, 1e30)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=12,
)
few, some = settings(max_examples=20, deadline=None), settings(max_examples=40, deadline=None)


@contextmanager
def folder() -> Iterator[Path]:
    """A new one for each example, which pytest's own would not be."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spoil(path: Path, data: st.DataObject) -> None:
    """Another file than before: a bit turned, cut short, or longer."""
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "grow"] if content else ["grow"]))
    if kind == "flip":
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content += data.draw(st.binary(min_size=1, max_size=3))
    path.write_bytes(bytes(content))


@cache
def statistics(seed: int = 0, dims: int = A) -> DatasetStatistics:
    values = np.random.default_rng(seed).normal(size=(60, dims))
    return DatasetStatistics(FieldStatistics.of(values, np.arange(dims) < dims - 1), None, 60, 3)


# Sealed folders and whole files.


@few
@given(
    files=st.dictionaries(
        st.tuples(st.sampled_from(["", "inner/", "a/b/"]), WORDS.map("file{}".format)) | st.just(("inner/", MANIFEST)),
        st.binary(max_size=40),
        min_size=1,
    ),
    step=st.integers(-(10**12), 10**12),
    data=st.data(),
)
def test_a_sealed_folder_is_whole_and_any_damage_is_told_by_name(
    files: dict[tuple[str, str], bytes], step: int, data: st.DataObject
) -> None:
    with folder() as root:
        paths = [root / f"{where}{name}" for where, name in files]
        for path, content in zip(paths, files.values(), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        seal(root, step)
        (root / "energy_gates.json").write_text("came later")
        assert check_seal(root) == step
        broken = data.draw(st.sampled_from(paths))
        if data.draw(st.booleans()):
            broken.unlink()
        else:
            spoil(broken, data)
        with pytest.raises(CheckpointError) as raised:
            check_seal(root)
        assert str(broken) in str(raised.value)


@some
@given(data=st.data())
def test_a_spoilt_manifest_raises_nothing_but_our_own_error(data: st.DataObject) -> None:
    with folder() as root:
        (root / "weights").write_bytes(b"numbers")
        seal(root, 7)
        spoil(root / MANIFEST, data)
        try:
            check_seal(root)
        except CheckpointError as error:
            assert str(root) in str(error)


@some
@given(old=st.binary(max_size=20) | st.none(), new=st.binary(max_size=20), fails=st.booleans())
def test_a_file_is_written_whole_or_not_at_all(old: bytes | None, new: bytes, fails: bool) -> None:
    def write(file: Any) -> None:
        file.write(new)
        if fails:
            raise OSError("no space left")

    with folder() as root:
        path = root / "inner" / "energy_head--1"
        if old is not None:
            atomic_write(path, lambda file: file.write(old))
        if fails:
            with pytest.raises(CheckpointError, match="energy_head--1"):
                atomic_write(path, write)
        else:
            assert atomic_write(path, write) == path
        expected = old if fails else new
        assert (path.read_bytes() if path.exists() else None) == expected
        if expected is not None:
            assert find_one(path.parent, "energy_head--") == path, "and nothing else is left"


@few
@given(seed=SEEDS, plain=JSON, data=st.data())
def test_torch_files_come_back_or_are_refused(seed: int, plain: Any, data: st.DataObject) -> None:
    tensor = torch.randn(3, 2, generator=generator(seed))
    with folder() as root:
        path = root / "state.pt"
        torch.save({"tensor": tensor, "plain": plain}, path)
        loaded = read_torch(path)
        assert torch.equal(loaded["tensor"], tensor) and repr(loaded["plain"]) == repr(plain)
        content = path.read_bytes()
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        with pytest.raises(CheckpointError, match=r"state\.pt"):
            read_torch(path)


# Heads.


@st.composite
def configs(draw: st.DrawFn) -> EnergyConfig:
    name = draw(st.sampled_from(sorted(HEADS)))
    heads = draw(st.integers(1, 2))
    head = {"name": name, "num_heads": heads, "hidden_dim": 4 * heads, "num_layers": draw(st.integers(1, 2))}
    head["per_step"] = draw(st.booleans())
    return EnergyConfig.from_dict(
        {
            "head": head,
            "range": {"name": draw(st.sampled_from(sorted(RANGES)))},
            "temperature": {"mode": draw(st.sampled_from(sorted(TEMPERATURE_MODES)))},
            "loss": {"centre": 0.0} if name == "original" else {},
        }
    )


@few
@given(
    config=configs(),
    sizes=st.tuples(*[st.integers(1, 5)] * 3),
    step=st.integers(0, 10**9),
    seed=SEEDS,
    extra=st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=4) | st.floats(allow_nan=False)),
    with_statistics=st.booleans(),
    data=st.data(),
)
def test_a_head_comes_back_bit_for_bit_and_never_as_another(
    config: EnergyConfig,
    sizes: tuple[int, int, int],
    step: int,
    seed: int,
    extra: dict[str, Any],
    with_statistics: bool,
    data: st.DataObject,
) -> None:
    torch.manual_seed(seed)
    head = EnergyHead(*sizes, config)
    own = statistics(seed % 3, sizes[1]) if with_statistics else None
    with folder() as root:
        path = save_head(root, head, step, own, extra)
        content = path.read_bytes()

        def is_same() -> bool:
            loaded = load_head(root)
            stored = None if loaded.statistics is None else loaded.statistics.to_dict()
            weights, found = head.state_dict(), loaded.head.state_dict()
            bits = all(torch.equal(weights[name].view(torch.int32), found[name].view(torch.int32)) for name in weights)
            facts = (loaded.config, loaded.step, loaded.extra, stored, set(found))
            return bits and facts == (config, step, extra, None if own is None else own.to_dict(), set(weights))

        assert is_same()
        assert save_head(root, head, step, own, extra).read_bytes() == content, "the content alone decides on the bytes"
        header = 8 + int.from_bytes(content[:8], "little")
        places = data.draw(st.lists(st.integers(0, header - 1) | st.integers(header, len(content) - 1), max_size=12))
        for place in places:
            turned = bytearray(content)
            turned[place] ^= data.draw(st.integers(1, 255))
            path.write_bytes(bytes(turned))
            # Blanks of the header mean nothing; all else is under the checksum.
            try:
                assert is_same()
            except CheckpointError:
                continue
            assert place < header
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        with pytest.raises(CheckpointError):
            load_head(root)


@some
@given(
    tensors=st.dictionaries(st.text("ab.", min_size=1, max_size=4), SEEDS, min_size=1, max_size=4),
    metadata=st.dictionaries(st.text(max_size=4), st.text(max_size=4), min_size=1, max_size=4),
    data=st.data(),
)
def test_a_file_depends_on_its_content_alone(
    tensors: dict[str, int], metadata: dict[str, str], data: st.DataObject
) -> None:
    from safetensors import safe_open

    values = {name: torch.randn(3, generator=generator(seed)) for name, seed in tensors.items()}
    whole = to_bytes(values, metadata)
    mixed = {key: metadata[key] for key in data.draw(st.permutations(sorted(metadata)))}
    assert to_bytes(values, mixed) == whole
    with folder() as root:
        (root / "file").write_bytes(whole)
        with safe_open(str(root / "file"), framework="pt") as file:
            assert file.metadata() == metadata
            assert all(torch.equal(file.get_tensor(name), value) for name, value in values.items())


# The feature cache.


@cache
def cached(dtype: str) -> tuple[CachedFrames, bytes, Path]:
    """Ten frames in shards of four; they stay for the session."""
    draws, frames, length, layers = generator(3), 10, 5, 2
    mask = torch.rand(frames, length, generator=draws) < 0.5
    mask[:, 0] |= ~mask.any(1)
    context = torch.randn(frames, length, D, generator=draws).masked_fill(~mask[..., None], math.nan)
    layer_actions = torch.randn(frames, layers, H, A, generator=draws)
    expert = torch.randn(frames, H, A, generator=draws)
    whole = CachedFrames(context, mask, expert, layer_actions, torch.arange(frames) // 3, torch.arange(frames) % 3)
    root = Path(tempfile.mkdtemp())
    checkpoint = {"folder": "policy", "fingerprint": "f", "kind": "l1"}
    dataset = {"root": "data", "name": "tasks", "split": "train", "fingerprint": "d", "statistics_of": None}
    options = {"dtype": dtype, "precision": "fp32", "layer_exits": "all", "pool": 1, "seed": 0, "batch_size": 2}
    shape = {"context_dim": D, "horizon": H, "action_dim": A, "num_exits": layers}
    manifest = Manifest(checkpoint, dataset, options, statistics().to_dict(), shape, frames, 4, [None] * 3)
    data = b""
    for index in range(3):
        rows = manifest.rows(index)
        # In two parts of different lengths, as batches come.
        parts = [CachedFrames(*(part[i : i + 2] for part in whole)) for i in range(rows.start, rows.stop, 2)]
        data, entry = pack(parts, dtype)
        manifest.shards[index] = entry
        manifest.path(root, index).write_bytes(data)
        tokens = entry["tokens"]
        least = len(rows) * frame_bytes(tokens / len(rows), D, layers, H, A, dtype)
        assert 0 < len(data) - least < 1024, "a header of a kilobyte"
    manifest.write(root)
    return whole, data, root


@some
@given(dtype=st.sampled_from(sorted(DTYPES)), rows=st.lists(st.integers(0, 9), max_size=14))
def test_a_cache_gives_the_rows_that_are_asked_for(dtype: str, rows: list[int]) -> None:
    whole, _, root = cached(dtype)
    store = FeatureCache(root)
    batch = store.batch(rows)
    lengths = [int(whole.context_mask[row].nonzero().max()) + 1 for row in rows]
    assert batch.context.shape == (len(rows), max(lengths, default=0), D)
    for place, row in enumerate(rows):
        mask = whole.context_mask[row]
        visible = torch.where(mask[:, None], whole.context[row], 0.0).to(DTYPES[dtype])
        width = batch.context.shape[1]
        assert torch.equal(batch.context[place], visible[:width]) and torch.equal(
            batch.context_mask[place], mask[:width]
        )
        for name in ("expert", "layer_actions", "episodes", "steps"):
            assert torch.equal(getattr(batch, name)[place], getattr(whole, name)[row]), name
    assert torch.equal(store.episodes, whole.episodes) and torch.equal(store.steps, whole.steps) and len(store) == 10
    for outside in (-1, 10):
        with pytest.raises(IndexError, match="the cache has 10"):
            store.batch([*rows, outside])


@some
@given(dtype=st.sampled_from(sorted(DTYPES)), index=st.integers(0, 2), data=st.data())
def test_a_spoilt_shard_is_named_with_the_command_that_mends_it(dtype: str, index: int, data: st.DataObject) -> None:
    with folder() as root:
        shutil.copytree(cached(dtype)[2], root / "copy")
        manifest = Manifest.read(root / "copy")
        path, entry = manifest.path(root / "copy", index), manifest.shards[index]
        assert is_whole(path, entry) and not manifest.differences(Manifest.read(cached(dtype)[2]))
        spoil(path, data)
        assert not is_whole(path, entry)
        with pytest.raises(CacheError, match="vla-energy cache") as raised:
            FeatureCache(root / "copy")
        assert path.name in str(raised.value)


# Results.


@some
@given(data=JSON)
def test_results_are_strict_json_with_null_for_what_it_lacks(data: Any) -> None:
    def expected(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: expected(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [expected(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    with folder() as root:
        check_writable(root / "new" / "results.json")
        write_json(root / "new" / "results.json", data)
        text = (root / "new" / "results.json").read_text()
        assert [path.name for path in (root / "new").iterdir()] == ["results.json"]
    assert json.loads(text) == json.loads(json.dumps(to_json(data), allow_nan=False)) == expected(data)
    assert to_json(to_json(data)) == to_json(data)


@some
@given(rows=st.lists(st.tuples(st.integers(0, 10**9), st.dictionaries(WORDS, NUMBERS, max_size=3)), max_size=5))
def test_rows_of_metrics_come_back_in_order(rows: list[tuple[int, dict[str, float]]]) -> None:
    with folder() as root:
        written = [{**metrics, "step": step} for step, metrics in rows]
        (root / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
        assert read_rows(root) == written


@some
@given(content=st.binary(max_size=30) | st.text('{}[]"step:1,\n NaIfinty-', max_size=30).map(str.encode))
def test_any_bytes_are_rows_or_are_refused_with_their_line(content: bytes) -> None:
    with folder() as root:
        (root / "metrics.jsonl").write_bytes(content)
        told: list[str] = []
        try:
            rows = read_rows(root, told.append)
        except ValueError as error:
            assert "metrics.jsonl, line " in str(error)
        else:
            # Only a last line without its end may be left out, and that is said.
            assert len(rows) + len(told) == len(content.splitlines()) and not (told and content.endswith(b"\n"))
            assert all(type(row["step"]) is int for row in rows)


def test_versions_are_texts_or_none() -> None:
    assert all(value is None or value for value in versions().values()) and versions()["torch"] is not None


# Fingerprints.


@some
@given(
    weights=st.dictionaries(
        st.sampled_from(["a.safetensors", "b.pt", "config.json"]), st.binary(max_size=30), min_size=1
    ),
    data=st.data(),
)
def test_a_fingerprint_sees_every_byte_of_what_counts(weights: dict[str, bytes], data: st.DataObject) -> None:
    with folder() as root:
        for name, content in weights.items():
            (root / name).write_bytes(content)
        before, alone = fingerprint(root), fingerprint(root, policy_only=True)
        assert len(before) == 16 and before == alone == fingerprint_files(sorted(root.iterdir()))
        for name in ("training_state--1.pt", "energy_state.pt", "energy_gates.json", "README.md"):
            (root / name).write_bytes(data.draw(st.binary(max_size=4)))
        assert fingerprint(root) == before, "what only a resumed training needs, and what is set later"
        (root / "energy_head--1_checkpoint.safetensors").write_bytes(b"head")
        assert fingerprint(root) != before and fingerprint(root, policy_only=True) == before
        spoil(root / data.draw(st.sampled_from(sorted(weights))), data)
        assert fingerprint(root, policy_only=True) != before


# Statistics, gates, arms.


@some
@given(names=st.lists(WORDS, min_size=1, max_size=3, unique=True), dims=st.integers(1, 4), other=WORDS)
def test_statistics_come_back_by_name(names: list[str], dims: int, other: str) -> None:
    assume(other not in names)
    stored = {name: statistics(seed, dims) for seed, name in enumerate(names)}
    with folder() as root:
        path = root / "dataset_statistics.json"
        path.write_text(json.dumps({name: entry.to_dict() for name, entry in stored.items()}))
        loaded = load_statistics(path)
    for name in names:
        assert select_statistics(loaded, name).to_dict() == stored[name].to_dict()
    with pytest.raises(StatisticsError):
        select_statistics(loaded, other)
    if len(names) == 1:
        assert select_statistics(loaded, None) is loaded[names[0]]
    else:
        with pytest.raises(StatisticsError):
            select_statistics(loaded, None)


@some
@given(
    name=st.text("abc+-_", min_size=1, max_size=6) | st.sampled_from(SELF_TIMED), every=st.integers(-3, 99) | st.none()
)
def test_an_arm_is_its_name_and_its_steps(name: str, every: int | None) -> None:
    if every is None:
        assert split_arm(name) == (name, None)
    elif every < 1 or name in SELF_TIMED:
        with pytest.raises(ValueError, match="arm"):
            split_arm(f"{name}@{every}")
    else:
        assert split_arm(f"{name}@{every}") == (name, every)
        with pytest.raises(ValueError, match="leading"):
            split_arm(f"{name}@0{every}")


MARGINS = st.dictionaries(
    st.sampled_from(["rerank", "refine", BOTH]), st.floats(0, allow_nan=False, allow_infinity=True)
)


@few
@given(margins=MARGINS, stored=st.floats(0, 10) | st.none(), parts=st.sampled_from(["head", "memory", "both", ""]))
def test_an_advisor_has_the_folders_gates_and_shuts_the_rest(
    margins: dict[str, float], stored: float | None, parts: str
) -> None:
    with folder() as root:
        save_gates(root, margins)
        if parts in ("head", "both"):
            save_head(root, _head(), 1, statistics(), {"rerank_margin": stored})
        if parts in ("memory", "both"):
            _memory(0)[0].save(root, 1)
        advisor = load_advisor(root, statistics(), H, A, D)
    allowed = {"head": {"rerank", "refine"}, "memory": {"retrieve"}, "": set()}
    modes = allowed.get(parts, {"rerank", "refine", "retrieve", BOTH})
    assert set(advisor.modes) == modes and {"policy", *modes} <= set(advisor.arms)
    own = {"rerank": math.inf if stored is None else stored, "retrieve": 0.0}
    for mode in modes:
        assert advisor.gates[mode] == margins.get(mode, own.get(mode, math.inf)), mode


@cache
def _head() -> EnergyHead:
    torch.manual_seed(0)
    return EnergyHead(D, A, H, EnergyConfig.from_dict({"head": {"hidden_dim": 4, "num_heads": 1}}))


# The memory.


@cache
def _memory(seed: int) -> tuple[ChunkMemory, MemoryBatch]:
    draws, frames = generator(seed), 12
    context = torch.randn(frames, 3, D, generator=draws)
    policy, expert = (torch.rand(frames, H, A, generator=draws) for _ in range(2))
    mask = torch.ones(frames, 3, dtype=torch.bool)
    batch = MemoryBatch(context, mask, policy, expert, torch.arange(frames) // 4)
    return ChunkMemory.build([batch], statistics(), seed=seed), batch


@few
@given(seed=st.integers(0, 4), rows=st.lists(st.integers(0, 11), min_size=1, max_size=5), count=st.integers(1, 15))
def test_a_remembered_frame_finds_itself_or_only_other_episodes(seed: int, rows: list[int], count: int) -> None:
    memory, batch = _memory(seed)
    check_memory(memory, H, A, D)
    asked = (batch.context[rows], batch.context_mask[rows], batch.policy[rows])
    found = memory.nearest(*asked, count)
    assert torch.equal(found.chunks[:, 0], batch.expert[rows]) and bool((found.distances[:, 0] < 0.05).all())
    others = memory.nearest(*asked, count, exclude=batch.episodes[rows])
    assert bool((others.episodes != batch.episodes[rows][:, None]).all())
    for part, most in ((found, 12), (others, 8)):
        assert part.chunks.shape == (len(rows), count, H, A)
        assert bool((part.distances.diff(dim=1).nan_to_num(nan=0.0) >= 0).all()), "the nearest first"
        missing = part.distances.isinf()
        assert torch.equal(missing, (torch.arange(count) >= most).expand_as(missing))
        assert torch.equal(part.episodes == -1, missing)
    context, mask, policy = (part[:1] for part in asked)
    alone = memory.nearest(context, mask, policy, count)
    assert torch.equal(alone.chunks, found.chunks[:1]), "a row does not depend on its batch"


@few
@given(seed=st.integers(0, 4), poison=st.sampled_from([math.nan, math.inf, -math.inf]), data=st.data())
def test_a_memory_answers_alike_after_loading_and_finds_nothing_for_nan(
    seed: int, poison: float, data: st.DataObject
) -> None:
    memory, batch = _memory(seed)
    policy, row = batch.policy.clone(), data.draw(st.integers(0, 11))
    policy[row, data.draw(st.integers(0, H - 1)), 0] = poison
    with folder() as root:
        path = memory.save(root, 3)
        loaded = ChunkMemory.load(root)
        assert 0 <= path.stat().st_size - memory.nbytes < 8192
        answers: list[tuple[Tensor, ...]] = []
        for each in (memory, loaded):
            found = each.nearest(batch.context, batch.context_mask, policy, 3)
            answers.append((found.chunks, found.distances, found.episodes))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*answers, strict=True))
        assert bool(answers[0][1][row].isinf().all()) and bool((answers[0][2][row] == -1).all())
        content = path.read_bytes()
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        with pytest.raises(CheckpointError):
            ChunkMemory.load(root)
