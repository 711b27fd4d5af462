"""What a run on the CPU backend needs from its config and environment, checked before any process is started."""

import os
from importlib.util import find_spec

from omegaconf import DictConfig, OmegaConf

#: ``actor_rollout_ref.rollout.name`` of the CPU backend's own rollout.
ROLLOUT_NAME = "hf_cpu"
# Logical CPUs that verl reserves for each training rank (verl/single_controller/ray/base.py, max_colocate_count).
CPUS_PER_RANK = 3

# Logical CPUs for verl's actors that train nothing: they hold one each while they start.
RAY_CPU_SLACK = 3

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
        ValueError: A strategy other than fsdp2, or more ranks than Ray's logical GPUs.
    """
    require_cpu_platform()
    if OmegaConf.select(config, "actor_rollout_ref.rollout.name") == "vllm":
        require_vllm()
    for key in STRATEGY_KEYS:
        strategy = OmegaConf.select(config, key)
        if strategy is not None:
            require_fsdp2(strategy, key)
    ranks = OmegaConf.select(config, "trainer.n_gpus_per_node") * OmegaConf.select(config, "trainer.nnodes")
    logical = OmegaConf.select(config, "ray_kwargs.ray_init.num_gpus")
    if logical is not None and ranks > logical:
        raise ValueError(
            f"trainer.n_gpus_per_node x trainer.nnodes asks for {ranks} ranks, but Ray is started with "
            f"ray_kwargs.ray_init.num_gpus={logical} logical GPUs (on CPU a logical GPU is one training rank): "
            f"set ray_kwargs.ray_init.num_gpus={ranks}"
        )
    cpus = OmegaConf.select(config, "ray_kwargs.ray_init.num_cpus")
    needed = CPUS_PER_RANK * ranks + RAY_CPU_SLACK
    if cpus is not None and cpus < needed:
        raise ValueError(
            f"ray_kwargs.ray_init.num_cpus={cpus} logical CPUs cannot hold {ranks} ranks: verl reserves "
            f"{CPUS_PER_RANK} per rank, and its other actors need {RAY_CPU_SLACK}; "
            f"set ray_kwargs.ray_init.num_cpus={needed} or more "
            "(they are logical: it may exceed the machine's cores)"
        )
