"""The advantage estimators, through the functions of verl's trainers that call them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from verl import DataProto
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.ray_trainer import apply_kl_penalty, compute_advantage
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
from verl.workers.config import FSDPActorConfig

from hpo_plugin.errors import ConfigError
from hpo_plugin.verl import metrics
from hpo_plugin.verl.estimators import last_rows
from hpo_plugin.verl.selection import BASE_ESTIMATORS

PLUS, MINUS = 0.75 / (0.5 + 1e-6), -0.25 / (0.5 + 1e-6)
"""A of rewards (1, 0, 0, 0): mean 1/4, unbiased std 1/2."""


@pytest.fixture(autouse=True)
def nothing_recorded():
    metrics.drain()


def root(adv: str, loss: str = "vanilla", *, normalize: bool = True, n: int = 8, **hpo) -> DictConfig:
    return OmegaConf.create(
        {
            "algorithm": {"adv_estimator": adv, "norm_adv_by_std_in_grpo": normalize, "gamma": 1.0, "hpo": hpo},
            "actor_rollout_ref": {"actor": {"policy_loss": {"loss_mode": loss}}, "rollout": {"n": n}},
        }
    )


def batch(rewards: list[float], uids: list[str], lengths: list[int] | None = None) -> DataProto:
    """Rows as verl's trainer has them: the reward on the last token, an int64 mask, uids as objects."""
    lengths = lengths or [3] * len(rewards)
    mask = (torch.arange(4) < torch.tensor(lengths).unsqueeze(1)).long()
    scores = torch.zeros(len(rewards), 4)
    for row, (reward, length) in enumerate(zip(rewards, lengths, strict=True)):
        scores[row, max(length - 1, 0)] = reward
    return DataProto.from_dict(
        tensors={"token_level_rewards": scores, "token_level_scores": scores.clone(), "response_mask": mask},
        non_tensors={"uid": np.array(uids, dtype=object)},
    )


def estimate(data: DataProto, config: DictConfig) -> DataProto:
    return compute_advantage(data, adv_estimator=config.algorithm.adv_estimator, config=config.algorithm)


def advantages(data: DataProto, config: DictConfig) -> torch.Tensor:
    return estimate(data, config).batch["advantages"]


def first_token(data: DataProto, config: DictConfig) -> list[float]:
    return advantages(data, config)[:, 0].tolist()


def in_v1(data: DataProto, config: DictConfig, keys: list[str] | None = None) -> DataProto:
    """As verl's V1 trainer calls it (verl/trainer/ppo/v1/trainer_base.py)."""
    return compute_advantage_for_multi_trajectories(
        data,
        batch_keys=keys or [f"{uid}_{row}_0" for row, uid in enumerate(data.non_tensor_batch["uid"])],
        adv_estimator=config.algorithm.adv_estimator,
        gamma=1.0,
        lam=1.0,
        num_repeat=8,
        norm_adv_by_std_in_grpo=config.algorithm.norm_adv_by_std_in_grpo,
        config=config.algorithm,
    )


SPARSE = ([1, 0, 0, 0], ["u"] * 4)


# α --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "negative"),
    [
        pytest.param(root("hpo"), 0.6 * MINUS, id="hpo: 0.6"),
        pytest.param(root("hpo", alpha=0.2), 0.2 * MINUS, id="hpo: its alpha"),
        pytest.param(root("ahpo"), 1 / 3 * MINUS, id="ahpo: 1 positive to 3 negatives"),
        pytest.param(root("ahpo", alpha_min=0.5), 0.5 * MINUS, id="ahpo: no less than alpha_min"),
        # verl's bypass mode changes the loss mode in the driver after the workers have copied it.
        pytest.param(root("hpo", "hpo"), 0.6 * MINUS, id="hpo, whatever the loss mode: hpo"),
        pytest.param(root("ahpo", "ahpo"), 1 / 3 * MINUS, id="ahpo, whatever the loss mode: ahpo"),
        pytest.param(root("ahpo", "gspo"), 1 / 3 * MINUS, id="ahpo, whatever the loss mode: gspo"),
        pytest.param(root("ahpo", "bypass_mode"), 1 / 3 * MINUS, id="ahpo, whatever the loss mode: bypass_mode"),
    ],
)
def test_alpha_is_applied_to_negative_advantages_once_and_never_to_positive_ones(config, negative):
    assert first_token(batch(*SPARSE), config) == pytest.approx([PLUS, negative, negative, negative])
    assert in_v1(batch(*SPARSE), config).batch["advantages"][:, 0].tolist() == pytest.approx([PLUS] + [negative] * 3)


def test_returns_are_not_weighted_for_a_critic_may_train_on_them():
    data = batch(*SPARSE, lengths=[4, 3, 2, 1])
    returns, mask = estimate(data, root("ahpo")).batch["returns"], data.batch["response_mask"].bool()
    expected = torch.tensor([PLUS, MINUS, MINUS, MINUS]).unsqueeze(1).expand(4, 4)
    torch.testing.assert_close(returns[mask], expected[mask])


def test_std_normalization_follows_verls_key():
    assert first_token(batch(*SPARSE), root("hpo", normalize=False, alpha=1.0)) == [0.75, -0.25, -0.25, -0.25]


def test_advantage_stands_on_response_tokens_only():
    out = advantages(batch([1, 0], ["u", "u"], lengths=[4, 2]), root("hpo", normalize=False, alpha=1.0))
    assert out.tolist() == [[0.5] * 4, [-0.5, -0.5, 0, 0]]


def test_rows_of_one_uid_need_not_be_adjacent():
    data = batch([1, 5, 0, 3, 0, 0], ["b", "a", "b", "a", "b", "b"])
    assert first_token(data, root("hpo", normalize=False, alpha=1.0)) == [0.75, 1.0, -0.25, -1.0, -0.25, -0.25]


def test_padding_rows_and_rejected_rows_get_zero_and_are_counted_nowhere():
    """Two rows verl appends, one rejected row of a real group: still 1 positive to 3 negatives."""
    data = batch([1, 0, 0, 0, 9, 0, 0], ["u"] * 5 + ["pad01f", "pad01f"], lengths=[3, 3, 3, 3, 0, 0, 0])
    assert first_token(data, root("ahpo")) == pytest.approx([PLUS] + [MINUS / 3] * 3 + [0, 0, 0])
    assert metrics.drain()["actor/hpo/share_negative"] == 3 / 4


@pytest.mark.parametrize("name", ["hpo", "ahpo"])
def test_degenerate_groups_are_exactly_zero_and_are_no_signs(name):
    """Eight rewards of 0.1, which verl's grpo gives -0.0074 each: the other group alone decides alpha, 1/3."""
    data = batch([0.1] * 8 + [1, 0, 0, 0], ["same"] * 8 + ["u"] * 4)
    out = first_token(data, root(name, alpha=1 / 3) if name == "hpo" else root(name))
    assert out[:8] == [0.0] * 8
    assert out[8:] == pytest.approx([PLUS] + [MINUS / 3] * 3)


def test_rewards_that_are_equal_but_for_the_rounding_of_a_sum_over_tokens_give_zero():
    """0.8 on one token and eight times 0.1 on eight tokens differ by an ulp, which verl's grpo turns into ±0.05."""
    rewards = torch.zeros(6, 8)
    rewards[0, 7], rewards[1:4] = 0.8, 0.1
    rewards[4, :] = 0.3
    rewards[5, 0], rewards[5, 1:] = 0.3 * 2, 0.3 * 6 / 7
    data = DataProto.from_dict(
        tensors={"token_level_rewards": rewards, "response_mask": torch.ones(6, 8, dtype=torch.long)},
        non_tensors={"uid": np.array(["a"] * 4 + ["b"] * 2, dtype=object)},
    )
    assert rewards[:4].sum(1).unique().numel() > 1 or rewards[4:].sum(1).unique().numel() > 1
    assert not advantages(data, root("ahpo")).any()
    said = metrics.drain()
    assert (said["actor/hpo/share_positive"], said["actor/hpo/share_negative"]) == (0, 0)
    assert said["actor/hpo/share_degenerate_groups"] == 1


def test_two_rewards_that_differ_by_a_ten_thousandth_are_a_signal():
    data = batch([1.0, 1.0001], ["u", "u"])
    assert first_token(data, root("ahpo"))[0] < 0 < first_token(data, root("ahpo"))[1]
    assert metrics.drain()["actor/hpo/share_negative"] == 1 / 2


def test_a_shaped_reward_gives_groups_without_a_success_positives_and_alpha_is_by_definition_one():
    """Overlong penalty on half of an all-wrong group: 4 positive, 4 negative."""
    first_token(batch([0, 0, 0, 0, -0.5, -0.5, -0.5, -0.5], ["u"] * 8), root("ahpo"))
    assert metrics.drain()["actor/hpo/alpha"] == 1


def test_a_group_of_one_gets_zero_where_verls_grpo_gives_its_reward():
    data = batch([1, 1, 0], ["alone", "u", "u"])
    assert first_token(data, root("hpo", normalize=False, alpha=1.0)) == [0.0, 0.5, -0.5]
    grpo = compute_advantage(batch([1, 1, 0], ["alone", "u", "u"]), core_algos.AdvantageEstimator.GRPO)
    assert grpo.batch["advantages"][0, 0] == pytest.approx(1.0)


def test_verls_own_composed_config_is_read(recipe):
    config = recipe(**{"algorithm.policy_loss": "ahpo", "actor_rollout_ref.rollout.n": 4})
    assert first_token(batch(*SPARSE), config) == pytest.approx([PLUS] + [MINUS / 3] * 3)


@pytest.mark.parametrize("config", [None, {}, OmegaConf.create({"hpo": {"alpha": 0.6}})])
def test_a_config_of_another_trainer_will_do(config):
    out = compute_advantage(batch(*SPARSE), adv_estimator="hpo", config=config).batch["advantages"]
    assert out[:, 0].tolist() == pytest.approx([PLUS] + [0.6 * MINUS] * 3)


# Another estimator, then α --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [base for base in BASE_ESTIMATORS if base != "grpo"])
def test_a_base_estimator_keeps_its_advantages_but_for_alpha(base):
    """Its values on valid rows, its returns unweighted; padding rows, for which opo gives NaN, stay 0."""
    rewards, uids = [1, 0, 0, 0, 0, 1, 1, 0], ["u"] * 4 + ["v"] * 4
    lengths = [1, 2, 3, 4, 2, 2, 3, 1]
    plain = compute_advantage(batch(rewards, uids, lengths), adv_estimator=base, config=root(base).algorithm).batch
    padded = batch([*rewards, 0, 0], [*uids, "pad", "pad"], [*lengths, 0, 0])
    ours = estimate(padded, root("ahpo", base_estimator=base)).batch
    negative = plain["advantages"].sum(1) < 0
    alpha = float((plain["advantages"].sum(1) > 0).sum() / negative.sum())
    assert 0 < alpha < 1
    torch.testing.assert_close(ours["advantages"][:8], plain["advantages"] * torch.where(negative, alpha, 1.0)[:, None])
    assert not ours["advantages"][8:].any()
    mask = padded.batch["response_mask"][:8].bool()
    torch.testing.assert_close(ours["returns"][:8][mask], plain["returns"][mask])
    assert metrics.drain()["actor/hpo/alpha"] == pytest.approx(alpha)


@pytest.mark.parametrize("base", [base for base, zero in BASE_ESTIMATORS.items() if zero])
def test_a_base_relative_to_a_group_gives_equal_rewards_exactly_zero(base):
    data = batch([0.1] * 6 + [1, 0], ["same"] * 6 + ["u"] * 2, [1, 2, 3, 4, 1, 2, 3, 3])
    assert not advantages(data, root("ahpo", base_estimator=base))[:6].any()
    said = metrics.drain()
    assert (said["actor/hpo/share_negative"], said["actor/hpo/share_degenerate_groups"]) == (1 / 8, 1 / 2)


@pytest.mark.parametrize("base", [base for base, zero in BASE_ESTIMATORS.items() if not zero])
def test_a_base_that_whitens_keeps_the_values_of_groups_with_equal_rewards(base):
    data = batch([0.5] * 6 + [1, 0], ["same"] * 6 + ["u"] * 2, [1, 2, 3, 4, 1, 2, 1, 3])
    assert advantages(data, root("ahpo", base_estimator=base))[:6, 0].all()
    assert "actor/hpo/share_degenerate_groups" not in metrics.drain()


# Sessions of several outputs ------------------------------------------------------------------------------------------

KEYS = ["u_0_0", "u_1_0", "u_1_1", "u_1_2"]
"""One session with one output, one with three."""


def test_a_session_of_several_outputs_counts_once_in_v1():
    """A success in one output and a failure in three: 1 positive, 1 negative, so that α is 1 and not 1/3."""
    data = in_v1(batch([1, 0, 0, 0], ["u"] * 4, [1, 2, 3, 4]), root("ahpo", normalize=False), KEYS)
    assert data.batch["advantages"].tolist() == [[0.5, 0, 0, 0], [-0.5, -0.5, 0, 0], [-0.5] * 3 + [0], [-0.5] * 4]
    said = metrics.drain()
    assert said["actor/hpo/alpha"] == 1
    assert (said["actor/hpo/share_positive"], said["actor/hpo/share_negative"]) == (1 / 2, 1 / 2)
    assert said["actor/hpo/response_length"] == 10 / 2


def test_sessions_get_the_advantages_that_verl_gives_them_with_grpo():
    """Rows out of order, two prompts, padding: with α = 1 the two agree; the last output carries the reward."""
    keys = ["v_0_1", "u_0_0", "v_1_0", "u_1_1", "u_1_0", "v_0_0", "u_2_0", "pad1_0_0", "pad1_1_0"]
    uids = [key.split("_")[0] for key in keys]
    rewards, lengths = [1, 1, 0, 0, 0.7, 0.7, 0, 0, 0], [1, 2, 3, 4, 1, 2, 3, 0, 0]
    ours = in_v1(batch(rewards, uids, lengths), root("hpo", alpha=1.0), keys)
    theirs = in_v1(batch(rewards, uids, lengths), root("grpo"), keys)
    torch.testing.assert_close(ours.batch["advantages"], theirs.batch["advantages"], rtol=1e-5, atol=1e-6)


def test_the_last_row_of_each_session_is_found_in_any_order():
    assert last_rows(["a_0_1", "a_0_0", "b_0_0", "a_0_2"]).tolist() == [3, 3, 2, 3]


def test_the_lengths_of_a_session_are_those_of_its_outputs_where_each_has_one():
    in_v1(batch([1, 0], ["u", "u"], [4, 2]), root("ahpo"), ["u_1_0", "u_0_0"])
    assert metrics.drain()["actor/hpo/response_length"] == 3


def test_where_sessions_cannot_be_seen_more_rows_than_rollouts_are_refused_naming_the_prompt():
    data = batch([1, 0, 0, 0], ["u"] * 4, [1, 2, 3, 4])
    with pytest.raises(ConfigError, match=r"rollout\.n=2, .*uid\) u has 4 rows .* V1 trainer"):
        advantages(data, root("ahpo", n=2))
    # Padding rows share one uid, and are no responses.
    first_token(batch([1, 0, 0, 0, 0], ["u"] * 2 + ["pad"] * 3, [1, 1, 0, 0, 0]), root("ahpo", n=2))


def test_a_base_that_whitens_does_not_know_sessions():
    with pytest.raises(
        ConfigError, match=r"base_estimator=reinforce_plus_plus does not support sessions .*base_estimator=grpo"
    ):
        in_v1(batch(*SPARSE), root("ahpo", base_estimator="reinforce_plus_plus"), KEYS)


# KL in the reward -----------------------------------------------------------------------------------------------------


def kl_batch() -> DataProto:
    """A group with a success, and one without, in which only the KL penalty differs."""
    data = batch([1, 0, 0, 0, 0, 0, 0, 0], ["u"] * 4 + ["wrong"] * 4)
    data.batch["old_log_probs"] = torch.zeros(8, 4)
    data.batch["ref_log_prob"] = -torch.arange(8).unsqueeze(1).expand(8, 4) / 10
    return apply_kl_penalty(data, kl_ctrl=core_algos.FixedKLController(0.01))[0]


def test_with_kl_in_the_reward_v1_counts_the_tasks_scores():
    """1 positive and 3 negatives by the scores; by the rewards the all-wrong group would add 2 and 2."""
    config = root("ahpo")
    config.algorithm.use_kl_in_reward = True
    data = in_v1(kl_batch(), config)
    said = metrics.drain()
    assert said["actor/hpo/alpha"] == pytest.approx(1 / 3)
    assert (said["actor/hpo/share_positive"], said["actor/hpo/share_negative"]) == (1 / 8, 3 / 8)
    plain = in_v1(kl_batch(), root("hpo", alpha=1.0)).batch["advantages"]
    assert (plain[4:, 0] < 0).sum() == 2
    torch.testing.assert_close(data.batch["advantages"], torch.where(plain < 0, plain / 3, plain))


def test_with_kl_in_the_reward_other_trainers_are_refused():
    config = root("ahpo")
    config.algorithm.use_kl_in_reward = True
    with pytest.raises(ConfigError, match=r"use_kl_in_reward=True.*use_kl_loss=True"):
        advantages(kl_batch(), config)


# What is refused ------------------------------------------------------------------------------------------------------


def test_without_uids_the_error_names_the_estimator():
    data = batch(*SPARSE)
    del data.non_tensor_batch["uid"]
    with pytest.raises(ValueError, match=r"adv_estimator=hpo .* no `uid`"):
        compute_advantage(data, adv_estimator="hpo", config=root("hpo").algorithm)


def test_a_reward_that_is_not_finite_is_refused_naming_its_prompt():
    rewards: list[Any] = [0.0] * 64
    rewards[41] = float("nan")
    with pytest.raises(ValueError, match=r"1 of 64 .* rows \[41\].* prompts \(uid\): prompt-5\."):
        first_token(batch(rewards, [f"prompt-{i // 8}" for i in range(64)]), root("ahpo"))


@pytest.mark.parametrize("uid", [None, float("nan")])
def test_rows_without_a_prompt_are_refused_instead_of_forming_a_group(uid):
    data = batch([1, 0, 0, 1], ["u", uid, "u", uid])
    with pytest.raises(ValueError, match=r"`uid` of 2 of 4 rows is None or NaN, rows \[1, 3\]"):
        first_token(data, root("ahpo"))
    assert first_token(batch([1, 0], ["None", "None"]), root("ahpo", normalize=False)) == [0.5, -0.5]


def test_an_advantage_of_the_base_that_is_not_finite_is_refused(monkeypatch):
    right = core_algos.get_adv_estimator_fn("rloo")

    def wrong(**inputs):
        found, returns = right(**inputs)
        found[1] = float("inf")
        return found, returns

    monkeypatch.setitem(core_algos.ADV_ESTIMATOR_REGISTRY, "rloo", wrong)
    with pytest.raises(ValueError, match=r"base estimator must be finite: 1 of 4 .*rows \[1\]"):
        first_token(batch(*SPARSE), root("ahpo", base_estimator="rloo"))


# Dtypes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASE_ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.bfloat16])
def test_rewards_of_other_dtypes_give_the_advantages_of_their_values(base, dtype):
    """In verl's rloo, integer rewards would truncate the advantages."""
    config, data, plain = root("ahpo", base_estimator=base), batch(*SPARSE), batch(*SPARSE)
    data.batch["token_level_rewards"] = data.batch["token_level_rewards"].to(dtype)
    torch.testing.assert_close(advantages(data, config), advantages(plain, config))


@pytest.mark.parametrize("base", BASE_ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float16, torch.int32, torch.uint8])
def test_a_mask_of_another_dtype_is_the_same_mask(base, dtype):
    config, lengths = root("ahpo", base_estimator=base), [4, 3, 2, 0]
    data, plain = batch(*SPARSE, lengths), batch(*SPARSE, lengths)
    data.batch["response_mask"] = data.batch["response_mask"].to(dtype)
    torch.testing.assert_close(advantages(data, config), advantages(plain, config))
    assert metrics.drain()["actor/hpo/response_length"] == 3


def test_half_precision_does_not_limit_the_length():
    """70,000 is more than the largest number of fp16."""
    mask = torch.ones(2, 70_000, dtype=torch.float16)
    rewards = torch.zeros(2, 70_000)
    rewards[0, -1] = 1
    found, _ = core_algos.get_adv_estimator_fn("ahpo")(
        rewards, mask, np.array(["u", "u"]), config=root("ahpo").algorithm
    )
    assert found.isfinite().all()
    assert metrics.drain()["actor/hpo/response_length"] == 70_000


def test_an_empty_batch_is_estimated_and_logged():
    inputs = (torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.long), np.array([], dtype=object))
    for last_row in (None, last_rows([])):
        found, _ = core_algos.get_adv_estimator_fn("ahpo")(*inputs, config=root("ahpo").algorithm, last_row=last_row)
        assert found.shape == (0, 4)
        assert metrics.drain()["actor/hpo/alpha"] == 1


def test_an_invalid_setting_is_refused():
    with pytest.raises(ConfigError, match=r"algorithm.hpo.alpha=2"):
        first_token(batch(*SPARSE), root("hpo", alpha=2))


# With verl's losses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_mode", ["vanilla", "gspo", "sapo", "cispo", "geo_mean", "gpg", "dppo_tv", "dppo_kl"])
def test_alpha_composes_with_any_homogeneous_loss_negative_responses_cost_alpha_times_as_much(loss_mode):
    config = FSDPActorConfig(rollout_n=4, ppo_micro_batch_size_per_gpu=1)
    loss_fn = core_algos.get_policy_loss_fn(loss_mode)
    old = torch.full((4, 4), -1.0)
    log_prob = old + torch.linspace(-0.1, 0.1, 16).reshape(4, 4)
    data = batch(*SPARSE)
    weighted = advantages(batch(*SPARSE), root("ahpo", loss_mode))
    plain = compute_advantage(data, core_algos.AdvantageEstimator.GRPO).batch["advantages"]

    def cost(adv: torch.Tensor, row: int) -> float:
        rows = slice(row, row + 1)
        mask = data.batch["response_mask"][rows].bool()
        return loss_fn(old[rows], log_prob[rows], adv[rows], mask, "seq-mean-token-mean", config)[0].item()

    assert cost(weighted, 0) == pytest.approx(cost(plain, 0))
    for row in (1, 2, 3):
        assert abs(cost(plain, row)) > 1e-3
        assert cost(weighted, row) == pytest.approx(cost(plain, row) / 3, rel=1e-5)
