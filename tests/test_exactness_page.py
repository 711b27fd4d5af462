"""docs/trl.md and docs/openrlhf.md have the errors that were recorded, and these are what the tests demand."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Releases that have to be there.
RELEASES = {"trl": {"1.16.0", "1.10.0"}, "openrlhf": {"0.11.2", "0.11.0"}}
FAULTS = {
    "no α",
    "α of each micro-batch",
    "α of each process",
    "dynamic batch, ZeRO 1 (refused)",
    "dynamic batch, ZeRO 2 (refused)",
    "batches of 48 of 64, 3 epochs (refused)",
}


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("exactness_page")


@pytest.fixture(params=RELEASES)
def framework(request, script):
    return script.FRAMEWORKS[request.param]


@pytest.fixture
def results(framework):
    return json.loads(framework.results.read_text())


def test_the_page_is_what_its_script_writes(script, framework, results):
    text = framework.page.read_text()
    assert script.page(framework, text, results) == text, f"run scripts/exactness_page.py {framework.name} --write"
    assert "| A-HPO | " in text


def test_recorded_errors_are_within_the_tolerance_and_faults_are_outside(framework, results):
    assert RELEASES[framework.name] <= results.keys()
    for release in results.values():
        for name, errors in release["errors"].items():
            for error in errors.values():
                assert error > 1e-2 if name in FAULTS else error < 1e-6, (name, error)
