"""Registers the estimators and losses of all variants in verl, and checks the registration."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hpo_plugin.errors import ConfigError
from hpo_plugin.variants import VARIANTS
from hpo_plugin.verl.selection import KEY_ESTIMATOR, KEY_LOSS_MODE

__all__ = [
    "RegistrationError",
    "built_in",
    "describe_built_in",
    "register",
    "require_known",
    "require_loaded",
    "require_registered",
    "selects_built_in",
]


#: A module that verl imports in every worker, for example to register a policy loss.
KEY_EXTERNAL = "actor_rollout_ref.model.external_lib"


class RegistrationError(RuntimeError):
    """HPO is not registered in this process, or cannot be registered."""


def built_in(registry: Mapping[str, Any]) -> tuple[str, ...]:
    """The variants that this version of verl provides itself.

    Args:
        registry: ``ADV_ESTIMATOR_REGISTRY`` or ``POLICY_LOSS_REGISTRY`` of ``verl.trainer.ppo.core_algos``.

    Returns:
        Their names. This package registers nothing under them.
    """
    return tuple(name for name in VARIANTS if _module(registry.get(name)).partition(".")[0] == "verl")


def register(core_algos: ModuleType) -> None:
    """Register every variant as advantage estimator and as policy loss, unless its name is already registered.

    The post-import hook of ``verl.trainer.ppo.core_algos`` calls this function; a new variant calls it again. The
    function does not replace what verl or another package has registered. :func:`require_registered` rejects names
    that another package has registered.

    Args:
        core_algos: the module ``verl.trainer.ppo.core_algos``, completely imported.
    """
    from hpo_plugin.verl.estimators import estimator
    from hpo_plugin.verl.losses import policy_loss

    for name in VARIANTS:
        if name not in core_algos.ADV_ESTIMATOR_REGISTRY:
            core_algos.register_adv_est(name)(estimator(name))
        if name not in core_algos.POLICY_LOSS_REGISTRY:
            core_algos.register_policy_loss(name)(policy_loss(name))


def selects_built_in(adv_estimator: str, loss_mode: str) -> bool:
    """Whether the two keys select a variant, and this version of verl provides each variant that they name.

    Args:
        adv_estimator: value of ``algorithm.adv_estimator``.
        loss_mode: value of ``actor_rollout_ref.actor.policy_loss.loss_mode``.
    """
    if not {adv_estimator, loss_mode} & set(VARIANTS):
        return False
    from verl.trainer.ppo import core_algos

    return all(
        name not in VARIANTS or name in built_in(registry)
        for name, registry in (
            (adv_estimator, core_algos.ADV_ESTIMATOR_REGISTRY),
            (loss_mode, core_algos.POLICY_LOSS_REGISTRY),
        )
    )


def describe_built_in(core_algos: ModuleType) -> str | None:
    """The parts of HPO that this version of verl provides, in one line; None if it provides none."""
    parts = [
        f"{' and '.join(names)} as {kind}"
        for kind, registry in (
            ("advantage estimators", core_algos.ADV_ESTIMATOR_REGISTRY),
            ("policy losses", core_algos.POLICY_LOSS_REGISTRY),
        )
        if (names := built_in(registry))
    ]
    return f"verl provides {', '.join(parts)}; hpo_plugin does not register its own" if parts else None


def _module(function: Any) -> str:
    return str(getattr(getattr(function, "func", function), "__module__", ""))


def _holder(function: Any) -> str:
    if function is None:
        return "nothing is registered"
    function = getattr(function, "func", function)
    return f"the name is registered by {function.__module__}.{function.__qualname__}"


def require_registered(adv_estimator: str, loss_mode: str) -> None:
    """Raise unless what the two keys select is registered in verl, by this package or by verl itself.

    Args:
        adv_estimator: value of ``algorithm.adv_estimator``.
        loss_mode: value of ``actor_rollout_ref.actor.policy_loss.loss_mode``.

    Raises:
        ConfigError: if the loss mode is a variant of this package and the estimator is not the same variant.
        RegistrationError: if a function is missing or was replaced, or the setup failed; the message has the reason.
    """
    if not {adv_estimator, loss_mode} & set(VARIANTS) or selects_built_in(adv_estimator, loss_mode):
        return
    from verl.trainer.ppo import core_algos

    from hpo_plugin.verl.estimators import estimator
    from hpo_plugin.verl.losses import policy_loss

    if loss_mode in VARIANTS and adv_estimator != loss_mode:
        raise ConfigError(
            f"{KEY_ESTIMATOR}={adv_estimator} does not apply the α that {KEY_LOSS_MODE}={loss_mode} needs. Set "
            f"{KEY_ESTIMATOR}={loss_mode}."
        )
    failure = _failure()
    for kind, registry, ours, name in (
        ("advantage estimator", core_algos.ADV_ESTIMATOR_REGISTRY, estimator, adv_estimator),
        ("policy loss", core_algos.POLICY_LOSS_REGISTRY, policy_loss, loss_mode),
    ):
        if kind == "advantage estimator" and name in built_in(registry):
            continue
        if name in VARIANTS and registry.get(name) is not ours(name):
            raise RegistrationError(
                f"the {kind} {name!r} of hpo_plugin is not registered in this process: "
                f"{failure or _holder(registry.get(name))}. Check the installation with `hpo-plugin check`. "
                "VERL_USE_EXTERNAL_PLUGINS must not exclude hpo. If another package has registered the name, uninstall "
                "one of the two packages, or exclude one with VERL_USE_EXTERNAL_PLUGINS."
            )
    require_loaded()


def require_known(config: DictConfig) -> None:
    """Reject an estimator or a loss mode that is not registered in verl, in a run that selects or means a variant.

    verl raises its own error only when it calls the function, after the first rollout.

    Args:
        config: the root config.

    Raises:
        ConfigError: the message names the key, its value and what to set. A name is accepted if the workers import a
            module that may register it.
    """
    names = {key: str(OmegaConf.select(config, key)) for key in (KEY_ESTIMATOR, KEY_LOSS_MODE)}
    meant = {re.sub(r"[^a-z0-9]", "", name.lower()) for name in names.values()}
    if not meant & set(VARIANTS) or OmegaConf.select(config, KEY_EXTERNAL):
        return
    from verl.trainer.ppo import core_algos

    for (key, name), registry in zip(
        names.items(), (core_algos.ADV_ESTIMATOR_REGISTRY, core_algos.POLICY_LOSS_REGISTRY), strict=True
    ):
        if name not in registry and name not in VARIANTS:
            raise ConfigError(
                f"{key}={name} is not registered in verl. Set {key} to one of {', '.join(sorted(registry))}. If a "
                f"module of yours registers {name}, set {KEY_EXTERNAL} to the module."
            )


def _failure() -> str | None:
    plugin = sys.modules.get("hpo_plugin.verl.plugin")
    return getattr(plugin, "FAILURE", None) if plugin else "verl did not load the entry point hpo of verl.plugins"


def require_loaded() -> None:
    """Raise a RegistrationError, with the reason, if the setup of the plugin failed in this process."""
    if failure := _failure():
        raise RegistrationError(
            f"hpo_plugin did not load completely in this process: {failure}. Check the installation with "
            "`hpo-plugin check`."
        )
