"""The command line and `--config_path` file of scripts/finetune_energy.py."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

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
        ValueError: a value that is not allowed; FlagError: the file cannot be read, or is no YAML file with flags, or
            the run's name is none of a folder.
    """
    args = sys.argv[1:] if args is None else args
    try:
        _check_aliases(path, args)
        config = draccus.parse(FinetuneConfig, path, keep_texts(args))
        _check_run_id(config.run_id_override)
        return config
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


def keep_texts(args: Sequence[str]) -> list[str]:
    """The command line with the values of text flags quoted: draccus reads each as YAML, where `off` is False.

    Raises:
        FlagError: a text begins with `include`, which draccus would take for an order to read a file.
    """
    texts, kept, flag = set(_text_flags(FinetuneConfig)), list[str](), ""
    for arg in args:
        name, joined, value = arg.partition("=")
        if flag in texts and not arg.startswith("-"):  # else the value is missing, and argparse tells
            kept.append(_quoted(flag, arg))
        elif name in texts and joined:
            kept.append(f"{name}={_quoted(name, value)}")
        else:
            kept.append(arg)
        flag = arg
    return kept


def _quoted(flag: str, text: str) -> str:
    if text.startswith("include"):
        raise FlagError(f"{flag} {text}: a text that begins with include cannot be given here; write it in a YAML file")
    return json.dumps(text, ensure_ascii=False)  # which YAML reads, too


def _text_flags(cls: Any, prefix: str = "--") -> Iterator[str]:
    for entry in fields(cls):
        if is_dataclass(entry.type):
            yield from _text_flags(entry.type, f"{prefix}{entry.name}.")
        elif entry.type in (str, str | None, Path):
            yield prefix + entry.name


def _check_run_id(name: str | None) -> None:
    """Raises FlagError where a run under this name would lie elsewhere than in a folder of its own below the root."""
    if name is None:
        return
    if name in ("", ".", "..") or any(sign in name for sign in (os.sep, os.altsep) if sign):
        raise FlagError(f"--run_id_override {name!r}: expected the name of a folder; --run_root_dir says where it lies")


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
