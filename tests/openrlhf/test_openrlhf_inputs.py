"""Generated batches through OpenRLHF's own method; ``tests/torture`` has them with OpenRLHF's formula."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("openrlhf.cli", reason="OpenRLHF is not installed (make test-openrlhf)")

import openrlhf_harness as harness
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

from torture.algorithm_inputs import batch, check_openrlhf


@pytest.mark.parametrize("estimator", ["group_norm", "dr_grpo"])
def test_rewards_give_the_oracles_result_or_the_documented_error(estimator):
    changes = {"rollout.n_samples_per_prompt": 4, "train.batch_size": 32, "algo.advantage.estimator": estimator}
    arguments = harness.parse(harness.REQUIRED + harness.words(harness.OPTIONS | changes))

    def advantages(experiences: list[Any]) -> list[Any]:
        maker = RemoteExperienceMaker(
            None, None, None, None, SimpleNamespace(value=0.0), SimpleNamespace(args=arguments), None
        )
        given = [
            Experience(
                index=experience.index,
                action_mask=experience.action_mask.long(),
                rewards=experience.rewards,
                response_length=experience.action_mask.long().sum(dim=1),
                kl=torch.zeros(experience.action_mask.shape),
                info={},
            )
            for experience in experiences
        ]
        return maker.compute_advantages_and_returns(given)

    for seed in range(200):
        assert check_openrlhf(batch(random.Random(seed), least=4), advantages) == [], seed
