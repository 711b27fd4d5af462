"""One key selects an algorithm: by our config's table, and on verl's stock configs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config

import hpo_plugin.configs
from hpo_plugin.algorithm import SignCounts
from hpo_plugin.errors import ConfigError
from hpo_plugin.variants import VARIANTS, Variant, settings
from hpo_plugin.verl.config import HPOPolicyLossConfig
from hpo_plugin.verl.presets import PRESET_COLUMNS, apply_preset, preset_rows
from hpo_plugin.verl.selection import read_selection

PRESETS = {
    "grpo": ("grpo", "vanilla", "seq-mean-token-mean"),
    "dr_grpo": ("grpo", "vanilla", "seq-mean-token-sum-norm"),
    "dapo": ("grpo", "vanilla", "token-mean"),
    "gspo": ("grpo", "gspo", "seq-mean-token-mean"),
    "sapo": ("grpo", "sapo", "seq-mean-token-mean"),
    "cispo": ("grpo", "cispo", "token-mean"),
    "hpo": ("hpo", "hpo", "token-mean"),
    "ahpo": ("ahpo", "ahpo", "token-mean"),
}
"""Estimator, loss mode and aggregation of each."""

GROUPS = "actor_rollout_ref.rollout.n=8"
CLIP_HIGH = "actor_rollout_ref.actor.clip_ratio_high"


def selected(config: DictConfig) -> tuple[str, str, str]:
    selection = read_selection(config)
    return selection.adv_estimator, selection.loss_mode, selection.loss_agg_mode


def leaves(node: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {path: node}
    return {k: v for key, child in node.items() for k, v in leaves(child, f"{path}.{key}" if path else key).items()}


def validate(config: DictConfig) -> None:
    """As verl's mains do: they ask for the critic before anything is checked."""
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))


# The table ------------------------------------------------------------------------------------------------------------


def test_the_yaml_has_exactly_these_presets_with_the_same_columns_and_the_documented_defaults():
    text = (Path(next(iter(hpo_plugin.configs.__path__))) / "hpo.yaml").read_text(encoding="utf-8")
    loaded = yaml.safe_load(text)
    assert loaded["policy_loss_presets"] == preset_rows()
    assert set(preset_rows()) == set(PRESETS)
    assert {frozenset(row) for row in preset_rows().values()} == {frozenset(PRESET_COLUMNS)}
    defaults = {name: setting.default for name, setting in settings().items()}
    assert loaded["algorithm"]["hpo"] == defaults | {"base_estimator": "grpo"}
    assert defaults == {"alpha": 0.6, "alpha_min": 0.1}


@pytest.mark.parametrize("column", PRESET_COLUMNS)
def test_the_defaults_of_verl_are_those_of_its_stock_config(compose_stock, column):
    assert OmegaConf.select(compose_stock(), PRESET_COLUMNS[column].key) == PRESET_COLUMNS[column].default


def test_the_docs_have_a_row_for_each_preset_and_each_setting_with_its_values():
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
    for name, setting in settings().items():
        assert f"| `algorithm.hpo.{name}` | {setting.default:g} |" in page
    for name, row in preset_rows().items():
        start = rf"\| `{name}`( \(default\))? \| `{row['adv_estimator']}` \| (true|false) "
        (line,) = [line for line in page.splitlines() if re.match(start, line)]
        normalize = str(row["norm_adv_by_std_in_grpo"]).lower()
        assert f"| {normalize} | `{row['loss_mode']}` | `{row['loss_agg_mode']}` |" in line


# Our config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", ["ppo_trainer", "ppo_megatron_trainer"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_of_our_config_resolves_to_its_row_and_passes_verls_checks(recipe, trainer, preset):
    config = recipe(trainer, **{"algorithm.policy_loss": preset, "actor_rollout_ref.rollout.n": 8})
    assert selected(config) == PRESETS[preset]
    validate(config)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert isinstance(actor.policy_loss, HPOPolicyLossConfig)
    assert actor.policy_loss.adv_estimator == PRESETS[preset][0]
    row = config.policy_loss_presets[preset]
    for column, (key, *_) in PRESET_COLUMNS.items():
        assert OmegaConf.select(config, key) == row[column], key
    assert actor.policy_loss.loss_mode == row.loss_mode
    assert (actor.clip_ratio_low, actor.clip_ratio_high) == (row.clip_ratio_low, row.clip_ratio_high)
    assert actor.clip_ratio_c == 3.0


def test_presets_differ_in_the_tables_keys_and_in_nothing_else(recipe):
    resolved = {}
    for preset in PRESETS:
        container = OmegaConf.to_container(recipe(**{"algorithm.policy_loss": preset}), resolve=True)
        resolved[preset] = leaves(container)
    # The last two are verl's: its critic aggregates as the actor does.
    copies = {
        "algorithm.policy_loss",
        "actor_rollout_ref.actor.policy_loss.adv_estimator",
        "critic.loss_agg_mode",
        "critic.loss_scale_factor",
    }
    for preset, values in resolved.items():
        assert values.keys() == resolved["grpo"].keys()
        differing = {key for key, value in values.items() if value != resolved["grpo"][key]}
        assert differing <= {column.key for column in PRESET_COLUMNS.values()} | copies, preset


def test_a_preset_is_selected_and_changed_by_plain_overrides(compose_ours):
    config = compose_ours("ppo_trainer", GROUPS, "algorithm.policy_loss=hpo", "algorithm.hpo.alpha=0.3")
    validate(config)
    assert read_selection(config).settings == {"alpha": 0.3, "alpha_min": 0.1}


def test_our_config_with_another_estimator_is_that_estimator_then_alpha(compose_ours):
    config = compose_ours("ppo_trainer", GROUPS, "algorithm.policy_loss=ahpo", "algorithm.adv_estimator=rloo")
    validate(config)
    assert (config.algorithm.adv_estimator, config.algorithm.hpo.base_estimator) == ("ahpo", "rloo")
    assert config.actor_rollout_ref.actor.policy_loss.adv_estimator == "ahpo"


# verl's stock configs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("trainer", ["ppo_trainer", "ppo_megatron_trainer"])
def test_the_key_makes_the_stock_config_the_same_as_ours(compose_stock, recipe, trainer, name):
    stock = compose_stock(GROUPS, f"+algorithm.policy_loss={name}", trainer=trainer)
    validate(stock)
    ours = recipe(trainer, **{"algorithm.policy_loss": name, "actor_rollout_ref.rollout.n": 8})
    assert selected(stock) == PRESETS[name]
    for key, *_ in PRESET_COLUMNS.values():
        assert OmegaConf.select(stock, key) == OmegaConf.select(ours, key), key


def test_the_changed_keys_are_printed_with_their_old_and_new_values(compose_stock, capsys):
    stock = compose_stock(GROUPS, "+algorithm.policy_loss=ahpo", f"{CLIP_HIGH}=0.28", "algorithm.adv_estimator=grpo")
    validate(stock)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[hpo_plugin]")]
    assert said == [
        "[hpo_plugin] algorithm.adv_estimator: grpo -> ahpo",
        "[hpo_plugin] actor_rollout_ref.actor.policy_loss.loss_mode: vanilla -> ahpo",
        f"[hpo_plugin] {CLIP_HIGH}=0.28 is not changed (the preset has 0.2)",
    ]
    assert OmegaConf.select(stock, CLIP_HIGH) == 0.28
    before = OmegaConf.to_container(stock)
    validate(stock)
    assert OmegaConf.to_container(stock) == before
    assert "[hpo_plugin]" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "choice",
    [
        "algorithm.adv_estimator=rloo",
        "actor_rollout_ref.actor.policy_loss.loss_mode=gspo",
        "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean",
    ],
)
def test_a_choice_that_contradicts_the_preset_is_refused_with_both_ways_out(compose_stock, choice):
    with pytest.raises(ConfigError) as refused:
        validate(compose_stock(GROUPS, "+algorithm.policy_loss=ahpo", choice))
    for text in (f"{choice} contradicts algorithm.policy_loss=ahpo", f"Remove {choice}", "or remove algorithm.po"):
        assert text in str(refused.value)


@pytest.mark.parametrize("compose", ["compose_stock", "compose_ours"])
def test_a_name_that_is_no_preset_is_refused_naming_those_there_are(request, compose):
    fixture = request.getfixturevalue(compose)
    config = (
        fixture(GROUPS, "+algorithm.policy_loss=banana")
        if compose == "compose_stock"
        else fixture("ppo_trainer", GROUPS, "algorithm.policy_loss=banana")
    )
    with pytest.raises(ConfigError, match=r"algorithm.policy_loss=banana is not a preset.* grpo, .*ahpo"):
        validate(config)


def test_the_key_without_a_critic_has_no_critic_checked(compose_stock):
    """The stock ``adv_estimator`` is gae when verl asks for the critic; its fixed batch sizes are not set here."""
    stock = compose_stock(GROUPS, "+algorithm.policy_loss=ahpo", "actor_rollout_ref.actor.use_dynamic_bsz=False")
    assert need_critic(stock)
    validate(stock)
    assert not need_critic(stock)


def test_dapos_config_keeps_its_clip_and_becomes_ahpo(compose_stock):
    """What its recipe sets on top of verl's legacy trainer."""
    stock = compose_stock(
        GROUPS,
        "trainer.use_v1=False",
        "algorithm.adv_estimator=grpo",
        f"{CLIP_HIGH}=0.28",
        "actor_rollout_ref.actor.clip_ratio_c=10.0",
        "algorithm.filter_groups.enable=True",
        "+algorithm.policy_loss=ahpo",
    )
    validate(stock)
    assert selected(stock) == PRESETS["ahpo"]
    assert OmegaConf.select(stock, CLIP_HIGH) == 0.28


def _sqrt(counts: SignCounts, values: Any) -> Any:
    return (counts.positive / counts.negative.clamp(min=1)).sqrt().clamp(values["alpha_min"], 1.0)


def test_a_variant_without_a_row_has_the_row_of_ahpo_under_its_own_name(monkeypatch, compose_stock, compose_ours):
    variant = Variant("sqrt_hpo", "√-HPO", "α = √(p̂⁺ / p̂⁻)", _sqrt, VARIANTS["ahpo"].settings)
    monkeypatch.setitem(VARIANTS, "sqrt_hpo", variant)
    stock = compose_stock(GROUPS, "+algorithm.policy_loss=sqrt_hpo")
    apply_preset(stock)
    ours = compose_ours("ppo_trainer", GROUPS, "algorithm.policy_loss=sqrt_hpo")
    apply_preset(ours)
    for config in (stock, ours):
        assert selected(config) == ("sqrt_hpo", "sqrt_hpo", "token-mean")
        assert read_selection(config).variant is variant
