"""What a run on the CPU backend needs from its config and environment, checked before any process is started."""

import os
from importlib.util import find_spec

from omegaconf import DictConfig, OmegaConf

#: ``actor_rollout_ref.rollout.name`` of the CPU backend's own rollout.
ROLLOUT_NAME = "hf_cpu"
# Logical CPUs that verl reserves for each training rank (verl/single_controller/ray/base.py, max_colocate_count) and
# for each rank of a separate rollout (RolloutReplica.init_standalone).
CPUS_PER_RANK = 3
CPUS_PER_SEPARATE_RANK = 2

# Logical CPUs for verl's actors that train nothing: they hold one each while they start.
RAY_CPU_SLACK = 3

# One-step-off's task runner; fully-async's task runner, trainer, rollouter and message queue (num_cpus of their
# ray.remote).
ONE_STEP_OFF_CPUS = 10
FULLY_ASYNC_CPUS = 1 + 10 + 10 + 2

# With a few left over, so that small changes of a config need no other number.
DEFAULT_CPUS = 12

# The third one is the SFT trainer's.
STRATEGY_KEYS = ("actor_rollout_ref.actor.strategy", "actor_rollout_ref.ref.strategy", "engine.strategy")


def require_cpu_platform() -> None:
    """Refuse to run unless this process was started with ``VERL_PLATFORM=cpu``.

    Raises:
        RuntimeError: ``VERL_PLATFORM`` is unset or names another platform.
    """
    value = os.environ.get("VERL_PLATFORM")
    if (value or "").strip().lower() != "cpu":
        raise RuntimeError(
            f"this config runs verl on the CPU backend, but VERL_PLATFORM is {value!r}: put VERL_PLATFORM=cpu in the "
            "environment of the command (verl reads it in every process), or take the CPU backend out of the config"
        )


def require_fsdp2(strategy: str, key: str = "actor_rollout_ref.actor.strategy") -> None:
    """Refuse any training strategy but FSDP2, the only one that runs on CPU tensors.

    Args:
        strategy: The value of the config key.
        key: The config key, for the message.

    Raises:
        ValueError: ``strategy`` is not ``"fsdp2"``.
    """
    if strategy != "fsdp2":
        raise ValueError(f"{key}={strategy}: the CPU backend trains with fsdp2 only; set {key}=fsdp2")


def require_vllm() -> None:
    """Refuse to run unless some vLLM can be imported.

    Raises:
        ModuleNotFoundError: With the command that installs the CPU build.
    """
    if find_spec("vllm") is None:
        raise ModuleNotFoundError(
            "actor_rollout_ref.rollout.name=vllm, but vLLM is not installed: `make install-vllm` (see docs/cpu.md), or "
            "take the default rollout, hpo/cpu_rollout=hf"
        )


def check_config(config: DictConfig) -> None:
    """Check a whole verl config for the CPU backend.

    Args:
        config: verl's root config.

    Raises:
        RuntimeError: ``VERL_PLATFORM`` is not ``cpu``.
        ModuleNotFoundError: The rollout is vLLM's, which is not installed.
        ValueError: A strategy other than fsdp2, a setting that the rollout cannot follow, or more ranks than Ray's
            logical GPUs or CPUs hold.
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
            f"{reshard}=False: trainers with a separate rollout restore sharded weights, which the unsharded ones of "
            f"the last forward pass would hide; set {reshard}=True"
        )
    lora = OmegaConf.select(config, "actor_rollout_ref.model.lora_rank") or 0
    merged = OmegaConf.select(config, "actor_rollout_ref.model.lora.merge")
    if lora > 0 and not merged and OmegaConf.select(config, "actor_rollout_ref.rollout.name") == ROLLOUT_NAME:
        raise ValueError(
            f"actor_rollout_ref.model.lora_rank={lora}: rollout.name={ROLLOUT_NAME} takes full weights only; set "
            "actor_rollout_ref.model.lora.merge=True"
        )
    logical = OmegaConf.select(config, "ray_kwargs.ray_init.num_gpus")
    if logical is not None and ranks + separate > logical:
        raise ValueError(
            f"trainer.n_gpus_per_node x trainer.nnodes asks for {ranks} ranks"
            f"{f' and the separate rollout for {separate}' if separate else ''}, but Ray is started with "
            f"ray_kwargs.ray_init.num_gpus={logical} logical GPUs (on CPU a logical GPU is one rank): "
            f"set ray_kwargs.ray_init.num_gpus={ranks + separate}"
        )
    cpus = OmegaConf.select(config, "ray_kwargs.ray_init.num_cpus")
    needed = _needed_cpus(config)
    if cpus is not None and cpus < needed:
        raise ValueError(
            f"ray_kwargs.ray_init.num_cpus={cpus} logical CPUs cannot hold {ranks + separate} ranks: verl reserves "
            f"{CPUS_PER_RANK} per training rank, {CPUS_PER_SEPARATE_RANK} per rank of a separate rollout, and its "
            f"other actors need {needed - CPUS_PER_RANK * ranks - CPUS_PER_SEPARATE_RANK * separate}; "
            f"set ray_kwargs.ray_init.num_cpus={needed} or more "
            "(they are logical: it may exceed the machine's cores)"
        )


def _training_ranks(config: DictConfig) -> int:
    return int(OmegaConf.select(config, "trainer.n_gpus_per_node") * OmegaConf.select(config, "trainer.nnodes"))


def _separate_ranks(config: DictConfig) -> int:
    """Ranks of a rollout that is separate from training.

    One-step-off and fully-async have a root section of their own for it, which their ``main`` copies into
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
    """Logical GPUs of this machine that Ray needs for a config: one per rank; other nodes bring their own.

    Args:
        config: verl's root config.

    Returns:
        Their number.
    """
    return int(OmegaConf.select(config, "trainer.n_gpus_per_node")) + _separate_ranks(config)


def num_cpus(config: DictConfig) -> int:
    """Logical CPUs that Ray needs for a config, at least :data:`DEFAULT_CPUS`.

    Args:
        config: verl's root config.

    Returns:
        Their number.
    """
    return max(DEFAULT_CPUS, _needed_cpus(config))


def is_separate(config: DictConfig) -> bool:
    """Whether the rollout is separate from training.

    Args:
        config: verl's root config.

    Returns:
        True if it has ranks of its own.
    """
    return _separate_ranks(config) > 0
