"""Puts the estimators and losses into verl's registries, and says whether they are still there."""

from __future__ import annotations

import logging
import sys
from types import ModuleType

from hpo_plugin.glue.arms import HYSTERETIC, entrance

__all__ = ["RegistrationError", "is_built_in", "register", "require_registered"]


CORE_ALGOS = "verl.trainer.ppo.core_algos"
"""Where verl defines what it registers itself."""


class RegistrationError(RuntimeError):
    """HPO cannot be, or has not been, registered in this process."""


def is_built_in(core_algos: ModuleType) -> bool:
    """Whether this verl registers ``hpo`` and ``ahpo`` itself, as estimators and as losses.

    Args:
        core_algos: the module ``verl.trainer.ppo.core_algos``, completely imported.

    Returns:
        True if nothing of this package is needed for HPO.
    """
    return len(_built_in(core_algos)) == 2 * len(HYSTERETIC)


def _built_in(core_algos: ModuleType) -> list[str]:
    """Which of the four verl registers itself."""
    return [
        f"the {kind} {name!r}"
        for kind, registry in (
            ("advantage estimator", core_algos.ADV_ESTIMATOR_REGISTRY),
            ("policy loss", core_algos.POLICY_LOSS_REGISTRY),
        )
        for name in HYSTERETIC
        if getattr(registry.get(name), "__module__", None) == CORE_ALGOS
    ]


def register(core_algos: ModuleType) -> None:
    """Register ``hpo`` and ``ahpo``, as estimators and as losses; step aside where verl has them built in.

    Called by the post-import hook of ``verl.trainer.ppo.core_algos``: an error surfaces in the process that imports it.

    Args:
        core_algos: the module ``verl.trainer.ppo.core_algos``, completely imported.

    Raises:
        RegistrationError: if another package holds one of the names, or verl has a part of them built in; nothing is
            overwritten.
    """
    if is_built_in(core_algos):
        logging.getLogger(__name__).warning("verl has HPO and A-HPO built in: hpo_plugin steps aside in their favor")
        return
    if built_in := _built_in(core_algos):
        raise RegistrationError(
            f"this verl has a part of HPO built in ({', '.join(built_in)}), and hpo_plugin steps aside for all or "
            "nothing. Install an hpo_plugin that was made for this verl, or the verl that this one asks for; or use "
            "verl's own alone, with VERL_USE_EXTERNAL_PLUGINS=none (or a list without hpo)."
        )
    from hpo_plugin.glue.estimators import ESTIMATORS
    from hpo_plugin.glue.losses import LOSSES

    for kind, registry, ours in (
        ("advantage estimator", core_algos.ADV_ESTIMATOR_REGISTRY, ESTIMATORS),
        ("policy loss", core_algos.POLICY_LOSS_REGISTRY, LOSSES),
    ):
        for name, function in ours.items():
            held = registry.get(name)
            if held is not None and held is not function:
                raise RegistrationError(
                    f"the {kind} {name!r} is already registered by {held.__module__}.{held.__qualname__}; hpo_plugin "
                    "does not overwrite it. Uninstall one of the two packages, or keep this one out with "
                    "VERL_USE_EXTERNAL_PLUGINS=none (or a list without hpo)."
                )
    for name, estimator in ESTIMATORS.items():
        core_algos.register_adv_est(name)(estimator)
    for name, loss in LOSSES.items():
        core_algos.register_policy_loss(name)(loss)


def require_registered(adv_estimator: str, loss_mode: str) -> None:
    """Raise unless what the two keys select is in verl's registries, and is ours or verl's own.

    Args:
        adv_estimator: value of ``algorithm.adv_estimator``.
        loss_mode: value of ``actor_rollout_ref.actor.policy_loss.loss_mode``.

    Raises:
        ConfigError: if the two contradict each other.
        RegistrationError: with the reason, if something is missing or was replaced.
    """
    if entrance(adv_estimator, loss_mode)[0] is None:
        return
    from verl.trainer.ppo import core_algos

    if is_built_in(core_algos):
        return
    from hpo_plugin.glue.estimators import ESTIMATORS
    from hpo_plugin.glue.losses import LOSSES

    plugin = sys.modules.get("hpo_plugin.glue.plugin")
    failure = getattr(plugin, "FAILURE", None) if plugin else "verl did not load the entry point hpo of verl.plugins"
    for kind, registry, ours, name in (
        ("advantage estimator", core_algos.ADV_ESTIMATOR_REGISTRY, ESTIMATORS, adv_estimator),
        ("policy loss", core_algos.POLICY_LOSS_REGISTRY, LOSSES, loss_mode),
    ):
        if name not in HYSTERETIC or registry.get(name) is ours[name]:
            continue
        held = registry.get(name)
        reason = failure or ("nothing is registered" if held is None else f"{held.__module__}.{held.__qualname__} is")
        raise RegistrationError(
            f"the {kind} {name!r} of hpo_plugin is not registered in this process: {reason}. Check the installation "
            "with `hpo-plugin check`; VERL_USE_EXTERNAL_PLUGINS must not exclude hpo."
        )
    if failure:
        raise RegistrationError(f"hpo_plugin did not load completely in this process: {failure}")
