"""The ``worker_process_setup_hook``, which Ray calls in every worker process of a run."""

from __future__ import annotations

from types import ModuleType

import wrapt

__all__ = ["MAKER", "METHOD", "install"]

#: The module of OpenRLHF whose class computes the advantages of a rollout batch, and the method that does.
MAKER, METHOD = "openrlhf.trainer.ppo_utils.experience_maker", "RemoteExperienceMaker.compute_advantages_and_returns"


def install() -> None:
    """Apply α in this process once it imports OpenRLHF's experience maker."""
    wrapt.register_post_import_hook(_wrap, MAKER)


def _wrap(module: ModuleType) -> None:
    from hpo_plugin.openrlhf.experience import compute_advantages_and_returns

    wrapt.wrap_function_wrapper(module, METHOD, compute_advantages_and_returns)
