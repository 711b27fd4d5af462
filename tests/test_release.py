"""The release check, the workflows of CI and release, and the forms for issues and pull requests."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import hpo_plugin

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
VERSION = hpo_plugin.__version__


def workflow(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((GITHUB / "workflows" / name).read_text(encoding="utf-8"))
    # YAML 1.1 reads the key `on` as true.
    found["on"] = found.pop(True)
    return found


def commands(job: dict[str, Any]) -> str:
    return "\n".join(step.get("run", "") for step in job["steps"])


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The files that the check reads, with a dated section for this version."""
    for name in ("hpo_plugin/__init__.py", "CITATION.cff", "scripts/release_check.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## {VERSION} - 2026-01-31\n\nText.\n\n## 0.1.0\n")
    return tmp_path


def check(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-S", str(repository / "scripts" / "release_check.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_this_repository_names_one_version():
    done = check(ROOT)
    assert (done.returncode, done.stdout) == (0, f"version {VERSION}\n"), done.stderr


def test_the_tag_of_this_version_is_accepted(repository: Path):
    assert check(repository, f"v{VERSION}").returncode == 0
    # As the workflow calls it for a branch.
    assert check(repository, "").returncode == 0


@pytest.mark.parametrize("tag", [VERSION, f"v{VERSION}.1", "v9.9.9", f"V{VERSION}", f"v{VERSION}rc1", "main"])
def test_another_tag_is_refused_with_both_versions(repository: Path, tag: str):
    done = check(repository, tag)
    assert done.returncode == 1
    assert f"the tag is {tag}, but hpo_plugin.__version__ is {VERSION}" in done.stderr


@pytest.mark.parametrize(
    ("file", "before", "after", "message"),
    [
        ("CITATION.cff", f"version: {VERSION}", "version: 0.0.9", "CITATION.cff has version 0.0.9"),
        ("CITATION.cff", f"version: {VERSION}", "", "CITATION.cff has no version"),
        ("CHANGELOG.md", f"## {VERSION} - ", "## 0.0.9 - ", f"CHANGELOG.md has no section {VERSION}"),
        ("CHANGELOG.md", "2026-01-31", "Unreleased", f"section {VERSION} has no date"),
        ("CHANGELOG.md", " - 2026-01-31", "", f"section {VERSION} has no date"),
        ("hpo_plugin/__init__.py", f'"{VERSION}"', '"9.9.9"', "CITATION.cff has version"),
    ],
)
def test_files_that_do_not_fit_are_named(repository: Path, file: str, before: str, after: str, message: str):
    path = repository / file
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    done = check(repository, f"v{VERSION}")
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_version_that_is_not_released_needs_no_date(repository: Path):
    path = repository / "CHANGELOG.md"
    path.write_text(path.read_text().replace("2026-01-31", "Unreleased"))
    assert check(repository).returncode == 0


def test_ci_runs_all_stages_on_pushes_and_pull_requests():
    ci = workflow("ci.yml")
    assert {"push", "pull_request", "workflow_call"} == set(ci["on"])
    assert ci["permissions"] == {"contents": "read"}
    assert ci["concurrency"]["cancel-in-progress"] is True
    assert set(ci["jobs"]) == {"test", "audit"}
    assert "make audit" in commands(ci["jobs"]["audit"]).splitlines()
    job = ci["jobs"]["test"]
    assert job["timeout-minutes"] == 90
    assert "bash .ci/run" in commands(job).splitlines()
    assert (ROOT / ".ci" / "run").is_file()
    (python,) = [step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
    assert python == "3.11"


def test_a_release_checks_tests_and_builds_before_it_publishes():
    release = workflow("release.yml")
    assert release["on"]["push"] == {"tags": ["v*"]}
    assert "workflow_dispatch" in release["on"]
    assert release["permissions"] == {"contents": "read"}
    jobs = release["jobs"]
    assert 'python scripts/release_check.py "$TAG"' in commands(jobs["check"])
    assert jobs["test"]["uses"] == "./.github/workflows/ci.yml"
    for expected in ("python -m build", "twine check --strict dist/*", "hpo-plugin --help", "hpo-plugin files"):
        assert expected in commands(jobs["build"])
    assert jobs["test"]["needs"] == jobs["build"]["needs"] == "check"


def test_only_a_pushed_tag_is_published_and_only_that_job_gets_an_identity():
    jobs = workflow("release.yml")["jobs"]
    publish = jobs.pop("publish")
    assert publish["if"] == "github.event_name == 'push' && github.ref_type == 'tag'"
    assert set(publish["needs"]) == set(jobs)
    assert publish["environment"] == "pypi"
    assert publish["permissions"] == {"id-token": "write"}
    assert all("permissions" not in job for job in jobs.values())
    assert [step["uses"].split("@")[0] for step in publish["steps"]][-1] == "pypa/gh-action-pypi-publish"


@pytest.mark.parametrize("name", ["ci.yml", "release.yml"])
def test_workflows_pin_major_versions_store_no_token_and_do_not_expand_input_in_shell(name: str):
    text = (GITHUB / "workflows" / name).read_text(encoding="utf-8")
    used = [use for use in re.findall(r"uses: (\S+)", text) if not use.startswith("./")]
    assert used
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@(?:v\d+|release/v\d+)", use) for use in used)
    assert "secrets." not in text
    jobs = workflow(name)["jobs"]
    for job in jobs.values():
        assert "timeout-minutes" in job or "uses" in job
        assert "${{" not in commands(job) if "steps" in job else True


def test_the_forms_for_issues_load_and_ask_for_what_a_report_needs():
    forms = {
        path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in (GITHUB / "ISSUE_TEMPLATE").iterdir()
    }
    assert set(forms) == {"bug", "feature", "config"}
    assert forms["config"]["blank_issues_enabled"] is False
    assert all(set(link) == {"name", "url", "about"} for link in forms["config"]["contact_links"])
    for name in ("bug", "feature"):
        assert {"name", "description", "body"} <= set(forms[name])
        ids = [field["id"] for field in forms[name]["body"] if field["type"] != "markdown"]
        assert len(ids) == len(set(ids))
    required = {f["id"] for f in forms["bug"]["body"] if f.get("validations", {}).get("required")}
    assert {"command", "expected", "versions"} <= required


def test_the_targets_in_texts_for_contributors_exist():
    targets = set(re.findall(r"^([a-z][\w.-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in (ROOT / "CONTRIBUTING.md", GITHUB / "pull_request_template.md"):
        named = set(re.findall(r"\bmake ([a-z][\w-]*)", path.read_text(encoding="utf-8")))
        assert named
        assert named <= targets, path.name


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_paths_that_texts_name_exist(name: str):
    text = (ROOT / name).read_text(encoding="utf-8")
    named = re.findall(r"`((?:hpo_plugin|recipes|scripts|docs|contrib)/[\w./-]+)`", text)
    named += re.findall(r"\bpython (scripts/\w+\.py)", text)
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


# --- what SECURITY.md states ---------------------------------------------------------------------------------------


def test_what_security_states_about_the_code_holds():
    sources = {
        path: path.read_text(encoding="utf-8")
        for top in ("hpo_plugin", "hydra_plugins")
        for path in (ROOT / top).rglob("*.py")
    }
    calls = {path: set(re.findall(r"(?<![\w.])(?:eval|exec)\(", text)) for path, text in sources.items()}
    assert {path: found for path, found in calls.items() if found} == {}
    pickles = r"^\s*(?:import|from) (?:pickle|dill|joblib|shelve|marshal)\b"
    assert [path for path, text in sources.items() if re.search(pickles, text, re.MULTILINE)] == []
    assert [path for path, text in sources.items() if re.search(r"yaml\.(?:load|unsafe_load|full_load)\(", text)] == []
    loads = {path.name: re.findall(r"torch\.load\(.*", text) for path, text in sources.items() if "torch.load(" in text}
    assert list(loads) == ["checkpoint_engine.py"]
    assert all("weights_only=True" in line for line in loads["checkpoint_engine.py"])
    shells = {path.name for path, text in sources.items() if re.search(r"shell=True|os\.system\(|os\.popen\(", text)}
    assert shells == {"run.py"}
    assert "autoescape=True" in (ROOT / "hpo_plugin/preview/report.py").read_text(encoding="utf-8")
    assert [path for path, text in sources.items() if "autoescape=False" in text or "Markup(" in text] == []
    # The token of the hub is read by the hub's own libraries.
    assert [path for path, text in sources.items() if re.search(r"environ\W+HF_TOKEN|get_token\(", text)] == []
