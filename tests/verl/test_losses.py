"""The policy losses as verl calls them, once per micro-batch; through verl's engine: ``test_equivalence.py``."""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace

import pytest
import torch
from verl.trainer.ppo import core_algos
from verl.workers.config import FSDPActorConfig

from hpo_plugin.algorithm import hpo_loss, hysteretic_weights, response_signs
from hpo_plugin.errors import ConfigError
from hpo_plugin.verl.config import HPOPolicyLossConfig
from hpo_plugin.verl.losses import policy_loss

LOSSES = {name: policy_loss(name) for name in ("hpo", "ahpo")}


def actor(loss_mode: str = "hpo", **settings) -> FSDPActorConfig:
    node = HPOPolicyLossConfig(loss_mode=loss_mode, adv_estimator=loss_mode)
    return FSDPActorConfig(rollout_n=8, ppo_micro_batch_size_per_gpu=1, policy_loss=node, **settings)


def random_batch(n: int = 8, t: int = 6):
    """old_log_prob, log_prob, advantages, mask in verl's order, with ratios on both sides of every clip."""
    generator = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(n, t, generator=generator)
    log_prob = old + 0.8 * torch.randn(n, t, generator=generator)
    mask = torch.arange(t) < torch.randint(1, t + 1, (n, 1), generator=generator)
    return old, log_prob, torch.randn(n, 1, generator=generator) * mask, mask


def gradient(loss_fn, old, log_prob, *rest, **kwargs):
    log_prob = log_prob.clone().requires_grad_()
    loss, metrics = loss_fn(old, log_prob, *rest, **kwargs)
    loss.backward()
    return loss.detach(), log_prob.grad, metrics


def weighted(advantages, mask, alpha):
    return advantages * hysteretic_weights(response_signs(advantages, mask), alpha).unsqueeze(-1)


@pytest.mark.parametrize("name", ["hpo", "ahpo"])
def test_verl_finds_the_losses_and_calls_them_with_the_parameters_of_its_own(name):
    ours = core_algos.get_policy_loss_fn(name)
    assert ours is LOSSES[name]
    theirs = inspect.signature(core_algos.compute_policy_loss_vanilla)
    assert list(inspect.signature(ours).parameters) == list(theirs.parameters)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (FSDPActorConfig(rollout_n=8, ppo_micro_batch_size_per_gpu=1), "their estimator is not known"),
        (actor("hpo"), "the advantages are from hpo"),
        (None, "their estimator is not known"),
    ],
)
def test_advantages_of_another_estimator_are_refused_in_the_worker_with_what_to_set(config, said):
    with pytest.raises(ConfigError) as refused:
        LOSSES["ahpo"](*random_batch(), "token-mean", config)
    for text in (said, "algorithm.adv_estimator=ahpo", "loss_mode=vanilla", "token-mean"):
        assert text in str(refused.value)


@pytest.mark.parametrize("agg", ["seq-mean-token-mean", "seq-mean-token-sum", "token-sum"])
def test_any_aggregation_but_token_mean_is_refused(agg):
    with pytest.raises(ConfigError, match=rf"loss_mode=hpo needs .*loss_agg_mode=token-mean, but it is {agg}"):
        LOSSES["hpo"](*random_batch(), agg, actor())


@pytest.mark.parametrize("settings", [{}, {"clip_ratio_low": 0.1, "clip_ratio_high": 0.28, "clip_ratio_c": 2.0}])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_loss_equals_verls_vanilla_in_value_and_gradient(settings, alpha):
    old, log_prob, advantages, mask = random_batch()
    config = actor("ahpo", **settings)
    config.global_batch_info.update({"dp_size": 2, "batch_num_tokens": 100})
    args = (old, log_prob, weighted(advantages, mask, alpha), mask, "token-mean", config)
    loss, grad, _ = gradient(LOSSES["ahpo"], *args)
    expected, expected_grad, _ = gradient(core_algos.compute_policy_loss_vanilla, *args)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad)
    assert grad.abs().max() > 0


def test_loss_on_weighted_advantages_equals_the_mathematics_on_one_device():
    old, log_prob, advantages, mask = random_batch()
    loss, _ = LOSSES["hpo"](old, log_prob, weighted(advantages, mask, 0.4), mask, "token-mean", actor())
    torch.testing.assert_close(loss, hpo_loss(log_prob, old, advantages, mask, alpha=0.4))


def test_loss_is_normalized_by_the_tokens_of_the_whole_mini_batch_over_all_ranks():
    """Two tokens of A = 1 on policy, of 10 in the mini-batch, on one of 4 ranks: −2 / 10 · 4."""
    config = actor()
    config.global_batch_info.update({"dp_size": 4, "batch_num_tokens": 10, "global_batch_size": 5})
    zeros = torch.zeros(1, 2)
    loss, _ = LOSSES["hpo"](zeros, zeros, torch.ones(1, 2), torch.ones(1, 2), "token-mean", config)
    assert loss.item() == pytest.approx(-0.8)


@pytest.mark.parametrize("tokens", [None, 0, 0.0, torch.tensor(0)])
def test_where_no_token_is_unmasked_loss_and_gradient_are_zero(tokens):
    """Of the mini-batch, as verl gives it: a number; None outside of verl's engine."""
    old, log_prob, advantages, mask = random_batch()
    config = actor()
    config.global_batch_info.update({"dp_size": 1, "batch_num_tokens": tokens})
    loss, grad, metrics = gradient(LOSSES["hpo"], old, log_prob, advantages, mask & False, "token-mean", config)
    assert loss == 0
    assert torch.equal(grad, torch.zeros_like(grad))
    assert set(metrics.values()) == {0.0}


def test_a_micro_batch_without_unmasked_tokens_adds_nothing_to_its_mini_batch():
    old, log_prob, advantages, mask = random_batch()
    config = actor()
    config.global_batch_info.update({"dp_size": 1, "batch_num_tokens": 10})
    loss, grad, _ = gradient(LOSSES["hpo"], old, log_prob, advantages, mask & False, "token-mean", config)
    assert loss == 0
    assert not grad.any()


def test_rollout_correction_weights_are_multiplied_in():
    old, log_prob, advantages, mask = random_batch()
    weights = torch.linspace(0.1, 2.0, mask.numel()).reshape(mask.shape)
    args = (old, log_prob, advantages, mask, "token-mean", actor("ahpo"))
    loss, grad, _ = gradient(LOSSES["ahpo"], *args, rollout_is_weights=weights)
    vanilla = core_algos.compute_policy_loss_vanilla
    expected, expected_grad, _ = gradient(vanilla, *args, rollout_is_weights=weights)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad)


def test_metrics_of_one_micro_batch_equal_those_of_verls_vanilla():
    old, log_prob, advantages, mask = random_batch()
    loss, metrics = LOSSES["hpo"](old, log_prob, advantages, mask, "token-mean", actor())
    _, theirs = core_algos.compute_policy_loss_vanilla(old, log_prob, advantages, mask, "token-mean", actor())
    assert theirs["actor/pg_clipfrac"] > 0
    assert theirs["actor/pg_clipfrac_lower"] > 0
    for key, value in theirs.items():
        assert metrics[key] == pytest.approx(value, rel=1e-5), key
    assert metrics["actor/hpo/pg_loss_positive"] + metrics["actor/hpo/pg_loss_negative"] == pytest.approx(loss.item())


def test_metrics_of_a_micro_batch_worked_out_by_hand():
    """Ratios 1.5, 1 (A = 1) and 0.5, 5 (A = −0.6): losses −1.2, −1, 0.48, 1.8; log-ratios by their logarithms."""
    log_prob = torch.tensor([[1.5, 1.0], [0.5, 5.0]]).log()
    advantages = torch.tensor([[1.0, 1.0], [-0.6, -0.6]])
    _, metrics = LOSSES["hpo"](torch.zeros(2, 2), log_prob, advantages, torch.ones(2, 2), "token-mean", actor())
    assert metrics == pytest.approx(
        {
            "actor/hpo/pg_loss_positive": -2.2 / 4,
            "actor/hpo/pg_loss_negative": 0.6 * 3.8 / 4,
            "actor/pg_clipfrac": 2 / 4,
            "actor/pg_clipfrac_lower": 1 / 4,
            "actor/ppo_kl": -math.log(1.5 * 0.5 * 5) / 4,
        }
    )


def test_a_micro_batch_waits_for_the_device_once(monkeypatch):
    """All metrics come in one list."""
    waits = []
    old, log_prob, advantages, mask = random_batch()
    config = actor()
    config.global_batch_info.update({"dp_size": 1, "batch_num_tokens": int(mask.sum())})
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__"):
            original = getattr(torch.Tensor, name)

            def counted(*args, name=name, original=original, **kwargs):
                waits.append(name)
                return original(*args, **kwargs)

            patch.setattr(torch.Tensor, name, counted)
        loss, metrics = LOSSES["hpo"](old, log_prob.requires_grad_(), advantages, mask, "token-mean", config)
        loss.backward()
    assert len(metrics) == 5
    assert waits == ["tolist"]


def test_under_dynamic_context_parallelism_no_metrics_of_one_ranks_rows_are_reported():
    """Verl's data-parallel group is a group of one there, over which it aggregates what a loss returns."""
    config = actor()
    object.__setattr__(config, "megatron", SimpleNamespace(dynamic_context_parallel=True))
    loss, metrics = LOSSES["hpo"](*random_batch(), "token-mean", config)
    assert loss != 0
    assert metrics == {}
    config.megatron.dynamic_context_parallel = False
    assert len(LOSSES["hpo"](*random_batch(), "token-mean", config)[1]) == 5


def test_it_runs_as_the_loss_of_megatrons_last_pipeline_stage():
    """Verl scales the loss by the micro-batches, after changing it in place; Megatron calls the engine itself."""
    old, log_prob, advantages, mask = random_batch()
    _, expected, _ = gradient(LOSSES["ahpo"], old, log_prob, advantages, mask, "token-mean", actor("ahpo"))
    log_prob.requires_grad_()
    loss, _ = LOSSES["ahpo"](old, log_prob, advantages, mask, "token-mean", actor("ahpo"))
    loss -= 0.1 * log_prob.sum()  # an entropy bonus, as in ppo_loss
    output = loss * 4
    torch.autograd.Variable._execution_engine.run_backward(
        (output,), (torch.ones_like(output),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )
    torch.testing.assert_close(log_prob.grad, 4 * (expected - 0.1))


def test_without_gradients_loss_and_metrics_are_the_same():
    old, log_prob, advantages, mask = random_batch()
    log_prob.requires_grad_()
    loss, metrics = LOSSES["hpo"](old, log_prob, advantages, mask, "token-mean", actor())
    with torch.no_grad():
        again, metrics_again = LOSSES["hpo"](old, log_prob, advantages, mask, "token-mean", actor())
    assert loss.requires_grad
    assert not again.requires_grad
    assert loss.item() == again.item()
    assert metrics == metrics_again


def test_bf16_log_probs_give_an_fp32_loss_and_a_bf16_gradient():
    old, log_prob, advantages, mask = random_batch()
    old, log_prob = old.bfloat16(), log_prob.bfloat16()
    args = (advantages, mask, "token-mean", actor())
    loss, grad, _ = gradient(LOSSES["hpo"], old, log_prob, *args)
    expected, expected_grad, _ = gradient(LOSSES["hpo"], old.float(), log_prob.float(), *args)
    assert loss.dtype == torch.float32
    assert loss == expected
    assert torch.equal(grad, expected_grad.bfloat16())


def test_nested_log_probs_padded_as_verl_does_give_the_mean_over_their_tokens():
    """Two responses of 1 and 3 tokens, on policy: −(2 · 1 − 0.6 · 3) / 4."""
    rows = [torch.zeros(1, requires_grad=True), torch.zeros(3, requires_grad=True)]
    log_prob = torch.nested.as_nested_tensor(rows, layout=torch.jagged).to_padded_tensor(0.0)
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    advantages = torch.tensor([[2.0, 0.0, 0.0], [-0.6, -0.6, -0.6]])
    loss, _ = LOSSES["hpo"](log_prob.detach(), log_prob, advantages, mask, "token-mean", actor())
    loss.backward()
    assert loss.item() == pytest.approx(-(2 - 0.6 * 3) / 4)
    assert rows[0].grad.tolist() == pytest.approx([-0.5])
    assert rows[1].grad.tolist() == pytest.approx([0.15] * 3)


def test_ranks_without_the_tokens_of_the_mini_batch_are_refused_by_verls_aggregation():
    config = actor()
    config.global_batch_info.update({"dp_size": 2, "batch_num_tokens": None})
    with pytest.raises(ValueError, match="batch_num_tokens is required"):
        LOSSES["hpo"](*random_batch(), "token-mean", config)
