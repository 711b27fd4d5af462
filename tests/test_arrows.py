"""The arrows between packages point downward, and the mathematics imports torch alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hpo_plugin"
#: Room -> the extras whose distributions it may import, beside the base dependencies.
EXTRAS = {
    "hpo_plugin/verl": {"verl"},
    "hpo_plugin/trl": {"trl"},
    "hpo_plugin/openrlhf": {"openrlhf"},
    "hpo_plugin/recipe": {"verl"},
    "hpo_plugin/check": {"verl"},
    "hpo_plugin/runs": {"verl"},
    "hpo_plugin/runs/plots.py": {"cpu"},
    "hpo_plugin/runs/launch.py": {"verl"},
    "hpo_plugin/cpu": {"cpu", "cpu-vllm"},
    "hpo_plugin/quickstart": {"cpu"},
    "hpo_plugin/preview": {"preview"},
    "hpo_plugin/study": {"study"},
    "hpo_plugin/simulator": {"verl", "cpu"},
    "hpo_plugin/study/inputs.py": {"verl", "study"},
    "hpo_plugin/study/simulated.py": {"verl", "study"},
    "hpo_plugin/tasks/sources.py": {"hub"},
    "hydra_plugins": {"verl"},
}


def modules() -> list[Path]:
    return [path for top in (PACKAGE, ROOT / "hydra_plugins") for path in sorted(top.rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Names of imported modules, those inside of functions too, those for type checking not."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def distributions(extra: str) -> set[str]:
    """The distributions of the base (``""``) or of an extra, with those of the extras that it includes."""
    names: set[str] = set()
    for requirement in map(Requirement, requires("hpo-plugin") or []):
        marker = requirement.marker
        in_base = marker is None or marker.evaluate({"extra": ""})
        if in_base != (extra == "") or not (in_base or marker.evaluate({"extra": extra})):
            continue
        if canonicalize_name(requirement.name) == "hpo-plugin":
            names |= {name for other in requirement.extras for name in distributions(other)}
        else:
            names.add(canonicalize_name(requirement.name))
    return names


def test_the_arrows_between_packages_point_downward():
    """The contracts are [tool.importlinter] of pyproject.toml."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Contracts: \d+ kept, 0 broken", done.stdout)


@pytest.mark.parametrize("name", ["algorithm", "fused", "variants", "metrics"])
def test_the_mathematics_imports_torch_alone(name: str):
    roots = {module.partition(".")[0] for module in imported(PACKAGE / f"{name}.py")}
    assert roots - set(sys.stdlib_module_names) <= {"torch", "hpo_plugin"}


def test_every_import_has_its_distribution_declared_where_it_is_needed():
    owners = packages_distributions()
    base = distributions("")
    undeclared = []
    for path in modules():
        name = path.relative_to(ROOT).as_posix()
        room = max((key for key in EXTRAS if name == key or name.startswith(f"{key}/")), key=len, default=None)
        allowed = base.union(*(distributions(extra) for extra in EXTRAS.get(room, ())))
        for root in sorted({module.partition(".")[0] for module in imported(path)}):
            if root in {"hpo_plugin", "hydra_plugins", ""} | set(sys.stdlib_module_names):
                continue
            # vllm and trl are optional in the environment of the tests.
            found = {canonicalize_name(owner) for owner in owners.get(root, [root, f"{root}-cpu"])}
            if not found & allowed:
                undeclared.append(f"{name} imports {root} ({', '.join(sorted(found))})")
    assert undeclared == []


def test_an_undeclared_import_would_be_found(tmp_path: Path):
    (tmp_path / "module.py").write_text("def f():\n    import scipy.stats\n")
    assert imported(tmp_path / "module.py") == {"scipy.stats"}
    assert "scipy" in distributions("study")
    assert "scipy" not in distributions("")


def test_benchmarks_and_scripts_use_public_names_only():
    private = re.compile(
        r"from hpo_plugin[\w.]*\._\w+ import|from hpo_plugin[\w.]* import (?:.*\W)?_\w+|hpo_plugin[\w.]*\._[a-z]"
    )
    for folder in ("benchmarks", "examples", "scripts"):
        for path in (ROOT / folder).glob("*.py"):
            assert not private.search(path.read_text(encoding="utf-8")), path.name
