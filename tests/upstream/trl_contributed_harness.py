"""``tests/trl/trl_harness.py`` with the contributed trainer in place of the plugin's, in a TRL that has it.

The contributed config has no ``policy``: without ``alpha`` it is A-HPO.
"""

import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

from trl.experimental import hpo

import hpo_plugin.trl


@dataclass
class Config(hpo.HPOConfig):
    policy: str = "ahpo"

    def __post_init__(self):
        super().__post_init__()
        assert (self.policy == "ahpo") == (self.alpha is None)

    def settings_of_policy(self):
        return {"alpha": self.alpha, "alpha_min": self.alpha_min}


hpo_plugin.trl.HPOConfig, hpo_plugin.trl.HPOTrainer = Config, hpo.HPOTrainer
harness = Path(__file__).parents[1] / "trl" / "trl_harness.py"
sys.path.insert(0, str(harness.parent))
runpy.run_path(str(harness), run_name="__main__")
