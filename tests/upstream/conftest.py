"""verl as its wheel has it, with the contribution applied to a copy; the installed one is never touched."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from contrib.upstream import contribution

HERE = Path(__file__).parent


def copy_of_wheel(directory: Path) -> Path:
    """A directory that holds ``verl`` as the wheel has it."""
    spec = find_spec("verl")
    if spec is None or spec.origin is None:
        pytest.skip("needs verl")
    shutil.copytree(Path(spec.origin).parent, directory / "verl", ignore=shutil.ignore_patterns("__pycache__"))
    return directory


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """Not to be changed."""
    return copy_of_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def patched(tmp_path_factory):
    """The same with the contribution, written into the files."""
    tree = copy_of_wheel(tmp_path_factory.mktemp("patched"))
    contribution.write(tree, contribution.changes(tree))
    return tree


def run_in_tree(
    tree: Path, *arguments: str, plugins: str = "hpo", timeout: float = 500
) -> subprocess.CompletedProcess[str]:
    """Run Python with verl from ``tree``."""
    root = HERE.parents[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tree), str(root)]),
        "VERL_USE_EXTERNAL_PLUGINS": plugins,
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment, timeout=timeout)


@pytest.fixture(scope="session")
def built_in(patched):
    """What :mod:`built_in_facts` finds in a process with the patched verl, and what that process logs."""
    done = run_in_tree(patched, str(HERE / "built_in_facts.py"))
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["verl"].startswith(str(patched)), facts["verl"]
    return facts | {"log": done.stderr}


@pytest.fixture(scope="session")
def in_tree():
    """Runs Python with verl from a tree."""
    return run_in_tree


@pytest.fixture(scope="session")
def made_up():
    """What the tests of studies make data with."""
    path = Path(__file__).parents[1] / "study/conftest.py"
    spec = spec_from_file_location("study_conftest", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.made_up
