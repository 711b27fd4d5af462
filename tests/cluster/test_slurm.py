"""recipes/cluster/slurm.sbatch, run by bash against stand-ins for srun and scontrol that start real processes."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("ray")

from hosts import BIN, launch_arguments, two_hosts, wait_for

from hpo_plugin.runs.directory import Run

HERE = Path(__file__).parent
SCRIPT = HERE.parents[1] / "recipes" / "cluster" / "slurm.sbatch"


@pytest.fixture(scope="module")
def hosts():
    with two_hosts() as made:
        if not made[0].namespaced:
            pytest.skip(
                "needs two hosts of namespaces, that is root on Linux: the job takes the same ports on each node"
            )
        yield made


class Job:
    """A job on two nodes, and the programs that stand before the real ones on its PATH."""

    def __init__(self, hosts, work):
        self.hosts = hosts
        self.head = hosts[0]
        self.work = work
        self.log = work / "slurm.log"
        self.calls = work / "calls.jsonl"
        self.programs = work / "bin"
        self.programs.mkdir()
        # What an unquoted node list would match.
        (work / "hpo-1").touch()

    def program(self, name, text):
        """Put a program in the place of another."""
        path = self.programs / name
        path.write_text("#!/usr/bin/env bash\n" + text)
        path.chmod(0o755)

    def start(self, *arguments, **environment):
        return self.head.start(
            *["bash", "-c", 'cd "$1" && shift && exec bash "$@"', "job", str(self.work), str(SCRIPT), *arguments],
            log=self.log,
            **{
                "PATH": os.pathsep.join([str(self.programs), str(HERE / "slurm"), str(BIN), os.environ["PATH"]]),
                "HPO_TEST_HOSTS": json.dumps({host.name: host.enter() for host in self.hosts}),
                "HPO_TEST_CALLS": str(self.calls),
                "SLURM_JOB_ID": "17",
                "SLURM_JOB_NAME": "hpo",
                "SLURM_JOB_NODELIST": "hpo-[1-2]",
                "SLURM_JOB_NUM_NODES": "2",
                "SLURMD_NODENAME": "hpo-1",
                "SLURM_GPUS_PER_NODE": "1",
                "SLURM_CPUS_PER_TASK": "8",
                **environment,
            },
        )

    def said(self):
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def called(self, *words):
        """The calls of the stand-ins that have all of these words, as (node, command) or (command,)."""
        found = [json.loads(line) for line in self.calls.read_text().splitlines()]
        return [call for call in found if all(any(word in part for part in call) for word in words)]

    def nothing_is_left(self):
        return not any(host.processes() for host in self.hosts)


@pytest.fixture
def job(hosts, tmp_path):
    yield Job(hosts, tmp_path)
    for host in hosts:
        host.kill()
        host.boot()


#: A Ray that starts at once: it leaves a mark, and the head answers once it has.
QUICK_RAY = """
mark="$PWD/ray-is-up"
case $1 in
  health-check) [[ -e $mark ]] ;;
  start) [[ $* != *--head* ]] || touch "$mark"; exec sleep 600 ;;
esac
"""


def test_the_exit_status_of_the_launcher_is_the_jobs_and_nothing_is_left(job):
    job.program("ray", QUICK_RAY)
    job.program("hpo-plugin", 'printf "%s\\n" "$RAY_ADDRESS" "$RAY_AUTH_MODE" "$@" >launched; exit 7')
    assert job.start("--config-name=hpo_trainer", "algorithm.policy_loss=ahpo").wait(60) == 7, job.said()
    assert (job.work / "launched").read_text().splitlines() == [
        *[f"{job.head.address}:20000", "token", "launch", "--run-dir=runs/hpo-17", "--config-name=hpo_trainer"],
        *["algorithm.policy_loss=ahpo", "trainer.nnodes=2", "trainer.n_gpus_per_node=1"],
    ]
    assert job.nothing_is_left()
    assert not job.called("requeue")


def test_the_head_answers_before_a_worker_is_started_and_all_of_rays_ports_are_given(job):
    job.program("ray", QUICK_RAY.replace("touch", "sleep 3; touch"))
    job.program("hpo-plugin", "exit 0")
    assert job.start().wait(60) == 0, job.said()
    (head,), (worker,) = job.called("start", "--head"), job.called("start", f"--address={job.head.address}:20000")
    assert (head[1], worker[1]) == ("hpo-1", "hpo-2")
    assert job.called("srun").index(head) < job.called("srun").index(worker)
    assert job.said().index("Ray's head on hpo-1") < job.said().index("a worker on hpo-2")
    for call in (head, worker):
        assert "--block" in call
        assert {"--num-cpus=8", "--num-gpus=1", "--min-worker-port=20020", "--max-worker-port=21999"} <= set(call)
        assert len([word for word in call if "-port=" in word]) >= 8


def test_a_head_that_does_not_start_is_reported_and_no_worker_is_started(job):
    job.program("ray", "[[ $1 == start ]] && echo 'no room on the device' && exit 1; exit 1")
    assert job.start().wait(60) == 1
    assert "no room on the device" in job.said()
    assert "Ray on the head node hpo-1 ended" in job.said()
    assert not job.called("--address=")


def test_a_head_that_does_not_answer_is_given_up_and_ended(job):
    job.program("ray", "[[ $1 == start ]] && exec sleep 600; exit 1")
    assert job.start(HPO_START_WAIT="4").wait(60) == 1
    assert "Ray on the head node hpo-1 does not answer after 4 s" in job.said()
    assert job.nothing_is_left()


def test_a_worker_that_does_not_start_is_reported_tried_again_and_ends_the_job(job):
    job.program(
        "ray",
        QUICK_RAY.replace("exec sleep", "[[ $* == *--head* ]] || { echo 'cannot start here'; exit 1; }; exec sleep"),
    )
    job.program("hpo-plugin", "exec sleep 600")
    assert job.start().wait(90) == 143, job.said()
    assert job.said().count("cannot start here") == 3
    assert "Ray on hpo-2 ended, start 3 of 3" in job.said()
    assert "a node's Ray is lost for good" in job.said()
    assert job.nothing_is_left()
    # Perhaps it is the machine: SLURM may give another.
    assert job.called("scontrol", "requeue")


def test_a_job_that_loses_its_ray_again_and_again_is_not_put_back_for_ever(job):
    job.program("ray", QUICK_RAY.replace("exec sleep", "[[ $* == *--head* ]] || exit 1; exec sleep"))
    job.program("hpo-plugin", "exec sleep 600")
    assert job.start(SLURM_RESTART_COUNT="10").wait(90) == 143
    assert not job.called("requeue")


def test_sigterm_ends_the_launcher_first_and_puts_the_job_back_in_the_queue(job):
    job.program("ray", QUICK_RAY)
    job.program("hpo-plugin", "trap 'sleep 1; touch told; exit 143' TERM; touch launched; while :; do sleep 0.1; done")
    batch = job.start()
    wait_for((job.work / "launched").exists, "the launcher", 60)
    batch.send_signal(signal.SIGTERM)
    assert batch.wait(60) == 143, job.said()
    assert (job.work / "told").exists()
    assert job.called("scontrol", "requeue", "17")
    assert job.nothing_is_left()


def test_sigterm_while_ray_starts_puts_the_job_back_in_the_queue_too(job):
    job.program("ray", "[[ $1 == start ]] && touch starting && exec sleep 600; exit 1")
    batch = job.start()
    wait_for((job.work / "starting").exists, "Ray", 60)
    batch.send_signal(signal.SIGTERM)
    assert batch.wait(60) == 143, job.said()
    assert job.called("scontrol", "requeue", "17")
    assert job.nothing_is_left()


def test_a_canceled_job_stays_away(job):
    """SLURM sends its steps SIGTERM, and the script sees them end."""
    job.program("ray", QUICK_RAY)
    job.program("hpo-plugin", "touch launched; exec sleep 601")
    batch = job.start(HPO_TEST_JOB_STATE="CANCELLED")
    wait_for((job.work / "launched").exists, "the launcher", 60)
    for host in job.hosts:
        for process in host.processes():
            if process.cmdline() == ["sleep", "600"]:
                process.terminate()
    assert batch.wait(60) != 0, job.said()
    assert not job.called("requeue")
    assert job.nothing_is_left()


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"SLURM_GPUS_PER_NODE": ""}, "give sbatch --gpus-per-node"),
        ({"SLURM_GPUS_PER_NODE": "h100:8"}, "8 CPUs for 8 GPUs on a node: give sbatch --cpus-per-task=27 or more"),
        ({"SLURM_JOB_NUM_NODES": "3"}, "scontrol names 2 nodes of 3"),
        ({"SLURMD_NODENAME": "hpo-2"}, "runs on hpo-2, not on the first node hpo-1 of the job"),
        ({"HPO_INTERFACE": "nosuch0"}, "nosuch0"),
    ],
)
def test_a_job_that_cannot_work_stops_before_ray_is_started(job, environment, said):
    assert job.start(**environment).wait(30) == 1
    assert said in job.said()
    assert not job.calls.exists() or not job.called("srun")


def test_shellcheck_has_nothing_to_say():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", *map(str, SCRIPT.parent.glob("*.s*"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --- with Ray, the launcher and verl's trainer ---------------------------------------------------------------------


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_preempted_training_resumes_in_the_requeued_job_and_no_process_is_left_of_either(job, inputs, tmp_path):
    pytest.importorskip("verl")
    steps, run = 4, Run(tmp_path / "run")
    # The script adds the nodes and the accelerators.
    arguments = launch_arguments(inputs, run.directory, steps)[:-2]
    batch = job.start(*arguments)

    def third_step():
        assert batch.poll() is None, job.said()
        return 3 in run.rows()

    wait_for(third_step, "step 3", 900)
    batch.send_signal(signal.SIGTERM)
    assert batch.wait(120) == 143, job.said()
    assert job.called("scontrol", "requeue", "17")
    # Ray's agents end when they see that their node has.
    wait_for(job.nothing_is_left, "the end of all processes", 20)
    assert not run.finished

    again = job.start(*arguments, SLURM_RESTART_COUNT="1")
    assert again.wait(900) == 0, job.said()
    assert [attempt.resumed_from for attempt in run.attempts()] == [None, 2]
    done = [json.loads(line)["step"] for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    assert done == list(range(steps + 1))
    assert job.said().count("checked 2 nodes: all checks passed") == 2
    assert len(job.called("requeue")) == 1
    wait_for(job.nothing_is_left, "the end of all processes", 20)
