"""docs/results/gradients.md has the tables of docs/gradients.json."""

import json

import pytest


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("gradients")


def test_the_page_is_what_its_script_writes(script):
    text, results = script.PAGE.read_text(encoding="utf-8"), json.loads(script.RESULTS.read_text(encoding="utf-8"))
    assert script.page(text, results) == text, "run scripts/gradients.py --write"
    assert "| A-HPO | " in text


def test_every_run_is_whole(script):
    curves = json.loads(script.RESULTS.read_text(encoding="utf-8"))["curves"]
    assert {tuple(place.split("/")): tuple(by_preset) for place, by_preset in curves.items()} == script.CELLS
    for by_preset in curves.values():
        for runs in by_preset.values():
            assert len(runs) == len(script.SEEDS)
            assert all(len(run[name]) == 60 for run in runs for name in script.NAMES)


def test_the_words_of_the_page_follow_from_the_figures(script):
    curves = json.loads(script.RESULTS.read_text(encoding="utf-8"))["curves"]
    found = {
        name: [script.ends(runs, name) for by_preset in curves.values() for runs in by_preset.values()]
        for name in script.NAMES
    }

    def spans(name, digits):
        return [[f"{f(pair[end] for pair in found[name]):.{digits}f}" for f in (min, max)] for end in (0, 1)]

    assert spans("adamw_turn", 0) == [["11", "14"], ["4", "6"]]
    assert spans("turn", 0) == [["18", "22"], ["9", "13"]]
    lengths = [value for pair in found["adamw_length"] for value in pair]
    assert (f"{min(lengths):.2f}", f"{max(lengths):.2f}") == ("0.98", "1.00")
    shorter = [1 - value for pair in found["length"] for value in pair]
    assert (f"{min(shorter):.2f}", f"{max(shorter):.2f}") == ("0.07", "0.18")
    assert spans("ratio", 2)[0] == ["0.46", "0.61"]
    assert all(0.85 < late < 1.15 for _, late in found["ratio"])
    cosines = [value for pair in found["cosine"] for value in pair]
    assert (f"{min(cosines):.2f}", f"{max(cosines):.2f}") == ("-0.06", "0.28")
    for end in (0, 1):
        steps = [pair[end] for pair in found["step"]]
        assert max(steps) / min(steps) < 1.15
    first = [sum(run["adamw_turn"][0] for run in by["ahpo"]) / len(by["ahpo"]) for by in curves.values()]
    assert [f"{value:.0f}" for value in first] == ["43", "46"]
    first_gradients = [sum(run["turn"][0] for run in by["ahpo"]) / len(by["ahpo"]) for by in curves.values()]
    assert all(ours > theirs for ours, theirs in zip(first, first_gradients, strict=True))
