"""Short runs of verl's legacy trainer on CPU, from verl's stock config and one key.

The V1 sync trainer is in ``test_e2e.py``, the asynchronous ones are in ``test_async_trainers.py``.
"""

from __future__ import annotations

import math

import pytest
from test_e2e import LIMIT_S, ON_CPU, train

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(LIMIT_S + 100)]

LEGACY = [*ON_CPU, "trainer.use_v1=False"]


@pytest.mark.parametrize("bypass", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_legacy_trainer_takes_steps_from_one_key_on_the_stock_config(inputs, tmp_path, bypass):
    """A proxy in the place of a function of verl would stop Ray, and α applied twice would show in bypass mode.

    On policy a token's loss is −w A, so that the shares of the loss are those of the weighted advantages.
    """
    settings = ["+algorithm.policy_loss=ahpo", f"algorithm.rollout_correction.bypass_mode={bypass}"]
    one_update = "actor_rollout_ref.actor.ppo_mini_batch_size=8"
    steps = train(inputs, tmp_path, *LEGACY, *settings, one_update, config_name="ppo_trainer")
    for step in steps.values():
        positive, negative = step["actor/hpo/share_positive"], step["actor/hpo/share_negative"]
        assert step["actor/hpo/alpha"] == pytest.approx(min(1.0, max(0.1, positive / negative)))
        assert 0.1 <= step["actor/hpo/alpha"] < 1
        assert 0 < step["actor/grad_norm"] < math.inf
        loss = step["actor/hpo/pg_loss_negative"] / -step["actor/hpo/pg_loss_positive"]
        share = step["actor/hpo/abs_advantage_share_negative"] / step["actor/hpo/abs_advantage_share_positive"]
        assert loss == pytest.approx(share, rel=1e-3)
    said = (tmp_path / "output.log").read_text(encoding="utf-8", errors="replace")
    assert "[hpo_plugin] algorithm.adv_estimator: gae -> ahpo" in said


@pytest.mark.slow
def test_the_legacy_trainer_without_hpo_takes_steps_with_the_plugin_installed(inputs, tmp_path):
    steps = train(inputs, tmp_path, *LEGACY, "algorithm.adv_estimator=grpo", config_name="ppo_trainer")
    for step in steps.values():
        assert 0 < step["actor/grad_norm"] < math.inf
        assert not [key for key in step if "hpo" in key]
    assert "[hpo_plugin]" not in (tmp_path / "output.log").read_text(encoding="utf-8", errors="replace")
