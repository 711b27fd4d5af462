"""Entry point ``hpo`` of the group ``verl.plugins``: loaded in every process that imports verl.

It imports no part of verl. Post-import hooks do the work when, and only when, a process imports the module concerned:

====================================  ===============================================================
when this module is imported          this happens
====================================  ===============================================================
``verl.trainer.ppo.core_algos``       estimators and losses are registered (``glue/registration.py``)
``verl.utils.config``                 the arm is checked before verl's own check (``glue/seams.py``)
``verl.workers.engine_workers``       the actor's worker counts signs once a step (``glue/seams.py``)
====================================  ===============================================================

verl logs an exception raised here at DEBUG and drops the module (verl/__init__.py), and the reason with it. So nothing
is raised: an error is logged as one, kept in :data:`FAILURE`, and raised by whatever needs HPO
(``registration.require_registered``). An error inside a later hook surfaces where the module is imported.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType

FAILURE: str | None = None
"""Why the plugin could not load in this process; None if it did."""


def _on_core_algos(module: ModuleType) -> None:
    from hpo_plugin.glue import registration

    registration.register(module)


def _on_config(module: ModuleType) -> None:
    from hpo_plugin.glue import seams

    seams.check_arm_before_run(module)


def _on_engine_workers(module: ModuleType) -> None:
    from hpo_plugin.glue import seams

    seams.use_hysteresis_worker(module)


HOOKS: dict[str, Callable[[ModuleType], None]] = {
    # First, because it is the one that stops a run whose registration failed.
    "verl.utils.config": _on_config,
    "verl.trainer.ppo.core_algos": _on_core_algos,
    "verl.workers.engine_workers": _on_engine_workers,
}


def _set_hook(module: str, hook: Callable[[ModuleType], None]) -> None:
    import wrapt

    wrapt.when_imported(module)(hook)


def load() -> None:
    """Set the hooks; keep the first reason why one could not be set in :data:`FAILURE`, and set the others.

    Where a module is already imported, its hook runs at once: a name that another package holds is found here.
    """
    global FAILURE
    for module, hook in HOOKS.items():
        try:
            _set_hook(module, hook)
        except Exception as error:
            FAILURE = FAILURE or f"{type(error).__name__}: {error}"
            logging.getLogger(__name__).exception(
                "hpo_plugin could not be loaded into verl; hpo and ahpo are not available"
            )


load()
