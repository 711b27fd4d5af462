"""docs/trl.md has the errors that docs/trl.json recorded, and they are what the tests demand."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("trl_page")


@pytest.fixture(scope="module")
def results():
    return json.loads((ROOT / "docs" / "trl.json").read_text())


def test_the_page_is_what_its_script_writes(script, results):
    text = script.PAGE.read_text()
    assert script.page(text, results) == text, "run scripts/trl_page.py --write"
    assert "| A-HPO | " in text


def test_recorded_errors_are_within_the_tolerance_and_faults_are_outside(results):
    assert {"1.16.0", "1.10.0"} <= results.keys()
    for release in results.values():
        for name, errors in release["errors"].items():
            for error in errors.values():
                assert error > 1e-2 if name in ("no α", "α of each process") else error < 1e-6, (name, error)
