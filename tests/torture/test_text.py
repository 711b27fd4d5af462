"""The probes of hostile text, with few texts; and that they find wrong decisions, exceptions and slow texts."""

from __future__ import annotations

import random
import time

import pytest

from hpo_plugin.preview import rollouts
from torture import rollout_text, text
from torture.probe import Result

PROBES = {"countdown": text.countdown, "tinyzero": text.tinyzero, "telelogs": text.telelogs, "prompt": text.prompt}


@pytest.mark.parametrize("name", PROBES)
def test_no_text_has_a_wrong_outcome(name, monkeypatch):
    # Times are measured by the full run alone: the machine of a test may be busy.
    monkeypatch.setattr(text, "LIMIT_MS", 1000.0)
    result = PROBES[name](12345, 2000 if name != "prompt" else 500)
    assert result.failures == []
    assert result.inputs >= (2000 if name != "prompt" else 500)
    assert result.counts["parsed" if name == "prompt" else "accepted"] > result.inputs / 10


@pytest.mark.parametrize(
    ("name", "function", "wrong"),
    [
        ("countdown", "countdown_score", lambda *_, **__: 1.0),
        ("countdown", "countdown_score", lambda *_, **__: 0.0),
        ("tinyzero", "countdown_score", lambda *_, **__: 1.0),
        ("telelogs", "telelogs_score", lambda _, __, label, *___: {"score": 1.0, "acc": 1.0, "pred": label}),
        ("telelogs", "telelogs_score", lambda *_: {"score": 0.0, "acc": 0.0, "pred": ""}),
    ],
)
def test_a_reward_that_decides_wrongly_is_found(name, function, wrong, monkeypatch):
    monkeypatch.setattr(text, function, wrong)
    failures = PROBES[name](0, 200).failures
    assert any("wrongly" in failure or "public scorer" in failure for failure in failures)


def test_an_exception_of_a_reward_and_of_the_parser_is_found(monkeypatch):
    def raising(*_, **__):
        raise RecursionError("too deep")

    monkeypatch.setattr(text, "countdown_score", raising)
    monkeypatch.setattr(text, "parse_prompt", raising)
    result = Result()
    text.examine_countdown(text.CountdownInput("1+1", 2, (1, 1), "terse"), result, text.Timer(result))
    text.examine_prompt("a", result, text.Timer(result))
    assert [failure.split(":")[0] for failure in result.failures] == ["RecursionError", "RecursionError"]


def test_a_slow_text_is_found():
    def busy():
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass

    result = Result()
    text.Timer(result)(busy, "slow")
    assert result.worst["slowest text (CPU ms)"] >= 20
    assert "'slow'" in result.failures[0]


def test_the_error_of_the_parser_is_short_whatever_the_prompt_is():
    heading = text.prompts()[-1].split("\n")
    result = Result()
    for place in range(len(heading)):
        line = heading[place] + " C3" * 1000
        text.examine_prompt("\n".join([*heading[:place], line, *heading[place + 1 :]]), result, text.Timer(result))
    assert result.failures == []
    assert result.inputs == len(heading)


def test_the_search_finds_the_word_that_is_slow():
    """A function whose time depends on one character: the search turns to texts that are full of it."""
    found = list(text.slowest(random.Random(0), lambda given: float(given.count("(")), [*"abc("], 300))
    assert max(given.count("(") for given in found[200:]) > 0.9 * text.LONG


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("<answer>3*5+7</answer>", True),
        ("<answer>3*5+8</answer>", False),
        (r"<answer>\boxed{3 \times 5 + 7 = 22}</answer>", True),
        ("<answer>3*5+7 = 22 = 22</answer>", False),
        ("<answer>3*5+7", False),
    ],
)
def test_the_oracle_of_countdown(response, right):
    assert text.countdown_oracle(response, 22, (3, 5, 7), "public") is right


@pytest.mark.parametrize(
    ("response", "right"),
    [
        (r"\boxed{C3}", True),
        (r"\boxed{\textbf{C}_{3}}", True),
        (r"\boxed{C3: A neighboring cell provides higher throughput.}", True),
        (r"\boxed{C3: Frequent handovers degrade performance.}", False),
        (r"\boxed{C3 or C4}", False),
        (r"\boxed{C3", False),
    ],
)
def test_the_oracle_of_telelogs(response, right):
    assert text.telelogs_oracle(response, "C3", "C3") is right


@pytest.fixture
def any_time(monkeypatch):
    """Times are measured by the full run alone."""
    monkeypatch.setattr(rollout_text, "LIMIT_MS", 1000.0)


def test_rollouts_are_used_or_counted_as_skipped(tmp_path, any_time):
    lines = rollout_text.json_lines(tmp_path, 0, files=4, size=1000)
    assert lines.failures == []
    assert min(lines.counts.values()) > 500
    parquet = rollout_text.parquet(tmp_path, 0, files=20)
    assert parquet.failures == []
    assert set(parquet.counts) == {"used", "skipped", "files with an error that names the reason"}


def test_a_row_that_is_dropped_or_misread_is_found(tmp_path, monkeypatch, any_time):
    create_table = rollouts._create_table

    def dropping(*arguments, **options):
        return create_table(*arguments, **options) + " WHERE reward IS NOT NULL"

    monkeypatch.setattr(rollouts, "_create_table", dropping)
    assert rollout_text.json_lines(tmp_path, 0, files=1, size=500).failures
    monkeypatch.setattr(rollouts, "_create_table", lambda *a, **o: create_table(*a, **o).replace("length(", "strlen("))
    assert any("by mistake" in found for found in rollout_text.json_lines(tmp_path, 1, files=2, size=500).failures)


def test_a_slow_line_of_rollouts_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(rollout_text, "LIMIT_MS", 1e-3)
    result = Result()
    rollout_text.time_of_long_lines(tmp_path, random.Random(0), result, size=2)
    assert "each line of 256 kB" in result.failures[0]


@pytest.mark.parametrize("line_break", [b"\n", b"\r\n"])
def test_files_with_several_kinds_of_line_breaks_can_be_read(tmp_path, line_break):
    row = b'{"step": 0, "prompt": "p", "response": "a\\nb", "reward": 1}'
    (tmp_path / "a.jsonl").write_bytes(row + b"\r\n" + row + b"\n" + row + line_break)
    used, bad = rollout_text.read([tmp_path / "a.jsonl"])
    assert (used[0, 1.0, 3.0], bad) == (3, {})
