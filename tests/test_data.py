"""RLDS reading against episodes written here with tensorflow-datasets, compared with what numpy says they hold."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rlds_fixture import IMAGE_SIZE, LENGTHS, WRIST_OFFSET, make_episode, make_image, write_rlds

from vla_energy.actions import DatasetStatistics, FieldStatistics
from vla_energy.data import DatasetConfig, DatasetError, RldsDataset, dataset_config
from vla_energy.data.augment import CROP_AREA, center_crop, crop
from vla_energy.data.datasets import convert_gripper, standardize

LIBERO = dataset_config("libero_goal_no_noops")
HORIZON = 4
NAME = "libero_fixture"


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with `libero_fixture`: six labelled episodes and an unlabelled one in three shards, no `val`."""
    root = tmp_path_factory.mktemp("rlds")
    episodes = [make_episode(index, length) for index, length in enumerate(LENGTHS)]
    write_rlds(root, NAME, {"train": [*episodes[:2], make_episode(9, 5, ""), *episodes[2:]]}, num_shards=3)
    return root


@pytest.fixture
def root(stored: Path, tmp_path: Path) -> Path:
    """A copy of `stored`, without its statistics, that a test may break."""
    shutil.copytree(stored, tmp_path / "data", ignore=shutil.ignore_patterns("dataset_statistics_*"))
    return tmp_path / "data"


def open_dataset(root: Path, split: str = "train", **options: Any) -> RldsDataset:
    options = {"horizon": HORIZON, "config": LIBERO, "val_fraction": 0.3, **options}
    return RldsDataset(root, NAME, split, **options)


def frames(dataset: RldsDataset, **options: Any) -> list[dict[str, Any]]:
    """All frames of one epoch."""
    batches = dataset.batches(3, repeat=False, drop_last=False, **options)
    return [{key: values[i] for key, values in b.items()} for b in batches for i in range(len(b["step"]))]


def identities(batches: Any) -> list[tuple[int, int]]:
    return [pair for b in batches for pair in zip(b["episode"].tolist(), b["step"].tolist(), strict=True)]


def made(position: int) -> list[dict[str, Any]]:
    """The labelled episode at a stored position; position 2 is the unlabelled one."""
    index = position if position < 2 else position - 1
    return make_episode(index, LENGTHS[index])


def test_every_frame_is_a_sample_with_its_normalised_chunk(stored: Path) -> None:
    dataset = open_dataset(stored, num_images=2, use_proprio=True, shuffle_buffer_size=0)
    raw = {p: np.stack([step["action"] for step in made(p)]).astype(np.float64) for p in (0, 1, 3, 4)}
    state = {p: np.stack([step["observation"]["state"] for step in made(p)]) for p in raw}
    for actions in raw.values():
        actions[:, 6] = 1 - np.clip(actions[:, 6], 0, 1)
    low, high = np.quantile(np.concatenate(list(raw.values())), (0.01, 0.99), axis=0)
    low_p, high_p = np.quantile(np.concatenate(list(state.values())), (0.01, 0.99), axis=0)

    seen = frames(dataset)

    assert [(f["episode"], f["step"]) for f in seen] == [(p, t) for p in raw for t in range(len(raw[p]))]
    assert (dataset.num_frames, dataset.num_episodes) == (len(seen), 4)
    assert (dataset.action_dim, dataset.proprio_dim) == (7, 8)
    for f in seen:
        actions = raw[f["episode"]]
        chunk = np.stack([actions[min(f["step"] + i, len(actions) - 1)] for i in range(HORIZON)])
        expected = np.clip(2 * (chunk - low) / (high - low + 1e-8) - 1, -1, 1)
        expected[:, 6] = chunk[:, 6]
        np.testing.assert_allclose(f["actions"], expected, atol=1e-6)
        proprio = np.clip(2 * (state[f["episode"]][f["step"]] - low_p) / (high_p - low_p + 1e-8) - 1, -1, 1)
        np.testing.assert_allclose(f["proprio"], proprio, atol=1e-6)
        assert f["actions"].dtype == f["proprio"].dtype == np.float32
        step = made(f["episode"])[f["step"]]
        np.testing.assert_array_equal(f["images"][0], step["observation"]["image"])
        np.testing.assert_array_equal(f["images"][1], step["observation"]["image"] + WRIST_OFFSET)
        assert f["instructions"] == step["language_instruction"]


def test_without_proprio_the_key_is_absent_and_given_statistics_are_used(stored: Path) -> None:
    own = open_dataset(stored).statistics
    wide = replace(own.action, q01=np.full(7, -10.0), q99=np.full(7, 10.0))
    batch = next(open_dataset(stored, statistics=replace(own, action=wide)).batches(8))
    assert "proprio" not in batch
    assert np.abs(batch["actions"][..., :6]).max() < 0.5


def test_outcomes_are_absent_where_the_dataset_does_not_have_them(stored: Path) -> None:
    assert not {"success", "remaining"} & set(next(open_dataset(stored, outcomes=True).batches(2)))


def test_order_depends_on_the_seed_alone_and_epochs_differ(stored: Path) -> None:
    dataset = open_dataset(stored, seed=5)
    count = dataset.num_frames
    first, again = (identities(itertools.islice(dataset.batches(1), 2 * count)) for _ in range(2))
    assert first == again
    assert sorted(first[:count]) == sorted(first[count:]) == sorted(set(first))
    assert first[:count] != first[count:]
    assert identities(itertools.islice(open_dataset(stored, seed=6).batches(1), count)) != first[:count]


@pytest.mark.parametrize("buffer", [0, 7, 1000])
@pytest.mark.parametrize("skip", [1, 5, 19])
def test_skipping_gives_the_same_tail_across_epochs(stored: Path, buffer: int, skip: int) -> None:
    dataset = open_dataset(stored, image_aug=True, shuffle_buffer_size=buffer)
    whole = list(itertools.islice(dataset.batches(4), skip + 3))[skip:]
    tail = list(itertools.islice(dataset.batches(4, skip=skip), 3))
    for expected, got in zip(whole, tail, strict=True):
        for key in expected:
            np.testing.assert_array_equal(expected[key], got[key])


@pytest.mark.parametrize("buffer", [0, 7])
def test_threads_change_no_bit_and_no_position(stored: Path, buffer: int) -> None:
    options: dict[str, Any] = {"num_images": 2, "use_proprio": True, "image_aug": True, "shuffle_buffer_size": buffer}
    alone, many = (open_dataset(stored, num_threads=threads, **options) for threads in (1, 4))
    count = 3 * alone.num_frames // 4  # batches of 4: three epochs
    expected = list(itertools.islice(alone.batches(4), count))
    for skip in (0, 7):
        found = list(itertools.islice(many.batches(4, skip=skip), count - skip))
        for one, other in zip(expected[skip:], found, strict=True):
            assert one.keys() == other.keys()
            for key in one:
                np.testing.assert_array_equal(one[key], other[key])


def test_one_epoch_ends_and_may_drop_its_last_batch(stored: Path) -> None:
    dataset = open_dataset(stored)
    sizes = [len(batch["step"]) for batch in dataset.batches(4, repeat=False, drop_last=False)]
    assert sum(sizes) == dataset.num_frames and sizes[-1] == dataset.num_frames % 4
    assert len(list(dataset.batches(4, repeat=False))) == len(sizes) - 1
    assert len(list(dataset.batches(4, repeat=False, drop_last=False, skip=2))) == len(sizes) - 2


def test_held_out_episodes_are_the_last_and_use_the_training_statistics(stored: Path) -> None:
    train, val = open_dataset(stored), open_dataset(stored, "val")
    assert {f["episode"] for f in frames(train)} == {0, 1, 3, 4}
    assert {f["episode"] for f in frames(val)} == {5, 6}
    assert val.num_frames == LENGTHS[4] + LENGTHS[5]
    assert val.statistics.to_dict() == train.statistics.to_dict()


def test_a_stored_val_split_is_used(tmp_path: Path) -> None:
    write_rlds(tmp_path, NAME, {"train": [make_episode(0, 5)], "val": [make_episode(1, 6)]})
    assert open_dataset(tmp_path).num_frames == 5
    assert {f["instructions"] for f in frames(open_dataset(tmp_path, "val"))} == {"Put 1 on the plate"}


def test_statistics_are_cached_beside_the_data_and_a_broken_cache_is_rebuilt_loudly(root: Path) -> None:
    statistics = open_dataset(root).statistics
    (cache,) = (root / NAME / "1.0.0").glob("dataset_statistics_*.json")
    data = json.loads(cache.read_text())
    assert DatasetStatistics.from_dict(data).to_dict() == statistics.to_dict()
    assert data["num_trajectories"] == 4 and data["action"]["mask"] == [True] * 6 + [False]
    assert open_dataset(root).statistics.to_dict() == statistics.to_dict()
    cache.write_text("[" * 100_000)  # deeper than json goes
    with pytest.warns(UserWarning, match=cache.name):
        assert open_dataset(root).statistics.to_dict() == statistics.to_dict()
    cache.write_text(cache.read_text()[:50])
    with pytest.warns(UserWarning, match=cache.name):
        assert open_dataset(root).statistics.to_dict() == statistics.to_dict()
    assert json.loads(cache.read_text()) == data
    open_dataset(root, config=replace(LIBERO, gripper="none"))
    assert len(list(cache.parent.glob("dataset_statistics_*.json"))) == 2


def test_statistics_of_a_read_only_dataset_are_kept_in_the_home_cache(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_temporary = tempfile.mkstemp

    def refuse_dataset(dir: Path, **options: Any) -> tuple[int, str]:
        if root in dir.parents:
            raise PermissionError("read-only")
        return make_temporary(dir=dir, **options)

    monkeypatch.setattr(tempfile, "mkstemp", refuse_dataset)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    statistics = open_dataset(root).statistics
    (cache,) = (tmp_path / "home" / ".cache" / "vla_energy").iterdir()
    assert json.loads(cache.read_text()) == statistics.to_dict()
    assert open_dataset(root).statistics.to_dict() == statistics.to_dict()


def test_gripper_conventions() -> None:
    np.testing.assert_array_equal(convert_gripper("libero", np.array([-1.0, 0.0, 0.25, 1.0])), [1, 1, 0.75, 0])
    bridge = np.array([0.0, 0.4, 1.0, 0.5, 0.01, 0.97, 0.6])
    np.testing.assert_array_equal(convert_gripper("bridge", bridge), [0, 1, 1, 0, 0, 1, 0.6])
    np.testing.assert_array_equal(convert_gripper("none", bridge), bridge)


def test_bridge_drops_the_ends_and_moves_by_the_reached_state() -> None:
    config = dataset_config("bridge_orig")
    states = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    stored_actions = np.ones((5, 7), np.float32)
    actions, kept = standardize(config, stored_actions, states)
    assert kept == slice(1, 4)
    np.testing.assert_array_equal(actions[:, :6], states[2:] - states[1:-1])
    np.testing.assert_array_equal(actions[:, 6], 1)
    for length in (0, 1, 2):
        actions, kept = standardize(config, stored_actions[:length], states[:length])
        assert len(actions) == len(range(5)[kept]) == 0


def test_dropped_and_relabelled_steps_line_up_with_their_images(stored: Path) -> None:
    config = replace(LIBERO, drop_first_step=True, motion_key="state[:6]")
    dataset = open_dataset(stored, config=config, shuffle_buffer_size=0)
    seen = frames(dataset)
    assert [f["step"] for f in seen if f["episode"] == 0] == [1, 2, 3]
    for f in seen:
        position, step = int(f["episode"]), int(f["step"])
        state = [made(position)[t]["observation"]["state"][:6] for t in (step, step + 1)]
        raw = torch.from_numpy(np.concatenate([state[1] - state[0], f["actions"][0, 6:]]).astype(np.float64))
        np.testing.assert_allclose(f["actions"][0], dataset.statistics.action.normalize(raw), atol=1e-5)
        np.testing.assert_array_equal(f["images"][0], make_image(position - (position > 2), step))


def test_resized_and_augmented_images(stored: Path) -> None:
    resized = frames(open_dataset(stored, image_size=(24, 8)))[0]["images"]
    assert resized.shape == (1, 24, 8, 3) and resized.dtype == np.uint8
    plain = next(open_dataset(stored, num_images=2).batches(6))
    augmented, again = (next(open_dataset(stored, num_images=2, image_aug=True).batches(6)) for _ in range(2))
    assert augmented["images"].shape == plain["images"].shape == (6, 2, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert (augmented["images"] != plain["images"]).any(axis=(2, 3, 4)).all()
    np.testing.assert_array_equal(augmented["images"], again["images"])
    np.testing.assert_array_equal(augmented["actions"], plain["actions"])


def test_center_crop_equals_tensorflows_crop_and_resize() -> None:
    from vla_energy.data import tensorflow_quiet

    tf = tensorflow_quiet.tf()
    images = np.random.default_rng(0).integers(0, 256, (2, 20, 31, 3), np.uint8)
    margin = (1 - CROP_AREA**0.5) / 2
    box = [[margin, margin, 1 - margin, 1 - margin]] * 2
    expected = tf.image.crop_and_resize(images.astype(np.float32), box, [0, 1], images.shape[1:3]).numpy()
    got = center_crop(images)
    assert got.dtype == np.uint8 and np.abs(got - expected).max() <= 0.51
    np.testing.assert_array_equal(center_crop(images[0]), got[0])
    with pytest.raises(ValueError, match="uint8"):
        center_crop(images.astype(np.float32))


@pytest.mark.parametrize(("corner", "side"), [((0.0, 0.25), 0.75), ((0.13, 0.02), 0.8), ((0.0, 0.0), 1.0)])
def test_a_crop_equals_tensorflows(corner: tuple[float, float], side: float) -> None:
    from vla_energy.data import tensorflow_quiet

    tf = tensorflow_quiet.tf()
    images = np.random.default_rng(0).integers(0, 256, (1, 20, 31, 3), np.uint8)
    box = [[corner[0], corner[1], corner[0] + side, corner[1] + side]]
    expected = tf.image.crop_and_resize(images.astype(np.float32), box, [0], images.shape[1:3]).numpy()
    assert np.abs(crop(images, corner, side) - expected).max() <= 0.51


@pytest.mark.parametrize(("corner", "side"), [((0.0, 0.3), 0.75), ((-0.1, 0.0), 0.5), ((0.0, 0.0), 0.0)])
def test_a_crop_that_leaves_the_image_is_refused(corner: tuple[float, float], side: float) -> None:
    with pytest.raises(ValueError, match=f"side {side} .*not within the image"):
        crop(np.zeros((4, 4, 3), np.uint8), corner, side)


def test_configs_of_datasets_and_of_files(tmp_path: Path) -> None:
    assert LIBERO.wrist_image_key == "wrist_image" and LIBERO.action_mask == (True,) * 6 + (False,)
    assert dataset_config("metaworld_any").action_mask == (True, True, True, False)
    with pytest.raises(
        DatasetError, match=r"libero_10_no_noops.*JSON or YAML.*--dataset-config FILE.*--dataset_config FILE.*image_key"
    ):
        dataset_config("mine")
    yaml, broken = tmp_path / "mine.yaml", tmp_path / "broken.json"
    yaml.write_text("mine: {image_key: front, proprio_keys: [joints]}\nbridge_orig: {image_key: image_1}\n")
    assert dataset_config("mine", yaml) == DatasetConfig(image_key="front", proprio_keys=("joints",))
    assert dataset_config("bridge_orig", yaml).gripper == "bridge"
    yaml.write_text("mine: {imgae_key: front}\n")
    with pytest.raises(DatasetError, match="imgae_key.*wrist_image_key"):
        dataset_config("mine", yaml)
    broken.write_text("{")
    with pytest.raises(DatasetError, match=r"broken\.json"):
        dataset_config("mine", broken)
    with pytest.raises(DatasetError, match="gripper"):
        DatasetConfig(gripper="open")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": replace(LIBERO, image_key="front")}, "observation/front.*observation/wrist_image"),
        ({"config": replace(LIBERO, wrist_image_key="hand"), "num_images": 2}, "observation/hand"),
        ({"config": replace(LIBERO, wrist_image_key=None), "num_images": 2}, "wrist_image_key"),
        ({"num_images": 3}, "num_images=3"),
        ({"config": replace(LIBERO, proprio_keys=("joints",)), "use_proprio": True}, "joints.*observation/state"),
        ({"config": replace(LIBERO, proprio_keys=()), "use_proprio": True}, "proprio_keys"),
        ({"config": replace(LIBERO, action_key="actions")}, "actions.*action"),
        ({"config": replace(LIBERO, language_key="task")}, "task.*language_instruction"),
        ({"config": replace(LIBERO, action_mask=(True,) * 4)}, "action_mask has 4"),
        ({"horizon": 0}, "horizon=0"),
        ({"split": "test"}, "split='test'"),
        ({"split": "val", "val_fraction": 0.0}, "empty"),
        ({"val_fraction": 1.0}, "val_fraction"),
        ({"image_size": (0, 5)}, "image_size"),
    ],
)
def test_what_is_missing_or_wrong_is_named(stored: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        open_dataset(stored, **options)


def test_missing_folders_are_named(stored: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=f"no dataset 'libero_typo'.*{NAME}"):
        RldsDataset(stored, "libero_typo", config=LIBERO)
    with pytest.raises(DatasetError, match="nowhere"):
        RldsDataset(tmp_path / "nowhere", NAME, config=LIBERO)
    (tmp_path / NAME / "incomplete.X_1.0.0").mkdir(parents=True)
    with pytest.raises(DatasetError, match="incomplete"):
        RldsDataset(tmp_path, NAME, config=LIBERO)


def _strangers(name: str) -> list[dict[str, Any]]:
    """What features.json may hold to have the class `name` imported: today's forms and the older one, deep ones too."""
    legacy, own = {"type": name, "content": {}}, "tensorflow_datasets.core.features.features_dict.FeaturesDict"
    hidden = {"pythonClassName": own, "jsonFeature": {"json": json.dumps({"steps": legacy})}}
    content = json.dumps({"features": {"steps": {"python_class_name": name, "text": {}}}})
    return [
        {"pythonClassName": own, "featuresDict": {"features": {"steps": {"pythonClassName": name, "text": {}}}}},
        {"pythonClassName": own, "featuresDict": {"features": {"steps": {"python_class_name": name, "text": {}}}}},
        legacy,
        hidden,
        {"pythonClassName": own, "featuresDict": {"features": {"steps": hidden}}},
        {"type": own, "content": content, "proto_cls": "tensorflow_datasets.FeaturesDict"},
    ]


@pytest.mark.parametrize("form", range(6))
def test_a_dataset_imports_no_code(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: int
) -> None:
    package = tmp_path / "strangers_code"
    package.mkdir()
    (package / "__init__.py").write_text("print('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = root / NAME / "1.0.0" / "features.json"
    path.write_text(json.dumps(_strangers("strangers_code.Feature")[form]))
    with pytest.raises(DatasetError, match=r"features\.json names the class 'strangers_code\.Feature'"):
        open_dataset(root)
    path.write_text(json.dumps(_strangers("tensorflow_datasets.core.features.../x.Feature")[form]))
    with pytest.raises(DatasetError, match="names the class"):
        open_dataset(root)
    assert "strangers_code" not in sys.modules and "imported" not in capsys.readouterr().out


def test_the_module_that_dataset_info_names_is_not_imported(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "strangers_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = root / NAME / "1.0.0" / "dataset_info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "moduleName": "strangers_module"}))
    assert len(frames(open_dataset(root))) and "strangers_module" not in sys.modules


@pytest.mark.parametrize(
    "content", ["{", '{"jsonFeature": {"json": "{"}}', '{"a": ' * 100_000 + "1" + "}" * 100_000, "[" * 100_000]
)
def test_features_that_are_damaged_are_told(root: Path, content: str) -> None:
    (root / NAME / "1.0.0" / "features.json").write_text(content)
    with pytest.raises(DatasetError, match=r"features\.json is damaged: "):
        open_dataset(root)


def test_other_statistics_are_refused(stored: Path) -> None:
    own = open_dataset(stored).statistics
    narrow = FieldStatistics.of(np.zeros((2, 4)))
    with pytest.raises(DatasetError, match="7 dimensions, the statistics 4"):
        open_dataset(stored, statistics=replace(own, action=narrow))
    with pytest.raises(DatasetError, match="8 dimensions, the statistics none"):
        open_dataset(stored, statistics=replace(own, proprio=None), use_proprio=True)


@pytest.mark.parametrize("cut", ["torn record", "whole record", "missing"])
def test_an_incomplete_shard_is_named_at_once(root: Path, cut: str) -> None:
    open_dataset(root)  # the statistics are cached: the check must not depend on reading
    shard = sorted((root / NAME / "1.0.0").glob("*tfrecord*"))[1]
    data = shard.read_bytes()
    if cut == "missing":
        shard.unlink()
    else:
        end = 16 + int.from_bytes(data[:8], "little")
        shard.write_bytes(data[:-9] if cut == "torn record" else data[:end])
    with pytest.raises(DatasetError, match=shard.name):
        open_dataset(root)


def test_a_flipped_byte_is_traced_to_its_shard(root: Path) -> None:
    dataset = open_dataset(root)
    shard = sorted((root / NAME / "1.0.0").glob("*tfrecord*"))[1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0xFF
    shard.write_bytes(data)
    with pytest.raises(DatasetError, match=f"{shard.name}.*record"):
        frames(dataset)


def test_a_template_of_file_names_that_tfds_cannot_fill_is_told(root: Path) -> None:
    info = root / NAME / "1.0.0" / "dataset_info.json"
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    text = info.read_text()
    assert template in text
    info.write_text(text.replace(template, template.replace("Y}", "}Y")))
    with pytest.raises(DatasetError, match=r"dataset_info\.json: the file names of split 'train': .*template"):
        open_dataset(root)


@pytest.mark.parametrize("elsewhere", ["/etc/passwd", "../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"])
def test_file_names_that_lead_out_of_the_folder_are_refused(root: Path, elsewhere: str) -> None:
    info = root / NAME / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}", elsewhere))
    with pytest.raises(DatasetError, match=r"dataset_info\.json: the file names of split 'train' lead out"):
        open_dataset(root)


def test_actions_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    episode = make_episode(0, 5)
    episode[2]["action"] = np.full(7, np.nan, np.float32)
    write_rlds(tmp_path, NAME, {"train": [episode, make_episode(1, 5)]})
    with pytest.raises(DatasetError, match="episode 0.*finite"):
        open_dataset(tmp_path)


def rewrite(folder: Path, split: str, key: str, change: Callable[[Any], None]) -> None:
    """Changes `key` of the first stored episode of `split` by `change`; the description stays."""
    from vla_energy.data import tensorflow_quiet

    tf = tensorflow_quiet.tf()
    path = str(next(folder.glob(f"*-{split}.tfrecord-00000-of-*")))
    examples = [tf.train.Example.FromString(record.numpy()) for record in tf.data.TFRecordDataset(path)]
    feature = examples[0].features.feature[key]
    change(getattr(feature, feature.WhichOneof("kind")).value)
    with tf.io.TFRecordWriter(path) as writer:
        for example in examples:
            writer.write(example.SerializeToString())


def test_files_changed_under_the_same_description_are_computed_and_checked_anew(root: Path) -> None:
    first, folder = open_dataset(root), root / NAME / "1.0.0"
    size = next(folder.glob("*.tfrecord-00000-of-*")).stat().st_size

    rewrite(folder, "train", "steps/action", lambda values: values.__setitem__(0, 5.0))
    second = open_dataset(root)
    assert second.statistics.action.max[0] == 5.0 and first.statistics.action.max[0] != 5.0
    assert second.digest == first.digest  # by which a resumed run knows its dataset, copied or not

    rewrite(folder, "train", "steps/action", lambda values: values.__setitem__(0, np.nan))
    assert next(folder.glob("*.tfrecord-00000-of-*")).stat().st_size == size
    with pytest.raises(DatasetError, match=r"episode 0 of 'train' has actions that are not finite"):
        open_dataset(root)
    with pytest.raises(DatasetError, match=r"episode 0 of 'train' has actions that are not finite"):
        open_dataset(root, statistics=first.statistics)


def test_held_out_actions_are_checked_whatever_statistics_are_given(root: Path) -> None:
    statistics = open_dataset(root).statistics
    write_rlds(root / "own", NAME, {"train": [make_episode(0, 5)], "val": [make_episode(1, 5)]})
    open_dataset(root / "own", "val", statistics=statistics)
    folder = root / "own" / NAME / "1.0.0"
    rewrite(folder, "val", "steps/action", lambda values: values.__setitem__(3, np.nan))
    open_dataset(root / "own", statistics=statistics)
    with pytest.raises(DatasetError, match=r"1\.0\.0: episode 0 of 'val' has actions that are not finite"):
        open_dataset(root / "own", "val", statistics=statistics)


@pytest.mark.parametrize("key", ["steps/action", "steps/observation/state"])
def test_values_whose_square_is_no_fp32_number_are_refused(root: Path, key: str) -> None:
    rewrite(root / NAME / "1.0.0", "train", key, lambda values: values.__setitem__(0, -3e38))
    with pytest.raises(DatasetError, match=r"1\.0\.0: episode 0 of 'train' has \w+ that are above 1e\+15"):
        open_dataset(root)


def test_instructions_that_are_not_utf8_are_told_with_dataset_and_episode(
    root: Path,
) -> None:
    def change(texts: Any) -> None:
        texts[0] = b"\xff\xfe\x00 reach"

    data, folder = open_dataset(root), root / NAME / "1.0.0"
    rewrite(folder, "train", "steps/language_instruction", change)
    told = r"1\.0\.0: episode 0 of 'train' has an instruction that is not UTF-8 \(b'\\xff"
    with pytest.raises(DatasetError, match=told):  # before anything is trained
        open_dataset(root)
    with pytest.raises(DatasetError, match=told):  # changed after the dataset was opened
        frames(data)


def test_importing_the_package_loads_no_tensorflow() -> None:
    code = "import sys, vla_energy.data.rlds, vla_energy.data; assert 'tensorflow' not in sys.modules"
    light = "import sys, vla_energy.data; assert 'torch' not in sys.modules"
    for line in (code, light):
        subprocess.run([sys.executable, "-c", line], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_single_passes_share_one_pipeline(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorFlow never frees the functions of one: a run that validates often would grow by a megabyte each time."""
    data, built = open_dataset(root), []
    make = data._pipeline
    monkeypatch.setattr(data, "_pipeline", lambda *args: built.append(args) or make(*args))
    passes = [list(data.batches(4, repeat=False, drop_last=False)) for _ in range(3)]
    assert len(built) == 1 and identities(passes[0]) == identities(passes[2])
    assert all((a["images"] == b["images"]).all() for a, b in zip(passes[0], passes[1], strict=True))
    list(data.batches(3, repeat=False))
    assert len(built) == 2
