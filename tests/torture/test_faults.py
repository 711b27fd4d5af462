"""The harness that kills training runs: its oracle and its checks, on small programs; and one real run (e2e)."""

import dataclasses
import functools
import json
import random
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from torture import faults
from torture.faults import Reference, Subject

# --- a small program instead of a training --------------------------------------------------------------------------

#: Logs ten steps and saves every second one; ``defect.txt`` makes it wrong in one way.
PROGRAM = """
import json, random, subprocess, sys, time
from pathlib import Path

work = Path(sys.argv[1])
defect = (work.parent / "defect.txt").read_text()
checkpoint, log = work / "checkpoint.txt", work / "log.jsonl"
start = int(checkpoint.read_text()) if checkpoint.exists() else 0
rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
if start and defect == "forgets":
    start -= 2
if defect != "repeats":
    rows = [row for row in rows if row["step"] <= start]
log.write_text("".join(json.dumps(row) + chr(10) for row in rows))
with (work / "starts.txt").open("a") as file:
    file.write(f"{start}" + chr(10))
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)", "a-worker"])
for step in range(start + 1, 11):
    time.sleep(0.05)
    # So that a slow test does not miss it.
    while not start and step == 6 and (work.parent / "wait").exists() and worker.poll() is None:
        time.sleep(0.05)
    if worker.poll() is not None:
        print("stopped" if defect == "silent" else "The worker was killed by SIGKILL.", flush=True)
        sys.exit(1)
    if start and step == start + 1 and defect == "skips":
        continue
    alpha = random.random() if start and defect == "random" else 0.25 + step / 100
    with log.open("a") as file:
        file.write(json.dumps({"step": step, "alpha": alpha, "plus": alpha / 2, "minus": 0.5}) + chr(10))
    if step % 2 == 0:
        checkpoint.write_text(str(step))
if not (start and defect == "leaves"):
    worker.kill()
"""


def starts(work):
    path = work / "starts.txt"
    return [int(line) or None for line in path.read_text().splitlines()] if path.exists() else []


def read_log(work):
    return [(row["step"], row) for row in map(json.loads, (work / "log.jsonl").read_text().splitlines())]


@pytest.fixture
def subject(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "SHARED", tmp_path / "shared")
    monkeypatch.setattr(faults, "GONE", 2.0)
    (tmp_path / "shared").mkdir()
    (tmp_path / "program.py").write_text(PROGRAM)
    for folder in (tmp_path, tmp_path / "shared"):
        (folder / "defect.txt").write_text("")
    (tmp_path / "wait").touch()
    return Subject(
        name="small",
        steps=range(1, 11),
        command=lambda work: ([sys.executable, str(tmp_path / "program.py"), str(work)], {}),
        marks=("log.jsonl",),
        roles={"launcher": "", "worker": "a-worker"},
        inputs=(),
        rows=read_log,
        compared=("alpha",),
        alpha=("alpha", "plus", "minus"),
        last_whole=lambda work: (
            int((work / "checkpoint.txt").read_text()) if (work / "checkpoint.txt").exists() else None
        ),
        resumes=starts,
        incomplete=lambda work: [] if (work / "checkpoint.txt").read_text() == "10" else ["no last checkpoint"],
    )


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("role", ["launcher", "worker"])
def test_a_run_that_resumes_correctly_has_no_failures(subject, work, role, monkeypatch):
    monkeypatch.setattr(Reference, "moment", lambda *_, **__: (5, 0.0))
    result = faults.kill_case(subject, role, 1, work)
    assert result.failures == []
    assert (result.inputs, result.counts["SIGKILLs"]) == (1, 1)
    assert result.counts["runs that stopped and were resumed"] == 1
    assert len(starts(work)) == 2


@pytest.mark.parametrize(
    ("defect", "said"),
    [
        ("repeats", "the metrics have the steps"),
        ("skips", "the metrics have the steps"),
        ("random", "without the fault"),
        ("forgets", "but the last whole checkpoint is"),
        ("silent", "stopped without a cause"),
        ("leaves", "still runs after the end of the command"),
    ],
)
def test_each_defect_of_a_program_is_a_failure(subject, work, tmp_path, monkeypatch, defect, said):
    # After the fourth and before the sixth step, so that there is a checkpoint, and a step to repeat.
    monkeypatch.setattr(Reference, "moment", lambda *_, **__: (5, 0.0))
    faults.reference(subject)
    (tmp_path / "defect.txt").write_text(defect)
    result = faults.kill_case(subject, "worker", 0, work)
    assert any(said in failure for failure in result.failures), result.failures


def test_a_command_that_ends_before_the_fault_is_a_failure(subject, work, tmp_path, monkeypatch):
    (tmp_path / "wait").unlink()
    faults.reference(subject)
    monkeypatch.setattr(Reference, "moment", lambda *_, **__: (10, 60.0))
    (failure,) = faults.kill_case(subject, "worker", 0, work).failures
    assert "ended before the fault (exit status 0)" in failure


# --- the moment of a fault ------------------------------------------------------------------------------------------


def test_moments_are_uniform_over_the_reference_and_are_given_by_its_progress():
    made = Reference(times=[10.0, 10.0, 12.0, 20.0], seconds=30.0, rows={}, folder=Path())
    rng = random.Random(0)
    moments = [made.moment(rng, whole=True) for _ in range(3000)]
    assert {number for number, _ in moments} == {0, 2, 3, 4}
    for number, limit in ((0, 10.0), (2, 2.0), (3, 8.0), (4, 10.0)):
        delays = [delay for found, delay in moments if found == number]
        assert all(0 <= delay <= limit for delay in delays)
        # The share of a phase is its share of the time.
        assert len(delays) / 3000 == pytest.approx(limit / 30, abs=0.03)
    assert max(number for number, _ in (made.moment(rng, whole=False) for _ in range(1000))) == 3


# --- the oracle -----------------------------------------------------------------------------------------------------


def make_run(work, steps):
    attempt = work / "runs" / "x-001" / "attempt-1"
    attempt.mkdir(parents=True)
    (attempt / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s, "data": {}}) + "\n" for s in range(steps + 1))
    )
    for step in range(2, steps + 1, 2):
        folder = attempt.parent / "checkpoints" / f"global_step_{step}"
        (folder / "actor").mkdir(parents=True)
        for kind in ("model", "optim", "extra_state"):
            torch.save({"x": torch.zeros(100)}, folder / "actor" / f"{kind}_world_size_1_rank_0.pt")
        torch.save({}, folder / "data.pt")
    (attempt.parent / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(steps))


def test_the_newest_checkpoint_that_torch_can_load_and_whose_step_is_logged_is_expected(tmp_path):
    assert faults.last_whole_of_verl(tmp_path) is None
    make_run(tmp_path, 6)
    assert faults.last_whole_of_verl(tmp_path) == 6
    faults.truncate(faults.MODEL, 0.5, tmp_path)
    assert faults.last_whole_of_verl(tmp_path) == 4
    metrics = tmp_path / "runs" / "x-001" / "attempt-1" / "metrics.jsonl"
    # The row of step 4 is not complete.
    metrics.write_text(metrics.read_text()[: metrics.read_text().index('"step": 4') + 12])
    assert faults.last_whole_of_verl(tmp_path) == 2
    faults.remove_all(tmp_path)
    assert faults.last_whole_of_verl(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (functools.partial(faults.truncate, faults.MODEL, 0.5), 4),
        (functools.partial(faults.truncate, "data.pt", 0.0), 4),
        (functools.partial(faults.remove, "data.pt"), 4),
        (functools.partial(faults.tracker, ""), 4),
        (functools.partial(faults.tracker, None), 4),
        (functools.partial(faults.tracker, "4"), 4),
        (faults.remove_all, None),
    ],
)
def test_the_damage_of_the_probes_makes_the_run_resume_from_an_older_checkpoint(tmp_path, change, expected):
    from hpo_plugin.runs.directory import Run

    make_run(tmp_path, 6)
    run = Run(tmp_path / "runs" / "x-001")
    (run.directory / "attempt-1" / "attempt.json").write_text('{"resumed_from": null}')
    assert run.resume_step() == 6
    change(tmp_path)
    assert run.resume_step() == expected


def test_a_wrong_alpha_is_found_also_where_the_reference_has_the_same():
    subject = dataclasses.replace(faults.COUNTDOWN, steps=range(1, 2))
    names = subject.alpha

    def wrong(alpha, positive, negative):
        row = dict(zip(names, (alpha, positive, negative), strict=True))
        return faults.check_rows(subject, [(1, row)], {1: row})

    assert wrong(0.5, 0.2, 0.4) == []
    assert wrong(0.1, 0.0, 0.4) == []
    assert wrong(1.0, 0.0, 0.0) == []
    assert wrong(1.0, 0.5, 0.4) == []
    assert len(wrong(0.5, 0.2, 0.5)) == 1


def test_a_corrupt_row_group_cannot_be_read_and_is_repaired(tmp_path):
    folder = tmp_path / "runs" / "data" / "countdown"
    folder.mkdir(parents=True)
    table = pa.table({"prompt": [f"{number}={number}" for number in range(2000)]})
    pq.write_table(table, folder / "train.parquet")
    with faults.corrupt_row_group(tmp_path):
        assert pq.read_metadata(tmp_path / "data.parquet").num_rows == 2000
        with pytest.raises(OSError):  # noqa: PT011
            pq.read_table(tmp_path / "data.parquet")
    assert pq.read_table(tmp_path / "data.parquet").equals(table)


def test_the_full_run_has_at_least_fifty_kills_and_its_cases_have_valid_names():
    from torture import trl_faults

    probes = [*faults.PROBES, *trl_faults.PROBES]
    assert len({probe.name for probe in probes}) == len(probes)
    kills = [probe for probe in probes if probe.title.startswith("SIGKILL of")]
    assert sum(len(probe.cases) for probe in kills) >= 50
    assert all(set(case) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for probe in probes for case in probe.cases)


# --- a real run -----------------------------------------------------------------------------------------------------


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_real_run_whose_actor_worker_is_killed_is_resumed(tmp_path, monkeypatch):
    pytest.importorskip("verl")
    monkeypatch.setattr(faults, "SHARED", tmp_path / "shared")
    work = tmp_path / "work"
    work.mkdir()
    result = faults.kill_case(faults.COUNTDOWN, "actor", 0, work)
    assert result.failures == []
    assert result.counts["SIGKILLs"] == 1
