"""Makes the rollout backend ``hf_cpu`` known to verl.

verl has a register function for the replica (trainer side) but none for the adapter (worker side), only the private
dictionary ``verl.workers.rollout.base._ROLLOUT_REGISTRY``. That dictionary is the one private name the CPU backend
writes to.
"""

from hpo_plugin.cpu.checks import ROLLOUT_NAME

ADAPTER = "hpo_plugin.cpu.rollout.HFServerAdapter"


def _load_replica() -> type:
    from hpo_plugin.cpu.rollout import HFReplica

    return HFReplica


def register_rollout() -> None:
    """Register replica and adapter under ``actor_rollout_ref.rollout.name=hf_cpu``.

    Raises:
        RuntimeError: verl's private registry of adapters is not where this version of the backend expects it.
    """
    from verl.workers.rollout import base, replica

    registry = getattr(base, "_ROLLOUT_REGISTRY", None)
    if not isinstance(registry, dict) or ("vllm", "async") not in registry:
        import verl

        raise RuntimeError(
            f"verl {verl.__version__} keeps its rollout adapters elsewhere: "
            "verl.workers.rollout.base._ROLLOUT_REGISTRY is not a dictionary with the key ('vllm', 'async'). "
            "The CPU backend is written for verl 0.9.1; install verl==0.9.1"
        )
    registry[(ROLLOUT_NAME, "async")] = ADAPTER
    replica.RolloutReplicaRegistry.register(ROLLOUT_NAME, _load_replica)
