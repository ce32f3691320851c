"""Which rule tells a leak from noise: the one of `chaos_soak.trend`, and the one that stood there before it.

    python benchmarks/soak_rules.py

False alarms are counted on series without a trend: white noise, noise that lasts, and the samples of `soak_collected`
in any order of their blocks. Below are both rules' slopes, errors and verdicts on every stored soak. Takes seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from chaos_report import RESULTS
from chaos_soak import STUDENT, WARM, trend

DRAWS = 1000


def newey_west(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Least-squares slope over all samples, with Newey and West's (1987) error over a quarter of them."""
    away, count = np.asarray(x) - np.mean(x), len(x)
    spread = float(away @ away)
    slope = float(away @ (np.asarray(y) - np.mean(y))) / spread
    scores = away * (np.asarray(y) - np.mean(y) - slope * away)
    window, variance = max(1, count // 4), float(scores @ scores)
    for lag in range(1, window + 1):
        variance += 2 * (1 - lag / (window + 1)) * float(scores[lag:] @ scores[:-lag])
    return slope, math.sqrt(max(variance, 0.0) * count / (count - 2)) / spread


RULES = {"before": (newey_west, 2.0), "medians": (trend, STUDENT)}


def stored(path: Path) -> tuple[list[float], list[float]]:
    """Hours and MiB of a stored soak, its warm-up left out."""
    rows = json.loads(path.read_text())["samples"]
    rows = [row for row in rows if row["seconds"] >= WARM * rows[-1]["seconds"]]
    return [row["seconds"] / 3600 for row in rows], [row["anonymous"] / 2**20 for row in rows]


def alarms(x: Sequence[float], draw: Callable[[], np.ndarray]) -> dict[str, float]:
    """By rule, the share of series without a trend in which it sees one upwards."""
    told = dict.fromkeys(RULES, 0)
    for _ in range(DRAWS):
        y = draw().tolist()
        for name, (rule, bound) in RULES.items():
            slope, error = rule(x, y)
            told[name] += slope > bound * error
    return {name: count / DRAWS for name, count in told.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Prints both tables."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    random = np.random.default_rng(0)
    x, y = stored(RESULTS / "chaos_soak_collected.json")

    def noise(lasting: float) -> np.ndarray:
        values = random.standard_normal(len(x) + 100)
        for index in range(1, len(values)):
            values[index] += lasting * values[index - 1]
        return values[100:]

    def blocks(size: int) -> np.ndarray:
        starts = random.integers(0, len(y) - size + 1, len(y) // size + 1)
        return np.concatenate([y[start : start + size] for start in starts])[: len(y)]

    for name, draw in {
        "white noise": lambda: noise(0.0),
        "noise that lasts (0.6)": lambda: noise(0.6),
        "noise that lasts (0.9)": lambda: noise(0.9),
        "soak_collected, any order": lambda: blocks(1),
        "soak_collected, blocks of 5": lambda: blocks(5),
    }.items():
        told = ", ".join(f"{rule} {100 * share:.1f} %" for rule, share in alarms(x, draw).items())
        print(f"false alarms, {name}: {told}")
    for leak in (0.8, 1.7, 2.5):
        found = alarms(x, lambda leak=leak: blocks(5) + leak * np.asarray(x))
        told = ", ".join(f"{rule} {100 * share:.0f} %" for rule, share in found.items())
        print(f"found, {leak} MiB an hour added to soak_collected in blocks of 5: {told}")
    for path in sorted(RESULTS.glob("chaos_soak*.json")):
        hours, memory = stored(path)
        line = []
        for name, (rule, bound) in RULES.items():
            slope, error = rule(hours, memory)
            line.append(f"{name} {slope:+.1f} +- {error:.1f} ({'grows' if slope > bound * error else 'flat'})")
        print(f"{path.stem.removeprefix('chaos_')}: MiB an hour: {', '.join(line)}")


if __name__ == "__main__":
    sys.exit(main())
