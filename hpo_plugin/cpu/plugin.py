"""Entry point of the group ``verl.plugins`` for the CPU backend.

Every verl process loads this module, so it imports little. verl selects its platform after it has loaded its plugins,
so this module registers the platform early enough in the driver, the trainer, the workers and the rollout servers. If
this module cannot be loaded, verl stops with "Unknown platform 'cpu'".
"""

import os
from collections.abc import Callable
from types import ModuleType

import wrapt
from omegaconf import DictConfig, OmegaConf


def _device(*, _root_: DictConfig) -> str:
    """Resolver of ``trainer.device: ${hpo_cpu.device:}``: check the config and return ``"cpu"``."""
    from hpo_plugin.cpu.checks import check_config

    check_config(_root_)
    return "cpu"


def _of_config(name: str) -> Callable[..., int]:
    """Return a resolver that calls a function of ``hpo_plugin.cpu.checks`` with the root config."""

    def resolve(*, _root_: DictConfig) -> int:
        from hpo_plugin.cpu import checks

        answer: int = getattr(checks, name)(_root_)
        return answer

    return resolve


# Registered on every platform, so that a CPU config without VERL_PLATFORM=cpu raises a clear error.
OmegaConf.register_new_resolver("hpo_cpu.device", _device, replace=True)
for _name in ("num_gpus", "num_cpus", "is_separate"):
    OmegaConf.register_new_resolver(f"hpo_cpu.{_name}", _of_config(_name), replace=True)
OmegaConf.register_new_resolver("hpo_cpu.sum", lambda *terms: sum(terms), replace=True)

if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
    from hpo_plugin.cpu import platform as _platform  # noqa: F401
    from hpo_plugin.cpu.vllm_cpu import install_vllm_alias

    install_vllm_alias()

    # Post-import hooks, so that only processes that need these modules import them.
    @wrapt.when_imported("verl.workers.engine.fsdp.transformer_impl")
    def _register_engine(_module: ModuleType) -> None:
        from hpo_plugin.cpu import engine  # noqa: F401

    @wrapt.when_imported("verl.workers.rollout.base")
    def _register_rollout(_module: ModuleType) -> None:
        from hpo_plugin.cpu.registration import register_rollout

        register_rollout()

    @wrapt.when_imported("verl.utils.fsdp_utils")
    def _copy_saved_weights(module: ModuleType) -> None:
        from hpo_plugin.cpu.saved_weights import copy_saved_weights

        copy_saved_weights(module)

    @wrapt.when_imported("verl.utils.distributed")
    def _use_gloo(module: ModuleType) -> None:
        from hpo_plugin.cpu.process_group import use_gloo_in_torchrun

        use_gloo_in_torchrun(module)
