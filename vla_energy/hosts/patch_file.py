"""A patch as data: which lines go into which files of a host, and where. Nothing of the host's text is stored.

```json
{"host": "owner/name", "commit": "<40 hex>", "files": [
  {"path": "train.py", "sha256": "<64 hex>", "optional": false, "insertions": [
    {"line": 12, "indent": 4, "text": "x = f(y)", "anchor": {"after": "assignment of y", "in": "main"}}]}]}
```

`line` is the line of the file with that `sha256` after which the text goes, `indent` its indentation in spaces; in any
other version of the file the anchor says where. A file that is `optional` may be absent.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

PATCHES = Path(__file__).parent / "patches"
"""The patches that ship with the package; `patches/` in the repository leads here."""

MARKER = "  # vla-energy"
"""End of every added line: `revert` knows our lines by it."""

FORBIDDEN = "modeling_prismatic.py"
"""The host copies this file into checkpoints, so a line added to it would travel with them."""

_KINDS = ("imports", "last field", "assignment", "call")


class PatchError(ValueError):
    """A patch file is damaged, or does not fit what it is to be applied to."""


@dataclass(frozen=True)
class Anchor:
    """A place in a syntax tree.

    Args:
        place: `after` or `before`.
        kind: `imports` (the last import above the first class or function), `last field` (of a class), `assignment`
            or `call` (the one statement that assigns or calls `name`).
        name: what is assigned or called, dotted where it is an attribute; empty for the other kinds.
        scope: the class or function, dotted (`Server.__init__`); empty for the module.
    """

    place: str
    kind: str
    name: str = ""
    scope: str = ""

    def __str__(self) -> str:
        what = {"imports": "the imports", "last field": "the last field"}.get(
            self.kind, f"the {self.kind} of {self.name}"
        )
        return f"{self.place} {what}" + (f" in {self.scope}" if self.scope else "")


@dataclass(frozen=True)
class Insertion:
    """One added line: after line `line` of the known file, with `indent` spaces; elsewhere at the anchor."""

    line: int
    indent: int
    text: str
    anchor: Anchor


@dataclass(frozen=True)
class FilePatch:
    """The lines that go into one file; `sha256` is that of the known version."""

    path: str
    sha256: str
    insertions: tuple[Insertion, ...]
    optional: bool = False


@dataclass(frozen=True)
class Patch:
    """Added lines for one commit of a host."""

    name: str
    host: str
    commit: str
    files: tuple[FilePatch, ...]

    def only(self, paths: Sequence[str]) -> Patch:
        """The same for some of its files.

        Raises:
            PatchError: it has no such file.
        """
        known = [file.path for file in self.files]
        if unknown := sorted(set(paths) - set(known)):
            raise PatchError(f"patch {self.name} has no file {', '.join(unknown)}; it has {', '.join(known)}")
        return dataclasses.replace(self, files=tuple(file for file in self.files if file.path in paths))


def load_patch(path: str | Path | None = None) -> Patch:
    """Reads a patch file.

    Args:
        path: of the JSON file; None for the one that ships with the package.

    Raises:
        PatchError: it cannot be read, is damaged, or names a file that must not be touched.
    """
    path = Path(path) if path is not None else shipped()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        files = tuple(_file(entry) for entry in data["files"])
        patch = Patch(path.stem, str(data["host"]), str(data["commit"]), files)
    except PatchError as error:
        raise PatchError(f"patch {path}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PatchError(f"patch {path} cannot be read ({type(error).__name__}: {error})") from error
    if not files or len({file.path for file in files}) < len(files):
        raise PatchError(f"patch {path}: names {len(files)} files, expected at least one and each once")
    return patch


def shipped() -> Path:
    """The one patch file in the package.

    Raises:
        PatchError: there is none, or more than one.
    """
    found = sorted(PATCHES.glob("*.json"))
    if len(found) != 1:
        raise PatchError(f"{PATCHES} holds {len(found)} patches, expected 1: name one with --patch")
    return found[0]


def _file(data: dict[str, Any]) -> FilePatch:
    path, sha256, optional = data["path"], data["sha256"], data.get("optional", False)
    parts = PurePosixPath(path)
    if not parts.parts or parts.is_absolute() or ".." in parts.parts or "\\" in path:
        raise PatchError(f"path {path!r} must stay inside the checkout")
    if parts.name.lower() == FORBIDDEN:
        raise PatchError(f"it names {path}, which must never be touched: the host copies that file into checkpoints")
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise PatchError(f"{path}: sha256 {sha256!r} is not 64 hexadecimal digits")
    if not isinstance(optional, bool):
        raise PatchError(f"{path}: optional is {optional!r}, expected true or false")
    insertions = tuple(_insertion(path, entry) for entry in data["insertions"])
    if not insertions or len({insertion.text for insertion in insertions}) < len(insertions):
        raise PatchError(f"{path}: {len(insertions)} insertions, expected at least one and no text twice")
    return FilePatch(path, sha256, insertions, optional)


def _insertion(path: str, data: dict[str, Any]) -> Insertion:
    line, indent, text = data["line"], data["indent"], data["text"]
    if not all(type(number) is int and number >= 0 for number in (line, indent)):
        raise PatchError(f"{path}: line {line!r} and indent {indent!r} must be integers of 0 or more")
    if not (text.isascii() and text.isprintable() and text == text.strip() and "#" not in text and _is_statement(text)):
        raise PatchError(f"{path}: {text!r} is not one whole Python statement on one line, without a comment")
    return Insertion(line, indent, text, _anchor(path, data["anchor"]))


def _is_statement(text: str) -> bool:
    try:
        body = ast.parse(text).body
    except SyntaxError:
        return False
    return len(body) == 1 and not hasattr(body[0], "body")


def _anchor(path: str, data: dict[str, Any]) -> Anchor:
    rest = dict(data)
    scope = rest.pop("in", "")
    (place, what), *more = rest.items()
    kind, of, name = what.partition(" of ")
    named = kind in ("assignment", "call")
    if more or place not in ("after", "before") or kind not in _KINDS or named != bool(of and name):
        raise PatchError(
            f"{path}: anchor {data} is not understood; expected after or before, with one of: "
            "imports, last field, assignment of NAME, call of NAME; and in: SCOPE"
        )
    if kind == "last field" and not scope:
        raise PatchError(f"{path}: anchor {data} needs in: the class")
    return Anchor(place, kind, name, scope)
