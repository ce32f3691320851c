"""Several heads from one cache: which checkpoint they belong to is checked first, then they are trained in a row."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import draccus

from vla_energy.actions import load_statistics, select_statistics
from vla_energy.backbones.config import OpenVLAConfig
from vla_energy.cache import CacheError, FeatureCache, Manifest
from vla_energy.checkpoint import run_hint
from vla_energy.config import PRESETS, EnergyConfig, checks
from vla_energy.data import DatasetError
from vla_energy.finetune.cached import CachedTraining
from vla_energy.finetune.config import FinetuneConfig, FlagError
from vla_energy.finetune.features import dataset_fingerprint
from vla_energy.finetune.flags import keep_texts
from vla_energy.finetune.frames import policy_inputs
from vla_energy.finetune.setup import data_root, vla_folder
from vla_energy.fingerprint import fingerprint

_EPOCHS = 10


class HeadRuns:
    """The trainings that `vla-energy train-head` was asked for; iterating runs them.

    Args:
        args: the command's.
        energy: settings of the head by flag, as text: `energy.loss.margin` -> `1.0`. They win over a preset's.

    Raises:
        CacheError: the cache is unfinished, damaged, or of another checkpoint, dataset or normalisation.
        FlagError, ValueError: a flag has a value that cannot work; nothing is trained.
    """

    def __init__(self, args: argparse.Namespace, energy: Mapping[str, str | None]) -> None:
        if args.epochs is not None and args.max_steps is not None:
            raise FlagError("--epochs and --max-steps are both given: leave one out")
        checks.positive("--epochs", _EPOCHS if args.epochs is None else args.epochs)
        # Before what divides by them.
        for flag, value in (("--batch-size", args.batch_size), ("--max-steps", args.max_steps)):
            if value is not None and value < 1:
                raise FlagError(f"{flag} {value}: must be 1 or more")
        self.cache = FeatureCache(args.cache)
        self.held_out = None if args.val_cache is None else FeatureCache(args.val_cache)
        check_made_of(self.cache, args.checkpoint, args.data_root_dir, args.dataset_config)
        given = {name: value for name, value in energy.items() if value is not None}
        names = [] if args.presets is None else [name.strip() for name in args.presets.split(",")]
        for name in names:
            checks.one_of("--presets", name, PRESETS)
        if len(set(names)) < len(names):
            raise FlagError(f"--presets {args.presets}: a preset is named twice")
        self._copy = args.copy
        folders = {name: Path(args.out) / name for name in names} or {"head": Path(args.out)}
        self._configs = {
            name: self._config(args, folder, parse_energy(PRESETS[name] if names else {}, given))
            for name, folder in folders.items()
        }
        for folder in folders.values():
            if folder.exists() and any(folder.iterdir()):
                raise FlagError(f"--out: {folder} is not empty; name another, or delete it")

    def _config(self, args: argparse.Namespace, folder: Path, energy: EnergyConfig) -> FinetuneConfig:
        per_epoch = len(self.cache) / args.batch_size
        epochs = _EPOCHS if args.epochs is None else args.epochs
        made_of, data = self.cache.manifest.checkpoint, self.cache.manifest.dataset
        config = FinetuneConfig(
            vla_path=args.checkpoint or made_of["folder"],
            data_root_dir=args.data_root_dir or data["root"], dataset_name=data["name"],
            dataset_config=args.dataset_config or data.get("config"),
            run_root_dir=folder.parent, run_id_override=folder.name,
            batch_size=args.batch_size, max_steps=args.max_steps or max(1, math.ceil(epochs * per_epoch)),
            energy_learning_rate=args.learning_rate, energy_warm_steps=args.warm_steps, val_freq=args.val_freq,
            wandb_log_freq=args.log_freq, seed=args.seed, device=args.device, energy=energy,
            image_aug=False, use_lora=False, precision=self.cache.manifest.options.get("precision", "fp32"),
            use_diffusion=made_of["kind"] == "diffusion", use_l1_regression=made_of["kind"] == "l1",
        )  # fmt: skip
        # Nothing is read through these: settings.json and the report tell of them.
        policy = vla_folder(config)
        for flag, value in policy_inputs(policy, OpenVLAConfig.from_folder(policy)).items():
            setattr(config, flag, value)
        config.check()
        return config

    def __iter__(self) -> Iterator[tuple[str, Path, dict[str, Any], dict[str, int]]]:
        """Name, folder, last validation and the guard's counters (see `GuardedOptimizer`) of each, as it is done."""
        # All are made before the first is trained: a setting that cannot work is told at once.
        runs = {name: CachedTraining(config, self.cache, self.held_out) for name, config in self._configs.items()}
        for name, training in runs.items():
            training.copy_policy = self._copy
            results = training.run()
            yield name, training.config.run_dir, results, dict(training.training.guard.counters)


def parse_energy(preset: Mapping[str, Any], given: Mapping[str, str]) -> EnergyConfig:
    """A preset's settings with those of the flags in their place, for a frozen policy.

    Raises:
        FlagError: a value is of another type, or not allowed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "preset.yaml"  # JSON is YAML; draccus reads files
        path.write_text(json.dumps({"energy": {**preset, "freeze_backbone": True}}))
        flags = [text for name, value in given.items() for text in (f"--{name}", value)]
        try:
            return draccus.parse(FinetuneConfig, path, keep_texts(flags)).energy
        except (draccus.ParsingError, ValueError) as error:
            raise FlagError(f"{error}" + (f" ({error.__cause__})" if error.__cause__ else "")) from error


def check_made_of(
    cache: FeatureCache, checkpoint: str | None = None, root: str | None = None, config: str | None = None
) -> None:
    """Refuses a cache that was made of other files than those it will be used with.

    Args:
        cache: to check.
        checkpoint: folder; by default where the cache's was when it was built.
        root: of the data, likewise; without it, data that are gone are no error, as nothing is read from them.
        config: file that names the fields of the data, likewise.

    Raises:
        CacheError: the checkpoint, its statistics or the dataset differ.
    """
    manifest, made_here = cache.manifest, cache.folder
    given = FinetuneConfig(
        vla_path=checkpoint or manifest.checkpoint["folder"], data_root_dir=root or manifest.dataset["root"]
    )
    folder, name = vla_folder(given), manifest.dataset["name"]
    if not folder.is_dir():
        raise CacheError(f"{made_here}: its checkpoint {folder} is not there; say with --checkpoint where it is")
    if hint := run_hint(folder):
        raise CacheError(f"{made_here}: {folder} is no checkpoint{hint}")
    build = f"build a cache of these: {_again(manifest, checkpoint, root, config)}"
    _check_statistics(manifest, folder, made_here, build)
    if fingerprint(folder, policy_only=True) != manifest.checkpoint["fingerprint"]:
        raise CacheError(f"{made_here} was made of another checkpoint than {folder} is now; {build}")
    try:
        found = dataset_fingerprint(data_root(given), name, config or manifest.dataset.get("config"))
    except (DatasetError, OSError) as error:
        if config is not None:
            raise CacheError(f"--dataset-config {config}: {error}") from error
        if root is not None:
            raise CacheError(f"--data-root-dir {root}: {error}") from error
        return
    if found != manifest.dataset["fingerprint"]:
        raise CacheError(f"{made_here} was made of another dataset than {name} in {data_root(given)} is now; {build}")


def _check_statistics(manifest: Manifest, folder: Path, made_here: Path, build: str) -> None:
    path = folder / "dataset_statistics.json"
    if not path.is_file():
        return  # of a base model: the fingerprint tells
    there, asked = load_statistics(path), manifest.dataset["statistics_of"]
    name = asked or (None if len(there) == 1 else manifest.dataset["name"])
    if select_statistics(there, name).to_dict() != manifest.statistics:
        raise CacheError(f"{made_here} was made with other normalisation statistics than {folder} has; {build}")


def _again(manifest: Manifest, checkpoint: str | None, root: str | None, config: str | None) -> str:
    here = Manifest(**vars(manifest))
    here.checkpoint = {**manifest.checkpoint, "folder": checkpoint or manifest.checkpoint["folder"]}
    here.dataset = {**manifest.dataset, "root": root or manifest.dataset["root"]}
    if config is not None:
        here.dataset["config"] = config
    return here.command("ANOTHER_FOLDER")
