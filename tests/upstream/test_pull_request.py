"""The text of the pull request: complete, honest about what is missing, and never sent by a machine."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from hpo_plugin.cli.app import app
from hpo_plugin.study.data import write_data
from hpo_plugin.upstream import contribution
from hpo_plugin.upstream.pull_request import pull_request

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


@pytest.fixture(scope="module")
def made_up():
    """What the tests of studies make data with."""
    path = Path(__file__).parents[1] / "study/conftest.py"
    spec = importlib.util.spec_from_file_location("study_conftest", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.made_up


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


def test_the_title_is_one_that_verl_takes():
    modules, kind = re.fullmatch(r"\[([a-z_, ]+)\] (\w+): .+", contribution.TITLE).groups()
    assert set(modules.split(", ")) <= {"algo", "trainer", "cfg", "doc"}
    assert kind == "feat"


def test_the_tests_it_names_are_there(text):
    source = (contribution.FILES / "tests/trainer/ppo/test_hpo_on_cpu.py.in").read_text()
    for name in re.findall(r"`(test_\w+?)_?(?:…)?`", text):
        assert f"def {name}" in source, name


@pytest.mark.timeout(300)
def test_the_results_of_a_study_are_filled_in_with_their_pictures(tmp_path, made_up):
    from hpo_plugin.study.spec import load_study

    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(STUDY))
    write_data(tmp_path / "small.parquet", [made_up(cell) for cell in load_study(file).cells()])
    text = pull_request(file, tmp_path / "out/pr.md")
    assert "Curves and final scores of the study belong here" not in text
    assert "### A small study" in text
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
    done = CliRunner().invoke(app, ["upstream", *arguments])
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())
