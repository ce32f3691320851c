"""Cropped images as a source of candidates: in rollouts, in the reading of frames, in preflight."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla_energy.backbones import LoadedVLA, load_openvla
from vla_energy.backbones.tiny import EMBEDDED
from vla_energy.checkpoint import save_head
from vla_energy.cli import main
from vla_energy.config import CandidatesConfig, EnergyConfig, HeadConfig
from vla_energy.crops import crop_chunks, random_crops
from vla_energy.data.augment import center_crop, crop
from vla_energy.finetune.frames import FrameReader
from vla_energy.finetune.setup import EMBEDDED_DATA
from vla_energy.head import EnergyHead
from vla_energy.rollout.interface import Request
from vla_energy.rollout.policy import CheckpointPolicy, load_policy
from vla_energy.rollout.world import Observation

DATASET = "metaworld_demo"
TEXTS = ["push the puck", "open", "close the drawer slowly"]
CONFIG = CandidatesConfig(num_candidates=2, layer_exits=False, crops=3, crop_scale=0.8)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _images(rows: int = len(TEXTS), size: int = 96) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (rows, 1, size, size, 3), np.uint8)


@pytest.fixture(scope="module")
def vla() -> LoadedVLA:
    return load_openvla(EMBEDDED, use_proprio=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, vla: LoadedVLA) -> Path:
    """The shipped policy with a head whose candidates are crops, too."""
    folder = Path(shutil.copytree(EMBEDDED, tmp_path_factory.mktemp("crops") / "vla"))
    torch.manual_seed(0)
    config = EnergyConfig(head=HeadConfig(hidden_dim=8), candidates=CONFIG)
    head = EnergyHead(vla.context_dim, vla.action_dim, vla.horizon, config)
    (statistics,) = vla.statistics.values()
    save_head(folder, head, 1, statistics, {"rerank_margin": 0.0})
    return folder


def test_crops_are_of_the_image_at_places_all_over_it() -> None:
    gradient = np.zeros((2, 101, 101, 3), np.uint8)  # the value says where a pixel was
    gradient[..., 0], gradient[..., 1] = np.arange(101)[:, None], np.arange(101)
    crops = random_crops(gradient, 200, 0.8, _generator(0))
    assert crops.shape == (200, 2, 101, 101, 3) and crops.dtype == np.uint8
    for channel in (0, 1):
        first, last = crops[:, :, 0, 0, channel].astype(int), crops[:, :, -1, -1, channel].astype(int)
        assert np.abs(last - first - 80).max() <= 1, "0.8 of the image fill the crop"
        assert first.min() <= 1 and first.max() >= 19 and last.max() <= 100
    corners = crops[:, :, 0, 0, :2].astype(int)
    assert (np.abs(corners[:, 0] - corners[:, 1]).max(1) > 1).mean() > 0.8, "each camera has its own place"
    np.testing.assert_array_equal(random_crops(gradient, 2, 1.0, _generator(0))[1], gradient)


def _slowly(vla: LoadedVLA, images: np.ndarray, text: str, proprio: torch.Tensor, seed: int) -> torch.Tensor:
    """One observation's chunks, crop by crop."""
    places = torch.rand(CONFIG.crops, 1, 2, generator=_generator(seed), dtype=torch.float64) * (1 - CONFIG.crop_scale)
    chunks = []
    for place in places[:, 0].tolist():
        view = crop(images[0], place, CONFIG.crop_scale)
        chunks.append(vla.predict(vla.processor.batch(view[None, None], [text], proprio=proprio[None])).actions[0])
    return torch.stack(chunks)


def test_chunks_are_the_policys_for_each_crop_alone(vla: LoadedVLA) -> None:
    images, proprio = _images(), torch.rand(3, 4, generator=_generator(9))
    vla.train()  # as in the middle of a training
    chunks = crop_chunks(vla, images, TEXTS, proprio, [_generator(row) for row in range(3)], CONFIG)
    assert vla.training and not chunks.requires_grad
    vla.eval()
    assert chunks.shape == (3, 3, vla.horizon, vla.action_dim)
    for row, text in enumerate(TEXTS):
        torch.testing.assert_close(chunks[row], _slowly(vla, images[row], text, proprio[row], row), atol=1e-4, rtol=0)
    whole = vla.predict(vla.processor.batch(images, TEXTS, proprio=proprio), "off").actions
    assert ((chunks - whole[:, None]).abs().amax((2, 3)) > 1e-3).all(), "crops change the chunk"


def test_wrong_arguments_are_named(vla: LoadedVLA) -> None:
    proprio, generators = torch.zeros(3, 4), [_generator(row) for row in range(3)]
    with pytest.raises(ValueError, match="candidates.crops=0: expected 1 or more"):
        crop_chunks(vla, _images(), TEXTS, proprio, generators, CandidatesConfig())
    with pytest.raises(ValueError, match=r"\(3, 3, 2\) rows"):
        crop_chunks(vla, _images(), TEXTS, proprio, generators[:2], CONFIG)
    with pytest.raises(ValueError, match="proprio"):
        crop_chunks(vla, _images(), TEXTS, proprio[:2], generators, CONFIG)


def _requests(rows: range) -> list[Request]:
    images = _images(size=64)
    return [Request(Observation(images[row], np.full(4, 0.1 * row), TEXTS[row]), _generator(row)) for row in rows]


def _spied(policy: CheckpointPolicy, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What goes to the advisor, call by call."""
    seen, propose = [], policy._advisor.propose

    def spy(mode, frame, generators, others=None):
        seen.append((mode, dict(others or {})))
        return propose(mode, frame, generators, others)

    monkeypatch.setattr(policy._advisor, "propose", spy)
    return seen


def test_rollouts_rerank_among_crops_of_the_whole_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(str(folder))
    seen = _spied(policy, monkeypatch)
    policy.act(_requests(range(3)), "rerank")
    for row in range(3):
        policy.act(_requests(range(row, row + 1)), "rerank")
    policy.act(_requests(range(3)), "refine")
    together, *alone = (others["crop"].chunks for mode, others in seen if mode == "rerank")
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)
    assert seen[-1] == ("refine", {}), "only reranking chooses among candidates"
    request = _requests(range(1, 2))[0]
    proprio = policy._statistics.proprio
    assert proprio is not None
    normalised = proprio.normalize(torch.tensor(request.observation.proprio)).float()
    expected = _slowly(policy._vla, request.observation.images, TEXTS[1], normalised, 1)
    torch.testing.assert_close(together[1], expected, atol=1e-4, rtol=0)


def test_a_crop_stands_in_the_place_of_the_centre_crop(folder: Path, tmp_path: Path, monkeypatch) -> None:
    cropping = Path(shutil.copytree(folder, tmp_path / "vla"))
    stored = json.loads((cropping / "config.json").read_text())
    stored["vla_energy"]["center_crop"] = True
    (cropping / "config.json").write_text(json.dumps(stored))
    plain, centred = load_policy(str(folder)), load_policy(str(cropping))
    first, second = _spied(plain, monkeypatch), _spied(centred, monkeypatch)
    for policy in (plain, centred):
        policy.act(_requests(range(3)), "rerank")
    assert torch.equal(first[0][1]["crop"].chunks, second[0][1]["crop"].chunks)
    batches = [policy._batch(_requests(range(3)))["pixel_values"] for policy in (plain, centred)]
    centre = plain._vla.processor.pixel_values(center_crop(_images(size=64)))
    assert torch.equal(batches[1], centre) and not torch.equal(*batches), "the policy's own chunk sees the centre"


def test_without_crops_nothing_is_drawn(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Path(shutil.copytree(EMBEDDED, tmp_path / "vla"))
    policy = load_policy(str(folder))
    assert policy._advisor.reranker is not None
    head: Any = policy._advisor.reranker.head
    head.config.candidates.crops = 0
    (statistics,) = policy._vla.statistics.values()
    save_head(plain, head, 1, statistics, {"rerank_margin": 0.0})
    policy = load_policy(str(plain))
    seen, monkey = _spied(policy, monkeypatch), "vla_energy.rollout.policy.crop_chunks"
    monkeypatch.setattr(monkey, lambda *_: pytest.fail("no crop was asked for"))
    policy.act(_requests(range(2)), "rerank")
    assert seen == [("rerank", {})]


def test_frames_have_crops_that_depend_on_their_place_in_the_order_alone() -> None:
    reader = FrameReader("embedded", "embedded", DATASET)
    assert next(reader.read("val", 5)).crops is None
    assert next(reader.read("val", 5, candidates=CandidatesConfig())).crops is None
    whole = list(reader.read("val", 20, batch_size=20, candidates=CONFIG))
    parts = list(reader.read("val", 20, batch_size=8, candidates=CONFIG))
    assert [len(batch.expert) for batch in parts] == [8, 8, 4]
    crops = [torch.cat([batch.crops for batch in batches if batch.crops is not None]) for batches in (whole, parts)]
    assert crops[0].shape == (20, CONFIG.crops, reader.vla.horizon, reader.vla.action_dim)
    torch.testing.assert_close(*crops, atol=1e-4, rtol=0)
    same = CandidatesConfig(crops=1, crop_scale=1.0)
    (full,) = reader.read("val", 20, batch_size=20, candidates=same)
    assert full.crops is not None
    torch.testing.assert_close(full.crops[:, 0], full.policy, atol=1e-4, rtol=0)
    other = next(FrameReader("embedded", "embedded", DATASET, seed=1).read("val", 20, candidates=CONFIG))
    assert other.crops is not None and not torch.equal(other.crops, crops[0])


def test_preflight_measures_the_source(folder: Path, tmp_path: Path) -> None:
    flags = ["--checkpoint", str(folder), "--data-root-dir", str(EMBEDDED_DATA), "--dataset-name", DATASET]
    assert main(["preflight", *flags, "--max-frames", "40", "--out", str(tmp_path), "--no-gates"]) == 0
    found = json.loads((tmp_path / "preflight.json").read_text())["modes"]["rerank"]["sources"]
    assert list(found) == ["policy", "noise", "crop"]
    assert found["crop"]["spread"] > 0.01
    assert found["crop"]["oracle_with_policy"] <= found["policy"]["oracle"]
    assert "crop" in (tmp_path / "preflight.html").read_text()
