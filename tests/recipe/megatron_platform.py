"""``actor_rollout_ref.model.external_lib`` of a run with verl's Megatron engine on CPU: the CPU backend, and the shim.

verl imports it in the driver, too, which trains nothing.
"""

import os

from hpo_plugin.cpu import backend  # noqa: F401

if os.environ.get("WG_BACKEND") == "ray":
    import megatron_on_cpu

    megatron_on_cpu.install()
