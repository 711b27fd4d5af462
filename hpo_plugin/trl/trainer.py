"""TRL's ``GRPOTrainer`` with HPO's advantages."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import trl
from packaging.version import Version
from torch import Tensor
from trl import GRPOTrainer

from hpo_plugin.algorithm import HystereticAdvantage, RewardError, group_relative_advantage, hysteretic_advantage
from hpo_plugin.errors import ConfigError
from hpo_plugin.metrics import observation_metrics, observe, step_metrics
from hpo_plugin.trl.config import HPOConfig
from hpo_plugin.variants import VARIANTS

__all__ = ["HPOTrainer"]

#: Older ones divide the loss of ``loss_type="dapo"`` by another number of tokens (docs/trl.md).
OLDEST_TRL = "1.10"

#: Methods of ``GRPOTrainer``: the first is overridden, the result of the second is read. TRL has had both since 0.21.
METHODS = ("_generate_and_score_completions", "_calculate_rewards")

if Version(trl.__version__) < Version(OLDEST_TRL):
    raise ImportError(
        f"hpo_plugin.trl needs trl>={OLDEST_TRL}, but trl {trl.__version__} is installed; run: pip install -U trl"
    )
if moved := [name for name in METHODS if not callable(getattr(GRPOTrainer, name, None))]:
    raise ImportError(
        f"trl {trl.__version__} has no GRPOTrainer.{moved[0]}, which hpo_plugin.trl needs. Install an older trl; "
        "docs/trl.md lists the tested versions."
    )


class HPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` whose negative advantages are multiplied by α.

    The advantages are TRL's own. α is a statistic of the generation batch: all prompts, completions and processes
    of one generation. It is computed and applied once per generation, in training and in evaluation, so that every
    update of ``num_iterations`` and ``steps_per_generation`` uses the same weights. Metrics are logged as
    ``hpo/…``. With ``observe=True`` no α is applied: the run is that of ``trl.GRPOTrainer``, bit for bit, and logs
    ``hpo/observe/…`` only.

    Args:
        model: See ``trl.GRPOTrainer``.
        reward_funcs: See ``trl.GRPOTrainer``.
        args: The config; the defaults of :class:`HPOConfig`, if None.
        more: Further arguments of ``trl.GRPOTrainer``.
        kwargs: Further arguments of ``trl.GRPOTrainer``.

    Raises:
        TypeError: ``args`` is a plain ``GRPOConfig``.
        ConfigError: ``use_liger_kernel`` with a TRL whose Liger loss is not normalized by the generation batch.
    """

    # For the model card that TRL writes.
    _tag_names: ClassVar[list[str]] = ["trl", "hpo"]
    _name: ClassVar[str] = "HPO"
    _paper: ClassVar[dict[str, str]] = {
        "title": "Hysteretic Policy Optimization",
        "id": "2605.30201",
        "citation": "@article{sana2026hysteretic,\n    title = {Hysteretic Policy Optimization},\n"
        "    author = {Sana and Piovesan and De Domenico and Ayed and Zhang},\n"
        "    year = 2026,\n    eprint = {arXiv:2605.30201},\n}",
    }

    # GRPOTrainer's.
    _calculate_rewards: Callable[..., Tensor]

    # Warn only once about batches without metrics.
    _warned = False

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: HPOConfig | None = None, *more: Any, **kwargs: Any
    ) -> None:
        """Check the type of the config, and build TRL's trainer."""
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            args = HPOConfig(f"{name.rpartition('/')[2] or 'model'}-HPO")
        if not isinstance(args, HPOConfig):
            raise TypeError(
                f"args is a {type(args).__name__}, but HPOTrainer requires an HPOConfig, which has all fields of "
                "GRPOConfig (from hpo_plugin.trl import HPOConfig)."
            )
        if args.observe:
            # GRPO trains the model, so the model card names GRPO.
            for name in ("_tag_names", "_name", "_paper"):
                setattr(self, name, getattr(GRPOTrainer, name))
        elif args.use_liger_kernel and hasattr(GRPOTrainer, "compute_liger_loss"):
            raise ConfigError(
                f"use_liger_kernel=True: Liger's loss in trl {trl.__version__} divides by the tokens of a micro-batch, "
                "not by the batch's mean length as HPO does. Set use_liger_kernel=False, or install trl>=1.16."
            )
        super().__init__(model, reward_funcs, args, *more, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        # TRL does not return the rewards with the advantages. (N, functions), of all processes, as TRL uses them: a
        # subclass may have changed them.
        rewards: list[Tensor] = []
        calculate = self._calculate_rewards

        def recorded(*args: Any, **kwargs: Any) -> Tensor:
            rewards.append(calculate(*args, **kwargs))
            return rewards[-1]

        self._calculate_rewards = recorded
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            del self._calculate_rewards
        mode = "train" if self.model.training else "eval"
        local, mask = output["advantages"], output["completion_mask"]
        if "tool_mask" in output:
            mask = mask * output["tool_mask"]
        trained = mask.any(dim=1)
        if "importance_sampling_ratio" in output:
            # vLLM's correction gives what it rejects the ratio 0: (B, T) of tokens, where padding has 1, or (B, 1).
            trained = trained & ((output["importance_sampling_ratio"] != 0) & mask.bool()).any(dim=1)
        columns = torch.stack([local, mask.sum(dim=1).to(local), trained.to(local)], dim=1)
        advantages, lengths, valid = self.accelerator.gather(columns).unbind(dim=1)
        args: HPOConfig = self.args
        try:
            result = self._hysteretic_advantage(rewards[-1], advantages, lengths, valid.bool(), mode)
        except RewardError as error:
            if not args.observe:
                raise
            if not self._warned:
                self._warned = True
                logging.getLogger(__name__).warning(f"observe=True: skipped the metrics of a generation batch: {error}")
            return output
        metrics = observation_metrics([observe(result, lengths, args.settings_of_policy()["alpha_min"])])
        if not args.observe:
            start = self.accelerator.process_index * len(local)
            output["advantages"] = result.weighted[start : start + len(local)]
            metrics |= step_metrics([result.statistics])
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)
        return output

    def _hysteretic_advantage(
        self, rewards_per_function: Tensor, advantages: Tensor, lengths: Tensor, trained: Tensor, mode: str
    ) -> HystereticAdvantage:
        """TRL's advantages of the whole generation batch, negative ones times α.

        Args:
            rewards_per_function: (N, functions), NaN where a reward function returned None.
            advantages: (N,) of all processes.
            lengths: (N,) tokens that enter the loss.
            trained: (N,) bool: the completion enters the loss.
            mode: ``"train"`` or ``"eval"``.

        Returns:
            The weighted advantages (N,), and the statistics of the batch.

        Raises:
            RewardError: A reward is infinite, or above ``REWARD_LIMIT`` of :mod:`hpo_plugin.algorithm`.
            ValueError: The rule of a variant gives an α outside of [0, 1].
        """
        weights = self.reward_weights.to(advantages.device)
        # Completions that no function scored: TRL leaves them out of their group.
        scored = ~rewards_per_function.isnan().all(dim=1)
        weighted = rewards_per_function * weights
        rewards = torch.where(scored, weighted.nansum(dim=1), 0.0)
        generations = self.num_generations if mode == "train" else self.num_generations_eval
        groups = torch.arange(len(rewards), device=rewards.device) // generations
        own = group_relative_advantage(rewards, groups, valid=scored, magnitude=weighted.abs().nansum(dim=1))
        of_group = self.multi_objective_aggregation == "sum_then_normalize"
        if of_group:
            # TRL's fp32 mean is not exactly equal to a reward that equals it; A-HPO would count the rounding's sign.
            advantages = advantages.masked_fill(own.advantage == 0, 0.0)
        args: HPOConfig = self.args
        result = hysteretic_advantage(
            rewards,
            groups,
            lambda counts: VARIANTS[args.policy].alpha(counts, args.settings_of_policy()),
            valid=scored & trained,
            lengths=lengths,
            base=advantages,
            base_is_zero_without_signal=False,
        )
        if not of_group:
            return result
        statistics = result.statistics._replace(
            groups=len(groups[scored].unique()), degenerate_groups=len(groups[own.degenerate].unique())
        )
        return result._replace(statistics=statistics)
