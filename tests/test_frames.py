"""What a checkpoint's policy makes of a dataset's frames, and the memory that `vla-energy memory` builds of them."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from vla_energy import cli
from vla_energy.actions import DatasetStatistics, FieldStatistics, StatisticsError, load_statistics
from vla_energy.arms import BOTH
from vla_energy.backbones.tiny import EMBEDDED
from vla_energy.checkpoint import save_head
from vla_energy.config import CandidatesConfig, EnergyConfig, HeadConfig, RetrievalConfig
from vla_energy.data import DatasetError, RldsDataset
from vla_energy.finetune.frames import FrameReader, PolicyFrames
from vla_energy.finetune.setup import EMBEDDED_DATA
from vla_energy.gates import save_gates
from vla_energy.head import EnergyHead
from vla_energy.memory import ChunkMemory
from vla_energy.rerank import MARGIN_KEY
from vla_energy.rollout.interface import Request
from vla_energy.rollout.policy import CheckpointPolicy, load_policy
from vla_energy.rollout.world import Observation

DATASET = "metaworld_demo"
H, A, D = 8, 4, 128
MEMORY = "chunk_memory--0_checkpoint.safetensors"


def _identity() -> DatasetStatistics:
    """Statistics that leave every number as it is stored."""
    nothing = FieldStatistics.of(np.stack([np.zeros(A), np.ones(A)]), np.zeros(A, bool))
    return DatasetStatistics(nothing, nothing, 1, 1)


def _stored(split: str, seed: int = 0) -> RldsDataset:
    """The bundled frames as they are stored, in the order of a reader with that seed."""
    return RldsDataset(
        EMBEDDED_DATA, DATASET, split, H, use_proprio=True, statistics=_identity(), image_size=(96, 96), seed=seed
    )


@pytest.fixture(scope="module")
def reader() -> FrameReader:
    return FrameReader("embedded", "embedded", DATASET)


@pytest.fixture(scope="module")
def held_out(reader: FrameReader) -> list[PolicyFrames]:
    return list(reader.read("val", batch_size=50))


def _all(batches: list[PolicyFrames], get: Callable[[PolicyFrames], torch.Tensor]) -> torch.Tensor:
    return torch.cat([get(batch) for batch in batches])


def test_shapes_and_types(reader: FrameReader, held_out: list[PolicyFrames]) -> None:
    assert not reader.vla.training and not any(weight.requires_grad for weight in reader.vla.parameters())
    assert [len(batch.expert) for batch in held_out[:-1]] == [50] * (len(held_out) - 1)
    for batch in held_out:
        rows, tokens = batch.context_mask.shape
        assert batch.context.shape == (rows, tokens, D) and batch.context_mask.dtype == torch.bool
        assert batch.context_mask[:, 0].all() and batch.context_mask.any(0).all(), "no column that all rows hide"
        assert batch.expert.shape == batch.policy.shape == (rows, H, A)
        assert batch.layer_actions.shape == (rows, reader.vla.num_layers + 1, H, A)
        assert torch.equal(batch.policy, batch.layer_actions[:, -1])
        assert batch.episodes.shape == (rows,) and batch.episodes.dtype == torch.int64
        assert len(batch.instructions) == rows and all(isinstance(text, str) for text in batch.instructions)
        numbers = (batch.context, batch.expert, batch.layer_actions)
        assert all(part.dtype == torch.float32 and part.isfinite().all() and not part.requires_grad for part in numbers)


def test_each_frame_comes_once_with_its_actions_in_the_checkpoints_statistics(
    reader: FrameReader, held_out: list[PolicyFrames]
) -> None:
    (own,) = load_statistics(EMBEDDED / "dataset_statistics.json").values()
    assert reader.statistics.to_dict() == own.to_dict()
    data = _stored("val")
    raw = list(data.batches(64, repeat=False, drop_last=False))
    actions = torch.from_numpy(np.concatenate([batch["actions"] for batch in raw])).double()
    episodes = torch.from_numpy(np.concatenate([batch["episode"] for batch in raw]))
    steps = torch.from_numpy(np.concatenate([batch["step"] for batch in raw]))
    assert len(torch.stack([episodes, steps], 1).unique(dim=0)) == len(actions) == data.num_frames
    expert = _all(held_out, lambda batch: batch.expert)
    assert torch.equal(_all(held_out, lambda batch: batch.episodes), episodes), "in the dataset's own random order"
    torch.testing.assert_close(expert, own.action.normalize(actions).float(), atol=1e-5, rtol=0)
    theirs = RldsDataset(EMBEDDED_DATA, DATASET, "train", H).statistics
    assert (theirs.action.normalize(actions).float() - expert).abs().max() > 0.05, "the dataset's own would differ"
    texts = [text for batch in raw for text in batch["instructions"]]
    assert [text for batch in held_out for text in batch.instructions] == texts


def test_frames_come_in_random_order_the_same_each_time(reader: FrameReader, held_out: list[PolicyFrames]) -> None:
    episodes = _all(held_out, lambda batch: batch.episodes)
    assert (episodes.diff() != 0).float().mean() > 0.5, "neighbours are mostly of different episodes"
    again = next(iter(reader.read("val", batch_size=50)))
    for name in ("context", "context_mask", "expert", "layer_actions", "episodes"):
        assert torch.equal(getattr(again, name), getattr(held_out[0], name)), name
    assert again.instructions == held_out[0].instructions
    smaller = list(reader.read("val", 30, batch_size=7))
    assert torch.equal(_all(smaller, lambda batch: batch.expert), held_out[0].expert[:30])
    torch.testing.assert_close(_all(smaller, lambda batch: batch.policy), held_out[0].policy[:30], atol=1e-4, rtol=0)
    other = FrameReader("embedded", "embedded", DATASET, seed=1)
    assert not torch.equal(next(iter(other.read("val", batch_size=50))).episodes, held_out[0].episodes)


@pytest.mark.parametrize(("most", "sizes"), [(1, [1]), (32, [32]), (33, [32, 1]), (64, [32, 32]), (0, [])])
def test_no_more_frames_than_asked_for(reader: FrameReader, most: int, sizes: list[int]) -> None:
    batches = list(reader.read("train", most))
    assert [len(batch.expert) for batch in batches] == sizes
    for batch, rows in zip(batches, sizes, strict=True):
        parts = (batch.context, batch.context_mask, batch.layer_actions, batch.episodes, batch.instructions)
        assert [len(part) for part in parts] == [rows] * 5


def _requests(raw: dict, rows: int) -> list[Request]:
    return [
        Request(
            Observation(raw["images"][row], raw["proprio"][row], raw["instructions"][row]),
            torch.Generator().manual_seed(row),
        )
        for row in range(rows)
    ]


def test_the_policys_chunk_is_the_one_a_rollout_would_execute(
    reader: FrameReader, held_out: list[PolicyFrames]
) -> None:
    raw = next(_stored("val").batches(8, repeat=False))
    decisions = load_policy(str(EMBEDDED)).act(_requests(raw, 8), "policy")
    for decision, chunk in zip(decisions, held_out[0].policy, strict=False):
        expected = reader.statistics.unnormalize(chunk).values
        np.testing.assert_allclose(decision.actions.values, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("/nowhere/checkpoint", "embedded", DATASET), "/nowhere/checkpoint is not a folder.*--checkpoint"),
        (("embedded", "/nowhere/data", DATASET), "/nowhere/data does not exist"),
        (("embedded", "embedded", "metaworld_other"), "metaworld_other"),
    ],
)
def test_what_is_missing_is_named(arguments: tuple[str, str, str], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        FrameReader(*arguments)


def test_a_split_that_is_not_there_is_named(reader: FrameReader) -> None:
    with pytest.raises(DatasetError, match="'test'"):
        next(iter(reader.read("test")))


def test_statistics_that_are_asked_for_and_not_there_are_an_error() -> None:
    with pytest.raises(StatisticsError, match=r"'bridge_orig'.*metaworld_seen25"):
        FrameReader("embedded", "embedded", DATASET, statistics_of="bridge_orig")


# The command.


def _copy(folder: Path) -> Path:
    return Path(shutil.copytree(EMBEDDED, folder))


def _memory(folder: Path | str, *extra: str, data: str = "embedded") -> int:
    flags = ["--checkpoint", str(folder), "--data-root-dir", data, "--dataset-name", DATASET]
    return cli.main(["memory", *flags, *extra])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = _copy(tmp_path_factory.mktemp("memory") / "vla")
    assert _memory(folder, "--max-frames", "70") == 0
    return folder


def test_memory_is_built_beside_the_checkpoint(
    built: Path, reader: FrameReader, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {path.name for path in built.iterdir()} - {path.name for path in EMBEDDED.iterdir()} == {MEMORY}
    memory = ChunkMemory.load(built)
    assert len(memory) == 70 and memory.statistics.to_dict() == reader.statistics.to_dict()
    frames = list(reader.read("train", 70))
    assert torch.equal(memory.chunks, _all(frames, lambda batch: batch.expert))
    assert torch.equal(memory.episodes, _all(frames, lambda batch: batch.episodes))
    found = memory.nearest(frames[0].context, frames[0].context_mask, frames[0].policy, 1)
    assert torch.equal(found.chunks[:, 0], frames[0].expert) and found.distances.max() < 0.05


def test_a_dataset_of_ones_own_is_remembered_like_a_known_one(
    built: Path, own_data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, fields = own_data
    folder = _copy(tmp_path / "vla")
    given = ["--checkpoint", str(folder), "--data-root-dir", str(root), "--dataset-name", "my_robot"]
    assert cli.main(["memory", *given]) == 2
    assert "unknown dataset 'my_robot'" in (said := capsys.readouterr().err) and "--dataset-config FILE" in said
    assert cli.main(["memory", *given, "--max-frames", "70", "--dataset-config", str(fields)]) == 0
    assert (folder / MEMORY).read_bytes() == (built / MEMORY).read_bytes()
    (folder / MEMORY).unlink()
    capsys.readouterr()
    assert cli.main(["memory", *given, "--max-frames", "9", "--dataset-config", str(fields), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["frames"] == 9 and told["path"] == str(folder / MEMORY) and told["bytes"] > 0


def test_a_second_memory_is_refused_and_the_first_one_stays(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (built / MEMORY).read_bytes()
    assert _memory(built) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and f"{MEMORY} is there already: delete it" in error
    assert (built / MEMORY).read_bytes() == before


def test_the_command_says_what_it_wrote_and_is_repeatable(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _copy(tmp_path / "vla")
    assert _memory(folder, "--max-frames", "70") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("70 frames in ") and " MB: " in printed and str(folder / MEMORY) in printed
    first, second = ChunkMemory.load(built), ChunkMemory.load(folder)
    assert torch.equal(first.keys, second.keys) and torch.equal(first.chunks, second.chunks)
    other = _copy(tmp_path / "other")
    assert _memory(other, "--max-frames", "70", "--seed", "1") == 0
    assert not torch.equal(ChunkMemory.load(other).chunks, first.chunks)


@pytest.mark.parametrize(
    ("extra", "data", "message"),
    [
        (["--max-frames", "0"], "embedded", "--max-frames 0: must be 1 or more"),
        (["--max-frames", "1"], "embedded", "two episodes"),
        ([], "/nowhere", "/nowhere does not exist"),
        (["--device", "abacus"], "embedded", "abacus"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], data: str, message: str
) -> None:
    folder = _copy(tmp_path / "vla")
    assert _memory(folder, *extra, data=data) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (folder / MEMORY).exists()


def test_a_memory_is_not_written_where_nobody_looks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _memory("embedded", "--max-frames", "33")
    assert not list(tmp_path.rglob("chunk_memory--*")), "`embedded` names the package's own, no folder here"
    assert not list(EMBEDDED.glob("chunk_memory--*"))


def test_a_folder_that_is_no_checkpoint_is_told_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _memory(tmp_path / "nowhere") == 2
    assert "nowhere is not a folder" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


# The same folder as a policy.


@pytest.fixture(scope="module")
def policy(built: Path, tmp_path_factory: pytest.TempPathFactory) -> CheckpointPolicy:
    """With a head that believes its memory, and whose gates are shut, but for one."""
    folder = Path(shutil.copytree(built, tmp_path_factory.mktemp("policy") / "vla"))
    (statistics,) = load_statistics(folder / "dataset_statistics.json").values()
    torch.manual_seed(0)
    trusting = RetrievalConfig(count=2, weight=1000.0)
    head = EnergyHead(D, A, H, EnergyConfig(head=HeadConfig(hidden_dim=8), retrieval=trusting))
    save_head(folder, head, 1, statistics, {MARGIN_KEY: None})
    save_gates(folder, {"refine": math.inf, BOTH: 0.0})
    return load_policy(str(folder))


def test_a_memory_alone_lets_a_checkpoint_retrieve(built: Path, reader: FrameReader) -> None:
    alone = load_policy(str(built))
    assert alone.arms == {"policy", "retrieve"}
    assert alone.metadata["memory"]["frames"] == 70 and alone.metadata["gates"] == {"retrieve": 0.0}
    raw = next(_stored("train").batches(6, repeat=False))
    decisions = alone.act(_requests(raw, 6), "retrieve")
    experts = next(iter(reader.read("train", 6))).expert
    for decision, expert in zip(decisions, experts, strict=True):
        assert (
            decision.accepted and decision.telemetry["key_distance"] < 0.1 and "energy_gain" not in decision.telemetry
        )
        np.testing.assert_array_equal(decision.actions.values, reader.statistics.unnormalize(expert).values)


def test_all_arms_of_a_folder_with_head_and_memory(policy: CheckpointPolicy) -> None:
    assert policy.arms == {"policy", "rerank", "refine", "retrieve", BOTH, "replan"}
    gates = {"rerank": math.inf, "refine": math.inf, "retrieve": 0.0, BOTH: 0.0}
    assert policy.metadata["gates"] == gates
    raw = next(_stored("train").batches(4, repeat=False))
    own = policy.act(_requests(raw, 4), "policy")
    for arm in ("rerank", "refine", "replan"):
        for decision, plain in zip(policy.act(_requests(raw, 4), arm), own, strict=True):
            assert not decision.accepted
            np.testing.assert_array_equal(decision.actions.values, plain.actions.values)
    both, lent = (policy.act(_requests(raw, 4), arm) for arm in (BOTH, "retrieve"))
    for decision, plain, other in zip(both, own, lent, strict=True):
        assert decision.accepted and decision.telemetry["energy_gain"] > 0 and decision.telemetry["key_distance"] < 0.1
        assert other.accepted and not np.array_equal(other.actions.values, plain.actions.values)
        np.testing.assert_allclose(decision.actions.values, other.actions.values, atol=1e-5)


def test_replanning_remembers_its_plan_between_decisions(policy: CheckpointPolicy) -> None:
    raw = next(_stored("train").batches(2, repeat=False))
    first = policy.act(_requests(raw, 2), "replan")
    assert [decision.execute for decision in first] == [2, 2]
    requests = [
        Request(request.observation, request.generator, decision, 2)
        for request, decision in zip(_requests(raw, 2), first, strict=True)
    ]
    second = policy.act(requests, "replan")
    for old, new in zip(first, second, strict=True):
        assert {"energy_rise", "fallback", "interval"} == set(new.telemetry)
        assert new.execute == new.telemetry["interval"]
        kept = new.telemetry["energy_rise"] <= 0.5
        assert new.accepted == kept and new.execute == (4 if kept else 2)
        rest = old.actions.values[2:] if kept else old.actions.values[: H - 2]
        np.testing.assert_array_equal(new.actions.values[: H - 2], rest)


def test_a_recommended_arm_keeps_its_own_interval(policy: CheckpointPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """`replan` decides how long its chunk holds, `ARM@n` says it, a plain arm leaves it to the settings."""
    arms = {"push": "replan", "pull": "retrieve@3", "reach": "retrieve"}
    monkeypatch.setattr(policy._advisor, "tasks", arms)
    raw = next(_stored("train").batches(3, repeat=False))
    requests = [
        dataclasses.replace(request, observation=dataclasses.replace(request.observation, instruction=task))
        for request, task in zip(_requests(raw, 3), arms, strict=True)
    ]
    first = policy.act(requests, "recommended")
    assert [decision.execute for decision in first] == [2, 3, None]
    later = [
        dataclasses.replace(request, previous=decision, executed=2)
        for request, decision in zip(requests, first, strict=True)
    ]
    (alone,) = policy.act(later[:1], "replan")
    again = policy.act(later, "recommended")
    assert [decision.execute for decision in again] == [alone.execute, 3, None]
    np.testing.assert_allclose(again[0].actions.values, alone.actions.values, atol=1e-5)


def test_the_rest_of_the_chunk_under_way_is_a_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _copy(tmp_path / "policy")
    config = EnergyConfig(candidates=CandidatesConfig(num_candidates=0, layer_exits=False, overlap=True))
    policy = load_policy(str(folder))
    head = EnergyHead(policy._vla.context_dim, policy.action_dim, policy.horizon, config)
    save_head(folder, head, 0, policy._statistics, {"rerank_margin": 0.0})
    policy = load_policy(str(folder))
    seen = {}
    propose = policy._advisor.propose

    def spy(mode, frame, generators, others=None):
        seen.update(others or {})
        return propose(mode, frame, generators, others)

    monkeypatch.setattr(policy._advisor, "propose", spy)
    observation = Observation(np.zeros((1, 64, 64, 3), np.uint8), np.zeros(4, np.float32), "push")
    (first,) = policy.act([Request(observation, torch.Generator())], "rerank")
    fresh = seen["overlap"].chunks[0, 0].clone()
    previous = torch.arange(32.0).reshape(8, 4) / 32
    before = dataclasses.replace(first, memo=previous)
    policy.act([Request(observation, torch.Generator(), before, 3)], "rerank")
    assert torch.equal(seen["overlap"].chunks[0, 0], torch.cat([previous[3:], fresh[5:]]))


def test_the_recommended_arm_goes_by_the_instruction(tmp_path: Path) -> None:
    folder = _copy(tmp_path / "policy")
    assert _memory(folder, "--max-frames", "200") == 0
    assert "recommended" not in load_policy(str(folder)).arms
    save_gates(folder, {}, {"push": "retrieve"})
    policy = load_policy(str(folder))
    assert "recommended" in policy.arms and policy.metadata["recommended"] == {"push": "retrieve"}
    image = np.random.default_rng(0).integers(0, 255, (1, 64, 64, 3), np.uint8)
    requests = [
        Request(Observation(image, np.zeros(4, np.float32), name), torch.Generator())
        for name in ("pull", "push", "pull")
    ]
    mixed = policy.act(requests, "recommended")
    assert [decision.accepted for decision in mixed] == [False, True, False]
    for arm, row in (("policy", 0), ("retrieve", 1), ("policy", 2)):
        (alone,) = policy.act([requests[row]], arm)
        np.testing.assert_allclose(mixed[row].actions.values, alone.actions.values, atol=1e-5)
    assert [decision.execute for decision in mixed] == [None] * 3
    save_gates(folder, {}, {"push": "retrieve@7", "pull": "policy@2"})
    asked = load_policy(str(folder)).act(requests, "recommended")
    assert [decision.execute for decision in asked] == [2, 7, 2]
    for one, other in zip(asked, mixed, strict=True):
        np.testing.assert_array_equal(one.actions.values, other.actions.values)
    save_gates(folder, {}, {"push": "refine"})
    with pytest.raises(ValueError, match=r"recommended are refine, the checkpoint has policy, retrieve.*preflight"):
        load_policy(str(folder))
