"""The summary, table, figure and page of ``hpo-plugin preview``."""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

import hpo_plugin
from hpo_plugin.preview.rollouts import Rollouts
from hpo_plugin.preview.steps import StepPreview
from hpo_plugin.runs.curves import SMOOTHED_OVER, STYLE, smooth

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Preview", "picture", "sentences", "table", "web_page"]

#: Rows of the table.
TABLE_ROWS = 12
#: Above this α, the summary calls A-HPO close to the same loss without α.
NEARLY_ONE = 0.9

_BLUE, _ORANGE, _GREEN, _RED, _GRAY = "#1f5fa8", "#d4770c", "#2c8a4b", "#b8342f", "#6b7280"


@dataclass(frozen=True)
class Preview:
    """A run's rollouts, computed.

    Attributes:
        rollouts: What was read; its rows are no longer needed.
        steps: In their order.
        alpha: α of HPO.
        alpha_mins: Values of α_min; the first one is that of the table and the sentences.
    """

    rollouts: Rollouts
    steps: Sequence[StepPreview]
    alpha: float
    alpha_mins: tuple[float, ...]


def _mean(steps: Sequence[StepPreview], value: Callable[[StepPreview], float]) -> float:
    values = [found for found in map(value, steps) if not math.isnan(found)]
    return float(np.mean(values)) if values else math.nan


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.0f} %"


def sentences(preview: Preview) -> list[str]:
    """Return the sentences of the summary."""
    run, lowest = preview.steps, preview.alpha_mins[0]
    steps = [step for step in run if step.has_signal]
    silent = _percent(_mean(run, lambda step: step.degenerate_groups / step.groups))
    if not steps:
        nothing = (
            "No response has a signal: in every group, all rewards are equal. No algorithm learns from these rollouts."
        )
        if any(step.groups < step.responses for step in run):
            return [nothing]
        group = preview.rollouts.columns.group
        return [
            nothing,
            f"Every group has a single response. If {group} does not identify the prompt, pass --group NAME.",
        ]
    early = steps[: min(40, max(1, len(steps) // 3))]
    first = (
        "In the only step"
        if len(steps) == 1
        else f"In the first {len(early)} steps"
        if len(early) > 1
        else "In the first step"
    )
    negative = _percent(_mean(early, lambda step: step.share_negative / (step.share_positive + step.share_negative)))
    low, high = np.quantile([step.alpha[lowest] for step in early], [0.05, 0.95])
    weights = f"{low:.2f}" if high - low < 0.005 else f"{low:.2f} to {high:.2f}"
    said = [
        f"{first}, {negative} of the responses with a signal have a negative advantage. A-HPO with α_min = {lowest:g} "
        f"would have multiplied these advantages by {weights}.",
        f"{silent} of the groups have no signal, because all their rewards are equal. α does not affect them.",
    ]
    alphas = [step.alpha[lowest] for step in steps]
    smoothed = smooth(alphas)
    agree = next((i for i in range(len(steps), 0, -1) if smoothed[i - 1] <= NEARLY_ONE), 0)
    near = "A-HPO is close to the same loss without α"
    over = f" (mean of {SMOOTHED_OVER} steps)" if len(steps) > 1 else ""
    if agree == 0:
        said.append(f"α is above {NEARLY_ONE:g} in the whole run{over}, so {near}.")
    elif agree < len(steps):
        said.append(f"From step {steps[agree].step}, α stays above {NEARLY_ONE:g}{over}, so {near}.")
    else:
        said.append(f"At the end, α is {smoothed[-1]:.2f}{over}.")
    # α is computed in fp32.
    if at_limit := sum(alpha <= lowest + 1e-6 for alpha in alphas):
        said.append(f"α equals its lower limit α_min = {lowest:g} in {at_limit} of {len(steps)} steps with a signal.")
    ratio = _mean(steps, lambda step: step.length_negative / step.length_positive if step.length_positive else math.nan)
    if not math.isnan(ratio):
        before, after = (
            _percent(_mean(steps, share))
            for share in (lambda step: step.update_share(1.0), lambda step: step.update_share(step.alpha[lowest]))
        )
        said.append(
            f"Negative responses are {ratio:.2f} times as long as positive ones ({preview.rollouts.unit}). If every "
            f"token counts equally, their share of the update is {before} without α and {after} with A-HPO."
        )
    shaped = _mean(steps, lambda step: step.shaped_positive)
    if not math.isnan(shaped):
        said.append(
            f"{_percent(shaped)} of the positive responses are in groups without a success (acc). The signal of these "
            "groups comes from a shaped reward."
        )
    said.append(
        "The preview applies HPO to these rollouts. It does not predict the rewards of a run with HPO: a different "
        "update gives a different policy and different rollouts."
    )
    return said


def table(preview: Preview) -> Table:
    """Return the run as a table of at most :data:`TABLE_ROWS` rows, each with means over its steps."""
    from rich.table import Table

    lowest = preview.alpha_mins[0]
    view = Table(
        box=None,
        pad_edge=False,
        caption=f"Means over the steps. T: length in {preview.rollouts.unit}. Last three columns: share of the "
        f"negative responses in Σ T|A| without α, with HPO's α, and with A-HPO's α (α_min = {lowest:g})",
        caption_justify="left",
    )
    measured = ("steps", "no signal", "p̂⁺", "p̂⁻", "α", "T +", "T −")
    for name in (*measured, "α = 1", f"α = {preview.alpha:g}", "A-HPO"):
        view.add_column(name, justify="right", no_wrap=True)
    for index in np.array_split(np.arange(len(preview.steps)), min(TABLE_ROWS, len(preview.steps))):
        part = [preview.steps[i] for i in index]
        name = str(part[0].step) if len(part) == 1 else f"{part[0].step}–{part[-1].step}"
        lengths = [_mean(part, lambda s: s.length_positive), _mean(part, lambda s: s.length_negative)]
        view.add_row(
            name,
            _percent(_mean(part, lambda s: s.degenerate_groups / s.groups)),
            _percent(_mean(part, lambda s: s.share_positive)),
            _percent(_mean(part, lambda s: s.share_negative)),
            f"{_mean(part, lambda s: s.alpha[lowest]):.2f}",
            *("–" if math.isnan(length) else f"{length:,.0f}" for length in lengths),
            _percent(_mean(part, lambda s: s.update_share(1.0))),
            _percent(_mean(part, lambda s: s.update_share(preview.alpha))),
            _percent(_mean(part, lambda s: s.update_share(s.alpha[lowest]))),
        )
    return view


def picture(preview: Preview) -> bytes:
    """Return the curves of the run as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import PercentFormatter

    steps, lowest = preview.steps, preview.alpha_mins[0]
    at = [step.step for step in steps]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), sharex=True, layout="constrained")
        shares, alpha, update, length = axes.flat

        def line(axis: object, value: Callable[[StepPreview], float], color: str, label: str, style: str = "-") -> None:
            values = [value(step) for step in steps]
            # One step, or a few, are seen as points only.
            marker = "o" if len(steps) <= SMOOTHED_OVER else ""
            axis.plot(at, smooth(values), style, color=color, marker=marker, label=label)  # type: ignore[attr-defined]

        shares.set_title("Shares of the responses")
        line(shares, lambda s: s.share_positive, _GREEN, "positive, p̂⁺")
        line(shares, lambda s: s.share_negative, _RED, "negative, p̂⁻")
        line(shares, lambda s: 1 - s.share_positive - s.share_negative, _GRAY, "no signal", ":")

        alpha.set_title("α that A-HPO would have used")
        for alpha_min, color in zip(preview.alpha_mins, itertools.cycle((_BLUE, _ORANGE, _GREEN, _RED)), strict=False):
            line(alpha, lambda s, low=alpha_min: s.alpha[low], color, f"α_min = {alpha_min:g}")  # type: ignore[misc]

        update.set_title("Share of the update from negative responses")
        line(update, lambda s: s.update_share(1.0, per_response=True), _GRAY, "GRPO: divided by own length", ":")
        line(update, lambda s: s.update_share(1.0), _GRAY, "divided by mean length or constant, α = 1")
        line(update, lambda s: s.update_share(preview.alpha), _ORANGE, f"HPO, α = {preview.alpha:g}")
        line(update, lambda s: s.update_share(s.alpha[lowest]), _BLUE, f"A-HPO, α_min = {lowest:g}")

        length.set_title(f"Mean length ({preview.rollouts.unit})")
        line(length, lambda s: s.length_positive, _GREEN, "positive")
        line(length, lambda s: s.length_negative, _RED, "negative")
        line(length, lambda s: s.length, _GRAY, "all", ":")

        for axis in (shares, update):
            axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        for axis in (shares, alpha, update):
            axis.set_ylim(0, 1.03)
        length.set_ylim(bottom=0)
        for axis in (update, length):
            axis.set_xlabel("step")
        for axis in axes.flat:
            axis.legend(loc="best", fontsize=8)
        picture = io.BytesIO()
        figure.savefig(picture, dpi=130, format="png")
        plt.close(figure)
    return picture.getvalue()


def web_page(preview: Preview, drawn: bytes, sources: Sequence[str]) -> str:
    """Return a self-contained HTML page with summary, curves, table and skipped rows.

    Args:
        preview: The run.
        drawn: Its :func:`picture`.
        sources: What was read, as the user named it.
    """
    import jinja2

    view = table(preview)
    cells = [[str(cell) for cell in column.cells] for column in view.columns]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hpo_plugin.preview"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("page.html.j2").render(
        sources=sources,
        sentences=sentences(preview),
        picture=base64.b64encode(drawn).decode(),
        heads=[str(column.header) for column in view.columns],
        rows=list(zip(*cells, strict=True)),
        caption=view.caption,
        rollouts=preview.rollouts,
        columns=preview.rollouts.columns,
        version=hpo_plugin.__version__,
        smoothed=SMOOTHED_OVER,
        steps=len(preview.steps),
    )
