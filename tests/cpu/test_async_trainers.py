"""Short runs of verl's asynchronous V1 trainer on CPU.

``separate_async``, one-step-off and fully-async need a checkpoint engine, of which verl has none for a CPU
(``docs/trainers.md``).
"""

from __future__ import annotations

import math

import pytest
from test_e2e import LIMIT_S, train

#: The CPU backend has one for the sync trainer only.
VERLS_SAMPLER = "trainer.v1.sampler.custom_sampler.path=null"

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(LIMIT_S + 100)]


def test_colocate_async_takes_steps_with_batches_of_other_weights(inputs, tmp_path):
    """Generation runs ahead of training, and what is aborted for an update is continued after it."""
    steps = train(inputs, tmp_path, "trainer.v1.trainer_mode=colocate_async", VERLS_SAMPLER, steps=4)
    for step in steps.values():
        positive, negative = step["actor/hpo/share_positive"], step["actor/hpo/share_negative"]
        assert step["actor/hpo/alpha"] == pytest.approx(min(1.0, max(0.1, positive / negative)))
        assert 0 < step["actor/grad_norm"] < math.inf
        assert math.isfinite(step["actor/pg_loss"])
