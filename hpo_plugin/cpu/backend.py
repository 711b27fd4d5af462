"""Import this module in verl's workers with ``actor_rollout_ref.model.external_lib=hpo_plugin.cpu.backend``.

verl imports it wherever it builds the model config: in the trainer process (which needs the rollout replica) and in
every worker (which also needs the engine, the rollout adapter and a process group). The engine is registered when
verl's own FSDP engine is imported, so that processes which train nothing do not pay for that import.
"""

import os

import wrapt

from hpo_plugin.cpu.checks import require_cpu_platform

require_cpu_platform()


@wrapt.when_imported("verl.workers.engine.fsdp.transformer_impl")
def _register_engine(_module: object) -> None:
    from hpo_plugin.cpu import engine  # noqa: F401


@wrapt.when_imported("verl.workers.rollout.base")
def _register_rollout(_module: object) -> None:
    from hpo_plugin.cpu.registration import register_rollout

    register_rollout()


# Set by verl's RayWorkerGroup in the processes that train, and nowhere else.
if os.environ.get("WG_BACKEND") == "ray":
    from hpo_plugin.cpu.process_group import initialize_gloo

    initialize_gloo()
