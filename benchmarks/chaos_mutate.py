"""Ways to damage a file: its bytes, its JSON, the header of a safetensors file, the members of a zip."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

_DEEP = json.loads("[" * 100 + "]" * 100)
NASTY: tuple[Any, ...] = (
        None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, -(10**18), 0.5, -0.0, 1e308, float("nan"), float("inf"),
        -float("inf"), "", "x", "x" * 5_000, "../../../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "NaN", "3",
        [], [[]], {}, [None], {"": None}, ["x"], [1e308] * 3, [0.0] * 1_000, [True, 0], {"a": {"b": []}}, _DEEP,
)  # fmt: skip
"""Values where others are expected."""


def nasty(draw: random.Random) -> Any:
    """A copy of one of them."""
    return copy.deepcopy(draw.choice(NASTY))


class Payload:
    """Writes a file where it is unpickled: the sign that code of a file was run."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


def damage_bytes(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    """What was done, and the bytes after it."""
    size = len(data)
    place, other = sorted((draw.randrange(size + 1), draw.randrange(size + 1)))
    kind = draw.choice(("cut", "flip", "flip", "zero", "noise", "delete", "double", "insert", "empty", "replace"))
    if kind == "cut":
        return kind, data[:place]
    if kind == "flip":
        spoilt = bytearray(data)
        for _ in range(draw.choice((1, 1, 2, 8, 64)) if size else 0):
            spoilt[draw.randrange(size)] ^= 1 << draw.randrange(8)
        return kind, bytes(spoilt)
    other = min(other, place + 2 ** draw.randrange(1, 12))
    if kind == "zero":
        return kind, data[:place] + bytes(other - place) + data[other:]
    if kind == "noise":
        return kind, data[:place] + draw.randbytes(other - place) + data[other:]
    if kind == "delete":
        return kind, data[:place] + data[other:]
    if kind == "double":
        return kind, data[:other] + data[place:other] + data[other:]
    if kind == "insert":
        return kind, data[:place] + draw.randbytes(draw.randrange(1, 64)) + data[place:]
    deep = draw.choice((b"[", b'{"a":'))
    return kind, b"" if kind == "empty" else draw.choice((deep * 100_000, b"\xff\xfe\0", b"\0" * 4_096, b"1" * 6_000))


def damage_json(value: Any, draw: random.Random) -> Any:
    """A copy with one value replaced, dropped, doubled or exchanged."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(value)
    if not places or draw.random() < 0.05:
        return nasty(draw)
    # Half of them near the top: else it would nearly always be a number in a long list.
    node, key = draw.choice(places[: draw.choice((8, 40, len(places)))])
    kind = draw.choice(("nasty", "nasty", "nasty", "drop", "exchange", "longer", "more"))
    if kind == "drop":
        del node[key]
    elif kind == "exchange":
        other, at = draw.choice(places)
        node[key] = copy.deepcopy(other[at])
    elif kind == "longer" and isinstance(node, list):
        node.insert(key, node[key])
    elif kind == "more" and isinstance(node, dict):
        node[draw.choice(("", "x", "__class__", "../x"))] = nasty(draw)
    elif kind == "more" and type(node[key]) in (int, float):
        node[key] = node[key] * draw.choice((-1, 0, 10, 10**6, 10**12))
    else:
        node[key] = nasty(draw)
    return value


def to_text(value: Any) -> bytes:
    """JSON, also of what has no place in it."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def damage_header(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose header is changed: names, shapes, types, offsets, metadata (itself JSON in places)."""
    length = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = header.get("__metadata__")
    if metadata and draw.random() < 0.5:
        name = draw.choice(sorted(metadata))
        try:
            metadata[name] = json.dumps(damage_json(json.loads(metadata[name]), draw))
        except ValueError:
            metadata[name] = draw.choice(("", "x", "-1", "1e9", "9" * 30))
    else:
        header = damage_json(header, draw)
    text = to_text(header)
    return struct.pack("<Q", draw.choice((len(text), len(text), len(text), 2**62, 0))) + text + rest


def damage_zip(data: bytes, draw: random.Random, marker: Path) -> bytes:
    """A zip with one member's bytes damaged, exchanged, compressed from many zeros, a pickle with code, or renamed."""
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        members = [(entry.filename, old.read(entry)) for entry in old.infolist()]
    index = draw.randrange(len(members))
    kind = draw.choice(("damage", "pickle", "rename", "exchange", "drop", "absurd") * 3 + ("bomb",))
    name, content = members[index]
    method = zipfile.ZIP_STORED
    if kind == "damage":
        content = damage_bytes(content, draw)[1]
    elif kind == "pickle":
        index = next((i for i, (other, _) in enumerate(members) if other.endswith("data.pkl")), index)
        name, content = members[index][0], pickle.dumps({"w": Payload(marker)}, protocol=2)
    elif kind == "bomb":
        content, method = bytes(2**28), zipfile.ZIP_DEFLATED
    elif kind == "rename":
        name = draw.choice(("../../evil", "/tmp/evil", "", name + "x"))
    elif kind == "absurd" and name.endswith(".npy"):
        shape = draw.choice(("(1000000000000,)", "(-1,)", "(0,)", "(2, 3)", "'x'", "(99999999999999999999999,)"))
        head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
        content = b"\x93NUMPY\x01\x00v\x00" + head.ljust(117).encode() + b"\n"
    elif kind == "exchange":
        content = draw.choice(members)[1]
    members[index] = (name, content)
    if kind == "drop":
        del members[index]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as new:
        for filename, content in members:
            new.writestr(zipfile.ZipInfo(filename), content, method)
    return buffer.getvalue()


def damage_file(path: Path, others: list[Path], draw: random.Random, marker: Path) -> str:
    """Damages one file in its place, `others` being whole files to exchange it with; what was done."""
    data = path.read_bytes()
    kind = draw.choice(("bytes", "bytes", "inside", "inside", "inside", "other", "pickle", "odd"))
    if kind == "inside" and path.suffix in (".json", ".yaml", ".jsonl") and data[:1] in b"{[":
        text = data.splitlines()[0] if path.suffix == ".jsonl" else data
        value = json.loads(text)
        for _ in range(draw.choice((1, 1, 1, 3))):
            value = damage_json(value, draw)
        path.write_bytes(to_text(value) + (data[len(text) :] if path.suffix == ".jsonl" else b""))
    elif kind == "inside" and path.suffix == ".safetensors":
        path.write_bytes(damage_header(data, draw))
    elif kind == "inside" and path.suffix in (".pt", ".npz"):
        path.write_bytes(damage_zip(data, draw, marker))
    elif kind == "other":
        path.write_bytes(draw.choice(others).read_bytes())
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Payload(marker), protocol=draw.choice((2, 4))))
    elif kind == "odd":
        path.unlink()
        odd = draw.choice(("gone", "folder", "loop"))
        if odd == "folder":
            path.mkdir()
        elif odd == "loop":
            os.symlink(path, path)
        return f"{path.name}: {odd}"
    else:
        kind, spoilt = damage_bytes(data, draw)
        path.write_bytes(spoilt)
    return f"{path.name}: {kind}"
