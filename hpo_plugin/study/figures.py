"""The figures of a report. The same numbers give the same bytes under one version of matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hpo_plugin.files import atomic_write
from hpo_plugin.runs.curves import STYLE
from hpo_plugin.study.statistics import Estimate

#: Okabe and Ito's colors, which color-blind readers can distinguish. Without yellow, which is too light for lines.
_COLORS = ("#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f")
#: Theirs too, kept for the arm that is compared with the others.
STRONG = "#d55e00"
#: What the page's text color stands in for.
_INK = "#010203"
_SVG_STYLE = {**STYLE, "svg.fonttype": "none", "svg.hashsalt": "hpo_plugin"}

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """One line with its band.

    Attributes:
        title: In the legend.
        color: Of line and band.
        x: Points.
        mean: Values.
        low: Lower end of the band; None without a band.
        high: Upper end.
        style: Of the line, in matplotlib's letters.
        strong: Whether the line is drawn thicker.
    """

    title: str
    color: str
    x: Floats
    mean: Floats
    low: Floats | None = None
    high: Floats | None = None
    style: str = "-"
    strong: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        ylabel: What is drawn, with its unit.
        series: The lines.
        top: Upper limit of the axis; None to fit.
    """

    ylabel: str
    series: Sequence[Series]
    top: float | None = None


def colors(count: int, *, ordered: bool) -> list[str]:
    """Colors of arms.

    Args:
        count: How many.
        ordered: Whether they are values of one quantity.
    """
    if ordered:
        shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, count))
        return [matplotlib.colors.to_hex(shade) for shade in shades]
    return [_COLORS[index % len(_COLORS)] for index in range(count)]


def line_figure(title: str, xlabel: str, panels: Sequence[Panel]) -> Figure:
    """Draw panels one above the other, over one axis."""
    with matplotlib.rc_context(_SVG_STYLE):
        figure = Figure(figsize=(6.4, 2.3 + 1.7 * len(panels)), layout="constrained")
        all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, panel in zip(all_axes, panels, strict=True):
            for line in panel.series:
                axes.plot(
                    line.x,
                    line.mean,
                    line.style,
                    color=line.color,
                    linewidth=2.4 if line.strong else 1.4,
                    zorder=3 if line.strong else 2,
                    label=line.title,
                )
                if line.low is not None and line.high is not None:
                    axes.fill_between(line.x, line.low, line.high, color=line.color, alpha=0.15, linewidth=0)
            axes.set_ylabel(panel.ylabel)
            axes.set_ylim(0, panel.top)
        all_axes[0].set_title(title)
        all_axes[-1].set_xlabel(xlabel)
        all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        _add_legend(figure, [handle for axes in all_axes for handle in axes.get_legend_handles_labels()[0]])
        return figure


def _add_legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """A legend below the axes, of as many columns as fit the figure: matplotlib crops one that is too wide."""
    for columns in (3, 2, 1):
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def score_figure(
    title: str, rows: Sequence[tuple[str, str, Estimate, Sequence[float]]], xlabel: str, *, signed: bool = False
) -> Figure:
    """Draw a score for each arm: the estimate with its interval, and each seed as a dot.

    Args:
        title: Title of the figure.
        rows: For each arm: title, color, estimate, and score of each seed.
        xlabel: Label of the axis.
        signed: Whether the scores are differences; the figure then has a line at 0.
    """
    with matplotlib.rc_context(_SVG_STYLE):
        figure = Figure(figsize=(6.4, 1.2 + 0.42 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for place, (_, color, estimate, seeds) in enumerate(rows):
            axes.plot(seeds, [place + 0.22] * len(seeds), "o", color=color, alpha=0.5, markersize=4, markeredgewidth=0)
            axes.plot([estimate.value], [place], "D", color=color, markersize=6)
            if estimate.low is not None and estimate.high is not None:
                axes.plot([estimate.low, estimate.high], [place, place], "-", color=color, linewidth=2.4)
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        if signed:
            axes.axvline(0, color="#7f7f7f", linewidth=1, zorder=0)
        else:
            axes.set_xlim(left=0)
        axes.set_xlabel(xlabel)
        axes.set_title(title)
        return figure


def save(figure: Figure, stem: Path, *, png: bool) -> str:
    """Write a figure.

    Args:
        figure: The figure.
        stem: Path without suffix: ``.svg``, and ``.png`` if asked for.
        png: Whether to write that too.

    Returns:
        The SVG for a page: no background, no size of its own, and text and axes in the page's text color.
    """
    with matplotlib.rc_context(_SVG_STYLE):
        if png:
            picture = io.BytesIO()
            figure.savefig(picture, format="png", dpi=130, metadata={"Software": None})
            atomic_write(stem.with_suffix(".png"), picture.getvalue())
        svg = _svg(figure)
        atomic_write(stem.with_suffix(".svg"), svg.encode())
        _paint(figure)
        return _for_page(_svg(figure, transparent=True), stem.name)


def _svg(figure: Figure, *, transparent: bool = False) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, transparent=transparent)
    # Without the spaces that matplotlib leaves at the end of lines.
    return "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())


def _paint(figure: Figure) -> None:
    """Give everything that is not data the color that stands for the page's."""
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        texts += [axes.title, axes.xaxis.label, axes.yaxis.label]
        axes.tick_params(colors=_INK)
        for spine in axes.spines.values():
            spine.set_color(_INK)
    # The title stands at the left, where it is another text than `axes.title`.
    texts += [axes._left_title for axes in figure.axes if hasattr(axes, "_left_title")]
    for text in texts:
        text.set_color(_INK)


def _for_page(svg: str, prefix: str) -> str:
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)height="[^"]*"', r"\1", svg, count=1)
    # Names must be unique in a page.
    return re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
