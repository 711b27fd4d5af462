"""Scores over seeds and their uncertainty, computed with scipy.

The measures are those of Agarwal et al., "Deep reinforcement learning at the edge of the statistical precipice"
(2021): interquartile mean, stratified bootstrap, probability of improvement. Intervals are 95 % percentile intervals
over :data:`RESAMPLES` resamples of the seeds. The generator has a fixed seed, so the same scores give the same report.
With three to five seeds there are few different resamples, and the intervals are too narrow. The mean difference of
runs with the same seed has the interval of Student's t instead; it decides whether two arms differ significantly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

#: Of the bootstrap.
RESAMPLES = 5_000
CONFIDENCE = 0.95
POWER = 0.8
#: Share left out at either end by the interquartile mean. Of fewer than four values none is left out.
TRIMMED = 0.25

Floats = npt.NDArray[np.float64]
#: One array of scores, a score per seed, for each setting.
Strata = Sequence[Floats]


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval.

    Attributes:
        value: The figure.
        low: Lower end of the interval; None if there is none.
        high: Upper end.
        note: The reason for a missing interval; empty if there is an interval.
        p: Of a difference, the p value of the two-sided test against 0.
        detectable: Of a difference, the true difference that such a test finds significant with probability
            :data:`POWER`, given the observed spread.
    """

    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""
    p: float | None = None
    detectable: float | None = None


def interquartile_mean(strata: Strata) -> Estimate:
    """Mean of the middle half of all scores, each setting resampled by itself.

    Args:
        strata: Scores.
    """

    def statistic(*samples: Floats, axis: int = -1) -> Any:
        return stats.trim_mean(np.concatenate(samples, axis=axis), TRIMMED, axis=axis)

    return _estimate(strata, statistic)


def probability_of_improvement(ours: Strata, theirs: Strata) -> Estimate:
    """Probability that a run of ours scores higher than one of theirs, ties half; the mean over settings.

    Args:
        ours: Scores.
        theirs: Scores in the same settings.
    """
    settings = len(ours)

    def statistic(*samples: Floats, axis: int = -1) -> Any:
        shares = []
        for x, y in zip(samples[:settings], samples[settings:], strict=True):
            u = stats.mannwhitneyu(x, y, axis=axis, method="asymptotic").statistic
            shares.append(u / (x.shape[axis] * y.shape[axis]))
        return np.mean(shares, axis=0)

    return _estimate([*ours, *theirs], statistic)


def paired_difference(ours: Sequence[Mapping[int, float]], theirs: Sequence[Mapping[int, float]]) -> Estimate | None:
    """Mean difference of scores with the same seed, over all pairs, with interval and p value of Student's t.

    Args:
        ours: Seed -> score, for each setting.
        theirs: Seed -> score, in the same settings.

    Returns:
        None if they have no seed in common in a setting.
    """
    pairs: list[float] = []
    for mine, other in zip(ours, theirs, strict=True):
        seeds = sorted(set(mine) & set(other))
        if not seeds:
            return None
        pairs += [mine[seed] - other[seed] for seed in seeds]
    value = float(np.mean(pairs))
    if len(pairs) < 2:
        return Estimate(value, note="no interval: one pair")
    if np.ptp(pairs) < 1e-12:
        return Estimate(value, note="no interval: all differences are equal")
    test = stats.ttest_1samp(pairs, 0.0)
    interval = test.confidence_interval(CONFIDENCE)
    quantiles = stats.t.ppf([(1 + CONFIDENCE) / 2, POWER], len(pairs) - 1)
    detectable = float(quantiles.sum() * stats.sem(pairs))
    return Estimate(value, float(interval.low), float(interval.high), p=float(test.pvalue), detectable=detectable)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p values for their number by Holm's step-down procedure (Holm, 1979).

    Args:
        p_values: Of all comparisons of one family.

    Returns:
        Adjusted p values in the same order: comparisons below 0.05 are significant together.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, number in enumerate(sorted(range(len(p_values)), key=lambda number: p_values[number])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[number]))
        adjusted[number] = largest
    return adjusted


def fisher(ours: tuple[int, int], theirs: tuple[int, int]) -> float:
    """The p value of Fisher's exact test, two-sided.

    Args:
        ours: How many of how many runs of ours.
        theirs: Of theirs.
    """
    table = [[count, total - count] for count, total in (ours, theirs)]
    return float(stats.fisher_exact(table).pvalue)


def mean_band(runs: Floats) -> tuple[Floats, Floats | None, Floats | None]:
    """Mean over runs at every point, and the ends of its interval.

    Args:
        runs: A row per seed, a column per point.

    Returns:
        Mean, lower and upper ends; no ends with one run.
    """
    mean = runs.mean(axis=0)
    if len(runs) < 2:
        return mean, None, None
    interval = _bootstrap([runs], np.mean, axis=0)
    return mean, interval.low, interval.high


def _estimate(samples: Strata, statistic: Callable[..., Any]) -> Estimate:
    value = float(statistic(*samples, axis=-1))
    few = min(map(len, samples))
    if few < 2:
        return Estimate(value, note="no interval: one seed")
    interval = _bootstrap(samples, statistic, axis=-1)
    if np.isclose(interval.low, interval.high, rtol=0, atol=1e-12):
        # Equal scores; or, for a probability, every run of one arm above every run of the other.
        return Estimate(value, note="no interval: all resamples are equal")
    return Estimate(value, float(interval.low), float(interval.high))


def _bootstrap(samples: Strata, statistic: Callable[..., Any], *, axis: int) -> Any:
    return stats.bootstrap(
        samples,
        statistic,
        axis=axis,
        n_resamples=RESAMPLES,
        batch=500,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(0),
    ).confidence_interval
