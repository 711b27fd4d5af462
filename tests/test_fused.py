"""The one-pass functions give what their plain definitions give, and keep and allocate no more than they say."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpo_plugin import fused
from hpo_plugin.algorithm import hpo_loss, hysteretic_weights, response_signs
from hpo_plugin.fused import (
    plain_surrogate_loss,
    responses_with_tokens,
    rewards_of_responses,
    spread_over_tokens,
    surrogate_loss,
)

CLIP = {"clip_low": 0.2, "clip_high": 0.2, "clip_dual": 3.0}
SETTINGS = {"scale": 0.25, **CLIP}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def blocks_of(size: int):
    """Blocks so small that a small batch has several, in both directions."""
    return mock.patch.object(fused, "_block_size", return_value=size)


@st.composite
def cases(draw):
    """log_prob, old_log_prob, advantages, mask, clips, token_weights: zeros, both signs, ratios on every kink."""
    n, t = draw(st.integers(0, 5)), draw(st.integers(0, 6))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    low, high = draw(st.sampled_from([(0.2, 0.2), (0.1, 0.28), (0.0, 0.0), (1.0, 3.0)]))
    dual = draw(st.sampled_from([None, 1.125, 3.0]))
    kinks = [0.0, 20.0, -20.0, 30.0, -30.0, math.log1p(high)] + [math.log(k) for k in (1 - low, dual) if k]
    log_ratios = st.one_of(st.sampled_from(kinks), st.floats(-3, 3))

    def matrix(elements):
        flat = draw(st.lists(elements, min_size=n * t, max_size=n * t))
        return torch.tensor(flat, dtype=torch.float64).reshape(n, t).to(dtype)

    old = matrix(st.floats(-3, 0))
    mask = matrix(st.sampled_from([0, 1, 1])) > 0
    advantages = matrix(st.integers(-8, 8).map(lambda k: k / 4))
    if draw(st.booleans()):
        advantages = advantages[:, :1] if t else advantages.new_zeros(n, 1)
    weights = matrix(st.sampled_from([0.0, 0.5, 1.0, 1.75])) if draw(st.booleans()) else None
    return (old.double() + matrix(log_ratios)).to(dtype), old, advantages, mask, (low, high, dual), weights


@given(
    cases(),
    st.sampled_from([1, 2, 7, 1 << 20]),
    st.sampled_from([2.0, torch.tensor(0.125)]),
)
@settings(max_examples=400, deadline=None)
def test_one_pass_equals_the_definition_in_value_gradient_and_counts(case, block, k):
    log_prob, old, advantages, mask, clips, weights = case
    tolerance = TOLERANCE[torch.promote_types(log_prob.dtype, torch.float32)]
    ours, theirs = log_prob.clone().requires_grad_(), log_prob.clone().requires_grad_()
    with blocks_of(block):
        loss, sums = surrogate_loss(
            ours,
            old,
            advantages,
            mask,
            scale=k,
            clip_low=clips[0],
            clip_high=clips[1],
            clip_dual=clips[2],
            token_weights=weights,
        )
    expected_loss, expected = plain_surrogate_loss(theirs, old, advantages, mask, weights, k, *clips)

    def magnitude(x):
        return torch.where(mask, x.detach().to(sums.objective.dtype).abs(), 0)

    log_ratio = (log_prob.to(sums.objective.dtype) - old.to(sums.objective.dtype)).clamp(-20, 20)
    largest = torch.maximum(log_ratio.exp(), torch.ones(())) * (clips[2] or 1) * (1 + clips[1])
    scale = magnitude(largest * advantages * (1 if weights is None else weights)).sum(dim=1)
    assert sums.objective.dtype == expected.objective.dtype
    assert ((sums.objective - expected.objective).abs() <= tolerance * scale).all()
    assert ((sums.log_ratio - expected.log_ratio).abs() <= tolerance * magnitude(log_ratio).sum(dim=1)).all()
    assert torch.equal(sums.sign, expected.sign)
    assert loss.shape == ()
    assert loss.dtype == expected_loss.dtype
    assert abs(loss - expected_loss) <= tolerance * k * scale.sum()

    # On a kink, exp() of one and the same number may round to either side of it, and autograd halves the gradient.
    low, high, dual = clips
    kinks = [math.log(k) for k in (1 - low, 1 + high, dual) if k] + [20.0, -20.0]
    kink = torch.stack([(log_ratio - k).abs() < 1e-5 for k in kinks]).any(dim=0) & mask
    for count in ("clipped", "dual_clipped"):
        assert ((getattr(sums, count) - getattr(expected, count)).abs() <= kink.sum(dim=1)).all()

    (loss * -1.5).backward()
    (expected_loss * -1.5).backward()
    assert ours.grad.dtype == log_prob.dtype
    torch.testing.assert_close(
        ours.grad[~kink], theirs.grad[~kink], rtol=TOLERANCE[log_prob.dtype], atol=torch.finfo(log_prob.dtype).tiny
    )
    full = (1.5 * k * log_ratio.exp() * advantages * (1 if weights is None else weights))[kink]
    between = ours.grad[kink].double() * full.sign()
    assert (between >= 0).all()
    largest = full.abs().to(log_prob.dtype).double()
    assert (between <= largest * (1 + TOLERANCE[log_prob.dtype]) + torch.finfo(log_prob.dtype).tiny).all()


@pytest.mark.parametrize("block", [3, 1 << 20])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_equals_finite_differences(block, weighted):
    generator = torch.Generator().manual_seed(3)
    old = -torch.rand(4, 4, generator=generator, dtype=torch.float64)
    # No ratio within 0.05 of a kink (0.8, 1.2, 3), or its logarithm of ±20.
    ratios = torch.tensor([[0.5, 0.9, 1.1, 1e-10], [1.5, 4.0, 0.5, 1e10], [0.9, 1.1, 1.5, 2.0], [4.0, 0.5, 0.9, 1.0]])
    advantages = torch.tensor([[1.0], [-1.0], [-2.0], [0.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 1], [1, 0, 0, 1]])
    weights = torch.rand(4, 4, generator=generator, dtype=torch.float64) if weighted else None
    log_prob = (old + ratios.double().log()).requires_grad_()

    def loss(x):
        return surrogate_loss(x, old, advantages, mask, token_weights=weights, **SETTINGS)[0]

    with blocks_of(block):
        assert torch.autograd.gradcheck(loss, (log_prob,))


def batch(n=6, t=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(n, t, generator=generator, dtype=dtype)
    log_prob = old + 0.8 * torch.randn(n, t, generator=generator, dtype=dtype)
    mask = torch.arange(t) < torch.randint(1, t + 1, (n, 1), generator=generator)
    return log_prob, old, torch.randn(n, 1, generator=generator, dtype=dtype) * mask, mask


def test_on_weighted_advantages_over_the_number_of_tokens_it_is_the_loss_of_the_paper():
    log_prob, old, advantages, mask = batch()
    ours, theirs = log_prob.clone().requires_grad_(), log_prob.clone().requires_grad_()
    weighted = advantages * hysteretic_weights(response_signs(advantages, mask), 0.3).unsqueeze(1)
    loss, _ = surrogate_loss(ours, old, weighted, mask, scale=1 / mask.sum(), **CLIP)
    expected = hpo_loss(theirs, old, advantages, mask, alpha=0.3)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_what_stands_outside_of_the_mask_is_never_used(garbage):
    log_prob, old, advantages, mask = batch()
    weights = torch.ones_like(old)
    spoiled = [torch.where(mask, x, garbage) for x in (log_prob, old, advantages, weights)]
    clean, dirty = log_prob.clone().requires_grad_(), spoiled[0].requires_grad_()
    expected, expected_sums = surrogate_loss(clean, old, advantages, mask, **SETTINGS)
    loss, sums = surrogate_loss(dirty, *spoiled[1:3], mask, token_weights=spoiled[3], **SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip((loss, *sums), (expected, *expected_sums), strict=True))
    loss.backward()
    expected.backward()
    assert torch.equal(dirty.grad, clean.grad)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_what_stands_outside_of_the_mask_reaches_no_gradient_of_the_definition(garbage):
    log_prob, old, advantages, mask = batch()
    inputs = [torch.where(mask, x, garbage).requires_grad_() for x in (log_prob, old, advantages)]
    weights = torch.where(mask, 1.0, garbage)
    loss, _ = surrogate_loss(*inputs, mask, token_weights=weights, **SETTINGS)
    expected, _ = surrogate_loss(log_prob, old, advantages, mask, **SETTINGS)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(x.grad.isfinite().all() and not x.grad[~mask].any() for x in inputs)


def test_nested_tensors_are_refused():
    nested = torch.nested.as_nested_tensor([torch.zeros(1), torch.zeros(3)], layout=torch.jagged)
    with pytest.raises(ValueError, match=r"must be \(N, T\)"):
        surrogate_loss(nested, nested, nested, nested + 1, **SETTINGS)


def test_a_nan_inside_of_the_mask_reaches_loss_and_gradient():
    log_prob, old, advantages, mask = batch()
    log_prob[1, 0] = math.nan
    log_prob.requires_grad_()
    loss, sums = surrogate_loss(log_prob, old, advantages, mask, **SETTINGS)
    loss.backward()
    assert loss.isnan()
    assert sums.objective.isnan().nonzero().tolist() == [[1]]
    assert log_prob.grad.isnan().nonzero().tolist() == [[1, 0]]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_values_are_the_same_and_nothing_is_kept(context):
    log_prob, old, advantages, mask = batch()
    log_prob.requires_grad_()
    expected, expected_sums = surrogate_loss(log_prob, old, advantages, mask, **SETTINGS)
    with context(), mock.patch.object(fused.torch, "empty_like", side_effect=AssertionError("nothing to keep")):
        loss, sums = surrogate_loss(log_prob, old, advantages, mask, **SETTINGS)
    assert not loss.requires_grad
    assert all(torch.equal(a, b) for a, b in zip((loss, *sums), (expected, *expected_sums), strict=True))
    assert expected.requires_grad
    assert not any(x.requires_grad for x in expected_sums)


def test_one_tensor_of_tokens_is_kept_for_the_backward_pass_and_it_can_run_twice():
    log_prob, old, advantages, mask = batch()
    log_prob.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        loss, _ = surrogate_loss(log_prob, old, advantages, mask, **SETTINGS)
    assert kept == [log_prob.shape]
    loss.backward(retain_graph=True)
    first = log_prob.grad.clone()
    loss.backward()
    assert torch.equal(log_prob.grad, 2 * first)


def test_a_second_derivative_is_refused():
    log_prob, old, advantages, mask = batch()
    log_prob.requires_grad_()
    loss = surrogate_loss(log_prob, old, advantages, mask, **SETTINGS)[0].square()
    (first,) = torch.autograd.grad(loss, log_prob, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("which", [1, 2])
def test_a_gradient_of_another_input_comes_from_the_definition(which):
    ours, theirs = ([x.clone() for x in batch()] for _ in range(2))
    for inputs in (ours, theirs):
        inputs[0].requires_grad_()
        inputs[which].requires_grad_()
    surrogate_loss(*ours, **SETTINGS)[0].backward()
    plain_surrogate_loss(*theirs, None, *SETTINGS.values())[0].backward()
    for i in (0, which):
        torch.testing.assert_close(ours[i].grad, theirs[i].grad)
        assert ours[i].grad.abs().max() > 0


def test_tensors_that_are_not_contiguous_give_the_same():
    inputs = batch()
    loss, sums = surrogate_loss(*inputs, **SETTINGS)
    strided = [torch.stack([x, x], dim=-1)[..., 0].t().contiguous().t() for x in inputs]
    assert not strided[0].is_contiguous()
    with blocks_of(16):
        other, others = surrogate_loss(*strided, **SETTINGS)
    for ours, theirs in zip((other, *others), (loss, *sums), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("at", range(4))
def test_a_shape_that_does_not_fit_is_refused(at):
    inputs = list(batch())
    inputs[at] = inputs[at][:, :-1]
    with pytest.raises(ValueError, match=r"\(N, T\)"):
        surrogate_loss(*inputs, **SETTINGS)


# Advantages over tokens -----------------------------------------------------------------------------------------------


@given(
    st.integers(0, 6),
    st.integers(0, 5),
    st.sampled_from([torch.bool, torch.int64, torch.float32, torch.uint8]),
    st.data(),
)
@settings(max_examples=100, deadline=None)
def test_spreading_is_multiplication_with_the_mask_and_a_response_has_tokens_if_any(n, t, dtype, data):
    bits = data.draw(st.lists(st.integers(0, 1), min_size=n * t, max_size=n * t))
    mask = torch.tensor(bits).reshape(n, t).to(dtype)
    values = torch.linspace(-1, 1, n)
    with blocks_of(data.draw(st.sampled_from([1, 4, 1 << 20]))):
        assert torch.equal(spread_over_tokens(values, mask), values.unsqueeze(-1) * mask)
        assert torch.equal(responses_with_tokens(mask), mask.bool().any(dim=1))


@given(st.integers(0, 4), st.integers(0, 5), st.booleans(), st.data())
@settings(max_examples=100, deadline=None)
def test_a_response_has_the_sum_of_its_rewards_and_the_sum_of_their_magnitudes(n, t, negative, data):
    values = data.draw(st.lists(st.integers(-8 if negative else 0, 8), min_size=n * t, max_size=n * t))
    rewards = torch.tensor(values, dtype=torch.float32).reshape(n, t)
    total, magnitude = rewards_of_responses(rewards)
    assert torch.equal(total, rewards.sum(1))
    assert torch.equal(magnitude, rewards.abs().sum(1))


@pytest.mark.parametrize(("rewards", "same"), [([[0.0, 1.0], [0.5, 0.0]], True), ([[0.0, 1.0], [0.5, -0.25]], False)])
def test_without_a_negative_reward_sum_and_magnitude_are_one_tensor(rewards, same):
    total, magnitude = rewards_of_responses(torch.tensor(rewards))
    assert (magnitude is total) == same
    assert magnitude.tolist() == [1.0, 0.5 if same else 0.75]


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0)])
def test_rewards_without_responses_or_without_tokens_are_zeros(shape):
    for result in rewards_of_responses(torch.zeros(shape)):
        assert torch.equal(result, torch.zeros(shape[0]))


def test_a_reward_that_is_nan_reaches_sum_and_magnitude():
    """The advantages refuse it, with its row."""
    for result in rewards_of_responses(torch.tensor([[math.nan, 1.0], [0.5, 0.0]])):
        assert result.isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool])
def test_rewards_of_other_dtypes_are_added_in_fp32(dtype):
    """257 is no number of bf16, and vector_norm takes no integers."""
    rows = [[256.0, 1.0], [-1.0, 0.0]] if dtype not in (torch.int8, torch.bool) else [[1.0, 1.0], [-1.0, 0.0]]
    rewards = torch.tensor(rows).to(dtype)
    total, magnitude = rewards_of_responses(rewards)
    assert total.tolist() == [sum(row) for row in rewards.tolist()]
    assert magnitude.tolist() == [sum(map(abs, row)) for row in rewards.tolist()]
    assert total.dtype == magnitude.dtype == torch.float32


def allocated(function, *args) -> int:
    """The peak of what torch allocates on the CPU during a call, in bytes."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        function(*args)
    now = peak = 0
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def test_no_temporary_has_the_size_of_the_batch():
    """512 responses of 2,048 tokens, with blocks of 8,192: buffers of 3 blocks, and what is returned or kept."""
    n, t, block = 512, 2048, 8192
    log_prob, old, advantages, mask = batch(n, t)
    whole, small = 4 * n * t, 3 * 4 * block + 100 * 4 * n
    with blocks_of(block):
        assert allocated(spread_over_tokens, torch.ones(n), mask.long()) <= whole + small
        assert allocated(responses_with_tokens, torch.zeros(n, t, dtype=torch.int64)) <= 8 * block + 100 * n
        assert allocated(lambda: surrogate_loss(log_prob, old, advantages, mask, **SETTINGS)) <= small
        log_prob.requires_grad_()
        assert allocated(lambda: surrogate_loss(log_prob, old, advantages, mask, **SETTINGS)) <= whole + small
