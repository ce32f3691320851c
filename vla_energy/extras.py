"""Optional dependencies: one error that names the extra, in place of whatever an old or absent package raises first."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import metadata

NATIVE: Mapping[str, str] = {
    "torch": "2.6",
    "transformers": "5",
    "tokenizers": "0.20",
    "timm": "1.0",
    "peft": "0.17",
    "huggingface_hub": "0.30",
    "pillow": "10",
}
"""Oldest versions that `vla_energy.backbones` runs on; the `native` extra in pyproject.toml asks for the same."""


class MissingExtraError(ImportError):
    """An optional dependency is absent or too old."""


def require(extra: str, oldest: Mapping[str, str]) -> None:
    """Looks at what is installed, imports nothing.

    Args:
        extra: name of the extra that brings the packages.
        oldest: distribution -> oldest version that will do.

    Raises:
        MissingExtraError: packages are absent or too old; it names them all, and the extra.
    """
    lacking = []
    for name, version in oldest.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            lacking.append(f"{name} (not installed)")
            continue
        if _numbers(found) < _numbers(version):
            lacking.append(f"{name} >= {version} (found {found})")
    if lacking:
        raise MissingExtraError(
            f"this needs the `{extra}` extra, in an environment that may have newer versions than openvla-oft's pins: "
            f"pip install 'vla-energy[{extra}]'. Lacking: {', '.join(lacking)}"
        )


def _numbers(version: str) -> list[int]:
    """Leading numbers of a version, for comparison: "2.2.0+cu121" is [2, 2, 0]."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return [int(part) for part in match[0].split(".")] if match else []
