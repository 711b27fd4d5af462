"""The policy losses as verl calls them, once per micro-batch; through verl's engine: ``test_equivalence.py``."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from verl.trainer.ppo import core_algos
from verl.workers.config import FSDPActorConfig

from hpo_plugin.algorithm import hpo_loss, hysteretic_weights, response_signs
from hpo_plugin.glue.arms import ConfigError
from hpo_plugin.glue.config import HPOPolicyLossConfig
from hpo_plugin.glue.losses import LOSSES
from hpo_plugin.glue.step import LOSS_SUMS, Step, StepError, current_step, use_step


def actor(loss_mode: str = "hpo", **settings) -> FSDPActorConfig:
    policy_loss = HPOPolicyLossConfig(loss_mode=loss_mode, alpha=settings.pop("alpha", 0.6))
    return FSDPActorConfig(rollout_n=8, ppo_micro_batch_size_per_gpu=1, policy_loss=policy_loss, **settings)


def step(hysteresis: str = "ahpo", alpha: float = 0.25) -> Step:
    return Step(counts=None, hysteresis=hysteresis, alpha=alpha, metrics={})


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


def weighed(advantages, mask, alpha):
    return advantages * hysteretic_weights(response_signs(advantages, mask), alpha).unsqueeze(-1)


@pytest.mark.parametrize("name", ["hpo", "ahpo"])
def test_verl_finds_the_losses_and_calls_them_with_the_parameters_of_its_own(name):
    ours = core_algos.get_policy_loss_fn(name)
    assert ours is LOSSES[name]
    theirs = inspect.signature(core_algos.compute_policy_loss_vanilla)
    assert list(inspect.signature(ours).parameters) == list(theirs.parameters)


def test_ahpo_outside_of_a_step_is_refused_and_says_what_to_use_instead():
    with pytest.raises(StepError) as refused:
        LOSSES["ahpo"](*random_batch(), "token-mean", actor("ahpo"))
    for text in ("never taken from a micro-batch", "adv_estimator=ahpo", "loss_mode=vanilla", "token-mean"):
        assert text in str(refused.value)


def test_alpha_is_that_of_the_step_not_of_the_micro_batch():
    """A micro-batch of negatives only: its own α would be α_min. On policy the loss is α · 0.5."""
    mask = torch.ones(2, 3, dtype=torch.bool)
    zeros, advantages = torch.zeros(2, 3), torch.full((2, 3), -0.5)
    with use_step(step(alpha=0.25)):
        loss, _ = LOSSES["ahpo"](zeros, zeros, advantages, mask, "token-mean", actor("ahpo"))
    assert loss.item() == pytest.approx(0.25 * 0.5)


def test_alpha_of_hpo_outside_of_a_step_is_that_of_the_config():
    zeros, advantages = torch.zeros(1, 2), torch.full((1, 2), -1.0)
    loss, metrics = LOSSES["hpo"](zeros, zeros, advantages, torch.ones(1, 2), "token-mean", actor(alpha=0.3))
    assert loss.item() == pytest.approx(0.3)
    assert metrics["actor/hpo/alpha"] == 0.3


def test_hpo_without_our_config_class_is_refused_naming_the_key():
    config = FSDPActorConfig(rollout_n=8, ppo_micro_batch_size_per_gpu=1)
    with pytest.raises(StepError, match=r"policy_loss._target_=hpo_plugin.glue.config.HPOPolicyLossConfig"):
        LOSSES["hpo"](*random_batch(), "token-mean", config)


def test_a_step_of_another_algorithm_is_refused():
    with use_step(step("hpo")), pytest.raises(StepError, match="'ahpo' was called in a step of 'hpo'"):
        LOSSES["ahpo"](*random_batch(), "token-mean", actor("ahpo"))


@pytest.mark.parametrize("agg", ["seq-mean-token-mean", "seq-mean-token-sum", "token-sum"])
def test_any_aggregation_but_token_mean_is_refused(agg):
    with pytest.raises(ConfigError, match=rf"loss_mode=hpo needs .*loss_agg_mode=token-mean, got {agg}"):
        LOSSES["hpo"](*random_batch(), agg, actor())


@pytest.mark.parametrize("settings", [{}, {"clip_ratio_low": 0.1, "clip_ratio_high": 0.28, "clip_ratio_c": 2.0}])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_loss_equals_verls_vanilla_on_weighed_advantages_in_value_and_gradient(settings, alpha):
    old, log_prob, advantages, mask = random_batch()
    config = actor("ahpo", **settings)
    config.global_batch_info.update({"dp_size": 2, "batch_num_tokens": 100})
    with use_step(step(alpha=alpha)):
        loss, grad, _ = gradient(LOSSES["ahpo"], old, log_prob, advantages, mask, "token-mean", config)
    expected, expected_grad, _ = gradient(
        core_algos.compute_policy_loss_vanilla,
        old,
        log_prob,
        weighed(advantages, mask, alpha),
        mask,
        "token-mean",
        config,
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad)
    assert grad.abs().max() > 0


def test_loss_equals_the_mathematics_on_one_device():
    old, log_prob, advantages, mask = random_batch()
    loss, _ = LOSSES["hpo"](old, log_prob, advantages, mask, "token-mean", actor(alpha=0.4))
    torch.testing.assert_close(loss, hpo_loss(log_prob, old, advantages, mask, alpha=0.4))


def test_loss_is_normalized_by_the_tokens_of_the_whole_mini_batch_over_all_ranks():
    """Two tokens of A = 1 on policy, of 10 in the mini-batch, on one of 4 ranks: −2 / 10 · 4."""
    config = actor()
    config.global_batch_info.update({"dp_size": 4, "batch_num_tokens": 10, "global_batch_size": 5})
    zeros = torch.zeros(1, 2)
    loss, _ = LOSSES["hpo"](zeros, zeros, torch.ones(1, 2), torch.ones(1, 2), "token-mean", config)
    assert loss.item() == pytest.approx(-0.8)


def test_per_token_advantages_are_weighed_by_the_sign_of_their_response():
    """Row 0 sums to 1 and keeps its negative token whole; row 1 sums to −1 and its positive token is weighed too."""
    zeros, mask = torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool)
    advantages = torch.tensor([[2.0, -1.0], [-2.0, 1.0]])
    loss, _ = LOSSES["hpo"](zeros, zeros, advantages, mask, "token-mean", actor(alpha=0.5))
    assert loss.item() == pytest.approx(-(2 - 1 + 0.5 * (-2 + 1)) / 4)


def test_rollout_correction_weights_are_multiplied_in():
    old, log_prob, advantages, mask = random_batch()
    weights = torch.linspace(0.1, 2.0, mask.numel()).reshape(mask.shape)
    with use_step(step()):
        loss, grad, _ = gradient(
            LOSSES["ahpo"], old, log_prob, advantages, mask, "token-mean", actor("ahpo"), rollout_is_weights=weights
        )
    expected, expected_grad, _ = gradient(
        core_algos.compute_policy_loss_vanilla,
        old,
        log_prob,
        weighed(advantages, mask, 0.25),
        mask,
        "token-mean",
        actor("ahpo"),
        rollout_is_weights=weights,
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad)


def test_metrics_of_one_micro_batch_equal_those_of_verls_vanilla():
    old, log_prob, advantages, mask = random_batch()
    loss, metrics = LOSSES["hpo"](old, log_prob, advantages, mask, "token-mean", actor(alpha=0.6))
    _, theirs = core_algos.compute_policy_loss_vanilla(old, log_prob, advantages, mask, "token-mean", actor())
    assert theirs["actor/pg_clipfrac"] > 0
    assert theirs["actor/pg_clipfrac_lower"] > 0
    for key, value in theirs.items():
        assert metrics[key] == pytest.approx(value, rel=1e-5), key
    assert metrics["actor/hpo/pg_loss_positive"] + metrics["actor/hpo/pg_loss_negative"] == pytest.approx(loss.item())


def test_metrics_of_a_micro_batch_worked_out_by_hand():
    """Ratios 1.5, 1 (A = 1) and 0.5, 5 (A = −1): losses −1.2, −1, 0.8 α, 3 α; log-ratios by their logarithms."""
    log_prob = torch.tensor([[1.5, 1.0], [0.5, 5.0]]).log()
    advantages = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    _, metrics = LOSSES["hpo"](torch.zeros(2, 2), log_prob, advantages, torch.ones(2, 2), "token-mean", actor())
    assert metrics == pytest.approx(
        {
            "actor/hpo/alpha": 0.6,
            "actor/hpo/pg_loss_positive": -2.2 / 4,
            "actor/hpo/pg_loss_negative": 0.6 * 3.8 / 4,
            "actor/pg_clipfrac": 2 / 4,
            "actor/pg_clipfrac_lower": 1 / 4,
            "actor/ppo_kl": -math.log(1.5 * 0.5 * 5) / 4,
        }
    )


def test_inside_of_a_step_a_micro_batch_adds_its_sums_and_waits_for_nothing(monkeypatch):
    """On a GPU each of these calls would wait for the device; none is made, forward and backward."""
    config = actor("ahpo")
    old, log_prob, advantages, mask = random_batch()
    config.global_batch_info.update({"dp_size": 1, "batch_num_tokens": int(mask.sum())})
    log_prob.requires_grad_()

    def refuse(*_args, **_kwargs):
        raise AssertionError("the loss waited for the device")

    current = step()
    with use_step(current), monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__"):
            patch.setattr(torch.Tensor, name, refuse)
        loss, metrics = LOSSES["ahpo"](old, log_prob, advantages, mask, "token-mean", config)
        loss.backward()
    assert metrics == {}
    sums = dict(zip(LOSS_SUMS, current._sums[0].tolist(), strict=True))
    assert sums["tokens"] == mask.sum()
    assert (sums["pg_loss_positive"] + sums["pg_loss_negative"]) / sums["tokens"] == pytest.approx(loss.item())
    assert current_step() is None


def test_outside_of_a_step_a_micro_batch_waits_for_the_device_once(monkeypatch):
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
    assert len(metrics) == 6
    assert waits == ["tolist"]


def test_it_runs_as_the_loss_of_megatrons_last_pipeline_stage():
    """Verl scales the loss by the micro-batches, after changing it in place; Megatron calls the engine itself."""
    old, log_prob, advantages, mask = random_batch()
    with use_step(step()):
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
    """Two responses of 1 and 3 tokens, on policy: −(2 · 1 − 0.6 · 1 · 3) / 4."""
    rows = [torch.zeros(1, requires_grad=True), torch.zeros(3, requires_grad=True)]
    log_prob = torch.nested.as_nested_tensor(rows, layout=torch.jagged).to_padded_tensor(0.0)
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    advantages = torch.tensor([[2.0, 0.0, 0.0], [-1.0, -1.0, -1.0]])
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
