"""``hpo-plugin files``: what it writes, what it refuses, what it says, and its exit status."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hpo_plugin.cli.app import app
from hpo_plugin.shipped import copy_files, shipped_files

ROOT = Path(__file__).parents[1]


def files(*arguments: str):
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, ["files", *arguments])


def written(directory: Path) -> dict[str, bytes]:
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def test_it_writes_every_file_names_it_and_says_what_to_do_next(tmp_path: Path):
    target = tmp_path / "a folder" / "new"
    done = files(str(target))
    assert done.exit_code == 0, done.output
    assert written(target) == {name: (ROOT / name).read_bytes() for name in shipped_files()}
    assert re.findall(r"^(\w+) +(\S.*\.\w+)$", done.stdout.split("\nNext")[0], re.MULTILINE) == [
        ("wrote", str(target / name)) for name in shipped_files()
    ]
    following = done.stdout.split("\nNext")[1]
    assert f"cd '{target}'" in following
    # What the next steps name exists in the directory.
    named = re.findall(r"(?:recipes|studies)/[\w./-]+\.\w+", following)
    assert {"recipes/cluster/slurm.sbatch", "studies/paper-countdown.yaml"} <= set(named)
    assert all((target / name).is_file() for name in named)


def test_without_a_directory_it_writes_to_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    done = files()
    assert done.exit_code == 0
    assert set(written(tmp_path)) == set(shipped_files())
    assert "cd " not in done.stdout


def test_files_that_differ_are_refused_before_anything_is_written(tmp_path: Path):
    mine = tmp_path / "recipes" / "cluster" / "slurm.sbatch"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    done = files(str(tmp_path))
    assert done.exit_code == 1
    assert "recipes/cluster/slurm.sbatch" in done.stderr
    assert "--force" in done.stderr
    assert done.stdout == ""
    assert written(tmp_path) == {"recipes/cluster/slurm.sbatch": b"mine"}


def test_force_overwrites_and_files_with_the_same_content_are_left_alone(tmp_path: Path):
    assert files(str(tmp_path)).exit_code == 0
    same, mine = tmp_path / "studies" / "gpu-proof.yaml", tmp_path / "recipes" / "cluster" / "slurm.sbatch"
    before = same.stat().st_mtime_ns
    (tmp_path / "studies" / "own.yaml").write_text("own")
    mine.write_text("mine")
    done = files(str(tmp_path), "--force")
    assert done.exit_code == 0, done.output
    assert re.findall(r"^wrote +(.+)$", done.stdout, re.MULTILINE) == [str(mine)]
    assert f"same     {same}" in done.stdout
    assert mine.read_bytes() == (ROOT / "recipes" / "cluster" / "slurm.sbatch").read_bytes()
    assert same.stat().st_mtime_ns == before
    assert (tmp_path / "studies" / "own.yaml").read_text() == "own"
    again = files(str(tmp_path))
    assert again.exit_code == 0
    assert "wrote" not in again.stdout


def test_a_target_that_cannot_be_written_is_an_error_without_a_traceback(tmp_path: Path):
    (tmp_path / "file").write_text("")
    done = files(str(tmp_path / "file"))
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.output


def test_wrong_arguments_have_an_exit_status_of_their_own(tmp_path: Path):
    assert files(str(tmp_path), "other").exit_code == 2
    assert files("--unknown").exit_code == 2


def test_paths_in_the_written_studies_exist_below_the_directory(tmp_path: Path):
    """Studies name task files and the SLURM script relative to the directory."""
    copy_files(shipped_files(), tmp_path)
    named = {
        name
        for path in (tmp_path / "studies").glob("*.yaml")
        for line in path.read_text(encoding="utf-8").splitlines()
        if not line.lstrip().startswith("#")
        for name in re.findall(r"(?:[:=]\s*|\s)((?:recipes|studies)/[\w./-]+\.(?:py|sbatch))\b", line)
    }
    assert named == {"studies/countdown_search.py", "recipes/cluster/slurm.sbatch"}
    assert all((tmp_path / name).is_file() for name in named)


def test_an_installation_without_the_files_says_so(tmp_path: Path):
    (tmp_path / "hpo_plugin").mkdir()
    with pytest.raises(FileNotFoundError, match="lacks the recipes and studies"):
        shipped_files(tmp_path / "hpo_plugin")
