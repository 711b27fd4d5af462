"""Puts the estimators and losses of all variants into verl's registries, and says whether they are still there."""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import version
from types import ModuleType
from typing import Any

from hpo_plugin.errors import ConfigError
from hpo_plugin.variants import VARIANTS
from hpo_plugin.verl.selection import KEY_ESTIMATOR, KEY_LOSS_MODE

__all__ = ["RegistrationError", "is_built_in", "register", "require_registered", "require_supported_verl"]


#: Versions of verl that the seams were written and tested against.
SUPPORTED_VERL = ("0.9.1",)
#: Environment variable that admits other versions where it is 1.
ALLOW_UNTESTED = "HPO_PLUGIN_ALLOW_UNTESTED_VERL"


class RegistrationError(RuntimeError):
    """HPO cannot be, or has not been, registered in this process."""


def require_supported_verl() -> None:
    """Raise :class:`RegistrationError` unless this version of verl was tested with this package."""
    found = version("verl")
    if found not in SUPPORTED_VERL and os.environ.get(ALLOW_UNTESTED) != "1":
        raise RegistrationError(
            f"hpo_plugin supports verl {', '.join(SUPPORTED_VERL)}; this is verl {found}. Install a supported version, "
            f"or set {ALLOW_UNTESTED}=1 and run this package's tests first."
        )


def is_built_in(core_algos: ModuleType) -> bool:
    """Whether this verl registers ``hpo`` and ``ahpo`` itself, as estimators and as losses.

    Args:
        core_algos: the module ``verl.trainer.ppo.core_algos``, completely imported.

    Returns:
        True if nothing of this package is needed for HPO.
    """
    return all(
        getattr(registry.get(name), "__module__", None) == "verl.trainer.ppo.core_algos"
        for registry in (core_algos.ADV_ESTIMATOR_REGISTRY, core_algos.POLICY_LOSS_REGISTRY)
        for name in ("hpo", "ahpo")
    )


def register(core_algos: ModuleType) -> None:
    """Register every variant, as estimator and as policy loss; step aside where verl has HPO built in.

    Called by the post-import hook of ``verl.trainer.ppo.core_algos``, and again when a variant is added. A name that
    another package holds stays its own: :func:`require_registered` stops the runs that select it.

    Args:
        core_algos: the module ``verl.trainer.ppo.core_algos``, completely imported.
    """
    if is_built_in(core_algos):
        logging.getLogger(__name__).warning("verl has HPO and A-HPO built in: hpo_plugin steps aside in their favor")
        return
    from hpo_plugin.verl.estimators import estimator
    from hpo_plugin.verl.losses import policy_loss

    for name in VARIANTS:
        if name not in core_algos.ADV_ESTIMATOR_REGISTRY:
            core_algos.register_adv_est(name)(estimator(name))
        if name not in core_algos.POLICY_LOSS_REGISTRY:
            core_algos.register_policy_loss(name)(policy_loss(name))


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
        ConfigError: if the loss is a variant's and the estimator is not the same variant's.
        RegistrationError: with the reason, if something is missing, was replaced, or could not be set up.
    """
    if not {adv_estimator, loss_mode} & set(VARIANTS):
        return
    from verl.trainer.ppo import core_algos

    if is_built_in(core_algos):
        return
    from hpo_plugin.verl.estimators import estimator
    from hpo_plugin.verl.losses import policy_loss

    if loss_mode in VARIANTS and adv_estimator != loss_mode:
        raise ConfigError(
            f"{KEY_LOSS_MODE}={loss_mode} needs {KEY_ESTIMATOR}={loss_mode}, whose advantages have α applied, not "
            f"{adv_estimator}."
        )
    plugin = sys.modules.get("hpo_plugin.verl.plugin")
    failure = getattr(plugin, "FAILURE", None) if plugin else "verl did not load the entry point hpo of verl.plugins"
    for kind, registry, ours, name in (
        ("advantage estimator", core_algos.ADV_ESTIMATOR_REGISTRY, estimator, adv_estimator),
        ("policy loss", core_algos.POLICY_LOSS_REGISTRY, policy_loss, loss_mode),
    ):
        if name in VARIANTS and registry.get(name) is not ours(name):
            raise RegistrationError(
                f"the {kind} {name!r} of hpo_plugin is not registered in this process: "
                f"{failure or _holder(registry.get(name))}. Check the installation with `hpo-plugin check`; "
                "VERL_USE_EXTERNAL_PLUGINS must not exclude hpo. Where another package holds the name, uninstall one "
                "of the two, or keep one out with VERL_USE_EXTERNAL_PLUGINS; a verl that has a part of HPO built in "
                "needs an hpo_plugin that was made for it."
            )
    if failure:
        raise RegistrationError(f"hpo_plugin did not load completely in this process: {failure}")
