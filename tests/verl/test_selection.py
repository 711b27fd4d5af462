"""Which algorithm a config selects, and every way in which a config is refused."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from verl.trainer.ppo.core_algos import compute_policy_loss_gspo
from verl.utils.config import omega_conf_to_dataclass, validate_config

from hpo_plugin.verl.config import HPOPolicyLossConfig
from hpo_plugin.verl.seams import prepare
from hpo_plugin.verl.selection import (
    BASE_ESTIMATORS,
    NOT_HOMOGENEOUS,
    ConfigError,
    alpha_batch,
    check_selection,
    describe_observation,
    read_selection,
)

ADV = "algorithm.adv_estimator"
LOSS = "actor_rollout_ref.actor.policy_loss.loss_mode"
AGG = "actor_rollout_ref.actor.loss_agg_mode"


def config(adv: str = "grpo", loss: str = "vanilla", agg: str = "token-mean", **algorithm: Any) -> DictConfig:
    """The keys that decide, without the rest of verl's config."""
    return OmegaConf.create(
        {
            "algorithm": {"adv_estimator": adv} | algorithm,
            "actor_rollout_ref": {
                "actor": {"loss_agg_mode": agg, "policy_loss": {"loss_mode": loss}},
                "rollout": {"n": 8},
            },
            "trainer": {"use_v1": True, "v1": {"trainer_mode": "sync"}},
        }
    )


def selected(config: DictConfig) -> tuple[str | None, str]:
    selection = read_selection(config)
    return selection.variant and selection.variant.name, selection.base_estimator


# What is selected -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adv", "loss", "expected"),
    [
        ("grpo", "hpo", ("hpo", "grpo")),
        ("grpo_vectorized", "ahpo", ("ahpo", "grpo")),
        ("rloo", "ahpo", ("ahpo", "rloo")),
        ("reinforce_plus_plus", "ahpo", ("ahpo", "reinforce_plus_plus")),
        ("hpo", "vanilla", ("hpo", "grpo")),
        ("ahpo", "gspo", ("ahpo", "grpo")),
        ("hpo", "hpo", ("hpo", "grpo")),
        ("ahpo", "ahpo", ("ahpo", "grpo")),
        ("grpo", "vanilla", (None, "grpo")),
        ("gae", "gspo", (None, "grpo")),
    ],
)
def test_two_keys_select_the_variant_and_the_estimator_under_it(adv, loss, expected):
    assert selected(config(adv, loss)) == expected


def test_the_base_estimator_may_be_named_beside_the_variant():
    assert selected(config("ahpo", "gspo", hpo={"base_estimator": "opo"})) == ("ahpo", "opo")


def test_the_estimator_composes_with_any_aggregation():
    assert selected(config("ahpo", "gspo", "seq-mean-token-mean")) == ("ahpo", "grpo")


@pytest.mark.parametrize(
    ("config", "label"),
    [
        (config("ahpo", "ahpo"), "A-HPO: α = clip(p̂⁺ / p̂⁻, α_min, 1), alpha_min = 0.1"),
        (config("hpo", "gspo", hpo={"alpha": 0.5}), "HPO: fixed α, alpha = 0.5"),
        (config("opo", "hpo"), "HPO: fixed α, alpha = 0.6, applied to the advantages of opo"),
        (config(), "no α"),
    ],
)
def test_the_label_names_the_variant_and_its_settings(config, label):
    assert read_selection(config).label == label


# What contradicts itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        pytest.param(config("hpo", "ahpo"), [f"{ADV}=hpo", f"{LOSS}=ahpo", "two different"], id="hpo and ahpo"),
        pytest.param(config("ahpo", "hpo"), [f"{ADV}=ahpo", f"{LOSS}=hpo", "two different"], id="ahpo and hpo"),
        pytest.param(config("hpo", hpo={"alpha": 1.5}), ["algorithm.hpo.alpha=1.5", "[0, 1]"], id="alpha above 1"),
        pytest.param(config("hpo", hpo={"alpha": -0.1}), ["algorithm.hpo.alpha=-0.1"], id="alpha below 0"),
        pytest.param(config("hpo", hpo={"alpha": float("nan")}), ["algorithm.hpo.alpha=nan"], id="alpha NaN"),
        pytest.param(config("hpo", hpo={"alpha": "much"}), ["algorithm.hpo.alpha='much'"], id="alpha no number"),
        pytest.param(config("hpo", hpo={"alpha": True}), ["algorithm.hpo.alpha=True"], id="alpha a truth value"),
        pytest.param(config("ahpo", hpo={"alpha_min": 2}), ["algorithm.hpo.alpha_min=2"], id="alpha_min above 1"),
        pytest.param(config("hpo", hpo=0.6), ["algorithm.hpo=0.6", "mapping"], id="no mapping"),
        pytest.param(config("hpo", hpo={"alfa": 0.6}), ["algorithm.hpo.alfa=0.6", "alpha_min"], id="unknown setting"),
        pytest.param(
            config("ahpo", hpo={"weigh": "loss"}), ["algorithm.hpo.weigh=loss is not a setting"], id="removed setting"
        ),
        pytest.param(
            config("grpo", hpo={"alpha": 0.5}),
            ["algorithm.hpo.alpha=0.5 has no effect", f"{ADV}=grpo", f"{LOSS}=vanilla", "select hpo"],
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
        pytest.param(
            config(hpo={"base_estimator": "rloo"}),
            ["algorithm.hpo.base_estimator=rloo has no effect", f"{ADV}=grpo"],
            id="base estimator without a variant",
        ),
        pytest.param(
            config("opo", "ahpo", hpo={"base_estimator": "rloo"}),
            ["algorithm.hpo.base_estimator=rloo contradicts", f"{ADV}=opo"],
            id="two base estimators",
        ),
        pytest.param(
            config("ahpo", hpo={"base_estimator": "gae"}),
            ["algorithm.hpo.base_estimator=gae", "rloo", "does not pass"],
            id="a base estimator that needs a critic",
        ),
        pytest.param(
            config("ahpo", "ahpo", "seq-mean-token-mean"),
            [f"{AGG}=seq-mean-token-mean contradicts {LOSS}=ahpo", f"Set {AGG}=token-mean"],
            id="loss of mean length with another aggregation",
        ),
        pytest.param(
            config("ahpo", "gspo", policy_loss="gspo"),
            ["algorithm.policy_loss=gspo contradicts", f"{ADV}=ahpo", f"{LOSS}=gspo"],
            id="preset without α, key with",
        ),
        pytest.param(
            config("hpo", "hpo", policy_loss="ahpo"),
            ["algorithm.policy_loss=ahpo contradicts", f"{ADV}=hpo", f"{LOSS}=hpo"],
            id="preset of the other variant",
        ),
        pytest.param(
            config(hpo={"observe": "yes"}),
            ["algorithm.hpo.observe='yes'", "Set algorithm.hpo.observe=true"],
            id="observe",
        ),
        pytest.param(
            config(hpo={"observe": True, "alpha": 0.5}),
            ["algorithm.hpo.alpha=0.5 has no effect", f"{ADV}=grpo"],
            id="alpha where a run is observed",
        ),
        pytest.param(config("${nowhere}"), [ADV, "nowhere"], id="broken interpolation"),
    ],
)
def test_refused_naming_the_keys_and_their_values(bad, named):
    with pytest.raises(ConfigError) as refused:
        read_selection(bad)
    for text in named:
        assert text in str(refused.value)


@pytest.mark.parametrize(
    ("adv", "why"),
    [
        ("grpo_passk", "no negative advantages"),
        ("gae", "inputs that verl does not pass"),
        ("remax", "inputs that verl does not pass"),
        ("gdpo", "inputs that verl does not pass"),
        ("optimal_token_baseline", "inputs that verl does not pass"),
        ("somebody_elses", "it is not known whether"),
    ],
)
def test_an_estimator_that_alpha_cannot_be_applied_to_is_refused_with_what_to_use(adv, why):
    with pytest.raises(ConfigError) as refused:
        read_selection(config(adv, "ahpo"))
    for text in (f"{ADV}={adv}", f"{LOSS}=ahpo", why, f"Set {ADV} to ahpo", *BASE_ESTIMATORS):
        assert text in str(refused.value)


# What cannot run ------------------------------------------------------------------------------------------------------


def refused_run(config: DictConfig) -> str:
    with pytest.raises(ConfigError) as refused:
        check_selection(config, read_selection(config))
    return str(refused.value)


def changed(base: DictConfig, **values: Any) -> DictConfig:
    for key, value in values.items():
        OmegaConf.update(base, key, value, force_add=True)
    return base


@pytest.mark.parametrize("loss", NOT_HOMOGENEOUS)
def test_a_loss_that_is_not_homogeneous_in_the_advantage_is_refused(loss):
    message = refused_run(config("ahpo", loss))
    assert f"{LOSS}={loss} does not support ahpo: the loss is not homogeneous" in message
    assert f"Set {LOSS} to ahpo, vanilla" in message


def test_one_response_a_prompt_is_refused_where_advantages_are_relative_to_a_group():
    one = {"actor_rollout_ref.rollout.n": 1}
    for adv, loss in (("ahpo", "ahpo"), ("grpo", "hpo"), ("rloo", "ahpo")):
        message = refused_run(changed(config(adv, loss), **one))
        assert "actor_rollout_ref.rollout.n=1" in message
        assert "base_estimator=reinforce_plus_plus" in message
    allowed = changed(config("reinforce_plus_plus", "ahpo"), **one)
    check_selection(allowed, read_selection(allowed))


KL = {"algorithm.use_kl_in_reward": True}
LEGACY = {"trainer.use_v1": False}
ONE_STEP_OFF = {"rollout.nnodes": 1}
FULLY_ASYNC = {"async_training.staleness_threshold": 0.1}


@pytest.mark.parametrize("trainer", [LEGACY, ONE_STEP_OFF, FULLY_ASYNC])
def test_kl_in_the_reward_is_refused_where_the_scores_cannot_be_counted_apart(trainer):
    message = refused_run(changed(config("ahpo"), **KL, **trainer))
    assert "algorithm.use_kl_in_reward=True" in message
    assert "actor_rollout_ref.actor.use_kl_loss=True" in message


def test_kl_in_the_reward_is_allowed_in_v1_which_has_the_scores():
    allowed = changed(config("ahpo"), **KL)
    check_selection(allowed, read_selection(allowed))


@pytest.mark.parametrize(
    ("key", "value"), [("policy_loss_mode", "ahpo"), ("policy_loss_mode", "hpo"), ("use_task_rewards", False)]
)
def test_a_distillation_loss_never_gets_alpha(key, value):
    key = f"distillation.distillation_loss.{key}"
    message = refused_run(changed(config("ahpo"), **{"distillation.enabled": True, key: value}))
    assert f"{key}={value}" in message


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "V1 sync trainer: α is computed from the step's rollout batch"),
        (
            {"trainer.v1.trainer_mode": "colocate_async"},
            "V1 colocate_async trainer: α is computed from the step's rollout batch",
        ),
        (
            {"trainer.v1.trainer_mode": "separate_async", "trainer.v1.separate_async.parameter_sync_step": 4},
            "V1 separate_async trainer: α is computed from each local update's batch, 4 in a global step",
        ),
        (LEGACY, "legacy trainer: α is computed from the step's rollout batch"),
        (
            ONE_STEP_OFF,
            "one-step-off trainer: α is computed from the step's rollout batch, generated one step earlier",
        ),
        (FULLY_ASYNC, "fully-async trainer: α is computed from each batch that the trainer takes from the queue"),
    ],
)
def test_the_batch_that_alpha_is_of_is_named_for_each_trainer(settings, said):
    assert alpha_batch(changed(config("ahpo"), **settings)) == said


# Observed -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adv", ["grpo", "gae", "rloo", "ahpo", "hpo", "somebody_elses"])
def test_a_run_of_any_estimator_is_observed_and_nothing_in_its_config_changes(adv, capsys):
    observed = config(adv, hpo={"observe": True, "alpha_min": 0.25})
    if adv == "hpo":
        observed.algorithm.hpo.alpha = 0.5
    before = OmegaConf.to_container(observed)
    prepare(observed)
    assert OmegaConf.to_container(observed) == before
    assert describe_observation(observed) == (
        "the run is observed and its update does not change: actor/hpo/observe/* logs what A-HPO (alpha_min = 0.25) "
        "would use; V1 sync trainer: α is computed from the step's rollout batch"
    )


@pytest.mark.parametrize("node", [None, {}, {"observe": False}])
def test_without_the_key_nothing_is_observed(node):
    assert describe_observation(config(hpo=node)) is None


@pytest.mark.parametrize("adv", ["grpo", "gae", "reinforce_plus_plus", "ahpo"])
def test_one_response_a_prompt_has_nothing_to_observe(adv):
    one = changed(config(adv, hpo={"observe": True}), **{"actor_rollout_ref.rollout.n": 1})
    with pytest.raises(ConfigError, match=r"algorithm.hpo.observe=True has nothing to observe with .*rollout.n=1"):
        prepare(one)


def test_verls_own_check_says_that_the_run_is_observed(compose_stock, capsys):
    overrides = ("algorithm.adv_estimator=grpo", "+algorithm.hpo.observe=true", "actor_rollout_ref.rollout.n=8")
    stock = compose_stock(*overrides)
    before = OmegaConf.to_container(stock)
    validate_config(config=stock, use_reference_policy=False, use_critic=False)
    assert OmegaConf.to_container(stock) == before
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "[hpo_plugin]" in line]
    assert line.startswith("[hpo_plugin] the run is observed and its update does not change: actor/hpo/observe/*")


# verl's stock config --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        pytest.param([f"{ADV}=ahpo"], ("ahpo", "vanilla", None), id="estimator"),
        pytest.param([f"{ADV}=grpo", f"{LOSS}=ahpo"], ("ahpo", "ahpo", "grpo"), id="loss, with grpo"),
        pytest.param([f"{ADV}=rloo", f"{LOSS}=ahpo"], ("ahpo", "ahpo", "rloo"), id="loss, with rloo"),
        pytest.param([f"{ADV}=hpo", f"{LOSS}=hpo", "+algorithm.hpo.alpha=0.5"], ("hpo", "hpo", None), id="both"),
    ],
)
def test_the_estimator_becomes_the_variants_and_the_loss_knows_it(compose_stock, capsys, overrides, expected):
    stock = compose_stock("actor_rollout_ref.rollout.n=8", *overrides)
    validate_config(stock, use_reference_policy=False, use_critic=False)
    adv_estimator, loss_mode, base = expected
    assert (stock.algorithm.adv_estimator, OmegaConf.select(stock, "algorithm.hpo.base_estimator")) == expected[::2]
    policy_loss = omega_conf_to_dataclass(stock.actor_rollout_ref.actor).policy_loss
    assert policy_loss.loss_mode == loss_mode
    assert isinstance(policy_loss, HPOPolicyLossConfig) == (loss_mode == adv_estimator)
    if base:
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[hpo_plugin]")]
        assert f"α is applied to the advantages of {base}" in line
    # Some trainers check the same config again, in another process.
    before = OmegaConf.to_container(stock)
    validate_config(stock, use_reference_policy=False, use_critic=False)
    assert OmegaConf.to_container(stock) == before
    assert "[hpo_plugin]" not in capsys.readouterr().out


def test_stock_config_without_hpo_is_left_as_it_is(compose_stock):
    stock = compose_stock()
    before = OmegaConf.to_container(stock)
    validate_config(stock, use_reference_policy=False, use_critic=False)
    assert OmegaConf.to_container(stock) == before


def test_a_contradiction_stops_verls_own_config_check(recipe):
    mixed = recipe(**{ADV: "hpo"})
    with pytest.raises(ConfigError, match="two different algorithms"):
        validate_config(mixed, use_reference_policy=False, use_critic=False)


def test_a_third_class_as_target_is_refused_because_it_cannot_name_the_estimator(recipe):
    target = "actor_rollout_ref.actor.policy_loss._target_"
    other = recipe(**{target: "elsewhere.PolicyLossConfig", "actor_rollout_ref.rollout.n": 8})
    with pytest.raises(ConfigError, match=r"policy_loss._target_=elsewhere.PolicyLossConfig cannot pass"):
        validate_config(other, use_reference_policy=False, use_critic=False)


@pytest.mark.parametrize("adv", ["hpo", "grpo", "rloo"])
def test_the_actors_config_refuses_another_estimator_when_it_is_built(adv):
    with pytest.raises(ConfigError, match=rf"{ADV}={adv} does not .*loss_mode=ahpo needs\. Set {ADV}=ahpo"):
        HPOPolicyLossConfig(adv_estimator=adv, loss_mode="ahpo")


@pytest.mark.parametrize(
    ("loss", "agg", "half"),
    [
        ("ahpo", "token-mean", False),
        ("vanilla", "token-mean", False),
        ("vanilla", "seq-mean-token-mean", True),
        ("vanilla", "seq-mean-token-sum-norm", True),
        ("vanilla", "seq-mean-token-sum", True),
        # 0.9.0 fixes its aggregation in code.
        ("gspo", "token-mean", 'loss_agg_mode="seq-mean-token-mean"' in inspect.getsource(compute_policy_loss_gspo)),
        ("gspo", "seq-mean-token-mean", True),
        ("cispo", "token-mean", False),
        # These two ignore the key.
        ("sapo", "token-mean", True),
        ("geo_mean", "token-mean", True),
    ],
)
def test_half_of_hpo_is_named_by_looking_at_the_loss(compose_stock, loss, agg, half):
    stock = compose_stock("actor_rollout_ref.rollout.n=8", f"{ADV}=ahpo", f"{LOSS}={loss}", f"{AGG}={agg}")
    lines = prepare(stock)[1]
    said = "the α of A-HPO without its normalization"
    assert any(said in line and f"{LOSS}={loss}" in line for line in lines) == half
