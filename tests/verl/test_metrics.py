"""From the estimator's counts to verl's log."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from verl import DataProto
from verl.experimental.fully_async_policy.detach_utils import MetricsAggregator as FullyAsyncAggregator
from verl.trainer.ppo.metric_utils import compute_data_metrics
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.ppo.v1.utils import MetricsAggregator, compute_advantage_for_multi_trajectories

from hpo_plugin.algorithm import BatchStatistics
from hpo_plugin.errors import ConfigError
from hpo_plugin.metrics import Observation
from hpo_plugin.verl import estimators, metrics

SPARSE = BatchStatistics(
    alpha=1 / 3,
    positive=1,
    negative=3,
    responses=6,
    groups=2,
    degenerate_groups=1,
    tokens=16,
    abs_advantage_positive=1.5,
    abs_advantage_negative=7 / 6,
)
"""Rewards (1, 0, 0, 0) and (0, 0) over 1, 3, 2, 2, 4, 4 tokens."""

EVEN = SPARSE._replace(alpha=1.0, positive=2, negative=2, responses=4, groups=1, degenerate_groups=0, tokens=4)

VALUES = {
    "actor/hpo/alpha": 1 / 3,
    "actor/hpo/share_positive": 1 / 6,
    "actor/hpo/share_negative": 3 / 6,
    "actor/hpo/share_degenerate_groups": 1 / 2,
    "actor/hpo/response_length": 16 / 6,
    "actor/hpo/abs_advantage_share_positive": 1.5 / (1.5 + 7 / 6),
    "actor/hpo/abs_advantage_share_negative": 7 / 6 / (1.5 + 7 / 6),
}


@pytest.fixture(autouse=True)
def nothing_recorded():
    metrics.drain()


def of_step(batches: list[BatchStatistics]) -> dict[str, float]:
    for batch in batches:
        metrics.record(batch)
    return metrics.drain()


def test_metrics_of_a_step_worked_out_by_hand():
    assert of_step([SPARSE]) == pytest.approx(VALUES)


def test_several_estimates_in_a_step_add_up_and_each_alpha_is_logged():
    """As in separate_async with parameter_sync_step=4."""
    said = of_step([SPARSE, EVEN, EVEN, SPARSE])
    assert [said[f"actor/hpo/alpha_update_{k}"] for k in (1, 2, 3, 4)] == pytest.approx([1 / 3, 1, 1, 1 / 3])
    assert said["actor/hpo/alpha"] == pytest.approx(2 / 3)
    assert said["actor/hpo/share_positive"] == pytest.approx((1 + 2 + 2 + 1) / 20)
    assert said["actor/hpo/share_degenerate_groups"] == pytest.approx(2 / 6)
    assert said["actor/hpo/response_length"] == pytest.approx(40 / 20)


def test_a_batch_without_responses_has_no_shares_and_without_groups_no_degenerate_ones():
    said = of_step([BatchStatistics(1.0, 0, 0, 0, 0, 0, 0, 0.0, 0.0)])
    assert set(said.values()) == {0.0, 1.0}
    assert "actor/hpo/share_degenerate_groups" not in said


def test_no_name_holds_a_word_by_which_verls_aggregators_choose_another_reduction():
    for _ in range(4):
        metrics.record_observation(Observation(SPARSE, 1, 7))
    said = of_step([SPARSE] * 4)
    assert not [key for key in said for word in ("min", "max", "sum", "total", "timing", "/lr") if word in key]
    for aggregator in (MetricsAggregator(), FullyAsyncAggregator(total_gpus=1)):
        assert {aggregator._get_aggregation_type(key) for key in said} <= {"avg", "weighted_avg"}


def test_what_is_observed_in_a_step_worked_out_by_hand():
    """Positive responses of 1 and of 2 x 2 tokens, negative ones of 3, 2, 2 and of 2 tokens in two."""
    metrics.record_observation(Observation(SPARSE, 1, 7))
    metrics.record_observation(Observation(EVEN, 4, 2))
    assert metrics.drain() == pytest.approx(
        {
            "actor/hpo/observe/alpha": 2 / 3,
            "actor/hpo/observe/alpha_update_1": 1 / 3,
            "actor/hpo/observe/alpha_update_2": 1.0,
            "actor/hpo/observe/share_positive": 3 / 10,
            "actor/hpo/observe/share_negative": 5 / 10,
            "actor/hpo/observe/share_degenerate_groups": 1 / 3,
            "actor/hpo/observe/response_length_positive": 5 / 3,
            "actor/hpo/observe/response_length_negative": 9 / 5,
        }
    )
    assert metrics.drain() == {}


def test_every_metric_has_a_row_in_the_table_of_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    metrics.record_observation(Observation(SPARSE, 1, 7))
    for key in of_step([SPARSE]):
        assert f"| `{key}`" in page, key
    assert "`actor/hpo/alpha_update_<k>`" in page


# Through verl's functions ---------------------------------------------------------------------------------------------


def batch() -> DataProto:
    lengths = torch.tensor([1, 3, 2, 2, 4, 4])
    mask = (torch.arange(4) < lengths.unsqueeze(1)).long()
    rewards = torch.zeros(6, 4)
    rewards[0, 0] = 1
    zeros = torch.zeros(6, 4)
    return DataProto.from_dict(
        tensors={
            "token_level_rewards": rewards,
            "token_level_scores": rewards,
            "response_mask": mask,
            "prompts": zeros[:, :2].long(),
            "responses": zeros.long(),
            "attention_mask": torch.cat([torch.ones(6, 2, dtype=torch.long), mask], dim=1),
        },
        non_tensors={"uid": np.array(["a"] * 4 + ["b"] * 2, dtype=object)},
    )


def config(adv: str, **algorithm):
    return OmegaConf.create(
        {
            "algorithm": {"adv_estimator": adv, "norm_adv_by_std_in_grpo": True} | algorithm,
            "actor_rollout_ref": {"rollout": {"n": 4}},
        }
    ).algorithm


def logged(data: DataProto) -> dict[str, float]:
    """What any trainer of verl puts into its log."""
    return {k: v for k, v in compute_data_metrics(data, use_critic=False).items() if k.startswith("actor/hpo/")}


def in_v1(data: DataProto, algorithm) -> DataProto:
    keys = [f"{uid}_{row}_0" for row, uid in enumerate(data.non_tensor_batch["uid"])]
    return compute_advantage_for_multi_trajectories(data, keys, algorithm.adv_estimator, config=algorithm)


def test_what_the_estimator_counted_is_logged_once_by_every_trainer():
    data = compute_advantage(batch(), "ahpo", config=config("ahpo"))
    expected = VALUES | {
        "actor/hpo/abs_advantage_share_positive": 1.5 / (1.5 + 3.5 / 3),
        "actor/hpo/abs_advantage_share_negative": 3.5 / 3 / (1.5 + 3.5 / 3),
    }
    assert logged(data) == pytest.approx(expected, rel=1e-5)
    assert logged(data) == {}


def test_four_updates_of_a_global_step_are_logged_as_four():
    for _ in range(4):
        data = in_v1(batch(), config("ahpo"))
    assert [logged(data)[f"actor/hpo/alpha_update_{k}"] for k in (1,)] == pytest.approx([1 / 3])
    for _ in range(4):
        data = in_v1(batch(), config("ahpo"))
    said = logged(data)
    assert [said[f"actor/hpo/alpha_update_{k}"] for k in range(1, 5)] == pytest.approx([1 / 3] * 4)
    assert "actor/hpo/alpha_update_5" not in said


def test_a_preset_without_alpha_logs_the_same_metrics_with_alpha_one_for_comparison():
    """Verl's grpo on the same batch: 1 positive to 3 negatives; absolute advantages sum to 1.5 and 3.5."""
    said = logged(in_v1(batch(), config("grpo", policy_loss="grpo")))
    assert said == pytest.approx(
        VALUES
        | {
            "actor/hpo/alpha": 1.0,
            "actor/hpo/abs_advantage_share_positive": 1.5 / (1.5 + 3.5),
            "actor/hpo/abs_advantage_share_negative": 3.5 / (1.5 + 3.5),
        },
        rel=1e-5,
    )


def test_rounding_noise_of_verls_grpo_is_not_counted_in_the_comparison():
    data = batch()
    data.batch["token_level_rewards"][4:, 0] = 0.7
    data.batch["token_level_rewards"][:4, 0] = 0.1
    in_v1(data, config("grpo", policy_loss="grpo"))
    said = logged(data)
    assert (said["actor/hpo/share_positive"], said["actor/hpo/share_negative"]) == (0, 0)
    assert said["actor/hpo/share_degenerate_groups"] == 1


def test_a_run_that_does_not_name_hpo_logs_nothing_of_it():
    assert logged(in_v1(batch(), config("grpo"))) == {}
    assert logged(compute_advantage(batch(), "rloo", config=config("rloo"))) == {}


# Observed -------------------------------------------------------------------------------------------------------------

OBSERVED = {
    "actor/hpo/observe/alpha": 1 / 3,
    "actor/hpo/observe/share_positive": 1 / 6,
    "actor/hpo/observe/share_negative": 3 / 6,
    "actor/hpo/observe/share_degenerate_groups": 1 / 2,
    "actor/hpo/observe/response_length_positive": 1.0,
    "actor/hpo/observe/response_length_negative": 7 / 3,
}


def observed(adv: str, **algorithm):
    return config(adv, hpo={"observe": True}, gamma=1.0, **algorithm)


@pytest.mark.parametrize("estimator", ["grpo", "grpo_passk", "rloo", "opo", "reinforce_plus_plus", "remax", "hpo"])
def test_any_estimator_is_observed_once_by_every_trainer(estimator):
    """V1 calls ``compute_advantage`` too, which is observed in the other trainers."""
    for estimate in (in_v1, lambda data, algorithm: compute_advantage(data, estimator, config=algorithm)):
        data = batch()
        data.batch["reward_baselines"] = torch.zeros(6)
        said = logged(estimate(data, observed(estimator)))
        assert {name: value for name, value in said.items() if "/observe/" in name} == pytest.approx(OBSERVED)
        assert ("actor/hpo/alpha" in said) is (estimator == "hpo")


def test_a_preset_logs_its_own_alpha_beside_the_one_that_is_observed():
    said = logged(in_v1(batch(), observed("grpo", policy_loss="grpo")))
    assert (said["actor/hpo/alpha"], said["actor/hpo/observe/alpha"]) == pytest.approx((1.0, 1 / 3))


def test_without_the_key_or_with_false_nothing_is_observed():
    for hpo in ({}, {"observe": False}):
        assert logged(in_v1(batch(), config("grpo", hpo=hpo))) == {}
        assert logged(compute_advantage(batch(), "grpo", config=config("grpo", hpo=hpo))) == {}
    assert logged(compute_advantage(batch(), "grpo")) == {}


def test_updates_of_a_global_step_are_observed_together():
    for _ in range(2):
        data = in_v1(batch(), observed("grpo"))
    said = logged(data)
    updates = {f"actor/hpo/observe/alpha_update_{k}": 1 / 3 for k in (1, 2)}
    assert said == pytest.approx(OBSERVED | updates)


def test_rounding_noise_of_verls_grpo_is_no_sign_and_a_sign_without_responses_has_no_length():
    data = batch()
    data.batch["token_level_scores"][:4, 0] = 0.1
    said = logged(in_v1(data, observed("grpo")))
    assert said == {
        "actor/hpo/observe/alpha": 1.0,
        "actor/hpo/observe/share_positive": 0.0,
        "actor/hpo/observe/share_negative": 0.0,
        "actor/hpo/observe/share_degenerate_groups": 1.0,
    }


def test_groups_of_one_have_no_sign():
    data = batch()
    data.non_tensor_batch["uid"] = np.array(list("abcdef"), dtype=object)
    said = logged(in_v1(data, observed("grpo")))
    assert said["actor/hpo/observe/alpha"] == said["actor/hpo/observe/share_degenerate_groups"] == 1.0


@pytest.mark.parametrize("estimator", ["grpo", "reinforce_plus_plus"])
def test_with_kl_in_the_reward_the_scores_are_counted_in_every_trainer(estimator):
    data = batch()
    data.batch["token_level_rewards"] = data.batch["token_level_rewards"] - 0.01 * torch.rand(6, 4)
    algorithm = observed(estimator, use_kl_in_reward=True)
    assert logged(in_v1(data, algorithm)) == pytest.approx(OBSERVED)
    assert logged(compute_advantage(data, estimator, config=algorithm)) == pytest.approx(OBSERVED)


def test_a_session_of_several_outputs_is_observed_as_one_response_of_all_its_tokens_in_v1():
    """The last two rows of a are outputs of one session: 1 positive of 1 token, 2 negatives of 3 and 2 + 2."""
    keys = ["a_0_0", "a_1_0", "a_2_0", "a_2_1", "b_0_0", "b_1_0"]
    data = compute_advantage_for_multi_trajectories(batch(), keys, "grpo", config=observed("grpo"))
    said = logged(data)
    assert said["actor/hpo/observe/alpha"] == pytest.approx(1 / 2)
    assert said["actor/hpo/observe/share_negative"] == pytest.approx(2 / 5)
    assert said["actor/hpo/observe/response_length_negative"] == pytest.approx(7 / 2)


def several_outputs(data: DataProto) -> DataProto:
    data.non_tensor_batch["uid"] = np.array(["a"] * 6, dtype=object)
    return data


def no_uids(data: DataProto) -> DataProto:
    del data.non_tensor_batch["uid"]
    return data


def no_number(data: DataProto) -> DataProto:
    data.batch["token_level_scores"][1, 0] = torch.nan
    return data


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (several_outputs, "(ConfigError): actor_rollout_ref.rollout.n=4, but the prompt (uid) a has 6 rows"),
        (no_uids, "(ValueError): the batch has no `uid`"),
        (no_number, "(RewardError): rewards must be finite: 1 of 6"),
    ],
)
def test_a_batch_that_cannot_be_counted_is_named_once_and_the_run_continues(monkeypatch, caplog, changed, said):
    monkeypatch.setattr(estimators, "_warned", set())
    for _ in range(2):
        data = changed(batch())
        data.batch["values"] = torch.zeros(6, 4)
        assert logged(compute_advantage(data, "gae", config=observed("gae"))) == {}
    (record,) = caplog.records
    assert record.getMessage().startswith(f"algorithm.hpo.observe=True cannot observe a batch {said}")


def test_a_value_that_no_check_has_seen_is_refused():
    with pytest.raises(ConfigError, match=r"algorithm\.hpo\.observe='yes' is not a boolean"):
        in_v1(batch(), config("grpo", hpo={"observe": "yes"}))
