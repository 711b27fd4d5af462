"""Statistics of the batches of a step, kept from the estimator until verl collects the step's metrics."""

from __future__ import annotations

from collections import deque

from hpo_plugin.algorithm import BatchStatistics
from hpo_plugin.metrics import Observation, observation_metrics, step_metrics

__all__ = ["drain", "drop_last", "record", "record_observation"]

#: The batches of this process, oldest first. The limit is for a trainer that never collects metrics.
_batches: deque[BatchStatistics] = deque(maxlen=1024)
_observations: deque[Observation] = deque(maxlen=1024)


def record(statistics: BatchStatistics) -> None:
    """Keep the statistics of a batch whose advantages were just estimated."""
    _batches.append(statistics)


def record_observation(observation: Observation) -> None:
    """Keep what was observed in a batch (``algorithm.hpo.observe``)."""
    _observations.append(observation)


def drop_last() -> None:
    """Remove the batch that was recorded last."""
    _batches.pop()


def drain() -> dict[str, float]:
    """Return the metrics of all batches since the last call, by their names in verl's log, and remove the batches."""
    metrics = step_metrics(list(_batches)) | observation_metrics(list(_observations))
    _batches.clear()
    _observations.clear()
    return {f"actor/{name}": value for name, value in metrics.items()}
