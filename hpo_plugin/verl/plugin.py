"""Entry point ``hpo`` of the group ``verl.plugins``: loaded in every process that imports verl.

It imports no part of verl. Post-import hooks do the work when, and only when, a process imports the module concerned:
``verl.trainer.ppo.core_algos`` gets the estimators and losses (``verl/registration.py``), and the modules of
``verl/seams.py`` one function each.

A run that does not select HPO must not notice any of it. So nothing is raised here: an error is logged, kept in
:data:`FAILURE`, and raised by whatever needs HPO (``registration.require_registered``).
"""

from __future__ import annotations

import logging
from types import ModuleType

#: Why the plugin could not be set up completely in this process; None if it was.
FAILURE: str | None = None

CORE_ALGOS = "verl.trainer.ppo.core_algos"

#: The keys of ``seams.SEAMS``, which is not imported before it is needed.
SEAM_MODULES = (
    "verl.utils.config",
    "verl.trainer.main_ppo",
    "verl.trainer.ppo.metric_utils",
    "verl.trainer.ppo.ray_trainer",
    "verl.trainer.ppo.v1.utils",
)


def _fail(error: Exception) -> None:
    global FAILURE
    FAILURE = FAILURE or f"{type(error).__name__}: {error}"
    logging.getLogger(__name__).error("hpo_plugin could not be set up: runs that need it stop", exc_info=error)


def _on_import(module: ModuleType) -> None:
    try:
        if module.__name__ == CORE_ALGOS:
            from hpo_plugin import variants
            from hpo_plugin.verl import registration

            registration.register(module)
            variants.on_registration(lambda: registration.register(module))
        else:
            from hpo_plugin.verl import seams

            seams.replace(module)
    except Exception as error:
        _fail(error)


def load() -> None:
    """Set the hooks. Where a module is already imported, its hook runs at once."""
    try:
        import wrapt

        for module in (*SEAM_MODULES, CORE_ALGOS):
            wrapt.when_imported(module)(_on_import)
    except Exception as error:
        _fail(error)


load()
