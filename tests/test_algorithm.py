"""The mathematics of HPO: every line of its algebra, every choice the paper leaves open, with numbers to check by hand.

The numbers come back in many tests, so here they are once. Rewards (1, 0, 0, 0) of one group have mean 1/4 and unbiased
standard deviation 1/2, so A = (1.5, −0.5, −0.5, −0.5), each divided by 1 + 2e-6.
"""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpo_plugin import algorithm, variants
from hpo_plugin.algorithm import (
    BatchStatistics,
    RewardError,
    SignCounts,
    adaptive_alpha,
    clipped_surrogate,
    count_signs,
    group_relative_advantage,
    hpo_loss,
    hysteretic_advantage,
    hysteretic_weights,
    response_signs,
)

CLIP = {"clip_low": 0.2, "clip_high": 0.2}


def counts(positive: int, negative: int, responses: int | None = None) -> SignCounts:
    total = positive + negative if responses is None else responses
    return SignCounts(*(torch.tensor(n) for n in (positive, negative, total)))


def random_batch(seed: int = 0, n: int = 12, t: int = 7, dtype: torch.dtype = torch.float64):
    """log_prob, old_log_prob, advantages (equal over a row) and mask, with ratios on both sides of every clip."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(n, t, generator=generator, dtype=dtype)
    log_prob = old + 0.8 * torch.randn(n, t, generator=generator, dtype=dtype)
    advantages = torch.randn(n, 1, generator=generator, dtype=dtype).expand(n, t).clone()
    lengths = torch.randint(1, t + 1, (n, 1), generator=generator)
    mask = torch.arange(t) < lengths
    return log_prob, old, advantages * mask, mask


@pytest.fixture(scope="module")
def verl_core():
    from verl.trainer.ppo import core_algos

    return core_algos


def verl_vanilla(core, log_prob, old, advantages, mask, loss_agg_mode="token-mean"):
    from verl.workers.config import FSDPActorConfig

    config = FSDPActorConfig(rollout_n=8, ppo_micro_batch_size_per_gpu=1)
    return core.compute_policy_loss_vanilla(old, log_prob, advantages, mask, loss_agg_mode, config)


# Group-relative advantage ---------------------------------------------------------------------------------------------


def test_advantage_is_reward_minus_group_mean_over_unbiased_std_plus_epsilon():
    result = group_relative_advantage(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4, dtype=torch.long))
    expected = torch.tensor([0.75, -0.25, -0.25, -0.25]) / (0.5 + 1e-6)
    torch.testing.assert_close(result.advantage, expected)
    assert not result.degenerate.any()


def test_without_std_normalization_advantage_is_reward_minus_group_mean():
    result = group_relative_advantage(
        torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4, dtype=torch.long), normalize_by_std=False
    )
    assert result.advantage.tolist() == [0.75, -0.25, -0.25, -0.25]


def test_groups_may_come_in_any_order():
    rewards = torch.tensor([1.0, 5.0, 0.0, 9.0, 0.0, 0.0])
    groups = torch.tensor([3, 0, 3, 0, 3, 3])
    result = group_relative_advantage(rewards, groups, normalize_by_std=False)
    assert result.advantage.tolist() == [0.75, -2.0, -0.25, 2.0, -0.25, -0.25]


@pytest.mark.parametrize("normalize", [True, False])
def test_advantage_equals_verls_grpo_where_no_group_is_degenerate(verl_core, normalize):
    rewards = torch.tensor([1.0, 0.25, 0.0, 2.0, -1.0, 0.5, 0.75, 3.0])
    groups = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    tokens = torch.zeros(8, 3)
    tokens[:, -1] = rewards
    theirs, _ = verl_core.compute_grpo_outcome_advantage(
        tokens, torch.ones(8, 3, dtype=torch.long), groups.numpy(), norm_adv_by_std_in_grpo=normalize
    )
    ours = group_relative_advantage(rewards, groups, normalize_by_std=normalize).advantage
    torch.testing.assert_close(ours, theirs[:, 0])


@pytest.mark.parametrize(("size", "noise"), [(8, -0.0074), (12, -0.0147)])
def test_degenerate_groups_are_exactly_zero_where_verls_grpo_makes_signs_out_of_rounding(verl_core, size, noise):
    rewards = torch.full((size,), 0.1)
    result = group_relative_advantage(rewards, torch.zeros(size, dtype=torch.long))
    assert (result.advantage == 0).all()
    assert result.degenerate.all()

    tokens = torch.zeros(size, 2)
    tokens[:, -1] = rewards
    theirs, _ = verl_core.compute_grpo_outcome_advantage(
        tokens, torch.ones(size, 2, dtype=torch.long), torch.zeros(size).numpy()
    )
    torch.testing.assert_close(theirs, torch.full((size, 2), noise), atol=5e-5, rtol=0)


@given(
    reward=st.floats(-1e6, 1e6, width=32),
    size=st.integers(1, 64),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    normalize=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_equal_rewards_give_exactly_zero_whatever_they_are(reward, size, dtype, normalize):
    rewards = torch.full((size,), max(-6e4, min(6e4, reward))).to(dtype)
    result = group_relative_advantage(rewards, torch.zeros(size, dtype=torch.long), normalize_by_std=normalize)
    assert (result.advantage == 0).all()
    assert result.degenerate.all()


ONE_GROUP = torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(("one", "parts"), [(0.8, [0.1] * 8), (0.3, [0.1] * 3), (1.0, [0.001] * 1000)])
def test_rewards_that_are_equal_but_for_the_rounding_of_a_sum_over_tokens_are_equal(one, parts):
    rewards = torch.stack([torch.tensor(one), torch.tensor(parts).sum()])
    result = group_relative_advantage(rewards, ONE_GROUP)
    assert result.advantage.tolist() == [0.0, 0.0]
    assert result.degenerate.all()


@given(st.floats(0.125, 1024, width=32), st.integers(1, 2048), st.integers(1, 2048))
@settings(max_examples=200, deadline=None)
def test_a_reward_divided_over_any_number_of_tokens_is_the_same_reward(reward, one, other):
    rewards = torch.stack([torch.full((n,), reward / n).sum() for n in (one, other)])
    assert group_relative_advantage(rewards, ONE_GROUP).degenerate.all()


def test_two_rewards_that_differ_by_a_ten_thousandth_are_a_signal_and_counted():
    result = group_relative_advantage(torch.tensor([1.0, 1.0001]), ONE_GROUP)
    assert result.advantage.sign().tolist() == [-1, 1]
    assert not result.degenerate.any()
    assert [int(n) for n in count_signs(result.advantage)] == [1, 1, 2]


def test_a_reward_equal_to_the_mean_of_its_group_up_to_rounding_is_counted_in_neither_share():
    """0.2 is the mean of 0.1, 0.2, 0.3, but not of the three fp32 numbers."""
    result = group_relative_advantage(torch.tensor([0.1, 0.2, 0.3]), torch.zeros(3, dtype=torch.long))
    assert result.advantage.sign().tolist() == [-1, 0, 1]
    assert not result.degenerate.any()
    assert [int(n) for n in count_signs(result.advantage)] == [1, 1, 3]


def test_the_scale_of_rounding_is_that_of_the_tokens_where_large_rewards_cancel():
    """1e6 − 1e6 + 0.1 is known to ±0.06 in fp32: next to it, 0.1 is not a signal; of two small numbers it is."""
    rewards = torch.tensor([0.1, 0.0])
    assert group_relative_advantage(rewards, ONE_GROUP, magnitude=torch.tensor([2e6, 2e6])).degenerate.all()
    assert not group_relative_advantage(rewards, ONE_GROUP, magnitude=torch.tensor([0.1, 0.0])).degenerate.any()


def test_a_group_of_one_is_degenerate_and_gets_zero():
    result = group_relative_advantage(torch.tensor([7.0, 1.0, 0.0]), torch.tensor([0, 1, 1]), normalize_by_std=False)
    assert result.advantage.tolist() == [0.0, 0.5, -0.5]
    assert result.degenerate.tolist() == [True, False, False]


def test_rows_that_are_not_valid_enter_no_mean_and_get_zero():
    rewards = torch.tensor([1.0, 0.0, 100.0, 0.0, 0.0])
    valid = torch.tensor([True, True, False, True, True])
    result = group_relative_advantage(rewards, torch.zeros(5, dtype=torch.long), valid=valid, normalize_by_std=False)
    assert result.advantage.tolist() == [0.75, -0.25, 0.0, -0.25, -0.25]
    assert not result.degenerate.any()


def test_a_group_whose_only_valid_rewards_are_equal_is_degenerate_in_its_valid_rows():
    result = group_relative_advantage(
        torch.tensor([0.1, 0.1, 9.0]), torch.zeros(3, dtype=torch.long), valid=torch.tensor([True, True, False])
    )
    assert result.degenerate.tolist() == [True, True, False]
    assert result.advantage.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_refused_and_its_rows_are_named(bad):
    rewards = torch.tensor([1.0, bad, 0.0, bad, math.nan])
    valid = torch.tensor([True, True, True, True, False])
    with pytest.raises(RewardError, match=rf"2 of 5 are NaN or infinite, rows \[1, 3\], first value {bad}") as refused:
        group_relative_advantage(rewards, torch.zeros(5, dtype=torch.long), valid=valid)
    assert refused.value.rows == [1, 3]
    assert isinstance(refused.value, ValueError)


def test_of_many_rewards_that_are_not_finite_the_message_names_eight_rows_and_the_error_has_all():
    with pytest.raises(RewardError, match=r"rows \[0, 1, 2, 3, 4, 5, 6, 7\] …") as refused:
        group_relative_advantage(torch.full((9,), math.nan), torch.zeros(9, dtype=torch.long))
    assert refused.value.rows == list(range(9))


def test_a_reward_that_is_not_finite_in_a_row_that_is_not_valid_is_of_no_consequence():
    rewards = torch.tensor([1.0, math.nan, 0.0])
    valid = torch.tensor([True, False, True])
    result = group_relative_advantage(rewards, torch.zeros(3, dtype=torch.long), valid=valid, normalize_by_std=False)
    assert result.advantage.tolist() == [0.5, 0.0, -0.5]


@pytest.mark.parametrize("value", [1.001e12, 1e30, -3e38])
def test_a_reward_that_is_too_large_is_refused_for_its_square_would_be_infinite_in_fp32(value):
    rewards = torch.tensor([0.0, value, 1.0, math.nan])
    valid = torch.tensor([True, True, True, False])
    with pytest.raises(RewardError, match=r"at most 1e\+12 in magnitude.*1 of 4 are larger or not finite, rows \[1\]"):
        group_relative_advantage(rewards, torch.zeros(4, dtype=torch.long), valid=valid)
    assert group_relative_advantage(torch.tensor([1e12, 0.0]), ONE_GROUP).advantage.tolist() == pytest.approx(
        [2**-0.5, -(2**-0.5)]
    )


def test_tokens_that_are_too_large_are_refused_even_if_they_cancel():
    with pytest.raises(RewardError, match=r"summed over the tokens of a response: 1 of 2 .*rows \[0\]"):
        group_relative_advantage(torch.tensor([0.0, 1.0]), ONE_GROUP, magnitude=torch.tensor([math.inf, 1.0]))


@pytest.mark.parametrize("groups", [[0, 2], [0, -1], [0.0, 1.0], [True, False]])
def test_a_group_number_that_is_no_integer_from_0_to_n_is_refused(groups):
    with pytest.raises(ValueError, match=r"groups must be int64 in \[0, N\), N = 2"):
        group_relative_advantage(torch.tensor([1.0, 0.0]), torch.tensor(groups))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.uint8])
def test_valid_is_bool_or_a_number(dtype):
    valid = (torch.tensor([1, 0, 1]) * (1 if dtype == torch.bool else 2)).to(dtype)
    result = hysteretic_advantage(
        torch.tensor([1.0, 5.0, 0.0]), torch.zeros(3, dtype=torch.long), adaptive, valid=valid, normalize_by_std=False
    )
    assert result.weighted.tolist() == [0.5, 0.0, -0.5]
    assert [int(n) for n in result.counts] == [int(n) for n in count_signs(result.advantage, valid)] == [1, 1, 2]


def test_advantages_have_no_gradient():
    """The gradient of the standard deviation of equal rewards is infinite."""
    rewards = torch.tensor([1.0, 1.0], requires_grad=True)
    assert not group_relative_advantage(rewards, ONE_GROUP).advantage.requires_grad
    base = torch.tensor([1.0, -1.0], requires_grad=True)
    assert not hysteretic_advantage(rewards, ONE_GROUP, adaptive, base=base).weighted.requires_grad


def test_shapes_that_differ_are_refused_and_named():
    with pytest.raises(ValueError, match=r"\(3,\), \(2,\)"):
        group_relative_advantage(torch.zeros(3), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.float32])
def test_rewards_of_any_dtype_give_the_fp32_advantage_of_their_values(dtype):
    rewards = torch.tensor([3, 1, 0, 0, 2, 2]).to(dtype)
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    result = group_relative_advantage(rewards, groups).advantage
    assert result.dtype == torch.float32
    assert torch.equal(result, group_relative_advantage(rewards.double(), groups).advantage.float())


def test_fp64_rewards_stay_fp64():
    result = group_relative_advantage(torch.tensor([1.0, 0.0], dtype=torch.float64), torch.zeros(2, dtype=torch.long))
    assert result.advantage.dtype == torch.float64


@st.composite
def grouped_rewards(draw):
    n = draw(st.integers(1, 24))
    rewards = draw(st.lists(st.integers(-8, 8).map(lambda k: k / 4), min_size=n, max_size=n))
    groups = draw(st.lists(st.integers(0, min(n - 1, 4)), min_size=n, max_size=n))
    valid = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    return rewards, groups, valid


@given(grouped_rewards(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_advantage_equals_a_loop_over_groups(batch, normalize):
    rewards, groups, valid = batch
    expected = [0.0] * len(rewards)
    for group in set(groups):
        rows = [i for i, g in enumerate(groups) if g == group and valid[i]]
        values = [rewards[i] for i in rows]
        if len(set(values)) < 2:
            continue
        scale = statistics.stdev(values) + 1e-6 if normalize else 1.0
        for i in rows:
            expected[i] = (rewards[i] - statistics.fmean(values)) / scale
    result = group_relative_advantage(
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(groups),
        valid=torch.tensor(valid),
        normalize_by_std=normalize,
    )
    assert result.advantage.tolist() == pytest.approx(expected, abs=1e-12)


# Signs and α ----------------------------------------------------------------------------------------------------------


def test_a_response_has_the_sign_of_the_masked_sum_of_its_token_advantages():
    advantages = torch.tensor([[2.0, -1.0, -5.0], [-2.0, 1.0, 5.0], [1.0, -1.0, 9.0], [0.5, 0.5, 0.5]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 0], [0, 0, 0]])
    assert response_signs(advantages, mask).tolist() == [1.0, -1.0, 0.0, 0.0]


def test_responses_with_zero_advantage_are_in_neither_share_and_have_weight_one():
    signs = torch.tensor([1.0, 0.0, -1.0, 0.0])
    counted = count_signs(signs)
    assert [int(c) for c in counted] == [1, 1, 4]
    assert (counted.share_positive().item(), counted.share_negative().item()) == (0.25, 0.25)
    assert hysteretic_weights(signs, 0.6).tolist() == pytest.approx([1.0, 1.0, 0.6, 1.0])


def test_rows_that_are_not_valid_are_counted_nowhere():
    signs = torch.tensor([1.0, -1.0, -1.0, 0.0])
    assert [int(c) for c in count_signs(signs, torch.tensor([True, True, False, False]))] == [1, 1, 2]


def test_shares_of_an_empty_batch_are_zero():
    empty = count_signs(torch.zeros(0))
    assert (empty.share_positive().item(), empty.share_negative().item()) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("positive", "negative", "alpha_min", "alpha"),
    [
        pytest.param(2, 6, 0.1, 1 / 3, id="the ratio of the shares"),
        pytest.param(6, 2, 0.1, 1.0, id="never above 1"),
        pytest.param(4, 4, 0.1, 1.0, id="as many of each"),
        pytest.param(1, 63, 0.1, 0.1, id="never below alpha_min"),
        pytest.param(1, 7, 0.1, 1 / 7, id="a lone success in a group of 8 stays above alpha_min"),
        pytest.param(3, 0, 0.1, 1.0, id="no negatives: nothing to damp"),
        pytest.param(0, 0, 0.1, 1.0, id="no signs at all: nothing to damp"),
        pytest.param(0, 5, 0.1, 0.1, id="no positives: the limit of the ratio"),
        pytest.param(0, 5, 0.0, 0.0, id="alpha_min 0 lets alpha reach 0"),
        pytest.param(1, 7, 1.0, 1.0, id="alpha_min 1 is alpha 1"),
    ],
)
def test_adaptive_alpha(positive, negative, alpha_min, alpha):
    assert adaptive_alpha(counts(positive, negative), alpha_min).item() == pytest.approx(alpha)


def test_adaptive_alpha_does_not_depend_on_how_many_responses_have_zero_advantage():
    assert adaptive_alpha(counts(2, 6), 0.1) == adaptive_alpha(counts(2, 6, 1000), 0.1)


@given(st.integers(0, 10_000), st.integers(0, 10_000), st.floats(0, 1))
@settings(deadline=None)
def test_adaptive_alpha_stays_between_alpha_min_and_one(positive, negative, alpha_min):
    alpha = adaptive_alpha(counts(positive, negative), alpha_min).item()
    assert alpha_min - 1e-7 <= alpha <= 1.0


def test_alpha_of_the_batch_is_that_of_the_added_counts_and_of_no_part():
    signs = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0, -1.0])
    parts = [count_signs(signs[:4]), count_signs(signs[4:])]
    added = SignCounts(*(sum(fields) for fields in zip(*parts, strict=True)))
    assert adaptive_alpha(added, 0.1).item() == pytest.approx(3 / 5)
    assert adaptive_alpha(count_signs(signs), 0.1) == adaptive_alpha(added, 0.1)
    assert [adaptive_alpha(part, 0.1).item() for part in parts] == pytest.approx([1.0, 0.1])


def test_weight_is_one_for_positive_and_alpha_for_negative_responses():
    alpha = adaptive_alpha(counts(2, 6), 0.1)
    weights = hysteretic_weights(torch.tensor([1.0, -1.0, 0.0]), alpha)
    assert weights.tolist() == pytest.approx([1.0, 1 / 3, 1.0])


# The clipped surrogate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped", "dual_clipped"),
    [
        pytest.param(1.0, 1.0, -1.0, False, False, id="on policy, positive"),
        pytest.param(1.0, -1.0, 1.0, False, False, id="on policy, negative"),
        pytest.param(1.5, 1.0, -1.2, True, False, id="positive gains no more above 1 + eps"),
        pytest.param(0.5, 1.0, -0.5, False, False, id="positive is not clipped below"),
        pytest.param(0.5, -1.0, 0.8, True, False, id="negative gains no more below 1 - eps"),
        pytest.param(1.5, -1.0, 1.5, False, False, id="negative is not clipped above"),
        pytest.param(5.0, -1.0, 3.0, False, True, id="dual clip: a negative costs at most c times its size"),
        pytest.param(5.0, 1.0, -1.2, True, False, id="dual clip leaves positives alone"),
        pytest.param(5.0, 0.0, 0.0, False, False, id="zero advantage costs nothing"),
    ],
)
def test_clipped_surrogate(ratio, advantage, loss, clipped, dual_clipped):
    log_prob, old = torch.tensor([[math.log(ratio)]]), torch.zeros(1, 1)
    result = clipped_surrogate(log_prob, old, torch.tensor([[advantage]]), clip_dual=3.0, **CLIP)
    assert result.loss.item() == pytest.approx(loss)
    assert (result.clipped.item(), result.dual_clipped.item()) == (clipped, dual_clipped)
    assert result.log_ratio.item() == pytest.approx(math.log(ratio))


def test_without_dual_clip_a_negative_costs_its_whole_ratio():
    log_prob = torch.tensor([[math.log(5.0)]])
    result = clipped_surrogate(log_prob, torch.zeros(1, 1), torch.tensor([[-1.0]]), clip_dual=None, **CLIP)
    assert result.loss.item() == pytest.approx(5.0)
    assert not result.dual_clipped.item()


def test_log_ratio_is_clamped_so_that_the_loss_stays_finite():
    result = clipped_surrogate(
        torch.tensor([[500.0]]), torch.zeros(1, 1), torch.tensor([[-1.0]]), clip_dual=None, **CLIP
    )
    assert result.loss.item() == pytest.approx(math.exp(20.0), rel=1e-6)


@given(
    weight=st.floats(0, 4),
    advantage=st.floats(-3, 3),
    log_ratio=st.floats(-3, 3),
    clip_dual=st.sampled_from([None, 1.5, 3.0]),
)
@settings(max_examples=100, deadline=None)
def test_surrogate_is_positively_homogeneous_in_the_advantage(weight, advantage, log_ratio, clip_dual):
    log_prob = torch.tensor([[log_ratio]], dtype=torch.float64)
    a = torch.tensor([[advantage]], dtype=torch.float64)

    def loss(x):
        return clipped_surrogate(log_prob, torch.zeros_like(log_prob), x, clip_dual=clip_dual, **CLIP).loss.item()

    assert loss(weight * a) == pytest.approx(weight * loss(a), rel=1e-12, abs=1e-300)


# The loss -------------------------------------------------------------------------------------------------------------


def two_responses():
    """On policy: A = 1.5 with 1 token, A = −0.5 with 3 tokens; N = 2, L̄ = 2."""
    advantages = torch.tensor([[1.5, 0.0, 0.0], [-0.5, -0.5, -0.5]])
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    return torch.zeros(2, 3), torch.zeros(2, 3), advantages, mask


@pytest.mark.parametrize(("alpha", "objective"), [(1.0, 0.0), (0.6, 0.15), (0.0, 0.375)])
def test_objective_worked_out_by_hand(alpha, objective):
    """J = 1/2 · (1/2 · 1.5 + 1/2 · 3 · α · (−0.5)) = (1.5 − 1.5 α) / 4."""
    assert hpo_loss(*two_responses(), alpha=alpha).item() == pytest.approx(-objective)


def test_mean_length_normalization_is_a_mean_over_tokens_because_n_times_mean_length_is_the_tokens():
    log_prob, old, advantages, mask = random_batch()
    lengths = mask.sum(dim=1).double()
    surrogate = clipped_surrogate(log_prob, old, advantages, **CLIP).loss * mask
    assert len(lengths) * lengths.mean() == mask.sum()
    paper = (surrogate.sum(dim=1) / lengths.mean()).mean()
    assert hpo_loss(log_prob, old, advantages, mask, alpha=1.0).item() == pytest.approx(paper.item(), rel=1e-12)


def test_grpo_as_the_paper_means_it_divides_by_each_responses_own_length_and_is_another_number(verl_core):
    """By own length: −(1.5 − 0.5) / 2 = −0.5. By mean length (or by tokens): −(1.5 − 3 · 0.5) / 4 = 0."""
    batch = two_responses()
    assert verl_vanilla(verl_core, *batch, loss_agg_mode="seq-mean-token-mean")[0].item() == pytest.approx(-0.5)
    assert hpo_loss(*batch, alpha=1.0).item() == 0.0


def test_alpha_one_is_token_mean_grpo_in_value_and_gradient(verl_core):
    log_prob, old, advantages, mask = random_batch(dtype=torch.float32)
    ours, theirs = log_prob.clone().requires_grad_(), log_prob.clone().requires_grad_()
    loss = hpo_loss(ours, old, advantages, mask, alpha=1.0)
    expected = verl_vanilla(verl_core, theirs, old, advantages, mask)[0]
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert ours.grad.abs().max() > 0


def test_alpha_zero_is_positive_only_negatives_get_a_gradient_of_exactly_zero():
    log_prob, old, advantages, mask = random_batch()
    log_prob.requires_grad_()
    hpo_loss(log_prob, old, advantages, mask, alpha=0.0).backward()
    negative = advantages.sum(dim=1) < 0
    assert negative.any()
    assert (log_prob.grad[negative] == 0).all()
    assert (log_prob.grad[~negative] != 0).any()


def test_gradient_of_negatives_is_linear_in_alpha_and_that_of_positives_does_not_change():
    gradients = {}
    for alpha in (0.3, 0.6):
        log_prob, old, advantages, mask = random_batch()
        log_prob.requires_grad_()
        hpo_loss(log_prob, old, advantages, mask, alpha=alpha).backward()
        gradients[alpha] = log_prob.grad
    negative = advantages.sum(dim=1) < 0
    torch.testing.assert_close(gradients[0.6][negative], 2 * gradients[0.3][negative])
    assert torch.equal(gradients[0.6][~negative], gradients[0.3][~negative])


@pytest.mark.parametrize("clip_dual", [3.0, None])
def test_a_weight_on_the_loss_equals_the_same_weight_on_the_advantage_in_value_and_gradient(clip_dual):
    log_prob, old, advantages, mask = random_batch()
    by_loss, by_advantage = log_prob.clone().requires_grad_(), log_prob.clone().requires_grad_()
    weights = hysteretic_weights(response_signs(advantages, mask), 0.6).unsqueeze(-1)
    loss = hpo_loss(by_loss, old, advantages, mask, alpha=0.6, clip_dual=clip_dual)
    expected = hpo_loss(by_advantage, old, advantages * weights, mask, alpha=1.0, clip_dual=clip_dual)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(by_loss.grad, by_advantage.grad)


def test_per_token_advantages_are_weighted_by_the_sign_of_their_response():
    """Masked sum 1 > 0: the negative token keeps weight 1. Loss = −(2 − 1) / 2."""
    advantages, mask = torch.tensor([[2.0, -1.0]]), torch.ones(1, 2)
    assert hpo_loss(torch.zeros(1, 2), torch.zeros(1, 2), advantages, mask, alpha=0.0).item() == -0.5
    assert hpo_loss(torch.zeros(1, 2), torch.zeros(1, 2), -advantages, mask, alpha=0.0).item() == 0.0


def test_loss_and_gradient_do_not_depend_on_the_order_of_the_rows():
    log_prob, old, advantages, mask = random_batch()
    order = torch.randperm(len(log_prob), generator=torch.Generator().manual_seed(1))
    first, second = log_prob.clone().requires_grad_(), log_prob[order].clone().requires_grad_()
    loss = hpo_loss(first, old, advantages, mask, alpha=0.6)
    permuted = hpo_loss(second, old[order], advantages[order], mask[order], alpha=0.6)
    torch.testing.assert_close(loss, permuted)
    loss.backward()
    permuted.backward()
    torch.testing.assert_close(first.grad[order], second.grad)


def test_padding_rows_and_padding_columns_change_nothing():
    batch = random_batch()
    plain = hpo_loss(*batch, alpha=0.6)
    padded = [
        torch.nn.functional.pad(x.double(), (0, 3, 0, 5), value=fill)
        for x, fill in zip(batch, (9, -9, 5, 0), strict=True)
    ]
    torch.testing.assert_close(hpo_loss(*padded, alpha=0.6), plain)


@pytest.mark.parametrize("size", [1, 5, 12])
def test_loss_is_the_token_weighted_sum_of_micro_batches_when_alpha_is_that_of_the_whole_batch(size):
    log_prob, old, advantages, mask = random_batch()
    alpha = adaptive_alpha(count_signs(response_signs(advantages, mask)), 0.1)
    whole = hpo_loss(log_prob, old, advantages, mask, alpha=alpha)
    parts = zip(*(x.split(size) for x in (log_prob, old, advantages, mask)), strict=True)
    total = sum(hpo_loss(*part, alpha=alpha) * part[3].sum() for part in parts) / mask.sum()
    torch.testing.assert_close(total, whole)


def test_alpha_of_each_micro_batch_would_be_another_loss():
    """What a naive policy loss does: with one row a micro-batch, its α is 1 or α_min, never the batch's."""
    log_prob, old, advantages, mask = random_batch()
    signs = response_signs(advantages, mask)
    alpha = adaptive_alpha(count_signs(signs), 0.1)
    assert 0.1 < alpha < 1
    naive = sum(
        hpo_loss(*rows, alpha=adaptive_alpha(count_signs(response_signs(rows[2], rows[3])), 0.1)) * rows[3].sum()
        for rows in zip(*(x.split(1) for x in (log_prob, old, advantages, mask)), strict=True)
    )
    whole = hpo_loss(log_prob, old, advantages, mask, alpha=alpha)
    assert abs(naive / mask.sum() - whole) > 1e-2


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_values_outside_of_the_mask_reach_neither_loss_nor_gradient(garbage):
    inputs = random_batch()
    mask = inputs[3]
    results = []
    for fill in (0.0, garbage):
        log_prob, old, advantages = (x.masked_fill(~mask, fill) for x in inputs[:3])
        log_prob.requires_grad_()
        loss = hpo_loss(log_prob, old, advantages, mask, alpha=0.6)
        loss.backward()
        results.append((loss, log_prob.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("shape", [(3,), (3, 1), (2, 3)])
def test_an_input_of_the_loss_with_another_shape_is_refused(at, shape):
    """(3,) would broadcast over the rows of (3, 3)."""
    inputs = [torch.ones(3, 3) for _ in range(4)]
    inputs[at] = torch.ones(shape)
    with pytest.raises(ValueError, match=r"must be \(N, T\)"):
        hpo_loss(*inputs, alpha=0.6)


def test_nested_inputs_of_the_loss_are_refused():
    nested = torch.nested.as_nested_tensor([torch.zeros(1), torch.zeros(3)], layout=torch.jagged)
    with pytest.raises(ValueError, match=r"must be \(N, T\)"):
        hpo_loss(nested, nested, nested, nested + 1, alpha=0.6)


def test_a_valid_of_another_shape_is_not_counted():
    with pytest.raises(ValueError, match=r"must be \(N,\): got \(2,\) and \(2, 1\)"):
        count_signs(torch.tensor([1.0, -1.0]), torch.ones(2, 1))


def test_a_batch_without_tokens_has_loss_zero():
    zeros = torch.zeros(2, 3)
    assert hpo_loss(zeros, zeros, zeros, zeros, alpha=0.6).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_fp32(dtype):
    """In bf16 4096 tokens of 0.1 would add up to 32: adding 0.1 no longer changes the running total."""
    log_prob = torch.zeros(2, 2048, dtype=dtype, requires_grad=True)
    old, advantages = torch.zeros(2, 2048, dtype=dtype), torch.full((2, 2048), -0.1, dtype=dtype)
    loss = hpo_loss(log_prob, old, advantages, torch.ones(2, 2048, dtype=torch.bool), alpha=1.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-advantages[0, 0].float().item(), rel=1e-6)
    assert response_signs(advantages, torch.ones(2, 2048)).dtype == torch.float32


def test_gradient_equals_finite_differences():
    generator = torch.Generator().manual_seed(3)
    old = -torch.rand(4, 3, generator=generator, dtype=torch.float64)
    # Ratios 0.5, 0.9, 1.1, 1.5, 4: no closer than 0.1 to a kink at 0.8, 1.2, 3.
    ratios = torch.tensor([[0.5, 0.9, 1.1], [1.5, 4.0, 0.5], [0.9, 1.1, 1.5], [4.0, 0.5, 0.9]], dtype=torch.float64)
    advantages = torch.tensor([[1.0], [-1.0], [-2.0], [0.5]], dtype=torch.float64).expand(4, 3)
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]])
    log_prob = (old + ratios.log()).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: hpo_loss(x, old, advantages, mask, alpha=0.6), (log_prob,))


def reference_objective(log_prob, old, advantages, mask, alpha, low, high, dual):
    """J as the paper writes it, with loops and Python floats; rows without tokens are no responses."""
    rows = [i for i in range(len(mask)) if any(mask[i])]
    mean_length = sum(sum(mask[i]) for i in rows) / len(rows)
    objective = 0.0
    for i in rows:
        tokens = [t for t in range(len(mask[i])) if mask[i][t]]
        weight = alpha if sum(advantages[i][t] for t in tokens) < 0 else 1.0
        for t in tokens:
            ratio, a = math.exp(log_prob[i][t] - old[i][t]), advantages[i][t]
            value = min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
            if a < 0 and dual is not None:
                value = max(value, dual * a)
            objective += weight * value / mean_length
    return objective / len(rows)


@st.composite
def loss_batches(draw):
    n, t = draw(st.integers(1, 5)), draw(st.integers(1, 5))

    def matrix(elements):
        return draw(st.lists(st.lists(elements, min_size=t, max_size=t), min_size=n, max_size=n))

    mask = matrix(st.integers(0, 1))
    mask[draw(st.integers(0, n - 1))][draw(st.integers(0, t - 1))] = 1
    # Quarters add up exactly, so the sign of a sum does not depend on the order of addition.
    advantages = matrix(st.integers(-8, 8).map(lambda k: k / 4))
    return matrix(st.floats(-3, 0)), matrix(st.floats(-3, 0)), advantages, mask


@given(loss_batches(), st.floats(0, 1), st.floats(0, 0.5), st.floats(0, 0.5), st.sampled_from([None, 1.5, 3.0]))
@settings(max_examples=60, deadline=None)
def test_loss_equals_the_papers_formula_written_with_loops(batch, alpha, low, high, dual):
    tensors = [torch.tensor(x, dtype=torch.float64) for x in batch]
    loss = hpo_loss(*tensors, alpha=alpha, clip_low=low, clip_high=high, clip_dual=dual).item()
    assert loss == pytest.approx(-reference_objective(*batch, alpha, low, high, dual), rel=1e-9, abs=1e-12)


# From rewards to weighted advantages ----------------------------------------------------------------------------------

REWARDS = torch.tensor([1.0, 0, 0, 0, 0.5, 0.5, 9.0])
GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 2])
VALID = torch.tensor([True] * 6 + [False])
LENGTHS = torch.tensor([1, 3, 2, 2, 4, 4, 5])
"""One success of four, a group without a signal, a padding row: 1 positive, 3 negatives, α = 1/3, 16 tokens."""


def adaptive(counts: SignCounts) -> torch.Tensor:
    return adaptive_alpha(counts, 0.1)


def test_weighted_advantages_alpha_and_statistics_worked_out_by_hand():
    result = hysteretic_advantage(
        REWARDS, GROUPS, adaptive, valid=VALID, lengths=LENGTHS, normalize_by_std=False, magnitude=REWARDS
    )
    assert result.advantage.tolist() == [0.75, -0.25, -0.25, -0.25, 0, 0, 0]
    torch.testing.assert_close(result.weighted, torch.tensor([0.75] + [-0.25 / 3] * 3 + [0.0] * 3))
    assert result.alpha.item() == pytest.approx(1 / 3)
    assert [int(n) for n in result.counts] == [1, 3, 6]
    assert result.statistics == pytest.approx(
        BatchStatistics(
            alpha=1 / 3,
            positive=1,
            negative=3,
            responses=6,
            groups=2,
            degenerate_groups=1,
            tokens=16,
            abs_advantage_positive=0.75,
            abs_advantage_negative=7 * 0.25 / 3,
        )
    )


def test_the_rule_gets_the_counts_of_the_batch_and_its_alpha_is_applied():
    seen = []
    result = hysteretic_advantage(REWARDS, GROUPS, lambda counts: seen.append(counts) or 0.25, valid=VALID)
    assert [int(n) for n in seen[0]] == [1, 3, 6]
    torch.testing.assert_close(result.weighted, result.advantage * torch.tensor([1.0] + [0.25] * 3 + [1.0] * 3))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_a_rule_that_gives_an_alpha_outside_of_0_to_1_is_refused(alpha):
    with pytest.raises(ValueError, match=r"which is not in \[0, 1\]"):
        hysteretic_advantage(REWARDS, GROUPS, lambda counts: alpha)


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("per_token", [True, False])
def test_the_advantages_of_another_estimator_are_weighted_in_place_of_the_group_relative_ones(zero, per_token):
    """Signs of responses: +, −, −, + and, without exact zeros, − − of noise or of whitening."""
    base = torch.tensor([2.0, -1.0, -3.0, 1.0, -1e-8, -1e-8, 7.0])
    tokens = torch.tensor([[0.5, 0.5], [2.0, -1.0]])  # shares of two tokens, by sign
    given_base = base.unsqueeze(1) * tokens[(base < 0).long()] if per_token else base
    result = hysteretic_advantage(
        REWARDS, GROUPS, adaptive, valid=VALID, base=given_base, base_is_zero_without_signal=zero
    )
    alpha = 1.0 if zero else 2 / 4
    assert result.alpha.item() == pytest.approx(alpha)
    assert not result.weighted[6].any()
    assert result.weighted[4:6].any() == (not zero)
    expected = given_base[:4] * (
        torch.tensor([1, alpha, alpha, 1]).unsqueeze(1) if per_token else torch.tensor([1, alpha, alpha, 1])
    )
    torch.testing.assert_close(result.weighted[:4], expected)
    assert (result.statistics.groups, result.statistics.degenerate_groups) == ((2, 1) if zero else (0, 0))


def test_the_share_of_per_token_advantages_is_of_the_sum_of_their_sizes():
    """|3| + |−1| = 4 of a positive response, α (|−2| + |1|) = 1.5 of a negative one; lengths count tokens only."""
    base = torch.tensor([[3.0, -1.0], [-2.0, 1.0]])
    result = hysteretic_advantage(
        torch.tensor([1.0, 0.0]), ONE_GROUP, lambda counts: 0.5, base=base, lengths=torch.tensor([2, 5])
    )
    assert result.weighted.tolist() == [[3.0, -1.0], [-1.0, 0.5]]
    assert torch.equal(result.advantage, base)
    assert result.statistics == BatchStatistics(
        0.5, 1, 1, 2, 1, 0, tokens=7, abs_advantage_positive=4.0, abs_advantage_negative=1.5
    )


def test_without_lengths_a_response_has_one_token():
    """Masses 0.75 and 1/3 · 3 · 0.25 of six valid responses."""
    found = hysteretic_advantage(REWARDS, GROUPS, adaptive, valid=VALID, normalize_by_std=False).statistics
    assert (found.tokens, found.abs_advantage_positive, found.abs_advantage_negative) == pytest.approx((6, 0.75, 0.25))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("per_token", [True, False])
def test_a_base_advantage_that_is_not_finite_is_refused_unless_its_row_is_not_valid(bad, per_token):
    base = torch.tensor([2.0, -1.0, bad, 1.0, 0.0, 0.0, bad])
    base = torch.stack([base, torch.ones(7)], dim=1) if per_token else base
    with pytest.raises(ValueError, match=r"base estimator must be finite: 1 of 7 .* rows \[2\]"):
        hysteretic_advantage(REWARDS, GROUPS, adaptive, valid=VALID, base=base)


def test_a_base_in_half_precision_is_computed_in_fp32():
    """60,000 tokens of |A| = 2 in fp16 are more than its largest number."""
    base = torch.tensor([2.0, -2.0], dtype=torch.float16)
    result = hysteretic_advantage(
        torch.tensor([1.0, 0.0]), ONE_GROUP, lambda counts: 0.5, base=base, lengths=torch.full((2,), 6e4).half()
    )
    assert result.weighted.dtype == torch.float32
    assert result.statistics[6:] == pytest.approx((120_000, 120_000, 60_000), rel=1e-3)


def test_an_empty_batch_has_no_advantages_and_alpha_one():
    result = hysteretic_advantage(torch.zeros(0), torch.zeros(0, dtype=torch.long), adaptive)
    assert result.weighted.shape == (0,)
    assert result.statistics == BatchStatistics(1.0, *[0] * 8)


@pytest.mark.parametrize(
    "inputs",
    [
        {"base": torch.ones(1)},
        {"base": torch.ones(1, 3)},
        {"base": torch.ones(7, 1, 3)},
        {"lengths": torch.ones(7, 1)},
        {"lengths": torch.ones(1)},
        {"counted_rewards": torch.ones(6)},
        {"valid": torch.ones(6, dtype=torch.bool)},
    ],
    ids=lambda inputs: " ".join(f"{name} {tuple(x.shape)}" for name, x in inputs.items()),
)
def test_a_shape_that_does_not_fit_the_rewards_is_refused(inputs):
    with pytest.raises(ValueError, match=r"must be \(N,\)"):
        hysteretic_advantage(REWARDS, GROUPS, adaptive, **inputs)


def test_a_penalty_makes_no_response_of_an_all_wrong_group_count():
    """One success of four and four failures: 1 positive, 3 negatives by the scores; a KL penalty alone adds 2 and 2."""
    scores, groups = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0]), torch.tensor([0] * 4 + [1] * 4)
    rewards = scores - torch.tensor([0.01, 0.01, 0.01, 0.01, 0.01, 0.02, 0.03, 0.04])
    result = hysteretic_advantage(rewards, groups, adaptive, counted_rewards=scores)
    assert [int(n) for n in result.counts] == [1, 3, 8]
    assert (result.statistics.positive, result.statistics.negative) == (1, 3)
    assert result.alpha.item() == pytest.approx(1 / 3)
    mixed = hysteretic_advantage(rewards, groups, adaptive)
    assert [int(n) for n in mixed.counts] == [3, 5, 8]
    assert mixed.alpha.item() == pytest.approx(3 / 5)


def test_the_tasks_scores_are_counted_where_rewards_contain_a_penalty():
    """A penalty makes signs in the group without a signal; α is 1/3 by the scores, 2/4 by the rewards."""
    rewards = REWARDS - torch.tensor([0, 0, 0, 0, 0.01, 0.02, 0])
    by_scores = hysteretic_advantage(rewards, GROUPS, adaptive, valid=VALID, counted_rewards=REWARDS)
    mixed = hysteretic_advantage(rewards, GROUPS, adaptive, valid=VALID)
    assert (by_scores.alpha.item(), mixed.alpha.item()) == pytest.approx((1 / 3, 2 / 4))
    torch.testing.assert_close(by_scores.advantage, mixed.advantage)
    assert by_scores.weighted[5] == pytest.approx(by_scores.advantage[5].item() / 3)


@given(grouped_rewards(), st.integers(0, 5), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_neither_the_order_of_rows_nor_padding_rows_change_anything(batch, padding, seed):
    rewards, groups, valid = (torch.tensor(x) for x in batch)
    n, generator = len(rewards), torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (n,), generator=generator)
    whole = hysteretic_advantage(rewards, groups, adaptive, valid=valid, lengths=lengths)
    order = torch.randperm(n + padding, generator=generator)
    padded = [
        torch.cat([x, torch.full((padding,), fill, dtype=x.dtype)])[order]
        for x, fill in ((rewards, math.nan), (groups, 0), (valid, False), (lengths, 7))
    ]
    other = hysteretic_advantage(*padded[:2], adaptive, valid=padded[2], lengths=padded[3])
    expected = torch.cat([whole.weighted, torch.zeros(padding)])[order]
    torch.testing.assert_close(other.weighted, expected)
    assert other.alpha == whole.alpha
    assert other.statistics == pytest.approx(whole.statistics)


def test_neither_alpha_nor_the_statistics_of_a_batch_are_those_of_its_parts():
    """α of the parts is 1/3 and 1, of the whole 3/5: masses of negatives 0.75 / 3 + 1 = 1.25 and 3/5 · 1.75 = 1.05."""
    rewards, groups = torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 0]), torch.tensor([0] * 4 + [1] * 4)
    whole, *parts = (
        hysteretic_advantage(rewards[rows], groups[rows], adaptive, normalize_by_std=False)
        for rows in (slice(0, 8), slice(0, 4), slice(4, 8))
    )
    assert [part.alpha.item() for part in parts] == pytest.approx([1 / 3, 1])
    assert whole.alpha.item() == pytest.approx(3 / 5)
    total = SignCounts(*(sum(column) for column in zip(*(part.counts for part in parts), strict=True)))
    assert adaptive(total) == whole.alpha
    added = BatchStatistics(*(sum(column) for column in zip(*(part.statistics for part in parts), strict=True)))
    assert added[1:7] == whole.statistics[1:7]
    assert added.abs_advantage_positive == whole.statistics.abs_advantage_positive
    assert (added.abs_advantage_negative, whole.statistics.abs_advantage_negative) == pytest.approx((1.25, 1.05))


@pytest.mark.parametrize("clip_dual", [None, 3.0])
def test_the_loss_of_weighted_advantages_is_the_loss_of_the_paper_in_value_and_gradient(clip_dual):
    """Equal to 1e-6: weights on advantages, then the surrogate over all tokens, against ``hpo_loss``."""
    log_prob, old, _, mask = random_batch(n=7)
    result = hysteretic_advantage(REWARDS.double(), GROUPS, adaptive, valid=VALID)
    ours, theirs = log_prob.clone().requires_grad_(), log_prob.clone().requires_grad_()
    surrogate = clipped_surrogate(ours, old, result.weighted.unsqueeze(1), **CLIP, clip_dual=clip_dual)
    loss = torch.where(mask, surrogate.loss, 0).sum() / mask.sum()
    plain = result.advantage.unsqueeze(1).expand_as(mask)
    expected = hpo_loss(theirs, old, plain, mask, alpha=result.alpha.double(), clip_dual=clip_dual)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-12)
    assert ours.grad.abs().max() > 0


@pytest.mark.parametrize("module", [algorithm, variants])
def test_the_mathematics_imports_torch_alone(module):
    with open(module.__file__, encoding="utf-8") as source:
        imports = [line.strip() for line in source if line.startswith(("import ", "from "))]
    standard = {"__future__", "collections", "dataclasses", "numbers", "typing"}
    assert {line.split()[1].split(".")[0] for line in imports} - standard <= {"torch", "hpo_plugin"}
    own = {line.split()[1] for line in imports if "hpo_plugin" in line}
    assert own <= {"hpo_plugin.algorithm", "hpo_plugin.errors"}
