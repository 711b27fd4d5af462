"""``prepare telelogs``, ``explain telelogs`` and ``score telelogs``, as a user calls them."""

import json

import pytest
from typer.testing import CliRunner

from hpo_plugin.cli.app import app
from hpo_plugin.tasks.telelogs import Cause, compute_score, generate, relabeled, render_prompt

ROWS = generate(16, seed=7).rows


def call(*arguments, text=None):
    # Wide, so that no line is folded.
    return CliRunner(env={"COLUMNS": "250"}).invoke(app, [str(argument) for argument in arguments], input=text)


def row_of(cause):
    return next(row for row in ROWS if row.cause is cause)


# --- explain -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cause", list(Cause))
def test_a_prompt_is_explained_with_the_rule_the_rows_and_the_cells(tmp_path, cause):
    row = row_of(cause)
    file = tmp_path / "case.txt"
    file.write_text(render_prompt(row.case), encoding="utf-8")
    result = call("explain", "telelogs", file)
    assert result.exit_code == 0, result.output
    assert f"{cause.value}: {cause.text}" in result.output
    if cause is Cause.C7:
        fast = max(row.case.drive_test, key=lambda drive: drive.speed)
        assert f"{fast.speed} km/h; limit 40 km/h" in result.output
        assert fast.timestamp in result.output
    if cause is Cause.C6:
        assert "pairs of an affected row" in result.output
        assert "cell " in result.output


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_a_prompt_may_come_from_standard_input_or_from_windows(tmp_path, line_break):
    prompt = render_prompt(row_of(Cause.C5).case).replace("\n", line_break)
    assert "C5: Frequent handovers" in call("explain", "telelogs", "-", text=prompt).output
    file = tmp_path / "case.txt"
    file.write_bytes(b"\xef\xbb\xbf" + prompt.encode())
    assert "C5: Frequent handovers" in call("explain", "telelogs", file).output


def test_a_row_of_a_file_is_explained_and_its_answer_compared(tmp_path):
    file = tmp_path / "questions.jsonl"
    rows = [row_of(Cause.C7), row_of(Cause.C8)]
    answers = ["C7", "C1"]
    file.write_text(
        "".join(
            json.dumps({"Question": render_prompt(row.case), "ANSWER": answer}) + "\n"
            for row, answer in zip(rows, answers, strict=True)
        )
    )
    agreed = call("explain", "telelogs", file)
    assert "disagree" not in agreed.output
    disagreed = call("explain", "telelogs", file, "--row", 1)
    assert "The answer in the file is C1; the rules disagree." in disagreed.output
    beyond = call("explain", "telelogs", file, "--row", 2)
    assert beyond.exit_code == 1
    assert "has 2 rows, counted from 0" in beyond.output


def test_the_chain_of_thought_is_the_one_of_the_sft_data(tmp_path):
    output = tmp_path / "data"
    assert (
        call("prepare", "telelogs", "--output", output, "--train-size", 16, "--test-size", 16, "--sft").exit_code == 0
    )
    import pyarrow.parquet as pq

    demonstration = pq.read_table(output / "sft_test.parquet").to_pylist()[3]["messages"][1]["content"]
    result = call("explain", "telelogs", output / "test.parquet", "--row", 3, "--text")
    assert result.output.strip() == demonstration


def test_labels_are_those_of_the_prompt_and_no_answer_is_an_exit_status(tmp_path):
    row = next(row for row in relabeled(ROWS, seed=1) if not row.label.startswith("C"))
    result = call("explain", "telelogs", "-", text=render_prompt(row.case))
    assert f"{row.label}: {row.cause.text}" in result.output
    # Only causes that do not hold are on offer.
    prompt = render_prompt(row_of(Cause.C7).case)
    kept = [line for line in prompt.split("\n") if not line.startswith(("C7:", "C3:"))]
    nothing = call("explain", "telelogs", "-", text="\n".join(kept))
    assert nothing.exit_code == 1
    assert "No rule holds for any of the options." in nothing.output
    assert "not on offer" in nothing.output


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "No such file"),
        ("empty.txt", "", "line 1"),
        ("broken.json", "{", "cannot be read as .json"),
        ("other.csv", "a,b\n1,2\n", "the column 'question' or 'prompt' is missing; found: a, b"),
    ],
)
def test_what_cannot_be_read_is_an_error_and_not_a_traceback(tmp_path, name, content, message):
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    result = call("explain", "telelogs", file)
    assert result.exit_code == 1
    assert message in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)


# --- prepare -------------------------------------------------------------------------------------------------------


def test_prepare_reports_agreement_leakage_and_files(tmp_path):
    output = tmp_path / "data"
    result = call("prepare", "telelogs", "--output", output, "--train-size", 40, "--test-size", 16)
    assert result.exit_code == 0, result.output
    assert "40 of 40 (100.0 %)" in result.output
    assert "base scenarios, train and test" in result.output
    assert str(output / "train.parquet") in result.output
    again = call("prepare", "telelogs", "--output", output, "--train-size", 40, "--test-size", 16)
    assert "already exists, identical" in again.output
    other = call("prepare", "telelogs", "--output", output, "--train-size", 48, "--test-size", 16)
    assert other.exit_code == 1
    assert "--force" in other.output


def test_a_published_split_that_leaks_is_warned_about_and_refusals_are_shown(tmp_path):
    file = tmp_path / "leaky.json"
    rows = [{"question": render_prompt(row.case), "answer": row.label} for row in ROWS]
    file.write_text(json.dumps({"train": [*rows[:8], {"question": "?", "answer": "C1"}], "test": rows[8:]}))
    result = call("prepare", "telelogs", "--output", tmp_path / "data", "--source", file)
    assert result.exit_code == 0, result.output
    assert "warning" in result.output
    assert "share a base scenario" in result.output
    assert "refused: row 8: line 1" in result.output
    assert "refused.jsonl" in result.output


def test_options_without_effect_are_refused(tmp_path):
    file = tmp_path / "some.csv"
    file.write_text("question,answer\n")
    result = call("prepare", "telelogs", "--output", tmp_path / "data", "--source", file, "--balance", "uniform")
    assert result.exit_code == 1
    assert "balance='uniform' applies only to synthetic cases" in result.output


# --- score ---------------------------------------------------------------------------------------------------------


def sample(prompt, number, pred, truth):
    scored = compute_score("telelogs", rf"\boxed{{{pred}}}", truth) | {"pred": pred}
    return json.dumps({"uid": f"{prompt}_{number}_0", "input": "…", "gts": truth, **scored}) + "\n"


def test_pass_at_1_and_the_plain_majority_are_printed(tmp_path):
    file = tmp_path / "50.jsonl"
    votes = {"a_1": ("C3", ["C3", "C3", "C1", "3"]), "b": ("C5", ["C1", "", "C1", "C5"])}
    file.write_text(
        "".join(
            sample(prompt, number, pred, truth)
            for prompt, (truth, preds) in votes.items()
            for number, pred in enumerate(preds)
        )
    )
    result = call("score", "telelogs", file)
    assert result.exit_code == 0, result.output
    assert "2 prompts, 4 samples each" in result.output
    assert "pass@1  50.00 %" in result.output
    assert "maj@4   50.00 %" in result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("C5")]
    assert "25.0 %" in line
    assert "none 25 %" in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no samples"),
        ('{"uid": "a_0_0", "gts": "C1"}\n', "line 1 is not a sample"),
        (
            sample("a", 0, "C1", "C1") + sample("a", 1, "C1", "C1") + sample("b", 0, "C1", "C1"),
            "same number of samples",
        ),
    ],
)
def test_what_is_not_a_validation_is_refused(tmp_path, content, message):
    file = tmp_path / "50.jsonl"
    file.write_text(content)
    result = call("score", "telelogs", file)
    assert result.exit_code == 1
    assert message in result.output
