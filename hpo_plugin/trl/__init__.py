"""HPO and A-HPO in TRL: ``from hpo_plugin.trl import HPOConfig, HPOTrainer``."""

from hpo_plugin.trl.config import HPOConfig
from hpo_plugin.trl.trainer import HPOTrainer

__all__ = ["HPOConfig", "HPOTrainer"]
