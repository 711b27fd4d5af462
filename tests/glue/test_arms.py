"""Which algorithm a config selects, and every way in which a config can be refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf
from verl.utils.config import omega_conf_to_dataclass, validate_config

import hpo_plugin.configs
from hpo_plugin.glue import arms
from hpo_plugin.glue.arms import Arm, ConfigError, entrance, resolve_arm
from hpo_plugin.glue.config import HPOPolicyLossConfig

ADV = "algorithm.adv_estimator"
LOSS = "actor_rollout_ref.actor.policy_loss.loss_mode"
AGG = "actor_rollout_ref.actor.loss_agg_mode"

PRESETS = {
    "grpo": Arm("grpo", "vanilla", "seq-mean-token-mean", None, None, 0.6, 0.1),
    "dr_grpo": Arm("grpo", "vanilla", "seq-mean-token-sum-norm", None, None, 0.6, 0.1),
    "dapo": Arm("grpo", "vanilla", "token-mean", None, None, 0.6, 0.1),
    "gspo": Arm("grpo", "gspo", "seq-mean-token-mean", None, None, 0.6, 0.1),
    "sapo": Arm("grpo", "sapo", "seq-mean-token-mean", None, None, 0.6, 0.1),
    "cispo": Arm("grpo", "cispo", "token-mean", None, None, 0.6, 0.1),
    "hpo": Arm("hpo", "hpo", "token-mean", "hpo", "loss", 0.6, 0.1),
    "ahpo": Arm("ahpo", "ahpo", "token-mean", "ahpo", "loss", 0.6, 0.1),
}
TABLE = {
    "adv_estimator": ADV,
    "norm_adv_by_std_in_grpo": "algorithm.norm_adv_by_std_in_grpo",
    "loss_mode": LOSS,
    "loss_agg_mode": AGG,
    "loss_scale_factor": "actor_rollout_ref.actor.loss_scale_factor",
    "clip_ratio_low": "actor_rollout_ref.actor.clip_ratio_low",
    "clip_ratio_high": "actor_rollout_ref.actor.clip_ratio_high",
    "tau_pos": "actor_rollout_ref.actor.tau_pos",
    "tau_neg": "actor_rollout_ref.actor.tau_neg",
}
"""Columns of the yaml's table, and the key of verl each one sets."""


def config(adv: str = "grpo", loss: str = "vanilla", agg: str = "token-mean", **algorithm: Any) -> DictConfig:
    """The keys that decide, without the rest of verl's config."""
    return OmegaConf.create(
        {
            "algorithm": {"adv_estimator": adv} | algorithm,
            "actor_rollout_ref": {"actor": {"loss_agg_mode": agg, "policy_loss": {"loss_mode": loss}}},
        }
    )


def leaves(node: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {path: node}
    return {k: v for key, child in node.items() for k, v in leaves(child, f"{path}.{key}" if path else key).items()}


# Who weighs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adv", "loss", "expected"),
    [
        ("grpo", "hpo", ("hpo", "loss")),
        ("gae", "ahpo", ("ahpo", "loss")),
        ("hpo", "vanilla", ("hpo", "advantage")),
        ("ahpo", "gspo", ("ahpo", "advantage")),
        ("hpo", "hpo", ("hpo", "loss")),
        ("ahpo", "ahpo", ("ahpo", "loss")),
        ("grpo", "vanilla", (None, None)),
    ],
)
def test_the_weights_are_applied_exactly_once(adv, loss, expected):
    assert entrance(adv, loss) == expected
    arm = resolve_arm(config(adv, loss))
    assert (arm.hysteresis, arm.weigh) == expected


@pytest.mark.parametrize(("adv", "loss"), [("hpo", "ahpo"), ("ahpo", "hpo")])
def test_hpo_and_ahpo_mixed_are_refused_naming_both_keys(adv, loss):
    with pytest.raises(ConfigError) as refused:
        resolve_arm(config(adv, loss))
    assert f"{ADV}={adv}" in str(refused.value)
    assert f"{LOSS}={loss}" in str(refused.value)


@pytest.mark.parametrize(
    ("arm", "label"),
    [
        (config("ahpo", "ahpo"), "ahpo: α adaptive, α_min = 0.1, weighed by the policy loss"),
        (config("hpo", "gspo", hpo={"alpha": 0.5}), "hpo: α = 0.5, weighed by the advantage estimator"),
        (config(), "no hysteretic weights"),
    ],
)
def test_label_says_what_weighs_with_which_alpha(arm, label):
    assert resolve_arm(arm).label == label


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        pytest.param(config("hpo", hpo={"alpha": 1.5}), ["algorithm.hpo.alpha=1.5", "[0, 1]"], id="alpha above 1"),
        pytest.param(config("hpo", hpo={"alpha": -0.1}), ["algorithm.hpo.alpha=-0.1"], id="alpha below 0"),
        pytest.param(config("hpo", hpo={"alpha": float("nan")}), ["algorithm.hpo.alpha=nan"], id="alpha NaN"),
        pytest.param(config("hpo", hpo={"alpha": "much"}), ["algorithm.hpo.alpha='much'"], id="alpha no number"),
        pytest.param(config("hpo", hpo={"alpha": True}), ["algorithm.hpo.alpha=True"], id="alpha a truth value"),
        pytest.param(config("ahpo", hpo={"alpha_min": 2}), ["algorithm.hpo.alpha_min=2"], id="alpha_min above 1"),
        pytest.param(config("hpo", hpo=0.6), ["algorithm.hpo=0.6", "mapping"], id="no mapping"),
        pytest.param(config("hpo", hpo={"alfa": 0.6}), ["algorithm.hpo.alfa", "alpha_min"], id="unknown setting"),
        pytest.param(
            config("grpo", hpo={"alpha": 0.5}),
            ["algorithm.hpo.alpha=0.5 has no effect", f"{ADV}=grpo", f"{LOSS}=vanilla"],
            id="alpha without hpo",
        ),
        pytest.param(
            config("ahpo", "ahpo", hpo={"alpha": 0.5}),
            ["algorithm.hpo.alpha=0.5 has no effect", f"{ADV}=ahpo", f"{LOSS}=ahpo"],
            id="alpha with ahpo",
        ),
        pytest.param(
            config("hpo", hpo={"alpha_min": 0.2}),
            ["algorithm.hpo.alpha_min=0.2 has no effect", f"{ADV}=hpo", f"{LOSS}=vanilla"],
            id="alpha_min with hpo",
        ),
        pytest.param(config("ahpo", "ahpo", hpo={"weigh": "both"}), ["algorithm.hpo.weigh='both'"], id="weigh unknown"),
        pytest.param(
            config("ahpo", "ahpo", hpo={"weigh": "advantage"}),
            ["algorithm.hpo.weigh=advantage contradicts", f"{ADV}=ahpo", f"{LOSS}=ahpo", "the loss"],
            id="weigh against the loss mode",
        ),
        pytest.param(
            config(hpo={"weigh": "loss"}), ["algorithm.hpo.weigh=loss contradicts", "nobody"], id="nothing to weigh"
        ),
        pytest.param(
            config("grpo", "ahpo", "seq-mean-token-mean"),
            [f"{LOSS}=ahpo", f"{AGG}=token-mean", "seq-mean-token-mean"],
            id="loss of mean length with another aggregation",
        ),
        pytest.param(
            config("grpo", "vanilla", policy_loss="ahpo"),
            ["algorithm.policy_loss=ahpo contradicts", f"{ADV}=grpo", f"{LOSS}=vanilla"],
            id="stock config with policy_loss only",
        ),
        pytest.param(
            config("ahpo", "gspo", policy_loss="gspo"),
            ["algorithm.policy_loss=gspo contradicts", f"{ADV}=ahpo", f"{LOSS}=gspo"],
            id="preset without hysteresis, key with",
        ),
        pytest.param(
            config("hpo", "hpo", policy_loss="ahpo"),
            ["algorithm.policy_loss=ahpo contradicts", f"{ADV}=hpo", f"{LOSS}=hpo"],
            id="preset of the other hysteresis",
        ),
        pytest.param(config("${nowhere}"), [ADV, "nowhere"], id="broken interpolation"),
    ],
)
def test_refused_naming_the_keys_and_their_values(bad, named):
    with pytest.raises(ConfigError) as refused:
        resolve_arm(bad)
    for text in named:
        assert text in str(refused.value)


@pytest.mark.parametrize("weigh", ["advantage", None])
def test_weigh_may_say_what_is_so(weigh):
    assert resolve_arm(config("ahpo", "vanilla", hpo={"weigh": weigh})).weigh == "advantage"


def test_the_advantage_entrance_composes_with_any_aggregation():
    assert resolve_arm(config("ahpo", "gspo", "seq-mean-token-mean")).weigh == "advantage"


def test_an_unknown_preset_is_refused_naming_those_there_are(recipe):
    with pytest.raises(ConfigError, match=r"algorithm.policy_loss=ppo is not a preset.* grpo, .*ahpo"):
        resolve_arm(recipe(**{"algorithm.policy_loss": "ppo"}))


# The presets ----------------------------------------------------------------------------------------------------------


def test_the_yaml_has_exactly_these_presets_with_the_same_columns_and_the_documented_defaults():
    text = (Path(next(iter(hpo_plugin.configs.__path__))) / "hpo.yaml").read_text(encoding="utf-8")
    loaded = yaml.safe_load(text)
    assert set(loaded["policy_loss_presets"]) == set(PRESETS)
    assert {frozenset(row) for row in loaded["policy_loss_presets"].values()} == {frozenset(TABLE)}
    assert loaded["algorithm"]["hpo"] == {
        "alpha": arms.DEFAULT_ALPHA,
        "alpha_min": arms.DEFAULT_ALPHA_MIN,
        "weigh": None,
    }
    assert (arms.DEFAULT_ALPHA, arms.DEFAULT_ALPHA_MIN) == (0.6, 0.1)


@pytest.mark.parametrize("trainer", ["ppo_trainer", "ppo_megatron_trainer"])
@pytest.mark.parametrize("preset", PRESETS)
def test_preset_resolves_to_its_arm_and_passes_verls_checks(recipe, trainer, preset):
    selected = recipe(trainer, **{"algorithm.policy_loss": preset})
    assert resolve_arm(selected) == PRESETS[preset]

    validate_config(selected, use_reference_policy=False, use_critic=False)
    actor = omega_conf_to_dataclass(selected.actor_rollout_ref.actor)
    assert isinstance(actor.policy_loss, HPOPolicyLossConfig)
    assert (actor.policy_loss.hysteresis, actor.policy_loss.weigh) == entrance(
        PRESETS[preset].adv_estimator, PRESETS[preset].loss_mode
    )
    row = selected.policy_loss_presets[preset]
    for column, key in TABLE.items():
        assert OmegaConf.select(selected, key) == row[column], key
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
        assert differing <= set(TABLE.values()) | copies, preset


def test_a_preset_is_selected_and_changed_by_plain_overrides(compose_ours):
    selected = compose_ours("ppo_trainer", "algorithm.policy_loss=hpo", "algorithm.hpo.alpha=0.3")
    assert resolve_arm(selected) == Arm("hpo", "hpo", "token-mean", "hpo", "loss", 0.3, 0.1)
    validate_config(selected, use_reference_policy=False, use_critic=False)
    assert omega_conf_to_dataclass(selected.actor_rollout_ref.actor).policy_loss.alpha == 0.3


# verl's stock config --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "arm", "alpha"),
    [
        pytest.param([f"{ADV}=ahpo"], ("ahpo", "vanilla", "ahpo", "advantage"), 0.6, id="estimator"),
        pytest.param([f"{ADV}=grpo", f"{LOSS}=ahpo"], ("grpo", "ahpo", "ahpo", "loss"), 0.6, id="loss"),
        pytest.param(
            [f"{ADV}=hpo", f"{LOSS}=hpo", "+algorithm.hpo.alpha=0.5"], ("hpo", "hpo", "hpo", "loss"), 0.5, id="both"
        ),
    ],
)
def test_stock_config_with_plain_overrides_brings_alpha_to_the_actor(compose_stock, overrides, arm, alpha):
    stock = compose_stock(*overrides)
    validate_config(stock, use_reference_policy=False, use_critic=False)
    policy_loss = omega_conf_to_dataclass(stock.actor_rollout_ref.actor).policy_loss
    assert isinstance(policy_loss, HPOPolicyLossConfig)
    assert (policy_loss.adv_estimator, policy_loss.loss_mode, policy_loss.hysteresis, policy_loss.weigh) == arm
    assert (policy_loss.alpha, policy_loss.alpha_min) == (alpha, 0.1)


def test_stock_config_without_hpo_is_left_as_it_is(compose_stock):
    stock = compose_stock()
    before = OmegaConf.to_container(stock)
    validate_config(stock, use_reference_policy=False, use_critic=False)
    assert OmegaConf.to_container(stock) == before


def test_a_contradiction_stops_verls_own_config_check(recipe):
    mixed = recipe(**{ADV: "hpo"})
    with pytest.raises(ConfigError, match="two different algorithms"):
        validate_config(mixed, use_reference_policy=False, use_critic=False)


def test_a_third_class_as_target_is_refused_because_it_cannot_carry_alpha(recipe):
    other = recipe(**{"actor_rollout_ref.actor.policy_loss._target_": "elsewhere.PolicyLossConfig"})
    with pytest.raises(ConfigError, match=r"policy_loss._target_=elsewhere.PolicyLossConfig cannot carry α"):
        validate_config(other, use_reference_policy=False, use_critic=False)


def test_the_actors_config_refuses_a_contradiction_when_it_is_built():
    with pytest.raises(ConfigError, match="two different algorithms"):
        HPOPolicyLossConfig(adv_estimator="hpo", loss_mode="ahpo")
