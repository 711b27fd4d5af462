"""What a study needs before its first cell: data, start models and valid configs.

It runs in a process of its own (``hpo-plugin study prepare``), because it imports torch and verl, which a process that
follows trainings for hours should not hold.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpo_plugin.console import note
from hpo_plugin.files import sha256_of_file
from hpo_plugin.quickstart.form import start_model_config
from hpo_plugin.quickstart.inputs import make_inputs
from hpo_plugin.runs.process import end_leftovers
from hpo_plugin.runs.training import TrainingError
from hpo_plugin.study.cells import Workspace
from hpo_plugin.study.spec import SIMULATOR, Cell, Prepare, StudyError, setting_data

if TYPE_CHECKING:
    from rich.console import Console

    from hpo_plugin.check.report import Finding


def prepare_in_child(study_file: Path, output: Path, only: Sequence[str], *, check: bool) -> None:
    """Run ``hpo-plugin study prepare`` and wait for it; its output goes to standard error.

    Raises:
        StudyError: It failed; its output states the reason.
    """
    command = [sys.executable, "-m", "hpo_plugin.cli", "study", "prepare", str(study_file), f"--output={output}"]
    command += [f"--only={text}" for text in only] + ([] if check else ["--no-check"])
    done = subprocess.run(command, check=False, stdout=sys.stderr)
    if done.returncode:
        raise StudyError("preparing the study failed, as shown above; nothing was trained")


def make_study_inputs(workspace: Workspace, cells: Sequence[Cell], console: Console) -> None:
    """Make the inputs of every setting that prepares its own, or find them from an earlier call.

    Raises:
        StudyError: The declaration cannot be met, or the directory of the inputs holds something else.
    """
    for setting in dict.fromkeys(cell.setting for cell in cells):
        prepare = workspace.study.settings[setting].prepare
        if prepare is not None:
            console.print(workspace.study.settings[setting].title, style="bold", markup=False)
            try:
                _make(workspace, prepare, console)
            except (TypeError, ValueError, OSError, TrainingError) as error:
                raise StudyError(f"settings.{setting}.prepare: {error}") from error


def _make(workspace: Workspace, prepare: Prepare, console: Console) -> None:
    task, options = setting_data(prepare)
    try:
        config = start_model_config(task, prepare.start_model)
    except ValueError as error:
        raise ValueError(f"start_model: {error}") from error
    directory = workspace.inputs_directory(prepare)
    end_leftovers(directory / "processes.json")
    inputs = make_inputs(
        task,
        options,
        directory / "data",
        directory / "model",
        config=config,
        seed=prepare.seed,
        logs=directory,
        console=console,
    )
    files = {"train": inputs.train_file, "test": inputs.test_file, "model": inputs.model / "model.safetensors"}
    workspace.save_inputs(prepare, {name: sha256_of_file(path) for name, path in files.items()}, inputs.start)


def compose_cells(cells: Sequence[Cell]) -> None:
    """Compose the config of each arm in each setting, so that an unknown name fails before inputs are made.

    Raises:
        StudyError: With the cell and what Hydra says, or what the simulator does not implement.
    """
    from hpo_plugin.check.compose import compose
    from hpo_plugin.simulator.loop import check_simulated
    from hpo_plugin.verl.presets import preset_of

    for cell in {(cell.setting, cell.arm): cell for cell in reversed(cells)}.values():
        config, finding = compose(cell.config_name, cell.overrides)
        if config is None:
            raise StudyError(f"{cell.name}: {finding.found}: {finding.remedy}")
        try:
            preset_of(config)
            if cell.trainer == SIMULATOR:
                check_simulated(config)
        except ValueError as error:
            raise StudyError(f"{cell.name}: {error}") from error


def check_cells(workspace: Workspace, cells: Sequence[Cell], console: Console) -> None:
    """Check the installation once, and the config of each arm in each setting that verl's trainer trains.

    Raises:
        StudyError: A check failed; the console shows it.
    """
    from hpo_plugin.check.checks import check_config, quiet, run_checks
    from hpo_plugin.check.compose import compose

    distinct = list({(cell.setting, cell.arm): cell for cell in cells if cell.trainer != SIMULATOR}.values())
    if not distinct:
        return
    for cell in distinct:
        # Before verl is imported; the environment is the same for all cells.
        os.environ.update(cell.environment)
    with quiet(workspace.directory / "check.log", console, "checking the installation and the configs"):
        report = run_checks(distinct[0].config_name, full_overrides(workspace, distinct[0]))
        wrong: list[tuple[Cell, Finding]] = []
        for cell in distinct[1:]:
            config, composing = compose(cell.config_name, full_overrides(workspace, cell))
            findings = [composing] if config is None else check_config(config)
            wrong += [(cell, finding) for finding in findings if not finding.ok]
    if not report.ok:
        report.show(console)
    for cell, finding in wrong:
        console.print(f"FAIL  {cell.name}: {finding.name}: {finding.found}", markup=False, soft_wrap=True)
        console.print(f"      to do: {finding.remedy}", markup=False, soft_wrap=True)
    if wrong or not report.ok:
        raise StudyError("the checks failed; see the remedy below each failed check")
    note(console, "check", f"{len(distinct)} configs passed, one for each arm in each setting ({report.seconds:.0f} s)")


def full_overrides(workspace: Workspace, cell: Cell) -> list[str]:
    """All overrides of a cell, with the paths of its inputs."""
    made = workspace.inputs(cell.setting)
    return [*cell.overrides, *(made.inputs.overrides() if made else [])]
