"""The contribution to TRL fits TRL as its wheel has it, computes what the plugin computes, and refuses other trees."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkouts import commit_all, git
from typer.testing import CliRunner

from contrib.upstream import trl as contribution
from contrib.upstream.__main__ import app
from contrib.upstream.tree import UnknownTreeError
from contrib.upstream.trl import BASE_TRAINER, FILES, INSERTIONS, SNIPPETS

HERE = Path(__file__).parent
NEW = {path.relative_to(FILES).as_posix().removesuffix(".in") for path in FILES.rglob("*.in")}

#: Of TRL's files, what the insertions look at.
SOURCES = {
    "trl/__init__.py": "",
    BASE_TRAINER: '_TELEMETRY_TRAINERS = {\n    "GRPOTrainer",\n    # Experimental\n    "GOLDTrainer",\n'
    '    "OnlineDPOTrainer",\n}\n',
    "docs/source/_toctree.yml": "- sections:\n  - local: grpo_trainer\n    title: GRPO\n  title: Trainers\n"
    "- sections:\n  - local: gold_trainer\n    title: GOLD\n  - local: orpo_trainer\n    title: ORPO\n"
    "  title: Experimental\n",
    "docs/source/paper_index.md": "# Paper Index\n\n## Group Relative Policy Optimization\n\n### GRPO\n\n```python\n"
    "# x\n```\n\n## Direct Policy Optimization\n\ntext\n",
    "tests/__init__.py": "",
}


@pytest.fixture
def checkout(tmp_path):
    """A git checkout with the files of TRL that the contribution changes."""
    tree = tmp_path / "checkout"
    for name, text in SOURCES.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    return commit_all(tree, "trl")


def test_a_checkout_gets_one_commit_on_a_branch_and_a_second_call_changes_nothing(checkout):
    first = CliRunner().invoke(app, ["--trl", str(checkout)])
    assert first.exit_code == 0, first.output
    assert git(checkout, "branch", "--show-current").strip() == "hpo"
    assert git(checkout, "log", "--format=%s").splitlines() == [contribution.TITLE, "trl"]
    assert set(git(checkout, "diff", "--name-only", "HEAD~").splitlines()) == NEW | {i.file for i in INSERTIONS}
    assert all(line.split("\t")[1] == "0" for line in git(checkout, "diff", "--numstat", "HEAD~").splitlines())
    second = CliRunner().invoke(app, ["--trl", str(checkout)])
    assert second.exit_code == 0, second.output
    assert "nothing to do" in second.output


def test_the_lists_of_trl_have_it_in_its_place(checkout):
    changes = contribution.changes(checkout)
    assert '    "GOLDTrainer",\n    "HPOTrainer",\n    "OnlineDPOTrainer",\n' in changes[BASE_TRAINER]
    toctree = changes["docs/source/_toctree.yml"]
    assert "    title: GOLD\n  - local: hpo_trainer\n    title: HPO\n  - local: orpo_trainer\n" in toctree
    index = changes["docs/source/paper_index.md"]
    assert "# x\n```\n\n### HPO: " in index
    assert "```\n\n## Direct Policy Optimization\n" in index


def test_a_patch_leaves_the_tree_as_it_is(checkout, tmp_path):
    out = tmp_path / "hpo.patch"
    assert CliRunner().invoke(app, ["--trl", str(checkout), "--out", str(out)]).exit_code == 0
    assert git(checkout, "status", "--porcelain") == ""
    git(checkout, "apply", str(out))
    assert contribution.changes(checkout) == {}


@pytest.mark.parametrize("insertion", INSERTIONS, ids=lambda insertion: insertion.file)
def test_a_tree_without_the_place_of_a_text_is_refused_with_the_file(checkout, insertion):
    (checkout / insertion.file).write_text("x = 1\n")
    with pytest.raises(UnknownTreeError, match=rf"{insertion.file}: .*The contribution knows trl 1\.10\.0"):
        contribution.changes(checkout)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        (BASE_TRAINER, SOURCES[BASE_TRAINER].replace("OnlineD", "H"), "has HPO, but not this contribution"),
        ("trl/experimental/hpo/__init__.py", "from .other import HPOTrainer\n", "does not replace it"),
        ("docs/source/hpo_trainer.md", "another page\n", "does not replace it"),
    ],
)
def test_a_tree_with_another_hpo_is_refused(checkout, file, text, said):
    (checkout / file).parent.mkdir(parents=True, exist_ok=True)
    (checkout / file).write_text(text)
    with pytest.raises(UnknownTreeError, match=said):
        contribution.changes(checkout)


def test_work_in_progress_is_not_committed(checkout):
    (checkout / "mine.py").write_text("x = 1\n")
    done = CliRunner().invoke(app, ["--trl", str(checkout)])
    assert done.exit_code == 1
    assert "mine.py" in done.output
    assert git(checkout, "branch", "--show-current").strip() != "hpo"


def test_another_directory_is_refused(tmp_path):
    with pytest.raises(UnknownTreeError, match=r"not a source tree of trl: it holds no trl/__init__\.py"):
        contribution.changes(tmp_path)


@pytest.mark.parametrize("arguments", [[], ["--verl", ".", "--trl", "."]])
def test_one_project_is_named(arguments):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert "give one of --verl, --recipes and --trl" in " ".join(done.output.replace("│", " ").split())


def test_every_text_is_used_and_none_needs_the_plugin():
    assert {insertion.snippet for insertion in INSERTIONS} == set(SNIPPETS.iterdir())
    for path in [*FILES.rglob("*.in"), *SNIPPETS.iterdir()]:
        assert "hpo_plugin" not in path.read_text(encoding="utf-8"), path


def test_new_files_fit_trls_style(tmp_path):
    for path in FILES.rglob("*.py.in"):
        target = tmp_path / path.relative_to(FILES).as_posix().removesuffix(".in")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    settings = ["target-version = 'py310'", "line-length = 119", "lint.isort.lines-after-imports = 2"]
    settings += ["lint.isort.known-first-party = ['trl']", "lint.per-file-ignores = {'__init__.py' = ['F401']}"]
    options = [word for setting in settings for word in ("--config", setting)]
    rules = ["--select", "E,F,I,W,UP,B,T,C", "--ignore", "B028,C408,C901,E501"]
    for command in (["check", *rules], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *command, "--isolated", *options, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_a_wheel_gets_the_code_and_nothing_else(trl_tree):
    assert contribution.changes(trl_tree) == {}
    assert {path.name for path in trl_tree.iterdir()} == {"trl"}
    assert all((trl_tree / name).is_file() for name in NEW if name.startswith("trl/"))


@pytest.fixture(scope="module")
def facts(trl_tree, in_tree):
    """What :mod:`trl_facts` finds in a process with the patched TRL."""
    done = in_tree(trl_tree, str(HERE / "trl_facts.py"))
    assert done.returncode == 0, done.stderr[-4000:]
    # Weights & Biases may print before it.
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["trl"].startswith(str(trl_tree)), found["trl"]
    return found


@pytest.mark.timeout(600)
def test_advantages_and_metrics_are_those_of_the_plugin(facts):
    """On 400 drawn batches: group sizes, weights, NaN, masks, training and evaluation, both aggregations."""
    assert facts["difference"] == pytest.approx(dict.fromkeys(facts["difference"], 0.0), abs=1e-7)


@pytest.mark.timeout(600)
def test_a_fault_of_the_contributed_trainer_would_be_seen(facts):
    assert {fault: max(found.values()) > 1e-3 for fault, found in facts["faults"].items()} == dict.fromkeys(
        facts["faults"], True
    )


#: Of tests/trl/test_exactness.py.
CASES = {
    1: {
        "A-HPO": {},
        "HPO": {"policy": "hpo", "alpha": 0.6},
        "masked truncation": {"mask_truncated_completions": True, "num_generations": 8},
        "no α": {"fault": "no alpha"},
    },
    2: {"A-HPO": {}, "α of each process": {"fault": "alpha of each process"}},
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("processes", CASES, ids=["one process", "two processes"])
def test_gradients_are_those_of_the_reference(trl_tree, load_script, monkeypatch, tmp_path, processes):
    """Against ``hpo_loss`` on the whole batch, in every optimizer step; a fault is seen."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(trl_tree), os.environ.get("PYTHONPATH")])))
    harness = HERE / "trl_contributed_harness.py"
    results = load_script("exactness_page").run_cases(harness, processes, CASES[processes], tmp_path)
    errors = {name: max(result["errors"]) for name, result in results.items()}
    assert all(len(result["errors"]) == 6 for result in results.values())
    assert all(error > 1e-2 if "fault" in CASES[processes][name] else error < 1e-6 for name, error in errors.items()), (
        errors
    )
    assert results["A-HPO"]["processes"] == processes
    assert all(logged == pytest.approx(alpha, rel=1e-6) for alpha, logged in results["A-HPO"]["alphas"])


@pytest.mark.timeout(600)
def test_the_contributed_tests_that_need_no_model_pass(trl_tree, in_tree, tmp_path):
    """``TestHPOTrainer`` needs models of the hub."""
    for name in ("tests", "tests/experimental"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "tests/testing_utils.py").write_text("class TrlTestCase:\n    pass\n")
    name = "tests/experimental/test_hpo_trainer.py"
    shutil.copy(FILES / f"{name}.in", tmp_path / name)
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        "-c",
        "/dev/null",
        "-k",
        "not TestHPOTrainer",
    ]
    done = in_tree(trl_tree, "-m", "pytest", *options, str(tmp_path / name))
    assert done.returncode == 0, done.stdout
