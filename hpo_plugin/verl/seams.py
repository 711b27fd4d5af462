"""The five functions of verl that this package replaces, because verl has no extension point there.

1. ``verl.utils.config.validate_config`` and 2. ``verl.trainer.main_ppo.run_ppo``: every trainer of verl calls at least
   one of them in the driver, before the first rollout. The replacements call :func:`prepare` first.
3. ``verl.trainer.ppo.metric_utils.compute_data_metrics``: the replacement adds the metrics of HPO to verl's log.
4. ``verl.trainer.ppo.v1.utils.compute_advantage_for_multi_trajectories``: the only function that has the session of
   each row, and the task's scores separately from a KL penalty in the reward.
5. ``verl.trainer.ppo.ray_trainer.compute_advantage``: in the other trainers, the only function that has the batch and
   the config for every estimator. Only ``algorithm.hpo.observe`` needs it.

``tests/verl/test_seams.py`` fails if verl moves one of them. This package replaces no part of HPO that verl provides
itself.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from hpo_plugin.errors import ConfigError
from hpo_plugin.variants import VARIANTS
from hpo_plugin.verl import metrics
from hpo_plugin.verl import selection as keys
from hpo_plugin.verl.losses import normalizes_by_mean_length
from hpo_plugin.verl.presets import apply_preset, check_values
from hpo_plugin.verl.registration import (
    RegistrationError,
    built_in,
    require_known,
    require_loaded,
    require_registered,
    selects_built_in,
)
from hpo_plugin.verl.selection import Selection, check_built_in, check_keys, check_selection, read_selection
from hpo_plugin.verl.self_test import require_supported_verl

__all__ = ["SEAMS", "prepare", "replace"]

STOCK_TARGET = "verl.workers.config.PolicyLossConfig"
OUR_TARGET = "hpo_plugin.verl.config.HPOPolicyLossConfig"
OF_SESSIONS = ("data", "batch_keys", "adv_estimator", "config")


def prepare(config: DictConfig) -> tuple[Selection | None, list[str]]:
    """Apply the preset, prepare the config for the algorithm that it selects, and check the config.

    The driver calls this function, and some trainers call it again in another process. A second call changes nothing.

    Args:
        config: verl's root config; changed in place.

    Returns:
        The selection, and one line for each value that was set. The selection is None if verl itself provides all of
        the algorithm; verl then checks the config itself.

    Raises:
        ConfigError: for a contradictory config; the message names the keys.
        RegistrationError: if the config selects a variant that cannot be used in this process.
    """
    lines = apply_preset(config)
    if keys.describe_observation(config) is not None:
        _require_observable(config)
    estimator, loss_mode = (str(OmegaConf.select(config, key)) for key in (keys.KEY_ESTIMATOR, keys.KEY_LOSS_MODE))
    if selects_built_in(estimator, loss_mode):
        name = estimator if estimator in VARIANTS else loss_mode
        check_built_in(config, name, str(OmegaConf.select(config, keys.KEY_BASE, default=None) or keys.OWN))
        _check_recipe(config)
        return None, lines
    require_known(config)
    selection = read_selection(config)
    check_keys(config, selection)
    if selection.variant is not None or OmegaConf.select(config, keys.KEY_POLICY_LOSS) is not None:
        check_values(config)
    if selection.variant is not None:
        check_selection(config, selection)
        if selects_built_in(selection.variant.name, "vanilla"):
            check_built_in(config, selection.variant.name, selection.base_estimator)
            if OmegaConf.select(config, keys.KEY_KL_IN_REWARD):
                raise ConfigError(keys.kl_in_reward(selection.variant.name, "verl's built-in estimator"))
        lines += inject_config(config, selection)
        require_registered(selection.variant.name, selection.loss_mode)
        lines += require_supported_verl()
        if selection.loss_mode not in VARIANTS and normalizes_by_mean_length(config) is False:
            lines.append(
                f"{keys.KEY_LOSS_MODE}={selection.loss_mode} does not normalize by the batch's mean length: the run "
                f"uses the α of {selection.variant.title} without its normalization"
            )
    _check_recipe(config)
    # The other trainers set their sizes later.
    if selection.variant is not None and keys.trainer_of(config).startswith(("V1", "legacy")):
        # Imported here because only runs with HPO need it.
        from hpo_plugin.recipe.layout import check_sizes

        check_sizes(config)
    return selection, lines


def _require_observable(config: DictConfig) -> None:
    """Raise a RegistrationError if this package cannot observe the batches of the config's trainer."""
    require_loaded()
    if keys.trainer_of(config).startswith("V1"):
        return
    from verl.trainer.ppo import ray_trainer

    if not hasattr(getattr(ray_trainer, "compute_advantage", None), "__wrapped__"):
        raise RegistrationError(
            f"{keys.KEY_OBSERVE}=True cannot observe the {keys.trainer_of(config)} trainer, because this version of "
            "verl has no verl.trainer.ppo.ray_trainer.compute_advantage. Use verl's V1 trainer, or remove "
            f"{keys.KEY_OBSERVE}."
        )


def _check_recipe(config: DictConfig) -> None:
    # Imported here because only runs with a recipe need it.
    if OmegaConf.select(config, "recipe") is not None:
        from hpo_plugin.recipe.layout import check_layout

        check_layout(config)


def _prepare(config: DictConfig) -> None:
    _, lines = prepare(config)
    observed = keys.describe_observation(config)
    for line in [*lines, observed] if observed else lines:
        print(f"[hpo_plugin] {line}")


def inject_config(config: DictConfig, selection: Selection) -> list[str]:
    """Set the variant's estimator as the run's, and write its name into the policy loss node, in place.

    Returns:
        One line if the config had another estimator; it becomes the base estimator, and α is applied to its advantages.

    Raises:
        ConfigError: if the policy loss node has another class as ``_target_``, which has no field for the estimator.
    """
    assert selection.variant is not None
    name, lines = selection.variant.name, []
    if config.algorithm.adv_estimator != name:
        with open_dict(config):
            OmegaConf.update(config, keys.KEY_BASE, selection.base_estimator, force_add=True)
            config.algorithm.adv_estimator = name
        lines.append(
            f"{keys.KEY_LOSS_MODE}={name} with {keys.KEY_ESTIMATOR}={selection.adv_estimator}: α is applied to the "
            f"advantages of {selection.base_estimator} ({keys.KEY_ESTIMATOR}={name}, "
            f"{keys.KEY_BASE}={selection.base_estimator})"
        )
    if selection.loss_mode not in VARIANTS:
        return lines
    node = config.actor_rollout_ref.actor.policy_loss
    target = node.get("_target_", STOCK_TARGET)
    if target not in (STOCK_TARGET, OUR_TARGET, SAVED_TARGET):
        raise ConfigError(
            f"actor_rollout_ref.actor.policy_loss._target_={target} cannot pass the advantage estimator to the policy "
            f"loss of {name}. Set it to {OUR_TARGET}, or set {keys.KEY_LOSS_MODE}=vanilla."
        )
    if node.get("adv_estimator", name) != name:
        raise ConfigError(
            f"actor_rollout_ref.actor.policy_loss.adv_estimator={node.adv_estimator} contradicts "
            f"{keys.KEY_ESTIMATOR}={name}. Remove it; hpo_plugin sets this key."
        )
    with open_dict(node):
        if target == STOCK_TARGET:
            node._target_ = OUR_TARGET
        node.adv_estimator = name
    return lines


def _validate_config(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from verl.trainer.ppo.utils import need_critic, need_reference_policy

    call = inspect.signature(original).bind(*args, **kwargs)
    config = call.arguments["config"]
    before = OmegaConf.select(config, keys.KEY_ESTIMATOR)
    _prepare(config)
    if OmegaConf.select(config, keys.KEY_ESTIMATOR) != before:
        # The caller computed these values before the estimator changed.
        needs = {"use_critic": need_critic, "use_reference_policy": need_reference_policy}
        call.arguments.update({name: need(config) for name, need in needs.items() if name in call.arguments})
    return original(*call.args, **call.kwargs)


def _run_ppo(original: Callable[..., Any], config: DictConfig, *args: Any, **kwargs: Any) -> Any:
    _prepare(config)
    return original(config, *args, **kwargs)


def _compute_data_metrics(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    logged, ours = original(*args, **kwargs), metrics.drain()
    return logged | ours if ours else logged


def _compute_advantage_for_multi_trajectories(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from verl.trainer.ppo import core_algos

    from hpo_plugin.verl import estimators

    call = inspect.signature(original).bind(*args, **kwargs)
    call.apply_defaults()
    data, batch_keys, estimator, config = (call.arguments[parameter] for parameter in OF_SESSIONS)
    name, preset = str(getattr(estimator, "value", estimator)), (config or {}).get("policy_loss")
    if preset in VARIANTS and preset != name:
        raise ConfigError(
            f"{keys.KEY_POLICY_LOSS}={preset} was not applied, because this trainer calls neither verl's "
            f"validate_config nor run_ppo. Remove it, and set {keys.KEY_ESTIMATOR}={preset} and "
            f"{keys.KEY_AGGREGATION}={keys.MEAN_LENGTH}."
        )
    estimators.record_observation(data, config, batch_keys)
    if core_algos.ADV_ESTIMATOR_REGISTRY.get(name) is estimators.estimator(name):
        batch = data.batch
        batch["advantages"], batch["returns"] = estimators.estimator(name)(
            token_level_rewards=batch["token_level_rewards"],
            response_mask=batch["response_mask"],
            index=data.non_tensor_batch.get("uid"),
            config=config,
            last_row=estimators.last_rows(batch_keys),
            token_level_scores=batch["token_level_scores"] if config.get("use_kl_in_reward") else None,
        )
        return data
    with _v1_estimates():
        data = original(*args, **kwargs)
    if "uid" in data.non_tensor_batch:
        if name in built_in(core_algos.ADV_ESTIMATOR_REGISTRY):
            estimators.record_built_in(name, data, config, batch_keys)
        elif preset is not None:
            estimators.record_comparison(name, data, estimators.last_rows(batch_keys))
    return data


_in_v1 = False


@contextmanager
def _v1_estimates() -> Iterator[None]:
    """Skip the observation in ``compute_advantage``: the V1 trainer calls it with a batch that is already observed."""
    global _in_v1
    _in_v1 = True
    try:
        yield
    finally:
        _in_v1 = False


def _compute_advantage(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from hpo_plugin.verl import estimators

    if not _in_v1:
        call = inspect.signature(original).bind(*args, **kwargs)
        estimators.record_observation(call.arguments["data"], call.arguments.get("config"))
    return original(*args, **kwargs)


#: Module of verl -> the replacement, which has the name of verl's function with an underscore in front, and the
#: parameters that it needs.
SEAMS: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "verl.utils.config": (_validate_config, {"config"}),
    "verl.trainer.main_ppo": (_run_ppo, {"config"}),
    "verl.trainer.ppo.metric_utils": (_compute_data_metrics, set()),
    "verl.trainer.ppo.v1.utils": (_compute_advantage_for_multi_trajectories, set(OF_SESSIONS)),
    "verl.trainer.ppo.ray_trainer": (_compute_advantage, {"data", "config"}),
}

#: No algorithm needs this module: without it HPO works, and :func:`prepare` rejects only a run that observes.
OPTIONAL = "verl.trainer.ppo.ray_trainer"


def replace(module: ModuleType) -> None:
    """Replace verl's function in a module of :data:`SEAMS`.

    The replacement is a plain function with the name of verl's function. pickle serializes it by reference; cloudpickle
    (Ray) serializes it by value if a class of ``__main__`` refers to it. A RegistrationError is raised if verl's
    function does not exist, unless the module is :data:`OPTIONAL`.
    """
    around, needed = SEAMS[module.__name__]
    name = around.__name__.removeprefix("_")
    original = getattr(module, name, None)
    if original is None or not needed <= set(inspect.signature(original).parameters):
        if module.__name__ == OPTIONAL:
            return
        raise RegistrationError(
            f"{module.__name__}.{name} does not exist or has other parameters: hpo_plugin does not support this "
            "version of verl"
        )

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(module, name, replacement)


#: ``_target_`` in configs that version 0.1.0 saved.
SAVED_TARGET = "hpo_plugin.glue.config.HPOPolicyLossConfig"
