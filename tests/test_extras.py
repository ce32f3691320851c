"""A missing extra is one error that names it."""

from __future__ import annotations

from importlib import metadata

import pytest

from vla_energy.extras import MissingExtraError, require


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Distribution -> version, in place of the real ones; the test fills it."""
    versions: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    return versions


@pytest.mark.parametrize("found", ["2.6", "2.6.0", "2.6.0+cpu", "2.14.1", "3", "10.0.dev1"])
def test_new_enough(installed: dict[str, str], found: str) -> None:
    installed["torch"] = found
    require("native", {"torch": "2.6"})


@pytest.mark.parametrize("found", ["2.2.0", "2.2.0+cu121", "2.5.9", "2", "unknown"])
def test_too_old_is_named_with_what_was_found(installed: dict[str, str], found: str) -> None:
    installed["torch"] = found
    with pytest.raises(MissingExtraError) as caught:
        require("native", {"torch": "2.6"})
    assert f"torch >= 2.6 (found {found})" in str(caught.value)


def test_all_that_lacks_is_named_at_once_with_the_extra(installed: dict[str, str]) -> None:
    installed.update(torch="2.2.0", timm="1.0.31")
    with pytest.raises(ImportError, match=r"pip install 'vla-energy\[native\]'") as caught:
        require("native", {"torch": "2.6", "timm": "1.0", "peft": "0.17"})
    assert "torch" in str(caught.value) and "peft (not installed)" in str(caught.value)
    assert "timm" not in str(caught.value)
