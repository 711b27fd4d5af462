"""The benchmarks' frame: every module has what it needs; what is missing, fails or is too slow is not hidden."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

import benchmarks.__main__ as bench
from benchmarks._table import markdown, row
from benchmarks._timing import rate, worst

FOLDER = Path(bench.__file__).parent
MODULES = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))

FAKES = {
    "good": "def run():\n    return [{'name': 'a', 'measured': 2000.5, 'met': True}, {'name': 'b', 'ours': 1}]",
    "slow": "def run():\n    return [{'name': 'too slow', 'measured': 9, 'met': False}]",
    "numpy_numbers": "import numpy\ndef run():\n    return [{'x': numpy.float32(0.5), 'met': numpy.True_}]",
    "raising": "def run():\n    raise ValueError('no such thing')",
    "killed": "import os\ndef run():\n    os.kill(os.getpid(), 9)",
    "hanging": "import time\ndef run():\n    time.sleep(60)",
    "empty": "def run():\n    return []",
    "noisy": "def run():\n    print('a line')\n    return [{'name': 'c', 'met': True}]",
}


@pytest.fixture
def fakes(tmp_path, monkeypatch) -> str:
    """A package of benchmarks, each with a fault of its own; its name."""
    package = tmp_path / "fake_benchmarks"
    package.mkdir()
    for name, source in {"__init__": "", **FAKES}.items():
        (package / f"{name}.py").write_text(f"{source}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return package.name


# --- the real ones ---


@pytest.mark.parametrize("name", MODULES)
def test_every_benchmark_has_run_and_main_and_says_what_it_measures(name):
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    assert ast.get_docstring(tree)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {"run", "main"} <= set(functions)
    assert not functions["run"].args.posonlyargs
    assert len(functions["run"].args.args) == len(functions["run"].args.defaults)


def test_the_command_runs_every_benchmark_and_no_other():
    assert set(MODULES) == {*bench.BENCHMARKS, *bench.TRAINING}


def test_the_documentation_names_every_benchmark():
    text = (FOLDER.parent / "docs" / "benchmarks.md").read_text()
    for name in (*bench.BENCHMARKS, *bench.TRAINING):
        assert f"benchmarks/{name}.py" in text


# --- the frame ---


def test_results_are_printed_and_written_with_machine_and_versions(fakes, tmp_path, capfd):
    output = tmp_path / "new" / "bench.json"
    assert bench.report(["good", "numpy_numbers"], output, package=fakes) == 0
    printed = capfd.readouterr().out
    assert (
        "## good\n\n| name | measured | met | ours |\n|---|---|---|---|\n| a | 2,000 | yes |  |\n| b |  |  | 1 |\n"
        in printed
    )
    assert "2 of 2 bars are met" in printed
    written = json.loads(output.read_text())
    assert written["machine"]["cores"] >= 1
    assert {"python", "hpo-plugin", "verl", "torch"} <= set(written["versions"])
    good = written["benchmarks"]["good"]
    assert good["status"] == "ok"
    assert good["rows"][0] == {"name": "a", "measured": 2000.5, "met": True}
    assert written["benchmarks"]["numpy_numbers"]["rows"] == [{"x": 0.5, "met": True}]


def test_what_is_wrong_is_named_and_fails_the_command_and_the_others_are_measured(fakes, tmp_path, capfd):
    output = tmp_path / "bench.json"
    names = ["not_there", "raising", "killed", "empty", "slow", "noisy"]
    assert bench.report(names, output, package=fakes, left_out=["whole_step"]) == 1
    printed = capfd.readouterr().out
    for line in (
        "- not_there is missing",
        "- raising failed",
        "- killed failed",
        "- empty failed",
        "- slow: too slow",
        "ValueError: no such thing",
        "SIGKILL",
        "| too slow | 9 | **no** |",
        "1 of 2 bars are met",
        "Not run. make bench ARGS=--whole-step",
    ):
        assert line in printed
    # What a benchmark prints goes elsewhere.
    assert "a line" not in printed
    written = json.loads(output.read_text())["benchmarks"]
    states = {name: result["status"] for name, result in written.items()}
    assert states == dict.fromkeys(("raising", "killed", "empty"), "failed") | {
        "not_there": "missing",
        "slow": "ok",
        "noisy": "ok",
        "whole_step": "not run",
    }


def test_a_benchmark_that_hangs_is_ended(fakes):
    result = bench.measure("hanging", package=fakes, limit=0.5)
    assert result["status"] == "failed"
    assert "did not end within 0.5 seconds" in result["error"]


def test_an_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["speed"])
    assert "'speed' is not one of advantage" in capsys.readouterr().err


def test_a_bar_is_met_at_its_value_and_by_no_nan():
    assert row("a", 5, "ms", at_most=5.0)["met"] is True
    assert row("a", 5.01, "ms", at_most=5.0)["met"] is False
    assert row("a", 5, "ms", at_least=5.0)["met"] is True
    assert row("a", float("nan"), "ms", at_most=5.0)["met"] is False
    assert row("a", 5, "ms")["met"] is None
    with pytest.raises(ValueError, match="one bar"):
        row("a", 5, "ms", at_most=1, at_least=1)


def test_a_table_escapes_what_would_break_it():
    assert markdown([{"name": "a|b\nc"}]) == "| name |\n|---|\n| a\\|b c |"


def test_rates_and_worst_texts_are_found():
    assert rate(lambda: sum(range(10_000)), 10, passes=3)[0] > 0
    assert worst(["1", "200000", "3"], lambda text: sum(range(int(text))))[1] == "200000"


# --- the whole step ---


def step(seconds: float, tokens: float = 100.0) -> dict[str, float]:
    return {
        "timing_s/step": seconds,
        "timing_s/adv": 0.1 * seconds,
        "timing_s/update_actor": 0.2 * seconds,
        "perf/total_num_tokens": tokens,
        "response_length/mean": 8.0,
        "critic/rewards/mean": 0.25,
    }


def test_a_whole_step_is_compared_by_medians_without_the_first_steps():
    from benchmarks import whole_step

    def rows(seconds: float) -> dict[int, dict[str, float]]:
        warm = range(1, whole_step.WARM_UP + 1)
        return {n: step(99.0 if n in warm else seconds) for n in range(1, whole_step.STEPS + 1)}

    def ratio(ahpo: float) -> dict:
        table = whole_step.compare([(name, rows(ahpo if name == "ahpo" else 2.0)) for name in whole_step.ORDER])
        return {row["name"]: row for row in table}["A-HPO / GRPO, step"]

    assert ratio(2.0)["measured"] == 1.0
    assert ratio(2.04)["met"] is True
    assert ratio(2.06)["met"] is False


def test_runs_of_different_tokens_are_not_compared():
    from benchmarks import whole_step

    runs = [(name, {n: step(1.0) for n in range(1, whole_step.STEPS + 1)}) for name in ("ahpo", "grpo")]
    whole_step.check_equal(runs)
    runs[1][1][5]["perf/total_num_tokens"] = 101.0
    with pytest.raises(ValueError, match=r"step 5: perf/total_num_tokens is 100.0 in run 1 \(ahpo\) and 101.0"):
        whole_step.check_equal(runs)
