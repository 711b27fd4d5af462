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
    """Reject arguments for which the loss is not HPO's, or the gradient is not the gradient of the loss.

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
            "OpenRLHF subtracts the KL penalty from the reward, so the tokens of a response get different advantages. "
            "Set it to 0 (OpenRLHF's default is 0.01), or add --algo.kl.use_loss",
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
            "OpenRLHF clips the advantages to this range, which would change signs. Set one limit below 0 and one "
            "above",
        ),
    ):
        if not accepted:
            raise ConfigError(f"--{option} {value} does not give HPO's objective: {remedy}.")
    _check_accumulation(args)


def _check_accumulation(args: SimpleNamespace) -> None:
    """Reject arguments for which OpenRLHF's gradient is not the gradient of its loss, for any advantages."""
    stage = args.ds.zero_stage
    if args.train.dynamic_batch_enable:
        if stage in (1, 2):
            raise ConfigError(
                f"--train.dynamic_batch_enable with --ds.zero_stage {stage} loses gradients: DeepSpeed keeps "
                "only the gradient of the last micro-batch. Remove --train.dynamic_batch_enable, or set "
                "--ds.zero_stage 3."
            )
        return
    rollout, batch = args.rollout, args.train.batch_size
    # OpenRLHF generates once for each rollout batch. It sets the second one, if it is not given, after this check.
    prompts, option = min(
        (rollout.batch_size, "batch_size"),
        (rollout.vllm_generate_batch_size or rollout.batch_size, "vllm_generate_batch_size"),
    )
    responses = prompts * rollout.n_samples_per_prompt
    gpus = args.actor.num_nodes * args.actor.num_gpus_per_node
    processes = max(gpus // args.ds.ring_attn_size // args.ds.tensor_parallel_size, 1)
    trained, generated = args.train.micro_batch_size * processes, rollout.micro_batch_size * processes
    if responses % batch:
        raise ConfigError(
            f"--train.batch_size {batch} does not divide --rollout.{option} {prompts} × "
            f"--rollout.n_samples_per_prompt {rollout.n_samples_per_prompt} = {responses}: OpenRLHF normalizes the "
            "remainder by its own tokens, and DeepSpeed accumulates it into the next optimizer step. Set "
            f"--train.batch_size to a divisor of {responses}."
        )
    if batch % trained:
        raise ConfigError(
            f"--train.batch_size {batch} is not a multiple of --train.micro_batch_size "
            f"{args.train.micro_batch_size} × {processes} data-parallel processes = {trained}: an optimizer step "
            "accumulates the same number of whole micro-batches in each process. Change one of them."
        )
    # OpenRLHF sends whole micro-batches of the rollout to the processes.
    if processes > 1 and responses % generated:
        raise ConfigError(
            f"--rollout.micro_batch_size {rollout.micro_batch_size} × {processes} data-parallel processes = "
            f"{generated} does not divide the {responses} responses of a rollout batch: the processes would get "
            "different numbers of responses. Change one of them."
        )


def apply_alpha(
    experiences: Sequence[Any], group_size: int, alpha: Callable[[SignCounts], Tensor | float]
) -> dict[str, float]:
    """Multiply the negative advantages of a rollout batch by α, in place.

    The advantages are OpenRLHF's own, but exactly 0 where a reward equals the mean of its group up to rounding.
    Responses without a token in the loss are counted nowhere; OpenRLHF keeps their rewards in the mean of their group.

    Args:
        experiences: OpenRLHF's micro-batches, B responses and A token positions each, all of one rollout batch.
            ``index`` has B positions in the rollout batch, where the responses to a prompt are consecutive.
            ``action_mask`` is (B, A), ``rewards`` (B,): those that the advantages were computed from, after length
            penalties. ``advantages`` is (B, A), equal at all tokens of a response; it is replaced. ``info`` gets each
            metric as (B,), which OpenRLHF logs.
        group_size: Responses to each prompt.
        alpha: The rule: sign counts of the batch to α.

    Returns:
        The metrics of the batch.

    Raises:
        RewardError: A reward is NaN, infinite or above ``REWARD_LIMIT`` of :mod:`hpo_plugin.algorithm`; ``rows`` are
            positions in the rollout batch.
        ValueError: The rule gives an α outside of [0, 1].
    """
    index = torch.tensor([i for experience in experiences for i in experience.index])
    # Dynamic batching permutes the responses; here they are in the order of the rollout batch.
    order = index.argsort()
    groups = torch.arange(len(order)) // group_size
    rewards = torch.cat([experience.rewards for experience in experiences])[order]
    lengths = torch.cat([experience.action_mask.sum(dim=1) for experience in experiences])[order]
    # OpenRLHF's advantages are returns: one reward, at the last token, that all tokens before it have, too.
    advantages = torch.cat([experience.advantages[:, 0] for experience in experiences])[order].float()
    own = group_relative_advantage(rewards, groups)
    valid = lengths > 0
    result = hysteretic_advantage(
        rewards,
        groups,
        alpha,
        valid=valid,
        lengths=lengths,
        base=advantages.masked_fill(own.advantage == 0, 0.0),
        # It is, but in groups of all responses, and not of those that are valid.
        base_is_zero_without_signal=False,
    )
    statistics = result.statistics._replace(
        groups=len(groups[valid].unique()), degenerate_groups=len(groups[valid & own.degenerate].unique())
    )
    metrics = step_metrics([statistics])
    rows = result.weighted[index].split([len(experience.index) for experience in experiences])
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
        RewardError: See :func:`apply_alpha`.
        ValueError: See :func:`apply_alpha`.
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
