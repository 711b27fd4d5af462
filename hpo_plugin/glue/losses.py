"""``policy_loss.loss_mode=hpo|ahpo``: HPO's loss behind verl's policy-loss interface.

verl calls a policy loss once per micro-batch (``ppo_loss``, verl/workers/utils/losses.py). α of A-HPO belongs to the
whole step, so it is taken from the current :class:`hpo_plugin.glue.step.Step`, never from the micro-batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hpo_plugin import fused
from hpo_plugin.glue import arms
from hpo_plugin.glue.step import LOSS_SUMS, StepError, current_step, loss_metrics

__all__ = ["LOSSES", "compute_policy_loss_ahpo", "compute_policy_loss_hpo"]


def _alpha(name: str, config: Any) -> float:
    step = current_step()
    if step is not None:
        if step.hysteresis != name:
            raise StepError(f"policy loss {name!r} was called in a step of {step.hysteresis!r}")
        return step.alpha
    if name == arms.ADAPTIVE:
        raise StepError(
            "policy loss 'ahpo' was called outside of a step of hpo_plugin's actor worker, where α of the whole "
            "rollout batch is not known; it is never taken from a micro-batch. This trainer does not run "
            "ActorRolloutRefWorker.actor_worker_cls.train_mini_batch with hpo_plugin's config class. Use "
            f"{arms.KEY_ESTIMATOR}=ahpo with {arms.KEY_LOSS_MODE}=vanilla and {arms.KEY_AGGREGATION}="
            f"{arms.MEAN_LENGTH} instead: it is the same algorithm, with the same gradient."
        )
    alpha = getattr(config.policy_loss, "alpha", None)
    if alpha is None:
        raise StepError(
            f"policy loss 'hpo' was not told α: actor_rollout_ref.actor.policy_loss is {type(config.policy_loss)}, not "
            "HPOPolicyLossConfig. Set actor_rollout_ref.actor.policy_loss._target_="
            "hpo_plugin.glue.config.HPOPolicyLossConfig."
        )
    return float(alpha)


def _policy_loss(
    name: str,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str,
    config: Any,
    rollout_is_weights: Tensor | None,
) -> tuple[Tensor, dict[str, Any]]:
    alpha = _alpha(name, config)
    if loss_agg_mode != arms.MEAN_LENGTH:
        raise arms.ConfigError(
            f"{arms.KEY_LOSS_MODE}={name} needs {arms.KEY_AGGREGATION}={arms.MEAN_LENGTH}, got {loss_agg_mode}"
        )
    tokens = torch.count_nonzero(response_mask)
    loss, sums = fused.hysteretic_loss(
        log_prob,
        old_log_prob,
        advantages,
        response_mask,
        alpha=alpha,
        scale=_token_share(tokens, **config.global_batch_info),
        clip_low=config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low,
        clip_high=config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high,
        clip_dual=config.clip_ratio_c,
        token_weights=rollout_is_weights,
    )
    losses = sums.objective * -sums.weight
    positive, negative = losses * (sums.sign > 0), losses * (sums.sign < 0)
    of_responses = [positive, negative, sums.clipped, sums.dual_clipped, -sums.log_ratio]
    batch_sums = torch.cat([tokens.unsqueeze(0), torch.stack(of_responses).sum(dim=1)])
    step = current_step()
    if step is not None:
        # The worker reports them once, over the whole step: verl would average micro-batches of unequal size.
        step.add_loss_sums(batch_sums)
        return loss, {}
    metrics = loss_metrics(dict(zip(LOSS_SUMS, batch_sums.tolist(), strict=True)))
    return loss, {f"actor/{key}": value for key, value in metrics.items()} | {"actor/hpo/alpha": alpha}


def _token_share(tokens: Tensor, dp_size: int = 1, batch_num_tokens: Any = None, **_: Any) -> float | Tensor:
    """What verl's ``token-mean`` multiplies the loss of a token with (``agg_loss``, verl/trainer/ppo/core_algos.py).

    The mean is linear and α is a response's, so one product of (n,) tensors does for all tokens of a response.

    Args:
        tokens: 0-d, of the micro-batch: the denominator where verl does not give that of the mini-batch.
        dp_size: verl's, the ranks over which the gradient is averaged.
        batch_num_tokens: verl's, the tokens of the mini-batch over all ranks.
        **_: the rest of verl's ``global_batch_info``, for other aggregations.

    Returns:
        A number, or a 0-d tensor if the denominator is one.

    Raises:
        ValueError: with several ranks and without the tokens of the mini-batch, as in verl.
    """
    if batch_num_tokens is None:
        if dp_size > 1:
            raise ValueError("(global) batch_num_tokens is required when dp_size > 1")
        batch_num_tokens = tokens
    return dp_size / batch_num_tokens


def compute_policy_loss_hpo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = arms.MEAN_LENGTH,
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """HPO's policy loss: the clipped surrogate, negative responses times α, over the batch's mean length.

    Args:
        old_log_prob: (n, T) log-probabilities under the old policy, n the rows of a micro-batch.
        log_prob: (n, T) log-probabilities under the current policy; differentiated.
        advantages: (n, T), *unweighted*; per-token advantages are allowed, a response's sign is that of its masked sum.
        response_mask: (n, T).
        loss_agg_mode: must be ``token-mean``, which is mean-length normalization over the optimizer's mini-batch.
        config: verl's ``ActorConfig``. Read: ``clip_ratio``, ``clip_ratio_low``, ``clip_ratio_high``, ``clip_ratio_c``,
            ``policy_loss.alpha``, ``global_batch_info``.
        rollout_is_weights: (n, T) rollout-correction weights, multiplied in, or None.

    Returns:
        ``(loss, metrics)``: a 0-d loss, normalized by the *global* token count; inside of a step of our worker no
        metrics, because the worker reports them for the whole step; else those of this micro-batch.

    Raises:
        ConfigError: for another aggregation.
        StepError: if α did not reach the worker.
    """
    return _policy_loss(
        "hpo", old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights
    )


def compute_policy_loss_ahpo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = arms.MEAN_LENGTH,
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """A-HPO's policy loss: as :func:`compute_policy_loss_hpo`, with α of the current step's whole rollout batch.

    Args:
        old_log_prob: as there.
        log_prob: as there.
        advantages: as there.
        response_mask: as there.
        loss_agg_mode: as there.
        config: as there, but α comes from :func:`hpo_plugin.glue.step.current_step`.
        rollout_is_weights: as there.

    Returns:
        ``(loss, metrics)``, as there.

    Raises:
        ConfigError: as there.
        StepError: outside of a step, where α cannot be known.
    """
    return _policy_loss(
        "ahpo", old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights
    )


LOSSES = {"hpo": compute_policy_loss_hpo, "ahpo": compute_policy_loss_ahpo}
"""What is registered in verl's ``POLICY_LOSS_REGISTRY``."""
