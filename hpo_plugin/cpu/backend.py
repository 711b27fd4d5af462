"""Initializes the CPU backend in verl's workers: ``actor_rollout_ref.model.external_lib=hpo_plugin.cpu.backend``.

verl imports this module when it constructs the model config: in the trainer process and in every worker. Workers need a
process group.
"""

import os

from hpo_plugin.cpu.checks import require_cpu_platform

require_cpu_platform()

# verl's RayWorkerGroup sets this variable in its workers: those that train, and those of a separate rollout.
if os.environ.get("WG_BACKEND") == "ray":
    from hpo_plugin.cpu.process_group import initialize_gloo

    initialize_gloo()
