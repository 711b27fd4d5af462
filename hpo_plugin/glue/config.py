"""``_target_: hpo_plugin.glue.config.HPOPolicyLossConfig`` of configs that version 0.1.0 saved."""

from __future__ import annotations

from dataclasses import dataclass

from hpo_plugin.verl import config


@dataclass
class HPOPolicyLossConfig(config.HPOPolicyLossConfig):
    """The node with the two copies that version 0.1.0 saved in it. The estimator reads ``algorithm.hpo`` instead.

    Attributes:
        alpha: Copy of ``algorithm.hpo.alpha``.
        alpha_min: Copy of ``algorithm.hpo.alpha_min``.
    """

    alpha: float = 0.6
    alpha_min: float = 0.1
