"""Config node of the actor's policy loss, extended by the name of the advantage estimator.

verl's ``PolicyLossConfig`` is a closed dataclass, so a new field needs a subclass, which the key ``_target_`` names
(verl/workers/config/actor.py). ``configs/hpo.yaml`` sets this key. In verl's stock config, ``verl/seams.py`` sets it.
"""

from __future__ import annotations

from dataclasses import dataclass

from verl.workers.config import PolicyLossConfig

from hpo_plugin.verl.registration import require_registered

__all__ = ["HPOPolicyLossConfig"]


@dataclass
class HPOPolicyLossConfig(PolicyLossConfig):
    """``actor_rollout_ref.actor.policy_loss`` with the advantage estimator, which HPO's policy loss requires.

    Args:
        adv_estimator: copy of ``algorithm.adv_estimator``, which verl does not pass to workers.

    Raises:
        ConfigError: if the loss mode is a variant and the estimator is not the same variant. verl constructs this node
            in the driver (``validate_config``) and in every worker.
        RegistrationError: if the plugin has not registered what the config selects.
    """

    adv_estimator: str = "grpo"

    def __post_init__(self) -> None:
        """Raise in the driver, before the first rollout."""
        require_registered(self.adv_estimator, self.loss_mode)
