"""The advantage estimators, through the functions of verl's trainer that call them."""

from __future__ import annotations

import cloudpickle
import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from verl import DataProto
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
from verl.workers.config import FSDPActorConfig

from hpo_plugin.glue.arms import ConfigError

PLUS, MINUS = 0.75 / (0.5 + 1e-6), -0.25 / (0.5 + 1e-6)
"""A of rewards (1, 0, 0, 0): mean 1/4, unbiased std 1/2."""


def root(adv: str, loss: str = "vanilla", *, normalize: bool = True, **hpo) -> DictConfig:
    return OmegaConf.create(
        {
            "algorithm": {"adv_estimator": adv, "norm_adv_by_std_in_grpo": normalize, "hpo": hpo},
            "actor_rollout_ref": {"actor": {"policy_loss": {"loss_mode": loss}}},
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
        tensors={"token_level_rewards": scores, "response_mask": mask},
        non_tensors={"uid": np.array(uids, dtype=object)},
    )


def advantages(data: DataProto, config: DictConfig) -> torch.Tensor:
    out = compute_advantage(data, adv_estimator=config.algorithm.adv_estimator, config=config.algorithm)
    assert torch.equal(out.batch["advantages"], out.batch["returns"])
    return out.batch["advantages"]


def first_token(data: DataProto, config: DictConfig) -> list[float]:
    return advantages(data, config)[:, 0].tolist()


SPARSE = ([1, 0, 0, 0], ["u"] * 4)


@pytest.mark.parametrize(
    ("config", "negative"),
    [
        pytest.param(root("hpo"), 0.6 * MINUS, id="hpo weighs by 0.6"),
        pytest.param(root("hpo", alpha=0.2), 0.2 * MINUS, id="hpo weighs by its alpha"),
        pytest.param(root("ahpo"), 1 / 3 * MINUS, id="ahpo weighs by 1 positive to 3 negatives"),
        pytest.param(root("ahpo", alpha_min=0.5), 0.5 * MINUS, id="ahpo weighs by no less than alpha_min"),
        pytest.param(root("hpo", "hpo"), MINUS, id="hpo leaves it to the loss"),
        pytest.param(root("ahpo", "ahpo"), MINUS, id="ahpo leaves it to the loss"),
        pytest.param(root("ahpo", "gspo"), 1 / 3 * MINUS, id="ahpo weighs for gspo"),
    ],
)
def test_negative_advantages_are_weighed_once_and_positive_ones_never(config, negative):
    assert first_token(batch(*SPARSE), config) == pytest.approx([PLUS, negative, negative, negative])


def test_std_normalization_follows_verls_key():
    config = root("hpo", "hpo", normalize=False)
    assert first_token(batch(*SPARSE), config) == [0.75, -0.25, -0.25, -0.25]


def test_advantage_stands_on_response_tokens_only():
    out = advantages(batch([1, 0], ["u", "u"], lengths=[4, 2]), root("hpo", "hpo", normalize=False))
    assert out.tolist() == [[0.5] * 4, [-0.5, -0.5, 0, 0]]


def test_rows_of_one_uid_need_not_be_adjacent():
    config = root("ahpo", "ahpo", normalize=False)
    data = batch([1, 5, 0, 3, 0, 0], ["b", "a", "b", "a", "b", "b"])
    assert first_token(data, config) == [0.75, 1.0, -0.25, -1.0, -0.25, -0.25]


def test_padding_rows_and_rejected_rows_get_zero_and_are_counted_nowhere():
    """Two rows verl appends, one rejected row of a real group: still 1 positive to 3 negatives."""
    data = batch([1, 0, 0, 0, 9, 0, 0], ["u"] * 5 + ["pad01f", "pad01f"], lengths=[3, 3, 3, 3, 0, 0, 0])
    out = first_token(data, root("ahpo"))
    assert out == pytest.approx([PLUS] + [MINUS / 3] * 3 + [0, 0, 0])


@pytest.mark.parametrize("name", ["hpo", "ahpo"])
def test_degenerate_groups_are_exactly_zero_and_are_no_signs(name):
    """Eight rewards of 0.1, which verl's grpo gives -0.0074 each: the other group alone decides alpha, 1/3."""
    data = batch([0.1] * 8 + [1, 0, 0, 0], ["same"] * 8 + ["u"] * 4)
    out = first_token(data, root(name, alpha=1 / 3) if name == "hpo" else root(name))
    assert out[:8] == [0.0] * 8
    assert out[8:] == pytest.approx([PLUS] + [MINUS / 3] * 3)


def test_a_group_of_one_gets_zero_where_verls_grpo_gives_its_reward():
    data = batch([1, 1, 0], ["alone", "u", "u"])
    assert first_token(data, root("hpo", "hpo", normalize=False)) == [0.0, 0.5, -0.5]
    grpo = compute_advantage(batch([1, 1, 0], ["alone", "u", "u"]), core_algos.AdvantageEstimator.GRPO)
    assert grpo.batch["advantages"][0, 0] == pytest.approx(1.0)


def test_verls_v1_trainer_gets_the_same_through_its_multi_trajectory_function():
    config = root("ahpo")
    data = batch(*SPARSE)
    out = compute_advantage_for_multi_trajectories(
        data,
        batch_keys=[f"u_{i}_0" for i in range(4)],
        adv_estimator=config.algorithm.adv_estimator,
        norm_adv_by_std_in_grpo=True,
        config=config.algorithm,
    )
    assert out.batch["advantages"][:, 0].tolist() == pytest.approx([PLUS] + [MINUS / 3] * 3)


@pytest.mark.parametrize("travel", [lambda c: cloudpickle.loads(cloudpickle.dumps(c)), lambda c: c])
def test_loss_mode_is_seen_through_the_parent_in_another_process_and_after_resolving(travel):
    config = root("ahpo", "${mode}")
    config.mode = "ahpo"
    config = travel(config)
    OmegaConf.resolve(config)
    assert first_token(batch(*SPARSE), config) == pytest.approx([PLUS] + [MINUS] * 3)


def test_verls_own_composed_config_is_read(recipe):
    config = recipe(**{"algorithm.policy_loss": "ahpo"})
    assert first_token(batch(*SPARSE), config) == pytest.approx([PLUS] + [MINUS] * 3)
    config = recipe(**{"algorithm.policy_loss": "ahpo", "actor_rollout_ref.actor.policy_loss.loss_mode": "vanilla"})
    assert first_token(batch(*SPARSE), config) == pytest.approx([PLUS] + [MINUS / 3] * 3)


def test_a_loss_mode_of_the_other_name_is_refused():
    with pytest.raises(ConfigError, match=r"adv_estimator=hpo and .*loss_mode=ahpo"):
        first_token(batch(*SPARSE), root("hpo", "ahpo"))


@pytest.mark.parametrize("config", [OmegaConf.create({"hpo": {"alpha": 0.5}}), None, {"hpo": {"weigh": "loss"}}])
def test_a_config_from_which_the_loss_mode_cannot_be_seen_is_refused_naming_what_to_set(config):
    data = batch(*SPARSE)
    with pytest.raises(ConfigError) as refused:
        compute_advantage(data, adv_estimator="ahpo", config=config)
    for text in ("adv_estimator=ahpo", "policy_loss.loss_mode", "algorithm.hpo.weigh=advantage", "weigh=loss"):
        assert text in str(refused.value)


@pytest.mark.parametrize(("weigh", "negative"), [("advantage", MINUS / 3), ("loss", MINUS)])
def test_a_trainer_that_hides_the_loss_mode_is_told_who_weighs(weigh, negative):
    config = OmegaConf.create({"hpo": {"weigh": weigh}})
    out = compute_advantage(batch(*SPARSE), adv_estimator="ahpo", config=config).batch["advantages"][:, 0]
    assert out.tolist() == pytest.approx([PLUS] + [negative] * 3)


def test_a_batch_without_uids_is_refused():
    data = batch(*SPARSE)
    del data.non_tensor_batch["uid"]
    with pytest.raises(ValueError, match=r"adv_estimator=hpo .* no `uid`"):
        compute_advantage(data, adv_estimator="hpo", config=root("hpo").algorithm)


def test_a_reward_that_is_not_finite_is_refused_naming_its_row():
    with pytest.raises(ValueError, match=r"rows \[2\]"):
        first_token(batch([1, 0, float("nan"), 0], ["u"] * 4), root("ahpo"))


@pytest.mark.parametrize("loss_mode", ["vanilla", "gspo", "sapo", "cispo"])
def test_hysteresis_composes_with_any_loss_negative_responses_cost_alpha_times_as_much(loss_mode):
    config = FSDPActorConfig(rollout_n=4, ppo_micro_batch_size_per_gpu=1)
    loss_fn = core_algos.get_policy_loss_fn(loss_mode)
    old = torch.full((4, 4), -1.0)
    log_prob = old + torch.linspace(-0.1, 0.1, 16).reshape(4, 4)
    data = batch(*SPARSE)
    weighed = advantages(batch(*SPARSE), root("ahpo", loss_mode))
    plain = compute_advantage(data, core_algos.AdvantageEstimator.GRPO).batch["advantages"]

    def cost(adv: torch.Tensor, row: int) -> float:
        rows = slice(row, row + 1)
        mask = data.batch["response_mask"][rows].bool()
        return loss_fn(old[rows], log_prob[rows], adv[rows], mask, "seq-mean-token-mean", config)[0].item()

    assert cost(weighed, 0) == pytest.approx(cost(plain, 0))
    for row in (1, 2, 3):
        assert abs(cost(plain, row)) > 1e-3
        assert cost(weighed, row) == pytest.approx(cost(plain, row) / 3, rel=1e-5)
