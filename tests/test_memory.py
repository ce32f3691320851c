"""Retrieval against brute force; files that survive or are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vla_energy.actions import DatasetStatistics, FieldStatistics
from vla_energy.checkpoint import CheckpointError
from vla_energy.memory import ChunkMemory, MemoryBatch, Retrieved

D, H, A, FRAMES, PER_EPISODE = 12, 3, 2, 60, 6


def statistics() -> DatasetStatistics:
    numbers = {name: np.zeros(A) for name in ("mean", "min", "q01")}
    numbers |= {name: np.ones(A) for name in ("std", "max", "q99")}
    return DatasetStatistics(FieldStatistics(**numbers, mask=np.ones(A, bool)), None, FRAMES, FRAMES // PER_EPISODE)


def frames(tokens: int, count: int = FRAMES, seed: int = 0) -> MemoryBatch:
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(count, tokens, D, generator=generator)
    mask = torch.ones(count, tokens, dtype=torch.bool)
    mask[:, -2:] = False
    policy, expert = (torch.rand(count, H, A, generator=generator) for _ in range(2))
    return MemoryBatch(context, mask, policy, expert, torch.arange(count) // PER_EPISODE)


@pytest.fixture(scope="module")
def memory() -> ChunkMemory:
    whole = frames(5)
    return ChunkMemory.build([MemoryBatch(*(part[i : i + 7] for part in whole)) for i in range(0, 60, 7)], statistics())


def brute_force(memory: ChunkMemory, batch: MemoryBatch, count: int, exclude: Tensor | None) -> Retrieved:
    keys = memory.encoder(batch.context, batch.context_mask, batch.policy)
    rows = []
    for row, key in enumerate(keys):
        distances = (memory.keys - key).norm(dim=1)
        if exclude is not None:
            distances[memory.episodes == exclude[row]] = torch.inf
        rows.append(distances)
    distances, index = torch.stack(rows).sort(1)
    return Retrieved(memory.chunks[index[:, :count]], distances[:, :count], memory.episodes[index[:, :count]])


@pytest.mark.parametrize("excluded", [False, True])
def test_neighbours_are_those_of_brute_force(memory: ChunkMemory, excluded: bool) -> None:
    batch = frames(5, 9, seed=1)
    exclude = batch.episodes if excluded else None
    found = memory.nearest(batch.context, batch.context_mask, batch.policy, 4, exclude)
    expected = brute_force(memory, batch, 4, exclude)
    torch.testing.assert_close(found.distances, expected.distances, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.chunks, expected.chunks)
    assert torch.equal(found.episodes, expected.episodes)
    if exclude is not None:
        assert (found.episodes != exclude[:, None]).all()


def test_a_remembered_frame_finds_itself_and_a_typical_distance_is_one(memory: ChunkMemory) -> None:
    batch = frames(5)
    found = memory.nearest(batch.context, batch.context_mask, batch.policy, 1)
    torch.testing.assert_close(found.chunks[:, 0], batch.expert)
    assert found.distances.max() < 0.01
    other = memory.nearest(batch.context, batch.context_mask, batch.policy, 1, batch.episodes)
    assert other.distances.median() == pytest.approx(1, abs=0.01)


def test_hidden_tokens_and_padding_do_not_matter(memory: ChunkMemory) -> None:
    batch = frames(5, 4, seed=1)
    expected = memory.encoder(batch.context, batch.context_mask, batch.policy)
    spoilt = batch.context.clone()
    spoilt[:, -2:] = torch.nan
    torch.testing.assert_close(memory.encoder(spoilt, batch.context_mask, batch.policy), expected)
    longer = torch.nn.functional.pad(batch.context, (0, 0, 0, 3), value=7.0)
    mask = torch.nn.functional.pad(batch.context_mask, (0, 3))
    torch.testing.assert_close(memory.encoder(longer, mask, batch.policy), expected)
    torch.testing.assert_close(memory.encoder(batch.context[:, :3], mask[:, :3], batch.policy), expected)


def test_context_and_policy_both_count(memory: ChunkMemory) -> None:
    batch = frames(5, 4, seed=1)
    keys = memory.encoder(*batch[:3])
    assert (memory.encoder(batch.context, batch.context_mask, batch.policy + 1) - keys).norm(dim=1).min() > 0.1
    assert (memory.encoder(batch.context + 1, batch.context_mask, batch.policy) - keys).norm(dim=1).min() > 0.1


def test_batches_of_different_length_make_one_memory() -> None:
    short, long = frames(4, 20, seed=2), frames(6, 20, seed=3)
    memory = ChunkMemory.build([short, long], statistics())
    assert memory.encoder.tokens == 6
    for batch in (short, long):
        found = memory.nearest(batch.context, batch.context_mask, batch.policy, 1)
        torch.testing.assert_close(found.chunks[:, 0], batch.expert)


def test_fewer_frames_than_asked_for_are_said_to_be_missing() -> None:
    batch = frames(5, 2 * PER_EPISODE)
    memory = ChunkMemory.build([batch], statistics())
    found = memory.nearest(batch.context, batch.context_mask, batch.policy, 9, batch.episodes)
    assert found.chunks.shape == (12, 9, H, A)
    assert found.distances[:, :6].isfinite().all() and found.distances[:, 6:].isinf().all()
    assert (found.episodes[:, 6:] == -1).all()
    assert torch.equal(found.chunks[:, 6:], found.chunks[:, :1].expand(-1, 3, -1, -1))


def test_a_loaded_memory_answers_alike_and_tells_its_size(memory: ChunkMemory, tmp_path: Path) -> None:
    path = memory.save(tmp_path, 40)
    assert path.name == "chunk_memory--40_checkpoint.safetensors"
    assert abs(path.stat().st_size - memory.nbytes) < 8_000
    loaded, batch = ChunkMemory.load(tmp_path), frames(5, 9, seed=1)
    assert len(loaded) == len(memory) == FRAMES
    assert loaded.statistics.to_dict() == memory.statistics.to_dict()
    for mine, theirs in zip(*(vars(m.nearest(*batch[:3], 4)).values() for m in (memory, loaded)), strict=True):
        assert torch.equal(mine, theirs)


def test_rows_that_are_not_finite_find_nothing_and_spoil_no_other(memory: ChunkMemory) -> None:
    batch = frames(5, 3, seed=1)
    expected = memory.nearest(*batch[:3], 2)
    context, policy = batch.context.clone(), batch.policy.clone()
    context[0, 0, 0], policy[2, 0, 0] = torch.nan, torch.inf
    found = memory.nearest(context, batch.context_mask, policy, 2)
    assert found.distances[[0, 2]].isinf().all() and (found.episodes[[0, 2]] == -1).all()
    assert torch.equal(found.distances[1], expected.distances[1]) and torch.equal(found.chunks[1], expected.chunks[1])


def test_bad_input(memory: ChunkMemory, tmp_path: Path) -> None:
    batch = frames(5, 4)
    with pytest.raises(ValueError, match="count=0"):
        memory.nearest(*batch[:3], 0)
    with pytest.raises(ValueError, match=r"expected \(B,S,12\)"):
        memory.nearest(batch.context[..., :5], batch.context_mask, batch.policy, 1)
    with pytest.raises(ValueError, match=r"the memory's chunks are \(3, 2\)"):
        memory.nearest(batch.context, batch.context_mask, batch.policy[:, 1:], 1)
    with pytest.raises(ValueError, match=r"policy \(3, 3, 2\) for context"):
        memory.nearest(batch.context, batch.context_mask, batch.policy[1:], 1)
    with pytest.raises(ValueError, match="no frame"):
        ChunkMemory.build([], statistics())
    with pytest.raises(ValueError, match="two episodes"):
        ChunkMemory.build([frames(5, 3)], statistics())
    with pytest.raises(CheckpointError, match="chunk_memory--"):
        ChunkMemory.load(tmp_path)
    path = memory.save(tmp_path, 1)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1  # one bit of a number
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        ChunkMemory.load(path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="damaged"):
        ChunkMemory.load(path)


@pytest.mark.parametrize("part", ["context", "policy", "expert"])
def test_the_first_frame_that_is_not_finite_is_named(part: str) -> None:
    batch = frames(5)
    value = getattr(batch, part).clone()
    value[9:, 0, 0] = torch.inf
    halves = [MemoryBatch(*(one[i : i + 7] for one in batch._replace(**{part: value}))) for i in range(0, 60, 7)]
    with pytest.raises(ValueError, match=rf"frame 9, of episode {int(batch.episodes[9])}: the {part}.* is not finite"):
        ChunkMemory.build(halves, statistics())


def test_hidden_tokens_of_a_memory_may_be_anything() -> None:
    batch = frames(5)
    mask = batch.context_mask.clone()
    mask[:, -1] = False
    context = batch.context.clone()
    context[:, -1] = torch.nan
    assert len(ChunkMemory.build([batch._replace(context=context, context_mask=mask)], statistics()))
