"""The actor's ``policy_loss`` config node, extended: how α reaches the workers.

verl's ``PolicyLossConfig`` is a closed dataclass, so a new field needs a subclass named by ``_target_``
(verl/workers/config/actor.py). Our yaml names it; for verl's stock yaml the plugin does (``glue/seams.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

from verl.workers.config import PolicyLossConfig

from hpo_plugin.glue import arms
from hpo_plugin.glue.registration import require_registered

__all__ = ["HPOPolicyLossConfig"]


@dataclass
class HPOPolicyLossConfig(PolicyLossConfig):
    """``actor_rollout_ref.actor.policy_loss`` with what the loss and the worker of HPO need to know.

    Args:
        adv_estimator: copy of ``algorithm.adv_estimator``, which a worker does not see otherwise.
        alpha: α of ``hpo``; copy of ``algorithm.hpo.alpha``.
        alpha_min: α_min of ``ahpo``; copy of ``algorithm.hpo.alpha_min``.

    Raises:
        ConfigError: when built, if estimator and loss mode contradict each other. verl builds it in the driver
            (``validate_config``) and again in every worker.
        RegistrationError: when built, if the plugin has not registered what the config selects.
    """

    adv_estimator: str = "grpo"
    alpha: float = arms.DEFAULT_ALPHA
    alpha_min: float = arms.DEFAULT_ALPHA_MIN

    def __post_init__(self) -> None:
        """Fail in the driver rather than after a rollout."""
        require_registered(self.adv_estimator, self.loss_mode)

    @property
    def hysteresis(self) -> str | None:
        """``hpo``, ``ahpo`` or None."""
        return arms.entrance(self.adv_estimator, self.loss_mode)[0]

    @property
    def weigh(self) -> arms.Weigh | None:
        """Who applies the weights."""
        return arms.entrance(self.adv_estimator, self.loss_mode)[1]
