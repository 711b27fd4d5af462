"""The tasks of the quickstart: what each needs before training, its data and a model to start from."""

from __future__ import annotations

import json
import random
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from hpo_plugin.cli._checks import compose
from hpo_plugin.cli._progress import stage_bars
from hpo_plugin.cli._runs import Request, Run
from hpo_plugin.cli._trainer import StalledError, Trainer
from hpo_plugin.cli._training import LOG_ENVIRONMENT, TrainingError, failure, python_for_shell, why
from hpo_plugin.cli._verl_log import MetricsFile
from hpo_plugin.tasks._files import atomic_write, sha256_of_file

if TYPE_CHECKING:
    import pyarrow as pa

    from hpo_plugin.cpu.start_model import StartModelConfig
    from hpo_plugin.tasks.countdown import CountdownConfig

#: What a trainer's environment needs. verl reads it in every process; Ray hands it on.
ENVIRONMENT = {"VERL_PLATFORM": "cpu"}

#: Countdown: three numbers up to 12, within reach of a model of 200,000 parameters.
MAX_NUMBER = 12
#: Training problems: 80 batches of 32; there are 3,289 such problems in all.
COUNTDOWN_TRAIN_SIZE = 2_560

#: TeleLogs: cases to train on, in both stages.
TELELOGS_TRAIN_SIZE = 4_000
#: Passes of the SFT stage over them, 1,000 steps each.
SFT_EPOCHS = 2
#: Tokens of a prompt and a response together; a reduced case has some 300.
TELELOGS_MAX_POSITIONS = 512
SFT_CONFIG_NAME = "telelogs_sft_cpu"
SFT_MANIFEST_NAME = "sft.json"
#: What torchrun would set for one process; without it there is one log, with the cause of a failure at its end.
ONE_RANK = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    # Any free port.
    "MASTER_PORT": "0",
    # Sums split over threads round differently: one thread makes a seed's model the same on machines of any size.
    "OMP_NUM_THREADS": "1",
}
#: Seconds without a step after which the SFT stage is given up.
SFT_STALL = 600.0


@dataclass(frozen=True)
class Inputs:
    """What training needs.

    Attributes:
        train_file: ``data.train_files``.
        test_file: ``data.val_files``.
        model: ``actor_rollout_ref.model.path``.
    """

    train_file: Path
    test_file: Path
    model: Path


@dataclass(frozen=True)
class LaptopTask:
    """A task of the quickstart.

    Attributes:
        title: For people to read.
        steps: Training steps, where the user names none.
        prepare: Makes the inputs of a request in a run, below an output directory, or finds them from an earlier call.
    """

    title: str
    steps: int
    prepare: Callable[[Run, Request, Path, Console], Inputs]


def note(console: Console, label: str, text: str) -> None:
    """Print one line of the quickstart's preamble."""
    line = Text(f"{label:<9}", style="dim")
    console.print(line.append(text, style="default"))


def _state(written: bool) -> str:
    return "written" if written else "already there"


# --- Countdown -----------------------------------------------------------------------------------------------------


def prepare_countdown_run(run: Run, request: Request, output: Path, console: Console) -> Inputs:
    """Make the data and the start model, or find them from an earlier call.

    Args:
        run: Not used: nothing here is a process of its own.
        request: Its seed and ``n_test`` decide them.
        output: They go to ``data/`` and ``models/`` in it.
        console: Where to show progress.

    Raises:
        ValueError: The request cannot be met.
        OSError: The directory cannot be written, or holds something else.
    """
    from hpo_plugin.tasks.countdown import CountdownConfig

    key = f"countdown-seed{request.seed}-test{request.n_test}"
    return make_countdown_inputs(
        output / "data" / key,
        output / "models" / key,
        config=CountdownConfig(counts=(3,), max_number=MAX_NUMBER, seed=request.seed),
        train_size=COUNTDOWN_TRAIN_SIZE,
        test_size=request.n_test,
        seed=request.seed,
        console=console,
    )


def make_countdown_inputs(
    data: Path,
    model: Path,
    *,
    config: CountdownConfig,
    train_size: int,
    test_size: int,
    seed: int,
    console: Console,
    start_model: StartModelConfig | None = None,
) -> Inputs:
    """Make problems and a start model in two directories, or find them there.

    Args:
        data: Directory of the problems.
        model: Directory of the start model.
        config: The problems.
        train_size: Problems to train on.
        test_size: Held-out problems.
        seed: Of the start model.
        console: Where to show progress.
        start_model: The default is the quickstart's.

    Raises:
        ValueError: The problems or the model cannot be made.
        OSError: A directory cannot be written, or holds something else.
    """
    from hpo_plugin.cpu.start_model import build_start_model
    from hpo_plugin.tasks.countdown import generate_splits, prepare_countdown

    with stage_bars(console, transient=True) as progress:
        written = prepare_countdown(
            data, config=config, layout="terse", train_size=train_size, test_size=test_size, progress=progress
        )
    numbers = " or ".join(map(str, config.counts))
    note(
        console,
        "data",
        f"{numbers} numbers up to {config.max_number}: {train_size:,} problems to train on, {test_size} held out "
        f"({_state(bool(written.publication.written))})",
    )
    with stage_bars(console, transient=True) as progress:
        train, test = generate_splits(config, train_size, test_size)
        report = build_start_model(model, train, test, seed=seed, config=start_model, progress=progress)
    made = "already there" if report.reused else f"built in {report.seconds:.0f} s"
    note(
        console,
        "model",
        f"{report.parameters:,} parameters, {100 * report.sampled.correct:.1f} % of its samples are correct ({made})",
    )
    return Inputs(written.train_file, written.test_file, report.directory)


# --- TeleLogs ------------------------------------------------------------------------------------------------------


def prepare_telelogs_run(run: Run, request: Request, output: Path, console: Console) -> Inputs:
    """Make the data, and with verl's SFT trainer the start model, or find them from an earlier call.

    Args:
        run: Takes the SFT trainer's log.
        request: Its seed and ``n_test`` decide them.
        output: They go to ``data/`` and ``models/`` in it.
        console: Where to show progress.

    Raises:
        TrainingError: The SFT trainer failed.
        ValueError: The request cannot be met.
        OSError: The directory cannot be written, or holds something else.
    """
    from hpo_plugin.tasks.telelogs import prepare_telelogs

    key = f"telelogs-seed{request.seed}-test{request.n_test}"
    with stage_bars(console, transient=True) as progress:
        data = prepare_telelogs(
            output / "data" / key,
            reduction="laptop",
            train_size=TELELOGS_TRAIN_SIZE,
            test_size=request.n_test,
            seed=request.seed,
            sft=True,
            progress=progress,
        )
    note(
        console,
        "data",
        f"5 root causes, reduced cases: {TELELOGS_TRAIN_SIZE:,} to train on, {request.n_test} held out "
        f"({_state(bool(data.publication.written))})",
    )
    model = output / "models" / key
    _fine_tune(model, data.files, request.seed, run, console)
    return Inputs(data.files["train"], data.files["test"], model)


def _fine_tune(model: Path, files: Mapping[str, Path], seed: int, run: Run, console: Console) -> None:
    """Train a start model with verl's SFT trainer on the oracle's chains of thought, unless it is there."""
    from hpo_plugin.cpu.start_model import StartModelConfig, save_untrained_model

    wanted: dict[str, Any] = {
        "seed": seed,
        "epochs": SFT_EPOCHS,
        "max_positions": TELELOGS_MAX_POSITIONS,
        "data": {name: sha256_of_file(files[name]) for name in ("sft_train", "sft_test")},
    }
    if model.exists():
        note(console, "model", _describe(model, wanted, "already there"))
        return
    model.parent.mkdir(parents=True, exist_ok=True)
    # Beside the model, so that it appears by a rename, complete or not at all.
    work = Path(tempfile.mkdtemp(dir=model.parent, prefix=f".{model.name}.")).resolve()
    try:
        config = StartModelConfig(max_positions=TELELOGS_MAX_POSITIONS)
        parameters = save_untrained_model(work / "untrained", seed=seed, config=config)
        loss, steps = _run_sft(work, files, seed, run, console)
        trained = work / "checkpoints" / f"global_step_{steps}" / "huggingface"
        results = {"parameters": parameters, "steps": steps, "held_out_loss": loss}
        manifest = {"request": wanted, "results": results}
        atomic_write(trained / SFT_MANIFEST_NAME, (json.dumps(manifest, indent=2) + "\n").encode())
        trained.rename(model)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    note(console, "model", _describe(model, wanted, "trained now"))


def start_texts(demonstrations: pa.Table, seed: int) -> pa.Table:
    """Make the rows of the SFT stage: every case once with its chain of thought, and once with a guess.

    The model learns two ways to answer, of which it takes either half of the time: to reason, and to guess a label at
    once. What reinforcement learning has to find out is that reasoning pays.

    Each row is one turn of the assistant, so that the loss is over prompt and answer: a model that is not pretrained
    has to learn to read the tables too. The chat template adds nothing between turns, so the tokens are those of a
    prompt and its answer.

    Args:
        demonstrations: ``messages`` of ``sft_train.parquet``, in the terse wording.
        seed: Of the guesses.

    Returns:
        Two rows for each of ``demonstrations``, in their order, the reasoned one first.
    """
    import pyarrow as pa

    rng = random.Random(seed)
    texts = []
    for row in demonstrations.select(["messages"]).to_pylist():
        prompt, reasoned = (turn["content"] for turn in row["messages"])
        # The first line of the terse wording holds the labels.
        guessed = rf"\boxed{{{rng.choice(prompt.partition(chr(10))[0].split(' '))}}}"
        texts += [{"messages": [{"role": "assistant", "content": prompt + answer}]} for answer in (reasoned, guessed)]
    return pa.Table.from_pylist(texts, schema=demonstrations.select(["messages"]).schema)


def _describe(model: Path, wanted: Mapping[str, Any], state: str) -> str:
    try:
        manifest = json.loads((model / SFT_MANIFEST_NAME).read_bytes())
        there, results = manifest["request"], manifest["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileExistsError(f"{model} is there and is not a start model ({error}); remove it") from error
    if there != wanted:
        raise FileExistsError(f"{model} holds another start model ({there}, {wanted} asked for); remove it")
    return (
        f"{results['parameters']:,} parameters, {results['steps']} steps of verl's SFT trainer on reasoned and guessed "
        f"answers, held-out loss {results['held_out_loss']:.2f} nats a token ({state})"
    )


def _run_sft(work: Path, files: Mapping[str, Path], seed: int, run: Run, console: Console) -> tuple[float, int]:
    """Run verl's SFT trainer; return the last held-out loss and the number of steps."""
    import pyarrow.parquet as pq

    texts = work / "sft_train.parquet"
    rows = start_texts(pq.read_table(files["sft_train"]), seed)
    pq.write_table(rows, texts)
    overrides = [
        f"model.path={work / 'untrained'}",
        f"data.train_files={texts}",
        f"data.val_files={files['sft_test'].resolve()}",
        f"trainer.total_epochs={SFT_EPOCHS}",
        f"trainer.default_local_dir={work / 'checkpoints'}",
        "trainer.resume_mode=disable",
        f"hydra.run.dir={work / 'hydra'}",
    ]
    command = ["-m", "verl.trainer.sft_trainer", f"--config-name={SFT_CONFIG_NAME}", *overrides]
    log, metrics = run.directory / "sft.log", MetricsFile(run.directory / "sft_metrics.jsonl")
    environment = {**ENVIRONMENT, **ONE_RANK, **LOG_ENVIRONMENT, "VERL_FILE_LOGGER_PATH": str(metrics.path.resolve())}
    for left in (log, metrics.path):
        left.unlink(missing_ok=True)
    shown = " ".join([f"{name}={value}" for name, value in {**ENVIRONMENT, **ONE_RANK}.items()] + [python_for_shell()])
    (run.directory / "sft_command.sh").write_text(f"{shown} {shlex.join(command)}\n", encoding="utf-8")
    note(console, "", f"verl's SFT trainer runs first; log: {log}")
    config, finding = compose(SFT_CONFIG_NAME, [])
    if config is None:
        raise TrainingError(finding.found)
    total = SFT_EPOCHS * (len(rows) // config.data.train_batch_size)
    losses: dict[int, float] = {}
    advice = "The same command trains it again."
    with (
        stage_bars(console, transient=True) as show,
        Trainer([sys.executable, *command], environment, log=log, record=run.processes) as trainer,
    ):

        def look() -> bool:
            new = metrics.new_rows()
            for step, values in new:
                if "val/loss" in values:
                    losses[step] = values["val/loss"]
                show("supervised fine-tuning", step, total)
            return bool(new)

        try:
            status = trainer.follow(look, stall=SFT_STALL)
        except StalledError as error:
            raise failure(log, f"The SFT trainer was ended: {error}.", advice) from error
    if status != 0:
        raise failure(log, f"SFT: {why(status)}", advice)
    if not losses:
        raise failure(log, "The SFT trainer ended without an evaluation.", advice)
    last = max(losses)
    return losses[last], last


#: Name -> task, as ``--task`` takes it.
LAPTOP_TASKS: Mapping[str, LaptopTask] = {
    "countdown": LaptopTask("Countdown", 60, prepare_countdown_run),
    "telelogs": LaptopTask("TeleLogs", 40, prepare_telelogs_run),
}
