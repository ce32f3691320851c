"""The command line and `--config_path` file of scripts/finetune_energy.py."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import draccus
import yaml

from vla_energy.finetune.config import FinetuneConfig, FlagError

_MOST = 10_000
"""Values that a file with aliases may stand for: few bytes of them can stand for more than any memory holds."""

_DEEPEST = 100


def parse_flags(path: Path | None = None, args: Sequence[str] | None = None) -> FinetuneConfig:
    """The flags, not checked against each other yet.

    Args:
        path: a YAML file with flags; `--config_path` in `args` names one, too.
        args: None is the command line's.

    Raises:
        draccus.ParsingError: an unknown flag, or a value of a wrong type.
        ValueError: a value that is not allowed; FlagError: the file cannot be read, or is no YAML file with flags.
    """
    try:
        _check_aliases(path, sys.argv[1:] if args is None else args)
        return draccus.parse(FinetuneConfig, path, args)
    except OSError as error:
        raise FlagError(
            f"--config_path {error.filename or path}: {error.strerror or error}; name a YAML file with flags, such as "
            "configs/demo.yaml"
        ) from error
    except draccus.ParsingError:
        raise
    except Exception as error:  # YAML's errors, and whatever draccus stumbles over in a file that is no mapping
        if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
            raise
        raise FlagError(
            "--config_path: the file is no YAML file with flags, such as `batch_size: 8` "
            f"({type(error).__name__}: {error})"
        ) from error


def _check_aliases(path: Path | None, args: Sequence[str]) -> None:
    """Raises FlagError where a file nests too deep or its aliases, written out, are more than `_MOST` values."""
    for index, flag in enumerate(args):
        name, joined, value = flag.partition("=")
        if name == "--config_path" and (joined or index + 1 < len(args)):
            path = Path(value if joined else args[index + 1])
    if path is None or path.suffix == ".toml":
        return
    total, sizes = 0, dict[str, int]()
    started: list[tuple[str | None, int]] = []
    with contextlib.suppress(yaml.YAMLError):  # which is told when the flags are read
        for event in yaml.parse(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                within_itself = any(anchor == event.anchor for anchor, _ in started)
                total += _MOST if within_itself else sizes.get(event.anchor, 0)
                if total > _MOST:
                    raise FlagError(f"--config_path: the aliases in {path} stand for more than {_MOST:,} values")
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, before = started.pop()
                sizes |= {anchor: total - before} if anchor else {}
            elif isinstance(event, yaml.NodeEvent):
                total += 1
                if isinstance(event, yaml.CollectionStartEvent):
                    started.append((event.anchor, total - 1))
                    if len(started) > _DEEPEST:  # its parser takes the square of the depth
                        raise FlagError(f"--config_path: {path} nests more than {_DEEPEST} levels deep")
                elif event.anchor:
                    sizes[event.anchor] = 1
