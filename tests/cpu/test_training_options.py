"""A-HPO beside what runs combine it with, in verl's trainer on CPU. A reference model is in ``test_e2e.py``."""

from __future__ import annotations

import math

import pytest
from test_async_trainers import STOCK, check_alpha_is_of_the_step
from test_e2e import LIMIT_S, train

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(LIMIT_S + 100)]

#: The second mini-batch's π_old is not what the first one left, and the policy moves.
TWO_UPDATES = "actor_rollout_ref.actor.ppo_mini_batch_size=4"


def test_an_actor_with_lora_takes_steps_and_the_rollout_gets_merged_weights(inputs, tmp_path):
    lora = [
        "actor_rollout_ref.model.lora_rank=4",
        "actor_rollout_ref.model.lora.merge=True",
        "actor_rollout_ref.model.target_modules=all-linear",
    ]
    steps = train(inputs, tmp_path, *STOCK, *lora, config_name="ppo_trainer", steps=3)
    check_alpha_is_of_the_step(steps)
    for step in steps.values():
        # verl sends merged weights in bf16 (FSDPEngine._merged_lora_per_tensor_param): 2^-8 of a probability of 1/258.
        assert step["training/rollout_probs_diff_max"] < 1e-4
    # The adapter begins as zero: a rollout with the base model's weights would be seen at the third step.
    assert steps[3]["actor/grad_norm"] != pytest.approx(steps[1]["actor/grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    "correction",
    [
        ["rollout_is=token", "rollout_is_threshold=2.0"],
        ["rollout_is=sequence", "rollout_is_threshold=2.0", "rollout_rs=seq_mean_k1", "rollout_rs_threshold=0.9_1.1"],
    ],
    ids=["importance weights", "importance weights and rejection"],
)
def test_rollout_correction(inputs, tmp_path, correction):
    """Of batches that an earlier policy generated: colocate_async's from the second step on."""
    settings = [f"algorithm.rollout_correction.{value}" for value in correction]
    mode = "trainer.v1.trainer_mode=colocate_async"
    steps = train(inputs, tmp_path, *STOCK, TWO_UPDATES, mode, *settings, config_name="ppo_trainer", steps=3)
    check_alpha_is_of_the_step(steps)
    assert all(math.isfinite(step["rollout_corr/rollout_is_mean"]) for step in steps.values())
    assert steps[1]["rollout_corr/rollout_is_std"] < 1e-5 < steps[2]["rollout_corr/rollout_is_std"]
    if len(correction) > 2:
        assert steps[1]["rollout_corr/rollout_rs_seq_masked_fraction"] == 0
        assert max(step["rollout_corr/rollout_rs_seq_masked_fraction"] for step in steps.values()) > 0
