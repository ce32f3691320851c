"""The command line and `--config_path` file of scripts/finetune_energy.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import draccus

from vla_energy.finetune.config import FinetuneConfig, FlagError


def parse_flags(path: Path | None = None, args: Sequence[str] | None = None) -> FinetuneConfig:
    """The flags, not checked against each other yet.

    Args:
        path: a YAML file with flags; `--config_path` in `args` names one, too.
        args: None is the command line's.

    Raises:
        draccus.ParsingError: an unknown flag, or a value of a wrong type.
        ValueError: a value that is not allowed; FlagError: the file is no YAML file with flags.
    """
    try:
        return draccus.parse(FinetuneConfig, path, args)
    except (draccus.ParsingError, OSError):
        raise
    except Exception as error:  # YAML's errors, and whatever draccus stumbles over in a file that is no mapping
        if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
            raise
        raise FlagError(
            "--config_path: the file is no YAML file with flags, such as `batch_size: 8` "
            f"({type(error).__name__}: {error})"
        ) from error
