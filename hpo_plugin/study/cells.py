"""The cells of a study on disk: their run directories and their progress."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

import hpo_plugin
from hpo_plugin.quickstart.form import Inputs
from hpo_plugin.runs.directory import Run, write_json
from hpo_plugin.runs.verl_log import Metrics, StepView
from hpo_plugin.study.spec import Cell, Prepare, Study, StudyError


class State(str, Enum):
    """State of a cell, in the order in which a cell passes through them."""

    WAITING = "waiting"
    SUBMITTED = "submitted"
    INTERRUPTED = "interrupted"
    RUNNING = "running"
    FAILED = "failed"
    FINISHED = "finished"
    COLLECTED = "collected"

    @property
    def done(self) -> bool:
        """Whether nothing is left to run."""
        return self in (State.FINISHED, State.COLLECTED)


@dataclass(frozen=True)
class SettingInputs:
    """Inputs of a setting that the study has made.

    Attributes:
        inputs: Where they are.
        digests: SHA-256 of the training data, the held-out data and the model's weights.
    """

    inputs: Inputs
    digests: Mapping[str, str]


class Workspace:
    """Everything of one study below the output directory: inputs, and a run directory per cell."""

    def __init__(self, study: Study, output: Path) -> None:
        """Set the paths; this reads and writes nothing.

        Args:
            study: The study.
            output: Where studies are.
        """
        self.study = study
        self.directory = output / study.name

    def inputs_directory(self, prepare: Prepare) -> Path:
        """Where inputs are made."""
        return self.directory / "inputs" / prepare.name

    def save_inputs(self, prepare: Prepare, digests: Mapping[str, str], start: Mapping[str, Any]) -> None:
        """Record the inputs of a setting after they were made."""
        directory = self.inputs_directory(prepare)
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "inputs.json", {"digests": dict(digests), "start": dict(start)})

    def inputs(self, setting: str) -> SettingInputs | None:
        """The inputs of a setting; None if its overrides name them.

        Raises:
            StudyError: They have not been made.
        """
        prepare = self.study.settings[setting].prepare
        if prepare is None:
            return None
        directory = self.inputs_directory(prepare)
        try:
            noted = json.loads((directory / "inputs.json").read_bytes())
        except FileNotFoundError:
            raise StudyError(
                f"{directory / 'inputs.json'} does not exist; run `hpo-plugin study prepare` to make the inputs"
            ) from None
        data = directory / "data"
        where = Inputs(data / "train.parquet", data / "test.parquet", directory / "model", noted["start"])
        return SettingInputs(where, noted["digests"])

    def run(self, cell: Cell) -> Run:
        """The run directory of a cell. It is found by the cell's key, so that a setting or an arm can be renamed."""
        named = self._cells / f"{cell.setting}-{cell.arm}-seed{cell.seed}-{cell.key}"
        return Run(self._existing.get(cell.key, named))

    @property
    def _cells(self) -> Path:
        return self.directory / "cells"

    @cached_property
    def _existing(self) -> Mapping[str, Path]:
        """The run directories that existed at the first call, by key. Later ones have the names of this study."""
        paths = sorted(self._cells.iterdir(), reverse=True) if self._cells.exists() else []
        return {path.name.rpartition("-")[2]: path for path in paths}

    def start(self, cell: Cell) -> tuple[Run, SettingInputs | None]:
        """Make the run directory of a cell, or find it.

        Returns:
            The directory and the cell's inputs.

        Raises:
            StudyError: It started from other inputs.
        """
        run, made = self.run(cell), self.inputs(cell.setting)
        digests = None if made is None else dict(made.digests)
        there = run.request()
        if there is None:
            run.directory.mkdir(parents=True, exist_ok=True)
            request = {"cell": cell.request(), "inputs": digests, "hpo_plugin": hpo_plugin.__version__}
            write_json(run.directory / "request.json", request)
        elif there["inputs"] != digests:
            raise StudyError(
                f"{cell.name} started from other inputs ({_digests(there['inputs'])}; now {_digests(digests)}); "
                f"restore them, or remove {run.directory}"
            )
        return run, made


def _digests(digests: Mapping[str, str] | None) -> str:
    return ", ".join(f"{name} {digest[:8]}" for name, digest in (digests or {}).items()) or "none"


@dataclass(frozen=True)
class CellStatus:
    """Status of a cell at one moment.

    Attributes:
        cell: The cell.
        run: Its directory, which need not exist.
        state: How far it is.
    """

    cell: Cell
    run: Run
    state: State

    @cached_property
    def last(self) -> tuple[int, Metrics] | None:
        """The last step that is logged in the run directory."""
        rows = self.run.rows()
        return max(rows.items(), key=lambda row: row[0]) if rows else None

    @property
    def step(self) -> int:
        """Steps done."""
        if self.state.done:
            return self.cell.steps
        return self.last[0] if self.last else 0

    @property
    def view(self) -> StepView | None:
        """The last training step."""
        return StepView.of(*self.last) if self.last and self.last[0] else None


def status(workspace: Workspace, cell: Cell, collected: Collection[str]) -> CellStatus:
    """Return the status of a cell.

    Args:
        workspace: Where its run is.
        cell: The cell.
        collected: Keys of the cells whose data are collected.
    """
    run = workspace.run(cell)
    return CellStatus(cell, run, _state(run, cell, collected))


def _state(run: Run, cell: Cell, collected: Collection[str]) -> State:
    if run.finished:
        return State.FINISHED
    if cell.key in collected:
        return State.COLLECTED
    if run.busy():
        return State.RUNNING
    if run.failure is not None:
        return State.FAILED
    if run.attempts():
        return State.INTERRUPTED
    return State.SUBMITTED if submitted_file(run).exists() else State.WAITING


def submitted_file(run: Run) -> Path:
    """Return the file with the command that submitted the cell to a cluster."""
    return run.directory / "submitted.sh"
