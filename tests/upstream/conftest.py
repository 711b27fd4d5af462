"""verl and TRL as their wheels have them, with a contribution applied to a copy; what is installed is never touched."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from contrib.upstream import contribution, trl
from contrib.upstream.tree import write

HERE = Path(__file__).parent


def copy_of_wheel(directory: Path, package: str = "verl") -> Path:
    """A directory that holds the package as its wheel has it."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"needs {package}")
    shutil.copytree(Path(spec.origin).parent, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
    return directory


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """Not to be changed."""
    return copy_of_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def patched(tmp_path_factory):
    """The same with the contribution, written into the files."""
    tree = copy_of_wheel(tmp_path_factory.mktemp("patched"))
    write(tree, contribution.changes(tree))
    return tree


def run_in_tree(
    tree: Path, *arguments: str, plugins: str = "hpo", timeout: float = 500
) -> subprocess.CompletedProcess[str]:
    """Run Python with the package from ``tree``."""
    root = HERE.parents[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(tree), str(root), os.environ.get("PYTHONPATH")])),
        "VERL_USE_EXTERNAL_PLUGINS": plugins,
        "OMP_NUM_THREADS": "1",
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
def trl_tree(tmp_path_factory):
    """TRL with the contribution, written into the files of a copy of the installed one."""
    tree = copy_of_wheel(tmp_path_factory.mktemp("trl"), "trl")
    write(tree, trl.changes(tree))
    return tree


@pytest.fixture(scope="session")
def in_tree():
    """Runs Python with the package from a tree."""
    return run_in_tree


@pytest.fixture(scope="session")
def made_up():
    """What the tests of studies make data with."""
    path = Path(__file__).parents[1] / "study/conftest.py"
    spec = spec_from_file_location("study_conftest", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.made_up
