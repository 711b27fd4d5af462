"""Which directory a call uses, and from which step an interrupted run resumes."""

import json
import multiprocessing
import os
import shutil
import signal
import time

import pytest
import torch
import torch.distributed.checkpoint

from hpo_plugin.runs.directory import Run, RunBusyError, RunRequest, choose_run

AHPO = RunRequest(policy_loss="ahpo", seed=0, steps=30, rollout="hf", n_test=512)


def log(attempt, *steps):
    attempt.metrics.write_text("".join(json.dumps({"step": s, "data": {"x": s}}) + "\n" for s in steps))


def checkpoint(run, step, *, latest=True, complete=True):
    directory = run.checkpoints / f"global_step_{step}"
    (directory / "actor").mkdir(parents=True)
    for kind in ("model", "optim", "extra_state"):
        torch.save({"weight": torch.zeros(9)}, directory / "actor" / f"{kind}_world_size_1_rank_0.pt")
    if complete:
        torch.save({}, directory / "data.pt")
    if latest:
        (run.checkpoints / "latest_checkpointed_iteration.txt").write_text(str(step))


def test_a_second_call_after_a_finished_run_is_another_run(tmp_path):
    run, resumed = choose_run(tmp_path, AHPO)
    assert (run.directory.name, resumed) == ("countdown_cpu-ahpo-seed0-001", False)
    run.finish({"steps": 30})
    again, resumed = choose_run(tmp_path, AHPO)
    assert (again.directory.name, resumed) == ("countdown_cpu-ahpo-seed0-002", False)


def test_an_unfinished_run_resumes_only_with_the_same_request(tmp_path):
    run, _ = choose_run(tmp_path, AHPO)
    assert choose_run(tmp_path, AHPO)[0].directory == run.directory
    for other in (
        RunRequest("ahpo", seed=0, steps=31, rollout="hf", n_test=512),
        RunRequest("ahpo", seed=0, steps=30, rollout="hf", n_test=513),
        RunRequest("ahpo", seed=0, steps=30, rollout="hf", n_test=512, overrides=("x=1",)),
    ):
        chosen, resumed = choose_run(tmp_path, other)
        assert not resumed
        assert chosen.directory != run.directory
    assert choose_run(tmp_path, AHPO, new=True)[1] is False


def test_a_run_that_somebody_is_working_on_is_left_alone(tmp_path):
    run, _ = choose_run(tmp_path, AHPO)
    with run.locked():
        chosen, resumed = choose_run(tmp_path, AHPO)
        assert not resumed
        assert chosen.directory != run.directory
        with pytest.raises(RunBusyError, match="another process"), Run(run.directory).locked():
            pass


def _hold(directory):
    with Run(directory).locked():
        (directory / "held").touch()
        time.sleep(60)


def test_a_killed_process_lets_go_of_its_run(tmp_path):
    run, _ = choose_run(tmp_path, AHPO)
    process = multiprocessing.get_context("fork").Process(target=_hold, args=(run.directory,))
    process.start()
    while not (run.directory / "held").exists():
        time.sleep(0.01)
    assert run.busy()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not run.busy()


def test_a_run_resumes_from_the_newest_checkpoint_whose_steps_are_all_logged(tmp_path):
    run, _ = choose_run(tmp_path, AHPO)
    log(run.new_attempt(None), *range(20))
    checkpoint(run, 10)
    # verl saves step 20 before it logs it; killed in between, a resume from 20 would lose the metrics of step 20.
    checkpoint(run, 20)
    assert run.resume_step() == 10
    log(run.attempts()[0], *range(21))
    assert run.resume_step() == 20


def test_a_checkpoint_that_was_being_written_is_not_used(tmp_path):
    run, _ = choose_run(tmp_path, AHPO)
    log(run.new_attempt(None), *range(25))
    checkpoint(run, 10)
    checkpoint(run, 20, latest=False)
    assert run.resume_step() == 10
    checkpoint(run, 24, latest=False, complete=False)
    assert run.resume_step() == 10


def test_a_half_written_note_of_the_latest_checkpoint_means_the_one_before(tmp_path):
    run, _ = choose_run(tmp_path, AHPO)
    log(run.new_attempt(None), *range(25))
    checkpoint(run, 10)
    checkpoint(run, 20)
    (run.checkpoints / "latest_checkpointed_iteration.txt").write_text("")
    assert run.resume_step() == 10


def test_a_half_written_note_does_not_discard_the_checkpoint_before_the_newest(tmp_path):
    run, _ = choose_run(tmp_path, AHPO)
    log(run.new_attempt(None), *range(25))
    checkpoint(run, 10)
    checkpoint(run, 20, complete=False)
    (run.checkpoints / "latest_checkpointed_iteration.txt").write_text("")
    assert run.resume_step() == 10


def test_a_lost_note_of_the_latest_checkpoint_means_the_one_before_the_newest(tmp_path):
    run, _ = choose_run(tmp_path, AHPO)
    log(run.new_attempt(None), *range(25))
    checkpoint(run, 10)
    (run.checkpoints / "latest_checkpointed_iteration.txt").unlink()
    assert run.resume_step() is None
    checkpoint(run, 20, latest=False)
    assert run.resume_step() == 10


@pytest.mark.parametrize("size", [0, 1, 0.5, -1])
@pytest.mark.parametrize("name", ["actor/model_world_size_1_rank_0.pt", "data.pt"])
def test_a_truncated_checkpoint_is_not_used(tmp_path, name, size):
    run, _ = choose_run(tmp_path, AHPO)
    log(run.new_attempt(None), *range(25))
    checkpoint(run, 10)
    checkpoint(run, 20)
    assert run.damaged_checkpoints() == {}
    path = run.checkpoints / "global_step_20" / name
    whole = path.stat().st_size
    os.truncate(path, int(size * whole) if 0 < size < 1 else size % whole)
    assert run.resume_step() == 10
    assert run.damaged_checkpoints() == {20: f"{name} is truncated"}


def test_a_checkpoint_without_the_file_of_a_rank_is_not_used(tmp_path):
    run, _ = choose_run(tmp_path, AHPO)
    log(run.new_attempt(None), *range(25))
    checkpoint(run, 10)
    checkpoint(run, 20)
    actor = run.checkpoints / "global_step_20" / "actor"
    for kind in ("model", "optim", "extra_state"):
        (actor / f"{kind}_world_size_1_rank_0.pt").unlink()
        for rank in range(2):
            torch.save({}, actor / f"{kind}_world_size_2_rank_{rank}.pt")
    assert run.resume_step() == 20
    (actor / "optim_world_size_2_rank_1.pt").unlink()
    assert run.resume_step() == 10
    assert run.damaged_checkpoints() == {20: "actor/optim_world_size_2_rank_1.pt is missing"}


@pytest.mark.parametrize("kind", ["model", "optim", "extra_state"])
def test_a_checkpoint_with_the_files_of_other_contents_only_is_not_used(tmp_path, kind):
    run, _ = choose_run(tmp_path, AHPO)
    log(run.new_attempt(None), *range(25))
    checkpoint(run, 10)
    checkpoint(run, 20)
    (run.checkpoints / "global_step_20" / "actor" / f"{kind}_world_size_1_rank_0.pt").unlink()
    assert run.resume_step() == 10
    assert run.damaged_checkpoints() == {20: f"actor/{kind}_world_size_1_rank_0.pt is missing"}


@pytest.mark.parametrize("contents", [["model", "extra"], ["hf_model", "model", "extra"], "${..saved}"])
def test_contents_that_verl_does_not_save_are_not_missing(tmp_path, contents):
    """``save_contents`` is read from the copy of the config that Hydra writes, interpolations included."""
    run, _ = choose_run(tmp_path, AHPO)
    attempt = run.new_attempt(None)
    log(attempt, *range(25))
    checkpoint(run, 10)
    actor = run.checkpoints / "global_step_10" / "actor"
    (actor / "optim_world_size_1_rank_0.pt").unlink()
    assert run.resume_step() is None
    copy = attempt.directory / "hydra" / ".hydra" / "config.yaml"
    copy.parent.mkdir(parents=True)
    actor_config = {"saved": ["model", "extra"], "checkpoint": {"save_contents": contents}}
    copy.write_text(json.dumps({"actor_rollout_ref": {"actor": actor_config}}))
    assert run.resume_step() == 10
    (actor / "extra_state_world_size_1_rank_0.pt").unlink()
    assert run.damaged_checkpoints() == {10: "actor/extra_state_world_size_1_rank_0.pt is missing"}


def test_without_a_checkpoint_it_starts_again_and_nothing_is_logged_twice(tmp_path):
    run, _ = choose_run(tmp_path, AHPO)
    log(run.new_attempt(None), 0, 1, 2)
    assert run.resume_step() is None
    log(run.new_attempt(None), 0, 1)
    assert list(run.rows()) == [0, 1]


def test_every_step_is_there_once_after_two_interruptions(tmp_path):
    run, _ = choose_run(tmp_path, AHPO)
    log(run.new_attempt(None), *range(14))
    checkpoint(run, 10)
    log(run.new_attempt(run.resume_step()), *range(11, 24))
    checkpoint(run, 20)
    assert run.resume_step() == 20
    log(run.new_attempt(20), *range(21, 31))
    assert list(run.rows()) == list(range(31))
    assert [attempt.resumed_from for attempt in run.attempts()] == [None, 10, 20]


def test_an_attempt_that_died_before_it_logged_changes_nothing(tmp_path):
    run, _ = choose_run(tmp_path, AHPO)
    log(run.new_attempt(None), *range(14))
    checkpoint(run, 10)
    run.new_attempt(10)
    assert list(run.rows()) == list(range(11))
    assert run.resume_step() == 10


def test_a_failure_is_noted_until_the_next_attempt(tmp_path):
    run, _ = choose_run(tmp_path, AHPO)
    assert run.failure is None
    run.fail("out of luck")
    assert run.failure == "out of luck"
    run.new_attempt(None)
    assert run.failure is None


def test_a_checkpoint_of_megatron_is_complete_when_its_manifest_is_written(tmp_path):
    run, _ = choose_run(tmp_path, AHPO)
    log(run.new_attempt(None), *range(25))
    for step in (10, 20):
        checkpoint(run, step)
        actor = run.checkpoints / f"global_step_{step}" / "actor"
        (actor / "model_world_size_1_rank_0.pt").unlink()
        (actor / "optimizer" / "dist_ckpt").mkdir(parents=True)
    (run.checkpoints / "global_step_10" / "actor" / "ckpt_contents.json").touch()
    assert run.resume_step() == 10
    (run.checkpoints / "global_step_20" / "actor" / "ckpt_contents.json").touch()
    assert run.resume_step() == 20


def test_a_checkpoint_of_torchtitan_is_complete_when_its_metadata_is_written(tmp_path):
    run, _ = choose_run(tmp_path, AHPO)
    attempt = run.new_attempt(None)
    log(attempt, *range(25))
    actor_config = {"strategy": "torchtitan", "checkpoint": {"save_contents": ["model", "optimizer", "extra"]}}
    copy = attempt.directory / "hydra" / ".hydra" / "config.yaml"
    copy.parent.mkdir(parents=True)
    copy.write_text(json.dumps({"actor_rollout_ref": {"actor": actor_config}}))
    for step in (10, 20):
        checkpoint(run, step)
        shutil.rmtree(run.checkpoints / f"global_step_{step}" / "actor")
    # TorchTitan replaces ``actor`` by ``step-<N>``.
    saved = [run.checkpoints / f"global_step_{step}" / f"step-{step}" for step in (10, 20)]
    torch.distributed.checkpoint.save({"weight": torch.zeros(9)}, checkpoint_id=saved[0])
    assert run.resume_step() == 10
    assert run.damaged_checkpoints() == {20: "there is no file *.distcp"}
    torch.distributed.checkpoint.save({"weight": torch.zeros(9)}, checkpoint_id=saved[1])
    assert run.resume_step() == 20
    (saved[1] / ".metadata").unlink()
    assert run.resume_step() == 10
    assert run.damaged_checkpoints() == {20: "step-20/.metadata is missing"}


def test_a_new_attempt_removes_the_old_checkpoints_that_verl_would_keep(tmp_path):
    """A process of verl removes only the checkpoints that it has saved."""
    run, _ = choose_run(tmp_path, AHPO)
    attempt = run.new_attempt(None)
    log(attempt, *range(45))
    for step in (10, 20, 30, 40):
        checkpoint(run, step)
    (run.checkpoints / "global_step_20" / "data.pt").unlink()
    assert run.resume_step() == 40
    run.new_attempt(40)
    assert len(list(run.checkpoints.glob("global_step_*"))) == 4
    copy = attempt.directory / "hydra" / ".hydra" / "config.yaml"
    copy.parent.mkdir(parents=True)
    copy.write_text(json.dumps({"trainer": {"max_actor_ckpt_to_keep": 2}}))
    run.new_attempt(30)
    # A damaged one does not count, and the later one is overwritten when its step is trained again.
    assert {path.name for path in run.checkpoints.glob("global_step_*")} == {f"global_step_{n}" for n in (10, 30, 40)}
    assert run.resume_step() == 30


def test_a_truncated_file_of_the_critic_is_found(tmp_path):
    run, _ = choose_run(tmp_path, AHPO)
    log(run.new_attempt(None), *range(25))
    checkpoint(run, 10)
    critic = run.checkpoints / "global_step_10" / "critic"
    critic.mkdir()
    torch.save({}, critic / "model_world_size_1_rank_0.pt")
    assert run.resume_step() == 10
    os.truncate(critic / "model_world_size_1_rank_0.pt", 9)
    assert run.damaged_checkpoints() == {10: "critic/model_world_size_1_rank_0.pt is truncated"}


def test_a_checkpoint_that_an_attempt_goes_back_behind_counts_only_when_it_is_written_again(tmp_path):
    """Its directory is written once more: killed in between, half of it would be old."""
    run, _ = choose_run(tmp_path, AHPO)
    log(run.new_attempt(None), *range(20))
    checkpoint(run, 10)
    checkpoint(run, 20)
    again = run.new_attempt(run.resume_step())
    assert again.resumed_from == 10
    # Asynchronous saving: step 20 is logged before its checkpoint is complete.
    log(again, *range(11, 22))
    assert run.resume_step() == 10
    checkpoint_again = run.checkpoints / "latest_checkpointed_iteration.txt"
    checkpoint_again.write_text("20")
    assert run.resume_step() == 20


def test_a_run_without_an_evaluation_before_training_begins_with_step_1(tmp_path):
    run, _ = choose_run(tmp_path, AHPO)
    log(run.new_attempt(None), 1, 2, 4)
    assert run.missing_steps(4) == [0, 3]
    assert run.missing_steps(4, first=1) == [3]
