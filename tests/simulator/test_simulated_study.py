"""A study whose trainer is the simulator: the commands of any study run, collect and report it."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

pytest.importorskip("verl")

from hpo_plugin.study.cells import Workspace
from hpo_plugin.study.run import submit_command
from hpo_plugin.study.spec import StudyError, load_study

COMMAND = [sys.executable, "-m", "hpo_plugin.cli", "study"]
STUDY = {
    "name": "simulated",
    "title": "A simulated study",
    "config_name": "countdown_cpu",
    "trainer": "simulator",
    "steps": 4,
    "test_every": 2,
    "environment": {"VERL_PLATFORM": "cpu"},
    "overrides": ["data.train_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size=4"],
    "settings": {
        "easy": {
            "title": "Easy",
            "prepare": {
                "task": "countdown",
                "problems": {"counts": [3], "max_number": 12},
                "start_model": {"steps": 30, "calculated_share": 0.3},
                "train_size": 64,
                "test_size": 16,
            },
        }
    },
    "arms": {
        "grpo": {"title": "GRPO", "overrides": ["algorithm.policy_loss=grpo"]},
        "ahpo": {"title": "A-HPO", "overrides": ["algorithm.policy_loss=ahpo"]},
    },
    "experiments": {
        "one": {"title": "One", "setting": "easy", "arms": ["grpo", "ahpo"], "seeds": [0, 1], "compare": "ahpo"}
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("simulated")


def declare(folder, **changes):
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False), encoding="utf-8")
    return path


def call(*arguments):
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_a_study_is_run_collected_and_reported(folder):
    path = declare(folder)
    done = call("run", path, "--output", folder / "runs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": finished") == 4
    assert call("run", path, "--output", folder / "runs").stdout.startswith("nothing to run: 4 cells")
    collected = call("collect", path, "--output", folder / "runs")
    assert "added: 4" in collected.stdout
    reported = call("report", path, "--output", folder / "report", "--no-png")
    assert reported.returncode == 0, reported.stderr
    page = (folder / "report/simulated.md").read_text(encoding="utf-8")
    assert "Every run uses [the simulator](../simulator.md)" in page
    assert "4 of 4 runs are finished" in page


def test_what_the_simulator_does_not_implement_stops_the_study_before_anything_is_made(folder):
    path = declare(folder, overrides=["actor_rollout_ref.actor.entropy_coeff=0.1"])
    done = call("prepare", path, "--output", folder / "other", "--no-check")
    assert done.returncode == 1
    assert "actor_rollout_ref.actor.entropy_coeff=0.1: the simulator supports only 0" in " ".join(done.stderr.split())
    assert not list((folder / "other").rglob("model"))


def test_cells_of_the_simulator_are_not_submitted_to_a_cluster(folder):
    study = load_study(declare(folder))
    with pytest.raises(StudyError, match="easy/grpo/seed0 has trainer=simulator"):
        submit_command(Workspace(study, folder / "runs"), study.cells()[0])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_process_fails_its_cell_and_a_signal_ends_all_of_them(folder):
    path = declare(folder, steps=20_000, experiments={"one": {**STUDY["experiments"]["one"], "seeds": [3]}})
    command = [*COMMAND, "run", str(path), f"--output={folder / 'runs'}", "--only=grpo"]

    def started():
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 300
        while not [log for log in (folder / "runs").rglob("metrics.jsonl") if "grpo-seed3" in str(log)]:
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        # Beside it, multiprocessing has a process that tracks resources.
        (worker,) = (
            child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())
        )
        return process, worker

    process, worker = started()
    worker.kill()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "the simulator's process was killed, often because it ran out of memory" in output
    for log in (folder / "runs").rglob("metrics.jsonl"):
        if "grpo-seed3" in str(log):
            log.unlink()
    process, worker = started()
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 130
    worker.wait(timeout=30)
