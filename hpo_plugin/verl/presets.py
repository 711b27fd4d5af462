"""``+algorithm.policy_loss=<preset>`` on verl's stock config, and on any config built on it.

The presets are the table ``policy_loss_presets`` of ``configs/hpo.yaml``. Our own config resolves it by interpolation;
here a row is written into a config that does not have the table.
"""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf

from hpo_plugin.errors import ConfigError
from hpo_plugin.variants import VARIANTS
from hpo_plugin.verl import selection as keys

__all__ = ["PRESET_COLUMNS", "apply_preset", "preset_of", "preset_rows"]

KEY_PRESETS = "policy_loss_presets"


class Column(NamedTuple):
    """One column of the table of presets: verl's key, and its value in verl's stock config, which a test compares.

    Attributes:
        key: verl's config key.
        default: Its value in verl's stock config.
        gives_way: Values that a preset replaces, for a key that defines the algorithm. None: any value that is not
            verl's default is the user's, and stays.
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
    table: dict[str, dict[str, Any]] = yaml.safe_load(text)[KEY_PRESETS]
    return table


def preset_rows() -> dict[str, dict[str, Any]]:
    """Every preset by name. A variant that the table does not list has the row of ``ahpo`` under its own name."""
    table = _table()
    return table | {
        name: table["ahpo"] | {"adv_estimator": name, "loss_mode": name} for name in VARIANTS if name not in table
    }


def preset_of(config: DictConfig) -> dict[str, Any] | None:
    """The row that ``algorithm.policy_loss`` names, None without the key; ConfigError for a name that no row has."""
    name = OmegaConf.select(config, keys.KEY_POLICY_LOSS)
    rows = {**preset_rows(), **(config.get(KEY_PRESETS) or {})}
    if name is not None and name not in rows:
        raise ConfigError(f"{keys.KEY_POLICY_LOSS}={name} is not a preset. Choose one of: {', '.join(rows)}.")
    return rows.get(name)


def apply_preset(config: DictConfig) -> list[str]:
    """Write the preset that ``algorithm.policy_loss`` names into the config, in place. Safe to repeat.

    Args:
        config: verl's root config, stock or ours; nothing is done without the key.

    Returns:
        One line for each value that was changed, or that stays although the preset has another; empty for our own
        config, and when the preset was applied before.

    Raises:
        ConfigError: for an unknown name, or a choice of the user's that contradicts the preset.
    """
    name, row = OmegaConf.select(config, keys.KEY_POLICY_LOSS), preset_of(config)
    if row is None or KEY_PRESETS in config:
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
            lines.append(f"{key} stays {value} (the preset has {resolved})")
        else:
            raise ConfigError(
                f"{keys.KEY_POLICY_LOSS}={name} contradicts {key}={value}: the preset needs {resolved}. Remove "
                f"{key}={value}, or remove {keys.KEY_POLICY_LOSS} and set {keys.KEY_ESTIMATOR} and "
                f"{keys.KEY_LOSS_MODE} yourself."
            )
    for key, value in changes.items():
        OmegaConf.update(config, key, value, force_add=True)
    return lines if changes else []
