"""Registers the rollout backend ``hf_cpu`` in verl.

verl has a function that registers the replica (trainer side). For the adapter (worker side) it has only the private
dictionary ``verl.workers.rollout.base._ROLLOUT_REGISTRY``. The CPU backend writes to no other private name.
"""

from hpo_plugin.cpu.checks import ROLLOUT_NAME

ADAPTER = "hpo_plugin.cpu.rollout.HFServerAdapter"


def _load_replica() -> type:
    from hpo_plugin.cpu.rollout import HFReplica

    return HFReplica


def register_rollout() -> None:
    """Register replica and adapter for ``actor_rollout_ref.rollout.name=hf_cpu``.

    Raises:
        RuntimeError: This version of verl does not have the private registry of adapters.
    """
    from verl.workers.rollout import base, replica

    registry = getattr(base, "_ROLLOUT_REGISTRY", None)
    if not isinstance(registry, dict) or ("vllm", "async") not in registry:
        import verl

        raise RuntimeError(
            f"the CPU backend does not support verl {verl.__version__}: "
            "verl.workers.rollout.base._ROLLOUT_REGISTRY is not a dictionary with the key ('vllm', 'async'); "
            "install verl==0.9.1"
        )
    registry[(ROLLOUT_NAME, "async")] = ADAPTER
    replica.RolloutReplicaRegistry.register(ROLLOUT_NAME, _load_replica)
