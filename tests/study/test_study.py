"""Studies on a stand-in for verl's trainer: what runs, what is resumed, what is listed; and a real one (e2e)."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner

from hpo_plugin.check.report import CheckReport, Finding
from hpo_plugin.cli.app import app
from hpo_plugin.runs import launch
from hpo_plugin.study import inputs as inputs_module
from hpo_plugin.study import run as run_module
from hpo_plugin.study.cells import State, Workspace, status
from hpo_plugin.study.collect import collect
from hpo_plugin.study.data import HELD_OUT, REWARD, read_data
from hpo_plugin.study.run import StudyRun
from hpo_plugin.study.spec import StudyError, load_study

#: Logs, evaluates, saves and resumes like verl's trainer; overrides make it fail or take longer.
STAND_IN = """
import json, os, pathlib, sys, time, zipfile

given = dict(word.lstrip("+").split("=", 1) for word in sys.argv[2:] if "=" in word)
steps, every = int(given["trainer.total_training_steps"]), int(given["trainer.save_freq"])
checkpoints = pathlib.Path(given["trainer.default_local_dir"])
first = int(given.get("trainer.resume_from_path", "_0").rpartition("_")[2])
log = open(os.environ["VERL_FILE_LOGGER_PATH"], "a")
for step in range(first + 1 if first else 0, steps + 1):
    if step:
        time.sleep(float(given.get("stand_in.seconds", 0)))
    if step == int(given.get("stand_in.fails_at", -1)):
        print("ValueError: as it was told")
        sys.exit(3)
    if step and (step % every == 0 or step == steps):
        folder = checkpoints / f"global_step_{step}"
        (folder / "actor").mkdir(parents=True)
        # torch.save writes zip archives.
        zipfile.ZipFile(folder / "actor" / "model.pt", "w").close()
        zipfile.ZipFile(folder / "data.pt", "w").close()
        (checkpoints / "latest_checkpointed_iteration.txt").write_text(str(step))
    data = {"critic/rewards/mean": step / 10, "timing_s/step": 2.0} if step else {}
    if step % int(given["trainer.test_freq"]) == 0:
        data["val-core/x/acc/mean@1"] = step / 20
    log.write(json.dumps({"step": step, "data": data}) + chr(10))
    log.flush()
"""
#: `study run` without its preparation, which needs the real verl.
DRIVER = """
from hpo_plugin.study import inputs
inputs.prepare_in_child = lambda *arguments, **options: None
from hpo_plugin.cli.app import app
app()
"""


@pytest.fixture(autouse=True)
def _stand_in(tmp_path, monkeypatch):
    package = tmp_path / "stand-in" / "verl" / "trainer"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "main_ppo.py").write_text(STAND_IN)
    paths = [str(package.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setattr(inputs_module, "prepare_in_child", lambda *arguments, **options: None)
    monkeypatch.setattr(run_module, "INTERVAL", 0.05)


@pytest.fixture
def declared():
    """Four cells of four steps."""
    return {
        "name": "small",
        "title": "A small study",
        "config_name": "countdown_cpu",
        "steps": 4,
        "test_every": 2,
        "save_every": 2,
        "settings": {"easy": {"title": "Easy"}},
        "arms": {
            "grpo": {"title": "GRPO", "overrides": ["algorithm.policy_loss=grpo"]},
            "ahpo": {"title": "A-HPO", "overrides": ["algorithm.policy_loss=ahpo"]},
        },
        "experiments": {"one": {"title": "One", "setting": "easy", "arms": ["grpo", "ahpo"], "seeds": [0, 1]}},
    }


@pytest.fixture
def study_file(tmp_path):
    """Writes a declaration."""

    def write(declaration):
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(declaration, sort_keys=False), encoding="utf-8")
        return path

    return write


@pytest.fixture
def workspace(tmp_path, study_file):
    """Writes a declaration and gives its workspace."""
    return lambda declaration: Workspace(load_study(study_file(declaration)), tmp_path / "runs")


def call(*arguments):
    return CliRunner().invoke(app, ["study", *map(str, arguments)])


def run(study_path, *arguments):
    return call("run", study_path, "--output", study_path.parent / "runs", *arguments)


def states(found):
    return [status(found, cell, ()).state for cell in found.study.cells()]


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def run_in_another_process(study_path, *arguments):
    command = [sys.executable, "-c", DRIVER, "study", "run", str(study_path), *arguments]
    return subprocess.Popen([*command, f"--output={study_path.parent / 'runs'}"], stdout=subprocess.PIPE, text=True)


def test_every_cell_is_run_once_in_the_order_of_the_study(declared, study_file, workspace):
    done = run(study_file(declared))
    assert done.exit_code == 0, done.output
    finished = re.findall(r"^(\S+): finished$", done.output, re.MULTILINE)
    assert finished == ["easy/grpo/seed0", "easy/ahpo/seed0", "easy/grpo/seed1", "easy/ahpo/seed1"]
    found = workspace(declared)
    assert states(found) == [State.FINISHED] * 4
    for cell in found.study.cells():
        lines = (found.run(cell).directory / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3, 4]
    again = run(study_file(declared))
    assert again.exit_code == 0
    assert "nothing to run: 4 cells are finished" in again.output


def test_a_failed_cell_stops_no_other_is_listed_with_its_cause_and_tried_again(declared, study_file, workspace):
    declared["arms"]["grpo"]["overrides"].append("+stand_in.fails_at=3")
    done = run(study_file(declared))
    assert done.exit_code == 1
    found = workspace(declared)
    assert states(found) == [State.FAILED, State.FINISHED] * 2
    assert "2 cells failed" in done.output
    shown = call("status", study_file(declared), "--output", found.directory.parent)
    for output in (done.output, shown.output):
        assert "easy/grpo/seed0 failed:" in output
        assert "The trainer failed (exit status 3)." in output
        assert "Cause: ValueError: as it was told" in output
    assert "2 failed, 2 finished" in shown.output
    assert re.search(r"grpo +failed 2/4 +failed 2/4", shown.output)
    # The same two, from their checkpoints, and no other.
    run(study_file(declared))
    assert [len(found.run(cell).attempts()) for cell in found.study.cells()] == [2, 1, 2, 1]
    assert [attempt.resumed_from for attempt in found.run(found.study.cells()[0]).attempts()] == [None, 2]


def test_a_killed_study_resumes(declared, study_file, workspace):
    declared |= {"steps": 12}
    declared["arms"]["ahpo"]["overrides"].append("+stand_in.seconds=0.3")
    path = study_file(declared)
    found = workspace(declared)
    cells = found.study.cells()
    first = run_in_another_process(path)
    metrics = found.run(cells[1]).directory / "attempt-1" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and '"step": 5' in metrics.read_text())
    first.kill()
    first.wait()
    wait_for(lambda: not found.run(cells[1]).busy())
    assert states(found) == [State.FINISHED, State.INTERRUPTED, State.WAITING, State.WAITING]
    done = run(path, "--only", "seed0")
    assert done.exit_code == 0, done.output
    assert len(found.run(cells[0]).attempts()) == 1
    # Step 6 may have been saved and logged before the kill arrived.
    assert [attempt.resumed_from for attempt in found.run(cells[1]).attempts()] in ([None, 4], [None, 6])
    assert list(found.run(cells[1]).rows()) == list(range(13))
    assert states(found) == [State.FINISHED, State.FINISHED, State.WAITING, State.WAITING]


def test_a_cell_killed_after_its_last_step_is_finished_without_training_again(declared, study_file, workspace):
    run(study_file(declared), "--only", "grpo/seed0")
    found = workspace(declared)
    trained = found.run(found.study.cells()[0])
    (trained.directory / "result.json").unlink()
    assert run(study_file(declared), "--only", "grpo/seed0").exit_code == 0
    assert trained.finished
    assert len(trained.attempts()) == 1


def test_cells_in_parallel_are_at_work_at_once_in_sessions_of_their_own(declared, study_file, workspace):
    for arm in declared["arms"].values():
        arm["overrides"].append("+stand_in.seconds=0.5")
    path = study_file(declared)
    found = workspace(declared)
    process = run_in_another_process(path, "--jobs=2")
    records = [found.run(cell).processes for cell in found.study.cells()]
    wait_for(lambda: sum(record.exists() for record in records) == 2)
    sessions = [json.loads(record.read_bytes())["session"] for record in records if record.exists()]
    assert len({os.getsid(session) for session in sessions} | {os.getsid(process.pid)}) == 3
    assert process.wait(timeout=120) == 0
    assert states(found) == [State.FINISHED] * 4


def test_a_signal_ends_all_cells_and_they_can_be_resumed(declared, study_file, workspace):
    for arm in declared["arms"].values():
        arm["overrides"].append("+stand_in.seconds=30")
    found = workspace(declared)
    process = run_in_another_process(study_file(declared), "--jobs=2")
    records = [found.run(cell).processes for cell in found.study.cells()[:2]]
    wait_for(lambda: all(record.exists() for record in records))
    sessions = [json.loads(record.read_bytes())["session"] for record in records]
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted; all processes of the cells have stopped" in output
    assert not any(psutil.pid_exists(session) for session in sessions)
    assert states(found) == [State.INTERRUPTED] * 2 + [State.WAITING] * 2


def test_a_cell_that_another_process_is_running_is_left_to_it(declared, workspace, study_file):
    found = workspace(declared)
    held, _ = found.start(found.study.cells()[0])
    with held.locked():
        assert states(found)[0] is State.RUNNING
        done = run(study_file(declared))
    assert done.exit_code == 0
    assert not held.finished
    assert states(found) == [State.WAITING] + [State.FINISHED] * 3


def test_a_cell_begun_from_other_inputs_is_refused(declared, workspace, tmp_path):
    declared["settings"]["easy"]["prepare"] = {
        **{"task": "countdown", "problems": {"counts": [3]}, "train_size": 8, "test_size": 8}
    }
    found = workspace(declared)
    with pytest.raises(StudyError, match="run `hpo-plugin study prepare` to make the inputs"):
        found.start(found.study.cells()[0])
    prepare = found.study.settings["easy"].prepare
    for digest in ("aaaa", "bbbb"):
        found.save_inputs(prepare, {"model": digest}, {})
        if digest == "aaaa":
            found.start(found.study.cells()[0])
    with pytest.raises(StudyError, match=r"easy/grpo/seed0 started from other inputs \(model aaaa; now model bbbb\)"):
        found.start(found.study.cells()[0])
    # Of the runner, it is a failure like any other.
    work = StudyRun(found, found.study.cells()[:2], (), stall=60, console=Console(file=open(os.devnull, "w")))  # noqa: SIM115
    work.run(jobs=1)
    assert [entry.cell.arm for entry in work.failed] == ["grpo"]
    assert states(found)[:2] == [State.FAILED, State.FINISHED]
    inputs = tmp_path / "runs" / "small" / "inputs" / prepare.name
    options = dict(override.split("=", 1) for override in inputs_module.full_overrides(found, found.study.cells()[0]))
    assert options["data.train_files"] == str(inputs / "data" / "train.parquet")
    assert options["actor_rollout_ref.model.path"] == str(inputs / "model")


def test_a_renamed_arm_keeps_its_runs_and_a_changed_one_does_not(declared, study_file, workspace):
    run(study_file(declared), "--only", "seed0")
    declared["arms"]["adaptive"] = declared["arms"].pop("ahpo")
    declared["experiments"]["one"]["arms"] = ["grpo", "adaptive"]
    assert states(workspace(declared)) == [State.FINISHED] * 2 + [State.WAITING] * 2
    declared["arms"]["grpo"]["overrides"].append("+other=1")
    assert states(workspace(declared)) == [State.WAITING, State.FINISHED, State.WAITING, State.WAITING]


def test_other_inputs_are_made_elsewhere(declared, workspace):
    places = []
    for size in (8, 9):
        declared["settings"]["easy"]["prepare"] = {
            **{"task": "countdown", "problems": {"counts": [3]}, "train_size": size, "test_size": 8}
        }
        found = workspace(declared)
        places.append(found.inputs_directory(found.study.settings["easy"].prepare))
    assert places[0] != places[1]


# --- collecting ----------------------------------------------------------------------------------------------------


def test_finished_cells_are_collected_and_survive_the_loss_of_their_runs(declared, study_file, workspace, tmp_path):
    path = study_file(declared)
    run(path, "--only", "seed0")
    done = call("collect", path, "--output", tmp_path / "runs")
    assert done.exit_code == 0, done.output
    assert "added: 2 (easy/grpo/seed0, easy/ahpo/seed0)" in done.output
    assert "not finished: 2 (easy/grpo/seed1, easy/ahpo/seed1)" in done.output
    collected = read_data(tmp_path / "study.parquet")
    (cell, *_) = collected.values()
    assert cell.values[REWARD][1:].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert cell.values[HELD_OUT][[0, 2, 4]].tolist() == pytest.approx([0, 0.1, 0.2])
    assert cell.info["result"]["versions"]["hpo-plugin"]
    assert cell.info["cell"]["overrides"][0].startswith("algorithm.policy_loss=")

    (tmp_path / "runs").rename(tmp_path / "lost")
    done = run(path)
    assert re.findall(r"^(\S+): finished$", done.output, re.MULTILINE) == ["easy/grpo/seed1", "easy/ahpo/seed1"]
    done = call("collect", path, "--output", tmp_path / "runs")
    assert "added: 2 (easy/grpo/seed1, easy/ahpo/seed1)" in done.output
    assert "unchanged: 2" in done.output
    after = read_data(tmp_path / "study.parquet")
    assert len(after) == 4
    assert all(after[key].same_as(data) for key, data in collected.items())
    assert "4 collected" not in call("status", path, "--output", tmp_path / "runs").output
    assert "2 finished, 2 collected" in call("status", path, "--output", tmp_path / "runs").output


def test_an_interrupted_cell_is_collected_with_each_step_once(declared, study_file, workspace, tmp_path):
    declared["steps"] = 6
    declared["arms"]["grpo"]["overrides"].append("+stand_in.seconds=0")
    found = workspace(declared)
    cell = found.study.cells()[0]
    interrupted, _ = found.start(cell)
    attempt = interrupted.new_attempt(None)
    # Logged up to step 3, saved at step 2: step 3 is done again, and counts once, as it was then.
    rows = [{"step": step, "data": {"critic/rewards/mean": 9.0}} for step in range(4)]
    attempt.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    attempt.log.touch()
    (interrupted.checkpoints / "global_step_2" / "actor").mkdir(parents=True)
    for name in ("actor/model.pt", "data.pt"):
        torch.save({}, interrupted.checkpoints / "global_step_2" / name)
    (interrupted.checkpoints / "latest_checkpointed_iteration.txt").write_text("2")
    run(study_file(declared), "--only", "grpo/seed0")
    collect(found, tmp_path / "data.parquet", prune=False)
    (data,) = read_data(tmp_path / "data.parquet").values()
    assert data.values[REWARD].tolist() == pytest.approx([9.0, 9.0, 9.0, 0.3, 0.4, 0.5, 0.6])
    assert data.info["attempts"] == 2


def test_collected_cells_that_are_no_longer_of_the_study_stay_until_pruned(declared, study_file, workspace, tmp_path):
    run(study_file(declared), "--only", "grpo")
    path = tmp_path / "data.parquet"
    collect(workspace(declared), path, prune=False)
    declared["experiments"]["one"]["seeds"] = [1]
    done = collect(workspace(declared), path, prune=False)
    assert (done.foreign, done.kept, len(read_data(path))) == (1, ["easy/grpo/seed1"], 2)
    done = collect(workspace(declared), path, prune=True)
    assert (done.foreign, len(read_data(path))) == (1, 1)


def test_inputs_other_than_those_of_collected_cells_with_the_same_seed_stop_the_study(
    declared, study_file, workspace, tmp_path
):
    declared["settings"]["easy"]["prepare"] = {
        **{"task": "countdown", "problems": {"counts": [3]}, "train_size": 8, "test_size": 8}
    }
    found = workspace(declared)
    prepare = found.study.settings["easy"].prepare
    found.save_inputs(prepare, {"model": "aaaa"}, {"sampled": {"correct": 0.05}})
    run(study_file(declared), "--only", "grpo/seed0")
    call("collect", study_file(declared), "--output", tmp_path / "runs")
    found.save_inputs(prepare, {"model": "bbbb"}, {})
    done = run(study_file(declared))
    assert done.exit_code == 1
    assert [state for state in states(found) if state is State.WAITING] == [State.WAITING] * 3
    assert "Runs with the same seed must start from the same inputs" in " ".join(done.output.split())
    assert run(study_file(declared), "--only", "seed1").exit_code == 0
    assert call("collect", study_file(declared), "--output", tmp_path / "runs").exit_code == 0


# --- clusters ------------------------------------------------------------------------------------------------------


def test_commands_for_a_cluster_are_printed_and_parse(declared, study_file, workspace):
    declared |= {"submit": "sbatch --job-name={name} job.sbatch {arguments}", "environment": {"KEY": "a b"}}
    declared["arms"]["grpo"]["overrides"].append("+data.title='a b'")
    done = run(study_file(declared), "--print", "--only", "seed0")
    lines = done.output.splitlines()
    assert len(lines) == 2
    found = workspace(declared)
    cell = found.study.cells()[0]
    words = shlex.split(lines[0])
    assert words[:4] == ["KEY=a b", "sbatch", "--job-name=small-easy-grpo-seed0", "job.sbatch"]
    assert words[4:6] == [f"--run-dir={found.run(cell).directory}", "--config-name=countdown_cpu"]
    assert words[6:] == [*cell.overrides, "trainer.save_freq=2"]
    assert states(found) == [State.WAITING] * 4


def test_cells_are_submitted_once_unless_asked_again(declared, study_file, workspace, tmp_path):
    declared["submit"] = f"echo {{name}} {{arguments}} >> {tmp_path / 'queue'}; echo job 7"
    path = study_file(declared)
    done = run(path, "--submit", "--only", "ahpo")
    assert done.output.splitlines() == ["easy/ahpo/seed0: job 7", "easy/ahpo/seed1: job 7"]
    assert states(workspace(declared)) == [State.WAITING, State.SUBMITTED] * 2
    run(path, "--submit")
    run(path, "--submit", "--again", "--only", "ahpo/seed1")
    queued = [line.split()[0] for line in (tmp_path / "queue").read_text().splitlines()]
    assert queued == [f"small-easy-{cell}" for cell in ("ahpo-seed0", "ahpo-seed1", "grpo-seed0", "grpo-seed1")] + [
        "small-easy-ahpo-seed1"
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--print", "--submit"], "--print and --submit exclude each other"),
        (["--again"], "--again needs --submit"),
    ],
)
def test_options_that_do_not_belong_together_stop_the_command(declared, study_file, options, said):
    done = run(study_file(declared), *options)
    assert done.exit_code == 1
    assert said in " ".join(done.output.split())


def test_a_cell_trained_by_its_printed_command_is_collected(declared, study_file, workspace, tmp_path, monkeypatch):
    class OneNode:
        failure = None
        join = staticmethod(lambda config: contextlib.nullcontext(OneNode()))
        lacks = staticmethod(lambda config: None)
        living_nodes = staticmethod(lambda: {"a"})
        dead_nodes = staticmethod(dict)

    monkeypatch.setattr(launch, "Cluster", OneNode)
    monkeypatch.setattr(launch, "run_checks", lambda *arguments, **options: CheckReport([Finding("all", "fine")]))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    path = study_file(declared)
    printed = run(path, "--print", "--only", "ahpo/seed1")
    assert states(workspace(declared)) == [State.WAITING] * 4
    program, *arguments = shlex.split(printed.output)
    assert program == "hpo-plugin"
    launched = CliRunner().invoke(app, arguments)
    assert launched.exit_code == 0, launched.output
    found = workspace(declared)
    assert states(found) == [State.WAITING] * 3 + [State.FINISHED]
    assert collect(found, tmp_path / "study.parquet", prune=False).added == ["easy/ahpo/seed1"]
    (data,) = read_data(tmp_path / "study.parquet").values()
    assert data.values[REWARD][4] == pytest.approx(0.4)
    assert data.values[HELD_OUT][4] == pytest.approx(0.2)


def test_a_submit_command_that_fails_is_shown(declared, study_file):
    declared["submit"] = "false {arguments}"
    done = run(study_file(declared), "--submit")
    assert done.exit_code == 1
    assert "easy/grpo/seed0: the submit command failed (exit status 1)" in done.output


# --- the table -----------------------------------------------------------------------------------------------------


def test_the_live_table_shows_every_cell_and_how_far_it_is(declared, workspace):
    for arm in declared["arms"].values():
        arm["overrides"].append("+stand_in.seconds=0.3")
    found = workspace(declared)
    console = Console(force_terminal=True, width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    StudyRun(found, found.study.cells()[:2], (), stall=60, console=console).run(jobs=1)
    text = console.export_text()
    assert re.search(r"easy +grpo +\d/4", text)
    assert re.search(r"easy/grpo/seed0 +[1-4]/4 +0\.\d00", text)
    assert re.search(r"easy +ahpo +waiting", text)
    assert "2 of 2 cells done" in text


def test_a_study_with_a_fault_is_one_line_and_exit_status_1(declared, study_file):
    declared["steps"] = 0
    for command in ("run", "status", "collect", "report", "prepare"):
        done = call(command, study_file(declared))
        assert done.exit_code == 1, command
        assert "steps=0 must be at least 1" in done.output


def test_an_unknown_config_or_key_is_found_before_anything_is_made(declared, study_file, monkeypatch):
    monkeypatch.setattr(inputs_module, "make_study_inputs", lambda *arguments: pytest.fail("inputs were made"))
    declared["config_name"] = "countdown_gpu"
    done = call("prepare", study_file(declared), "--no-check")
    assert done.exit_code == 1
    assert "seed0: countdown_gpu: " in done.output
    declared |= {"config_name": "countdown_cpu", "overrides": ["data.train_batchsize=8"]}
    done = call("prepare", study_file(declared), "--no-check")
    assert done.exit_code == 1
    assert "train_batchsize" in done.output
    declared["overrides"] = []
    declared["arms"]["grpo"]["overrides"] = ["algorithm.policy_loss=banana"]
    done = call("prepare", study_file(declared), "--no-check")
    assert done.exit_code == 1
    assert "algorithm.policy_loss=banana is not a preset" in " ".join(done.output.split())


def test_an_unknown_field_of_the_start_model_is_named_with_those_that_there_are(declared, workspace):
    declared["settings"]["easy"]["prepare"] = {
        "task": "countdown",
        "train_size": 8,
        "test_size": 8,
        "start_model": {"calculated": 0.1},
    }
    found = workspace(declared)
    with pytest.raises(
        StudyError,
        match=r"start_model: calculated is not a setting of the start model of countdown; .* calculated_share",
    ):
        inputs_module.make_study_inputs(found, found.study.cells(), Console(quiet=True))


def test_a_field_of_the_start_model_that_verls_sft_trainer_would_ignore_is_refused(declared, workspace):
    declared["settings"]["easy"]["prepare"] = {
        **{"task": "telelogs", "train_size": 8, "test_size": 40},
        "start_model": {"calculated_share": 0.1},
    }
    found = workspace(declared)
    with pytest.raises(StudyError, match=r"start_model: calculated_share has no effect, .*max_positions"):
        inputs_module.make_study_inputs(found, found.study.cells(), Console(quiet=True))


def test_a_report_of_missing_data_names_the_file(declared, study_file):
    done = call("report", study_file(declared), "--data", "elsewhere.parquet")
    assert done.exit_code == 1
    assert "elsewhere.parquet does not exist" in done.output


# --- a real one ----------------------------------------------------------------------------------------------------


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "prepare",
    [
        {
            **{"task": "countdown", "problems": {"counts": [3], "max_number": 12}, "train_size": 64, "test_size": 8},
            "start_model": {"steps": 20},
        },
        # The same way through the code, with a longer SFT stage.
        {"task": "telelogs", "problems": {"seed": 3}, "train_size": 64, "test_size": 40},
    ],
    ids=lambda prepare: prepare["task"],
)
def test_a_study_from_one_file_to_its_report(prepare, declared, study_file, tmp_path, monkeypatch):
    monkeypatch.undo()
    declared |= {"steps": 2, "test_every": 1, "environment": {"VERL_PLATFORM": "cpu"}}
    declared["overrides"] = ["data.train_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size=4"]
    declared["experiments"]["one"]["seeds"] = [0]
    declared["config_name"] = f"{prepare['task']}_cpu"
    declared["settings"]["easy"]["prepare"] = prepare
    path = study_file(declared)
    command = [sys.executable, "-m", "hpo_plugin.cli", "study"]
    done = subprocess.run([*command, "run", path, f"--output={tmp_path}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    subprocess.run([*command, "collect", path, f"--output={tmp_path}"], check=True)
    data = read_data(path.with_suffix(".parquet"))
    assert sorted(cell.arm for cell in data.values()) == ["ahpo", "grpo"]
    one, two = data.values()
    assert one.info["inputs"] == two.info["inputs"]
    # One start model and one order of problems: the first step draws the same samples whatever the algorithm.
    assert one.values["response_length/mean"][1] == two.values["response_length/mean"][1]
    subprocess.run([*command, "report", path, f"--output={tmp_path / 'report'}"], check=True)
    assert "2 of 2 runs are finished" in Path(tmp_path / "report" / "small.md").read_text()
