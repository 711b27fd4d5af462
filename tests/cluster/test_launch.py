"""What ``hpo-plugin launch`` decides. A program stands for the trainer, and a cluster says what it is told."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("verl")

from omegaconf import OmegaConf
from omegaconf.basecontainer import BaseContainer
from rich.console import Console

from hpo_plugin.check.compose import compose
from hpo_plugin.check.report import CheckReport, Finding
from hpo_plugin.runs import launch as launch_module
from hpo_plugin.runs.directory import Run
from hpo_plugin.runs.launch import Launch, cluster_overrides, plan, refuse_another_run, run_launch
from hpo_plugin.runs.training import TrainingError, bookkeeping_overrides

#: Resumes from the given checkpoint; the plan states how far each attempt gets, and how it ends.
TRAINER = """
import json, os, signal, sys, time, zipfile
from pathlib import Path

values = dict(word.partition("=")[::2] for word in sys.argv[1:])
metrics = Path(os.environ["VERL_FILE_LOGGER_PATH"])
attempt = int(metrics.parent.name.split("-")[1])
last, ending = json.loads(Path(os.environ["PLAN"]).read_text())[attempt - 1]
begin = int(values.get("trainer.resume_from_path", "_-1").rpartition("_")[2]) + 1
checkpoints = Path(values["trainer.default_local_dir"])
for step in range(begin, last + 1):
    if step and step % int(values["trainer.save_freq"]) == 0:
        actor = checkpoints / f"global_step_{step}" / "actor"
        actor.mkdir(parents=True, exist_ok=True)
        # torch.save writes zip archives.
        for kind in ("model", "optim", "extra_state"):
            zipfile.ZipFile(actor / f"{kind}_world_size_1_rank_0.pt", "w").close()
        zipfile.ZipFile(actor.parent / "data.pt", "w").close()
        (checkpoints / "latest_checkpointed_iteration.txt").write_text(str(step))
    with metrics.open("a") as file:
        file.write(json.dumps({"step": step, "data": {"attempt": attempt}}) + chr(10))
if ending == "hang":
    time.sleep(600)
if ending == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if ending != "done":
    print("RuntimeError: " + ending)
    sys.exit(1)
"""
STEPS = 6


class FakeCluster:
    """Says what it is told."""

    def __init__(self):
        self.failure = None
        self.nodes = {"a", "b"}
        self.dead = {}
        #: What a run has to wait for, one for each look.
        self.wants = []
        #: The node that dies at the next look after so many of them.
        self.dies_after = None

    @contextlib.contextmanager
    def join(self, config):
        yield self

    def lacks(self, config):
        return self.wants.pop(0) if self.wants else None

    def living_nodes(self):
        return set(self.nodes)

    def dead_nodes(self):
        if self.dies_after is not None:
            self.dies_after -= 1
            if self.dies_after < 0:
                self.dies_after = None
                self.die("b")
        return dict(self.dead)

    def die(self, node):
        self.nodes = self.nodes - {node} | {node + "'"}
        self.dead[node] = "10.0.0.2"


@pytest.fixture
def cluster(monkeypatch):
    fake = FakeCluster()
    monkeypatch.setattr(launch_module, "Cluster", lambda: fake)
    fake_class = type("Cluster", (), {"join": fake.join, "__new__": lambda cls: fake})
    monkeypatch.setattr(launch_module, "Cluster", fake_class)
    monkeypatch.setattr(launch_module, "POLL", 0.05)
    monkeypatch.setattr(launch_module, "DEATH_NOTICED", 1.0)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    return fake


@pytest.fixture
def checks(monkeypatch):
    """The checks that were run, by the file that the nodes had to share; all pass."""
    made = []

    def run_checks(config_name, overrides, *, timeout, local, shared):
        made.append("here" if local else "nodes")
        return CheckReport([Finding("all", "fine")])

    monkeypatch.setattr(launch_module, "run_checks", run_checks)
    return made


@pytest.fixture
def launch(cluster, checks, tmp_path, monkeypatch):
    """Launches with attempts that do as they are told: how far each gets, and how it ends."""
    package = tmp_path / "fake" / "verl" / "trainer"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "main_ppo.py").write_text(TRAINER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    monkeypatch.setenv("PLAN", str(tmp_path / "plan.json"))

    def go(*attempts, overrides=(), retries=3, stall=60.0, wait=1.0):
        (tmp_path / "plan.json").write_text(json.dumps(attempts))
        given = (f"trainer.total_training_steps={STEPS}", "trainer.save_freq=2", *overrides)
        console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
        wanted = Launch("countdown_cpu", given, tmp_path / "run", retries, wait, 60.0, stall)
        try:
            return run_launch(wanted, console)
        finally:
            go.said = console.export_text()

    go.run = Run(tmp_path / "run")
    return go


def steps(run):
    return [json.loads(line)["step"] for line in (run.directory / "metrics.jsonl").read_text().splitlines()]


def resumed(run):
    return [attempt.resumed_from for attempt in run.attempts()]


def test_a_killed_trainer_resumes_from_its_checkpoint_and_each_step_is_logged_once(launch, checks):
    run = launch((3, "killed"), (STEPS, "done"))
    assert resumed(run) == [None, 2]
    assert steps(run) == list(range(STEPS + 1))
    assert checks == ["here", "nodes", "nodes"]
    assert json.loads((run.directory / "result.json").read_text())["attempts_resumed_from"] == [None, 2]


def test_a_trainer_that_hangs_when_a_node_dies_is_ended_and_started_again(launch, cluster):
    cluster.dies_after = 20
    run = launch((3, "hang"), (STEPS, "done"))
    assert "the trainer failed: Ray lost 10.0.0.2" in launch.said
    assert resumed(run) == [None, 2]
    assert steps(run) == list(range(STEPS + 1))


def test_a_trainer_that_makes_no_progress_is_ended_and_started_again(launch):
    run = launch((3, "hang"), (STEPS, "done"), stall=1.0)
    assert resumed(run) == [None, 2]


def test_the_same_failure_twice_without_a_step_is_not_tried_a_third_time(launch):
    with pytest.raises(TrainingError, match="no such key"):
        launch((-1, "no such key at 0x7f00aa11bb22"), (-1, "no such key at 0x7f00cc33dd44"), (STEPS, "done"))
    assert len(launch.run.attempts()) == 2
    assert "the same failure occurred twice" in launch.said
    assert "no such key" in launch.run.failure


def test_another_failure_is_tried_again(launch):
    assert len(launch((-1, "address in use"), (-1, "no route to host"), (STEPS, "done")).attempts()) == 3


def test_the_same_failure_twice_is_tried_again_where_a_node_was_lost(launch, cluster, monkeypatch):
    # One for each attempt; the death comes to light after the trainer's own error.
    def lacks(config):
        if len(cluster.dead) < len(launch.run.attempts()):
            cluster.die(max(cluster.nodes))

    monkeypatch.setattr(cluster, "lacks", lacks)
    run = launch((-1, "connection reset"), (-1, "connection reset"), (STEPS, "done"))
    assert len(run.attempts()) == 3


def test_before_the_same_failure_ends_the_run_ray_gets_the_time_to_notice_a_dead_node(launch, cluster, monkeypatch):
    tell = launch_module._Launcher.tell

    def after_the_second_failure(launcher, text):
        if text.startswith("the trainer failed") and len(launcher.run.attempts()) == 2:
            # Found by the watch of no attempt, nor by the first look after it.
            cluster.dies_after = 3
        tell(launcher, text)

    monkeypatch.setattr(launch_module._Launcher, "tell", after_the_second_failure)
    run = launch((-1, "connection reset"), (-1, "connection reset"), (STEPS, "done"))
    assert "Ray has lost 10.0.0.2" in launch.said
    assert len(run.attempts()) == 3


def test_failures_in_a_row_are_limited_and_a_new_checkpoint_starts_the_count_anew(launch):
    with pytest.raises(TrainingError):
        launch((1, "a"), (1, "b"), (STEPS, "done"), retries=1)
    assert len(launch.run.attempts()) == 2
    assert "giving up after 2 failures in a row without a new checkpoint (--retries=1)" in launch.said
    # Each of these gets to a checkpoint that the one before did not reach.
    run = launch((1, "a"), (1, "b"), (3, "c"), (5, "d"), (STEPS, "done"), retries=1)
    assert resumed(run) == [None, None, None, 2, 4]


def test_it_waits_for_nodes_and_says_once_what_is_missing(launch, cluster):
    cluster.wants = ["2 nodes; the cluster has 1 of them"] * 3
    launch((STEPS, "done"))
    assert launch.said.count("waiting for 2 nodes; the cluster has 1 of them") == 1


def test_nodes_that_do_not_come_are_an_error_that_names_the_keys(launch, cluster, monkeypatch):
    monkeypatch.setattr(cluster, "lacks", lambda config: "2 nodes with 8 accelerators each")
    with pytest.raises(TrainingError, match=r"waited 0.3 s \(--wait-for-nodes\) for 2 nodes .*trainer.nnodes"):
        launch((STEPS, "done"), wait=0.3)
    assert launch.run.attempts() == []


@pytest.fixture
def dies_during_the_checks(cluster, monkeypatch):
    """So many times, a node does not answer; Ray says some time after the checks that it is dead."""

    def arrange(times, notices=1):
        made = []

        def run_checks(config_name, overrides, *, timeout, local, shared):
            made.append("here" if local else "nodes")
            if local or made.count("nodes") > times:
                return CheckReport([Finding("all", "fine")])
            cluster.dies_after = notices
            return CheckReport([Finding("node 10.0.0.2", "not schedulable", False, "look at its logs")])

        monkeypatch.setattr(launch_module, "run_checks", run_checks)
        # As where another node is there in its place already.
        monkeypatch.setattr(cluster, "die", lambda node: cluster.dead.update({f"{node}{len(made)}": "10.0.0.2"}))
        return made

    return arrange


@pytest.mark.parametrize("notices", [0, 5])
def test_a_node_that_dies_while_it_is_checked_is_waited_for_and_all_are_checked_again(
    launch, cluster, dies_during_the_checks, notices
):
    made = dies_during_the_checks(2, notices)
    # Before each of the three checks there is something to wait for.
    cluster.wants = ["2 nodes; the cluster has 1 of them", None] * 3
    run = launch((STEPS, "done"))
    assert made == ["here", "nodes", "nodes", "nodes"]
    assert launch.said.count("Ray has lost 10.0.0.2 during the checks; checking the nodes again") == 2
    assert launch.said.count("waiting for 2 nodes") == 3
    assert "checked 2 nodes: all checks passed" in launch.said
    assert "FAIL" not in launch.said
    assert len(run.attempts()) == 1


def test_a_node_that_dies_after_the_wait_is_waited_for_again(launch, cluster, monkeypatch):
    """Ray notices between the last look at what is missing and the checks, which then find too few nodes."""

    def run_checks(config_name, overrides, *, timeout, local, shared):
        if not local and not cluster.dead:
            cluster.die("b")
            return CheckReport(
                [Finding("accelerators", "2 x 8 asked for; the nodes have 8", False, "correct the config")]
            )
        return CheckReport([Finding("all", "fine")])

    monkeypatch.setattr(launch_module, "run_checks", run_checks)
    launch((STEPS, "done"))
    assert "Ray has lost 10.0.0.2 during the checks" in launch.said


def test_nodes_that_die_in_every_check_are_not_checked_for_ever(launch, dies_during_the_checks):
    made = dies_during_the_checks(100)
    with pytest.raises(TrainingError, match=r"Ray lost 10.0.0.2 during the checks, 3 times in a row \(--retries=2\)"):
        launch((STEPS, "done"), retries=2)
    assert made.count("nodes") == 3
    assert launch.run.attempts() == []


def test_a_check_that_fails_on_a_node_that_stays_alive_is_shown_and_not_made_again(launch, cluster, monkeypatch):
    made = []

    def run_checks(config_name, overrides, *, timeout, local, shared):
        made.append("here" if local else "nodes")
        return CheckReport([Finding("node 10.0.0.2", "torch is missing", local, "install it")])

    monkeypatch.setattr(launch_module, "run_checks", run_checks)
    # One that was dead before is none that died meanwhile.
    cluster.dead = {"z": "10.0.0.9"}
    with pytest.raises(TrainingError, match="The trainer was not started"):
        launch((STEPS, "done"))
    assert made == ["here", "nodes"]
    assert "FAIL  node 10.0.0.2  torch is missing" in launch.said
    assert "lost" not in launch.said
    assert launch.run.attempts() == []


def test_a_second_call_resumes_and_a_third_has_nothing_to_do(launch, checks):
    with pytest.raises(TrainingError):
        launch((3, "a"), retries=0)
    launch((3, "a"), (STEPS, "done"))
    assert resumed(launch.run) == [None, 2]
    done = len(checks)
    launch()
    assert "the run is already finished" in launch.said
    assert len(checks) == done


def test_a_longer_run_continues_from_the_end_of_a_shorter_one(launch):
    launch((STEPS, "done"))
    run = launch((STEPS, "done"), (8, "done"), overrides=["trainer.total_training_steps=8"])
    assert resumed(run) == [None, STEPS]
    assert steps(run) == list(range(9))


def test_other_arguments_are_refused_with_what_differs(launch):
    launch((STEPS, "done"))
    with pytest.raises(TrainingError) as caught:
        launch((STEPS, "done"), overrides=["algorithm.policy_loss=grpo"])
    assert "+ algorithm.policy_loss=grpo" in str(caught.value)


def test_the_same_arguments_in_another_order_are_another_run():
    """Of two overrides of one key the last one counts."""
    asked = {"config_name": "hpo_trainer", "overrides": ["data.seed=1", "data.seed=2"]}
    with pytest.raises(TrainingError, match="the same arguments in another order"):
        refuse_another_run(asked | {"overrides": ["data.seed=2", "data.seed=1"]}, asked, Path("run"))


def test_sigterm_ends_the_trainer_and_the_exit_status_says_so(launch, tmp_path):
    """In a process of its own, as a preempted job's: what is in place of checks and cluster comes with it."""
    (tmp_path / "plan.json").write_text(json.dumps([(3, "hang")]))
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_launch
from hpo_plugin.runs import launch as launch_module
from hpo_plugin.cli.app import app
fake = test_launch.FakeCluster()
launch_module.Cluster = type("Cluster", (), {{"join": fake.join, "__new__": lambda cls: fake}})
launch_module.run_checks = lambda *a, **k: test_launch.CheckReport([])
app(["launch", "--config-name=countdown_cpu", "--run-dir={tmp_path / "run"}", "trainer.save_freq=2"])
"""
    # The trainer's PYTHONPATH hides verl from the process that composes the config, so verl is imported first.
    process = subprocess.Popen(
        [sys.executable, "-c", "import verl, os; os.environ['PYTHONPATH'] = os.environ['FAKE']\n" + code],
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        | {"FAKE": os.environ["PYTHONPATH"], "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    run = Run(tmp_path / "run")
    deadline = time.monotonic() + 60
    while not run.attempts() or 3 not in run.rows():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert not run.processes.exists()
    assert run.resume_step() == 2


# --- the config ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override", ["trainer.default_local_dir=/data", "++trainer.resume_mode=auto", "hydra.run.dir=x"]
)
def test_what_the_launcher_sets_cannot_be_set(launch, override):
    with pytest.raises(TrainingError, match=r"the launcher sets .*--run-dir"):
        launch((STEPS, "done"), overrides=[override])


def test_a_wrong_preset_is_refused_naming_those_there_are_and_leaves_no_directory(tmp_path):
    wanted = Launch("hpo_trainer", ("algorithm.policy_loss=foo",), tmp_path / "run", 1, 1.0, 60.0, 60.0)
    with pytest.raises(TrainingError, match=r"algorithm.policy_loss=foo is not a preset. Choose one of: grpo, .*ahpo"):
        run_launch(wanted, Console())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["max_actor_ckpt_to_keep", "max_critic_ckpt_to_keep"])
def test_a_single_checkpoint_is_refused(launch, key):
    with pytest.raises(TrainingError, match=f"set trainer.{key}=2 or more"):
        launch((STEPS, "done"), overrides=[f"trainer.{key}=1"])


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [
        ("+trainer.remove_previous_ckpt_in_save=True", "set trainer.max_actor_ckpt_to_keep=2 or more"),
        (
            "actor_rollout_ref.actor.checkpoint.async_save=True",
            "set actor_rollout_ref.actor.checkpoint.async_save=False",
        ),
    ],
)
def test_settings_without_a_checkpoint_to_resume_from_are_refused(launch, setting, remedy):
    with pytest.raises(TrainingError, match=f"{setting.lstrip('+')} .*{remedy}"):
        launch((STEPS, "done"), overrides=[setting])


def test_a_training_that_ends_before_its_last_step_is_not_tried_again(launch):
    with pytest.raises(
        TrainingError, match=r"verl ended after step 4 of 6, and without an error.*trainer\.total_epochs"
    ):
        launch((4, "done"), (STEPS, "done"))
    assert resumed(launch.run) == [None]


def test_more_epochs_continue_a_finished_run_whose_steps_they_determine(launch):
    attempts = ((3, "done"), (STEPS, "done"))
    epochs = ["trainer.total_training_steps=null", "trainer.total_epochs=1"]
    launch(*attempts, overrides=epochs)
    launch(*attempts, overrides=epochs)
    assert "the run is already finished" in launch.said
    run = launch(*attempts, overrides=[epochs[0], "trainer.total_epochs=2"])
    assert resumed(run) == [None, 2]
    assert steps(run) == list(range(STEPS + 1))


def test_a_resume_says_that_the_optimizer_was_not_saved(launch):
    contents = "actor_rollout_ref.actor.checkpoint.save_contents=[model,extra]"
    launch((3, "killed"), (STEPS, "done"), overrides=[contents])
    # The stand-in does not write Hydra's copy of the config.
    assert "checkpoints have no state" not in launch.said
    copy = launch.run.directory / "attempt-2" / "hydra" / ".hydra" / "config.yaml"
    copy.parent.mkdir(parents=True)
    copy.write_text(json.dumps({"actor_rollout_ref": {"actor": {"checkpoint": {"save_contents": ["model", "extra"]}}}}))
    longer = [contents, "trainer.total_training_steps=8"]
    launch((3, "killed"), (STEPS, "done"), (8, "done"), overrides=longer)
    assert "checkpoints have no state of optimizer, which starts again" in launch.said


@pytest.mark.parametrize("address", ["null", "local"])
def test_without_a_cluster_it_says_what_to_set(launch, monkeypatch, address):
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(TrainingError, match=r"RAY_ADDRESS is not set.*`ray start --head`"):
        launch((STEPS, "done"), overrides=[f"ray_kwargs.ray_init.address={address}"])


def composed(name, *overrides):
    config, finding = compose(name, overrides)
    assert config is not None, finding
    return config


@pytest.mark.parametrize("name", ["countdown_cpu", "hpo_trainer", "hpo_megatron_trainer"])
def test_a_config_joins_the_cluster_of_ray_address_and_starts_none(name, monkeypatch):
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    config = composed(name)
    with monkeypatch.context() as launcher:
        # The launcher's process has not loaded verl's plugins, which register the resolvers that configs use.
        launcher.setattr(BaseContainer, "_resolvers", {})
        overrides = cluster_overrides(config, {"RAY_ADDRESS": "10.0.0.1:6379"})
        given = OmegaConf.to_container(composed(name, *overrides).ray_kwargs.ray_init)
    assert given["address"] == "10.0.0.1:6379"
    # Ray refuses them beside the address of a cluster.
    assert not any(given.get(key) for key in ("num_cpus", "num_gpus", "object_store_memory"))
    assert cluster_overrides(composed(name), {}) == []


def test_every_config_gets_checkpoints_and_the_file_logger_and_keeps_its_own_loggers(tmp_path):
    own = ["trainer.logger=[console,wandb]"]
    training = plan(composed("hpo_trainer", *own), "hpo_trainer", own)
    run = Run(tmp_path)
    words = [*bookkeeping_overrides(run, run.new_attempt(None), training), *training.overrides]
    config = composed("hpo_trainer", *(word for word in words if not word.startswith("hydra.")))
    assert list(config.trainer.logger) == ["console", "wandb", "file"]
    assert (config.trainer.save_freq, config.trainer.max_actor_ckpt_to_keep) == (10, 2)
    forwarded = config.ray_kwargs.ray_init.runtime_env.env_vars
    assert forwarded["VERL_FILE_LOGGER_PATH"] == str(tmp_path.resolve() / "attempt-1" / "metrics.jsonl")
    # verl derives the number of steps from epochs and data.
    assert (training.steps, training.first_step) == (None, 0)


def test_ones_own_save_interval_keeps_all_checkpoints():
    own = ["trainer.save_freq=50", "trainer.val_before_train=False"]
    training = plan(composed("hpo_trainer", *own), "hpo_trainer", own)
    assert (training.save_every, training.first_step) == (50, 1)
    assert not any("ckpt_to_keep" in word for word in training.overrides)
