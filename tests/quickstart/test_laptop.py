"""What the quickstart prepares for TeleLogs; and both stages, for a few steps, with verl's own trainers (e2e)."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from hpo_plugin.cli.app import app
from hpo_plugin.quickstart import sft
from hpo_plugin.quickstart.run import quickstart_inputs
from hpo_plugin.runs.directory import RunRequest, choose_run
from hpo_plugin.runs.training import TrainingError
from hpo_plugin.tasks.task import TASK_NAMES, load_task
from hpo_plugin.tasks.telelogs.task import TASK, TeleLogs

pytest.importorskip("verl")

REQUEST = RunRequest("ahpo", seed=2, steps=2, rollout="hf", n_test=40, task="telelogs")


@pytest.fixture
def console():
    return Console(record=True, width=200, file=open(os.devnull, "w"))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(TeleLogs, "laptop", replace(TASK.laptop, quickstart={"train_size": 64}, sft_epochs=1))


def make(run, output, console):
    return quickstart_inputs(TASK, REQUEST, output, logs=run.directory, console=console)


@pytest.mark.parametrize("task", TASK_NAMES)
def test_every_task_has_a_config_of_its_name_with_the_algorithm_selected(task):
    from hpo_plugin.check.compose import compose
    from hpo_plugin.verl.selection import read_selection

    request = RunRequest("ahpo", seed=0, steps=1, rollout="hf", n_test=40, task=task)
    paths = ["actor_rollout_ref.model.path=x", "data.train_files=y", "data.val_files=z"]
    name = load_task(task).laptop.config_name
    config, finding = compose(name, paths)
    assert config is not None, finding
    assert read_selection(config).variant.name == "ahpo"
    assert config.trainer.project_name == name == f"{task}_cpu"
    assert request.stem.startswith(f"{task}_cpu-ahpo-")


def test_runs_of_different_tasks_are_different_runs(tmp_path):
    countdown = RunRequest("ahpo", seed=2, steps=2, rollout="hf", n_test=40)
    first, _ = choose_run(tmp_path, REQUEST)
    second, resumes = choose_run(tmp_path, countdown)
    assert not resumes
    assert (first.directory.name, second.directory.name) == (
        "telelogs_cpu-ahpo-seed2-001",
        "countdown_cpu-ahpo-seed2-001",
    )


def test_an_unknown_task_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["quickstart", "--task", "gsm8k", "--output", str(tmp_path)])
    assert result.exit_code == 2
    assert "gsm8k" in result.output


def test_a_start_model_is_used_again_and_another_one_is_refused(tmp_path, console, small, monkeypatch):
    trained = []

    def run_sft(task, work: Path, files, **_):
        trained.append(files)
        folder = work / "checkpoints" / "global_step_2" / "huggingface"
        (work / "checkpoints" / "global_step_2").mkdir(parents=True)
        (work / "untrained").rename(folder)
        return 1.25, 2

    monkeypatch.setattr(sft, "run_sft", run_sft)
    run, _ = choose_run(tmp_path, REQUEST)
    inputs = make(run, tmp_path, console)
    assert make(run, tmp_path, console) == inputs
    assert len(trained) == 1
    text = console.export_text()
    assert "177,280 parameters, 2 steps of verl's SFT trainer" in text
    assert "loss 1.25 nats per token (trained)" in text
    assert "(reused)" in text
    # Nothing is left beside it.
    assert [path.name for path in inputs.model.parent.iterdir()] == [inputs.model.name]

    monkeypatch.setattr(TeleLogs, "laptop", replace(TASK.laptop, sft_epochs=5))
    with pytest.raises(FileExistsError, match="a different start model"):
        make(run, tmp_path, console)
    (inputs.model / sft.SFT_MANIFEST).unlink()
    with pytest.raises(FileExistsError, match="not a start model"):
        make(run, tmp_path, console)


def test_half_of_the_answers_are_guesses_and_the_loss_is_over_the_prompt_too(tmp_path):
    import pyarrow.parquet as pq

    from hpo_plugin.tasks.telelogs import prepare_telelogs

    made = prepare_telelogs(tmp_path, reduction="laptop", train_size=400, test_size=40, sft=True)
    demonstrations = pq.read_table(made.files["sft_train"])
    rows = demonstrations.to_pylist()
    texts = [row["messages"] for row in sft.start_texts(TASK, rows, seed=0).to_pylist()]
    assert len(texts) == 800
    assert all([turn["role"] for turn in turns] == ["assistant"] for turns in texts)
    right = 0
    for row, reasoned, guessed in zip(rows, texts[::2], texts[1::2], strict=True):
        prompt, answer = (turn["content"] for turn in row["messages"])
        assert reasoned[0]["content"] == prompt + answer
        label = guessed[0]["content"].removeprefix(prompt)
        assert label in [rf"\boxed{{{cause}}}" for cause in ("C3", "C5", "C6", "C7", "C8")]
        right += answer.endswith(label)
    # One in five, within four standard deviations.
    assert 48 <= right <= 112
    assert sft.start_texts(TASK, rows, seed=1) != sft.start_texts(TASK, rows, seed=0)


def test_a_failed_stage_leaves_no_model_and_says_why(tmp_path, console, small, monkeypatch):
    # What the launcher would start fails at once.
    monkeypatch.setattr(TeleLogs, "laptop", replace(TASK.laptop, sft_config_name="no_such_config"))
    monkeypatch.setattr(sft, "compose", lambda name, overrides: (_Batch(), None))
    run, _ = choose_run(tmp_path, REQUEST)
    with pytest.raises(TrainingError, match="no_such_config"):
        make(run, tmp_path, console)
    assert not list((tmp_path / "models").iterdir())
    assert not (run.directory / "processes.json").exists()


class _Batch:
    class data:
        train_batch_size = 32


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_both_stages_train_with_verls_own_trainers(tmp_path):
    code = (
        "from dataclasses import replace\n"
        "from hpo_plugin.tasks.telelogs.task import TeleLogs\n"
        "TeleLogs.laptop = replace(TeleLogs.laptop, quickstart={'train_size': 128})\n"
        "from hpo_plugin.cli.app import app\n"
        "app()\n"
    )
    arguments = ["quickstart", "--task=telelogs", "--steps=2", "--n-test=40", f"--output={tmp_path}"]
    overrides = [
        "data.train_batch_size=8",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.actor.optim.lr=1e-2",
        "actor_rollout_ref.rollout.val_kwargs.n=2",
        f"trainer.validation_data_dir={tmp_path / 'validation'}",
        f"reward.custom_reward_function.path={tmp_path / 'reward.py'}",
    ]
    # Of random text some is right, so that there is something to learn; the votes are those of the real reward.
    (tmp_path / "reward.py").write_text(
        "from hpo_plugin.tasks.telelogs import compute_score as real\n"
        "def compute_score(data_source, solution_str, ground_truth, **other):\n"
        "    right = float(sum(map(ord, solution_str)) % 4 == 0)\n"
        "    return real(data_source, solution_str, ground_truth) | {'score': right, 'acc': right}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, *overrides], capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "telelogs_cpu-ahpo-seed0-001"
    losses = [
        json.loads(line)["data"]["train/loss"]
        for line in (run / "sft_metrics.jsonl").read_text().splitlines()
        if "train/loss" in json.loads(line)["data"]
    ]
    # 128 cases with two answers each, in batches of 8, twice.
    assert len(losses) == 64
    assert losses[-1] < losses[0]
    steps = [json.loads(line)["data"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 3
    # With several samples a prompt, verl votes, and the samples can be scored as the papers do.
    assert {"val-core/telelogs/acc/mean@2", "val-core/telelogs/acc/maj@2/mean"} <= steps[0].keys()
    scored = CliRunner().invoke(app, ["score", "telelogs", str(tmp_path / "validation" / "0.jsonl")])
    assert scored.exit_code == 0, scored.output
    assert "40 prompts, 2 samples each" in scored.output
    assert "maj@2" in scored.output
    for step in steps[1:]:
        assert math.isfinite(step["actor/pg_loss"])
        assert step["actor/grad_norm"] > 0
        assert 0.1 <= step["actor/hpo/alpha"] <= 1
    (model,) = (tmp_path / "models").iterdir()

    import torch
    from transformers import Qwen2ForCausalLM

    from hpo_plugin.quickstart.start_model import StartModelConfig, _initial_model, build_tokenizer

    untrained = _initial_model(build_tokenizer(512), 0, StartModelConfig(max_positions=512)).state_dict()
    trained = Qwen2ForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    assert trained.keys() == untrained.keys()
    assert all(not torch.equal(trained[name], untrained[name]) for name in trained if name.endswith("proj.weight"))
