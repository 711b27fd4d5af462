"""The collected data of a study: one parquet file, a row per cell and step.

Columns: ``key``, ``setting``, ``arm``, ``seed``, ``info`` (JSON, the same in all rows of a cell: its request, inputs,
machine, versions, times), ``step``, and :data:`METRICS` under verl's names. Values are kept in single precision.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from hpo_plugin.files import atomic_write
from hpo_plugin.study.spec import Cell, StudyError

#: Not verl's name, which contains the name of the data: ``val-core/<data source>/…``.
HELD_OUT = "held_out_success"
REWARD = "critic/rewards/mean"
LENGTH = "response_length/mean"
SHORTEST = "response_length/min"
LONGEST = "response_length/max"
ALPHA = "actor/hpo/alpha"
SHARE_POSITIVE = "actor/hpo/share_positive"
SHARE_NEGATIVE = "actor/hpo/share_negative"
STEP_SECONDS = "timing_s/step"
#: What is kept of each step.
METRICS = (
    HELD_OUT,
    REWARD,
    LENGTH,
    SHORTEST,
    LONGEST,
    "response_length/clip_ratio",
    ALPHA,
    SHARE_POSITIVE,
    SHARE_NEGATIVE,
    "actor/hpo/share_degenerate_groups",
    "actor/entropy",
    "actor/grad_norm",
    "actor/ppo_kl",
    "actor/pg_clipfrac",
    "perf/total_num_tokens",
    STEP_SECONDS,
    "timing_s/gen",
    "timing_s/update_actor",
    "timing_s/testing",
)

#: The columns with a text, which is the same in all rows of a cell.
TEXTS = ("key", "setting", "arm", "info")

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class CellData:
    """Data of one finished cell.

    Attributes:
        key: Its identity, :attr:`hpo_plugin.study.spec.Cell.key`.
        setting: Name of the setting when it was collected.
        arm: Name of the arm when it was collected.
        seed: ``data.seed``.
        info: Its request, inputs, machine, versions and times, as JSON values.
        values: Metric -> one value per step, from step 0, the evaluation before training; NaN where nothing was logged.
    """

    key: str
    setting: str
    arm: str
    seed: int
    info: Mapping[str, Any]
    values: Mapping[str, Floats]

    @classmethod
    def of(cls, cell: Cell, rows: Mapping[int, Mapping[str, float]], info: Mapping[str, Any]) -> CellData:
        """Build the data of a cell from its log.

        Args:
            cell: The cell.
            rows: Step -> metrics; those of :data:`METRICS` that are absent are unknown.
            info: See :attr:`info`.

        Raises:
            StudyError: A step is missing, or there are more than the cell has.
        """
        wrong = set(range(cell.steps + 1)) ^ set(rows)
        if wrong:
            step = min(wrong)
            what = "is not logged" if step <= cell.steps else f"is logged, but the cell has {cell.steps} steps"
            raise StudyError(f"{cell.name}: step {step} {what}")
        values = {
            name: np.array([rows[step].get(name, np.nan) for step in range(cell.steps + 1)], np.float32)
            for name in METRICS
        }
        return cls(cell.key, cell.setting, cell.arm, cell.seed, info, values)

    @property
    def seconds(self) -> npt.NDArray[np.float64]:
        """Training time up to and with each step from 0, evaluations not included, in seconds."""
        return np.nancumsum(self.values[STEP_SECONDS].astype(np.float64))

    def same_as(self, other: CellData) -> bool:
        """Whether all values are those of another."""
        return all(np.array_equal(self.values[name], other.values[name], equal_nan=True) for name in METRICS)


def read_data(path: Path) -> dict[str, CellData]:
    """Return the cells of a file by their keys; a file that does not exist has none.

    Metrics that the file does not have are NaN.

    Raises:
        StudyError: It is not a file of :func:`write_data`.
    """
    if not path.exists():
        return {}
    try:
        # A text is in memory once for each cell, not once for each row.
        table = pq.read_table(path, read_dictionary=TEXTS).unify_dictionaries()
        steps = table["step"].to_numpy()
        begins = np.flatnonzero(steps == 0)
        keys = np.concatenate([chunk.indices.to_numpy() for chunk in table["key"].chunks] or [begins])
        texts = {name: table[name].take(begins).to_pylist() for name in (*TEXTS, "seed")}
        unknown = np.full(len(steps), np.nan, np.float32)
        # A file of an earlier version lacks metrics that were added since.
        columns = {name: table[name].to_numpy() if name in table.column_names else unknown for name in METRICS}
    except (pa.ArrowException, KeyError, OSError) as error:
        raise StudyError(f"{path} does not hold collected data: {error}") from error
    cells: dict[str, CellData] = {}
    # A cell's rows stand together, from step 0.
    for number, (begin, end) in enumerate(zip(begins, [*begins[1:], len(steps)], strict=True)):
        if (steps[begin:end] != np.arange(end - begin)).any() or (keys[begin:end] != keys[begin]).any():
            raise StudyError(f"{path}: rows {begin} to {end} are not the consecutive steps of one cell")
        key, setting, arm, info, seed = (texts[name][number] for name in (*TEXTS, "seed"))
        if key in cells:
            raise StudyError(f"{path}: the cell {key} appears twice")
        values = {name: np.asarray(column[begin:end], np.float32) for name, column in columns.items()}
        cells[key] = CellData(key, setting, arm, seed, json.loads(info), values)
    return cells


def write_data(path: Path, cells: Iterable[CellData]) -> None:
    """Write cells; the same cells give the same bytes under one version of pyarrow.

    Args:
        path: The file; replaced at once or not at all.
        cells: In any order.
    """
    ordered = sorted(cells, key=lambda data: (data.setting, data.arm, data.seed, data.key))
    lengths = [len(data.values[REWARD]) for data in ordered]
    rows = np.repeat(np.arange(len(ordered)), lengths)

    def texts(values: Sequence[str]) -> pa.Array:
        # A text is in memory once for each cell, not once for each row.
        encoded = pa.array(values, pa.string()).dictionary_encode()
        return pa.DictionaryArray.from_arrays(encoded.indices.take(pa.array(rows)), encoded.dictionary)

    table = pa.table(
        {
            "key": texts([data.key for data in ordered]),
            "setting": texts([data.setting for data in ordered]),
            "arm": texts([data.arm for data in ordered]),
            "seed": pa.array(np.array([data.seed for data in ordered], np.int64)[rows]),
            "info": texts([json.dumps(data.info, sort_keys=True) for data in ordered]),
            "step": pa.array([step for length in lengths for step in range(length)], pa.int32()),
            **{name: pa.array(_joined([data.values[name] for data in ordered]), pa.float32()) for name in METRICS},
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=19,
        use_dictionary=list(TEXTS),
        # By default, texts beyond 1 MB are written once for each row.
        dictionary_pagesize_limit=1 << 30,
        # The columns are texts for every reader, not Arrow's dictionaries.
        store_schema=False,
        use_byte_stream_split=list(METRICS),
        write_statistics=False,
    )
    atomic_write(path, sink.getvalue().to_pybytes())


def _joined(arrays: Sequence[Floats]) -> Floats:
    return np.concatenate(arrays) if arrays else np.empty(0, np.float32)


def check_inputs(cells: Iterable[CellData], against: Mapping[str, str]) -> None:
    """Check that cells that are compared with each other started from the same data and the same start model.

    Cells are compared seed by seed. A start model made on another machine differs in the last bits, so a study that is
    finished on another machine has one start model for some seeds and another one for the rest.

    Args:
        cells: The cells of a study.
        against: Setting -> the setting that it is compared with; other cells are compared within their setting.

    Raises:
        StudyError: Two cells with the same seed, of one setting or of two that are compared, started from different
            inputs.
    """
    first: dict[tuple[str, int], CellData] = {}
    for data in cells:
        other = first.setdefault((against.get(data.setting, data.setting), data.seed), data)
        if data.info["inputs"] != other.info["inputs"]:
            raise StudyError(
                f"{data.setting}/{data.arm}/seed{data.seed} and {other.setting}/{other.arm}/seed{other.seed} started "
                f"from different inputs ({data.info['inputs']}, {other.info['inputs']}), so they cannot be compared"
            )
