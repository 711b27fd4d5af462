"""``+algorithm.policy_loss=<preset>`` with verl's stock config, or a config based on it.

The presets are the rows of the table ``policy_loss_presets`` in ``configs/hpo.yaml``. Configs that include ``hpo.yaml``
read the table by interpolation. For other configs, this module writes the row into the config.
"""

from __future__ import annotations

import functools
import math
from importlib.resources import files
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf

from hpo_plugin.errors import ConfigError
from hpo_plugin.variants import VARIANTS
from hpo_plugin.verl import selection as keys

__all__ = ["PRESET_COLUMNS", "apply_preset", "check_values", "preset_of", "preset_rows"]


class Column(NamedTuple):
    """One column of the table of presets: a config key of verl.

    Attributes:
        key: verl's config key.
        default: Its value in verl's stock config; a test compares it with verl.
        gives_way: For a key that defines the algorithm: the values that a preset replaces. None for other keys: a
            value other than the default is set by the user, and the preset does not change it.
    """

    key: str
    default: Any
    gives_way: tuple[Any, ...] | None


_ACTOR = "actor_rollout_ref.actor"

PRESET_COLUMNS = {
    "adv_estimator": Column(keys.KEY_ESTIMATOR, "gae", ("gae", "grpo")),
    "loss_mode": Column(keys.KEY_LOSS_MODE, "vanilla", ("vanilla",)),
    "loss_agg_mode": Column(keys.KEY_AGGREGATION, "token-mean", ("token-mean",)),
    "norm_adv_by_std_in_grpo": Column("algorithm.norm_adv_by_std_in_grpo", True, None),
    "loss_scale_factor": Column(f"{_ACTOR}.loss_scale_factor", None, None),
    "clip_ratio_low": Column(f"{_ACTOR}.clip_ratio_low", 0.2, None),
    "clip_ratio_high": Column(f"{_ACTOR}.clip_ratio_high", 0.2, None),
    "tau_pos": Column(f"{_ACTOR}.tau_pos", 1.0, None),
    "tau_neg": Column(f"{_ACTOR}.tau_neg", 1.05, None),
}


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    text = files("hpo_plugin.configs").joinpath("hpo.yaml").read_text(encoding="utf-8")
    table: dict[str, dict[str, Any]] = yaml.safe_load(text)[keys.KEY_PRESETS]
    return table


def preset_rows() -> dict[str, dict[str, Any]]:
    """All presets by name. A variant without a row in the table gets the row of ``ahpo`` with its own name."""
    table = _table()
    return table | {
        name: table["ahpo"] | {"adv_estimator": name, "loss_mode": name} for name in VARIANTS if name not in table
    }


def preset_of(config: DictConfig) -> dict[str, Any] | None:
    """The row that ``algorithm.policy_loss`` names; None if the key is not set. ConfigError for an unknown name.

    Configs that include ``hpo.yaml`` read the estimator from the key, so they need a name.
    """
    name = OmegaConf.select(config, keys.KEY_POLICY_LOSS)
    rows = {**preset_rows(), **(config.get(keys.KEY_PRESETS) or {})}
    if name is not None and name not in rows:
        raise ConfigError(f"{keys.KEY_POLICY_LOSS}={name} is not a preset. Choose one of: {', '.join(rows)}.")
    if name is None and keys.KEY_PRESETS in config and OmegaConf.select(config, keys.KEY_ESTIMATOR) is None:
        raise ConfigError(f"{keys.KEY_POLICY_LOSS}=null selects no algorithm. Choose one of: {', '.join(rows)}.")
    return rows.get(name)


def check_values(config: DictConfig) -> None:
    """Reject values of the wrong type in the columns that a preset does not replace. verl does not check them.

    Raises:
        ConfigError: the message names the key, its value and what to do.
    """
    for key, default, gives_way in PRESET_COLUMNS.values():
        value = OmegaConf.select(config, key, default=default)
        if gives_way is not None:
            continue
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise ConfigError(f"{key}={value!r} is not a boolean. Set {key}=true or {key}=false.")
        elif value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf
        ):
            raise ConfigError(f"{key}={value!r} is not a number of 0 or more. Set a number of 0 or more.")


def apply_preset(config: DictConfig) -> list[str]:
    """Write the preset that ``algorithm.policy_loss`` names into the config, in place. A second call changes nothing.

    Args:
        config: verl's root config. Without the key, the function does nothing.

    Returns:
        One line for each value that the function changed, and for each value that differs from the preset and was not
        changed. Empty for configs that include ``hpo.yaml``, and if the preset was applied before.

    Raises:
        ConfigError: for an unknown name, or an override that contradicts the preset.
    """
    name, row = OmegaConf.select(config, keys.KEY_POLICY_LOSS), preset_of(config)
    if row is None or keys.KEY_PRESETS in config:
        return []
    changes: dict[str, Any] = {}
    lines = []
    for column, (key, default, gives_way) in PRESET_COLUMNS.items():
        value, wanted = OmegaConf.select(config, key), row[column]
        resolved = OmegaConf.select(config, wanted[2:-1]) if str(wanted).startswith("${") else wanted
        if value == resolved:
            continue
        if value in (gives_way or (default,)):
            changes[key] = wanted
            lines.append(f"{key}: {value} -> {resolved}")
        elif gives_way is None:
            lines.append(f"{key}={value} is not changed (the preset has {resolved})")
        else:
            raise ConfigError(
                f"{key}={value} contradicts {keys.KEY_POLICY_LOSS}={name}, which needs {key}={resolved}. Remove "
                f"{key}={value}, or remove {keys.KEY_POLICY_LOSS} and set {keys.KEY_ESTIMATOR} and "
                f"{keys.KEY_LOSS_MODE} yourself."
            )
    for key, value in changes.items():
        OmegaConf.update(config, key, value, force_add=True)
    return lines if changes else []
