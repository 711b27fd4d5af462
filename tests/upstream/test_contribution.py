"""The contribution fits verl as its wheel has it, stays within its limits, and refuses other trees."""

import re
import shutil
import subprocess
import sys

import pytest
from checkouts import commit_all, git
from typer.testing import CliRunner

from contrib.upstream import contribution
from contrib.upstream.__main__ import app
from contrib.upstream.contribution import CORE_ALGOS, FILES, INSERTIONS, SNIPPETS
from contrib.upstream.tree import UnknownTreeError, write

#: Of verl, what the contribution may change; the rest of the tool's work are new files.
TOUCHED = {CORE_ALGOS, "verl/trainer/config/algorithm.py", "verl/trainer/config/ppo_trainer.yaml"}


@pytest.fixture(scope="module")
def changes(wheel):
    return contribution.changes(wheel)


@pytest.fixture
def checkout(wheel, tmp_path):
    """A git checkout with the folders that a wheel lacks."""
    tree = tmp_path / "checkout"
    shutil.copytree(wheel, tree)
    (tree / "docs").mkdir()
    (tree / "docs/index.rst").write_text("Algorithms\n\n   algo/ppo.md\n   algo/grpo.md\n\nWorkers\n")
    (tree / "examples").mkdir()
    (tree / "examples/README.md").write_text("| Dir |\n|---|\n| `sapo_trainer/` |\n| `otb_trainer/` |\n")
    (tree / "tests").mkdir()
    return commit_all(tree, "verl")


def test_a_wheel_gets_the_code_and_the_configs_and_nothing_else(changes):
    generated = {name for name in changes if "_generated_" in name}
    assert len(generated) == 4
    assert set(changes) - generated == TOUCHED


def test_running_it_twice_changes_nothing(patched):
    assert contribution.changes(patched) == {}


def test_the_tree_is_only_read(wheel, changes):
    assert changes[CORE_ALGOS] != (wheel / CORE_ALGOS).read_text()


def test_flattened_configs_are_composed_as_verl_does(wheel):
    for name, text in contribution._generated_configs(wheel, {}).items():
        assert text == (wheel / name).read_text(), name


def test_flattened_configs_have_the_settings(changes):
    text = changes["verl/trainer/config/_generated_ppo_megatron_trainer.yaml"]
    assert "  hpo:\n    alpha: 0.6\n    alpha_min: 0.1\n" in text


def test_the_patch_makes_of_the_tree_what_the_command_makes(tmp_path, wheel, patched, changes):
    tree = tmp_path / "tree"
    shutil.copytree(wheel, tree)
    out = tmp_path / "hpo.patch"
    done = CliRunner().invoke(app, ["--verl", str(tree), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert contribution.changes(tree).keys() == changes.keys()
    subprocess.run(["git", "apply", str(out)], cwd=tree, check=True)
    for name in changes:
        assert (tree / name).read_text() == (patched / name).read_text()


def test_a_checkout_gets_one_commit_on_a_branch_with_documentation_examples_and_tests(checkout):
    run = CliRunner()
    first = run.invoke(app, ["--verl", str(checkout)])
    assert first.exit_code == 0, first.output
    assert git(checkout, "branch", "--show-current").strip() == "hpo"
    assert git(checkout, "log", "--format=%s").splitlines() == [contribution.TITLE, "verl"]
    assert git(checkout, "status", "--porcelain") == ""
    written = set(git(checkout, "diff", "--name-only", "HEAD~").splitlines())
    assert {path.relative_to(FILES).as_posix().removesuffix(".in") for path in FILES.rglob("*.in")} <= written
    assert "   algo/grpo.md\n   algo/hpo.md\n" in (checkout / "docs/index.rst").read_text()
    assert "| `sapo_trainer/` |\n| `hpo_trainer/`" in (checkout / "examples/README.md").read_text()
    second = run.invoke(app, ["--verl", str(checkout)])
    assert second.exit_code == 0
    assert "nothing to do" in second.output
    assert len(git(checkout, "log", "--format=%h").split()) == 2


@pytest.mark.parametrize("file", ["docs/index.rst", "docs/algo/hpo.md"])
def test_work_in_progress_is_not_committed_and_files_of_an_earlier_try_are_not_left_out(checkout, file):
    text = "   algo/mine.md\n" if file == "docs/index.rst" else (FILES / f"{file}.in").read_text()
    (checkout / file).parent.mkdir(exist_ok=True)
    (checkout / file).write_text(text)
    done = CliRunner().invoke(app, ["--verl", str(checkout)])
    assert done.exit_code == 1
    assert file in done.output
    assert "git stash --include-untracked" in done.output
    assert git(checkout, "branch", "--show-current").strip() != "hpo"


def state(tree):
    """All that a refused or failed call has to leave alone: branch, commits, index, and files with their contents."""
    files = [path for path in tree.rglob("*") if path.is_file() and ".git" not in path.relative_to(tree).parts]
    shown = [git(tree, *command.split()) for command in ("branch --all", "log --format=%H", "status --porcelain")]
    return shown, git(tree, "worktree", "list"), {path: path.read_bytes() for path in files}


def test_a_commit_that_a_hook_refuses_leaves_the_checkout_as_it_was_and_can_be_repeated(checkout):
    before = state(checkout)
    hook = checkout / ".git/hooks/pre-commit"
    hook.write_text("#!/bin/sh\necho the hook says no\nexit 1\n")
    hook.chmod(0o755)
    for _ in range(2):
        done = CliRunner().invoke(app, ["--verl", str(checkout)])
        assert done.exit_code == 1
        assert "the hook says no" in done.output
        assert state(checkout) == before
    hook.unlink()
    assert CliRunner().invoke(app, ["--verl", str(checkout)]).exit_code == 0
    assert git(checkout, "log", "--format=%s").splitlines() == [contribution.TITLE, "verl"]


def test_a_commit_without_an_identity_leaves_the_checkout_as_it_was(checkout, monkeypatch):
    git(checkout, "config", "user.useConfigOnly", "true")
    git(checkout, "config", "--unset", "user.email")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", "/dev/null")
    for name in ("GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL", "EMAIL"):
        monkeypatch.delenv(name, raising=False)
    before = state(checkout)
    done = CliRunner().invoke(app, ["--verl", str(checkout)])
    assert done.exit_code == 1
    assert "user.email" in done.output
    assert state(checkout) == before


def test_a_branch_that_exists_is_left_alone_and_the_way_on_is_named(checkout):
    git(checkout, "branch", "hpo")
    before = state(checkout)
    done = CliRunner().invoke(app, ["--verl", str(checkout)])
    assert done.exit_code == 1
    assert "git switch hpo" in done.output
    assert "--branch" in done.output
    assert state(checkout) == before
    done = CliRunner().invoke(app, ["--verl", str(checkout), "--branch", "other"])
    assert done.exit_code == 0, done.output
    assert git(checkout, "branch", "--show-current").strip() == "other"


def test_a_patch_of_nothing_is_not_written(tmp_path, patched):
    out = tmp_path / "hpo.patch"
    out.write_text("a good patch\n")
    done = CliRunner().invoke(app, ["--verl", str(patched), "--out", str(out)])
    assert done.exit_code == 0
    assert "nothing to do" in done.output
    assert out.read_text() == "a good patch\n"


def test_it_is_small_and_changes_no_line_of_verls(checkout):
    """At most 200 lines without tests and documentation, all of them added."""
    assert CliRunner().invoke(app, ["--verl", str(checkout)]).exit_code == 0
    added = {}
    for line in git(checkout, "diff", "--numstat", "HEAD~").splitlines():
        plus, minus, name = line.split("\t")
        assert minus == "0", name
        added[name] = int(plus)
    code = {name: lines for name, lines in added.items() if name.split("/")[0] != "tests" and "docs/" not in name}
    assert sum(lines for name, lines in code.items() if not name.endswith(".md")) <= 200
    assert {name for name in code if name.startswith("verl/") and "_generated_" not in name} == TOUCHED


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out=a", "--branch=b"], "--branch names the branch of a commit"),
        (["--branch=b"], "--branch names the branch of a commit"),
        (["--study=c.yaml"], "--study fills the README of --recipes"),
    ],
)
def test_options_that_would_have_no_effect_on_this_tree_are_refused(patched, arguments, message):
    done = CliRunner().invoke(app, ["--verl", str(patched), *arguments])
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


@pytest.mark.parametrize("moved", ["docs/index.rst", "examples/README.md"])
def test_an_index_that_was_moved_is_named(checkout, moved):
    (checkout / moved).rename(checkout / "elsewhere")
    with pytest.raises(UnknownTreeError, match=f"has no {moved}"):
        contribution.changes(checkout)


def test_windows_line_ends_are_refused(checkout):
    path = checkout / "docs/index.rst"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    with pytest.raises(UnknownTreeError, match=r"docs/index\.rst has Windows line ends.*core\.autocrlf=false"):
        contribution.changes(checkout)


@pytest.mark.parametrize(
    ("beginning", "message"),
    [
        ("a: b: c\ndefaults:\n", "mapping values are not allowed here"),
        ("defaults:\n  - no_such_group: x\n", "no_such_group"),
    ],
)
def test_a_config_that_cannot_be_composed_is_named(tmp_path, wheel, beginning, message):
    shutil.copytree(wheel, tmp_path / "tree")
    path = tmp_path / "tree/verl/trainer/config/ppo_trainer.yaml"
    path.write_text(path.read_text().replace("defaults:\n", beginning))
    with pytest.raises(UnknownTreeError, match=message) as refused:
        contribution.changes(tmp_path / "tree")
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_directory_without_verl_is_refused(tmp_path):
    with pytest.raises(UnknownTreeError, match=r"holds no verl/__init__\.py"):
        contribution.changes(tmp_path)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (CORE_ALGOS, "compute_grpo_vectorized_outcome_advantage"),
        # No place for a text, but what texts use.
        (CORE_ALGOS, "register_adv_est"),
        (CORE_ALGOS, "Optional"),
        ("verl/trainer/config/algorithm.py", "AlgoConfig"),
        ("verl/trainer/config/ppo_trainer.yaml", "norm_adv_by_std_in_grpo"),
    ],
)
def test_a_tree_without_an_anchor_is_refused_with_file_and_name_and_left_alone(tmp_path, wheel, file, name):
    shutil.copytree(wheel, tmp_path / "tree")
    path = tmp_path / "tree" / file
    damaged = path.read_text().replace(name, "renamed")
    path.write_text(damaged)
    done = CliRunner().invoke(app, ["--verl", str(tmp_path / "tree")])
    assert done.exit_code == 1
    assert file in done.output
    assert name in done.output
    assert path.read_text() == damaged


def test_a_tree_without_a_file_is_refused(tmp_path, wheel):
    shutil.copytree(wheel, tmp_path / "tree")
    (tmp_path / "tree/verl/trainer/config/algorithm.py").unlink()
    with pytest.raises(UnknownTreeError, match=r"no verl/trainer/config/algorithm\.py"):
        contribution.changes(tmp_path / "tree")


def test_a_tree_with_another_hpo_is_refused(tmp_path, patched):
    shutil.copytree(patched, tmp_path / "tree")
    path = tmp_path / "tree" / CORE_ALGOS
    path.write_text(path.read_text().replace("the rounding error of a mean", "rounding errors"))
    with pytest.raises(UnknownTreeError, match=r"estimator\.py"):
        contribution.changes(tmp_path / "tree")


def test_another_file_at_the_place_of_ours_is_not_replaced(checkout):
    (checkout / "docs/algo").mkdir()
    (checkout / "docs/algo/hpo.md").write_text("another page\n")
    with pytest.raises(UnknownTreeError, match="does not replace it"):
        contribution.changes(checkout)


def test_new_lines_fit_verls_style(changes, tmp_path):
    write(tmp_path, changes)
    settings = [
        "--config",
        "target-version = 'py310'",
        "--config",
        "line-length = 120",
        "--config",
        "lint.isort.known-first-party = ['verl']",
    ]
    rules = ["--select", "E,F,UP,B,I,G", "--ignore", "F405,F403,E731,B007,UP032,G004,UP045,UP035"]
    source = FILES / "tests/trainer/ppo/test_hpo_on_cpu.py.in"
    shutil.copy(source, tmp_path / "verl/test_hpo_on_cpu.py")
    for command in (["check", *rules], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--isolated", *settings, str(tmp_path / "verl")],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout


def test_every_text_is_used():
    assert {insertion.snippet for insertion in INSERTIONS} == set(SNIPPETS.iterdir())


@pytest.mark.timeout(600)
def test_the_contributed_tests_pass_in_the_tree(in_tree, patched, tmp_path):
    shutil.copy(FILES / "tests/trainer/ppo/test_hpo_on_cpu.py.in", tmp_path / "test_hpo_on_cpu.py")
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-c", "/dev/null"]
    done = in_tree(patched, "-m", "pytest", *options, str(tmp_path), plugins="none")
    assert done.returncode == 0, done.stdout
    assert re.search(r"^\d+ passed(, \d+ warnings?)? in ", done.stdout, re.MULTILINE)
