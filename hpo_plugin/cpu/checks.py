"""Checks the config and the environment of a run on the CPU backend, before the run starts a process."""

import os
from importlib.util import find_spec

from omegaconf import DictConfig, OmegaConf

#: ``actor_rollout_ref.rollout.name`` of the rollout of the CPU backend.
ROLLOUT_NAME = "hf_cpu"
# Logical CPUs that verl reserves for each training rank (verl/single_controller/ray/base.py, max_colocate_count) and
# for each rank of a separate rollout (RolloutReplica.init_standalone).
CPUS_PER_RANK = 3
CPUS_PER_SEPARATE_RANK = 2

# Logical CPUs for verl's other actors, each of which holds one during its start.
RAY_CPU_SLACK = 3

# One-step-off: task runner. Fully-async: task runner, trainer, rollouter and message queue (num_cpus of their
# ray.remote).
ONE_STEP_OFF_CPUS = 10
FULLY_ASYNC_CPUS = 1 + 10 + 10 + 2

# A few more than the minimum, so that small changes of a config do not need another value.
DEFAULT_CPUS = 12

# The third key is that of the SFT trainer.
STRATEGY_KEYS = ("actor_rollout_ref.actor.strategy", "actor_rollout_ref.ref.strategy", "engine.strategy")


def require_cpu_platform() -> None:
    """Raise unless ``VERL_PLATFORM=cpu`` is set in the environment.

    Raises:
        RuntimeError: ``VERL_PLATFORM`` is not set, or names another platform.
    """
    value = os.environ.get("VERL_PLATFORM")
    if (value or "").strip().lower() != "cpu":
        raise RuntimeError(
            f"VERL_PLATFORM is {value!r}, but the config uses the CPU backend. Set VERL_PLATFORM=cpu in the "
            "environment of the command (verl reads it in every process), or use a config without hpo/backend."
        )


def require_fsdp2(strategy: str, key: str = "actor_rollout_ref.actor.strategy") -> None:
    """Raise unless the training strategy is FSDP2, the only one that supports CPU tensors.

    Args:
        strategy: Value of the config key.
        key: The config key, for the message.

    Raises:
        ValueError: ``strategy`` is not ``"fsdp2"``.
    """
    if strategy != "fsdp2":
        raise ValueError(f"{key}={strategy} is not supported by the CPU backend. Set {key}=fsdp2.")


def require_vllm() -> None:
    """Raise unless vLLM can be imported.

    Raises:
        ModuleNotFoundError: vLLM is not installed; the message has the command that installs its CPU build.
    """
    if find_spec("vllm") is None:
        raise ModuleNotFoundError(
            "actor_rollout_ref.rollout.name=vllm, but vLLM is not installed. Install it with `make install-vllm` (see "
            "docs/cpu.md), or use the default rollout, hpo/cpu_rollout=hf."
        )


def check_config(config: DictConfig) -> None:
    """Check a whole verl config for the CPU backend.

    Args:
        config: verl's root config.

    Raises:
        RuntimeError: ``VERL_PLATFORM`` is not ``cpu``.
        ModuleNotFoundError: The rollout is vLLM, and vLLM is not installed.
        ValueError: A strategy other than fsdp2, a setting that the rollout does not support, or more ranks than Ray's
            logical GPUs or CPUs allow.
    """
    require_cpu_platform()
    if OmegaConf.select(config, "actor_rollout_ref.rollout.name") == "vllm":
        require_vllm()
    for key in STRATEGY_KEYS:
        strategy = OmegaConf.select(config, key)
        if strategy is not None:
            require_fsdp2(strategy, key)
    ranks, separate = _training_ranks(config), _separate_ranks(config)
    reshard = "actor_rollout_ref.actor.fsdp_config.reshard_after_forward"
    if separate and OmegaConf.select(config, reshard) is False:
        raise ValueError(
            f"{reshard}=False does not work with a separate rollout: the trainer restores sharded weights, but the "
            f"next forward pass would use the unsharded weights of the last one. Set {reshard}=True."
        )
    lora = OmegaConf.select(config, "actor_rollout_ref.model.lora_rank") or 0
    merged = OmegaConf.select(config, "actor_rollout_ref.model.lora.merge")
    if lora > 0 and not merged and OmegaConf.select(config, "actor_rollout_ref.rollout.name") == ROLLOUT_NAME:
        raise ValueError(
            f"actor_rollout_ref.model.lora_rank={lora} does not work with rollout.name={ROLLOUT_NAME}, which accepts "
            "only full weights. Set actor_rollout_ref.model.lora.merge=True."
        )
    logical = OmegaConf.select(config, "ray_kwargs.ray_init.num_gpus")
    if logical is not None and ranks + separate > logical:
        raise ValueError(
            f"ray_kwargs.ray_init.num_gpus={logical} logical GPUs are not sufficient: trainer.n_gpus_per_node x "
            f"trainer.nnodes needs {ranks} ranks{f' and the separate rollout {separate}' if separate else ''}, and "
            f"each rank needs one logical GPU. Set ray_kwargs.ray_init.num_gpus={ranks + separate}."
        )
    cpus = OmegaConf.select(config, "ray_kwargs.ray_init.num_cpus")
    needed = _needed_cpus(config)
    if cpus is not None and cpus < needed:
        raise ValueError(
            f"ray_kwargs.ray_init.num_cpus={cpus} logical CPUs are not sufficient for {ranks + separate} ranks: verl "
            f"reserves {CPUS_PER_RANK} per training rank, {CPUS_PER_SEPARATE_RANK} per rank of a separate rollout, and "
            f"{needed - CPUS_PER_RANK * ranks - CPUS_PER_SEPARATE_RANK * separate} for its other actors. "
            f"Set ray_kwargs.ray_init.num_cpus={needed} or more; it may exceed the number of cores."
        )


def _training_ranks(config: DictConfig) -> int:
    return int(OmegaConf.select(config, "trainer.n_gpus_per_node") * OmegaConf.select(config, "trainer.nnodes"))


def _separate_ranks(config: DictConfig) -> int:
    """Number of ranks of a rollout that is separate from training.

    One-step-off and fully-async configure it in a root section, which their ``main`` copies to
    ``actor_rollout_ref.rollout`` after this check.
    """
    section = "rollout" if "rollout" in config else "actor_rollout_ref.rollout"
    nodes, per_node = (OmegaConf.select(config, f"{section}.{key}") for key in ("nnodes", "n_gpus_per_node"))
    return int((nodes or 0) * (per_node or 0))


def _needed_cpus(config: DictConfig) -> int:
    others = RAY_CPU_SLACK
    if "async_training" in config:
        others += FULLY_ASYNC_CPUS
    elif "rollout" in config:
        others += ONE_STEP_OFF_CPUS
    return CPUS_PER_RANK * _training_ranks(config) + CPUS_PER_SEPARATE_RANK * _separate_ranks(config) + others


def num_gpus(config: DictConfig) -> int:
    """Number of logical GPUs that Ray needs on this machine: one per rank. Other nodes have their own.

    Args:
        config: verl's root config.

    Returns:
        The number of logical GPUs.
    """
    return int(OmegaConf.select(config, "trainer.n_gpus_per_node")) + _separate_ranks(config)


def num_cpus(config: DictConfig) -> int:
    """Number of logical CPUs that Ray needs for a config, at least :data:`DEFAULT_CPUS`.

    Args:
        config: verl's root config.

    Returns:
        The number of logical CPUs.
    """
    return max(DEFAULT_CPUS, _needed_cpus(config))


def is_separate(config: DictConfig) -> bool:
    """Whether the rollout is separate from training.

    Args:
        config: verl's root config.

    Returns:
        True if the rollout has its own ranks.
    """
    return _separate_ranks(config) > 0
