"""The analysis of long runs finds what grows, on series that are made up and on a process that grows."""

import dataclasses
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import psutil
import pytest
import yaml

from hpo_plugin.study.spec import SIMULATOR, load_study
from torture import long_run
from torture.long_run import INTERVAL, Sample, judge, role_of, sample, slope, trends
from torture.probe import Result

#: Two hours, with a step every four seconds.
COUNT = int(2 * 3600 / INTERVAL)


def series(private, *, handles=lambda x, rng: 40.0, role="ray::WorkerDict", seed=0, count=COUNT):
    """Samples of one process; memory and handles are functions of hundreds of steps."""
    rng = np.random.default_rng(seed)
    return [
        Sample(
            seconds=number * INTERVAL,
            step=int(number * INTERVAL / 4),
            role=role,
            process=f"{role}-{seed}",
            private=float(private(number * INTERVAL / 400, rng)),
            resident=900.0,
            handles=int(handles(number * INTERVAL / 400, rng)),
            threads=12,
        )
        for number in range(count)
    ]


def failures(samples):
    result = Result()
    judge(trends(samples), result)
    return result.failures


@pytest.mark.parametrize(("role", "bound"), [("ray::GlobalRequestLoadBalancer", 20), ("gcs_server", 10)])
def test_two_processes_have_a_larger_bound_of_memory(role, bound):
    below, above = (lambda x, rng, share=share: 500 + share * bound * x + rng.standard_normal() for share in (0.7, 1.2))
    assert failures(series(below))
    assert failures(series(below, role=role)) == []
    assert failures(series(above, role=role))


FLAT = {
    "constant": lambda x, rng: 500,
    "noisy": lambda x, rng: 500 + 10 * rng.standard_normal(),
    # A garbage collector.
    "sawtooth": lambda x, rng: 500 + 30 * (x * 7 % 1) + rng.standard_normal(),
    # Caches fill in the first quarter.
    "warm-up": lambda x, rng: 500 + 100 * min(1, x / 4) + 3 * rng.standard_normal(),
    "slow, below the bound": lambda x, rng: 500 + 2 * x + 5 * rng.standard_normal(),
    "shrinks": lambda x, rng: 500 - 8 * x,
}
GROWS = {
    "leak": lambda x, rng: 500 + 8 * x,
    "noisy leak": lambda x, rng: 500 + 8 * x + 10 * rng.standard_normal(),
    "leak below a sawtooth": lambda x, rng: 500 + 8 * x + 30 * (x * 7 % 1),
    "leak in the second half": lambda x, rng: 500 + 12 * max(0, x - 9),
    "steps": lambda x, rng: 500 + 50 * (x // 4),
}


@pytest.mark.parametrize("name", FLAT)
def test_memory_that_does_not_grow_passes(name):
    assert failures(series(FLAT[name])) == []


@pytest.mark.parametrize("name", GROWS)
def test_memory_that_grows_is_found_and_its_process_is_named(name):
    samples = series(GROWS[name]) + series(FLAT["noisy"], role="raylet", seed=1)
    (failure,) = failures(samples)
    assert failure.startswith("ray::WorkerDict: private memory grows by ")
    assert "MiB per 100 steps, bound 5" in failure


def test_file_handles_that_grow_are_found():
    (failure,) = failures(series(FLAT["noisy"], handles=lambda x, rng: 40 + 2 * x + rng.integers(0, 3)))
    assert "file handles grow by" in failure
    assert failures(series(FLAT["noisy"], handles=lambda x, rng: 40 + rng.integers(0, 3))) == []


def test_connections_that_are_closed_again_are_not_a_leak_and_do_not_hide_one():
    """Ray's processes open connections for a while."""
    opened = lambda x: 9 * (10 < x < 16)  # noqa: E731
    assert failures(series(FLAT["noisy"], handles=lambda x, rng: 40 + opened(x))) == []
    assert failures(series(FLAT["noisy"], handles=lambda x, rng: 40 + opened(x) + 1.5 * x))
    assert failures(series(FLAT["noisy"], handles=lambda x, rng: 40 + 9 * (x < 6) + 1.5 * x))


def test_the_warm_up_is_a_share_of_the_steps_not_of_the_samples():
    """A study whose first cells take most of the time: caches fill in the next ones."""
    rng = np.random.default_rng(0)
    done = [*range(10)] * 10 + [*range(10, 210, 5)]
    private = [400 + min(1, cells / 40) * 30 + rng.standard_normal() for cells in sorted(done)]
    assert slope([cells / 100 for cells in sorted(done)], private).high < 5


def test_too_few_samples_prove_nothing_and_fail():
    found = failures(series(FLAT["constant"], count=12))
    assert len(found) == 3
    assert "[-inf, inf]" in found[0]


def test_the_interval_contains_the_slope_for_noise_that_depends_on_the_sample_before():
    """So many of 300 series as the confidence says, to a few percent: samples are not independent."""
    rng, x, inside = np.random.default_rng(0), np.arange(COUNT) / 25, 0
    for _ in range(300):
        noise = np.zeros(COUNT)
        for number in range(1, COUNT):
            noise[number] = 0.8 * noise[number - 1] + rng.standard_normal()
        found = slope(x, 500 + 3 * x + noise)
        inside += found.low <= 3 <= found.high
    assert inside > 0.9 * 300


def test_processes_that_ended_early_have_no_trend_and_a_worker_has_its_last_role():
    long, short = series(FLAT["constant"]), series(GROWS["leak"], seed=1, count=COUNT // 4)
    idle = [dataclasses.replace(entry, role="ray::IDLE") for entry in long[:10]]
    (trend,) = trends([*idle, *long[10:], *short])
    assert (trend.role, trend.samples, trend.peak) == ("ray::WorkerDict", COUNT, 900.0)


@pytest.mark.parametrize(
    ("command", "role"),
    [
        (["ray::WorkerDict.actor_rollout_update_actor"], "ray::WorkerDict"),
        (["ray::IDLE", "", ""], "ray::IDLE"),
        (["/env/bin/python", "-m", "hpo_plugin.cli", "study", "run"], "hpo-plugin"),
        (["/env/bin/python", "-m", "verl.trainer.main_ppo", "--config-name=countdown_cpu"], "trainer"),
        (["/env/bin/python", "-u", "/env/ray/dashboard/agent.py", "--port=1"], "agent.py"),
        (["/env/bin/python", "-c", "from multiprocessing.spawn import spawn_main; spawn_main()"], "simulator"),
        (["/env/ray/core/raylet", "--node=1"], "raylet"),
        ([], "unknown"),
    ],
)
def test_roles(command, role):
    assert role_of(command) == role


def test_a_process_that_grows_is_found():
    """1 MiB and a file handle every 20 ms, against bounds of 5 MiB and one handle per 100 steps."""
    code = (
        "import time\nkept = []\nwhile True:\n"
        "    kept += [bytearray(b'x' * 2**20), open('/dev/null')]\n    time.sleep(0.02)"
    )
    samples = []
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            watched, begin = psutil.Process(process.pid), time.monotonic()
            for number in range(60):
                samples += sample([watched], time.monotonic() - begin, number)
                time.sleep(0.03)
        finally:
            process.kill()
    found = failures(samples)
    assert [line.split(": ")[1].split(" grow")[0] for line in found] == ["private memory", "file handles"]
    assert sample([watched], 0.0, 0) == []


# --- the run -------------------------------------------------------------------------------------------------------

#: Stands for the quickstart: a step every 20 ms; an interrupt ends it with status 130.
STAND_IN = """
import json, pathlib, sys, time
attempt = pathlib.Path(sys.argv[1]) / "runs" / "run-001" / "attempt-1"
attempt.mkdir(parents=True)
try:
    for step in range(100000):
        with (attempt / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "data": {"x": "y" * int(sys.argv[2])}}) + chr(10))
        time.sleep(0.02)
except KeyboardInterrupt:
    sys.exit(int(sys.argv[3]))
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    def install(line=10, status=130):
        command = [sys.executable, "-c", STAND_IN, str(tmp_path), str(line), str(status)]
        monkeypatch.setattr(long_run, "quickstart", lambda folder: command)
        # A few seconds: the bounds are not for them.
        monkeypatch.setattr(long_run, "HANDLES_BOUND", 1e9)
        monkeypatch.setattr(long_run, "THREADS_BOUND", 1e9)
        monkeypatch.setattr(long_run, "MEMORY_BOUND", 1e9)
        return long_run.train(tmp_path, hours=3 / 3600, interval=0.05)

    return install


def test_a_run_is_sampled_and_interrupted(stand_in, tmp_path, capsys):
    result = stand_in()
    assert result.failures == []
    assert result.inputs > 20
    assert result.worst["sampled processes"] == 1
    assert result.worst["logs (kB per step)"] < 0.1
    capsys.readouterr()
    assert long_run.main(["--read", str(tmp_path)]) == 0
    assert "MiB, 0 handles and 0 threads per 100 steps" in capsys.readouterr().out


def test_large_logs_and_another_exit_status_are_found(stand_in):
    large, status = sorted(stand_in(line=100_000, status=1).failures, reverse=True)
    assert "bytes per step, bound 32768" in large
    assert "did not end with exit status 130" in status


def test_a_run_that_ends_by_itself_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(long_run, "quickstart", lambda folder: [sys.executable, "-c", "raise SystemExit('broken')"])
    found = long_run.train(tmp_path, hours=1.0, interval=0.05).failures
    assert any("the command ended: broken" in line for line in found)


def test_the_study_has_the_cells_that_it_says(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(long_run.declaration(200, 10), sort_keys=False))
    cells = load_study(path).cells()
    assert Counter(cell.trainer for cell in cells) == {SIMULATOR: 200, "verl": 10}
