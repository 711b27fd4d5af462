"""The probe of bad rewards for ``HPOTrainer``, with few batches."""

from __future__ import annotations

import pytest

pytest.importorskip("trl", minversion="1.10", exc_type=ImportError, reason="TRL is not installed (make test-trl)")

from hpo_plugin import algorithm
from torture.trl_inputs import many


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_rewards_give_the_oracles_result_or_the_documented_error(tmp_path, scale):
    found = many(40, 0, tmp_path, scale_rewards=scale)
    assert found.failures == []
    assert found.inputs == 40


@pytest.mark.parametrize(("name", "value"), [("REWARD_LIMIT", 1e300), ("ROUNDING", 0.0)])
def test_a_fault_is_found(monkeypatch, tmp_path, name, value):
    monkeypatch.setattr(algorithm, name, value)
    assert many(40, 0, tmp_path, scale_rewards="group").failures
