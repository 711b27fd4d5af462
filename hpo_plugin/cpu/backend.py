"""Import this module in verl's workers with ``actor_rollout_ref.model.external_lib=hpo_plugin.cpu.backend``.

verl imports it wherever it builds the model config: in the trainer process and in every worker, which needs a process
group.
"""

import os

from hpo_plugin.cpu.checks import require_cpu_platform

require_cpu_platform()

# Set by verl's RayWorkerGroup in its workers: those that train, and those of a separate rollout.
if os.environ.get("WG_BACKEND") == "ray":
    from hpo_plugin.cpu.process_group import initialize_gloo

    initialize_gloo()
