"""Smoothing and style of all plots of training curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

#: Number of steps of the trailing mean.
SMOOTHED_OVER = 5

#: Settings of matplotlib.
STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    # A title with two "$" is text.
    "text.parse_math": False,
}


def smooth(values: Sequence[float], over: int = SMOOTHED_OVER) -> list[float]:
    """Trailing mean over up to ``over`` values, without NaNs."""
    means = []
    for end in range(1, len(values) + 1):
        window = [value for value in values[max(0, end - over) : end] if not math.isnan(value)]
        means.append(sum(window) / len(window) if window else math.nan)
    return means
