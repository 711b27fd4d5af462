"""The gradient of every optimizer step of OpenRLHF's ``ppo_train`` is that of ``hpo_loss`` on the whole batch.

Cases run in processes of their own (``openrlhf_harness.py``), one after another in each.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("openrlhf.cli", reason="OpenRLHF is not installed (make test-openrlhf)")

pytestmark = pytest.mark.timeout(600)

HARNESS = Path(__file__).with_name("openrlhf_harness.py")

TWO_UPDATES = {"train.batch_size": 32, "train.max_epochs": 2}

DYNAMIC = {
    "train.batch_size": 32,
    "train.dynamic_batch_enable": True,
    "train.max_tokens_per_gpu": 60,
    "rollout.max_tokens_per_gpu": 60,
}

#: Cases over one and over two processes; options are OpenRLHF's.
CASES: dict[str, dict[str, Any]] = {
    "A-HPO": {},
    "HPO": {"policy": "hpo", "settings": {"alpha": 0.6}},
    "HPO, α = 0": {"policy": "hpo", "settings": {"alpha": 0.0}},
    "dr_grpo": {"options": {"algo.advantage.estimator": "dr_grpo"}},
    "2 updates, 2 epochs": {"options": TWO_UPDATES},
    "ZeRO 1, 2 updates, 2 epochs": {"options": TWO_UPDATES | {"ds.zero_stage": 1}},
    "ZeRO 2": {"options": {"ds.zero_stage": 2}},
    "ZeRO 3, 2 updates, 2 epochs": {"options": TWO_UPDATES | {"ds.zero_stage": 3}},
    "dynamic batch, 2 updates": {"options": DYNAMIC},
    "dynamic batch, ZeRO 3, 2 updates": {"options": DYNAMIC | {"ds.zero_stage": 3}},
    "KL loss": {"options": {"algo.kl.init_coef": 0.1, "algo.kl.use_loss": True, "algo.kl.estimator": "k3"}},
    "dual clip": {"options": {"actor.dual_clip": 1.1}},
    "overlong penalty": {
        "policy": "hpo",
        "options": {"reward.overlong_buffer_len": 8, "rollout.max_new_tokens": 20},
    },
    "a reward equal to the mean": {"graded": True},
}

FAULTS: dict[str, dict[str, Any]] = {
    # DeepSpeed keeps the gradient of the last micro-batch only.
    "dynamic batch, ZeRO 1 (refused)": {"options": DYNAMIC | {"ds.zero_stage": 1}, "refused": True},
    "dynamic batch, ZeRO 2 (refused)": {"options": DYNAMIC | {"ds.zero_stage": 2}, "refused": True},
    # The first step is exact; the others begin and end in the middle of OpenRLHF's.
    "batches of 48 of 64, 3 epochs (refused)": {
        "options": {"train.batch_size": 48, "train.max_epochs": 3},
        "refused": True,
    },
    "no α": {"fault": "no alpha"},
    "α of each micro-batch": {"fault": "alpha of each micro-batch"},
    "α of each process": {"fault": "alpha of each process"},
}


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, load_script: Callable[[str], ModuleType]
) -> dict[str, Any]:
    faults = {name: case for name, case in FAULTS.items() if request.param > 1 or name != "α of each process"}
    folder = tmp_path_factory.mktemp(f"processes{request.param}")
    return load_script("exactness_page").run_cases(HARNESS, request.param, CASES | faults, folder)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_reference(results: Any, name: str) -> None:
    result, options = results[name], CASES[name].get("options", {})
    assert len(result["errors"]) == 64 // options.get("train.batch_size", 64) * options.get("train.max_epochs", 1)
    assert max(result["errors"]) < 1e-6, result["errors"]
    # Off policy, so that ratios and their clipping are in it; and an α that makes a difference.
    assert result["largest_ratio"] > 0.2
    assert result["alpha"] < 1


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_would_be_seen(results: Any, name: str) -> None:
    if name not in results:
        pytest.skip("one process")
    assert max(results[name]["errors"]) > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_openrlhf_logs_the_metrics(results: Any, name: str) -> None:
    status = results[name]["status"]
    assert status["hpo/alpha"] == pytest.approx(results[name]["alpha"], rel=1e-6)
    if CASES[name].get("policy", "ahpo") == "ahpo":
        ratio = status["hpo/share_positive"] / status["hpo/share_negative"]
        assert status["hpo/alpha"] == pytest.approx(max(0.1, min(1, ratio)), rel=1e-3)
    # What OpenRLHF logs itself is there, too.
    assert {"reward", "return", "group_reward_std", "policy_loss"} <= status.keys()


def test_only_the_first_step_is_exact_if_batches_do_not_divide(results: Any) -> None:
    errors = results["batches of 48 of 64, 3 epochs (refused)"]["errors"]
    assert len(errors) == 64 * 3 // 48
    assert errors[0] < 1e-6
    assert min(errors[1:]) > 1e-2


def test_micro_batches_were_permuted(results: Any) -> None:
    assert results["dynamic batch, 2 updates"]["permuted"]
    assert not results["A-HPO"]["permuted"]
