"""``policy_loss.loss_mode=hpo|ahpo``: HPO's loss behind verl's policy-loss interface.

It is the clipped surrogate over the batch's mean response length, on advantages that the estimator of the same name
has weighted. It applies no α itself. verl calls it once per micro-batch (``ppo_loss``, verl/workers/utils/losses.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from hpo_plugin import fused
from hpo_plugin.errors import ConfigError
from hpo_plugin.verl.selection import KEY_AGGREGATION, KEY_ESTIMATOR, KEY_LOSS_MODE, MEAN_LENGTH

__all__ = ["mean_length_policy_loss", "normalizes_by_mean_length", "policy_loss"]


@functools.cache
def policy_loss(name: str) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """What is registered in verl's ``POLICY_LOSS_REGISTRY`` for a variant; the same object at every call."""
    return functools.partial(mean_length_policy_loss, name)


def mean_length_policy_loss(
    name: str,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = MEAN_LENGTH,
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """The clipped surrogate with mean-length normalization, the policy loss of every variant.

    Args:
        name: the variant whose estimator must have made the advantages.
        old_log_prob: (n, T) log-probabilities under the old policy, n the rows of a micro-batch.
        log_prob: (n, T) log-probabilities under the current policy; differentiated.
        advantages: (n, T), weighted.
        response_mask: (n, T).
        loss_agg_mode: must be ``token-mean``, which is mean-length normalization over the optimizer's mini-batch.
        config: verl's ``ActorConfig``. Read: ``clip_ratio``, ``clip_ratio_low``, ``clip_ratio_high``, ``clip_ratio_c``,
            ``policy_loss.adv_estimator``, ``global_batch_info``.
        rollout_is_weights: (n, T) rollout-correction weights, multiplied in, or None.

    Returns:
        ``(loss, metrics)``: a 0-d loss, normalized by the *global* token count, 0 where no token is unmasked; and the
        metrics of this micro-batch, which verl averages over micro-batches. None under dynamic context parallelism.

    Raises:
        ConfigError: if it is not known that the estimator of this variant made the advantages, or for another
            aggregation.
    """
    made_by = getattr(getattr(config, "policy_loss", None), "adv_estimator", None)
    if made_by != name:
        raise ConfigError(
            f"{KEY_LOSS_MODE}={name} needs advantages to which {KEY_ESTIMATOR}={name} has applied α; "
            + (
                f"these are of {made_by}. "
                if made_by
                else "who made these is not known, for nothing checked the config. "
            )
            + f"Set {KEY_ESTIMATOR}={name}, and {KEY_LOSS_MODE}=vanilla in a trainer that calls neither verl's "
            "validate_config nor run_ppo: with token-mean it is the same algorithm."
        )
    if loss_agg_mode != MEAN_LENGTH:
        raise ConfigError(f"{KEY_LOSS_MODE}={name} needs {KEY_AGGREGATION}={MEAN_LENGTH}, got {loss_agg_mode}")
    tokens = torch.count_nonzero(response_mask)
    loss, sums = fused.surrogate_loss(
        log_prob,
        old_log_prob,
        advantages,
        response_mask,
        scale=_token_share(tokens, **config.global_batch_info),
        clip_low=config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low,
        clip_high=config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high,
        clip_dual=config.clip_ratio_c,
        token_weights=rollout_is_weights,
    )
    if getattr(getattr(config, "megatron", None), "dynamic_context_parallel", False):
        return loss, {}  # verl would report those of one rank's rows as if they were the batch's
    positive, negative = -sums.objective * (sums.sign > 0), -sums.objective * (sums.sign < 0)
    rows = torch.stack([positive, negative, sums.clipped, sums.dual_clipped, -sums.log_ratio])
    # One synchronization with the device for all metrics.
    means = (rows.sum(dim=1) / tokens.clamp(min=1)).tolist()
    names = ("hpo/pg_loss_positive", "hpo/pg_loss_negative", "pg_clipfrac", "pg_clipfrac_lower", "ppo_kl")
    return loss, {f"actor/{key}": value for key, value in zip(names, means, strict=True)}


def _token_share(tokens: Tensor, dp_size: int = 1, batch_num_tokens: Any = None, **_: Any) -> float | Tensor:
    """What verl's ``token-mean`` multiplies the loss of a token with (``agg_loss``, verl/trainer/ppo/core_algos.py).

    ``tokens`` are those of the micro-batch, the denominator where verl does not give ``batch_num_tokens``, those of the
    mini-batch over all ranks. Finite where there are no tokens; ValueError with several ranks and no denominator.
    """
    if batch_num_tokens is None:
        if dp_size > 1:
            raise ValueError("(global) batch_num_tokens is required when dp_size > 1")
        batch_num_tokens = tokens
    if isinstance(batch_num_tokens, Tensor):
        return dp_size / batch_num_tokens.clamp(min=1)
    return dp_size / max(batch_num_tokens, 1)


def normalizes_by_mean_length(config: DictConfig) -> bool | None:
    """Whether the configured policy loss divides every token by the batch's mean length, found by calling it.

    Some of verl's losses ignore ``loss_agg_mode`` or have their own, so the key does not tell. Under mean-length
    normalization the gradient of a token does not depend on its response's length, and halves in a batch of twice the
    length.

    Args:
        config: the root config.

    Returns:
        None if the loss cannot be called on a small batch.
    """
    from verl.trainer.ppo import core_algos
    from verl.utils.config import omega_conf_to_dataclass

    try:
        actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
        loss_fn = core_algos.get_policy_loss_fn(actor.policy_loss.loss_mode)

        actor.global_batch_info["loss_scale_factor"] = actor.loss_scale_factor

        def token_gradients(lengths: tuple[int, int]) -> list[float]:
            mask = torch.arange(6) < torch.tensor(lengths).unsqueeze(1)
            old = torch.full(mask.shape, -1.0)
            log_prob = old.clone().requires_grad_()
            loss, _ = loss_fn(old, log_prob, mask.float(), mask, actor.loss_agg_mode, actor)
            return torch.autograd.grad(loss, log_prob)[0][:, 0].tolist()

        once, twice = token_gradients((1, 3)), token_gradients((2, 6))
    except Exception:
        # A loss of another package may need more than verl's interface gives it.
        return None
    return bool(once[0]) and all(abs(g - h) < 1e-5 * abs(h) for g, h in ((once[0], once[1]), (2 * twice[0], once[0])))
