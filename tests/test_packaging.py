"""What a user installs: one version, entry points, all files, pinned sets that agree, no trace of one machine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import hpo_plugin
from hpo_plugin.shipped import FOLDERS, SHARE, shipped_files

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PYPROJECT_TEXT = (ROOT / "pyproject.toml").read_text()
PYPROJECT = tomllib.loads(PYPROJECT_TEXT)

#: Of what is packed.
SUFFIXES = {".py", ".yaml", ".typed", ".j2"}
#: Of texts for users.
TEXTS = {".md", ".yaml", ".sbatch"}


def locked(name: str) -> dict[str, str]:
    """The requirements of a lock by distribution and marker, without hashes and comments."""
    lines = (re.split("[#\\\\]", line)[0].strip() for line in (ROOT / "requirements" / name).read_text().splitlines())
    requirements = [Requirement(line) for line in lines if line and not line.startswith("--hash=")]
    return {f"{r.name} ; {r.marker}": str(r.specifier) for r in requirements}


def pinned(name: str) -> dict[str, set[str]]:
    """The versions that a lock gives each distribution; several where they differ by Python version."""
    versions: dict[str, set[str]] = {}
    for requirement, specifier in locked(name).items():
        versions.setdefault(requirement.split(" ;")[0], set()).add(specifier)
    return versions


@pytest.fixture(scope="module")
def wheel(wheel_file: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(wheel_file)


def test_the_version_is_written_in_one_place():
    assert "version" in PYPROJECT["project"]["dynamic"]
    assert version("hpo-plugin") == hpo_plugin.__version__
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE)[1] == hpo_plugin.__version__


def test_texts_that_name_the_wheel_or_print_the_version_have_the_present_one():
    texts = [path for folder in ("docs", "recipes") for path in (ROOT / folder).rglob("*") if path.suffix in TEXTS]
    patterns = (r"hpo_plugin-(\d+\.\d+\.\d+)-py3-none-any\.whl", r"^ok +hpo-plugin +(\S+)$")
    named = {
        (path.relative_to(ROOT).as_posix(), found)
        for path in texts
        for pattern in patterns
        for found in re.findall(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert {name for name, _ in named} >= {"docs/cluster.md", "docs/check.md", "recipes/cluster/kuberay.yaml"}
    assert {pair for pair in named if pair[1] != hpo_plugin.__version__} == set()


def test_the_metadata_has_what_an_index_shows(wheel: zipfile.ZipFile):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = message_from_bytes(wheel.read(name))
    assert metadata["License-Expression"] == "Apache-2.0"
    classifiers = metadata.get_all("Classifier")
    # PEP 639 allows one of them: the expression.
    assert not [line for line in classifiers if line.startswith("License ::")]
    supported = SpecifierSet(metadata["Requires-Python"])
    named = {line.removeprefix("Programming Language :: Python :: ") for line in classifiers}
    for minor in range(8, 16):
        assert (f"3.{minor}" in named) == supported.contains(f"3.{minor}.1"), minor
    assert "Paper, https://arxiv.org/abs/2605.30201" in metadata.get_all("Project-URL")


def test_verl_finds_the_plugins_and_the_shell_finds_the_command():
    plugins = {e.name: e.value for e in entry_points(group="verl.plugins") if e.dist.name == "hpo-plugin"}
    assert plugins == {"hpo": "hpo_plugin.verl.plugin", "hpo_cpu": "hpo_plugin.cpu.plugin"}
    (command,) = entry_points(group="console_scripts", name="hpo-plugin")
    assert command.value == "hpo_plugin.cli.app:app"
    assert callable(command.load())


def test_the_wheel_holds_every_module_and_config(wheel: zipfile.ZipFile):
    files = [path for top in ("hpo_plugin", "hydra_plugins") for path in (ROOT / top).rglob("*") if path.is_file()]
    expected = {path.relative_to(ROOT).as_posix() for path in files if path.suffix in SUFFIXES}
    assert {"hpo_plugin/py.typed", "hydra_plugins/hpo_plugin_searchpath.py"} <= expected
    assert any(name.endswith(".yaml") for name in expected)
    shipped = {f"hpo_plugin/{SHARE}/{name}": path for name, path in shipped_files().items()}
    assert expected | shipped.keys() == {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {name for name, path in shipped.items() if wheel.read(name) != path.read_bytes()} == set()


def test_recipes_and_studies_are_shipped_and_their_collected_data_and_maintainers_texts_are_not(wheel: zipfile.ZipFile):
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    expected = {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}
    data = {name for name in expected if name.endswith(".parquet")}
    assert data
    assert set(shipped_files()) == expected - data
    assert {"recipes/cluster/slurm.sbatch", "recipes/cluster/kuberay.yaml"} <= set(shipped_files())
    held = wheel.namelist()
    assert [name for name in held if name.endswith(".parquet")] == []
    # Folders at the top of the repository, wherever they would be in the wheel.
    maintainers = {"contrib", "upstream", "tests", "docs", "scripts", "benchmarks", "examples", ".github"}
    assert [name for name in held if maintainers & set(name.split("/"))] == []


def test_the_wheel_of_the_source_distribution_holds_the_same(wheel: zipfile.ZipFile, tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("hpo_plugin", "hydra_plugins", *FOLDERS):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    with tarfile.open(tmp_path / build("sdist", source, tmp_path)) as archive:
        # Of this test's own making, and older Pythons have no filters.
        archive.extractall(tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert list(unpacked.rglob("*.parquet")) == []
    with zipfile.ZipFile(tmp_path / build("wheel", unpacked, tmp_path)) as rebuilt:
        assert sorted(rebuilt.namelist()) == sorted(wheel.namelist())
        assert [n for n in rebuilt.namelist() if ".dist-info/" not in n and rebuilt.read(n) != wheel.read(n)] == []


def build(kind: str, source: Path, target: Path) -> str:
    """Build a ``wheel`` or an ``sdist``, and return the name of its file."""
    code = f"import sys; from setuptools import build_meta; print('made', build_meta.build_{kind}(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(target)]
    done = subprocess.run(command, cwd=source, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()[-1].removeprefix("made ")


def test_the_wheel_carries_the_license(wheel: zipfile.ZipFile):
    (license_file,) = [name for name in wheel.namelist() if name.endswith("/LICENSE")]
    assert b"Apache License" in wheel.read(license_file)


def test_hydra_plugins_stays_a_namespace_package():
    """An __init__.py there would hide every other package's Hydra plugins."""
    assert not (ROOT / "hydra_plugins" / "__init__.py").exists()


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "hpo_plugin" / "configs").glob("*.yaml"))])
def test_verls_trainer_finds_our_configs_without_a_path(name: str):
    """As ``python -m verl.trainer.main_ppo --config-name=<name>`` does: its own folder first, ours by the plugin."""
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        assert compose(name)


def test_every_requirement_says_why():
    """In pyproject.toml, a comment stands above each requirement."""
    lines = [line.strip().rstrip(",") for line in PYPROJECT_TEXT.splitlines()]
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"].values()
    for requirement in [*project["dependencies"], *(requirement for extra in extras for requirement in extra)]:
        above = lines[lines.index(f'"{requirement}"') - 1]
        assert above.startswith("# "), f"{requirement} has no reason above it"


def test_the_locks_agree_so_that_one_environment_serves_all():
    cpu, dev, vllm = (pinned(f"{name}.txt") for name in ("cpu", "dev", "cpu-vllm"))
    assert cpu["verl"] == {"==0.9.1"}
    assert cpu["torch"] == {"==2.13.0"}
    assert set(cpu) < set(dev) < set(vllm)
    for name in cpu:
        assert cpu[name] == dev[name] == vllm[name], name
    for name in dev:
        assert dev[name] == vllm[name], name


def test_the_locks_fulfil_what_pyproject_asks_for():
    extras = PYPROJECT["project"]["optional-dependencies"]
    wanted = [*PYPROJECT["project"]["dependencies"], *extras["verl"], *extras["cpu"], *extras["study"]]
    versions = pinned("cpu.txt")
    for requirement in map(Requirement, wanted):
        if requirement.name == "hpo-plugin":
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        for pin in versions[name]:
            assert requirement.specifier.contains(pin.removeprefix("==")), f"{requirement} but {name}{pin}"


def test_the_locks_bring_neither_cuda_nor_the_builds_that_break_beside_cpu_torch():
    for name in ("cpu.txt", "dev.txt", "cpu-vllm.txt"):
        refused = {"torchvision", "torchaudio", "torchcodec", "triton"}
        found = [d for d in pinned(name) if d in refused or d.startswith(("nvidia-", "cuda-"))]
        assert not found, f"{name}: {found}"


def test_the_locks_name_no_index_and_no_path():
    for path in (ROOT / "requirements").glob("*.txt"):
        assert "://" not in path.read_text()
        assert not re.search(r"^\s*-(?!-hash=)", path.read_text(), re.MULTILINE), f"{path.name} sets an option of pip"


def test_tracked_files_name_no_path_of_one_machine():
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a checkout")
    tracked = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    homes = re.compile(r"(?<![\w.$}/])/(?:home|Users|root|work|opt)/\w")
    found = []
    for name in filter(None, tracked.split("\0")):
        path = ROOT / name
        if path.is_file() and path.suffix not in {".png", ".parquet"}:
            found += [f"{name}: {line.strip()}" for line in path.read_text().splitlines() if homes.search(line)]
    assert not found


def test_no_source_file_is_ignored_by_git_and_every_package_has_a_docstring():
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a checkout")
    folders = ["hpo_plugin", "hydra_plugins", "contrib", "benchmarks", "examples", "scripts", "tests", "docs"]
    command = [git, "ls-files", "--others", "--ignored", "--exclude-standard", "--", *folders]
    ignored = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    assert [name for name in ignored if not re.search(r"__pycache__/|^docs/results/.*[.]html$", name)] == []
    for folder in [path.parent for path in (ROOT / "hpo_plugin").rglob("*.py")]:
        assert (folder / "__init__.py").read_text(encoding="utf-8").startswith('"""'), folder
