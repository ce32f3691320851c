"""A patch's lines in the content of one file: added, recognised and taken out, whatever the line ends are."""

from __future__ import annotations

import hashlib

from vla_energy.hosts.anchors import AnchorError, locate, parse, verify
from vla_energy.hosts.patch_file import MARKER, FilePatch


def is_known(source: bytes, file: FilePatch) -> bool:
    """Whether a content is the version that the patch was made for."""
    return hashlib.sha256(source).hexdigest() == file.sha256


def add_lines(source: bytes, file: FilePatch) -> tuple[bytes, tuple[int, ...]]:
    """A file's content with the lines added, and the lines of `source` after which they went.

    Raises:
        AnchorError: an anchor is missing, or a line cannot stand there.
    """
    lines = source.splitlines(keepends=True)
    if is_known(source, file):
        places = [(insertion.line, b" " * insertion.indent) for insertion in file.insertions]
        if max(line for line, _ in places) > len(lines):
            raise AnchorError(f"the patch has a line {max(line for line, _ in places)}, the file has {len(lines)}")
    else:
        places = _by_anchors(source, lines, file)
    texts = [
        indent + (insertion.text + MARKER).encode()
        for (_, indent), insertion in zip(places, file.insertions, strict=True)
    ]
    numbers = [line for line, _ in places]
    patched, added = _weave(lines, numbers, texts)
    verify(source, patched, added)
    return patched, tuple(numbers)


def remove_lines(source: bytes, file: FilePatch) -> bytes:
    """A file's content without our lines: what `add_lines` was given."""
    ours = {(insertion.text + MARKER).encode() for insertion in file.insertions}
    kept: list[bytes] = []
    for line in source.splitlines(keepends=True):
        if line.strip() not in ours:
            kept.append(line)
        elif not _end(line) and kept:  # the file ended without a newline: then the line above it did
            kept[-1] = kept[-1][: len(kept[-1]) - len(_end(kept[-1]))]
    return b"".join(kept)


def find_lines(source: bytes, file: FilePatch) -> tuple[tuple[int, ...], str]:
    """The numbers that a patch's lines have in a file's content; empty if none is there.

    Returns:
        The numbers, and what is wrong if some are missing, edited or there twice (else empty).
    """
    ours = {(insertion.text + MARKER).encode(): insertion.text for insertion in file.insertions}
    texts = {insertion.text.encode() for insertion in file.insertions}
    found: dict[str, list[int]] = {}
    strange: list[int] = []
    for number, line in enumerate(source.splitlines(), start=1):
        stripped = line.strip()
        if stripped in ours:
            found.setdefault(ours[stripped], []).append(number)
        elif stripped in texts or stripped.endswith(MARKER.strip().encode()):
            strange.append(number)
    if not found and not strange:
        return (), ""
    numbers = tuple(number for insertion in file.insertions for number in found.get(insertion.text, ()))
    missing = [text for text in ours.values() if text not in found]
    if not missing and not strange and len(numbers) == len(ours):
        return numbers, ""
    parts = [f"half applied: {len(found)} of {len(ours)} lines are there ({', '.join(map(str, numbers)) or 'none'})"]
    parts += [f"missing: {text}" for text in missing]
    parts += [f"edited, or of another version of the patch: line {number}" for number in strange]
    parts += [f"line {lines[1]} is there twice" for lines in found.values() if len(lines) > 1]
    return numbers, ", ".join(parts) + "; restore the file with git, or take these lines out by hand"


def misplaced(source: bytes, file: FilePatch) -> str:
    """What is wrong with the places of lines that are all there; empty where the patch would put them there again."""
    without = remove_lines(source, file)
    try:
        again, _ = add_lines(without, file)
    except AnchorError as error:
        return f"its lines are there, but no longer where they belong: {error}"
    if again == source:
        return ""
    moved = zip(source.splitlines(), again.splitlines(), strict=False)
    first = next((number for number, (mine, theirs) in enumerate(moved, start=1) if mine != theirs), 0)
    return f"its lines are there, but moved or indented otherwise (from line {first} on)"


def _by_anchors(source: bytes, lines: list[bytes], file: FilePatch) -> list[tuple[int, bytes]]:
    tree = parse(source)
    places, missing = [], []
    for insertion in file.insertions:
        try:
            places.append(locate(tree, lines, insertion.anchor))
        except AnchorError as error:
            missing.append(str(error))
    if missing:
        raise AnchorError("; ".join(missing))
    return places


def _weave(lines: list[bytes], numbers: list[int], texts: list[bytes]) -> tuple[bytes, set[int]]:
    """Lines with texts put in after the numbered ones, and the numbers that the texts have then."""
    woven: list[bytes] = []
    added: set[int] = set()
    for number in range(len(lines) + 1):
        woven += lines[number - 1 : number] if number else []
        for text in (text for place, text in zip(numbers, texts, strict=True) if place == number):
            end = next((_end(line) for line in (lines[max(number - 1, 0) :: -1] + lines) if _end(line)), b"\n")
            if woven and not _end(woven[-1]):
                woven[-1] += end
                end = b""
            woven.append(text + end)
            added.add(len(woven))
    return b"".join(woven), added


def _end(line: bytes) -> bytes:
    return line[len(line.rstrip(b"\r\n")) :]
