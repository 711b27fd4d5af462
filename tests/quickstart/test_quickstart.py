"""The quickstart's commands, figures and screen; and one real run that is killed in the middle (e2e)."""

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from hpo_plugin.cli.app import app
from hpo_plugin.quickstart import run as run_module
from hpo_plugin.quickstart.form import Inputs
from hpo_plugin.quickstart.run import equivalent_command, summarize, training_of
from hpo_plugin.runs.directory import CHECKPOINT_FILES, Run, RunRequest, choose_run
from hpo_plugin.runs.training import Training, TrainingError, attempt_overrides, trainer_command
from hpo_plugin.runs.verl_log import MetricsFile
from hpo_plugin.tasks.task import load_task

REQUEST = RunRequest(policy_loss="ahpo", seed=3, steps=60, rollout="hf", n_test=512)
INPUTS = Inputs(Path("runs/data/train.parquet"), Path("runs/data/test.parquet"), Path("runs/models/start"), {})
TASK = load_task("countdown")
TRAINING = training_of(TASK, REQUEST, INPUTS)


def rows(steps, before=0.0625, after=0.25):
    made = {0: {"val-core/countdown/reward/mean@1": before}}
    for step in range(1, steps + 1):
        made[step] = {"critic/rewards/mean": 0.1, "actor/hpo/alpha": 0.1 * step, "timing_s/step": 2.0}
    made[steps]["val-core/countdown/reward/mean@1"] = after
    return made


def test_the_figures_of_the_table():
    figures = summarize(rows(4), n_test=512)
    assert (figures["success_before"], figures["success_after"], figures["steps"]) == (0.0625, 0.25, 4)
    assert figures["training_seconds"] == 8.0
    assert figures["alpha"] == pytest.approx([0.1, 0.4])
    # sqrt(0.25 * 0.75 / 512)
    assert figures["standard_error"] == pytest.approx(0.019137, abs=1e-6)


def test_a_run_without_metrics_of_hpo_has_no_alpha():
    made = rows(2)
    for step in (1, 2):
        del made[step]["actor/hpo/alpha"]
    assert summarize(made, n_test=512)["alpha"] is None


@pytest.mark.parametrize("step", [0, 4])
def test_success_before_and_after_must_both_have_been_measured(step):
    made = rows(4)
    del made[step]["val-core/countdown/reward/mean@1"]
    with pytest.raises(TrainingError, match="before or after training is missing"):
        summarize(made, n_test=512)


def test_only_paths_seed_steps_algorithm_rollout_and_the_evaluation_interval_differ_from_the_public_config():
    keys = [override.partition("=")[0] for override in TRAINING.overrides]
    assert keys == [
        "algorithm.policy_loss",
        "hpo/cpu_rollout",
        "data.train_files",
        "data.val_files",
        "data.seed",
        "actor_rollout_ref.model.path",
        "trainer.total_training_steps",
        "trainer.test_freq",
    ]


@pytest.mark.parametrize(("steps", "interval"), [(60, 20), (1, 1), (4, 2), (100, 34)])
def test_three_evaluations_after_the_first_at_most(steps, interval):
    request = RunRequest("ahpo", seed=0, steps=steps, rollout="hf", n_test=512)
    assert training_of(TASK, request, INPUTS).overrides[-1] == f"trainer.test_freq={interval}"


def test_the_printed_command_is_one_shell_command_with_the_platform_in_its_environment():
    request = RunRequest("ahpo", seed=3, steps=60, rollout="hf", n_test=512, overrides=("data.x='a b'",))
    # A shell joins lines that end in a backslash; shlex does not.
    training = training_of(TASK, request, INPUTS)
    words = shlex.split(equivalent_command(training).replace("\\\n", ""))
    assert words[0] == "VERL_PLATFORM=cpu"
    assert words[2:5] == ["-m", "verl.trainer.main_ppo", "--config-name=countdown_cpu"]
    assert tuple(words[5:]) == training.overrides
    assert words[-1] == "data.x='a b'"


def test_the_printed_command_names_an_interpreter_that_the_users_shell_finds(tmp_path, monkeypatch):
    own = tmp_path / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(own))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    assert trainer_command("countdown_cpu", [])[0] == ".venv/bin/python"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert trainer_command("countdown_cpu", [])[0] == str(own)
    monkeypatch.setenv("PATH", str(own.parent))
    assert trainer_command("countdown_cpu", [])[0] == "python"


def test_the_overrides_compose_with_the_public_config_and_select_the_algorithm():
    from hpo_plugin.check.compose import compose
    from hpo_plugin.verl.selection import read_selection

    config, finding = compose(TRAINING.config_name, TRAINING.overrides)
    assert config is not None, finding
    assert read_selection(config).variant.name == "ahpo"
    assert (config.data.seed, config.trainer.total_training_steps) == (3, 60)


@pytest.fixture
def run(tmp_path):
    return choose_run(tmp_path / "runs", REQUEST)[0]


def test_a_resume_names_the_checkpoint_and_evaluates_nothing_twice(run):
    training = Training("countdown_cpu", ("trainer.val_before_train=True",), steps=60)
    first = attempt_overrides(run, run.new_attempt(None), training)
    assert "trainer.resume_mode=disable" in first
    assert "trainer.val_before_train=False" not in first
    second = attempt_overrides(run, run.new_attempt(20), training)
    assert f"trainer.resume_from_path={run.checkpoints / 'global_step_20'}" in second
    # Hydra uses the last value of a key.
    assert [word for word in second if "val_before_train" in word][-1] == "trainer.val_before_train=False"


def test_the_screen_shows_each_step_once_in_a_line_a_person_can_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    console = Console(record=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115
    with run_module._Screen(console, REQUEST, done=0) as screen:
        metrics = MetricsFile(path)
        assert screen.show(metrics) is False
        path.touch()
        assert screen.show(metrics) is True
        assert screen.show(metrics) is False
        for step, data in rows(2).items():
            with path.open("a") as file:
                file.write(json.dumps({"step": step, "data": data}) + "\n")
            assert screen.show(metrics) is True
    lines = console.export_text().splitlines()
    assert lines[0] == "starting verl and Ray ..."
    assert "before training: 6.2 % of 512 held-out problems solved" in lines
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["1/60", "2/60"]
    assert "after step 2: 25.0 % of 512 held-out problems solved" in lines


FAKE_TRAINER = """
import json, os, sys

with open(os.environ["VERL_FILE_LOGGER_PATH"], "w") as file:
    for step in range(3):
        file.write(json.dumps({"step": step, "data": {}}) + chr(10))
print("Traceback (most recent call last):")
print("ValueError: the real cause")
print("(TaskRunnerV1 pid=7) shutting down")
sys.exit(1)
"""


SLOW_RAY = """
import json, os, sys

metrics = os.environ["VERL_FILE_LOGGER_PATH"]
if "attempt-1" in metrics:
    print("Exception: The current node timed out during startup. This could happen because ...")
    sys.exit(1)
with open(metrics, "w") as file:
    for step in range(61):
        file.write(json.dumps({"step": step, "data": {}}) + chr(10))
"""


@pytest.fixture
def install_trainer(tmp_path, monkeypatch):
    """Puts a program in the place of verl.trainer.main_ppo."""

    def install(program):
        package = tmp_path / "fake" / "verl" / "trainer"
        package.mkdir(parents=True)
        for folder in (package, package.parent):
            (folder / "__init__.py").touch()
        (package / "main_ppo.py").write_text(program)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))

    return install


def test_ray_too_slow_to_start_is_started_again(run, install_trainer):
    install_trainer(SLOW_RAY)
    console = Console(record=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115
    run_module._train(run, TRAINING, REQUEST, stall=60, console=console)
    assert [attempt.directory.name for attempt in run.attempts()] == ["attempt-1", "attempt-2"]
    assert "trying again" in console.export_text()


def test_a_failure_shows_the_cause_and_the_end_of_the_log(run, install_trainer):
    install_trainer(FAKE_TRAINER)
    console = Console(record=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115
    with pytest.raises(TrainingError) as caught:
        run_module._train(run, TRAINING, REQUEST, stall=60, console=console)
    message = str(caught.value)
    assert "exit status 1" in message
    assert "Cause: ValueError: the real cause" in message
    assert "shutting down" in message
    assert list(run.rows()) == [0, 1, 2]
    assert not (run.directory / "processes.json").exists()


RESUMES = """
import json, os, sys

values = dict(word.partition("=")[::2] for word in sys.argv[1:])
first = int(values.get("trainer.resume_from_path", "_-1").rpartition("_")[2]) + 1
with open(os.environ["VERL_FILE_LOGGER_PATH"], "w") as file:
    for step in range(first, 61):
        file.write(json.dumps({"step": step, "data": {}}) + chr(10))
"""


def interrupted(run, *, steps, checkpoints):
    attempt = run.new_attempt(None)
    attempt.metrics.write_text("".join(json.dumps({"step": step, "data": {}}) + "\n" for step in range(steps + 1)))
    for step in checkpoints:
        folder = run.checkpoints / f"global_step_{step}"
        (folder / "actor").mkdir(parents=True)
        for name in ("data.pt", *(f"actor/{kind}_world_size_1_rank_0.pt" for kind in CHECKPOINT_FILES.values())):
            zipfile.ZipFile(folder / name, "w").close()
        (run.checkpoints / "latest_checkpointed_iteration.txt").write_text(str(step))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(run, install_trainer):
    install_trainer(RESUMES)
    interrupted(run, steps=25, checkpoints=(10, 20))
    (run.checkpoints / "global_step_20" / "data.pt").write_bytes(b"PK")
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    run_module._train(run, TRAINING, REQUEST, stall=60, console=console)
    said = console.export_text()
    assert "the checkpoint of step 20 is not used: data.pt is truncated" in said
    assert "resuming from the checkpoint of step 10" in said
    assert list(run.rows()) == list(range(61))


def test_a_run_whose_checkpoints_are_lost_says_which_steps_it_repeats(run, install_trainer):
    install_trainer(RESUMES)
    interrupted(run, steps=25, checkpoints=())
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    run_module._train(run, TRAINING, REQUEST, stall=60, console=console)
    assert "there is no whole checkpoint, so steps 1 to 25 are repeated" in console.export_text()
    assert list(run.rows()) == list(range(61))


def test_a_failure_on_a_full_disk_says_so_because_torch_does_not(run, install_trainer, monkeypatch):
    install_trainer("raise RuntimeError('[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534')")
    console = Console(record=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115

    def message(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        with pytest.raises(TrainingError) as caught:
            run_module._train(run, TRAINING, REQUEST, stall=60, console=console)
        return str(caught.value)

    assert f"No space left on the file system of {run.directory / 'attempt-1'}" in message(free=4096)
    assert "No space left" not in message(free=1 << 30)


def test_the_checks_leave_the_handlers_of_signals_alone(run, monkeypatch):
    """Ray, which they start, replaces that of SIGTERM: the quickstart would die and leave its trainer running."""
    from hpo_plugin.check import checks

    class Report:
        ok, summary = True, "fine"

    def run_checks(config_name, overrides, *, timeout):
        assert timeout == 500
        signal.signal(signal.SIGTERM, lambda *_: None)
        return Report()

    monkeypatch.setattr(checks, "run_checks", run_checks)
    before = signal.getsignal(signal.SIGTERM)
    console = Console(record=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115
    run_module._check(run, TRAINING, console, timeout=500)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_request_that_cannot_be_met_is_an_error_and_not_a_traceback(tmp_path):
    result = CliRunner().invoke(app, ["quickstart", "--seed", "-1", "--output", str(tmp_path)])
    assert result.exit_code == 2
    assert "--seed" in result.output


def test_a_wrong_preset_is_refused_at_once_naming_those_there_are_and_leaves_nothing(tmp_path):
    output = tmp_path / "runs"
    result = CliRunner().invoke(app, ["quickstart", "--policy-loss", "foo", "--output", str(output)])
    assert result.exit_code == 2
    said = " ".join(result.output.split())
    for word in ("--policy-loss", "'foo' is not a preset", "grpo", "ahpo"):
        assert word in said
    assert not output.exists()


def test_the_presets_that_help_names_are_those_there_are():
    from hpo_plugin.verl.presets import preset_rows

    said = CliRunner().invoke(app, ["quickstart", "--help"], env={"COLUMNS": "300"}).output
    assert all(name in said for name in preset_rows())


def test_the_final_table_shows_success_time_alpha_and_where_everything_is(run):
    attempt = run.new_attempt(None)
    attempt.metrics.write_text(
        "".join(json.dumps({"step": step, "data": data}) + "\n" for step, data in rows(60).items())
    )
    console = Console(record=True, width=120, file=open(os.devnull, "w"))  # noqa: SIM115
    run_module._finish(run, "Countdown", TRAINING, REQUEST, seconds=130.0, console=console)
    text = console.export_text()
    assert "6.2 % → 25.0 %" in text
    assert "60, 2 min 00 s of training; this command took 2 min 10 s" in text
    assert "α" in text
    for name in ("curves.png", "metrics.jsonl", "trainer.log", "config.yaml", "global_step_60"):
        assert name in text
    assert "VERL_PLATFORM=cpu " in text
    assert "-m verl.trainer.main_ppo --config-name=countdown_cpu" in text
    assert run.finished
    assert (run.directory / "curves.png").exists()
    assert len((run.directory / "metrics.jsonl").read_text().splitlines()) == 61


# --- a real run ----------------------------------------------------------------------------------------------------


@pytest.mark.e2e
@pytest.mark.timeout(1800)
def test_a_killed_quickstart_resumes_and_a_third_call_starts_another_run(tmp_path):
    secrets = {name: f"canary-{name.lower()}" for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")}
    (tmp_path / "cwd").mkdir()
    process = {"env": {**os.environ, **secrets}, "cwd": tmp_path / "cwd", "text": True}
    command = [
        *[sys.executable, "-m", "hpo_plugin.cli", "quickstart", "--steps=6", "--n-test=64", "--seed=1"],
        *[f"--output={tmp_path}", "trainer.save_freq=2", "data.train_batch_size=8"],
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    ]
    directory = tmp_path / "countdown_cpu-ahpo-seed1-001"
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **process)
    metrics = directory / "attempt-1" / "metrics.jsonl"
    while first.poll() is None and not (metrics.exists() and '"step":3' in metrics.read_text()):
        time.sleep(0.2)
    assert first.poll() is None, first.stdout.read()
    first.send_signal(signal.SIGKILL)
    first.wait()

    second = subprocess.run(command, capture_output=True, timeout=900, **process)
    assert second.returncode == 0, second.stdout + second.stderr
    # Nothing is written to the current directory, and no file or output contains the value of a token.
    assert list((tmp_path / "cwd").iterdir()) == []
    contents = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    contents[Path("output")] = (second.stdout + second.stderr).encode()
    assert [path for path, content in contents.items() if b"canary-" in content] == []
    assert any(path.name == "trainer.log" for path in contents)
    run = Run(directory)
    assert [attempt.resumed_from for attempt in run.attempts()] == [None, 2]
    done = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in done] == list(range(7))
    assert all(math.isfinite(row["data"]["actor/hpo/alpha"]) for row in done[1:])
    result = json.loads((directory / "result.json").read_text())
    assert result["steps"] == 6
    assert (directory / "curves.png").exists()
    assert "6/6" in second.stdout
    recorded = {key: value for key, value in run.request().items() if key != "hpo_plugin"}
    request = RunRequest(**recorded | {"overrides": tuple(recorded["overrides"])})
    third, resumes = choose_run(tmp_path, request)
    assert (third.directory.name, resumes) == ("countdown_cpu-ahpo-seed1-002", False)
