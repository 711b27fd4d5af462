"""Which algorithm a verl config selects, and where its hysteretic weights are applied: exactly once.

An *arm* is one algorithm of a comparison. Two keys of verl's config decide it, the advantage estimator and the loss
mode:

===================  ======================  =========================================================
``adv_estimator``    ``loss_mode``           who weighs
===================  ======================  =========================================================
anything else        ``hpo`` / ``ahpo``      the loss
``hpo`` / ``ahpo``   anything else           the estimator (hysteresis composes with gspo, sapo, cispo…)
the same of the two, in both keys            the loss; the estimator returns plain advantages
``hpo`` and ``ahpo``, mixed                  refused
===================  ======================  =========================================================

Everything that can be wrong in a config is found here, before the first rollout. This module imports OmegaConf only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

__all__ = ["ADAPTIVE", "HYSTERETIC", "Arm", "ConfigError", "Weigh", "entrance", "resolve_arm"]

Weigh = Literal["advantage", "loss"]

HYSTERETIC = ("hpo", "ahpo")
"""The names registered with verl, as estimator and as loss mode."""

ADAPTIVE = "ahpo"

DEFAULT_ALPHA = 0.6
DEFAULT_ALPHA_MIN = 0.1

KEY_POLICY_LOSS = "algorithm.policy_loss"
KEY_ESTIMATOR = "algorithm.adv_estimator"
KEY_LOSS_MODE = "actor_rollout_ref.actor.policy_loss.loss_mode"
KEY_AGGREGATION = "actor_rollout_ref.actor.loss_agg_mode"
KEY_HPO = "algorithm.hpo"
KEY_PRESETS = "policy_loss_presets"

MEAN_LENGTH = "token-mean"
"""verl's name for mean-length normalization: N·L̄ is the number of tokens of the optimizer's mini-batch."""


class ConfigError(ValueError):
    """A config that selects nothing sensible; the message names the keys, their values and what to do."""


@dataclass(frozen=True)
class Arm:
    """The algorithm a config selects."""

    adv_estimator: str
    loss_mode: str
    loss_agg_mode: str
    hysteresis: str | None
    """``hpo`` (fixed α), ``ahpo`` (adaptive α) or None (no hysteretic weights)."""
    weigh: Weigh | None
    """Who applies the weights; None without hysteresis."""
    alpha: float
    alpha_min: float

    @property
    def label(self) -> str:
        """One line for tables: what weighs, with which α."""
        if self.hysteresis is None:
            return "no hysteretic weights"
        where = "policy loss" if self.weigh == "loss" else "advantage estimator"
        value = f"α adaptive, α_min = {self.alpha_min:g}" if self.hysteresis == ADAPTIVE else f"α = {self.alpha:g}"
        return f"{self.hysteresis}: {value}, weighed by the {where}"


def entrance(adv_estimator: str, loss_mode: str) -> tuple[str | None, Weigh | None]:
    """Hysteresis and who applies it, from verl's two keys.

    Args:
        adv_estimator: value of ``algorithm.adv_estimator``.
        loss_mode: value of ``actor_rollout_ref.actor.policy_loss.loss_mode``.

    Returns:
        ``(hysteresis, weigh)``; both None if neither key names a hysteretic algorithm.

    Raises:
        ConfigError: if one key says ``hpo`` and the other ``ahpo``.
    """
    by_estimator, by_loss = adv_estimator in HYSTERETIC, loss_mode in HYSTERETIC
    if by_estimator and by_loss and adv_estimator != loss_mode:
        raise ConfigError(
            f"{KEY_ESTIMATOR}={adv_estimator} and {KEY_LOSS_MODE}={loss_mode} are two different algorithms. "
            f"Set both to {adv_estimator} or both to {loss_mode} (or select one with {KEY_POLICY_LOSS})."
        )
    if by_loss:
        return loss_mode, "loss"
    if by_estimator:
        return adv_estimator, "advantage"
    return None, None


def _select(config: DictConfig, key: str, default: Any = None) -> Any:
    try:
        return OmegaConf.select(config, key, default=default)
    except OmegaConfBaseException as error:
        presets = config.get(KEY_PRESETS)
        arm = OmegaConf.select(config, KEY_POLICY_LOSS)
        if presets is not None and arm not in presets:
            raise ConfigError(
                f"{KEY_POLICY_LOSS}={arm} is not a preset. Choose one of: {', '.join(presets)}."
            ) from None
        raise ConfigError(f"{key} cannot be resolved: {error}") from error


def _number(settings: DictConfig, key: str, default: float) -> float:
    value = settings.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise ConfigError(f"{KEY_HPO}.{key}={value!r} must be a number in [0, 1].")
    return float(value)


def resolve_arm(config: DictConfig) -> Arm:
    """Read a whole verl config, stock or ours, and refuse what contradicts itself or would have no effect.

    Args:
        config: the root config, as ``python -m verl.trainer.main_ppo`` composes it.

    Returns:
        The :class:`Arm`.

    Raises:
        ConfigError: see the messages; each names the keys.
    """
    preset = _select(config, KEY_POLICY_LOSS)
    adv_estimator = str(_select(config, KEY_ESTIMATOR))
    loss_mode = str(_select(config, KEY_LOSS_MODE, "vanilla"))
    loss_agg_mode = str(_select(config, KEY_AGGREGATION))
    hysteresis, weigh = entrance(adv_estimator, loss_mode)

    settings = _select(config, KEY_HPO)
    if settings is None:
        settings = OmegaConf.create({})
    if not isinstance(settings, DictConfig):
        raise ConfigError(f"{KEY_HPO}={settings!r} must be a mapping with alpha, alpha_min, weigh.")
    # A verl that has HPO built in names its dataclass here.
    unknown = sorted(set(map(str, settings)) - {"alpha", "alpha_min", "weigh", "_target_"})
    if unknown:
        raise ConfigError(f"{KEY_HPO}.{unknown[0]} is not a setting. There are: alpha, alpha_min, weigh.")
    alpha = _number(settings, "alpha", DEFAULT_ALPHA)
    alpha_min = _number(settings, "alpha_min", DEFAULT_ALPHA_MIN)

    selected = f"{KEY_ESTIMATOR}={adv_estimator} and {KEY_LOSS_MODE}={loss_mode}"
    if preset is not None and (preset in HYSTERETIC or hysteresis is not None) and preset != hysteresis:
        raise ConfigError(
            f"{KEY_POLICY_LOSS}={preset} contradicts {selected}. Drop the overrides of the two, or set "
            f"{KEY_POLICY_LOSS}={hysteresis or 'grpo'}; with verl's stock config, which has no presets, remove "
            f"{KEY_POLICY_LOSS} and set the two keys themselves."
        )
    if hysteresis != "hpo" and alpha != DEFAULT_ALPHA:
        raise ConfigError(
            f"{KEY_HPO}.alpha={alpha:g} has no effect with {selected}: only hpo has a fixed α. "
            f"Remove it, or select hpo."
        )
    if hysteresis != ADAPTIVE and alpha_min != DEFAULT_ALPHA_MIN:
        raise ConfigError(
            f"{KEY_HPO}.alpha_min={alpha_min:g} has no effect with {selected}: only ahpo adapts α. "
            f"Remove it, or select ahpo."
        )
    told = settings.get("weigh")
    if told not in (None, "advantage", "loss"):
        raise ConfigError(f"{KEY_HPO}.weigh={told!r} must be advantage, loss or null.")
    if told is not None and told != weigh:
        raise ConfigError(
            f"{KEY_HPO}.weigh={told} contradicts {selected}, with which the weights are applied by "
            f"{'nobody' if weigh is None else 'the ' + weigh}. Set {KEY_HPO}.weigh=null."
        )
    if weigh == "loss" and loss_agg_mode != MEAN_LENGTH:
        raise ConfigError(
            f"{KEY_LOSS_MODE}={loss_mode} normalizes by the batch's mean length, which is "
            f"{KEY_AGGREGATION}={MEAN_LENGTH}, not {loss_agg_mode}. Set it so; for hysteretic weights with another "
            f"aggregation set {KEY_ESTIMATOR}={loss_mode} and {KEY_LOSS_MODE}=vanilla."
        )
    return Arm(adv_estimator, loss_mode, loss_agg_mode, hysteresis, weigh, alpha, alpha_min)
