"""A run of TRL's GRPO that is observed is bit for bit the same run, over one and over two processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("trl", minversion="1.10", exc_type=ImportError, reason="TRL is not installed (make test-trl)")

pytestmark = pytest.mark.timeout(1500)

HARNESS = Path(__file__).with_name("observe_harness.py")

CASES: dict[str, dict[str, Any]] = {
    "TRL's defaults": {},
    "a loss that is not HPO's": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "masked truncation": {"mask_truncated_completions": True, "num_generations": 8},
    "2 updates a generation": {"steps_per_generation": 8},
}


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, load_script: Callable[[str], ModuleType]
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp(f"processes{request.param}")
    return load_script("exactness_page").run_cases(HARNESS, request.param, CASES, folder)


@pytest.mark.parametrize("name", CASES)
def test_parameters_random_numbers_and_log_are_those_of_grpotrainer(results: Any, name: str) -> None:
    result = results[name]
    assert result["moved"] > 1e-3
    assert result["same_parameters"]
    assert result["same_random_number"]
    assert result["same_log"]


@pytest.mark.parametrize("name", CASES)
def test_what_ahpo_would_use_is_logged_in_training_and_evaluation(results: Any, name: str) -> None:
    observed = results[name]["observed"]
    for prefix in ("", "eval_"):
        entries = [entry for entry in observed if f"{prefix}hpo/observe/alpha" in entry]
        assert entries
        for entry in entries:
            assert not [key for key in entry if not key.startswith(f"{prefix}hpo/observe/")]
            assert 0.1 <= entry[f"{prefix}hpo/observe/alpha"] <= 1
            assert 0 < entry[f"{prefix}hpo/observe/response_length_negative"] <= 24
    steps = [entry for entry in observed if "hpo/observe/alpha" in entry]
    for entry in steps if name != "2 updates a generation" else ():
        positive, negative = entry["hpo/observe/share_positive"], entry["hpo/observe/share_negative"]
        assert entry["hpo/observe/alpha"] == pytest.approx(max(0.1, min(1, positive / negative)), rel=1e-3)
