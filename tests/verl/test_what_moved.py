"""The script that compares two versions of verl knows the installed one, and says what is gone."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

verl = pytest.importorskip("verl")

SCRIPT = Path(__file__).parents[2] / "scripts/what_moved.py"
INSTALLED = Path(verl.__file__).parents[1]


def run(new):
    return subprocess.run([sys.executable, SCRIPT, new, "--old", INSTALLED], capture_output=True, text=True)


def test_each_place_that_is_touched_is_in_the_installed_verl():
    done = run(INSTALLED)
    assert done.returncode == 0, done.stdout + done.stderr
    places = [line for line in done.stdout.splitlines() if line.startswith("  ")]
    assert len(places) >= 19
    assert {line.split(":")[0] for line in places} == {"  same"}


def test_what_changed_is_shown_and_what_is_gone_is_found_elsewhere(tmp_path):
    for name in ("trainer", "workers", "utils", "plugin"):
        shutil.copytree(
            INSTALLED / "verl" / name, tmp_path / "verl" / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    (tmp_path / "verl/__init__.py").touch()
    losses = tmp_path / "verl/workers/utils/losses.py"
    losses.write_text(losses.read_text().replace("def ppo_loss(", "def ppo_loss(added, "))
    trainer = tmp_path / "verl/trainer/ppo/ray_trainer.py"
    trainer.rename(trainer.with_name("moved.py"))
    done = run(tmp_path)
    assert done.returncode == 1
    assert "changed: verl/workers/utils/losses.py:ppo_loss" in done.stdout
    assert "+def ppo_loss(added, " in done.stdout
    (gone,) = [line for line in done.stdout.splitlines() if "GONE" in line]
    assert "ray_trainer.py:compute_advantage; that name is now in verl/trainer/ppo/moved.py" in gone
