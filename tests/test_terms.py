"""One term for one thing, in code, configs, help and docs; and one form of documentation."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from hpo_plugin.cli.app import app

ROOT = Path(__file__).parents[1]
#: Pattern -> the project's term. docs/contributing.md explains them.
TERMS = {
    r"\b(?:go|goes|going|went|gone) on\b(?! offer)": "resume (a run), continue (a process)",
    r"\bweigh(?:s|ed|ing)?\b": "apply α",
    r"\bentrances?\b": "advantage estimator, policy loss",
    r"\btold apart\b|\btell(?:s|ing)? \w+ apart\b": "significant; distinguish",
    r"\bhand(?:s|ed|ing)?[ _]down\b": "inject_config",
    r"\bas there\b(?!\s+(?:are|is|were|was))": "what it is, in full",
    r"\bmass\b": "abs_advantage_share",
    r"(?<!power )\bcuts?\b": "shard (over GPUs), split (of data)",
    r"\bhysteresis\b": "variant",
    r"(?<!by )\bhand(?:s|ed|ing)? (?:to|on|over)\b": "pass, forward, submit",
    r"\blikewise\b": "the same as …",
    r"\bas here\b": "what it is, in full",
    r"\bkept aside\b": "held-out",
    r"\bin one go\b": "in one command, in one process",
    r"\blets? \w+ run\b": "run, execute",
    r"\b(?:is|are|was|were) not there\b": "is missing, does not exist",
}
#: Constants that mean the same in every task.
SHARED = {"TASK", "SCHEMA", "PUBLIC_DATASET", "MAX_SEARCHED_CHARACTERS"}
#: Terms of radio engineering, and a key of version 0.1.0.
ALLOWED = {
    "hpo_plugin/tasks/telelogs/radio.py": {"hysteresis", "hands over"},
    "hpo_plugin/verl/selection.py": {"weigh"},
    "tests/verl/test_saved_configs.py": {"weigh"},
    "tests/verl/test_selection.py": {"weigh"},
    "CHANGELOG.md": {"weigh"},
}
#: Where an arm is what a study compares; elsewhere it is an algorithm or a preset.
ARMS = r"\barms?\b"
STUDIES = ("hpo_plugin/study/", "hpo_plugin/cli/study.py", "hpo_plugin/cli/app.py", "scripts/gradients.py")
STUDIES += ("docs/study.md", "docs/simulator.md", "docs/results/", "docs/contributing.md", "CHANGELOG.md")
STUDIES += ("tests/study/", "tests/simulator/", "tests/security/", "tests/torture/", "tests/upstream/test_recipe.py")
STUDIES += ("torture/long_run.py", "torture/scale.py", "torture/settings.py", "docs/robustness.md")


def commands(command: typer.core.TyperCommand, *names: str) -> list[str]:
    """The command and all commands below it."""
    found = [" ".join(names)]
    if hasattr(command, "list_commands"):
        context = command.context_class(command)
        for name in command.list_commands(context):
            found += commands(command.get_command(context, name), *names, name)
    return found


COMMANDS = commands(typer.main.get_command(app))


def documents() -> list[Path]:
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "recipes").rglob("*.md")]
    return sorted(found)


def sources() -> list[Path]:
    folders = ("hpo_plugin", "hydra_plugins", "contrib", "benchmarks", "examples", "scripts", "torture")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    return sorted(path for path in found if path.suffix in {".py", ".yaml", ".j2"} and path.is_file())


def violations(name: str, text: str) -> list[str]:
    patterns = dict(TERMS)
    if not name.startswith(STUDIES):
        patterns[ARMS] = "algorithm or preset"
    return [
        f"{name}: {match[0]!r}; the term is: {instead}"
        for pattern, instead in patterns.items()
        for match in re.finditer(pattern, text, re.IGNORECASE)
        if match[0].lower() not in ALLOWED.get(name, ())
    ]


def test_code_and_configs_use_the_terms_of_the_field():
    found = [
        fault
        for path in sources()
        for fault in violations(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_tests_use_the_terms_of_the_field():
    found = []
    for path in (ROOT / "tests").rglob("*.py"):
        if path != Path(__file__):
            text = path.read_text(encoding="utf-8").replace("_", " ")
            found += violations(path.relative_to(ROOT).as_posix(), text)
    assert found == []


#: The page that lists the terms, and the words that they replace.
LISTED = re.compile(r"### Terms.*?### Docstrings", re.DOTALL)


def test_docs_use_the_terms_of_the_field():
    found = []
    for path in documents():
        text = LISTED.sub("", path.read_text(encoding="utf-8"))
        found += violations(path.relative_to(ROOT).as_posix(), text)
    assert found == []


def test_every_command_is_known():
    assert {"", "check", "preview", "quickstart", "study run", "prepare countdown"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_uses_the_terms_of_the_field(command: str):
    shown = CliRunner(env={"COLUMNS": "300"}).invoke(app, [*command.split(), "--help"])
    assert shown.exit_code == 0, shown.output
    name = "hpo_plugin/cli/study.py" if command.startswith("study") or not command else f"hpo-plugin {command}"
    assert violations(name, shown.output) == []


def test_a_wrong_term_is_found():
    text = "The run goes on. Each arm is weighed, and the two are told apart as there."
    assert len(violations("hpo_plugin/runs/a.py", text)) == 5
    assert violations("hpo_plugin/study/a.py", "Each arm; a power cut; as there are many; 3 causes on offer") == []


def python_files() -> list[Path]:
    return [path for path in sources() if path.suffix == ".py"]


def test_fields_are_documented_in_the_docstring_of_their_class_and_constants_by_a_comment_above():
    """Never by a string below, of which a reader cannot see what it belongs to."""
    found = []
    for path in python_files():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for scope in [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]:
            for before, after in zip(scope.body, scope.body[1:], strict=False):
                is_text = isinstance(after, ast.Expr) and isinstance(getattr(after.value, "value", None), str)
                if isinstance(before, ast.Assign | ast.AnnAssign) and is_text:
                    found.append(f"{path.relative_to(ROOT)}:{after.lineno}")
    assert found == []


def test_every_field_of_a_public_dataclass_is_documented():
    found = []
    for path in (ROOT / "hpo_plugin").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
                continue
            decorated = any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
            if not decorated and not any(ast.unparse(base) == "NamedTuple" for base in node.bases):
                continue
            text = ast.get_docstring(node) or ""
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    name = field.target.id
                    if not name.startswith("_") and not re.search(rf"^\s+{name}(?: \([^)]*\))?:", text, re.MULTILINE):
                        found.append(f"{path.relative_to(ROOT).as_posix()}: {node.name}.{name}")
    assert found == []


def test_homonyms_are_gone():
    """A class name means one thing."""
    names: dict[str, list[str]] = {}
    for path in (ROOT / "hpo_plugin").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                names.setdefault(node.name, []).append(path.relative_to(ROOT).as_posix())
    # hpo_plugin.glue holds names of version 0.1.0.
    current = {name: [place for place in places if "glue/" not in place] for name, places in names.items()}
    assert {name: places for name, places in current.items() if len(places) > 1} == {}
    constants = {
        name: places
        for name, places in _constants().items()
        if len(places) > 1 and not name.startswith("_") and name not in SHARED
    }
    assert constants == {}, os.linesep.join(f"{name}: {places}" for name, places in constants.items())


def _constants() -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for path in (ROOT / "hpo_plugin").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = (
                node.targets
                if isinstance(node, ast.Assign)
                else [node.target]
                if isinstance(node, ast.AnnAssign)
                else []
            )
            for target in targets:
                if isinstance(target, ast.Name) and target.id.isupper():
                    names.setdefault(target.id, []).append(path.relative_to(ROOT).as_posix())
    return names
