"""What a dataset calls its fields, and how its actions become the library's: one `DatasetConfig` a dataset.

A dataset of your own needs no code: put its fields in a JSON or YAML file and pass that as `overrides_path`,

    my_robot:
      image_key: front
      wrist_image_key: wrist
      proprio_keys: [joints, "gripper[:1]"]
      gripper: none
      action_mask: [true, true, true, true, true, true, false]

A key is a path within a step (`a/b`); image and proprio keys are looked up in its `observation`. A
proprio key may end in a slice of its last axis. The conventions below are those of openvla-oft
(`oxe/configs.py`, `oxe/transforms.py`), verified there.
"""

from __future__ import annotations

import json
import re
import reprlib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

GRIPPERS = ("none", "libero", "bridge")
_DEEPEST = 100  # levels of a YAML file
_OPEN, _CLOSED = 0.95, 0.05  # Bridge: beyond these the gripper command is unambiguous
_SLICED_KEY = re.compile(r"(?P<path>[^\[\]]+)(\[(?P<start>-?\d{1,9})?:(?P<stop>-?\d{1,9})?\])?")


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxstring, _REPR.maxlong = 2, 8, 60, 60


class DatasetError(ValueError):
    """A dataset is missing, broken, or not what the configuration says; the message names the fix."""


def _shown(value: Any) -> str:
    """A value from a file as an error shows it: its beginning, where it is long."""
    try:
        text = _REPR.repr(value)
    except ValueError:  # an integer with more digits than Python writes
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def parse_key(key: str) -> tuple[str, slice]:
    """Splits `state[:6]` into the path `state` and the slice of its last axis.

    Raises:
        DatasetError: not a path with an optional slice.
    """
    match = _SLICED_KEY.fullmatch(key) if isinstance(key, str) else None
    if match is None:
        raise DatasetError(f"bad key {_shown(key)}: expected a path such as 'state', or with a slice, 'state[:6]'")
    start, stop = (None if match[name] is None else int(match[name]) for name in ("start", "stop"))
    return match["path"], slice(start, stop)


@dataclass(frozen=True)
class DatasetConfig:
    """Names of a dataset's fields, and its conventions.

    Attributes:
        image_key: main camera, in `observation`.
        wrist_image_key: wrist camera, in `observation`; None if there is none.
        proprio_keys: proprioception, in `observation`, concatenated in this order; each may be sliced.
        action_key: the action `(A,)`, in the step.
        language_key: the instruction, in the step; with the prefix `episode_metadata/`, in the episode.
        gripper: what the action's last dimension means. `none`: as stored; `libero`: -1 open .. 1 closed,
            made 1 open .. 0 closed; `bridge`: 0 closed .. 1 open, in-between values take the value reached after them.
        action_mask: per dimension, True if it is normalised; None normalises all.
        drop_first_step: leave out each episode's first step (Bridge: its action is all zero).
        motion_key: replace the first action dimensions by this observation's change to the next step, and leave
            out the last step (Bridge: the reached state); may be sliced. None keeps the stored actions.
    """

    image_key: str = "image"
    wrist_image_key: str | None = None
    proprio_keys: tuple[str, ...] = ("state",)
    action_key: str = "action"
    language_key: str = "language_instruction"
    gripper: str = "none"
    action_mask: tuple[bool, ...] | None = None
    drop_first_step: bool = False
    motion_key: str | None = None

    def __post_init__(self) -> None:
        if self.gripper not in GRIPPERS:
            raise DatasetError(f"gripper={_shown(self.gripper)}: expected one of {', '.join(GRIPPERS)}")
        if not isinstance(self.proprio_keys, (list, tuple)):
            raise DatasetError(f"proprio_keys={_shown(self.proprio_keys)}: expected a list of keys")
        object.__setattr__(self, "proprio_keys", tuple(self.proprio_keys))
        if self.action_mask is not None:
            if not isinstance(self.action_mask, (list, tuple)) or not all(
                isinstance(entry, bool) for entry in self.action_mask
            ):
                raise DatasetError(f"action_mask={_shown(self.action_mask)}: expected a list of true and false")
            object.__setattr__(self, "action_mask", tuple(self.action_mask))
        if not isinstance(self.drop_first_step, bool):
            raise DatasetError(f"drop_first_step={_shown(self.drop_first_step)}: expected true or false")
        for name in ("image_key", "action_key", "language_key", "wrist_image_key"):
            value = getattr(self, name)
            if not (isinstance(value, str) and value) and (name, value) != ("wrist_image_key", None):
                raise DatasetError(f"{name}={_shown(value)}: expected a key")
        for key in (*self.proprio_keys, *([] if self.motion_key is None else [self.motion_key])):
            parse_key(key)

    def mask(self, action_dim: int) -> np.ndarray:
        """The action mask `(action_dim,)` bool.

        Raises:
            DatasetError: the configured mask has another length.
        """
        mask = np.ones(action_dim, bool) if self.action_mask is None else np.asarray(self.action_mask, bool)
        if len(mask) != action_dim:
            raise DatasetError(f"action_mask has {len(mask)} entries, the dataset's actions have {action_dim}")
        return mask


_MASK_EEF = (True,) * 6 + (False,)
_LIBERO = DatasetConfig(
    wrist_image_key="wrist_image",
    proprio_keys=("state[:6]", "state[-2:]"),
    gripper="libero",
    action_mask=_MASK_EEF,
)
_BRIDGE = DatasetConfig(
    image_key="image_0",
    proprio_keys=("state[:6]", "state[-1:]"),
    gripper="bridge",
    action_mask=_MASK_EEF,
    drop_first_step=True,
    motion_key="state[:6]",
)
_METAWORLD = DatasetConfig(action_mask=(True, True, True, False))
DATASETS: dict[str, DatasetConfig] = {
    "libero_spatial_no_noops": _LIBERO,
    "libero_object_no_noops": _LIBERO,
    "libero_goal_no_noops": _LIBERO,
    "libero_10_no_noops": _LIBERO,
    "libero_4_task_suites_no_noops": _LIBERO,
    "bridge_orig": _BRIDGE,
    "bridge_dataset": _BRIDGE,
}
_PREFIXES = {"metaworld": _METAWORLD, "libero_rollouts": _LIBERO}
"""Datasets written here, by what their names start with."""


def dataset_config(name: str, overrides_path: str | Path | None = None) -> DatasetConfig:
    """The configuration of dataset `name`.

    Args:
        name: a known dataset, any name starting with `metaworld` or `libero_rollouts`, or an entry of the file.
        overrides_path: JSON or YAML file `{dataset name: {field: value}}`; fields given there replace those of
            the known dataset, or the defaults of `DatasetConfig`.

    Raises:
        DatasetError: unknown dataset or field, or an unreadable file; the message lists what is possible.
    """
    base = next((base for prefix, base in _PREFIXES.items() if name.startswith(prefix)), DATASETS.get(name))
    overrides = {} if overrides_path is None else _read_overrides(Path(overrides_path))
    if name not in overrides:
        if base is None:
            known = ", ".join((*sorted(DATASETS), *(f"{prefix}*" for prefix in _PREFIXES)))
            raise DatasetError(
                f"unknown dataset {name!r}; known: {known}. To add it, write its keys "
                f'to a JSON or YAML file, {{"{name}": {{"image_key": ..., "action_mask": [...]}}}}, and pass that file '
                f"as --dataset-config FILE (finetune_energy.py: --dataset_config FILE). Fields: {_field_names()}"
            )
        return base
    entry = overrides[name]
    known = {field.name for field in fields(DatasetConfig)}
    if not isinstance(entry, dict) or not set(entry) <= known:
        unknown = sorted(map(_shown, set(entry) - known)) if isinstance(entry, dict) else [_shown(entry)]
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise DatasetError(
            f"{overrides_path}: {name}: unknown {', '.join(unknown[:5])}{more}; the fields are {_field_names()}"
        )
    try:
        return replace(base or DatasetConfig(), **entry)
    except DatasetError as error:
        raise DatasetError(f"{overrides_path}: {name}: {error}") from error


def _field_names() -> str:
    return ", ".join(field.name for field in fields(DatasetConfig))


def _read_overrides(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        data = _read_yaml(text, path) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except DatasetError:
        raise
    except Exception as error:  # OSError, UnicodeDecodeError, and the parsers' own, whose bases differ
        raise DatasetError(f"cannot read the dataset configuration {path}: {error}") from error
    if not isinstance(data, dict):
        raise DatasetError(f"{path}: expected {{dataset name: {{field: value}}}}")
    return data


def _read_yaml(text: str, path: Path) -> Any:
    """YAML without aliases: a few hundred bytes of them can stand for more values than any memory holds."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            line = event.start_mark.line + 1
            raise DatasetError(f"{path}, line {line}: aliases are not read here: write out what *{event.anchor:.50} is")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:  # the parser takes the square of the depth
            raise DatasetError(f"{path} nests more than {_DEEPEST} levels deep")
    return yaml.safe_load(text)


def standardize(config: DatasetConfig, actions: np.ndarray, motion: np.ndarray) -> tuple[np.ndarray, slice]:
    """An episode's stored actions in the library's convention, in robot units.

    Args:
        config: the dataset's conventions.
        actions: `(T, A)` as stored.
        motion: `(T, M)`, the observation of `config.motion_key`; M = 0 without one.

    Returns:
        Actions `(T', A)` float32, and the slice of the T steps that they belong to; T' may be 0.
    """
    start, stop = int(config.drop_first_step), len(actions)
    actions = np.array(actions[start:], np.float32)
    if len(actions):
        actions[:, -1] = convert_gripper(config.gripper, actions[:, -1])
    if config.motion_key is not None:
        actions, stop = actions[:-1], stop - 1
        actions[:, : motion.shape[1]] = np.diff(motion[start:], axis=0)
    return actions, slice(start, max(start, stop))


def convert_gripper(convention: str, gripper: np.ndarray) -> np.ndarray:
    """Gripper commands `(T,)` of one episode, as `DatasetConfig.gripper` says."""
    if convention == "libero":
        return 1.0 - np.clip(gripper, 0.0, 1.0)
    if convention == "bridge":
        return _binarize(gripper)
    return gripper


def _binarize(gripper: np.ndarray) -> np.ndarray:
    """0 or 1; a value in between takes the next clear one, or the episode's last value where none follows."""
    binary = np.empty_like(gripper)
    reached = gripper[-1]
    for index in reversed(range(len(gripper))):
        if gripper[index] > _OPEN:
            reached = 1.0
        elif gripper[index] < _CLOSED:
            reached = 0.0
        binary[index] = reached
    return binary
