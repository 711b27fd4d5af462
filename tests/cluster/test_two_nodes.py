"""verl's trainer over two Ray nodes, started by ``hpo-plugin launch``; nodes and processes are killed in mid-run."""

import json
import sys

import psutil
import pytest

pytest.importorskip("verl")

from hosts import launch_arguments, two_hosts, wait_for

from hpo_plugin.runs.directory import Run
from hpo_plugin.runs.verl_log import read_rows

STEPS = 6


@pytest.fixture(scope="module")
def cluster():
    with two_hosts() as hosts:
        print("hosts: " + ("namespaces" if hosts[0].namespaced else "two addresses of the loopback interface"))
        head, worker = hosts
        head.start_ray()
        worker.start_ray(head)
        yield hosts


def start(head, arguments, log):
    command = [sys.executable, "-m", "hpo_plugin.cli", "launch", *arguments]
    return head.start(*command, log=log, RAY_ADDRESS=f"{head.address}:6379")


def kill(host, word):
    """SIGKILL for the processes whose command has this word."""
    killed = 0
    for process in host.processes():
        try:
            if word in process.cmdline():
                process.kill()
                killed += 1
        except psutil.NoSuchProcess:
            pass
    assert killed, f"no process with {word} runs"


@pytest.mark.e2e
@pytest.mark.timeout(2400)
def test_a_run_over_two_nodes_survives_the_loss_of_a_node_of_the_trainer_and_of_the_launcher(cluster, inputs, tmp_path):
    head, worker = cluster
    run, log = Run(tmp_path / "run"), tmp_path / "launch.log"
    arguments = launch_arguments(inputs, run.directory, STEPS)
    launcher = start(head, arguments, log)

    def wait_until(condition, what):
        def true_while_it_runs():
            assert launcher.poll() is None, log.read_text()
            return condition()

        wait_for(true_while_it_runs, what, 900)

    def says(text):
        return log.exists() and text in log.read_text()

    def logged(attempt, step):
        return step in read_rows(run.directory / f"attempt-{attempt}" / "metrics.jsonl")

    # A node dies, in step 4, and is back before Ray has noticed: for some seconds the cluster has both, one of which
    # does not answer.
    wait_until(lambda: logged(1, 3), "step 3 of the first attempt")
    worker.kill()
    worker.boot()
    worker.start_ray(head)
    # The trainer dies, in step 6.
    wait_until(lambda: logged(2, 5), "step 5 of the second attempt")
    kill(head, "verl.trainer.main_ppo")
    # The launcher dies, and the trainer with it, before a step.
    wait_until(lambda: says("resuming from the checkpoint of step 4"), "the third attempt")
    kill(head, "hpo_plugin.cli")
    launcher.wait()
    launcher = start(head, arguments, log)
    assert launcher.wait(timeout=900) == 0, log.read_text()

    attempts = run.attempts()
    assert [attempt.resumed_from for attempt in attempts] == [None, 2, 4, 4]
    rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert json.loads((run.directory / "result.json").read_text())["steps"] == STEPS
    parts = sorted(path.name for path in (run.checkpoints / f"global_step_{STEPS}" / "actor").glob("model_*.pt"))
    assert parts == ["model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"]
    assert says(f"Ray has lost {worker.address}")
    assert log.read_text().count("checked 2 nodes: all checks passed") == 4
    # A step that is done again has the same prompts. (Its samples may differ: which of two servers answers a request,
    # and so from which random stream, is a matter of time.)
    for step, done, done_again in ((3, attempts[0], attempts[1]), (5, attempts[1], attempts[3])):
        before, after = (read_rows(attempt.metrics)[step] for attempt in (done, done_again))
        assert after["prompt_length/mean"] == before["prompt_length/mean"]
        assert after["critic/rewards/mean"] > 0
