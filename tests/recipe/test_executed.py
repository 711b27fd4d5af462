"""Three steps of verl's trainer for every task and engine of ``hpo_recipe``, on CPU.

Overridden are the model's path, sizes, the platform and the rollout; algorithm, engine, data and reward are the
recipe's. The model is small and has learned to answer some prompts, so that there are successes and failures.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

pytest.importorskip("verl")

from hpo_plugin.quickstart.start_model import CHAT_TEMPLATE, EOS_TOKEN, PAD_TOKEN, build_tokenizer
from hpo_plugin.tasks.countdown.dataset import prepare_countdown
from hpo_plugin.tasks.countdown.problems import CountdownConfig, solve
from hpo_plugin.tasks.telelogs.dataset import prepare_telelogs

#: The recipes, and TeleLogs from the model of its SFT stage.
TASKS = ("countdown3", "countdown4", "telelogs", "telelogs after SFT")

LIMIT_S = 900
STEPS = 3

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2 * LIMIT_S)]

#: Sizes that two cores can train, and a cluster of one rank.
SIZES = [
    "data.train_batch_size=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "data.max_response_length=32",
    f"trainer.total_training_steps={STEPS}",
    "trainer.n_gpus_per_node=1",
]
PLATFORM_AND_ROLLOUT = ["+hpo/backend=cpu", "+hpo/cpu_rollout=hf"]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def answers(task: str, row: dict[str, Any]) -> list[str]:
    """What the model learns to answer, each with the same probability, so that some answers are right."""
    truth = row["reward_model"]["ground_truth"]
    if task == "telelogs":
        return [rf"\boxed{{C{number}}}" for number in range(1, 9)]
    right = f"<answer>{solve(truth['numbers'], truth['target'])}</answer>"
    return [right, "<answer>{}+{}</answer>".format(*truth["numbers"])]


def build_model(folder: Path, task: str, rows: list[dict[str, Any]], texts: list[str], steps: int) -> None:
    """A Qwen2 of two layers with a vocabulary of the task's text, trained for a few seconds."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = build_tokenizer(8192).train_new_from_iterator(texts, 1024)
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    # More would wait for each other on a busy machine.
    torch.set_num_threads(1)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=1024,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.convert_tokens_to_ids(EOS_TOKEN),
            pad_token_id=tokenizer.convert_tokens_to_ids(PAD_TOKEN),
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rng = random.Random(0)
    prompts = [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False)
        for row in rows
    ]
    for _ in range(steps):
        for row, prompt in zip(rows, prompts, strict=True):
            answer = tokenizer(rng.choice(answers(task, row)) + EOS_TOKEN)["input_ids"]
            # No label is learned from the prompt, so that its end is enough.
            context = prompt[-rng.choice((16, 64, 256)) :] if task == "telelogs" else prompt
            ids = torch.tensor([context + answer])
            hidden = model.model(ids).last_hidden_state[0, -len(answer) - 1 : -1]
            loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[0, -len(answer) :])
            (loss / len(rows)).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def fine_tune(model: Path, data: Path, folder: Path) -> Path:
    """The SFT stage of TeleLogs, two steps of verl's SFT trainer; the trained model."""
    run(
        [
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=1",
            "-m",
            "verl.trainer.sft_trainer",
            "--config-name=telelogs_sft",
            "+hpo/backend=cpu_sft",
            f"model.path={model}",
            f"data.train_files={data / 'sft_train.parquet'}",
            f"data.val_files={data / 'sft_test.parquet'}",
            "data.train_batch_size=4",
            "trainer.total_training_steps=2",
            f"trainer.default_local_dir={folder}",
            f"hydra.run.dir={folder / 'hydra'}",
        ],
        folder,
    )
    return folder / "global_step_2" / "huggingface"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of the three tasks where the recipes look for them."""
    folder = tmp_path_factory.mktemp("data")
    for numbers in (3, 4):
        config = CountdownConfig(counts=(numbers,))
        prepare_countdown(folder / f"countdown{numbers}", config=config, train_size=4, test_size=4)
    prepare_telelogs(folder / "telelogs", train_size=8, test_size=8, sft=True)
    return folder


@pytest.fixture(scope="module")
def models(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The model of a task, built once."""
    built: dict[str, Path] = {}

    def model(task: str) -> Path:
        if task == "telelogs after SFT" and task not in built:
            built[task] = fine_tune(model("telelogs"), data / "telelogs", tmp_path_factory.mktemp("sft"))
        if task not in built:
            rows = rows_of(data / task / "train.parquet")
            texts = [row["prompt"][0]["content"] for row in rows] + [a for row in rows for a in answers(task, row)]
            built[task] = tmp_path_factory.mktemp(f"model-{task}")
            build_model(built[task], task, rows, texts, steps=120 if task == "telelogs" else 300)
        return built[task]

    return model


def run(command: list[str], folder: Path) -> str:
    """Run a command of verl on CPU to its end, in a session of its own; its output."""
    here = Path(__file__).parent
    paths = [os.environ.get("PYTHONPATH"), str(here), str(here.parent / "verl")]
    environment = os.environ | {
        "VERL_PLATFORM": "cpu",
        "VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl"),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    output = folder / "output.log"
    with output.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=folder,
        )
        try:
            code = process.wait(timeout=LIMIT_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    said = output.read_text(errors="replace")
    assert code == 0, said[-4000:]
    return said


def execute(folder: Path, data: Path, model: Path, *overrides: str) -> None:
    """Train a recipe for three steps, and check what they did."""
    said = run(
        [
            "verl.trainer.main_ppo",
            "--config-name=hpo_recipe",
            f"recipe.data_dir={data}",
            f"actor_rollout_ref.model.path={model}",
            f"hydra.run.dir={folder / 'hydra'}",
            *SIZES,
            *PLATFORM_AND_ROLLOUT,
            *overrides,
        ],
        folder,
    )
    steps = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["step"] > 0:
            steps.setdefault(record["step"], {}).update(record["data"])
    assert sorted(steps) == list(range(1, STEPS + 1))
    for step in steps.values():
        positive, negative = step["actor/hpo/share_positive"], step["actor/hpo/share_negative"]
        assert positive > 0
        assert step["actor/hpo/alpha"] == pytest.approx(min(1.0, max(0.1, positive / negative)))
        assert 0 < step["actor/grad_norm"] < math.inf
    assert (folder / "checkpoints").is_dir(), said[-2000:]


@pytest.mark.parametrize("task", ["countdown3", *(pytest.param(task, marks=pytest.mark.slow) for task in TASKS[1:])])
def test_fsdp2(task: str, data: Path, models: Any, tmp_path: Path) -> None:
    execute(tmp_path, data, models(task), f"hpo/task={task.split()[0]}", "hpo/engine=fsdp2")


#: megatron-core's fused kernels need a GPU; the CPU backend's own check refuses every engine but FSDP2.
MEGATRON_PLATFORM = [
    "trainer.device=cpu",
    "~actor_rollout_ref.actor.fsdp_config",
    "~actor_rollout_ref.ref.fsdp_config",
    "actor_rollout_ref.model.external_lib=megatron_platform",
    "actor_rollout_ref.model.use_remove_padding=True",
    "actor_rollout_ref.actor.strategy=megatron",
    "actor_rollout_ref.ref.strategy=megatron",
    "actor_rollout_ref.actor.megatron.vanilla_mbridge=True",
    *(
        f"+actor_rollout_ref.actor.megatron.override_transformer_config.{name}=False"
        for name in (
            "gradient_accumulation_fusion",
            "persist_layer_norm",
            "bias_dropout_fusion",
            "bias_activation_fusion",
            "masked_softmax_fusion",
        )
    ),
]
PIPELINE_OF_TWO = ["trainer.n_gpus_per_node=2", "recipe.megatron.pipeline_model_parallel_size=2"]


@pytest.mark.parametrize("task", [TASKS[0], *(pytest.param(task, marks=pytest.mark.slow) for task in TASKS[1:])])
def test_megatron(task: str, data: Path, models: Any, tmp_path: Path) -> None:
    """Two pipeline stages, and two rollout servers that get their weights from both."""
    pytest.importorskip("megatron.core")
    settings = [f"hpo/task={task.split()[0]}", "hpo/engine=megatron", *MEGATRON_PLATFORM, *PIPELINE_OF_TWO]
    execute(tmp_path, data, models(task), *settings)
