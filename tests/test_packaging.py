"""What a user installs: one version, entry points, all files, pinned sets that agree, no trace of one machine."""

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import hpo_plugin

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PYPROJECT_TEXT = (ROOT / "pyproject.toml").read_text()
PYPROJECT = tomllib.loads(PYPROJECT_TEXT)

#: Of what is packed.
SUFFIXES = {".py", ".yaml", ".typed", ".j2"}


def locked(name: str) -> dict[str, str]:
    """The requirements of a lock by distribution and marker, without the comment that says who asked for them."""
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements" / name).read_text().splitlines())
    requirements = [Requirement(line) for line in lines if line]
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
    assert expected == {name for name in wheel.namelist() if ".dist-info/" not in name}


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
        assert not re.search(r"^\s*-", path.read_text(), re.MULTILINE), f"{path.name} sets an option of pip"


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
