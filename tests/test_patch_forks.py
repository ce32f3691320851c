"""What `benchmarks/patch_forks.py` says of a checkout; the forks themselves lie elsewhere."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import test_patching

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import patch_forks

from vla_energy.hosts import patching
from vla_energy.hosts.patch_file import Patch, load_patch

TRAIN, EVAL, _ = test_patching.PATHS


@pytest.fixture
def patch(tmp_path: Path) -> Patch:
    path = tmp_path / "patch.json"
    path.write_text(json.dumps(test_patching.as_json({TRAIN: test_patching.TRAIN, EVAL: test_patching.EVAL})))
    return load_patch(path)


def test_a_fork_that_fits_and_one_that_does_not(patch: Patch) -> None:
    known = {TRAIN: test_patching.TRAIN.encode(), EVAL: test_patching.EVAL.encode()}
    fork = {**known, EVAL: known[EVAL].replace(b"main(cfg)", b"main(cfg, more=1)")}
    other = {**known, TRAIN: known[TRAIN].replace(b"window", b"recent")}
    assert patch_forks.outcome(known, patch) == (
        ["exact, exact, absent", "7 lines", "nothing changed", "equal bytes"], True,
    )  # fmt: skip
    assert patch_forks.outcome(fork, patch)[0][0] == "exact, diverged, absent"
    columns, fine = patch_forks.outcome(other, patch)
    assert fine and columns[1:] == ["refused", "refused", "not applied"] and "recent" not in columns[0]
    assert columns[0].startswith(f"{TRAIN}: no place after the assignment of window")
    assert patch_forks.differing(known, fork) == ["0", "2"] and patch_forks.differing(known, {}) == ["absent"] * 2


def test_a_revert_that_leaves_something_is_seen(patch: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {TRAIN: test_patching.TRAIN.encode(), EVAL: test_patching.EVAL.encode()}
    monkeypatch.setattr(patching, "revert", lambda root, patch: ["nothing done"])
    columns, fine = patch_forks.outcome(known, patch)
    assert columns[-1] == "OTHER BYTES" and not fine
