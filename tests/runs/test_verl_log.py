"""Reading verl's own metrics files, joining the attempts of a run, and finding the cause of a failure."""

import json
import math

import pytest

from hpo_plugin.runs.verl_log import (
    LogError,
    MetricsFile,
    StepView,
    died_workers,
    evaluations,
    failure_cause,
    merge_attempts,
    plain_lines,
    read_rows,
)


def write(path, *rows, end="\n"):
    path.write_text("\n".join(json.dumps({"step": step, "data": data}) for step, data in rows) + end)


def test_a_row_is_read_once_and_only_when_its_line_is_complete(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    assert file.new_rows() == []
    write(path, (0, {"a": 1}), end="")
    assert file.new_rows() == []
    write(path, (0, {"a": 1}), (1, {"a": 2.5}))
    assert file.new_rows() == [(0, {"a": 1.0}), (1, {"a": 2.5})]
    assert file.new_rows() == []


def test_what_verl_wrote_itself_is_read_back(tmp_path, monkeypatch):
    tracking = pytest.importorskip("verl.utils.tracking")
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(tmp_path / "m.jsonl"))
    logger = tracking.FileLogger("project", "experiment")
    logger.log({"critic/rewards/mean": 0.25, "note": "text"}, step=3)
    logger.finish()
    assert read_rows(tmp_path / "m.jsonl") == {3: {"critic/rewards/mean": 0.25}}


@pytest.mark.parametrize("line", ["garbage", '{"data": {}}', '{"step": 1}', "[1, 2]"])
def test_a_line_that_verl_did_not_write_is_refused_with_its_number(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0, "data": {{}}}}\n{line}\n')
    with pytest.raises(LogError, match="line 2"):
        read_rows(path)


def test_a_step_logged_twice_in_one_attempt_is_refused(tmp_path):
    write(tmp_path / "m.jsonl", (4, {}), (4, {}))
    with pytest.raises(LogError, match="step 4 is logged twice"):
        read_rows(tmp_path / "m.jsonl")


def test_steps_beyond_the_checkpoint_are_replaced_by_those_done_again():
    first = {0: {"x": 0}, 1: {"x": 1}, 2: {"x": 2}, 3: {"x": 3}}
    second = {3: {"x": 30}, 4: {"x": 40}}
    assert merge_attempts([(None, first), (2, second)]) == {
        0: {"x": 0}, 1: {"x": 1}, 2: {"x": 2}, 3: {"x": 30}, 4: {"x": 40}
    }  # fmt: skip


def test_an_attempt_from_the_start_discards_everything_before():
    assert merge_attempts([(None, {0: {"x": 0}, 1: {"x": 1}}), (None, {0: {"x": 5}})]) == {0: {"x": 5}}


def test_held_out_success_is_verls_core_mean_and_no_other_validation_metric():
    rows = {
        0: {"val-core/countdown/reward/mean@1": 0.0625, "val-aux/num_turns/mean": 2.0},
        1: {"val-aux/countdown/score/mean@1": 0.5},
        2: {"val-core/countdown/acc/mean@1": 0.25},
    }
    assert evaluations(rows) == [(0, 0.0625), (2, 0.25)]


def test_the_line_of_a_step_shows_what_is_known_and_a_dash_for_what_is_not():
    metrics = {
        "critic/rewards/mean": 0.125,
        "actor/hpo/alpha": 0.4,
        "actor/hpo/share_positive": 0.2,
        "actor/hpo/share_negative": 0.5,
        "response_length/mean": 9.5,
        "timing_s/step": 2.25,
    }
    line = StepView.of(7, metrics).line(60)
    assert line == "step  7/60  reward 0.125  α 0.40  p̂⁺ 0.20  p̂⁻ 0.50  length  9.5   2.2 s"
    missing = StepView.of(7, {"critic/rewards/mean": 0.125})
    assert math.isnan(missing.alpha)
    assert "α    -  " in missing.line(60)
    assert len(missing.line(60)) == len(line)


AGENT_LOOP = """\
\x1b[36m(AgentLoopWorker pid=71)\x1b[0m ERROR:verl: Error in _run_prompt
\x1b[36m(AgentLoopWorker pid=71)\x1b[0m Traceback (most recent call last):
\x1b[36m(AgentLoopWorker pid=71)\x1b[0m   File "reward.py", line 3, in compute_score
\x1b[36m(AgentLoopWorker pid=71)\x1b[0m KeyError: 'target'
Traceback (most recent call last):
ray.exceptions.RayTaskError(RuntimeError): ray::TaskRunnerV1.run() (pid=12)
RuntimeError: no materializable trajectories
"""

WORKER = """\
Error executing job with overrides: ['a=1']
Traceback (most recent call last):
  File "main_ppo.py", line 94, in run_ppo
ray.exceptions.RayTaskError(ConfigError): ray::TaskRunnerV1.run() (pid=12, ip=10.0.0.1)
  File "worker.py", line 61, in train_mini_batch
hpo_plugin.verl.selection.ConfigError: this batch has no `uid`
"""


def test_an_exception_of_the_agent_loop_is_the_cause_although_another_one_ends_the_run():
    assert failure_cause(plain_lines(AGENT_LOOP)) == "in the agent loop: KeyError: 'target'"


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        (
            "ray.exceptions.RayTaskError(RuntimeError): ray::RewardLoopWorker.compute_score() (pid=3)\n"
            '  File "reward.py", line 3\nRuntimeError: this reward fails',
            "RuntimeError: this reward fails",
        ),
        (
            "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.\n",
            "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.",
        ),
    ],
)
def test_the_cause_in_the_agent_loop_can_come_from_another_actor(lines, cause):
    text = f"ERROR:verl: Error in _run_prompt\n{lines}\nTraceback:\nRuntimeError: no materializable trajectories\n"
    assert failure_cause(plain_lines(text)) == f"in the agent loop: {cause}"


def test_the_cause_is_the_exception_and_not_rays_wrapper_of_it():
    assert failure_cause(plain_lines(WORKER)) == "hpo_plugin.verl.selection.ConfigError: this batch has no `uid`"


def test_without_an_exception_the_cause_is_rays_message_that_its_control_service_has_died():
    text = (
        "Training Progress:   0%|          | 0/8\n[2026-11-28 14:29:13,070 E 16884 17097] rpc_client.h:204: Failed to "
        "connect to GCS within 60 seconds. GCS may have been killed. It's either GCS is terminated by `ray stop`\n"
    )
    lost = "Failed to connect to GCS within 60 seconds. GCS may have been killed"
    assert failure_cause(plain_lines(text)) == lost
    assert failure_cause(plain_lines(f"{text}ValueError: no\n")) == "ValueError: no"


def test_output_without_an_exception_has_no_cause():
    assert failure_cause(plain_lines("step 1\rstep 2\nKilled")) is None


RAYLET = "\x1b[33m(raylet)\x1b[0m A worker died or was killed while executing a task by an unexpected system error."
#: What Ray prints for killed actors.
DIED = f"""\
\x1b[36m(AgentLoopWorkerTQ pid=71)\x1b[0m ready
{RAYLET} Lease ID: ff7cc1d49b Node ID: 2d493b4f Worker PID: 71 Worker exit type: SYSTEM_ERROR Worker \
exit detail: Worker unexpectedly exits with a connection error code 2. End of file.
{RAYLET} Worker ID: 7c1de2aa Node ID: 2d493b4f Worker PID: 72 Worker exit type: NODE_OUT_OF_MEMORY [repeated 2x]
"""


def test_the_processes_that_ray_reports_as_dead_are_named():
    assert died_workers(DIED) == ["AgentLoopWorkerTQ (pid 71, SYSTEM_ERROR)", "a worker (pid 72, NODE_OUT_OF_MEMORY)"]
    assert died_workers(AGENT_LOOP) == []
