"""The metrics of a step, from what the estimator counted (``docs/metrics.md``); each adapter adds its own prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from hpo_plugin.algorithm import BatchStatistics, HystereticAdvantage, adaptive_alpha

__all__ = ["Observation", "observation_metrics", "observe", "step_metrics"]


class Observation(NamedTuple):
    """What A-HPO would count in one batch, whichever algorithm updates the model.

    Attributes:
        statistics: The statistics of the batch; ``alpha`` is A-HPO's.
        tokens_positive: Σ T_i over responses with A > 0.
        tokens_negative: Σ T_i over responses with A < 0.
    """

    statistics: BatchStatistics
    tokens_positive: int
    tokens_negative: int


def step_metrics(batches: Sequence[BatchStatistics]) -> dict[str, float]:
    """The metrics of one step.

    Args:
        batches: One for each batch that α was computed of: one, but in verl's separate_async one for each local update.

    Returns:
        Shares and means over all batches together. ``alpha`` is the mean; with several batches, each α stands beside
        it. No name contains a word (min, max, sum, total) by which verl's aggregators choose another reduction. Empty
        without batches.
    """
    if not batches:
        return {}
    positive, negative, responses, groups, degenerate, tokens, abs_advantage_positive, abs_advantage_negative = (
        sum(column) for column in list(zip(*batches, strict=True))[1:]
    )
    responses, total = max(responses, 1), abs_advantage_positive + abs_advantage_negative
    metrics = {
        "hpo/alpha": sum(batch.alpha for batch in batches) / len(batches),
        "hpo/share_positive": positive / responses,
        "hpo/share_negative": negative / responses,
        "hpo/response_length": tokens / responses,
        "hpo/abs_advantage_share_positive": abs_advantage_positive / total if total else 0.0,
        "hpo/abs_advantage_share_negative": abs_advantage_negative / total if total else 0.0,
    }
    if groups:
        metrics["hpo/share_degenerate_groups"] = degenerate / groups
    if len(batches) > 1:
        metrics |= {f"hpo/alpha_update_{k}": batch.alpha for k, batch in enumerate(batches, 1)}
    return {key: float(value) for key, value in metrics.items()}


def observe(result: HystereticAdvantage, lengths: Tensor, alpha_min: float) -> Observation:
    """Read the α of A-HPO, and the tokens of each sign, off a batch's advantages; nothing is changed.

    Args:
        result: Of the whole rollout batch, with one advantage a response; whichever α it has.
        lengths: (N,) T_i in tokens.
        alpha_min: α_min of A-HPO.
    """
    positive, negative = (int(lengths[rows].sum()) for rows in (result.advantage > 0, result.advantage < 0))
    alpha = float(adaptive_alpha(result.counts, alpha_min))
    return Observation(result.statistics._replace(alpha=alpha), positive, negative)


def observation_metrics(batches: Sequence[Observation]) -> dict[str, float]:
    """The metrics of one step of a run that is observed.

    Args:
        batches: As for :func:`step_metrics`.

    Returns:
        α and the shares of :func:`step_metrics` with ``hpo/observe/`` in place of ``hpo/``, and the mean length of the
        positive and of the negative responses, where there are any. Empty without batches.
    """
    logged = step_metrics([batch.statistics for batch in batches])
    names = [name for name in logged if name.startswith(("hpo/alpha", "hpo/share_"))]
    metrics = {f"hpo/observe/{name.removeprefix('hpo/')}": logged[name] for name in names}
    for sign in ("positive", "negative"):
        responses = sum(getattr(batch.statistics, sign) for batch in batches)
        if responses:
            tokens = sum(getattr(batch, f"tokens_{sign}") for batch in batches)
            metrics[f"hpo/observe/response_length_{sign}"] = tokens / responses
    return metrics
