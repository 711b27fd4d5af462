"""``algorithm.adv_estimator=hpo|ahpo``: HPO's advantages behind verl's estimator interface.

verl calls an estimator once a step, with the whole rollout batch, padding rows included (``compute_advantage``,
verl/trainer/ppo/ray_trainer.py). So α of A-HPO can be computed right here. Whether the weights are applied here or
left to the policy loss is decided by the loss mode, see :mod:`hpo_plugin.glue.arms`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from hpo_plugin import algorithm, fused
from hpo_plugin.glue import arms

__all__ = ["ESTIMATORS", "compute_ahpo_outcome_advantage", "compute_hpo_outcome_advantage"]

KEY_WEIGH = f"{arms.KEY_HPO}.weigh"


def _who_weighs(name: str, config: Any) -> arms.Weigh:
    """The loss mode of the same config decides; where it is out of sight, the user has to say."""
    if isinstance(config, DictConfig):
        loss_mode = None
        if config._get_parent() is not None:
            loss_mode = OmegaConf.select(config, f"..{arms.KEY_LOSS_MODE}", default=None)
        if loss_mode is not None:
            weigh = arms.entrance(name, str(loss_mode))[1]
            assert weigh is not None  # name is hysteretic
            return weigh
        told = OmegaConf.select(config, "hpo.weigh", default=None)
        if told in ("advantage", "loss"):
            return told
    raise arms.ConfigError(
        f"{arms.KEY_ESTIMATOR}={name} cannot see {arms.KEY_LOSS_MODE} from the config it was given "
        f"({type(config).__name__}), so it does not know whether the policy loss applies the hysteretic weights. Set "
        f"{KEY_WEIGH}=advantage if the policy loss is not hpo or ahpo, {KEY_WEIGH}=loss if it is."
    )


def _setting(config: Any, key: str, default: Any) -> Any:
    if isinstance(config, DictConfig):
        return OmegaConf.select(config, key, default=default)
    return default


def _group_numbers(index: np.ndarray) -> Tensor:
    """A number for each row, (N,) int64, equal where the uids' texts are; a dictionary does it in a tenth of a sort."""
    uids = list(map(str, np.asarray(index).reshape(-1).tolist()))
    number_of = dict(zip(dict.fromkeys(uids), range(len(uids)), strict=False))
    return torch.from_numpy(np.fromiter(map(number_of.__getitem__, uids), dtype=np.int64, count=len(uids)))


def _outcome_advantage(
    name: str,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray | None,
    config: Any,
) -> tuple[Tensor, Tensor]:
    if index is None:
        raise ValueError(
            f"{arms.KEY_ESTIMATOR}={name} is group-relative and needs the prompt's uid of each response, but the batch "
            "has no `uid` (verl passes it as `index`)."
        )
    weigh = _who_weighs(name, config)
    with torch.no_grad():
        valid = fused.responses_with_tokens(response_mask)
        advantage, _ = algorithm.group_relative_advantage(
            token_level_rewards.sum(dim=-1),
            _group_numbers(index).to(valid.device),
            valid=valid,
            normalize_by_std=bool(_setting(config, "norm_adv_by_std_in_grpo", True)),
        )
        if weigh == "advantage":
            signs = advantage.sign()
            if name == arms.ADAPTIVE:
                alpha_min = float(_setting(config, "hpo.alpha_min", arms.DEFAULT_ALPHA_MIN))
                alpha: Tensor | float = algorithm.adaptive_alpha(algorithm.count_signs(signs, valid), alpha_min)
            else:
                alpha = float(_setting(config, "hpo.alpha", arms.DEFAULT_ALPHA))
            advantage = advantage * algorithm.hysteretic_weights(signs, alpha)
        advantages = fused.spread_over_tokens(advantage, response_mask)
    return advantages, advantages


def compute_hpo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray | None = None,
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """HPO's advantage: group-relative, exactly 0 in degenerate groups; negative ones times α unless the loss weighs.

    Args:
        token_level_rewards: (N, T) floating point, N the rows of the whole rollout batch of the step; a response's
            reward is the sum over T.
        response_mask: (N, T) of 0 and 1; rows without any response token (padding, rejected) get 0 and enter no group.
        index: (N,) object array of uids, one a prompt; rows of one uid need not be adjacent.
        config: verl's ``algorithm`` node. Read: ``norm_adv_by_std_in_grpo``, ``hpo.alpha``, ``hpo.weigh``, and,
            through its parent, the policy loss's ``loss_mode``.
        **kwargs: what verl passes to other estimators (``reward_baselines``…); not used.

    Returns:
        ``(advantages, returns)``, both (N, T) fp32 (fp64 for fp64 rewards), and equal, as in verl's ``grpo``.

    Raises:
        ConfigError: if it cannot be known who weighs, or the loss mode contradicts the estimator.
        ValueError: if a reward is NaN or infinite, or there are no uids.
    """
    return _outcome_advantage("hpo", token_level_rewards, response_mask, index, config)


def compute_ahpo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray | None = None,
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """A-HPO's advantage: as :func:`compute_hpo_outcome_advantage`, with α = clip(p̂⁺ / p̂⁻, α_min, 1) of this batch.

    Args:
        token_level_rewards: as there.
        response_mask: as there.
        index: as there.
        config: as there; ``hpo.alpha_min`` is read instead of ``hpo.alpha``.
        **kwargs: not used.

    Returns:
        ``(advantages, returns)``, as there.

    Raises:
        ConfigError: as there.
        ValueError: as there.
    """
    return _outcome_advantage("ahpo", token_level_rewards, response_mask, index, config)


ESTIMATORS = {"hpo": compute_hpo_outcome_advantage, "ahpo": compute_ahpo_outcome_advantage}
"""What is registered in verl's ``ADV_ESTIMATOR_REGISTRY``."""
