"""The places where verl 0.9.1 has no extension point. There are two; each is one assignment, and each has a test.

1. ``verl.utils.config.validate_config`` is wrapped, so that a contradictory config, or a recipe that cannot be cut over
   its GPUs, stops the driver before Ray starts, and so that ``algorithm.hpo`` of verl's *stock* config reaches the
   actor, whose config is a closed dataclass.
2. ``ActorRolloutRefWorker.actor_worker_cls`` (verl/workers/engine_workers.py) names the class of the actor's worker.
   Ours sees every row of the step on its rank before the first micro-batch: the only place where α can be computed.

``tests/glue/test_seams.py`` fails when verl moves either. A verl that has HPO built in is left as it is.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from types import ModuleType
from typing import Any

import wrapt
from omegaconf import DictConfig, open_dict

from hpo_plugin.glue import arms, layout
from hpo_plugin.glue.registration import RegistrationError, is_built_in, require_registered

__all__ = ["SUPPORTED_VERL", "check_arm_before_run", "hand_down", "use_hysteresis_worker"]

SUPPORTED_VERL = ("0.9.1",)
"""Versions of verl the seams were written and tested against."""

ALLOW_UNTESTED = "HPO_PLUGIN_ALLOW_UNTESTED_VERL"

STOCK_TARGET = "verl.workers.config.PolicyLossConfig"
OUR_TARGET = "hpo_plugin.glue.config.HPOPolicyLossConfig"


def require_supported_verl() -> None:
    """Raise unless this verl is one the seams were tested against.

    Raises:
        RegistrationError: naming both versions and the variable that lifts the guard.
    """
    found = version("verl")
    if found not in SUPPORTED_VERL and os.environ.get(ALLOW_UNTESTED) != "1":
        raise RegistrationError(
            f"hpo_plugin supports verl {', '.join(SUPPORTED_VERL)}; this is verl {found}. Install a supported version, "
            f"or set {ALLOW_UNTESTED}=1 and run this package's tests first."
        )


def hand_down(config: DictConfig, arm: arms.Arm) -> None:
    """Give the actor's ``policy_loss`` node the fields of ``HPOPolicyLossConfig``, in place.

    Our own yaml has them already, by interpolation. verl's stock yaml gets them here.

    Args:
        config: the root config.
        arm: what :func:`hpo_plugin.glue.arms.resolve_arm` read from it; nothing is done without hysteresis.

    Raises:
        ConfigError: if the node's ``_target_`` is a third class, which could not carry α.
    """
    if arm.hysteresis is None:
        return
    node = config.actor_rollout_ref.actor.policy_loss
    target = node.get("_target_", STOCK_TARGET)
    if target not in (STOCK_TARGET, OUR_TARGET):
        raise arms.ConfigError(
            f"actor_rollout_ref.actor.policy_loss._target_={target} cannot carry α to the workers of {arm.hysteresis}. "
            f"Set it to {OUR_TARGET}, or to a subclass of it registered under that name."
        )
    with open_dict(node):
        node._target_ = OUR_TARGET
        node.adv_estimator = arm.adv_estimator
        node.alpha = arm.alpha
        node.alpha_min = arm.alpha_min


def _validate_config(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from verl.trainer.ppo import core_algos

    config = kwargs["config"] if "config" in kwargs else args[0]
    if not is_built_in(core_algos):
        arm = arms.resolve_arm(config)
        if arm.hysteresis is not None:
            require_supported_verl()
            require_registered(arm.adv_estimator, arm.loss_mode)
            hand_down(config, arm)
    layout.check_layout(config)
    return wrapped(*args, **kwargs)


def check_arm_before_run(verl_utils_config: ModuleType) -> None:
    """Seam 1: resolve and check the arm, and a recipe's layout, whenever verl validates a config.

    Args:
        verl_utils_config: the module ``verl.utils.config``.
    """
    wrapt.wrap_function_wrapper(verl_utils_config, "validate_config", _validate_config)


def use_hysteresis_worker(engine_workers: ModuleType) -> None:
    """Seam 2: make the actor's worker the one that counts signs over the whole step.

    Args:
        engine_workers: the module ``verl.workers.engine_workers``.

    Raises:
        RegistrationError: if another package has already put its own class there.
    """
    from verl.trainer.ppo import core_algos

    if is_built_in(core_algos):
        return
    from hpo_plugin.glue.worker import HysteresisTrainingWorker

    owner = engine_workers.ActorRolloutRefWorker
    if owner.actor_worker_cls is not engine_workers.TrainingWorker:
        raise RegistrationError(
            f"ActorRolloutRefWorker.actor_worker_cls is already {owner.actor_worker_cls.__qualname__} of "
            f"{owner.actor_worker_cls.__module__}; hpo_plugin does not replace it. Derive that class from "
            "hpo_plugin.glue.worker.HysteresisTrainingWorker, or keep one of the two packages out with "
            "VERL_USE_EXTERNAL_PLUGINS."
        )
    owner.actor_worker_cls = HysteresisTrainingWorker
