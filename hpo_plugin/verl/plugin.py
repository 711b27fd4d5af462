"""Entry point ``hpo`` of the group ``verl.plugins``: loaded in every process that imports verl.

This module imports no part of verl. It sets post-import hooks, which run only in a process that imports the modules
concerned. The hook of ``verl.trainer.ppo.core_algos`` registers the estimators and losses (``verl/registration.py``).
The hook of each module of ``verl/seams.py`` replaces one function.

The plugin must not change a run that does not select HPO, so this module raises no exception. It logs an error and
keeps it in :data:`FAILURE`; a run that needs HPO raises it (``registration.require_registered``).
"""

from __future__ import annotations

import logging
from types import ModuleType

#: Why the setup of the plugin failed in this process; None if it succeeded.
FAILURE: str | None = None

CORE_ALGOS = "verl.trainer.ppo.core_algos"

#: The keys of ``seams.SEAMS``. They are repeated here because this module does not import ``seams`` before a hook runs.
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
    logging.getLogger(__name__).error(
        "the setup of hpo_plugin failed. Runs that do not use HPO continue; runs that use it stop", exc_info=error
    )


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
    """Set the hooks. The hook of a module that is already imported runs immediately."""
    try:
        import wrapt

        for module in (*SEAM_MODULES, CORE_ALGOS):
            wrapt.when_imported(module)(_on_import)
    except Exception as error:
        _fail(error)


load()
