"""Loaded in every verl process (entry point ``verl.plugins``), so it imports next to nothing.

verl asks for its platform after it has loaded its plugins, so registering here is early enough in the driver, the
trainer, the workers and the rollout servers alike. If this module fails to load, verl stops with "Unknown platform
'cpu'": the failure is not silent.
"""

import os
from collections.abc import Callable
from types import ModuleType

import wrapt
from omegaconf import DictConfig, OmegaConf


def _device(*, _root_: DictConfig) -> str:
    """Resolver behind ``trainer.device: ${hpo_cpu.device:}``: check the config, then answer ``"cpu"``."""
    from hpo_plugin.cpu.checks import check_config

    check_config(_root_)
    return "cpu"


def _of_config(name: str) -> Callable[..., int]:
    """Resolver that answers with a function of ``hpo_plugin.cpu.checks``, called with the root config."""

    def resolve(*, _root_: DictConfig) -> int:
        from hpo_plugin.cpu import checks

        answer: int = getattr(checks, name)(_root_)
        return answer

    return resolve


# Registered on every platform: a CPU config started without VERL_PLATFORM=cpu must say so.
OmegaConf.register_new_resolver("hpo_cpu.device", _device, replace=True)
for _name in ("num_gpus", "num_cpus", "is_separate"):
    OmegaConf.register_new_resolver(f"hpo_cpu.{_name}", _of_config(_name), replace=True)
OmegaConf.register_new_resolver("hpo_cpu.sum", lambda *terms: sum(terms), replace=True)

if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
    from hpo_plugin.cpu import platform as _platform  # noqa: F401
    from hpo_plugin.cpu.vllm_cpu import install_vllm_alias

    install_vllm_alias()

    # With verl's own module, so that processes which do not need it do not pay for the import.
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
