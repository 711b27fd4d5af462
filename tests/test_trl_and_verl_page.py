"""docs/trl.md has the comparison of TRL and verl that docs/trl_and_verl.json recorded, and its words follow from it."""

import json
import math

import pytest


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("trl_and_verl")


@pytest.fixture(scope="module")
def results(script):
    return json.loads(script.RESULTS.read_text())


def test_the_page_is_what_its_script_writes(script, results):
    text = script.PAGE.read_text()
    assert script.page(text, results) == text, "run scripts/trl_and_verl.py --write"
    assert "| TRL | 2 | " in text


def test_the_runs_are_whole_and_the_error_of_the_page_is_theirs(results):
    for runs in results["curves"].values():
        assert list(runs) == ["0", "1", "2"]
        for run in runs.values():
            assert len(run["reward"]) == len(run["alpha"]) == 60
            assert [step for step, _ in run["held_out"]] == [0, 20, 40, 60]
            success = run["held_out"][-1][1]
            assert 0.0175 < math.sqrt(success * (1 - success) / 512) < 0.0195


def test_the_figure_has_a_line_for_each_run(script, results, tmp_path):
    script.save_figure(results, tmp_path / "curves.svg")
    drawn = (tmp_path / "curves.svg").read_text()
    assert drawn.count(f"stroke: {script.COLORS['verl']}") == drawn.count(f"stroke: {script.COLORS['TRL']}") > 6
