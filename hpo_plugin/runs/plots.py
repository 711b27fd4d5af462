"""Plots the curves of a run, as a picture and in the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hpo_plugin.runs.curves import SMOOTHED_OVER, STYLE, smooth
from hpo_plugin.runs.verl_log import Rows, evaluations, step_views

_BLUE, _ORANGE, _GREEN, _RED, _GRAY = "#1f5fa8", "#d4770c", "#2c8a4b", "#b8342f", "#6b7280"


def save_curves(rows: Rows, path: Path, *, title: str, n_test: int) -> None:
    """Write the curves of a run as a picture.

    Args:
        rows: Rows of the run.
        path: A ``.png`` file, which is overwritten.
        title: Title of the picture.
        n_test: Number of held-out problems, for the error bars.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    views, tested = step_views(rows), evaluations(rows)
    steps = [view.step for view in views]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), sharex=True, layout="constrained")
        success, weight, shares, length = axes.flat

        success.set_title("Success")
        rewards = [view.reward for view in views]
        success.plot(steps, rewards, color=_BLUE, alpha=0.25, linewidth=1)
        success.plot(steps, smooth(rewards), color=_BLUE, label=f"training samples (mean of {SMOOTHED_OVER} steps)")
        if tested:
            at, shares_solved = zip(*tested, strict=True)
            errors = [math.sqrt(p * (1 - p) / n_test) for p in shares_solved]
            success.errorbar(
                at, shares_solved, errors, fmt="o", color=_ORANGE, capsize=3, label=f"{n_test} held-out problems"
            )
        success.set_ylim(bottom=0)
        success.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        success.legend(loc="best")

        weight.set_title("α, weight of negative responses")
        weight.plot(steps, [view.alpha for view in views], color=_GREEN)
        weight.set_ylim(0, 1.05)

        shares.set_title("Shares of the responses")
        shares.plot(steps, [view.share_positive for view in views], color=_GREEN, label="positive advantage, p̂⁺")
        shares.plot(steps, [view.share_negative for view in views], color=_RED, label="negative advantage, p̂⁻")
        shares.set_ylim(bottom=0)
        shares.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        shares.legend(loc="best")

        length.set_title("Mean response length (tokens)")
        length.plot(steps, [view.length for view in views], color=_GRAY)
        length.set_ylim(bottom=0)
        for axis in (shares, length):
            axis.set_xlabel("step")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        figure.suptitle(title)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def draw_curves(rows: Rows, *, width: int, color: bool = True) -> str:
    """Return the curves of success and α as text.

    Args:
        rows: Rows of the run.
        width: Width in columns.
        color: Whether to use terminal colors.
    """
    import plotext
    from matplotlib.ticker import MaxNLocator

    views = step_views(rows)
    success = smooth([view.reward for view in views])
    curves = [
        ("success in %: line training samples, ● held-out problems", 14, "blue", 100 * _asarray(success)),
        ("α, weight of negative responses", 11, "green", _asarray([view.alpha for view in views])),
    ]
    steps = _asarray([view.step for view in views])
    tested = evaluations(rows)
    last = max(rows, default=1)
    ticks = [tick for tick in MaxNLocator(6, integer=True).tick_values(0, last) if tick <= last]
    figure = plotext.figure
    parts = []
    for title, height, shade, values in curves:
        figure.clear()
        figure.theme("simple")
        figure.plot_size(max(40, min(width, 100)), height)
        figure.title(title)
        known = ~np.isnan(values)
        if known.any():
            marker = plotext.marker("braille", shade)
            figure.draw(figure.signal(steps[known].tolist(), values[known].tolist(), marker=marker).lines())
        if title.startswith("success"):
            if tested:
                at, solved = zip(*tested, strict=True)
                marker = plotext.marker("●", "red")
                figure.draw(figure.signal(list(at), [100 * share for share in solved], marker=marker))
            highest = max([*values[known].tolist(), *(100 * share for _, share in tested)], default=0.0)
            figure.ruler("y").lim(0, max(10 * math.ceil(1.05 * highest / 10), 10))
        else:
            figure.ruler("y").lim(0, 1)
            figure.label("step", "x")
        figure.ruler("x").lim(0, last)
        figure.ruler("x").ticks(ticks)
        parts.append(figure.build().string(colorless=not color))
    figure.clear()
    return "\n".join(line.rstrip() for line in "\n".join(parts).splitlines())


def _asarray(values: Sequence[float]) -> np.ndarray:
    return np.asarray(values, dtype=float)
