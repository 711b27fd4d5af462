"""The actor's ``policy_loss`` config node, extended: how a worker knows which estimator made the advantages.

verl's ``PolicyLossConfig`` is a closed dataclass, so a new field needs a subclass named by ``_target_``
(verl/workers/config/actor.py). Our yaml names it; for verl's stock yaml the plugin does (``verl/seams.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

from verl.workers.config import PolicyLossConfig

from hpo_plugin.verl.registration import require_registered

__all__ = ["HPOPolicyLossConfig"]


@dataclass
class HPOPolicyLossConfig(PolicyLossConfig):
    """``actor_rollout_ref.actor.policy_loss`` with what HPO's loss needs to know.

    Args:
        adv_estimator: copy of ``algorithm.adv_estimator``, which a worker does not see otherwise.

    Raises:
        ConfigError: when built, if the loss mode is a variant and the estimator is not the same one. verl builds it in
            the driver (``validate_config``) and again in every worker.
        RegistrationError: when built, if the plugin has not registered what the config selects.
    """

    adv_estimator: str = "grpo"

    def __post_init__(self) -> None:
        """Fail in the driver rather than after a rollout."""
        require_registered(self.adv_estimator, self.loss_mode)
