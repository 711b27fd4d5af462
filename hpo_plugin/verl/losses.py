"""``policy_loss.loss_mode=hpo|ahpo``: HPO's policy loss in verl.

The loss is the clipped surrogate divided by the batch's mean response length. The advantage estimator of the same name
has applied α to the advantages; the loss applies none. verl calls it once per micro-batch (``ppo_loss``,
verl/workers/utils/losses.py).
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
    """The function registered in verl's ``POLICY_LOSS_REGISTRY`` for a variant; the same object on every call."""
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
        name: the variant; its estimator must have computed the advantages.
        old_log_prob: (n, T) log-probabilities under the old policy, where n is the number of rows of a micro-batch.
        log_prob: (n, T) log-probabilities under the current policy; differentiated.
        advantages: (n, T), with α applied.
        response_mask: (n, T).
        loss_agg_mode: must be ``token-mean``, which is mean-length normalization over the optimizer's mini-batch.
        config: verl's ``ActorConfig``. The function reads ``clip_ratio``, ``clip_ratio_low``, ``clip_ratio_high``,
            ``clip_ratio_c``, ``policy_loss.adv_estimator`` and ``global_batch_info``.
        rollout_is_weights: (n, T) rollout-correction weights that multiply the loss of each token, or None.

    Returns:
        ``(loss, metrics)``: a 0-d loss, normalized by the *global* token count and 0 if no token is unmasked; and the
        metrics of this micro-batch, which verl averages over micro-batches. With dynamic context parallelism the
        metrics are empty.

    Raises:
        ConfigError: if the config does not state that the estimator of this variant computed the advantages, or if
            ``loss_agg_mode`` is another one.
    """
    made_by = getattr(getattr(config, "policy_loss", None), "adv_estimator", None)
    if made_by != name:
        raise ConfigError(
            f"{KEY_LOSS_MODE}={name} needs advantages from {KEY_ESTIMATOR}={name}, but "
            + (
                f"the advantages are from {made_by}. "
                if made_by
                else "their estimator is not known, because hpo_plugin has not checked the config. "
            )
            + f"Set {KEY_ESTIMATOR}={name}. If the trainer calls neither verl's validate_config nor run_ppo, also set "
            f"{KEY_LOSS_MODE}=vanilla: with {KEY_AGGREGATION}={MEAN_LENGTH} the algorithm is the same."
        )
    if loss_agg_mode != MEAN_LENGTH:
        raise ConfigError(
            f"{KEY_LOSS_MODE}={name} needs {KEY_AGGREGATION}={MEAN_LENGTH}, but it is {loss_agg_mode}. "
            f"Set {KEY_AGGREGATION}={MEAN_LENGTH}."
        )
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
        return loss, {}  # verl would report the metrics of one rank's rows as those of the batch
    positive, negative = -sums.objective * (sums.sign > 0), -sums.objective * (sums.sign < 0)
    rows = torch.stack([positive, negative, sums.clipped, sums.dual_clipped, -sums.log_ratio])
    # All metrics share one synchronization with the device.
    means = (rows.sum(dim=1) / tokens.clamp(min=1)).tolist()
    names = ("hpo/pg_loss_positive", "hpo/pg_loss_negative", "pg_clipfrac", "pg_clipfrac_lower", "ppo_kl")
    return loss, {f"actor/{key}": value for key, value in zip(names, means, strict=True)}


def _token_share(tokens: Tensor, dp_size: int = 1, batch_num_tokens: Any = None, **_: Any) -> float | Tensor:
    """The factor of a token's loss in verl's ``token-mean`` (``agg_loss``, verl/trainer/ppo/core_algos.py).

    The denominator is ``batch_num_tokens``, the number of tokens of the mini-batch over all ranks. If verl does not
    pass it, the denominator is ``tokens``, those of the micro-batch; with several ranks this raises a ValueError. The
    factor is finite if there are no tokens.
    """
    if batch_num_tokens is None:
        if dp_size > 1:
            raise ValueError("(global) batch_num_tokens is required when dp_size > 1")
        batch_num_tokens = tokens
    if isinstance(batch_num_tokens, Tensor):
        return dp_size / batch_num_tokens.clamp(min=1)
    return dp_size / max(batch_num_tokens, 1)


def normalizes_by_mean_length(config: DictConfig) -> bool | None:
    """Whether the configured policy loss divides every token by the batch's mean length.

    The function calls the loss on small batches. The key ``loss_agg_mode`` is not sufficient, because some of verl's
    losses ignore it or use an aggregation of their own. With mean-length normalization the gradient of a token does not
    depend on the length of its response, and is half as large in a batch with twice the length.

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
        # A loss of another package may need inputs that verl's interface does not pass.
        return None
    return bool(once[0]) and all(abs(g - h) < 1e-5 * abs(h) for g, h in ((once[0], once[1]), (2 * twice[0], once[0])))
