"""torture/coverage_guided.py: libFuzzer finds new branches, and no wrong decision."""

import pytest

pytest.importorskip("atheris", reason="atheris has wheels for Linux on x86_64 with Python 3.11 and later only")

from torture.coverage_guided import PROBES, dictionary, search, targets
from torture.probe import Result


@pytest.mark.parametrize("name", [probe.name.removeprefix("coverage-") for probe in PROBES])
def test_a_target_has_no_wrong_decision_and_reaches_more_branches_than_its_first_texts(name, tmp_path):
    first, many = (tmp_path / part for part in ("first", "many"))
    for folder in (first, many):
        folder.mkdir()
    found = search(name, 3000, many, 0)
    assert found.failures == []
    assert found.inputs >= 3000
    few = search(name, 2, first, 0).worst.get("branches reached", 0)
    assert found.worst["branches reached"] > few


@pytest.mark.parametrize(("name", "function"), [("countdown", "countdown_score"), ("prompt", "render_prompt")])
def test_a_wrong_decision_is_found(name, function, monkeypatch):
    monkeypatch.setattr(f"torture.text.{function}", lambda *_, **__: 1.0)
    (_, *texts), _, examine = targets()[name]
    result = Result()
    examine(texts[0], result)
    assert result.failures


def test_a_process_without_a_result_is_a_failure(tmp_path):
    (failure,) = search("nothing", 10, tmp_path, 0).failures
    assert "KeyError: 'nothing'" in failure


def test_pieces_are_escaped_and_surrogates_are_left_out():
    assert dictionary(['"\\', "\ud800"]) == '"\\x22\\x5c"\n'
