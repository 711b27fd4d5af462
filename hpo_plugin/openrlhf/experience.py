"""OpenRLHF's advantages of a rollout batch, negative ones times α, and the settings under which this is HPO."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hpo_plugin.algorithm import SignCounts, group_relative_advantage, hysteretic_advantage
from hpo_plugin.errors import ConfigError
from hpo_plugin.metrics import step_metrics

__all__ = ["ESTIMATORS", "apply_alpha", "check_arguments", "compute_advantages_and_returns"]

#: OpenRLHF's names of the advantages that HPO is defined on: GRPO's, and those without the standard deviation.
ESTIMATORS = ("group_norm", "dr_grpo")


def check_arguments(args: SimpleNamespace) -> None:
    """Refuse arguments under which the loss is not HPO's.

    Args:
        args: OpenRLHF's arguments, as its ``hierarchize`` nests them.

    Raises:
        ConfigError: The message names the option, its value, and what to do.
    """
    estimator, kl, clip = args.algo.advantage.estimator, args.algo.kl, args.reward.clip_range
    # OpenRLHF 0.11.0 and 0.11.1 have no other, and no option.
    aggregation = getattr(args.actor, "loss_agg_mode", "token-mean")
    for option, value, accepted, remedy in (
        (
            "algo.advantage.estimator",
            estimator,
            estimator in ESTIMATORS,
            f"HPO's advantages are group-relative. Set it to {' or '.join(ESTIMATORS)}",
        ),
        (
            "rollout.n_samples_per_prompt",
            args.rollout.n_samples_per_prompt,
            args.rollout.n_samples_per_prompt > 1,
            "a group needs two responses or more. Increase it",
        ),
        (
            "algo.kl.init_coef",
            kl.init_coef,
            kl.init_coef <= 0 or kl.use_loss,
            "OpenRLHF subtracts the KL penalty from the reward, so that advantages differ from token to token. Set it "
            "to 0 (OpenRLHF's default is 0.01), or add --algo.kl.use_loss",
        ),
        (
            "actor.loss_agg_mode",
            aggregation,
            aggregation == "token-mean",
            "HPO divides by the batch's mean length. Set it to token-mean (OpenRLHF's default)",
        ),
        (
            "actor.policy_loss_type",
            args.actor.policy_loss_type,
            args.actor.policy_loss_type == "ppo",
            "HPO clips the ratios of tokens. Set it to ppo (OpenRLHF's default)",
        ),
        (
            "reward.clip_range",
            clip,
            not clip or clip[0] < 0 < clip[1],
            "OpenRLHF clips the advantages to this range, which would change signs. Set limits on both sides of 0",
        ),
        (
            "train.dynamic_batch_enable",
            f"with --ds.zero_stage {args.ds.zero_stage}",
            not (args.train.dynamic_batch_enable and args.ds.zero_stage in (1, 2)),
            "DeepSpeed keeps the gradient of the last micro-batch only. Remove it, or set --ds.zero_stage 3",
        ),
    ):
        if not accepted:
            raise ConfigError(f"--{option} {value} is not HPO: {remedy}.")


def apply_alpha(
    experiences: Sequence[Any], group_size: int, alpha: Callable[[SignCounts], Tensor | float]
) -> dict[str, float]:
    """Multiply the negative advantages of a rollout batch by α, in place.

    The advantages are OpenRLHF's own, but exactly 0 where a reward equals the mean of its group up to rounding.

    Args:
        experiences: OpenRLHF's micro-batches, all of one rollout batch, with its advantages; rewards are those that the
            advantages were computed from, after length penalties. ``info`` gets the metrics, which OpenRLHF logs.
        group_size: Responses for each prompt.
        alpha: The rule: sign counts of the batch to α.

    Returns:
        The metrics of the batch.

    Raises:
        RewardError: A reward is NaN or infinite.
    """
    rewards = torch.cat([experience.rewards for experience in experiences])
    groups = torch.tensor([i // group_size for experience in experiences for i in experience.index])
    # OpenRLHF's advantages are returns: one reward, at the last token, that all tokens before it have, too.
    advantages = torch.cat([experience.advantages[:, 0] for experience in experiences]).float()
    at_the_mean = group_relative_advantage(rewards, groups).advantage == 0
    result = hysteretic_advantage(
        rewards,
        groups,
        alpha,
        lengths=torch.cat([experience.action_mask.sum(dim=1) for experience in experiences]),
        base=advantages.masked_fill(at_the_mean, 0.0),
    )
    metrics = step_metrics([result.statistics])
    rows = result.weighted.split([len(experience.index) for experience in experiences])
    for experience, weighted in zip(experiences, rows, strict=True):
        mask = experience.action_mask.bool()
        experience.advantages = torch.where(mask, weighted.to(experience.advantages.dtype).unsqueeze(1), 0.0)
        experience.info |= {name: torch.full((len(weighted),), value) for name, value in metrics.items()}
    return metrics


def compute_advantages_and_returns(
    wrapped: Callable[..., list[Any]], maker: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Any]:
    """OpenRLHF's method of this name, with α applied: a wrapper of wrapt (``hpo_plugin.openrlhf.hook``).

    Args:
        wrapped: OpenRLHF's method.
        maker: OpenRLHF's ``RemoteExperienceMaker``; ``args.hpo`` is what ``hpo_plugin.openrlhf.command`` put there.
        args: Arguments of the method.
        kwargs: Arguments of the method.

    Returns:
        The experiences of the rollout batch.

    Raises:
        ConfigError: See :func:`check_arguments`.
    """
    check_arguments(maker.args)
    experiences = wrapped(*args, **kwargs)
    hpo = maker.args.hpo
    apply_alpha(
        experiences,
        maker.args.rollout.n_samples_per_prompt,
        lambda counts: hpo.variant.alpha(counts, hpo.settings),
    )
    return experiences
