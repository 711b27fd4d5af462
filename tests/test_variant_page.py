"""The module of ``docs/variants.md`` is an algorithm of verl by that page alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "variants.md"

FACTS = """
import json
import numpy as np
import torch
import verl.trainer.config
from hydra import compose, initialize_config_dir
from verl.trainer.ppo import core_algos
from verl.utils.config import omega_conf_to_dataclass, validate_config

overrides = [
    "+algorithm.policy_loss=sqrt_hpo",
    "+algorithm.hpo.alpha_min=0.2",
    "actor_rollout_ref.rollout.n=5",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
]
with initialize_config_dir(list(verl.trainer.config.__path__)[0], version_base=None):
    config = compose("ppo_trainer", overrides)
validate_config(config, use_reference_policy=False, use_critic=True)
rewards = torch.zeros(10, 2)
rewards[0, 1] = 1
index = np.array(["a"] * 5 + ["b"] * 5, dtype=object)
estimate = core_algos.get_adv_estimator_fn(config.algorithm.adv_estimator)
mask = torch.ones(10, 2, dtype=torch.long)
weighted, plain = estimate(token_level_rewards=rewards, response_mask=mask, index=index, config=config.algorithm)
print(json.dumps({
    "estimator": config.algorithm.adv_estimator,
    "loss_mode": config.actor_rollout_ref.actor.policy_loss.loss_mode,
    "loss": core_algos.get_policy_loss_fn("sqrt_hpo").args,
    "knows": omega_conf_to_dataclass(config.actor_rollout_ref.actor).policy_loss.adv_estimator,
    "weights": (weighted[:5, 0] / plain[:5, 0]).tolist(),
}))
"""


@pytest.mark.timeout(400)
def test_the_module_of_the_page_is_an_estimator_and_a_policy_loss_of_verl(tmp_path):
    """1 positive, 4 negatives: α = √(1/4)."""
    (module,) = re.findall(r"```python\n(\"\"\"HPO with.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "sqrt_hpo.py").write_text(module, encoding="utf-8")
    environment = os.environ | {"VERL_USE_EXTERNAL_MODULES": "sqrt_hpo", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", FACTS], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "estimator": "sqrt_hpo",
        "loss_mode": "sqrt_hpo",
        "loss": ["sqrt_hpo"],
        "knows": "sqrt_hpo",
        "weights": pytest.approx([1, 0.5, 0.5, 0.5, 0.5]),
    }
    assert "[hpo_plugin] algorithm.adv_estimator: gae -> sqrt_hpo" in done.stdout
