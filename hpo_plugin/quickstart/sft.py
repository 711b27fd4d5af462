"""A start model from verl's SFT trainer, on the demonstrations of a task."""

from __future__ import annotations

import json
import random
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo_plugin.check.compose import compose
from hpo_plugin.console import note, stage_bars
from hpo_plugin.files import atomic_write, sha256_of_file
from hpo_plugin.quickstart.form import ENVIRONMENT
from hpo_plugin.quickstart.start_model import SIZES, StartModelConfig, demonstrated, save_untrained_model
from hpo_plugin.runs.process import StalledError, Trainer
from hpo_plugin.runs.training import LOG_ENVIRONMENT, TrainingError, failure, python_for_shell, why
from hpo_plugin.runs.verl_log import MetricsFile
from hpo_plugin.tasks.task import Row, Task, laptop_form

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.console import Console

SFT_MANIFEST = "sft.json"
#: What torchrun would set for one process. Without torchrun there is one log, with the cause of a failure at its end.
ONE_RANK = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    # Any free port.
    "MASTER_PORT": "0",
    # Sums that are split over threads round differently: one thread makes a seed's model the same on any machine.
    "OMP_NUM_THREADS": "1",
}
#: Seconds without a step after which the SFT trainer is stopped.
STALL = 600.0


def fine_tune(
    task: Task,
    files: Mapping[str, Path],
    model: Path,
    *,
    config: StartModelConfig,
    seed: int,
    logs: Path,
    console: Console,
) -> Mapping[str, Any]:
    """Train a start model with verl's SFT trainer, or find it from an earlier call.

    Args:
        task: The task; its laptop form names the SFT trainer's config.
        files: Its data files, with ``sft_train`` and ``sft_test``.
        model: The model folder. It appears complete or not at all.
        config: Sizes of the model.
        seed: Seed of the weights and of the guesses.
        logs: Directory for ``sft.log``, ``sft_metrics.jsonl`` and ``sft_command.sh``.
        console: The console to show progress on.

    Returns:
        ``parameters``, ``steps`` and ``held_out_loss`` (nats per token).

    Raises:
        TrainingError: The SFT trainer failed.
        ValueError: The task has no data files for this stage.
        FileExistsError: The folder holds something else.
        OSError: A directory cannot be written.
    """
    import pyarrow.parquet as pq

    epochs = laptop_form(task).sft_epochs
    for name in ("sft_train", "sft_test"):
        if name not in files:
            raise ValueError(f"the task {task.name} has an SFT stage, but Task.prepare wrote no file {name}")
    wanted: dict[str, Any] = {
        "seed": seed,
        "epochs": epochs,
        "max_positions": config.max_positions,
        "data": {name: sha256_of_file(files[name]) for name in ("sft_train", "sft_test")},
    }
    sizes = {name: value for name, value in asdict(config).items() if name in SIZES and name != "max_positions"}
    if sizes != {name: value for name, value in asdict(StartModelConfig()).items() if name in sizes}:
        wanted["sizes"] = sizes
    wanted |= demonstrated(task, pq.read_table(files["sft_train"]).to_pylist(), seed)
    if model.exists():
        return _describe(model, wanted, "reused", console)
    model.parent.mkdir(parents=True, exist_ok=True)
    logs.mkdir(parents=True, exist_ok=True)
    # Beside the model, so that it appears by a rename.
    work = Path(tempfile.mkdtemp(dir=model.parent, prefix=f".{model.name}.")).resolve()
    try:
        parameters = save_untrained_model(work / "untrained", seed=seed, config=config)
        loss, steps = run_sft(task, work, files, seed=seed, logs=logs, console=console)
        trained = work / "checkpoints" / f"global_step_{steps}" / "huggingface"
        results = {"parameters": parameters, "steps": steps, "held_out_loss": loss}
        manifest = {"request": wanted, "results": results}
        atomic_write(trained / SFT_MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
        trained.rename(model)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return _describe(model, wanted, "trained", console)


def start_texts(task: Task, rows: Sequence[Row], seed: int) -> pa.Table:
    """Return the rows of the SFT stage: every row once with its solution, and once with a guess.

    The model learns two ways to answer, and takes either half of the time. Reinforcement learning has to find out that
    the solution pays.

    Each text is one turn of the assistant, so that the loss covers prompt and answer: a model that is not pretrained
    has to learn to read the prompts too. The chat template adds nothing between turns, so the tokens are those of a
    prompt and its answer.

    Args:
        task: The task.
        rows: Rows of its ``sft_train`` file.
        seed: Seed of the guesses.

    Returns:
        Column ``messages``: two rows for each of ``rows``, in their order, the solution first.
    """
    import pyarrow as pa

    rng = random.Random(seed)
    shown = [task.demonstrate(row, rng) for row in rows]
    texts = [
        {"messages": [{"role": "assistant", "content": one.prompt + answer}]}
        for one in shown
        for answer in (one.solution, one.guess)
    ]
    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    return pa.Table.from_pylist(texts, schema=pa.schema([("messages", pa.list_(turn))]))


def _describe(model: Path, wanted: Mapping[str, Any], state: str, console: Console) -> Mapping[str, Any]:
    try:
        manifest = json.loads((model / SFT_MANIFEST).read_bytes())
        there, results = manifest["request"], manifest["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileExistsError(f"{model} exists but is not a start model ({error}); remove it") from error
    if there != wanted:
        raise FileExistsError(f"{model} holds a different start model (found {there}, requested {wanted}); remove it")
    note(
        console,
        "model",
        f"{results['parameters']:,} parameters, {results['steps']} steps of verl's SFT trainer on reasoned and guessed "
        f"answers, held-out loss {results['held_out_loss']:.2f} nats per token ({state})",
    )
    found: Mapping[str, Any] = results
    return found


def run_sft(
    task: Task, work: Path, files: Mapping[str, Path], *, seed: int, logs: Path, console: Console
) -> tuple[float, int]:
    """Run verl's SFT trainer on the model in ``work/untrained``.

    Returns:
        The last held-out loss in nats per token, and the number of steps.

    Raises:
        TrainingError: It failed.
    """
    import pyarrow.parquet as pq

    form = laptop_form(task)
    assert form.sft_config_name is not None
    texts = work / "sft_train.parquet"
    rows = start_texts(task, pq.read_table(files["sft_train"]).to_pylist(), seed)
    pq.write_table(rows, texts)
    overrides = [
        f"model.path={work / 'untrained'}",
        f"data.train_files={texts}",
        f"data.val_files={files['sft_test'].resolve()}",
        f"trainer.total_epochs={form.sft_epochs}",
        f"trainer.default_local_dir={work / 'checkpoints'}",
        "trainer.resume_mode=disable",
        f"hydra.run.dir={work / 'hydra'}",
    ]
    command = ["-m", "verl.trainer.sft_trainer", f"--config-name={form.sft_config_name}", *overrides]
    log, metrics = logs / "sft.log", MetricsFile(logs / "sft_metrics.jsonl")
    environment = {**ENVIRONMENT, **ONE_RANK, **LOG_ENVIRONMENT, "VERL_FILE_LOGGER_PATH": str(metrics.path.resolve())}
    for left in (log, metrics.path):
        left.unlink(missing_ok=True)
    shown = " ".join([f"{name}={value}" for name, value in {**ENVIRONMENT, **ONE_RANK}.items()] + [python_for_shell()])
    (logs / "sft_command.sh").write_text(f"{shown} {shlex.join(command)}\n", encoding="utf-8")
    note(console, "", f"verl's SFT trainer runs first; log: {log}")
    composed, finding = compose(form.sft_config_name, [])
    if composed is None:
        raise TrainingError(f"{finding.found}: {finding.remedy}")
    total = form.sft_epochs * (len(rows) // composed.data.train_batch_size)
    losses: dict[int, float] = {}
    advice = "Run the same command again to train the start model again."
    with (
        stage_bars(console, transient=True) as show,
        Trainer([sys.executable, *command], environment, log=log, record=logs / "processes.json") as trainer,
    ):

        def look() -> bool:
            new = metrics.new_rows()
            for step, values in new:
                if "val/loss" in values:
                    losses[step] = values["val/loss"]
                show("supervised fine-tuning", step, total)
            return bool(new)

        try:
            status = trainer.follow(look, stall=STALL)
        except StalledError as error:
            raise failure(log, f"The SFT trainer was stopped: {error}.", advice) from error
    if status != 0:
        raise failure(log, f"Supervised fine-tuning: {why(status)}", advice)
    if not losses:
        raise failure(log, "The SFT trainer ended without an evaluation.", advice)
    last = max(losses)
    return losses[last], last
