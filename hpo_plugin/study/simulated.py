"""Training a cell with the simulator, in a process that trains one cell after another.

Importing verl takes longer than a cell, so the processes stay.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def simulators(count: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of processes for :func:`simulate_cell`; they end with the block, at once.

    Args:
        count: Most processes. None is started before it has a cell.
    """
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield pool
    finally:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        pool.shutdown(cancel_futures=True)


def simulate_cell(config_name: str, overrides: Sequence[str], environment: Mapping[str, str], metrics: Path) -> None:
    """Train, and write what verl's file logger would.

    Args:
        config_name: The trainer's config.
        overrides: Hydra overrides.
        environment: What verl reads when it is imported.
        metrics: The file of metrics; a line is added after each step.

    Raises:
        ConfigError: The simulator does not implement the config.
        ValueError: Hydra cannot compose it.
    """
    os.environ.update(environment)
    import torch

    # verl's plugins register estimators and losses.
    import verl  # noqa: F401

    from hpo_plugin.check.compose import compose
    from hpo_plugin.simulator.loop import simulate

    torch.set_num_threads(1)
    config, finding = compose(config_name, overrides)
    if config is None:
        raise ValueError(f"{finding.found}: {finding.remedy}")
    with metrics.open("w", encoding="utf-8") as file:
        for step, values in simulate(config):
            file.write(json.dumps({"step": step, "data": values}) + "\n")
            file.flush()
