"""From the estimator to verl's log: what each call of the estimator counted, until verl collects the step's metrics."""

from __future__ import annotations

from collections import deque

from hpo_plugin.algorithm import BatchStatistics

__all__ = ["drain", "drop_last", "record", "step_metrics"]

#: Of this process, oldest first. The limit is for a trainer that never collects metrics.
_batches: deque[BatchStatistics] = deque(maxlen=1024)


def record(statistics: BatchStatistics) -> None:
    """Keep the statistics of a batch whose advantages were just estimated."""
    _batches.append(statistics)


def drop_last() -> None:
    """Forget the batch that was recorded last."""
    _batches.pop()


def drain() -> dict[str, float]:
    """The metrics of all batches since the last call, by their names in verl's log; empty if there were none."""
    batches = list(_batches)
    _batches.clear()
    return step_metrics(batches)


def step_metrics(batches: list[BatchStatistics]) -> dict[str, float]:
    """The metrics of one global step (``docs/metrics.md``).

    Args:
        batches: one for each call of the estimator in the step: one, but in separate_async one for each local update.

    Returns:
        Shares and means over all batches together. ``alpha`` is the mean; with several batches, each α stands beside
        it. No name contains a word (min, max, sum, total) by which verl's aggregators choose another reduction.
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
    return {f"actor/{key}": float(value) for key, value in metrics.items()}
