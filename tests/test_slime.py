"""The hook for slime. With a checkout of slime and megatron-core on PYTHONPATH, slime's own loss is tested too."""

import dataclasses
import importlib
import logging
from argparse import Namespace

import pytest
import torch

from hpo_plugin import slime
from hpo_plugin.algorithm import RewardError, group_relative_advantage, hpo_loss
from hpo_plugin.errors import ConfigError

#: A group with one success in four, a group without signal whose rewards are inexact in binary, a group that is removed
#: in part.
REWARDS = [1.0, 0.0, 0.0, 0.0, 0.1, 0.1, 0.1, 0.1, 1.0, 0.0, 1.0, 0.0]


@dataclasses.dataclass
class Sample:
    """The fields of slime's ``Sample`` that the hook reads (slime/utils/types.py)."""

    group_index: int | None
    reward: float
    rollout_id: int | None = None
    response_length: int = 3
    loss_mask: list[int] | None = None
    remove_sample: bool = False

    def get_reward_value(self, args):
        return self.reward if not args.reward_key else self.reward[args.reward_key]


def samples(kind=Sample, rewards=REWARDS, **changes):
    made = [kind(group_index=7 + i // 4, reward=reward, response_length=3) for i, reward in enumerate(rewards)]
    for name, value in changes.items():
        setattr(made[8], name, value)
    return made


def arguments(**changes):
    given = {
        "advantage_estimator": "grpo",
        "calculate_per_token_loss": True,
        "rewards_normalization": True,
        "grpo_std_normalization": True,
        "normalize_advantages": False,
        "custom_advantage_function_path": None,
        "custom_pg_loss_reducer_function_path": None,
        "reward_key": None,
        "compute_advantages_and_returns": True,
        "loss_type": "policy_loss",
        "use_opd": False,
        "n_samples_per_prompt": 4,
    }
    return Namespace(**given | changes)


def test_ahpo_multiplies_negative_advantages_by_the_ratio_of_counts_over_the_rollout():
    raw, advantages = slime.post_process_rewards(arguments(), samples())
    assert raw == REWARDS
    plain = group_relative_advantage(torch.tensor(REWARDS), torch.arange(12) // 4).advantage
    # 3 positive and 5 negative; rounding in the group of 0.1 has no sign.
    expected = torch.where(plain < 0, 3 / 5 * plain, plain)
    torch.testing.assert_close(torch.tensor(advantages), expected)
    assert advantages[4:8] == [0, 0, 0, 0]


def test_hpo_has_a_fixed_alpha_and_the_settings_of_the_yaml_file():
    plain = group_relative_advantage(torch.tensor(REWARDS), torch.arange(12) // 4).advantage
    for alpha, args in ((0.6, arguments(hpo_policy="hpo")), (0.2, arguments(hpo_policy="hpo", hpo_alpha=0.2))):
        _, advantages = slime.post_process_rewards(args, samples())
        torch.testing.assert_close(torch.tensor(advantages), torch.where(plain < 0, alpha * plain, plain))
    rare = [1.0] + [0.0] * 31
    for lowest, args in ((0.1, arguments()), (0.5, arguments(hpo_alpha_min=0.5))):
        _, advantages = slime.post_process_rewards(args, [Sample(0, reward) for reward in rare])
        plain = group_relative_advantage(torch.tensor(rare), torch.zeros(32, dtype=torch.long)).advantage
        torch.testing.assert_close(torch.tensor(advantages), torch.where(plain < 0, lowest * plain, plain))


@pytest.mark.parametrize("removed", [{"remove_sample": True}, {"loss_mask": [0, 0, 0]}, {"response_length": 0}])
def test_a_sample_outside_of_the_loss_is_counted_nowhere(removed):
    _, advantages = slime.post_process_rewards(arguments(), samples(**removed))
    assert advantages[8] == 0
    # Of the last group, 1 of 3 is left: 2 positive, 5 negative in all.
    plain = group_relative_advantage(torch.tensor(REWARDS[9:]), torch.zeros(3, dtype=torch.long)).advantage
    torch.testing.assert_close(torch.tensor(advantages[9:]), torch.where(plain < 0, 2 / 5 * plain, plain))


def test_without_division_by_the_standard_deviation():
    _, advantages = slime.post_process_rewards(arguments(hpo_policy="hpo", grpo_std_normalization=False), samples())
    assert advantages[:4] == pytest.approx([0.75, -0.15, -0.15, -0.15])


def test_a_reward_of_several_parts_is_read_by_reward_key():
    parts = [{"acc": reward, "format": 1.0} for reward in REWARDS]
    expected = slime.post_process_rewards(arguments(), samples())
    assert slime.post_process_rewards(arguments(reward_key="acc"), samples(rewards=parts)) == expected


def test_the_metrics_are_logged(caplog):
    with caplog.at_level(logging.INFO, logger="hpo_plugin.slime"):
        slime.post_process_rewards(arguments(), samples())
    assert "A-HPO: hpo/alpha 0.6, hpo/share_positive 0.25, hpo/share_negative 0.4167" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"advantage_estimator": "gspo"},
            "advantage_estimator='gspo' does not give HPO's objective: set --advantage-estimator grpo",
        ),
        ({"calculate_per_token_loss": False}, "add --calculate-per-token-loss"),
        ({"rewards_normalization": False}, "remove --disable-rewards-normalization"),
        ({"normalize_advantages": True}, "remove --normalize-advantages"),
        ({"custom_advantage_function_path": "a.b"}, "remove --custom-advantage-function-path"),
        ({"custom_pg_loss_reducer_function_path": "a.b"}, "remove --custom-pg-loss-reducer-function-path"),
        ({"compute_advantages_and_returns": False}, "remove --disable-compute-advantages-and-returns"),
        ({"loss_type": "custom_loss"}, "set --loss-type policy_loss"),
        ({"use_opd": True}, "remove --use-opd"),
        ({"n_samples_per_prompt": 1}, "every advantage would be 0"),
        (
            {"hpo_min_alpha": 0.5},
            "hpo_min_alpha is not a setting of HPO; the settings are hpo_alpha, hpo_alpha_min and hpo_policy",
        ),
        ({"hpo_policy": "ppo"}, "hpo_policy='ppo' is not a variant. Set hpo_policy to one of 'hpo', 'ahpo'"),
        ({"hpo_alpha_min": 1.5}, r"hpo_alpha_min=1.5 is not a number in \[0, 1\]"),
        ({"hpo_alpha": 0.5}, "hpo_alpha=0.5 has no effect with hpo_policy='ahpo'"),
    ],
)
def test_what_would_not_be_hpo_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        slime.post_process_rewards(arguments(**changes), samples())


def test_samples_that_cannot_be_counted_are_refused():
    split = samples()
    split[0].rollout_id = split[1].rollout_id = 5
    with pytest.raises(ValueError, match="several samples have the same rollout_id"):
        slime.post_process_rewards(arguments(), split)
    with pytest.raises(ValueError, match="group_index=None"):
        slime.post_process_rewards(arguments(), samples(group_index=None))
    with pytest.raises(RewardError, match="rows \\[8\\]"):
        slime.post_process_rewards(arguments(), samples(reward=float("nan")))


@pytest.fixture
def slimes_loss(monkeypatch):
    """The module of losses of slime, for one rank."""
    pytest.importorskip("slime.utils.types", reason="slime is not on PYTHONPATH (docs/frameworks.md)")
    pytest.importorskip("megatron.core", reason="megatron-core is not on PYTHONPATH")
    module = importlib.import_module("slime.backends.megatron_utils.loss")
    for name, value in (
        ("is_pipeline_last_stage", True),
        ("get_context_parallel_world_size", 1),
        ("get_data_parallel_world_size", 1),
    ):
        monkeypatch.setattr(module.mpu, name, lambda value=value, **_: value)
    return module


@pytest.mark.parametrize("fault", [None, "no α"])
def test_the_gradient_of_slimes_loss_is_that_of_the_reference(slimes_loss, monkeypatch, fault):
    """Sample, advantages and loss are slime's, over two micro-batches; Megatron divides by the number of tokens."""
    from slime.utils.types import Sample as SlimesSample

    torch.manual_seed(0)
    lengths = torch.randint(1, 9, (12,)).tolist()
    made = samples(SlimesSample)
    for sample, length in zip(made, lengths, strict=True):
        sample.response_length = length
    raw, advantages = slime.post_process_rewards(arguments(), made)
    if fault:
        advantages = group_relative_advantage(torch.tensor(raw), torch.arange(12) // 4).advantage.tolist()
    old = [torch.randn(length) for length in lengths]
    new = [(values + 0.3 * torch.randn_like(values)).requires_grad_() for values in old]
    args = arguments(
        use_rollout_logprobs=False,
        kl_coef=0.0,
        recompute_loss_function=False,
        allgather_cp=False,
        use_opsm=False,
        eps_clip=0.2,
        eps_clip_high=0.2,
        eps_clip_c=3.0,
        get_mismatch_metrics=False,
        use_tis=False,
        entropy_coef=0.0,
        use_kl_loss=False,
        rollout_top_p=1.0,
    )
    losses, tokens = [], []
    for rows in (range(0, 5), range(5, 12)):
        batch = {
            "rewards": [advantages[i] for i in rows],
            "log_probs": [old[i] for i in rows],
            "response_lengths": [lengths[i] for i in rows],
            "total_lengths": [lengths[i] + 1 for i in rows],
            "loss_masks": [torch.ones(lengths[i]) for i in rows],
            "rollout_mask_sums": [lengths[i] for i in rows],
            "unconcat_tokens": [torch.zeros(lengths[i] + 1, dtype=torch.long) for i in rows],
        }
        slimes_loss.compute_advantages_and_returns(args, batch)
        current = {"log_probs": [new[i] for i in rows], "entropy": [torch.zeros(lengths[i]) for i in rows]}
        monkeypatch.setattr(
            slimes_loss, "get_log_probs_and_entropy", lambda *_, current=current, **__: (None, dict(current))
        )
        loss, count, _ = slimes_loss.loss_function(args, batch, 2, 12, torch.zeros(1, 1, 1))
        losses.append(loss)
        tokens.append(count)
    (sum(losses) / sum(tokens)).backward()
    found = torch.cat([values.grad for values in new])

    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(-1)
    padded = [torch.nn.utils.rnn.pad_sequence(values, batch_first=True).detach() for values in (new, old)]
    padded[0].requires_grad_()
    plain = group_relative_advantage(torch.tensor(REWARDS), torch.arange(12) // 4).advantage
    hpo_loss(padded[0], padded[1], plain.unsqueeze(-1).expand_as(mask), mask, alpha=3 / 5).backward()
    expected = padded[0].grad[mask]
    error = float((found - expected).norm() / expected.norm())
    assert error > 1e-2 if fault else error < 1e-6
