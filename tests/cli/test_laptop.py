"""What the quickstart prepares for TeleLogs; and both stages, for a few steps, with verl's own trainers (e2e)."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from hpo_plugin.cli import _laptop
from hpo_plugin.cli._laptop import LAPTOP_TASKS, SFT_MANIFEST_NAME, prepare_telelogs_run
from hpo_plugin.cli._runs import Request, choose_run
from hpo_plugin.cli._training import TrainingError
from hpo_plugin.cli.app import app

pytest.importorskip("verl")

REQUEST = Request("ahpo", seed=2, steps=2, rollout="hf", n_test=40, task="telelogs")


@pytest.fixture
def console():
    return Console(record=True, width=200, file=open(os.devnull, "w"))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(_laptop, "TELELOGS_TRAIN_SIZE", 64)
    monkeypatch.setattr(_laptop, "SFT_EPOCHS", 1)


@pytest.mark.parametrize("task", list(LAPTOP_TASKS))
def test_every_task_has_a_config_of_its_name_with_the_algorithm_selected(task):
    from hpo_plugin.cli._checks import compose
    from hpo_plugin.glue.selection import read_selection

    request = Request("ahpo", seed=0, steps=1, rollout="hf", n_test=40, task=task)
    paths = ["actor_rollout_ref.model.path=x", "data.train_files=y", "data.val_files=z"]
    config, finding = compose(request.config_name, paths)
    assert config is not None, finding
    assert read_selection(config).variant.name == "ahpo"
    assert config.trainer.project_name == request.config_name
    assert request.stem.startswith(f"{task}_cpu-ahpo-")


def test_runs_of_different_tasks_are_different_runs(tmp_path):
    countdown = Request("ahpo", seed=2, steps=2, rollout="hf", n_test=40)
    first, _ = choose_run(tmp_path, REQUEST)
    second, goes_on = choose_run(tmp_path, countdown)
    assert not goes_on
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

    def run_sft(work: Path, files, seed, run, console):
        trained.append(files)
        folder = work / "checkpoints" / "global_step_2" / "huggingface"
        (work / "checkpoints" / "global_step_2").mkdir(parents=True)
        (work / "untrained").rename(folder)
        return 1.25, 2

    monkeypatch.setattr(_laptop, "_run_sft", run_sft)
    run, _ = choose_run(tmp_path, REQUEST)
    inputs = prepare_telelogs_run(run, REQUEST, tmp_path, console)
    assert prepare_telelogs_run(run, REQUEST, tmp_path, console) == inputs
    assert len(trained) == 1
    text = console.export_text()
    assert "177,280 parameters, 2 steps of verl's SFT trainer" in text
    assert "loss 1.25 nats a token (trained now)" in text
    assert "(already there)" in text
    # Nothing is left beside it.
    assert [path.name for path in inputs.model.parent.iterdir()] == [inputs.model.name]

    monkeypatch.setattr(_laptop, "SFT_EPOCHS", 5)
    with pytest.raises(FileExistsError, match="another start model"):
        prepare_telelogs_run(run, REQUEST, tmp_path, console)
    (inputs.model / SFT_MANIFEST_NAME).unlink()
    with pytest.raises(FileExistsError, match="not a start model"):
        prepare_telelogs_run(run, REQUEST, tmp_path, console)


def test_half_of_the_answers_are_guesses_and_the_loss_is_over_the_prompt_too(tmp_path):
    import pyarrow.parquet as pq

    from hpo_plugin.tasks.telelogs import prepare_telelogs

    made = prepare_telelogs(tmp_path, reduction="laptop", train_size=400, test_size=40, sft=True)
    demonstrations = pq.read_table(made.files["sft_train"])
    texts = [row["messages"] for row in _laptop.start_texts(demonstrations, seed=0).to_pylist()]
    assert len(texts) == 800
    assert all([turn["role"] for turn in turns] == ["assistant"] for turns in texts)
    right = 0
    for row, reasoned, guessed in zip(demonstrations.to_pylist(), texts[::2], texts[1::2], strict=True):
        prompt, answer = (turn["content"] for turn in row["messages"])
        assert reasoned[0]["content"] == prompt + answer
        label = guessed[0]["content"].removeprefix(prompt)
        assert label in [rf"\boxed{{{cause}}}" for cause in ("C3", "C5", "C6", "C7", "C8")]
        right += answer.endswith(label)
    # One in five, within four standard deviations.
    assert 48 <= right <= 112
    assert _laptop.start_texts(demonstrations, seed=1) != _laptop.start_texts(demonstrations, seed=0)


def test_a_failed_stage_leaves_no_model_and_says_why(tmp_path, console, small, monkeypatch):
    # What the launcher would start fails at once.
    monkeypatch.setattr(_laptop, "SFT_CONFIG_NAME", "no_such_config")
    monkeypatch.setattr(_laptop, "compose", lambda name, overrides: (_Batch(), None))
    run, _ = choose_run(tmp_path, REQUEST)
    with pytest.raises(TrainingError, match="no_such_config"):
        prepare_telelogs_run(run, REQUEST, tmp_path, console)
    assert not list((tmp_path / "models").iterdir())
    assert not (run.directory / "processes.json").exists()


class _Batch:
    class data:
        train_batch_size = 32


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_both_stages_train_with_verls_own_trainers(tmp_path):
    code = (
        "from hpo_plugin.cli import _laptop\n"
        "_laptop.TELELOGS_TRAIN_SIZE, _laptop.SFT_EPOCHS = 128, 2\n"
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

    from hpo_plugin.cpu.start_model import StartModelConfig, _initial_model, build_tokenizer

    untrained = _initial_model(build_tokenizer(512), 0, StartModelConfig(max_positions=512)).state_dict()
    trained = Qwen2ForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    assert trained.keys() == untrained.keys()
    assert all(not torch.equal(trained[name], untrained[name]) for name in trained if name.endswith("proj.weight"))
