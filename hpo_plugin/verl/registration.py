"""Puts the estimators and losses of all variants into verl's registries, and says whether they are still there."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from hpo_plugin.errors import ConfigError
from hpo_plugin.variants import VARIANTS
from hpo_plugin.verl.selection import KEY_ESTIMATOR, KEY_LOSS_MODE

__all__ = [
    "RegistrationError",
    "built_in",
    "describe_built_in",
    "register",
    "require_loaded",
    "require_registered",
    "selects_built_in",
]


class RegistrationError(RuntimeError):
    """HPO cannot be, or has not been, registered in this process."""


def built_in(registry: Mapping[str, Any]) -> tuple[str, ...]:
    """The variants that this verl registers itself.

    Args:
        registry: ``ADV_ESTIMATOR_REGISTRY`` or ``POLICY_LOSS_REGISTRY`` of ``verl.trainer.ppo.core_algos``.

    Returns:
        Their names; nothing of this package is registered under them.
    """
    return tuple(name for name in VARIANTS if _module(registry.get(name)).partition(".")[0] == "verl")


def register(core_algos: ModuleType) -> None:
    """Register every variant, as estimator and as policy loss, where the name is free.

    Called by the post-import hook of ``verl.trainer.ppo.core_algos``, and again when a variant is added. A name that
    verl or another package holds stays its own; :func:`require_registered` refuses the latter.

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
    """Whether the two keys select a variant, and each variant that they name is built into this verl.

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
    """One line that says what of HPO this verl has built in; None for a verl without HPO."""
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
    return f"the name is held by {function.__module__}.{function.__qualname__}"


def require_registered(adv_estimator: str, loss_mode: str) -> None:
    """Raise unless what the two keys select is in verl's registries, and is ours or verl's own.

    Args:
        adv_estimator: value of ``algorithm.adv_estimator``.
        loss_mode: value of ``actor_rollout_ref.actor.policy_loss.loss_mode``.

    Raises:
        ConfigError: if the loss is ours and the estimator is not the same variant's.
        RegistrationError: with the reason, if something is missing, was replaced, or could not be set up.
    """
    if not {adv_estimator, loss_mode} & set(VARIANTS) or selects_built_in(adv_estimator, loss_mode):
        return
    from verl.trainer.ppo import core_algos

    from hpo_plugin.verl.estimators import estimator
    from hpo_plugin.verl.losses import policy_loss

    if loss_mode in VARIANTS and adv_estimator != loss_mode:
        raise ConfigError(
            f"{KEY_LOSS_MODE}={loss_mode} needs {KEY_ESTIMATOR}={loss_mode}, whose advantages have α applied, not "
            f"{adv_estimator}."
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
                f"{failure or _holder(registry.get(name))}. Check the installation with `hpo-plugin check`; "
                "VERL_USE_EXTERNAL_PLUGINS must not exclude hpo. Where another package holds the name, uninstall one "
                "of the two, or keep one out with VERL_USE_EXTERNAL_PLUGINS."
            )
    require_loaded()


def _failure() -> str | None:
    plugin = sys.modules.get("hpo_plugin.verl.plugin")
    return getattr(plugin, "FAILURE", None) if plugin else "verl did not load the entry point hpo of verl.plugins"


def require_loaded() -> None:
    """Raise a RegistrationError, with the reason, unless the plugin was set up completely in this process."""
    if failure := _failure():
        raise RegistrationError(f"hpo_plugin did not load completely in this process: {failure}")
