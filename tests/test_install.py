"""What pip does with the wheel: beside a cluster image, and in an environment with nothing else."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
#: What a verl image holds, with local versions that no index has.
IMAGE = {
    "torch": "2.9.1+cu129",
    "vllm": "0.12.0+cu129",
    "verl": "0.9.0",
    "numpy": "2.2.6",
    "pyarrow": "21.0.0",
    "ray": "2.50.0",
    "hydra-core": "1.3.2",
    "omegaconf": "2.3.0",
    "PyYAML": "6.0.2",
    "psutil": "7.0.0",
    "packaging": "25.0",
    "rich": "14.0.0",
    "typer": "0.16.0",
}
#: What an index offers: newer versions of the image's packages, and what the image lacks.
INDEX = {
    "torch": "2.13.0",
    "vllm": "0.14.0",
    "verl": "0.9.1",
    "numpy": "2.4.0",
    "pyarrow": "23.0.0",
    "ray": "2.60.0",
    "hydra-core": "1.3.5",
    "omegaconf": "2.3.1",
    "PyYAML": "6.0.3",
    "psutil": "7.2.0",
    "packaging": "26.0",
    "rich": "15.0.0",
    "typer": "0.20.0",
    "wrapt": "2.0.0",
}
#: The image's verl and vLLM are built for its torch.
REQUIRES = {"vllm": ["torch"], "verl": ["numpy", "ray", "hydra-core"]}
CONSTRAINED = "pip list --format=freeze > image.txt"


def stand_in(folder: Path, name: str, version: str) -> None:
    """Write a wheel that holds nothing but its metadata."""
    stem = f"{re.sub(r'[-.]+', '_', name)}-{version}"
    texts = {
        f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        + "".join(f"Requires-Dist: {other}\n" for other in REQUIRES.get(name, ())),
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: stand-in\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
    }
    record = ""
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        for path, text in texts.items():
            wheel.writestr(path, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            record += f"{path},sha256={digest},{len(text)}\n"
        wheel.writestr(f"{stem}.dist-info/RECORD", f"{record}{stem}.dist-info/RECORD,,\n")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The Python of an environment with stand-ins for the image's packages, and a folder in place of an index."""
    folder = tmp_path_factory.mktemp("image")
    here, index = folder / "here", folder / "index"
    for place, versions in ((here, IMAGE), (index, INDEX)):
        place.mkdir()
        for name, version in versions.items():
            stand_in(place, name, version)
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    pip(python, "--no-deps", *map(str, here.glob("*.whl")))
    return python, index


def pip(python: Path, *arguments: str, index: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-m", "pip", "install", "--no-index", "--disable-pip-version-check", *arguments]
    command += [] if index is None else ["--find-links", str(index)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)


def versions(python: Path) -> dict[str, str]:
    listed = subprocess.run(
        [str(python), "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return dict(line.split("==") for line in listed.splitlines())


def test_beside_a_cluster_image_the_documented_command_changes_nothing_that_is_there(image, wheel_file, tmp_path):
    """docs/cluster.md: constraints from what is installed, then the package with the extra of its framework."""
    assert CONSTRAINED in (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    python, index = image
    before = versions(python)
    assert before["torch"] == IMAGE["torch"]
    (tmp_path / "image.txt").write_text("".join(f"{name}=={version}\n" for name, version in before.items()))
    constrained = ("--constraint", str(tmp_path / "image.txt"))
    done = pip(python, *constrained, f"hpo-plugin[verl] @ {wheel_file.as_uri()}", index=index)
    assert done.returncode == 0, done.stderr
    after = versions(python)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"hpo-plugin", "wrapt"}


def test_an_image_that_is_too_old_is_refused_and_left_as_it_is(image, wheel_file, tmp_path):
    python, index = image
    before = versions(python)
    (tmp_path / "image.txt").write_text("verl==0.8.0\n")
    done = pip(python, "--constraint", str(tmp_path / "image.txt"), f"{wheel_file}[verl]", index=index)
    assert done.returncode != 0
    assert "verl" in done.stderr
    assert versions(python) == before


# --- nothing but the base ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base_only(wheel_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for PYTHONPATH with the wheel and its base dependencies, and nothing else of this environment."""
    folder = tmp_path_factory.mktemp("base")
    with zipfile.ZipFile(wheel_file) as wheel:
        wheel.extractall(folder)
    (dist_info,) = folder.glob("hpo_plugin-*.dist-info")
    needed = [line for line in metadata.PathDistribution(dist_info).requires or [] if "extra ==" not in line]
    seen: set[str] = set()
    while needed:
        requirement = Requirement(needed.pop())
        name = canonicalize_name(requirement.name)
        if name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            # What the CPU build of torch does without.
            continue
        needed += distribution.requires or []
        for file in distribution.files or []:
            top = file.parts[0]
            place = Path(str(distribution.locate_file(top)))
            if top not in ("..", "__pycache__") and place.exists() and not (folder / top).exists():
                (folder / top).symlink_to(place)
    assert not (folder / "verl").exists()
    assert not (folder / "omegaconf").exists()
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(folder), "COLUMNS": "300", "HOME": str(folder)}
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, cwd=folder)


def test_the_base_gives_the_mathematics(base_only: Path):
    code = """
import torch
from hpo_plugin.algorithm import adaptive_alpha, count_signs
signs = torch.tensor([1, -1, -1, -1, -1])
print(adaptive_alpha(count_signs(signs), alpha_min=0.1))
"""
    done = run(base_only, "-c", code)
    assert done.returncode == 0, done.stderr
    assert "0.25" in done.stdout


def test_the_base_gives_data_explanations_and_scores(base_only: Path):
    arguments = ("prepare", "countdown", "--output", "data", "--train-size", "8", "--test-size", "8")
    done = run(base_only, "-m", "hpo_plugin.cli", *arguments)
    assert done.returncode == 0, done.stderr
    done = run(base_only, "-m", "hpo_plugin.cli", "explain", "countdown", "data/test.parquet")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "lacks", "extra"),
    [
        (["check"], "verl, hydra-core, omegaconf, ray, PyYAML, psutil", "verl"),
        (["launch", "--config-name=hpo_trainer", "--run-dir=r"], "verl, hydra-core", "verl"),
        (["quickstart"], "verl, hydra-core", "cpu"),
        (["study", "run", "study.yaml"], "verl, hydra-core", "verl,study"),
        (["study", "report", "study.yaml"], "omegaconf, PyYAML, scipy", "study"),
    ],
)
def test_a_command_says_which_packages_it_lacks_and_how_to_install_them(base_only: Path, arguments, lacks, extra):
    done = run(base_only, "-m", "hpo_plugin.cli", *arguments)
    assert done.returncode == 1
    assert f"not installed: {lacks}" in done.stderr
    assert f"pip install 'hpo-plugin[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert (
        run(base_only, "-m", "hpo_plugin.cli", *arguments[: 2 if arguments[0] == "study" else 1], "--help").returncode
        == 0
    )


def test_the_wheel_writes_the_recipes_and_studies_that_the_repository_has(base_only: Path):
    """Without an extra: a cluster's login node needs no more."""
    done = run(base_only, "-m", "hpo_plugin.cli", "files", "copied")
    assert done.returncode == 0, done.stderr
    copied = {path.relative_to(base_only / "copied").as_posix(): path for path in (base_only / "copied").rglob("*.*")}
    assert {"recipes/cluster/slurm.sbatch", "recipes/cluster/kuberay.yaml", "studies/paper-countdown.yaml"} <= set(
        copied
    )
    for name, path in copied.items():
        assert path.read_bytes() == (ROOT / name).read_bytes(), name
        assert f"wrote    copied/{name}" in done.stdout
    # The task file of a study was imported where it was installed, or is now: bytecode is not copied.
    (base_only / "hpo_plugin" / "share" / "studies" / "__pycache__").mkdir(exist_ok=True)
    (base_only / "hpo_plugin" / "share" / "studies" / "__pycache__" / "a.cpython-311.pyc").write_bytes(b"")
    (base_only / "copied" / "studies" / "gpu-proof.yaml").write_text("mine")
    done = run(base_only, "-m", "hpo_plugin.cli", "files", "copied")
    assert done.returncode == 1
    assert "studies/gpu-proof.yaml" in done.stderr
    done = run(base_only, "-m", "hpo_plugin.cli", "files", "copied", "--force")
    assert done.returncode == 0, done.stderr
    assert not list((base_only / "copied").rglob("*.pyc"))


def test_the_hub_source_says_what_it_lacks(base_only: Path):
    arguments = ["prepare", "telelogs", "--output", "hub", "--source", "hub"]
    done = run(base_only, "-m", "hpo_plugin.cli", *arguments)
    assert done.returncode == 1
    assert "datasets is not installed: pip install 'hpo-plugin[hub]'" in done.stderr
