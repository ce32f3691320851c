"""What the report's files have to hold where it reads them; the rest of them is not looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vla_energy.results import FOOTAGE, SETTINGS, SHAPES, finite

_SHOWN = 60
_BAND = "from_"
_LARGEST = 1e100  # in size, of what an axis has room for


@dataclass(frozen=True)
class Each:
    """An object of any keys, or a list, whose values all hold `content`."""

    content: Any
    kind: type[dict] | type[list] = dict


@dataclass(frozen=True)
class Optional:
    """May be absent or null."""

    content: Any


Expected = Each | Optional | Mapping[str, Any] | tuple[str, Callable[[Any], bool]]
"""What a place holds: an object with these keys, see above, or words for a value and the test of it."""

ANY: Expected = ("anything", lambda value: True)
TEXT: Expected = ("text", lambda value: isinstance(value, str))
NUMBER: Expected = ("a number that can be drawn", lambda value: drawable(value))
COUNT: Expected = ("a whole number", lambda value: isinstance(value, int))
READING: Expected = ("a number or null", lambda value: value is None or isinstance(value, (int, float)))
INTERVAL: Expected = (
    "two numbers that can be drawn",
    lambda value: _numbers(value) and len(value) == 2,
)
SENTENCES: Expected = (
    "sentences",
    lambda value: isinstance(value, list) and bool(value) and all(isinstance(part, str) for part in value),
)


def _grid(value: Any) -> bool:
    """Rows of numbers or nulls, as many in each as there are `xs`, and as many rows as `ys` where there are any."""
    if not isinstance(value, dict) or not all(_numbers(value.get(key, [0.0])) for key in ("xs", "ys")):
        return False
    rows, width = value.get("energies"), len(value.get("xs", []))
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == width for row in rows):
        return False
    numbers = all(cell is None or drawable(cell) for row in rows for cell in row)
    return numbers and width > 1 and 0 < len(rows) == len(value.get("ys", rows))


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(drawable, value))


def drawable(value: Any) -> bool:
    """A finite number with room for percents and margins of a plot around it."""
    return finite(value) and abs(value) <= _LARGEST


def _curve(value: Any) -> bool:
    """Of a gate: lists of one length, `worse` with nulls where nothing is accepted."""
    if not isinstance(value, dict) or not drawable(value.get("l1_policy")):
        return False
    lists = [value.get(key, ()) for key in ("margins", "accepted", "l1", "worse")]
    if not all(map(_numbers, lists[:3])) or not isinstance(lists[3], list):
        return False
    return len({len(part) for part in lists}) == 1 and all(v is None or drawable(v) for v in lists[3])


def _bands(value: Any) -> bool:
    return isinstance(value, dict) and all(_band(name) and drawable(share) for name, share in value.items())


def _band(name: str) -> bool:
    try:
        return name.startswith(_BAND) and drawable(float(name.removeprefix(_BAND)))
    except ValueError:
        return False


GRID: Expected = ("xs, ys and as many energies", _grid)
TIME: Expected = ("xs and as many energies in each row", _grid)
CURVE: Expected = Optional(("margins, accepted, worse and l1 of one length, and l1_policy", _curve))
BANDS: Expected = Optional((f"shares by band ({_BAND}0.05)", _bands))

_ARM = {
    "episodes": COUNT,
    "success": NUMBER,
    "interval": INTERVAL,
    "accepted_share": Optional(NUMBER),
    "milliseconds_per_decision": {"mean": NUMBER},
}
_DIFFERENCE = {
    "baseline": TEXT,
    "difference": NUMBER,
    "interval": INTERVAL,
    "won": Optional(COUNT),
    "lost": Optional(COUNT),
    "p_value": Optional(NUMBER),
}
_COMPARED = {"arms": Each(_ARM), "differences": Each(_DIFFERENCE)}
ROLLOUT = {
    "overall": _COMPARED,
    "tasks": Each(_COMPARED),
    "complete": Optional(ANY),
    "settings": Optional({"tasks": Optional(Each(TEXT, list))}),
    "meta": Optional({"checkpoint": Optional({"gates": Optional(Each(READING)), "fingerprint": Optional(TEXT)})}),
}
_MODE = {"effect": {"change": NUMBER, "interval": INTERVAL}, "bands": BANDS, "curve": CURVE}
_FRAME = {"task": TEXT, "episode": COUNT, "step": COUNT, "plane": GRID, "time": TIME}

FILES: dict[str, Expected] = {
    "metrics.json": {
        "finetune": Optional(Each(READING)),
        "energy": Optional({"win_rate": Optional(Each(READING))}),
        "rerank": Optional(Each(READING)),
        "gate": Optional(Each(READING)),
        "rollout": Optional(ROLLOUT),
        "seconds": Optional(Each(NUMBER)),
        "versions": Optional(Each(ANY)),
    },
    "rollout.json": ROLLOUT,
    "preflight.json": {
        "verdict": {"use": TEXT, "reasons": SENTENCES},
        "modes": Optional(Each(_MODE)),
        "fingerprint": Optional(TEXT),
    },
    SHAPES: {"frames": Optional(Each(_FRAME, list)), "bands": BANDS, "gate": CURVE},
    FOOTAGE: Each(ANY),  # `footage.lack` says what cannot be shown
    SETTINGS: {"flags": Optional(Each(ANY)), "versions": Optional(Each(ANY))},
    "energy_gates.json": {"margins": Optional(Each(READING)), "tasks": Optional(Each(TEXT))},
}
"""By file. Numbers that are not finite stand there as null."""


def difference(value: Any, expected: Expected, place: str = "") -> str | None:
    """The first place where `value` is not what is expected, in a sentence; None where there is none.

    Args:
        value: from JSON.
        expected: of `FILES`, or a part of it.
        place: of the value, for the message.
    """
    if isinstance(expected, Optional):
        return None if value is None else difference(value, expected.content, place)
    if isinstance(expected, tuple):
        words, holds = expected
        return None if holds(value) else _told(place, words, value)
    if isinstance(expected, Each):
        if not isinstance(value, expected.kind):
            return _told(place, "a list" if expected.kind is list else "an object", value)
        inner = enumerate(value) if isinstance(value, list) else value.items()
        parts = [(key, part, expected.content) for key, part in inner]
    elif not isinstance(value, dict):
        return _told(place, "an object", value)
    else:
        parts = [(key, value.get(key), content) for key, content in expected.items()]
    at = (difference(part, content, f"{place}.{key}" if place else str(key)) for key, part, content in parts)
    return next((text for text in at if text is not None), None)


def _told(place: str, words: str, value: Any) -> str:
    shown = "nothing" if value is None else repr(value)
    cut = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
    return f"{place or 'the whole'}: expected {words}, found {cut}"
