"""From the estimator to verl's log: what each call of the estimator counted, until verl collects the step's metrics."""

from __future__ import annotations

from collections import deque

from hpo_plugin.algorithm import BatchStatistics
from hpo_plugin.metrics import step_metrics

__all__ = ["drain", "drop_last", "record"]

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
    return {f"actor/{name}": value for name, value in step_metrics(batches).items()}
