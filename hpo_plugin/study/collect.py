"""From the run directories of finished cells to the collected data of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpo_plugin.runs.verl_log import held_out_success
from hpo_plugin.study.cells import Workspace
from hpo_plugin.study.data import HELD_OUT, CellData, check_inputs, read_data, write_data
from hpo_plugin.study.spec import Cell, StudyError


@dataclass(frozen=True)
class Collected:
    """Result of :func:`collect`, as names of cells.

    Attributes:
        added: New in the file.
        replaced: In the file with other values before.
        kept: In the file before, and not to be read again or just the same.
        missing: Not finished.
        foreign: Cells in the file that are not of the study.
    """

    added: Sequence[str]
    replaced: Sequence[str]
    kept: Sequence[str]
    missing: Sequence[str]
    foreign: int


def read_cell(workspace: Workspace, cell: Cell) -> CellData | None:
    """Return the data of a finished cell from its run directory; None if it is not finished there.

    Raises:
        StudyError: A step is missing.
        LogError: A log that verl did not write.
    """
    run = workspace.run(cell)
    request = run.request()
    if not run.finished or request is None:
        return None
    rows = {}
    for step, metrics in run.rows().items():
        success = held_out_success(metrics)
        rows[step] = {**metrics, **({HELD_OUT: success} if success is not None else {})}
    made = workspace.inputs(cell.setting)
    info = {
        **request,
        "start": None if made is None else dict(made.inputs.start),
        "attempts": len(run.attempts()),
        "result": run.result(),
    }
    return CellData.of(cell, rows, info)


def collect(workspace: Workspace, path: Path, *, prune: bool) -> Collected:
    """Write the data of all finished cells. Cells in the file stay, even if their run directory is gone.

    Args:
        workspace: Where the runs are.
        path: The parquet file.
        prune: Leave out cells that are not of the study.

    Raises:
        StudyError: Cells cannot be compared, or the file holds something else.
    """
    before = read_data(path)
    cells = workspace.study.cells()
    found = {cell.key: data for cell in cells if (data := read_cell(workspace, cell)) is not None}
    merged = {**before, **found}
    check_inputs((merged[cell.key] for cell in cells if cell.key in merged), workspace.study.against)
    foreign = set(before) - {cell.key for cell in cells}
    write_data(path, [data for key, data in merged.items() if not (prune and key in foreign)])

    def names(chosen: Mapping[str, CellData], *, changed: bool | None = None) -> list[str]:
        return [
            cell.name
            for cell in cells
            if cell.key in chosen and (changed is None or chosen[cell.key].same_as(before[cell.key]) is not changed)
        ]

    again = {key: found.get(key, data) for key, data in before.items()}
    return Collected(
        added=names({key: data for key, data in found.items() if key not in before}),
        replaced=names(again, changed=True),
        kept=names(again, changed=False),
        missing=[cell.name for cell in cells if cell.key not in merged],
        foreign=len(foreign),
    )


def check_same_inputs(workspace: Workspace, collected: Mapping[str, CellData], chosen: Sequence[Cell]) -> None:
    """Check that the cells to run start from the same inputs as the collected cells that they are compared with.

    Args:
        workspace: Where the inputs are.
        collected: The collected data, by key.
        chosen: The cells to run.

    Raises:
        StudyError: A cell to run starts from other data or another start model.
    """
    against = workspace.study.against

    def pair(cell: Cell) -> tuple[str, int]:
        return against.get(cell.setting, cell.setting), cell.seed

    running = {pair(cell) for cell in chosen if cell.key not in collected}
    for cell in workspace.study.cells():
        if cell.key not in collected or pair(cell) not in running:
            continue
        made = workspace.inputs(cell.setting)
        if made is not None and collected[cell.key].info["inputs"] != dict(made.digests):
            raise StudyError(
                f"settings.{cell.setting}: the data or the start model made here ({dict(made.digests)}) differ from "
                f"those of the collected cell {cell.name} ({collected[cell.key].info['inputs']}). Runs with the same "
                "seed must start from the same inputs; collect into a new file with --data"
            )
