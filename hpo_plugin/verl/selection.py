"""Reads the algorithm that a verl config selects, and rejects contradictory configs.

Two keys of verl's config select the algorithm: the advantage estimator, which applies α, and the loss mode, which
normalizes by the mean length. ``docs/configuration.md`` has the table. This module imports only OmegaConf and the table
of variants.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hpo_plugin.errors import ConfigError
from hpo_plugin.variants import VARIANTS, Variant, settings

__all__ = ["BASE_ESTIMATORS", "ConfigError", "Selection", "alpha_batch", "check_selection", "read_selection"]

KEY_POLICY_LOSS = "algorithm.policy_loss"
KEY_ESTIMATOR = "algorithm.adv_estimator"
KEY_LOSS_MODE = "actor_rollout_ref.actor.policy_loss.loss_mode"
KEY_AGGREGATION = "actor_rollout_ref.actor.loss_agg_mode"
KEY_KL_IN_REWARD = "algorithm.use_kl_in_reward"
KEY_HPO = "algorithm.hpo"
KEY_BASE = f"{KEY_HPO}.base_estimator"
KEY_OBSERVE = f"{KEY_HPO}.observe"
KEY_N = "actor_rollout_ref.rollout.n"
_ACTOR = "actor_rollout_ref.actor"
#: The last parts of the keys that select an algorithm.
_SELECTING = tuple(key.rpartition(".")[2] for key in (KEY_POLICY_LOSS, KEY_ESTIMATOR, KEY_LOSS_MODE))
KEY_LOG_PROBS = "actor_rollout_ref.rollout.calculate_log_probs"
KEY_CORRECTION = "algorithm.rollout_correction"
#: The table of presets, in configs that include ``hpo.yaml``.
KEY_PRESETS = "policy_loss_presets"

#: The keys of ``algorithm.hpo`` other than the settings of the variants.
OTHER_KEYS = ("base_estimator", "observe")

#: verl's name of mean-length normalization: N·L̄ is the number of tokens of the optimizer's mini-batch.
MEAN_LENGTH = "token-mean"

#: The base estimator that this package computes itself, with exact zeros: ``group_relative_advantage``.
OWN = "grpo"

#: Estimators of verl to whose advantages α can be applied. True: relative to a group, so equal rewards give the
#: advantage 0. False: whitened over the batch, so they do not.
BASE_ESTIMATORS = dict.fromkeys((OWN, "rloo", "rloo_vectorized", "opo", "gpg"), True) | dict.fromkeys(
    ("reinforce_plus_plus", "reinforce_plus_plus_baseline"), False
)

#: Losses of verl that are not positively homogeneous in A: α on the advantage does not multiply the loss by α.
NOT_HOMOGENEOUS = ("clip_cov", "kl_cov", "dro")


@dataclass(frozen=True)
class Selection:
    """The algorithm a config selects.

    Attributes:
        adv_estimator: ``algorithm.adv_estimator``.
        loss_mode: ``actor_rollout_ref.actor.policy_loss.loss_mode``.
        loss_agg_mode: ``actor_rollout_ref.actor.loss_agg_mode``.
        variant: The variant that defines α; None if the estimator applies no α.
        base_estimator: The estimator of the advantages to which α is applied, a key of :data:`BASE_ESTIMATORS`.
        settings: The value of every setting of ``algorithm.hpo``.
    """

    adv_estimator: str
    loss_mode: str
    loss_agg_mode: str
    variant: Variant | None
    base_estimator: str
    settings: Mapping[str, float]

    @property
    def label(self) -> str:
        """One line for tables."""
        if self.variant is None:
            return "no α"
        base = "" if self.base_estimator == OWN else f", applied to the advantages of {self.base_estimator}"
        return self.variant.describe(self.settings) + base


def _select(config: DictConfig, key: str, default: Any = None) -> Any:
    try:
        return OmegaConf.select(config, key, default=default)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key} cannot be resolved: {error}. Correct the interpolation.") from error


def verl_has_settings() -> bool:
    """Whether ``algorithm.hpo`` is a node of verl's own config; verl then checks its keys and values."""
    from verl.trainer.config import AlgoConfig

    return KEY_HPO.partition(".")[2] in AlgoConfig.__dataclass_fields__


def read_settings(node: Any) -> tuple[dict[str, float], str]:
    """The value of every setting of every variant, and the base estimator, from the node ``algorithm.hpo`` or None.

    Raises:
        ConfigError: for a key that is not a setting, or a value out of bounds.
    """
    if node is None:
        node = {}
    names = (*settings(), *OTHER_KEYS)
    if not isinstance(node, DictConfig | dict):
        raise ConfigError(f"{KEY_HPO}={node!r} must be a mapping with the keys {', '.join(names)}.")
    unknown = [] if verl_has_settings() else sorted(set(map(str, node)) - set(names))
    if "weigh" in unknown and node["weigh"] is None:
        # Version 0.1.0 saved this key. null meant that the estimator applies α, which is now always the case.
        unknown.remove("weigh")
    if unknown:
        raise ConfigError(
            f"{KEY_HPO}.{unknown[0]}={node.get(unknown[0])} is not a setting. Remove it; the settings are "
            f"{', '.join(names)}."
        )
    values = {
        name: setting.checked(node.get(name, setting.default), f"{KEY_HPO}.{name}")
        for name, setting in settings().items()
    }
    base = node.get("base_estimator") or OWN
    if base not in BASE_ESTIMATORS:
        raise ConfigError(
            f"{KEY_BASE}={base} is not supported: {_why_not_a_base(str(base))} Set one of {', '.join(BASE_ESTIMATORS)}."
        )
    return values, str(base)


def is_observed(node: Any) -> bool:
    """Whether ``algorithm.hpo.observe`` is set, from the node ``algorithm.hpo`` or None.

    Raises:
        ConfigError: for a value that is not true or false.
    """
    value = node.get("observe", False) if isinstance(node, DictConfig | dict) else False
    if not isinstance(value, bool):
        raise ConfigError(f"{KEY_OBSERVE}={value!r} is not a boolean. Set {KEY_OBSERVE}=true, or remove it.")
    return value


def describe_observation(config: DictConfig) -> str | None:
    """One line about the observation of a run; None if ``algorithm.hpo.observe`` is not set.

    Raises:
        ConfigError: if there is nothing to observe, or a setting of ``algorithm.hpo`` is not valid.
    """
    node = _select(config, KEY_HPO)
    if not is_observed(node):
        return None
    if OmegaConf.select(config, KEY_N) == 1:
        raise ConfigError(
            f"{KEY_OBSERVE}=True has nothing to observe with {KEY_N}=1: in a group of one response the advantage is 0. "
            f"Set {KEY_N} to 2 or more, or remove {KEY_OBSERVE}."
        )
    alpha_min = read_settings(node)[0]["alpha_min"]
    return (
        "the run is observed and its update does not change: actor/hpo/observe/* logs what A-HPO (alpha_min = "
        f"{alpha_min:g}) would use; {alpha_batch(config)}"
    )


def _why_not_a_base(estimator: str) -> str:
    if estimator == "grpo_passk":
        return "it has no negative advantages, so α would be 1 in every step."
    if estimator in ("gae", "remax", "gdpo", "optimal_token_baseline", "tir_optimal_token_baseline"):
        return "it needs inputs that verl does not pass to a registered estimator."
    return "it is not known whether it gives the advantage 0 for equal rewards."


def read_selection(config: DictConfig) -> Selection:
    """Read the algorithm from a whole verl config, and reject contradictory values and values without effect.

    Args:
        config: the root config, as ``python -m verl.trainer.main_ppo`` composes it, with its preset applied.

    Returns:
        The :class:`Selection`.

    Raises:
        ConfigError: each message names the keys, their values and what to do.
    """
    preset = _select(config, KEY_POLICY_LOSS)
    adv_estimator = str(_select(config, KEY_ESTIMATOR))
    loss_mode = str(_select(config, KEY_LOSS_MODE, "vanilla"))
    loss_agg_mode = str(_select(config, KEY_AGGREGATION))
    selected = f"{KEY_ESTIMATOR}={adv_estimator} and {KEY_LOSS_MODE}={loss_mode}"

    name = adv_estimator if adv_estimator in VARIANTS else loss_mode
    variant = VARIANTS.get(name)
    node = _select(config, KEY_HPO)
    if variant is None and verl_has_settings():
        # Only this key of verl's own node belongs to this package.
        node = {"base_estimator": (node or {}).get("base_estimator")}
    values, base = read_settings(node)
    if variant is not None and loss_mode in VARIANTS and loss_mode != name:
        raise ConfigError(
            f"{selected} are two different algorithms. Set both to {adv_estimator} or both to {loss_mode}, or select "
            f"one with {KEY_POLICY_LOSS}."
        )
    if variant is not None and adv_estimator not in VARIANTS:
        # loss_mode=ahpo with another estimator: α is applied to the advantages of that estimator.
        other = OWN if adv_estimator == "grpo_vectorized" else adv_estimator
        if other not in BASE_ESTIMATORS:
            raise ConfigError(
                f"{KEY_LOSS_MODE}={name} does not support {KEY_ESTIMATOR}={adv_estimator}: "
                f"{_why_not_a_base(adv_estimator)} Set {KEY_ESTIMATOR} to {name}, or to one of "
                f"{', '.join(BASE_ESTIMATORS)}."
            )
        if base not in (OWN, other):
            raise ConfigError(f"{KEY_BASE}={base} contradicts {KEY_ESTIMATOR}={adv_estimator}. Remove one of the two.")
        base = other
    if preset is not None and (preset in VARIANTS or variant is not None) and preset != getattr(variant, "name", None):
        raise ConfigError(
            f"{KEY_POLICY_LOSS}={preset} contradicts {selected}. Remove either {KEY_POLICY_LOSS} or the other two "
            "overrides."
        )
    # hpo.yaml has all settings, so a default does not show that the user has set it.
    given = {} if node is None or KEY_PRESETS in config else node
    effective = set() if variant is None else {setting.name for setting in variant.settings}
    if is_observed(node):
        effective |= {setting.name for setting in VARIANTS["ahpo"].settings}
    for key, setting in settings().items():
        is_set = key in given or values[key] != setting.default
        if is_set and key not in effective and not verl_has_settings():
            owners = " or ".join(v.name for v in VARIANTS.values() if setting in v.settings)
            raise ConfigError(
                f"{KEY_HPO}.{key}={values[key]:g} has no effect with {selected}: it is a setting of {owners}. "
                f"Remove it, or select {owners}."
            )
    if variant is None and base != OWN:
        raise ConfigError(
            f"{KEY_BASE}={base} has no effect with {selected}. Remove it, or set {KEY_ESTIMATOR} to one of "
            f"{', '.join(VARIANTS)}."
        )
    if loss_mode in VARIANTS and loss_agg_mode != MEAN_LENGTH:
        raise ConfigError(
            f"{KEY_AGGREGATION}={loss_agg_mode} contradicts {KEY_LOSS_MODE}={loss_mode}, which normalizes by the "
            f"batch's mean length. Set {KEY_AGGREGATION}={MEAN_LENGTH}. To use α with another aggregation, set "
            f"{KEY_ESTIMATOR}={loss_mode} and {KEY_LOSS_MODE}=vanilla."
        )
    return Selection(adv_estimator, loss_mode, loss_agg_mode, variant, base, values)


def check_built_in(config: DictConfig, name: str, base_estimator: str) -> None:
    """Reject settings that need this package's estimator, if verl provides the estimator itself.

    Args:
        config: the root config.
        name: the selected variant.
        base_estimator: the estimator of the advantages to which α is applied.

    Raises:
        ConfigError: each message names the key, its value and what to do.
    """
    preset = _select(config, KEY_POLICY_LOSS)
    if preset not in (None, name):
        raise ConfigError(f"{KEY_POLICY_LOSS}={preset} contradicts {KEY_ESTIMATOR}={name}. Remove one of the two.")
    if base_estimator != OWN:
        raise ConfigError(
            f"α on the advantages of {base_estimator} needs hpo_plugin's estimator {name}, but this version of verl "
            f"provides {name} itself. Set {KEY_ESTIMATOR}={name} and remove {KEY_BASE}, or use a version of verl "
            "without HPO."
        )


def trainer_of(config: DictConfig) -> str:
    """The trainer of a config: a key of :data:`ALPHA_BATCH`."""
    if OmegaConf.select(config, "async_training") is not None:
        return "fully-async"
    if OmegaConf.select(config, "rollout.nnodes") is not None:
        return "one-step-off"
    if OmegaConf.select(config, "trainer.use_v1") is False:
        return "legacy"
    return f"V1 {OmegaConf.select(config, 'trainer.v1.trainer_mode', default='sync')}"


#: The batch that α is computed from in each of verl's trainers: the rows that verl passes to the estimator in one call.
ALPHA_BATCH = {
    "V1 sync": "the step's rollout batch",
    "V1 colocate_async": "the step's rollout batch",
    "V1 separate_async": "each local update's batch, {updates} in a global step",
    "legacy": "the step's rollout batch",
    "one-step-off": "the step's rollout batch, generated one step earlier",
    "fully-async": "each batch that the trainer takes from the queue",
}


def alpha_batch(config: DictConfig) -> str:
    """The trainer of a config, and the batch that α is computed from."""
    trainer = trainer_of(config)
    updates = OmegaConf.select(config, "trainer.v1.separate_async.parameter_sync_step", default=1)
    batch = ALPHA_BATCH.get(trainer, "each batch that the trainer passes to the estimator")
    return f"{trainer} trainer: α is computed from {batch.format(updates=updates)}"


def check_selection(config: DictConfig, selection: Selection) -> None:
    """Reject a run in which the selected α would be wrong or would have no effect.

    Args:
        config: the root config.
        selection: the selection of that config, with a variant.

    Raises:
        ConfigError: each message names the key, its value and what to do.
    """
    assert selection.variant is not None
    name = selection.variant.name
    if selection.loss_mode in NOT_HOMOGENEOUS:
        raise ConfigError(
            f"{KEY_LOSS_MODE}={selection.loss_mode} does not support {name}: the loss is not homogeneous in the "
            f"advantage, so α would not multiply it. Set {KEY_LOSS_MODE} to {name}, vanilla, gspo, sapo or cispo."
        )
    n = OmegaConf.select(config, KEY_N, default=2)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ConfigError(f"{KEY_N}={n!r} is not a number of responses. Set {KEY_N} to an integer of 2 or more.")
    if BASE_ESTIMATORS[selection.base_estimator] and n == 1:
        raise ConfigError(
            f"{KEY_N}=1 trains nothing with {name}: in a group of one response the advantage is 0. "
            f"Set {KEY_N} to 2 or more, or {KEY_BASE}=reinforce_plus_plus."
        )
    _check_correction(config, selection)
    if selection.loss_mode in VARIANTS:
        _check_clip_ratio(config)
    trainer = trainer_of(config)
    if OmegaConf.select(config, KEY_KL_IN_REWARD) and not trainer.startswith("V1"):
        raise ConfigError(kl_in_reward(name, f"the {trainer} trainer"))
    if OmegaConf.select(config, "distillation.enabled"):
        loss = "distillation.distillation_loss"
        if OmegaConf.select(config, f"{loss}.policy_loss_mode") in VARIANTS:
            raise ConfigError(
                f"{loss}.policy_loss_mode={OmegaConf.select(config, f'{loss}.policy_loss_mode')} is not supported: α "
                "applies to the task's advantages, not to a distillation loss. Set "
                f"{loss}.policy_loss_mode=vanilla."
            )
        if OmegaConf.select(config, f"{loss}.use_task_rewards") is False:
            raise ConfigError(
                f"With {loss}.use_task_rewards=False no policy loss uses advantages, so {name} has no effect. Set "
                f"{loss}.use_task_rewards=True, or select another {KEY_ESTIMATOR} and {KEY_LOSS_MODE}."
            )


def _check_correction(config: DictConfig, selection: Selection) -> None:
    """Reject a rollout correction that verl cannot compute, or does not apply."""
    correction = _select(config, KEY_CORRECTION) or {}
    asked = {key: correction[key] for key in ("bypass_mode", "rollout_is", "rollout_rs") if correction.get(key)}
    loss_type = correction.get("loss_type", "ppo_clip")
    if loss_type != "ppo_clip" and selection.loss_mode != "bypass_mode":
        raise ConfigError(
            f"{KEY_CORRECTION}.loss_type={loss_type} has no effect with {KEY_LOSS_MODE}={selection.loss_mode}. Remove "
            f"it, or remove {KEY_POLICY_LOSS} and set {KEY_LOSS_MODE}=bypass_mode."
        )
    if asked and OmegaConf.select(config, KEY_LOG_PROBS) is False:
        key, value = next(iter(asked.items()))
        raise ConfigError(
            f"{KEY_CORRECTION}.{key}={value} needs log-probabilities of the rollout, but {KEY_LOG_PROBS}=False. Set "
            f"{KEY_LOG_PROBS}=True, or remove {KEY_CORRECTION}.{key}."
        )
    if asked.pop("bypass_mode", False) and asked and selection.loss_mode != "bypass_mode":
        key, value = next(iter(asked.items()))
        assert selection.variant is not None
        raise ConfigError(
            f"{KEY_CORRECTION}.{key}={value} has no effect with {KEY_CORRECTION}.bypass_mode=True and "
            f"{KEY_LOSS_MODE}={selection.loss_mode}. Remove it, set {KEY_CORRECTION}.bypass_mode=False, or remove "
            f"{KEY_POLICY_LOSS} and set {KEY_ESTIMATOR}={selection.variant.name} and {KEY_LOSS_MODE}=bypass_mode."
        )


def _check_clip_ratio(config: DictConfig) -> None:
    """Reject ``clip_ratio`` where the two keys that replace it have other values."""
    key = "actor_rollout_ref.actor.clip_ratio"
    both, low, high = (OmegaConf.select(config, name) for name in (key, f"{key}_low", f"{key}_high"))
    # verl's default is 0.2 for all three.
    if both not in (None, 0.2, low, high) and None not in (low, high):
        raise ConfigError(
            f"{key}={both} has no effect, because {key}_low={low} and {key}_high={high} take precedence. Remove it, "
            f"and set {key}_low and {key}_high."
        )


def check_keys(config: DictConfig, selection: Selection) -> None:
    """Reject keys that look like keys of this package or of verl's ``algorithm``, because verl ignores unknown keys.

    Args:
        config: the root config.
        selection: the selection of that config. Without a variant and without ``algorithm.hpo.observe``, only a key
            that would select a variant is rejected.

    Raises:
        ConfigError: each message names the key, its value and the key to set.
    """
    for key in _children(config, "", "algorithm", _ACTOR):
        if key in (KEY_ESTIMATOR, KEY_POLICY_LOSS) or not _similar(key, _SELECTING):
            continue
        value = _select(config, key)
        if isinstance(value, str) and value in VARIANTS and value != getattr(selection.variant, "name", None):
            raise ConfigError(f"{key}={value} selects nothing. Remove it, and set {KEY_POLICY_LOSS}={value} instead.")
    observed = is_observed(_select(config, KEY_HPO))
    if selection.variant is None and not observed:
        return
    effective = {**selection.settings, "base_estimator": selection.base_estimator, "observe": observed}
    for key in _children(config, "", "hpo", "algorithm", _ACTOR, f"{_ACTOR}.policy_loss"):
        name = _similar(key, effective)
        # An equal value has its effect, for example that of an interpolation.
        if name and (value := _select(config, key)) != effective[name]:
            raise ConfigError(f"{key}={value} has no effect. Remove it, and set {KEY_HPO}.{name} instead.")
    from verl.trainer.config import AlgoConfig

    known = [*AlgoConfig.__dataclass_fields__, *(key.partition(".")[2] for key in (KEY_POLICY_LOSS, KEY_HPO))]
    for key in _children(config, "algorithm"):
        name = key.partition(".")[2]
        if name not in known and (close := difflib.get_close_matches(name, known, 1, 0.78)):
            raise ConfigError(
                f"{key}={_select(config, key)} has no effect: verl does not read it. Set algorithm.{close[0]}, or "
                "remove it."
            )


def _children(config: DictConfig, *nodes: str) -> Iterator[str]:
    """The whole keys of the children of nodes; the root is the empty string."""
    for node in nodes:
        parent = OmegaConf.select(config, node) if node else config
        if isinstance(parent, DictConfig):
            yield from (f"{node}.{name}".lstrip(".") for name in map(str, parent))


def _similar(key: str, names: Iterable[str]) -> str | None:
    """The name that the last part of a key resembles, with or without ``hpo`` in front."""
    plain = {re.sub(r"[^a-z]", "", name): name for name in names}
    word = re.sub(r"[^a-z]", "", key.rpartition(".")[2].lower()).removeprefix("hpo")
    return plain[found[0]] if (found := difflib.get_close_matches(word, plain, 1, 0.85)) else None


def kl_in_reward(name: str, where: str) -> str:
    """The error message for a KL penalty in the reward."""
    return (
        f"{KEY_KL_IN_REWARD}=True does not work with {where}: the estimator gets rewards that contain the KL penalty. "
        f"The penalty gives nonzero advantages to groups with equal task scores, and {name} would count their signs. "
        f"Set {KEY_KL_IN_REWARD}=False and actor_rollout_ref.actor.use_kl_loss=True, or use verl's V1 trainer with "
        "hpo_plugin's estimator."
    )
