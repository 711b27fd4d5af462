"""The probes of bad input to the algorithm, with few batches; and that they find faults."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpo_plugin import algorithm, fused
from hpo_plugin.algorithm import RewardError, adaptive_alpha, hysteretic_advantage
from hpo_plugin.verl import estimators
from torture import algorithm_inputs, verl_inputs
from torture.algorithm_inputs import advantages_of, alpha_of, batch, check_functions, check_openrlhf, loss_of
from torture.verl_inputs import check_verl

RANDOMS = st.randoms(use_true_random=False)
FEW = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


@given(RANDOMS)
@FEW
def test_the_functions_give_the_oracles_result_or_the_documented_error(rng):
    assert check_functions(batch(rng)) == []


@given(RANDOMS)
@FEW
def test_verls_estimators_and_policy_loss_give_the_oracles_result_or_the_documented_error(rng):
    assert check_verl(batch(rng)) == []


@given(RANDOMS)
@FEW
def test_the_adapter_to_openrlhf_gives_the_oracles_result_or_the_documented_error(rng):
    assert check_openrlhf(batch(rng, least=4)) == []


@pytest.mark.parametrize(("rows", "tokens"), [(1000, 8), (8, 2000)])
def test_a_large_batch_gives_numpys_result(tmp_path, rows, tokens):
    found = verl_inputs.large(rows, tokens, tmp_path)
    assert found.failures == []
    assert len(found.worst) == 3


def test_the_batches_have_the_properties_that_the_page_states():
    batches = [batch(random.Random(seed)) for seed in range(600)]
    assert {len(b.rewards) for b in batches} >= {0, 1, 2, 24}
    assert {b.mask.shape[1] for b in batches} == {1, 2, 5, 12}
    assert {b.rewards.dtype for b in batches} == {*algorithm_inputs.REAL, *algorithm_inputs.DISCRETE}
    assert {b.mask.dtype for b in batches} == set(algorithm_inputs.MASKS)
    assert {b.log_prob.dtype for b in batches} == {b.old.dtype for b in batches} == set(algorithm_inputs.REAL)
    assert {b.uids.dtype.kind for b in batches} >= {"O", "U", "i"}
    assert {type(uid) for b in batches if b.uids.dtype == object for uid in b.uids} == {str, int}
    assert any(b.log_prob.dtype != b.old.dtype for b in batches)
    layouts = {(name, getattr(b, name).is_contiguous()) for b in batches for name in ("rewards", "mask", "log_prob")}
    assert len(layouts) == 6
    assert any(len(b.rewards) and not any(b.valid) for b in batches)
    assert sum(bool(b.bad_rows) for b in batches) > 30
    values = torch.cat([b.rewards.double() for b in batches])
    assert values.isnan().any()
    assert values.isinf().any()
    assert (values.abs() > 1e300).any()


# The oracle by hand ---------------------------------------------------------------------------------------------------


def test_the_oracle_gives_numbers_worked_out_by_hand():
    """Mean 1/4 and std 1/2; 0.2 is the mean of its group up to rounding; the last row is not valid."""
    rewards, groups = [1.0, 0.0, 0.0, 0.0, 0.1, 0.2, 0.3, 9.0], [0] * 4 + [1] * 4
    rewards = torch.tensor(rewards).tolist()
    advantages, degenerate = advantages_of(rewards, groups, [True] * 7 + [False], by_std=True)
    assert advantages[:4] == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-5)
    assert advantages[4:] == pytest.approx([-1.0, 0.0, 1.0, 0.0], rel=1e-4)
    assert advantages[5] == 0
    assert not any(degenerate)
    assert advantages_of([0.1, 0.1], [0, 0], [True, True], by_std=False) == ([0.0, 0.0], [True, True])
    assert [alpha_of(1, 3, 0.1), alpha_of(3, 1, 0.1), alpha_of(0, 2, 0.1), alpha_of(0, 0, 0.1)] == [1 / 3, 1, 0.1, 1]


def test_the_oracles_loss_and_gradient_by_hand():
    """Ratios 1.5 and 0.5 of A = 1; 5, above the dual clip, and e^30 of A = −0.6. Then one token is masked."""
    log_prob = torch.tensor([[1.5, 0.5], [5.0, 1.0]], dtype=torch.float64).log()
    log_prob[1, 1] = 30.0
    inside = torch.tensor([[True, True], [True, True]])
    loss, size, gradient = loss_of(log_prob, torch.zeros(2, 2), [1.0, -0.6], inside, (0.2, 0.2, 3.0))
    assert loss == pytest.approx((-1.2 - 0.5 + 1.8 + 1.8) / 4)
    assert size == pytest.approx(5.3 / 4)
    assert gradient[0] == [(0, 0), pytest.approx((-0.5 / 4, -0.5 / 4))]
    assert gradient[1] == [(0, 0), (0, 0)]
    inside[0, 0] = False
    loss, _, gradient = loss_of(log_prob, torch.zeros(2, 2), [1.0, -0.6], inside, (0.2, 0.2, 3.0))
    assert loss == pytest.approx((-0.5 + 1.8 + 1.8) / 3)
    assert gradient[0] == [(0, 0), pytest.approx((-0.5 / 3, -0.5 / 3))]


# Faults ---------------------------------------------------------------------------------------------------------------


def without_alpha(monkeypatch):
    monkeypatch.setattr(algorithm, "hysteretic_weights", lambda signs, alpha: torch.ones_like(signs))


def without_limit(monkeypatch):
    monkeypatch.setattr(algorithm, "REWARD_LIMIT", 1e300)


def counted_with_padding(monkeypatch):
    right = algorithm.count_signs
    monkeypatch.setattr(algorithm, "count_signs", lambda signs, valid=None: right(signs))


def noise_as_signs(monkeypatch):
    monkeypatch.setattr(algorithm, "ROUNDING", 0.0)


def zeros(monkeypatch):
    right = algorithm.group_relative_advantage

    def changed(rewards, groups, **others):
        found = right(rewards, groups, **others)
        return found._replace(advantage=torch.zeros_like(found.advantage))

    monkeypatch.setattr(algorithm, "group_relative_advantage", changed)


def gradient_of_garbage(monkeypatch):
    right = fused.surrogate_loss

    def changed(log_prob, *inputs, **others):
        loss, sums = right(log_prob, *inputs, **others)
        return loss + 0 * log_prob.sum(), sums

    monkeypatch.setattr(fused, "surrogate_loss", changed)


def gradient_beyond_the_limit(monkeypatch):
    monkeypatch.setattr(algorithm, "LOG_RATIO_LIMIT", 21.0)


FAULTS = (
    without_alpha,
    without_limit,
    counted_with_padding,
    noise_as_signs,
    zeros,
    gradient_of_garbage,
    gradient_beyond_the_limit,
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_found_in_the_functions(monkeypatch, tmp_path, fault):
    fault(monkeypatch)
    assert algorithm_inputs.many(check_functions, 150, 0, tmp_path).failures


@pytest.mark.parametrize("fault", [without_alpha, without_limit, gradient_of_garbage], ids=lambda fault: fault.__name__)
def test_a_fault_is_found_through_verl(monkeypatch, tmp_path, fault):
    fault(monkeypatch)
    assert algorithm_inputs.many(check_verl, 150, 0, tmp_path).failures


def test_merged_groups_are_found_through_verl(monkeypatch, tmp_path):
    monkeypatch.setattr(estimators, "_group_numbers", lambda index: torch.zeros(len(index), dtype=torch.int64))
    assert algorithm_inputs.many(check_verl, 150, 0, tmp_path).failures


@pytest.mark.parametrize("fault", [without_alpha, without_limit, noise_as_signs], ids=lambda fault: fault.__name__)
def test_a_fault_is_found_in_the_adapter_to_openrlhf(monkeypatch, tmp_path, fault):
    fault(monkeypatch)
    assert algorithm_inputs.many(check_openrlhf, 150, 0, tmp_path, least=4).failures


# Rewards by size ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("by_std", [True, False])
def test_rewards_up_to_the_limit_have_advantages_and_larger_ones_are_refused(dtype, by_std):
    """The table of docs/robustness.md: 1e12 is accepted; 1e30, 1e38 and, in fp64, 1e308 are not."""

    def advantages(value: float) -> list[float]:
        rewards = torch.tensor([value, -value, 0.0, value], dtype=dtype)
        result = hysteretic_advantage(
            rewards, torch.zeros(4, dtype=torch.int64), lambda c: adaptive_alpha(c, 0.1), normalize_by_std=by_std
        )
        return result.weighted.tolist()

    centered = (0.75, -1.25, -0.25, 0.75)
    scale = (sum(a * a for a in centered) / 3) ** 0.5 if by_std else 1e-12
    assert advantages(1e12) == pytest.approx([a / scale for a in centered], rel=1e-6)
    for value in (1.1e12, 1e30, 1e38, *([1e154, 1e308] if dtype == torch.float64 else [])):
        with pytest.raises(RewardError, match=r"at most 1e\+12 in magnitude.*: 3 of 4 are larger .*rows \[0, 1, 3\]"):
            advantages(value)
