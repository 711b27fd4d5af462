"""The metrics of a step, from what the estimator counted (``docs/metrics.md``); each adapter adds its own prefix."""

from __future__ import annotations

from collections.abc import Sequence

from hpo_plugin.algorithm import BatchStatistics

__all__ = ["step_metrics"]


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
