"""A folder's head, memory and gates as one advisor; what does not fit the policy is refused in words that help."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_energy.actions import DatasetStatistics, FieldStatistics
from vla_energy.advisor import load_advisor
from vla_energy.arms import BOTH, MODES
from vla_energy.checkpoint import CheckpointError, save_head
from vla_energy.compatibility import CompatibilityError
from vla_energy.config import EnergyConfig, HeadConfig
from vla_energy.gates import GATES, load_gates, save_gates
from vla_energy.head import EnergyHead
from vla_energy.memory import ChunkMemory, MemoryBatch
from vla_energy.modes import Advisor, Frame
from vla_energy.noise import noise_scale
from vla_energy.rerank import MARGIN_KEY, Reranker

S, D, H, A, FRAMES = 4, 12, 3, 3, 12


def _statistics(factor: float = 1.0, dims: int = A) -> DatasetStatistics:
    values = factor * np.random.default_rng(0).normal(size=(100, dims))
    return DatasetStatistics(FieldStatistics.of(values, np.arange(dims) < dims - 1), None, 100, 2)


def _save_head(folder: Path, extra: dict[str, Any] | None = None, factor: float = 1.0) -> Path:
    head = EnergyHead(D, A, H, EnergyConfig(head=HeadConfig(hidden_dim=8)))
    return save_head(folder, head, 7, _statistics(factor), extra)


def _save_memory(folder: Path, width: int = D, horizon: int = H, dims: int = A, factor: float = 1.0) -> Path:
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(FRAMES, S, width, generator=generator)
    policy, expert = (torch.rand(FRAMES, horizon, dims, generator=generator) for _ in range(2))
    batch = MemoryBatch(context, torch.ones(FRAMES, S, dtype=torch.bool), policy, expert, torch.arange(FRAMES) // 4)
    return ChunkMemory.build([batch], _statistics(factor, dims)).save(folder, 7)


def _load(folder: Path, **changes: Any) -> Advisor:
    policy: dict[str, Any] = {"statistics": _statistics(), "horizon": H, "action_dim": A, "context_dim": D}
    return load_advisor(folder, **{**policy, **changes})


# The file of margins.


MARGINS = st.dictionaries(
    st.sampled_from(MODES), st.floats(0, allow_nan=False, allow_infinity=True) | st.integers(0, 9)
).map(lambda margins: {**margins, "retrieve": 0.0})
ARMS = st.sampled_from(["policy", *MODES]).flatmap(
    lambda arm: st.integers(1, 99).map(lambda every: f"{arm}@{every}") | st.just(arm)
) | st.just("replan")


@settings(max_examples=30, deadline=None)
@given(MARGINS, st.dictionaries(st.text(max_size=8), ARMS, max_size=5))
def test_gates_come_back_as_they_were_saved(
    tmp_path_factory: pytest.TempPathFactory, gates: dict[str, float], tasks: dict[str, str]
) -> None:
    folder = tmp_path_factory.mktemp("gates")
    path = save_gates(folder, gates, tasks)
    assert path == folder / GATES and load_gates(folder) == (gates, tasks)
    assert [entry.name for entry in folder.iterdir()] == [GATES]


def test_a_shut_gate_is_null_in_strict_json(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    path = save_gates(tmp_path, {"rerank": 0.25, BOTH: math.inf})
    assert json.loads(path.read_text(), parse_constant=refuse) == {"margins": {"rerank": 0.25, BOTH: None}, "tasks": {}}
    assert load_gates(tmp_path) == ({"rerank": 0.25, BOTH: math.inf}, {})
    save_gates(tmp_path, {"rerank": 0.5})
    assert load_gates(tmp_path) == ({"rerank": 0.5}, {}), "the old ones are replaced, not mixed in"


def test_no_file_is_no_gates(tmp_path: Path) -> None:
    assert load_gates(tmp_path) == load_gates(tmp_path / "nowhere") == ({}, {})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"margins": {"rerank": 0.5',
        b"[0.5]",
        b"3",
        b"{}",
        b'{"margins": {}}',
        b'{"margins": {}, "tasks": 3}',
        b'{"margins": [["rerank", 0.5]], "tasks": {}}',
        b"\xff\xfe\x00{",
    ],
)
def test_a_damaged_file_is_named_with_what_writes_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / GATES).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{GATES} is damaged .*vla-energy preflight writes it"):
        load_gates(tmp_path)
    with pytest.raises(CheckpointError, match="damaged"):
        _load(tmp_path)


@pytest.mark.parametrize("what", ["folder", "dangling link", "pipe"])
def test_what_is_no_file_is_not_taken_for_no_gates(tmp_path: Path, what: str) -> None:
    path = tmp_path / GATES
    {"folder": path.mkdir, "dangling link": lambda: path.symlink_to("gone"), "pipe": lambda: os.mkfifo(path)}[what]()
    with pytest.raises(CheckpointError, match=rf"{GATES} is a folder, a link to nothing .*vla-energy preflight"):
        load_gates(tmp_path)
    with pytest.raises(CheckpointError, match=GATES):
        _load(tmp_path)


WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"rerank": 0.5, "refine": -0.1}, {}, "the margin of refine is -0.1: expected a number, 0 or more"),
    ({"refine": math.nan}, {}, "the margin of refine is nan: expected a number"),
    ({"refine": -math.inf}, {}, "the margin of refine is -inf: expected a number"),
    ({"rerank": True}, {}, "the margin of rerank is True: expected a number"),
    ({"rerank": "0.1"}, {}, "the margin of rerank is '0.1': expected a number"),
    ({"rerank": [0.5]}, {}, r"the margin of rerank is \[0.5\]: expected a number"),
    ({"rerank_retrieve": 0.1}, {}, "margins has 'rerank_retrieve': expected one of rerank, refine, retrieve, rerank.r"),
    ({"policy": 0.1}, {}, "margins has 'policy': expected one of"),
    ({"retrieve": math.inf}, {}, r"the margin of retrieve is shut \(null\): expected 0, plain retrieval has no gate"),
    ({"retrieve": 0.2}, {}, "the margin of retrieve is 0.2: expected 0"),
    ({}, {"push": "replan@2"}, "task 'push': arm 'replan@2': replan decides itself when to ask again"),
    ({}, {"push": "policy@0"}, "task 'push': arm 'policy@0': expected ARM or ARM@n"),
    ({}, {"push": "retrieve@04"}, "task 'push': arm 'retrieve@04': expected ARM or ARM@n"),
    ({}, {"push": "off"}, "task 'push' has the arm 'off': expected policy, rerank, refine, .*replan"),
    ({}, {"push": "recommended"}, "task 'push' has the arm 'recommended': expected"),
    ({}, {"push": None}, "tasks has 'push': None: expected an arm's name by instruction"),
    ({}, {"push": 3}, "tasks has 'push': 3: expected"),
]


@pytest.mark.parametrize(("margins", "tasks", "message"), WRONG)
def test_what_no_preflight_writes_is_refused_by_name_read_or_written(
    tmp_path: Path, margins: dict[str, Any], tasks: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        save_gates(tmp_path, margins, tasks)
    assert not isinstance(error.value, CheckpointError) and not any(tmp_path.iterdir()), "nothing is written"
    by_hand = {mode: None if margin == math.inf else margin for mode, margin in margins.items()}
    (tmp_path / GATES).write_text(json.dumps({"margins": by_hand, "tasks": tasks}))
    for load in (load_gates, _load):
        with pytest.raises(CheckpointError, match=f"{GATES}: {message}.*vla-energy preflight writes it anew"):
            load(tmp_path)


def test_a_margin_may_be_an_integer_but_not_larger_than_a_float(tmp_path: Path) -> None:
    (tmp_path / GATES).write_text('{"margins": {"rerank": 1}, "tasks": {}}')
    (margin,) = load_gates(tmp_path)[0].values()
    assert margin == 1 and type(margin) is float
    (tmp_path / GATES).write_text(f'{{"margins": {{"rerank": {10**400}}}, "tasks": {{}}}}')
    with pytest.raises(CheckpointError, match="too large"):
        load_gates(tmp_path)


def test_no_recommended_arm_executes_more_than_a_chunk(tmp_path: Path) -> None:
    _save_memory(tmp_path)
    save_gates(tmp_path, {}, {"push": f"retrieve@{H}", "pull": f"policy@{H + 1}"})
    with pytest.raises(CheckpointError, match=f"{GATES}: arms policy@{H + 1}, but a chunk has {H} steps"):
        _load(tmp_path)
    save_gates(tmp_path, {}, {"push": f"retrieve@{H}"})
    assert _load(tmp_path).tasks == {"push": f"retrieve@{H}"}


# A checkpoint's folder.


def test_an_empty_folder_has_no_modes_and_files_add_theirs(tmp_path: Path) -> None:
    assert _load(tmp_path).modes == ()
    memory = _save_memory(tmp_path)
    assert _load(tmp_path).modes == ("retrieve",)
    _save_head(tmp_path)
    assert set(_load(tmp_path).modes) == {"rerank", "refine", "retrieve", BOTH}
    memory.unlink()
    assert _load(tmp_path).modes == ("rerank", "refine")


@pytest.mark.parametrize("calibrates", [False, True])
def test_who_calibrates_is_not_told_to(calibrates: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _save_head(tmp_path)
    _save_memory(tmp_path)
    _load(tmp_path, calibrates=calibrates)
    assert ("run vla-energy preflight" in caplog.text) is not calibrates


def test_margins_come_from_the_head_and_from_the_file_of_gates(tmp_path: Path) -> None:
    _save_head(tmp_path, {MARGIN_KEY: 0.75})
    _save_memory(tmp_path)
    assert _load(tmp_path).gates == {"rerank": 0.75, "refine": math.inf, "retrieve": 0.0, BOTH: math.inf}
    save_gates(tmp_path, {"rerank": 0.1, "refine": math.inf, BOTH: 0.2})
    assert _load(tmp_path).gates == {"rerank": 0.1, "refine": math.inf, "retrieve": 0.0, BOTH: 0.2}
    shut = tmp_path / "shut"
    _save_head(shut, {MARGIN_KEY: None})
    assert _load(shut).gates["rerank"] == math.inf


@pytest.mark.parametrize("written", [0.2, math.inf, None])
@pytest.mark.parametrize("stored", [0.75, None, "nothing"])
def test_the_margin_of_rerank_and_the_one_warning_where_there_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, written: float | None, stored: float | str | None
) -> None:
    """The file of gates, else what fine-tuning stored, else the config's with a warning: for each way to load it."""
    _save_head(tmp_path, {} if stored == "nothing" else {MARGIN_KEY: stored})
    if written is not None:
        save_gates(tmp_path, {"rerank": written})
    own = {"nothing": EnergyConfig().rerank.margin, None: math.inf, 0.75: 0.75}[stored]
    expected = own if written is None else written
    for margin in (
        lambda: _load(tmp_path).gates["rerank"],
        lambda: Reranker.from_checkpoint(tmp_path).margin,
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert margin() == expected
        warned = [record for record in caplog.records if "never calibrated" in record.message]
        assert len(warned) == len(caplog.records) == int(written is None and stored == "nothing")
    assert Reranker.from_checkpoint(tmp_path, margin=0.1).margin == 0.1, "what the caller says wins"


def test_gates_of_other_modes_do_not_calibrate_rerank(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _save_head(tmp_path)
    save_gates(tmp_path, {"refine": 0.2})
    assert _load(tmp_path).gates["rerank"] == EnergyConfig().rerank.margin and "never calibrated" in caplog.text


def test_the_noise_is_the_statistics_own(tmp_path: Path) -> None:
    _save_head(tmp_path)
    advisor = _load(tmp_path, device=torch.device("cpu"))
    assert list(advisor.gripper_dims) == [A - 1], "the dimension that is not normalised"
    assert advisor.scale is not None and torch.equal(advisor.scale, noise_scale(_statistics()))
    assert advisor.reranker is not None and not advisor.reranker.head.training


def test_a_gate_that_was_never_calibrated_is_said_to_stay_shut(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _save_head(tmp_path, {MARGIN_KEY: 0.5})
    with caplog.at_level(logging.WARNING):
        _load(tmp_path)
        assert not caplog.records, "without a memory there is nothing to say"
        _save_memory(tmp_path)
        _load(tmp_path)
        assert "rerank+retrieve" in caplog.text and "vla-energy preflight" in caplog.text
        caplog.clear()
        save_gates(tmp_path, {BOTH: math.inf})
        _load(tmp_path)
        assert not caplog.records


def test_an_advisor_from_a_folder_lends_what_was_remembered(tmp_path: Path) -> None:
    _save_head(tmp_path)
    _save_memory(tmp_path)
    advisor = _load(tmp_path)
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(FRAMES, S, D, generator=generator)
    policy, expert = (torch.rand(FRAMES, H, A, generator=generator) for _ in range(2))
    frame = Frame(context, torch.ones(FRAMES, S, dtype=torch.bool), policy)
    proposal, accepted = advisor.decide("retrieve", frame, [torch.Generator() for _ in range(FRAMES)])
    assert accepted.all() and torch.equal(proposal.actions, expert)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": H + 1}, "horizon is 4 here, .* with 3"),
        ({"action_dim": A + 1}, "action_dim is 4 here, .* with 3"),
        ({"context_dim": D + 1}, "context_dim is 13 here, .* with 12"),
    ],
)
@pytest.mark.parametrize("save", [_save_head, _save_memory])
def test_a_head_or_memory_of_another_policy_is_refused(
    tmp_path: Path, save: Any, changes: dict[str, int], message: str
) -> None:
    save(tmp_path)
    with pytest.raises(ValueError, match=message):
        _load(tmp_path, **changes)


@pytest.mark.parametrize(
    ("built", "message"),
    [({"horizon": 2}, "horizon is 3"), ({"dims": 4}, "action_dim is 3"), ({"width": 8}, "context_dim is 12")],
)
@pytest.mark.parametrize("with_head", [False, True])
def test_a_memory_of_another_shape_is_to_be_built_again(
    tmp_path: Path, built: dict[str, int], message: str, with_head: bool
) -> None:
    if with_head:
        _save_head(tmp_path)
    _save_memory(tmp_path, **built)
    with pytest.raises(ValueError, match=f"{message} here, the memory was built with .*: build it again"):
        _load(tmp_path)


def test_a_head_of_other_statistics_is_refused(tmp_path: Path) -> None:
    _save_head(tmp_path, factor=2.0)
    with pytest.raises(CompatibilityError, match="the head was trained with other action statistics: q01"):
        _load(tmp_path)


def test_a_memory_of_other_statistics_than_the_heads_is_refused(tmp_path: Path) -> None:
    _save_head(tmp_path)
    _save_memory(tmp_path, factor=2.0)
    with pytest.raises(ValueError, match="other action statistics: q01 differs at dimension 0"):
        _load(tmp_path)


def test_a_memory_of_other_statistics_is_refused_without_a_head_too(tmp_path: Path) -> None:
    _save_memory(tmp_path, factor=2.0)
    with pytest.raises(ValueError, match="statistics"):
        _load(tmp_path)


def test_statistics_that_differ_in_the_mask_are_refused(tmp_path: Path) -> None:
    _save_head(tmp_path)
    _save_memory(tmp_path)
    statistics = _statistics()
    unmasked = dataclasses.replace(statistics.action, mask=np.ones(A, bool))
    with pytest.raises(CompatibilityError, match="mask differs at dimension 2"):
        _load(tmp_path, statistics=dataclasses.replace(statistics, action=unmasked))


@pytest.mark.parametrize("save", [_save_head, _save_memory])
def test_a_damaged_or_a_second_file_is_an_error_and_not_a_missing_mode(tmp_path: Path, save: Any) -> None:
    path = save(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[:-20])
    with pytest.raises(CheckpointError, match=path.name):
        _load(tmp_path)
    path.write_bytes(data)
    assert _load(tmp_path).modes
    path.with_name(path.name.replace("--7", "--8")).write_bytes(data)
    with pytest.raises(CheckpointError, match="2 files"):
        _load(tmp_path)
