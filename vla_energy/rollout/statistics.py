"""Statistics of paired successes: intervals and tests that need nothing but numpy.

Sources: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22
(1927); B. Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979);
Q. McNemar, "Note on the sampling error of the difference between correlated proportions", Psychometrika
12 (1947), in its exact (binomial) form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
_RESAMPLES = 10_000
_BOOTSTRAP_SEED = 0  # fixed: the same episodes always give the same interval


@dataclass(frozen=True)
class PairedDifference:
    """Success of one arm minus success of another on the same episodes.

    Attributes:
        difference: mean over strata (tasks) of the mean difference, in [-1, 1].
        interval: bounds of its bootstrap interval. It has zero width when no pair disagrees, which says that
            nothing was observed, not that nothing can differ.
        p_value: exact two-sided McNemar test over all pairs.
        won: pairs that only this arm solved.
        lost: pairs that only the other arm solved.
        pairs: number of pairs.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    won: int
    lost: int
    pairs: int


def wilson_interval(successes: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval of a proportion; sensible at 0 and 1, unlike the normal approximation.

    Raises:
        ValueError: no trials, or successes outside 0..trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials is no proportion")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / trials
    scale = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / scale
    # Exact at the ends, where rounding would leave 1e-17.
    low = 0.0 if successes == 0 else centre - half
    return low, 1.0 if successes == trials else centre + half


def mcnemar_exact(won: int, lost: int) -> float:
    """Two-sided exact p-value: under no difference each discordant pair is a fair coin. 1 without any."""
    flips = won + lost
    tail = sum(math.comb(flips, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2**flips)  # integers: exact, and no overflow of floats


def paired_difference(
    strata: Sequence[tuple[np.ndarray, np.ndarray]],
    confidence: float = CONFIDENCE,
    resamples: int = _RESAMPLES,
) -> PairedDifference:
    """Paired difference over strata, with a percentile bootstrap that resamples pairs within each stratum.

    Tasks are strata: they are the tasks asked for, not a sample of tasks, so the interval speaks of new episodes
    of these tasks.

    Args:
        strata: one `(arm, other)` a stratum, each `(pairs,)` bool, aligned by episode.
        confidence: coverage of the interval.
        resamples: bootstrap resamples.

    Raises:
        ValueError: no strata, an empty one, or arms of different length.
    """
    if not strata:
        raise ValueError("no episodes to compare")
    rng = np.random.default_rng(_BOOTSTRAP_SEED)
    means, resampled = [], np.zeros(resamples)
    won = lost = pairs = 0
    for arm, other in strata:
        arm, other = np.asarray(arm, bool), np.asarray(other, bool)
        if arm.shape != other.shape or arm.ndim != 1 or not arm.size:
            raise ValueError(f"arms are not paired: {arm.shape} and {other.shape} episodes")
        differences = arm.astype(np.float64) - other
        means.append(differences.mean())
        resampled += differences[rng.integers(arm.size, size=(resamples, arm.size))].mean(axis=1)
        won, lost, pairs = won + int((arm & ~other).sum()), lost + int((other & ~arm).sum()), pairs + arm.size
    low, high = np.quantile(resampled / len(strata), (0.5 - confidence / 2, 0.5 + confidence / 2))
    interval = (float(low), float(high))
    return PairedDifference(float(np.mean(means)), interval, mcnemar_exact(won, lost), won, lost, pairs)
