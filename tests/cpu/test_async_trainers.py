"""Short runs of verl's trainers on CPU from verl's stock config and one key, and their first step against V1 sync.

The first step's responses are drawn from the same prompts and weights with the same seeds, so that its numbers agree.
"""

from __future__ import annotations

import math

import pytest
from test_e2e import LIMIT_S, ON_CPU, train

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(2 * LIMIT_S + 100)]

STOCK = [
    *ON_CPU,
    "+algorithm.policy_loss=ahpo",
    "+algorithm.hpo.observe=true",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
]
GLOO = "actor_rollout_ref.rollout.checkpoint_engine.backend=gloo"
SEPARATE_ASYNC = [
    "trainer.v1.trainer_mode=separate_async",
    "actor_rollout_ref.rollout.nnodes=1",
    "actor_rollout_ref.rollout.n_gpus_per_node=1",
    GLOO,
    # The separate server is the second replica, whose seed is larger by 1.
    "actor_rollout_ref.rollout.seed=0",
]
EXPERIMENTAL = [
    # Their configs look for verl's own in a checkout.
    "hydra.searchpath=[pkg://verl.trainer.config]",
    "rollout.nnodes=1",
    "rollout.n_gpus_per_node=1",
    "actor_rollout_ref.hybrid_engine=False",
    GLOO,
]
ONE_STEP_OFF = {
    "module": "verl.experimental.one_step_off_policy.main_ppo",
    "config_name": "one_step_off_ppo_trainer",
}
FULLY_ASYNC = {
    "module": "verl.experimental.fully_async_policy.fully_async_main",
    "config_name": "fully_async_ppo_trainer",
}

#: Of the first step. A gradient norm is the same up to the order of a sum.
COMPARED = (
    "critic/rewards/mean",
    "actor/hpo/share_positive",
    "actor/hpo/share_negative",
    "actor/hpo/alpha",
    "actor/hpo/response_length",
    "actor/pg_loss",
    "actor/grad_norm",
)


@pytest.fixture(scope="module")
def sync(inputs, tmp_path_factory):
    """The first step of V1 sync."""
    return train(inputs, tmp_path_factory.mktemp("sync"), *STOCK, config_name="ppo_trainer", steps=1)[1]


def check(steps):
    for step in steps.values():
        assert 0.1 <= step["actor/hpo/alpha"] <= 1
        assert 0 < step["actor/hpo/share_positive"] < 1
        assert 0 < step["actor/grad_norm"] < math.inf
        assert math.isfinite(step["actor/pg_loss"])
        # What is observed in a run of A-HPO is what A-HPO does.
        for name in ("alpha", "share_positive", "share_negative", "share_degenerate_groups"):
            assert step[f"actor/hpo/observe/{name}"] == pytest.approx(step[f"actor/hpo/{name}"])


def check_alpha_is_of_the_step(steps):
    check(steps)
    for step in steps.values():
        positive, negative = step["actor/hpo/share_positive"], step["actor/hpo/share_negative"]
        assert step["actor/hpo/alpha"] == pytest.approx(min(1.0, max(0.1, positive / negative)))


def check_same(step, sync, names=COMPARED):
    assert {name: step[name] for name in names} == pytest.approx({name: sync[name] for name in names}, rel=1e-4)


def test_colocate_async_takes_steps_and_its_first_one_is_syncs(inputs, tmp_path, sync):
    """Generation runs ahead of training, and what is aborted for an update is continued after it."""
    steps = train(
        inputs, tmp_path, *STOCK, "trainer.v1.trainer_mode=colocate_async", config_name="ppo_trainer", steps=4
    )
    check_alpha_is_of_the_step(steps)
    check_same(steps[1], sync)


def test_separate_async_takes_steps_and_its_first_one_is_syncs(inputs, tmp_path, sync):
    settings = [*STOCK, *SEPARATE_ASYNC, "trainer.v1.separate_async.parameter_sync_step=1"]
    steps = train(inputs, tmp_path, *settings, config_name="ppo_trainer", steps=3)
    check_alpha_is_of_the_step(steps)
    check_same(steps[1], sync)


def test_separate_async_has_an_alpha_of_each_local_update_and_restores_the_old_policy(inputs, tmp_path, sync):
    """The second update's π_old is the policy of the rollout, whose weights were set aside before the first one."""
    local = ["trainer.v1.separate_async.parameter_sync_step=2", "actor_rollout_ref.actor.ppo_mini_batch_size=4"]
    steps = train(inputs, tmp_path, *STOCK, *SEPARATE_ASYNC, *local, config_name="ppo_trainer", steps=3)
    check(steps)
    for step in steps.values():
        of_updates = [step[f"actor/hpo/alpha_update_{update}"] for update in (1, 2)]
        assert step["actor/hpo/alpha"] == pytest.approx(sum(of_updates) / 2)
    assert steps[1]["training/rollout_probs_diff_max"] < 1e-7
    check_same(steps[1], sync, ("critic/rewards/mean", "actor/hpo/response_length"))


def test_one_step_off_takes_steps_and_its_first_one_is_syncs(inputs, tmp_path, sync):
    steps = train(inputs, tmp_path, *STOCK, *EXPERIMENTAL, **ONE_STEP_OFF, steps=3)
    check_alpha_is_of_the_step(steps)
    check_same(steps[1], sync)


def test_fully_async_takes_steps_and_its_first_one_is_syncs(inputs, tmp_path, sync):
    """It logs a training step when the next one has begun, and the last one not at all."""
    settings = [
        "data.train_batch_size=0",
        "rollout.n=8",
        "rollout.total_rollout_steps=32",
        "async_training.trigger_parameter_sync_step=1",
    ]
    logged = train(inputs, tmp_path, *STOCK, *EXPERIMENTAL, *settings, **FULLY_ASYNC, steps=4)
    steps = {number: step for number, step in logged.items() if "actor/grad_norm" in step}
    assert sorted(steps) == [2, 3, 4]
    check_alpha_is_of_the_step(steps)
    check_same(steps[2], sync)
