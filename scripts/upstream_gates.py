"""Runs the CPU tests and gates of verl or TRL on source trees, before and after the contribution; writes the results.

    PYTHONPATH=. python scripts/upstream_gates.py v0.9.0=PATH 0.9.1=PATH main=PATH
    PYTHONPATH=. python scripts/upstream_gates.py --trl --tools BIN main=PATH

verl's tests need pytest-asyncio beside this project's development environment: `pip install pytest-asyncio`. TRL's
style needs the versions of ruff and doc-builder that its .pre-commit-config.yaml names, in an environment of their own,
whose bin directory --tools names.

A tree is a git checkout, or an unpacked source distribution; it is copied, and left as it is. The gates are the hooks
of the tree's .pre-commit-config.yaml, and those of its workflows that need neither a network nor a GPU; for verl, ruff
and mypy are this environment's, with the tree's settings. The scripts of contrib/upstream/issues run on each tree of
verl as well. The script writes the tables, their legend, and the size of the last tree's patch to docs/upstream.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

import yaml

from contrib.upstream import contribution, issues, trl
from contrib.upstream.tree import commit

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/upstream.md"
END = "<!-- end -->"

PYTEST = "python3 -m pytest -q -p no:cacheprovider"


@dataclass(frozen=True)
class Project:
    """The project whose trees are measured.

    Attributes:
        contribution: The module of contrib.upstream that has the contribution's ``TITLE`` and ``changes``.
        begin: The marker above the results in docs/upstream.md.
        contributed: The command that runs the contributed tests.
        workflows: Gates of its workflows, in addition to the pre-commit hooks.
        environment: Environment variables of its tests.
        packages: Packages whose versions are reported.
        note: A note on the contributed tests for the readers of the table.
    """

    contribution: ModuleType
    begin: str
    contributed: str
    workflows: Mapping[str, str]
    environment: Mapping[str, str]
    packages: tuple[str, ...]
    note: str


# Tests of the projects that also fail without the contribution, and the reason.
REASONS = {
    "test_target_modules_raises_on_invalid_type": "it reads the files of a model that verl's CI downloads",
}

VERL = Project(
    contribution=contribution,
    begin="<!-- begin: scripts/upstream_gates.py -->",
    contributed=f"{PYTEST} --asyncio-mode=auto tests/trainer/ppo/test_hpo_on_cpu.py",
    # .github/workflows/{cpu_unit_tests,sanity,type-coverage-check}.yml
    workflows={
        "CPU tests of `trainer`": f"{PYTEST} --asyncio-mode=auto -o python_files='*_on_cpu.py' tests/trainer",
        "CPU tests of configs": f"{PYTEST} --asyncio-mode=auto tests/test_base_config_on_cpu.py "
        "tests/utils/test_config_on_cpu.py $(ls tests/workers/config/*_on_cpu.py)",
        "sanity tests": f"{PYTEST} --asyncio-mode=auto tests/special_sanity",
        "docstrings of imports": "python3 tests/special_sanity/validate_imported_docs.py",
        "type annotations": "python3 tests/special_sanity/type_coverage_check.py",
        "docstrings of `__all__`": "python3 tests/special_sanity/check_api_docs.py verl",
    },
    environment={
        # verl alone, as its maintainers run it.
        "VERL_USE_EXTERNAL_PLUGINS": "none",
        "TORCH_COMPILE_DISABLE": "1",
        # verl's tests wait forever where Ray has fewer CPUs than their actors ask for.
        "RAY_OVERRIDE_RESOURCES": '{"CPU": 16}',
    },
    packages=("torch", "transformers", "ray", "ruff", "mypy", "pytest", "pytest-asyncio"),
    note="The contributed tests are part of the tests of `trainer`, and account for the difference there.",
)
# Most tests of TRL load models of the hub.
TRL = Project(
    contribution=trl,
    begin="<!-- begin: scripts/upstream_gates.py --trl -->",
    contributed=f"{PYTEST} tests/experimental/test_hpo_trainer.py -k 'not TestHPOTrainer'",
    workflows={
        "tests of GRPO without a model": f"{PYTEST} tests/test_grpo_trainer.py -k 'TestGetHighEntropyMask or "
        "TestGRPORolloutDispatch or TestTransformersContinuousBatchingContract'",
    },
    environment={"TRL_EXPERIMENTAL_SILENCE": "1"},
    packages=("torch", "transformers", "accelerate", "pytest"),
    note="The tests of `TestHPOTrainer` are not run, because they train a model of the Hugging Face hub.",
)


@dataclass(frozen=True)
class Measured:
    """The results of a tree.

    Attributes:
        source: Description of the tree.
        gates: Name of a gate -> its result before and after.
        failed: Name of a failed test of the project -> "before", "after" or "before and after".
        issues: Report of contrib/upstream/issues -> whether its script shows the bug; None if it cannot run.
        size: Size of the change, as ``git diff --shortstat`` prints it.
    """

    source: str
    gates: Mapping[str, tuple[str, str]]
    failed: Mapping[str, str]
    issues: Mapping[str, bool | None]
    size: str


def gates(project: Project, tree: Path, tools: Path | None) -> Iterator[tuple[str, str]]:
    """Name and command of each gate that the tree has."""
    for name, command in project.workflows.items():
        files = re.findall(r"(?:tests|verl)/[\w/.*]+", command)
        if all(list(tree.glob(file)) for file in files):
            yield name, command
    hooks = tree / ".pre-commit-config.yaml"
    repositories = yaml.safe_load(hooks.read_text())["repos"] if hooks.is_file() else []
    local = [hook for repository in repositories if repository["repo"] == "local" for hook in repository["hooks"]]
    if project is TRL:
        yield "ruff check", f"{tools}/ruff check trl tests"
        yield "ruff format", f"{tools}/ruff format --check trl tests"
        # Without the option, the hook changes the files, which pre-commit then refuses.
        yield from ((hook["name"], f"{tools}/{hook['entry']} --check_only") for hook in local)
        return
    yield "ruff check", "ruff check --force-exclude {files}"
    yield "ruff format", "ruff format --check --force-exclude {files}"
    yield "mypy on the files it enforces", "mypy verl/trainer/config/algorithm.py verl/trainer/ppo/core_algos.py"
    yield from ((hook["name"], hook["entry"]) for hook in local)
    if not hooks.is_file():
        yield "compileall", "python3 -m compileall -q verl tests"


def run(project: Project, tree: Path, command: str) -> tuple[str, set[str]]:
    """What a gate says, and which tests failed; the whole output of a failure on stderr.

    The count of pytest, ``passes``, or ``fails``.
    """
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(tree),
        "HF_HUB_OFFLINE": "1",
        **project.environment,
    }
    # The commands are in this file, and use the shell's syntax.
    done = subprocess.run(  # nosec B602
        command, shell=True, cwd=tree, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        print(f"--- {tree}: {command}\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}", file=sys.stderr)
    counted = re.search(
        r"((?:\d+ (?:failed|passed|skipped|deselected|error|errors|warnings?|xfailed)(?:, )?)+) in ", done.stdout
    )
    if "pytest" in command and counted:
        failed = set(re.findall(r"^(?:FAILED|ERROR) \S+::(\w+)", done.stdout, re.MULTILINE))
        return ", ".join(part for part in counted[1].split(", ") if not re.search("warning|deselected", part)), failed
    return "fails" if done.returncode else "passes", set()


def describe(source: Path) -> str:
    """What a tree is, for a reader who has another one."""
    if not (source / ".git").exists():
        return "a source distribution, which has no documentation, no examples and only some of the tests"
    command = ["git", "-C", str(source), "show", "--no-patch", "--abbrev=9", "--date=format:%-d %B %Y"]
    done = subprocess.run([*command, "--format=commit `%h` of %cd"], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def measure(project: Project, source: Path, tools: Path | None, only: str | None) -> Measured:
    """Each gate's answer before and after, and what the reports' scripts show before."""
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory) / "tree"
        git = ["git", "-C", str(tree)]
        if (source / ".git").exists():
            subprocess.run(["git", "clone", "--quiet", "--shared", str(source), str(tree)], check=True)
        else:
            subprocess.run(["cp", "-r", str(source), str(tree)], check=True)
            subprocess.run([*git, "init", "--quiet"], check=True)
            subprocess.run([*git, "add", "--all"], check=True)
            subprocess.run([*git, "commit", "--quiet", "--message", "source distribution"], check=True)
        # A source distribution has no .gitignore.
        (tree / ".git/info/exclude").write_text("__pycache__/\n.pytest_cache/\noutputs/\n")
        # What the type gate compares with.
        subprocess.run([*git, "update-ref", "refs/remotes/origin/main", "HEAD"], check=True)
        shown = {}
        for path in issues.reports() if only is None and project is VERL else []:
            report = issues.read(path)
            shown[report.name] = issues.shown(report, tree=tree)
        changes = project.contribution.changes(tree)
        names = [name for name in changes if name.endswith(".py")]
        found = gates(project, tree, tools)
        selected = {name: command for name, command in found if only is None or re.search(only, name)}
        answers = []
        failed: dict[str, list[str]] = {}
        for applied in (False, True):
            if applied:
                commit(tree, changes, "contribution", project.contribution.TITLE)
            files = " ".join(name for name in names if (tree / name).exists())
            said = {name: run(project, tree, command.replace("{files}", files)) for name, command in selected.items()}
            answers.append({name: answer for name, (answer, _) in said.items()})
            for test in set().union(*(tests for _, tests in said.values())):
                failed.setdefault(test, []).append("after" if applied else "before")
        before, after = answers
        contributed, _ = run(project, tree, project.contributed)
        both = {"the contributed tests": ("—", contributed)} | {name: (before[name], after[name]) for name in selected}
        when = {test: " and ".join(times) for test, times in failed.items()}
        size = subprocess.run([*git, "diff", "--shortstat", "HEAD~"], check=True, capture_output=True, text=True).stdout
        return Measured(describe(source), both, when, shown, size)


def table(measured: Mapping[str, Measured]) -> str:
    """One row per gate and one column per tree, and a list of the gates that pass before and after."""
    names = list(dict.fromkeys(name for tree in measured.values() for name in tree.gates))
    lines = [f"| gate | {' | '.join(measured)} |", f"|---|{'---|' * len(measured)}"]
    passing: dict[str, list[str]] = {}
    for name in names:
        results = {tree: found.gates[name] for tree, found in measured.items() if name in found.gates}
        if set(results.values()) == {("passes", "passes")}:
            passing.setdefault(", ".join(f"`{tree}`" for tree in results), []).append(name)
            continue
        cells = []
        for tree in measured:
            before, after = results.get(tree, ("—", "—"))
            cells.append(before if before == after else f"{before} → {after}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if passing:
        lines += ["", "These gates pass before and after the contribution:", ""]
        lines += [f"- {trees}: {', '.join(gates)}" for trees, gates in passing.items()]
    return "\n".join(lines)


def issues_table(measured: Mapping[str, Measured]) -> str:
    """One row per report, one column per tree."""
    lines = [f"| report | {' | '.join(measured)} |", f"|---|{'---|' * len(measured)}"]
    for path in issues.reports():
        report = issues.read(path)
        words = {True: "shows it", False: "does not show it", None: "—"}
        cells = [words[tree.issues.get(report.name)] for tree in measured.values()]
        lines.append(f"| {report.title} (`{report.name}`) | {' | '.join(cells)} |")
    return "\n".join(lines)


def reading(project: Project, measured: Mapping[str, Measured]) -> str:
    """The legend of the table."""
    trees = "; ".join(f"`{name}` is {tree.source}" for name, tree in measured.items())
    lines = [
        "Before → after the contribution; a single entry means no change. A dash means that the tree does not have the "
        f"gate. {project.note}",
        f"Trees: {trees}.",
    ]
    for test in sorted({test for tree in measured.values() for test in tree.failed}):
        where = " and ".join(
            f"on `{name}` ({tree.failed[test]})" for name, tree in measured.items() if test in tree.failed
        )
        reason = REASONS.get(test, "the reason is not known")
        lines.append(f"One of the project's own tests fails {where}: `{test}`; {reason}.")
    if any("skipped" in answer for tree in measured.values() for both in tree.gates.values() for answer in both):
        lines.append("Skipped tests are skipped by their own conditions.")
    return "\n".join(lines)


def versions(project: Project, tools: Path | None) -> str:
    """The machine and the versions."""
    found = ", ".join(f"{name} {metadata.version(name)}" for name in project.packages)
    if tools is not None:
        found += (
            ", "
            + subprocess.run([tools / "ruff", "--version"], check=True, capture_output=True, text=True).stdout.strip()
        )
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return f"Run on {machine}, Python {platform.python_version()}, {found}."


def write(project: Project, text: str) -> None:
    """Write the tables to the page."""
    page = PAGE.read_text(encoding="utf-8")
    head, rest = page.split(project.begin)
    PAGE.write_text(f"{head}{project.begin}\n\n{text}\n\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


def main() -> None:
    """Measure the trees, and print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="+", metavar="NAME=PATH")
    parser.add_argument("--trl", action="store_true", help="the trees are of TRL")
    parser.add_argument("--tools", type=Path, metavar="BIN", help="with --trl: where its ruff and doc-builder are")
    parser.add_argument("--only", help="a regular expression: only these gates, and nothing is written")
    arguments = parser.parse_args()
    project = TRL if arguments.trl else VERL
    tools = None if arguments.tools is None else arguments.tools.resolve()
    if arguments.trl != (tools is not None):
        parser.error("--tools goes with --trl: TRL's style needs its own versions of ruff and doc-builder")
    if project is VERL and importlib.util.find_spec("pytest_asyncio") is None:
        parser.error("verl's tests need pytest-asyncio: pip install pytest-asyncio")
    measured = {}
    for tree in arguments.trees:
        name, _, path = tree.partition("=")
        measured[name] = measure(project, Path(path).resolve(), tools, arguments.only)
    *_, newest = measured
    parts = [
        table(measured),
        reading(project, measured),
        f"Size of the change of `{newest}`: {measured[newest].size.strip()}.",
    ]
    if project is VERL:
        parts.append(
            "Scripts of the bug reports, run on each tree without the contribution. A dash means that the script "
            "cannot run there, because a file or a package is missing:"
        )
        parts.append(issues_table(measured))
    text = "\n\n".join([*parts, versions(project, tools)])
    print(text)
    if arguments.only is None:
        write(project, text)


if __name__ == "__main__":
    main()
