"""HPO and A-HPO for slime, through its hook for rewards.

    --custom-reward-post-process-path hpo_plugin.slime.post_process_rewards
    --advantage-estimator grpo --calculate-per-token-loss

slime calls the hook in one process with all samples of a rollout (``RolloutManager._post_process_rewards`` in
``slime/ray/rollout.py``), and ``--advantage-estimator grpo`` uses the number that it returns for a sample as the
advantage of all tokens of the sample. So the hook returns w_i A_i. ``hpo_policy`` (``ahpo``) and its setting
(``hpo_alpha`` or ``hpo_alpha_min``) are keys of the YAML file of ``--custom-config-path``.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch

from hpo_plugin.algorithm import hysteretic_advantage
from hpo_plugin.errors import ConfigError
from hpo_plugin.metrics import step_metrics
from hpo_plugin.variants import resolve, settings

__all__ = ["post_process_rewards"]

logger = logging.getLogger(__name__)

#: What HPO needs of slime's arguments: name, value, option to add or to remove.
_REQUIRED = (
    ("advantage_estimator", "grpo", "set --advantage-estimator grpo"),
    ("calculate_per_token_loss", True, "add --calculate-per-token-loss: HPO divides by the batch's mean length"),
    ("rewards_normalization", True, "remove --disable-rewards-normalization: HPO's advantages are group-relative"),
    ("compute_advantages_and_returns", True, "remove --disable-compute-advantages-and-returns"),
    ("loss_type", "policy_loss", "set --loss-type policy_loss: another loss does not clip the ratios of tokens"),
    ("use_opd", False, "remove --use-opd: distillation subtracts a KL term from the advantages after α was applied"),
    ("normalize_advantages", False, "remove --normalize-advantages: it shifts the signs after α was applied"),
    ("custom_advantage_function_path", None, "remove --custom-advantage-function-path: it replaces HPO's advantages"),
    (
        "custom_pg_loss_reducer_function_path",
        None,
        "remove --custom-pg-loss-reducer-function-path: it replaces the mean over tokens",
    ),
)


def post_process_rewards(args: Namespace, samples: Sequence[Any]) -> tuple[list[float], list[float]]:
    """Return the rewards of a rollout, and its group-relative advantages with negative ones multiplied by α.

    Samples that slime removes from the loss (``remove_sample``, or a loss mask of zeros) are not counted. The
    metrics of the rollout are logged as one line.

    Args:
        args: slime's arguments, with ``hpo_policy`` and its setting where the user gave them.
        samples: slime's ``Sample`` objects, all of one rollout.

    Returns:
        Raw rewards, and w_i A_i; one float for each sample, in their order.

    Raises:
        ConfigError: An option under which the loss is not HPO's, an unknown policy or setting, or a setting out of
            range or of another policy. It is raised after the first rollout, when slime calls the hook.
        RewardError: A reward is NaN or infinite.
        ValueError: A rollout is split into several samples, or a sample has no group.
    """
    for name, needed, remedy in _REQUIRED:
        # Older versions of slime lack some of them.
        if (found := getattr(args, name, needed)) != needed:
            raise ConfigError(f"{name}={found!r} does not give HPO's objective: {remedy}.")
    known = {f"hpo_{name}": name for name in settings()}
    if unknown := sorted(name for name in vars(args) if name.startswith("hpo_") and name not in {*known, "hpo_policy"}):
        raise ConfigError(f"{unknown[0]} is not a setting of HPO; the settings are {', '.join(known)} and hpo_policy.")
    given = {name: getattr(args, key, None) for key, name in known.items()}
    variant, values = resolve(getattr(args, "hpo_policy", "ahpo"), given, prefix="hpo_")
    if args.n_samples_per_prompt < 2:
        raise ConfigError(
            f"n_samples_per_prompt={args.n_samples_per_prompt}: every advantage would be 0, because advantages are "
            "group-relative. Set --n-samples-per-prompt to 2 or more, for example 8."
        )
    rollouts = [sample.rollout_id for sample in samples if sample.rollout_id is not None]
    if len(set(rollouts)) != len(rollouts):
        raise ValueError(
            "several samples have the same rollout_id, and HPO would count each as a response; hpo_plugin.slime "
            "supports one sample per rollout."
        )
    if any(sample.group_index is None for sample in samples):
        raise ValueError(
            "a sample has group_index=None, so its group is unknown; set group_index in the rollout function."
        )
    rewards = [float(sample.get_reward_value(args)) for sample in samples]
    lengths = torch.tensor([_tokens(sample) for sample in samples])
    groups = torch.unique(torch.tensor([sample.group_index for sample in samples]), return_inverse=True)[1]
    result = hysteretic_advantage(
        torch.tensor(rewards),
        groups,
        lambda counts: variant.alpha(counts, values),
        valid=lengths > 0,
        lengths=lengths,
        normalize_by_std=args.grpo_std_normalization,
    )
    metrics = step_metrics([result.statistics])
    logger.info("%s: %s", variant.title, ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    return rewards, result.weighted.tolist()


def _tokens(sample: Any) -> int:
    """Tokens of a sample in the loss."""
    if sample.remove_sample:
        return 0
    return sample.response_length if sample.loss_mask is None else sum(sample.loss_mask)
