"""The text of the pull request: complete, honest about what is missing, and never sent by a machine."""

import json
import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from contrib.upstream import contribution
from contrib.upstream.__main__ import app
from contrib.upstream.pull_request import GATES, OUTCOMES, pull_request, with_outcomes
from hpo_plugin.study.data import write_data

STUDY = {
    "name": "small",
    "title": "A small study",
    "config_name": "countdown_cpu",
    "steps": 4,
    "test_every": 2,
    "settings": {"one": {"title": "One", "overrides": ["data.train_files=x"]}},
    "arms": {
        "grpo": {"title": "GRPO", "overrides": ["algorithm.policy_loss=grpo"]},
        "ahpo": {"title": "A-HPO", "overrides": ["algorithm.policy_loss=ahpo"]},
    },
    "experiments": {
        "main": {"title": "Two arms", "setting": "one", "arms": ["grpo", "ahpo"], "seeds": [0, 1], "compare": "ahpo"}
    },
}


@pytest.fixture
def text(tmp_path):
    return pull_request(None, tmp_path / "pr.md")


def test_nothing_is_left_to_fill_in_but_what_a_human_or_a_study_has_to(text):
    assert not re.search(r"@[A-Z]+@", text)
    assert "Curves and final scores of the study belong here" in text


def test_it_has_the_sections_of_verls_template(text):
    sections = re.findall(r"^### (.+)$", text, re.MULTILINE)
    wanted = ["What does this PR do?", "Checklist Before Starting", "Test", "API and Usage Example"]
    assert [section for section in sections if section in wanted] == wanted
    assert sections[-1] == "Checklist Before Submitting"


def test_it_states_the_assistance_and_the_line_that_a_human_owns(text):
    assert "written by an AI assistant" in text
    assert text.count("**The line that a human owns:** I, ____") == 1
    # What precedes the next section is removed when it is opened.
    assert "The line that a human owns" in text.partition("### What does this PR do?")[2]
    assert "has reviewed it" not in text


def test_the_title_is_one_that_verl_takes():
    modules, kind = re.fullmatch(r"\[([a-z_, ]+)\] (\w+): .+", contribution.TITLE).groups()
    assert set(modules.split(", ")) <= {"algo", "trainer", "cfg", "doc"}
    assert kind == "feat"


def test_the_recorded_outcomes_are_those_of_the_contributed_tests():
    """Fails when a test was added or renamed: then run scripts/upstream_gates.py again."""
    source = (contribution.FILES / "tests/trainer/ppo/test_hpo_on_cpu.py.in").read_text()
    names = set(re.findall(r"^def (test_\w+)", source, re.MULTILINE))
    for tree, tests in json.loads(OUTCOMES.read_text()).items():
        assert set(tests) == names, tree


def test_the_results_in_the_table_are_those_of_the_record():
    named, others = (
        "test_alpha_of_one_is_grpo",
        ["test_ahpo_weights_x", "test_hpo_weights_x", "test_alpha_is_the_ratio_x"],
    )
    template = (
        f"| one | `{named}` | passes |\n| two | `test_hpo_weights_…`, `test_alpha_is_the_ratio_…` | whatever |\n"
        "| not a test | `name` | stays |\n"
    )
    good = {name: {"passed": 2} for name in [named, *others]}
    rows = with_outcomes(template, {"main": good}).splitlines()
    assert [row.split(" | ")[-1] for row in rows] == ["passes |", "passes |", "stays |"]
    bad = good | {named: {"passed": 1, "failure": 1}}
    bad.pop("test_hpo_weights_x")
    rows = with_outcomes(template, {"main": good, "0.9.1": bad}).splitlines()
    assert rows[0].endswith(f"| `{named}` on 0.9.1: 1 passed, 1 failure |")
    assert rows[1].endswith("| `test_hpo_weights_…` was not run on 0.9.1 |")
    assert rows[2] == "| not a test | `name` | stays |"


def test_the_table_of_gates_can_be_read_by_itself(text):
    table = GATES.read_text()
    assert table.strip() in text
    assert table.strip() in (Path(__file__).parents[2] / "docs/upstream.md").read_text()
    assert "Before → after" in table
    assert "A dash:" in table
    for tree in table.splitlines()[0].split(" | ")[1:]:
        assert re.search(
            rf"`{re.escape(tree.strip(' |'))}` is (commit `[0-9a-f]{{9}}` of|a source distribution)", table
        )
    assert ("failed" in table) == ("A test of verl's own fails" in table)


def test_the_tests_it_names_are_there_and_have_an_outcome(text):
    source = (contribution.FILES / "tests/trainer/ppo/test_hpo_on_cpu.py.in").read_text()
    rows = [line for line in text.splitlines() if re.match(r"\|.*`test_\w+…?`", line)]
    assert len(rows) >= 7
    for row in rows:
        assert row.endswith("| passes |"), row
        for name, abbreviated in re.findall(r"`(test_\w+)(…?)`", row):
            assert f"def {name}" + ("" if abbreviated else "(") in source, name


@pytest.mark.timeout(300)
def test_the_results_of_a_study_are_filled_in_with_their_pictures(tmp_path, made_up):
    from hpo_plugin.study.spec import load_study

    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(STUDY))
    data = [made_up(cell) for cell in load_study(file).cells()]
    for run in data:
        run.info["result"]["versions"] = {"verl": "0.9.1"}
    write_data(tmp_path / "small.parquet", data)
    text = pull_request(file, tmp_path / "out/pr.md")
    assert "Curves and final scores of the study belong here" not in text
    before, _, study = text.partition("### A small study")
    assert "the plugin hpo_plugin on verl 0.9.1, not with the code of this branch" in before
    assert study
    pictures = re.findall(r"!\[.*?\]\((.+?)\)", text)
    assert pictures == ["small/main-reward.svg", "small/main-alpha.svg"]
    for picture in pictures:
        assert (tmp_path / "out" / picture).is_file()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"small"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --verl and --recipes"),
        (["--verl=a", "--recipes=b"], "give one of --verl and --recipes"),
        (["--recipes=b", "--pull-request=c.md"], "not for --recipes"),
        (["--verl=a", "--study=c.yaml"], "--study fills"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(arguments, message):
    done = CliRunner().invoke(app, [*arguments])
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


@pytest.fixture(scope="module")
def gates():
    path = Path(__file__).parents[2] / "scripts/upstream_gates.py"
    spec = spec_from_file_location("upstream_gates", path)
    module = module_from_spec(spec)
    sys.modules["upstream_gates"] = module
    spec.loader.exec_module(module)
    return module


def test_the_script_counts_the_cases_of_a_test_by_outcome(gates, tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase name="test_a[1]"/><testcase name="test_a[2]"><failure/></testcase>'
        '<testcase name="test_b"/><testcase name="test_c"><skipped/></testcase></testsuite></testsuites>'
    )
    assert gates.outcomes(report) == {
        "test_a": {"passed": 1, "failure": 1},
        "test_b": {"passed": 1},
        "test_c": {"skipped": 1},
    }


def test_the_script_says_how_to_read_what_it_writes(gates):
    measured = {
        "old": gates.Measured(
            "commit `123456789` of 1 May 2026", {"a": ("1 failed", "1 failed")}, {"test_x": "before and after"}, {}
        ),
        "new": gates.Measured("a source distribution", {"b": ("passes", "fails")}, {"test_x": "after"}, {}),
    }
    assert gates.table(measured).splitlines()[2:] == ["| a | 1 failed | — |", "| b | — | passes → fails |"]
    text = gates.reading(measured)
    assert "`old` is commit `123456789` of 1 May 2026; `new` is a source distribution." in text
    assert "fails before and after on `old`, after on `new`: `test_x`; the reason is not known." in text
