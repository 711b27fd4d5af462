"""The metrics of a step, from the statistics of its batches (``docs/metrics.md``). Each adapter adds its own prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from hpo_plugin.algorithm import BatchStatistics, HystereticAdvantage, adaptive_alpha

__all__ = ["Observation", "observation_metrics", "observe", "step_metrics"]


class Observation(NamedTuple):
    """What A-HPO would count in one batch of a run with any algorithm.

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
        batches: The statistics of each batch that α was computed from: one batch, or in verl's separate_async one for
            each local update.

    Returns:
        Shares and means over all batches. ``alpha`` is the mean; with several batches, ``alpha_update_<k>`` is the α of
        each. No name contains a word (min, max, sum, total) that makes verl's aggregators use another reduction. Empty
        if there are no batches.
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
    """Compute the α of A-HPO, and the number of tokens of each sign, from the advantages of a batch.

    Args:
        result: The result for the whole rollout batch, with one advantage per response and any α.
        lengths: (N,) T_i in tokens.
        alpha_min: α_min of A-HPO.
    """
    positive, negative = (int(lengths[rows].sum()) for rows in (result.advantage > 0, result.advantage < 0))
    alpha = float(adaptive_alpha(result.counts, alpha_min))
    return Observation(result.statistics._replace(alpha=alpha), positive, negative)


def observation_metrics(batches: Sequence[Observation]) -> dict[str, float]:
    """The metrics of one step of an observed run.

    Args:
        batches: The observations of each batch, see :func:`step_metrics`.

    Returns:
        α and the shares of :func:`step_metrics`, with ``hpo/observe/`` instead of ``hpo/``, and the mean length of the
        positive and of the negative responses, if there are any. Empty if there are no batches.
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
