"""Checks of single settings; each raises a ValueError that names the field, its value and what is expected."""

import math
from typing import Any


def require(condition: bool, name: str, value: Any, expected: str) -> None:
    """Raises unless `condition`."""
    if not condition:
        raise ValueError(f"{name}={value!r}: expected {expected}")


def is_number(value: Any) -> bool:
    """A finite int or float that is no bool."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int that no float holds
        return False


def one_of(name: str, value: Any, known: Any) -> None:
    """`value` is among `known`; the message lists these."""
    require(value in tuple(known), name, value, f"one of {', '.join(known)}")


def positive(name: str, value: Any) -> None:
    """A finite number above 0."""
    require(is_number(value) and value > 0, name, value, "a finite number above 0")


def not_negative(name: str, value: Any) -> None:
    """A finite number, 0 or more."""
    require(is_number(value) and value >= 0, name, value, "a finite number, 0 or more")


def share(name: str, value: Any) -> None:
    """0 <= value < 1."""
    require(is_number(value) and 0 <= value < 1, name, value, f"0 <= {name.rsplit('.', 1)[-1]} < 1")


def count(name: str, value: Any, least: int = 0) -> None:
    """An integer, at least `least`."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(whole and value >= least, name, value, f"an integer, {least} or more")


def flag(name: str, value: Any) -> None:
    """A bool."""
    require(isinstance(value, bool), name, value, "True or False")


def stds(name: str, value: Any, count: int) -> None:
    """Positive numbers; at least one where `count` is above 0."""
    require(isinstance(value, (tuple, list)), name, value, "a list of numbers")
    require(len(value) > 0 or count == 0, name, value, "at least one number")
    for std in value:
        positive(name, std)
