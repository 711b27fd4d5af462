"""TRL's ``GRPOTrainer`` with HPO's advantages: the adapter, and all of it that touches TRL."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import trl
from packaging.version import Version
from torch import Tensor
from trl import GRPOTrainer

from hpo_plugin.algorithm import group_relative_advantage, hysteretic_advantage
from hpo_plugin.metrics import step_metrics
from hpo_plugin.trl.config import HPOConfig
from hpo_plugin.variants import VARIANTS

__all__ = ["HPOTrainer"]

#: Older ones divide the loss of ``loss_type="dapo"`` by another number of tokens (docs/trl.md).
OLDEST_TRL = "1.10"

#: Methods of ``GRPOTrainer`` that are overridden. TRL has had both since 0.21.
OVERRIDDEN = ("_generate_and_score_completions", "_calculate_rewards")

if Version(trl.__version__) < Version(OLDEST_TRL):
    raise ImportError(
        f"hpo_plugin.trl needs trl>={OLDEST_TRL}, and trl {trl.__version__} is installed: pip install -U trl"
    )
if moved := [name for name in OVERRIDDEN if not callable(getattr(GRPOTrainer, name, None))]:
    raise ImportError(
        f"trl {trl.__version__} has no GRPOTrainer.{moved[0]}, which hpo_plugin.trl overrides. Install an older trl "
        f"(docs/trl.md names the versions that were tested)."
    )


class HPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` whose negative advantages are multiplied by α.

    The advantages are TRL's own. α is a statistic of the generation batch: all prompts, completions and processes
    between two generations. It is computed and applied once for each of them, in training and in evaluation, so that
    every update of ``num_iterations`` and ``steps_per_generation`` uses the same weights. Metrics are logged as
    ``hpo/…``.

    Args:
        model: See ``trl.GRPOTrainer``.
        reward_funcs: See ``trl.GRPOTrainer``.
        args: The config; the defaults of :class:`HPOConfig`, if None.
        more: Further arguments of ``trl.GRPOTrainer``.
        kwargs: Further arguments of ``trl.GRPOTrainer``.

    Raises:
        TypeError: ``args`` is a plain ``GRPOConfig``.
    """

    # For the model card that TRL writes.
    _tag_names: ClassVar[list[str]] = ["trl", "hpo"]
    _name: ClassVar[str] = "HPO"
    _paper: ClassVar[dict[str, str]] = {"title": "Hysteretic Policy Optimization", "id": "2605.30201"}

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: HPOConfig | None = None, *more: Any, **kwargs: Any
    ) -> None:
        """Check the type of the config, and build TRL's trainer."""
        if args is None:
            args = HPOConfig()
        if not isinstance(args, HPOConfig):
            raise TypeError(
                f"args is a {type(args).__name__}: HPOTrainer takes an HPOConfig, which has all fields of GRPOConfig "
                "(from hpo_plugin.trl import HPOConfig)."
            )
        super().__init__(model, reward_funcs, args, *more, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        # (N, functions), of all processes; TRL does not return them with the advantages.
        self._rewards_of_functions = super()._calculate_rewards(*args, **kwargs)
        return self._rewards_of_functions

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        mode = "train" if self.model.training else "eval"
        local, mask = output["advantages"], output["completion_mask"]
        if "tool_mask" in output:
            mask = mask * output["tool_mask"]
        gathered = self.accelerator.gather(torch.stack([local, mask.sum(dim=1).to(local)], dim=1))
        advantages, lengths = gathered.unbind(dim=1)
        result = self._hysteretic_advantage(advantages, lengths, mode)
        start = self.accelerator.process_index * len(local)
        output["advantages"] = result.weighted[start : start + len(local)]
        for name, value in step_metrics([result.statistics]).items():
            self._metrics[mode][name].append(value)
        return output

    def _hysteretic_advantage(self, advantages: Tensor, lengths: Tensor, mode: str) -> Any:
        """TRL's advantages of the whole generation batch, negative ones times α.

        Args:
            advantages: (N,) of all processes.
            lengths: (N,) tokens that enter the loss.
            mode: ``"train"`` or ``"eval"``.
        """
        per_function, weights = self._rewards_of_functions, self.reward_weights.to(advantages.device)
        # No function judged it: TRL leaves it out of its group.
        scored = ~per_function.isnan().all(dim=1)
        rewards = (per_function * weights).nansum(dim=1)
        generations = self.num_generations if mode == "train" else self.num_generations_eval
        groups = torch.arange(len(rewards), device=rewards.device) // generations
        if self.multi_objective_aggregation == "sum_then_normalize":
            # Rounding of the mean gives equal rewards an advantage; A-HPO would count its sign.
            degenerate = group_relative_advantage(
                rewards, groups, valid=scored, magnitude=(per_function * weights).abs().nansum(dim=1)
            ).degenerate
            advantages = advantages.masked_fill(degenerate, 0.0)
        args: HPOConfig = self.args
        return hysteretic_advantage(
            torch.where(scored, rewards, 0.0),
            groups,
            lambda counts: VARIANTS[args.policy].alpha(counts, args.settings_of_policy()),
            valid=scored & (lengths > 0),
            lengths=lengths,
            base=advantages,
            base_is_zero_without_signal=False,
        )
