"""Data files and a start model for a laptop run, of any task with a laptop form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo_plugin.console import note, stage_bars
from hpo_plugin.quickstart.form import Inputs
from hpo_plugin.tasks.task import DataOptions, Task, laptop_form

if TYPE_CHECKING:
    from rich.console import Console

    from hpo_plugin.quickstart.start_model import StartModelConfig


def make_inputs(
    task: Task,
    options: DataOptions,
    data: Path,
    model: Path,
    *,
    config: StartModelConfig,
    seed: int,
    logs: Path,
    console: Console,
) -> Inputs:
    """Make data files and a start model in two directories, or find them there.

    Args:
        task: The task; it has a laptop form.
        options: Options of the data (:func:`data_options`).
        data: Directory of the data files.
        model: Directory of the start model.
        config: Config of the start model (:func:`start_model_config`).
        seed: Seed of the start model.
        logs: Directory for the log of verl's SFT trainer, where the form has such a stage.
        console: The console to show progress on.

    Raises:
        TrainingError: The SFT trainer failed.
        ValueError: The data or the model cannot be made.
        OSError: A directory cannot be written, or holds something else.
    """
    form = laptop_form(task)
    with stage_bars(console, transient=True) as progress:
        made = task.prepare(data, options, progress=progress)
    state = "written" if made.publication.written else "reused"
    sizes = [_count(made.files[split]) for split in ("train", "test")]
    note(console, "data", f"{task.title}: {sizes[0]:,} training problems, {sizes[1]:,} held-out problems ({state})")
    if form.sft_config_name is None:
        start = _build(task, made.files, model, config, seed, console)
    else:
        from hpo_plugin.quickstart.sft import fine_tune

        start = fine_tune(task, made.files, model, config=config, seed=seed, logs=logs, console=console)
    return Inputs(made.files["train"], made.files["test"], model, start)


def _build(
    task: Task, files: Mapping[str, Path], model: Path, config: StartModelConfig, seed: int, console: Console
) -> Mapping[str, Any]:
    import pyarrow.parquet as pq

    from hpo_plugin.quickstart.start_model import build_start_model

    train, test = (pq.read_table(files[split]).to_pylist() for split in ("train", "test"))
    with stage_bars(console, transient=True) as progress:
        report = build_start_model(model, task, train, test, seed=seed, config=config, progress=progress)
    made = "reused" if report.reused else f"built in {report.seconds:.0f} s"
    note(
        console,
        "model",
        f"{report.parameters:,} parameters, {100 * report.sampled.correct:.1f} % of its samples are correct ({made})",
    )
    return report.results


def _count(file: Path) -> int:
    import pyarrow.parquet as pq

    rows: int = pq.read_metadata(file).num_rows
    return rows
