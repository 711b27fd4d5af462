"""The gradient of every optimizer step of ``HPOTrainer`` is that of ``hpo_loss`` on the whole batch.

Cases run in processes of their own (``trl_harness.py``), one after another in each.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("trl", minversion="1.10", exc_type=ImportError, reason="TRL is not installed (make test-trl)")

pytestmark = pytest.mark.timeout(1500)

HARNESS = Path(__file__).with_name("trl_harness.py")

#: Cases over one and over two processes.
CASES: dict[str, dict[str, Any]] = {
    "A-HPO": {},
    "A-HPO, fp64": {"dtype": "float64"},
    "HPO": {"policy": "hpo", "alpha": 0.6},
    "HPO, α = 0": {"policy": "hpo", "alpha": 0.0},
    "accumulation of 8": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8},
    "2 updates a generation": {"steps_per_generation": 8, "max_steps": 8},
    "masked truncation": {"mask_truncated_completions": True, "num_generations": 8},
    "dual clip": {"delta": 1.3, "learning_rate": 2.0},
    "groups of 2": {"num_generations": 2},
    "a reward equal to the mean": {
        "graded": True,
        "num_generations": 8,
        "per_device_train_batch_size": 8,
        "max_steps": 12,
    },
}

FAULTS: dict[str, dict[str, Any]] = {
    "no α": {"fault": "no alpha"},
    "α of each process": {"fault": "alpha of each process"},
}


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, load_script: Callable[[str], ModuleType]
) -> dict[str, Any]:
    # One process has no α of its own that would differ.
    faults = FAULTS if request.param > 1 else {"no α": FAULTS["no α"]}
    folder = tmp_path_factory.mktemp(f"processes{request.param}")
    return load_script("exactness_page").run_cases(HARNESS, request.param, CASES | faults, folder)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_reference(results: Any, name: str) -> None:
    result = results[name]
    assert len(result["errors"]) == CASES[name].get("max_steps", 6)
    # Rewards and advantages are fp32 in TRL, whatever the model is.
    assert max(result["errors"]) < 1e-6, result["errors"]
    # Off policy, so that ratios and their clipping are in it.
    assert result["largest_ratio"] > 0.2


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_alpha_would_be_seen(results: Any, name: str) -> None:
    if name not in results:
        pytest.skip("one process")
    assert max(results[name]["errors"]) > 1e-2


def test_the_logged_alpha_is_that_of_the_whole_batch_and_varies(results: Any) -> None:
    expected, logged = zip(*results["masked truncation"]["alphas"], strict=True)
    assert logged == pytest.approx(expected, rel=1e-6)
    assert len(set(expected)) > 1
    assert all(0.1 <= alpha < 1 for alpha in expected)
    for entry in results["A-HPO"]["log"]:
        positive, negative = entry["hpo/share_positive"], entry["hpo/share_negative"]
        assert entry["hpo/alpha"] == pytest.approx(max(0.1, min(1, positive / negative)), rel=1e-3)


def test_masked_rows_were_there(results: Any) -> None:
    assert results["masked truncation"]["masked_rows"] > 0
    assert results["A-HPO"]["masked_rows"] == 0
