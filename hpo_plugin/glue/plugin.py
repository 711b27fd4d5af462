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


def install() -> None:
    """Set the hooks. Where a module is already imported, its hook runs at once."""
    import wrapt

    wrapt.when_imported("verl.trainer.ppo.core_algos")(_on_core_algos)
    wrapt.when_imported("verl.utils.config")(_on_config)
    wrapt.when_imported("verl.workers.engine_workers")(_on_engine_workers)


def load() -> None:
    """Install, or keep the reason why not in :data:`FAILURE`."""
    global FAILURE
    try:
        install()
    except Exception as error:
        FAILURE = f"{type(error).__name__}: {error}"
        logging.getLogger(__name__).exception(
            "hpo_plugin could not be loaded into verl; hpo and ahpo are not available"
        )


load()
