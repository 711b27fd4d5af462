"""Rollouts as trainers write them: which column is what, and the rows of one step after another.

DuckDB reads the files: it parses JSON lines and parquet in parallel, keeps what does not fit into memory in a file, and
sorts there, so that ten million rows need no more memory than the largest step. Texts are not kept: of a prompt its
hash, of a response its length.
"""

from __future__ import annotations

import re
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hpo_plugin.console import Progress

if TYPE_CHECKING:
    import duckdb

__all__ = ["BadRow", "Columns", "PreviewError", "Rollouts", "StepRows", "open_rollouts"]

#: Names by which a column is recognized, the first one there wins. verl's dumps: input, output, score, step, uid, acc
#: (``_dump_generations`` in verl/trainer/ppo); TRL's: prompt, completion, step (``log_completions``).
STEP_NAMES = ("step", "global_step")
GROUP_NAMES = ("uid", "group", "group_id", "prompt_id", "input", "prompt", "problem", "question")
RESPONSE_NAMES = ("output", "response", "completion")
REWARD_NAMES = ("score", "reward", "rewards")
LENGTH_NAMES = ("response_length", "completion_length", "num_tokens", "length")
#: Of TRL's table, what is no reward.
_NO_REWARDS = {"step", "prompt", "completion", "advantage", *GROUP_NAMES, *LENGTH_NAMES, "filename", "acc"}
#: Lines of a JSON file that are looked at to find its columns.
_LOOKED_AT = 200
#: Rows that are fetched at once.
BATCH = 1 << 18
#: Bad rows that are listed.
LISTED = 20
#: Characters that are shown of a bad row.
SHOWN = 80

#: Whether a line is a JSON object; DuckDB does not stop at the first false part of an AND.
_IS_OBJECT = "CASE WHEN json_valid(line) THEN json_type(line) = 'OBJECT' ELSE false END"

#: ``{uid}_{rollout}_{output}``, the key under which verl's V1 trainer dumps a row.
_V1_KEY = r"_\d+_\d+$"


class PreviewError(ValueError):
    """Rollouts that cannot be read; the message names the file or column and what to do."""


@dataclass(frozen=True)
class Columns:
    """Which column of the rollouts is what.

    Attributes:
        group: Responses with an equal value in a step are a group.
        rewards: Their sum is the reward.
        response: The text; None if there are lengths only.
        length: The length in tokens; None: of the text.
        step: None: the number in the file's name, or one step for all rows.
        acc: Success, where the rows have it beside a shaped reward.
    """

    group: str
    rewards: tuple[str, ...]
    response: str | None
    length: str | None
    step: str | None
    acc: str | None


@dataclass(frozen=True)
class BadRow:
    """A row that was left out.

    Attributes:
        file: Its file.
        reason: What is wrong.
        excerpt: Its beginning.
    """

    file: str
    reason: str
    excerpt: str


@dataclass(frozen=True)
class StepRows:
    """The rows of one step.

    Attributes:
        step: Its number.
        groups: (N,) int64, a group's number from 0.
        rewards: (N,) float64.
        lengths: (N,) float64, in the unit of :attr:`Rollouts.unit`.
        acc: (N,) float64; NaN where the row has none.
    """

    step: int
    groups: npt.NDArray[np.int64]
    rewards: npt.NDArray[np.float64]
    lengths: npt.NDArray[np.float64]
    acc: npt.NDArray[np.float64]


@dataclass
class Rollouts:
    """Rollouts, read and sorted.

    Attributes:
        columns: Which column is what.
        rows: Rows that are used.
        unit: Of lengths: ``tokens`` or ``characters``.
        bad: How many rows were left out, by reason.
        listed: The first of them.
    """

    columns: Columns
    rows: int
    unit: str
    bad: dict[str, int]
    listed: list[BadRow]
    _connection: duckdb.DuckDBPyConnection = field(repr=False)

    def steps(self) -> Iterator[StepRows]:
        """Each step's rows, in the order of the steps."""
        query = "SELECT step, grp, reward, length, acc FROM every WHERE reason IS NULL ORDER BY step"
        reader = self._connection.sql(query).to_arrow_reader(BATCH)
        left: dict[str, npt.NDArray[Any]] | None = None
        for batch in reader:
            rows = {name: batch[name].to_numpy(zero_copy_only=False) for name in batch.schema.names}
            if left is not None:
                rows = {name: np.concatenate([left[name], rows[name]]) for name in rows}
            (starts,) = np.nonzero(np.diff(rows["step"]))
            ends = starts + 1
            for first, end in zip([0, *ends[:-1]], ends, strict=True) if len(ends) else ():
                yield _step({name: values[first:end] for name, values in rows.items()})
            left = {name: values[ends[-1] if len(ends) else 0 :] for name, values in rows.items()}
        if left is not None and len(left["step"]):
            yield _step(left)


def _step(rows: dict[str, npt.NDArray[Any]]) -> StepRows:
    groups = np.unique(rows["grp"], return_inverse=True)[1].astype(np.int64)
    return StepRows(
        step=int(rows["step"][0]),
        groups=groups,
        rewards=rows["reward"].astype(np.float64),
        lengths=rows["length"].astype(np.float64),
        acc=rows["acc"].astype(np.float64),
    )


@contextmanager
def open_rollouts(
    paths: Sequence[Path],
    *,
    rewards: Sequence[str] = (),
    group: str | None = None,
    length: str | None = None,
    tokenizer: str | None = None,
    progress: Progress | None = None,
) -> Iterator[Rollouts]:
    """Read rollouts into a temporary database.

    Args:
        paths: Files (``.jsonl``, ``.parquet``), or directories that hold them.
        rewards: Columns whose sum is the reward; by default a column that is known by its name.
        group: The column that tells the prompt.
        length: The column of lengths in tokens.
        tokenizer: A model's name or folder; responses are measured in its tokens.
        progress: Receives the stage, the work done and the total.

    Yields:
        The rollouts, which can be read until the context ends.

    Raises:
        PreviewError: No rows, a column that is not there, or several that might be meant.
    """
    import duckdb

    files = _files(paths)
    with tempfile.TemporaryDirectory(prefix="hpo-preview-") as folder:
        connection = duckdb.connect(str(Path(folder) / "rollouts.duckdb"))
        try:
            connection.execute(f"SET temp_directory = '{folder}'")
            columns = _columns(connection, files, rewards, group, length, with_text=tokenizer is not None)
            if tokenizer is not None:
                _count_tokens(connection, tokenizer)
            try:
                _run(connection, _load(files, columns, tokens=tokenizer is not None), progress)
            except duckdb.Error as error:
                raise PreviewError(f"the rollouts cannot be read: {str(error).splitlines()[0]}") from error
            yield _loaded(connection, columns, tokenizer)
        finally:
            connection.close()


def _loaded(connection: duckdb.DuckDBPyConnection, columns: Columns, tokenizer: str | None) -> Rollouts:
    bad = dict(
        connection.execute(
            "SELECT reason, count(*) FROM every WHERE reason IS NOT NULL GROUP BY reason ORDER BY reason"
        ).fetchall()
    )
    listed = connection.execute(
        f"SELECT filename, reason, excerpt FROM every WHERE reason IS NOT NULL LIMIT {LISTED}"
    ).fetchall()
    (rows,) = connection.execute("SELECT count(*) FROM every WHERE reason IS NULL").fetchall()[0]
    if not rows:
        why = "; ".join(f"{reason}: {count:,}" for reason, count in bad.items()) or "the files are empty"
        raise PreviewError(f"no row can be used: {why}")
    unit = "characters" if tokenizer is None and columns.length is None else "tokens"
    return Rollouts(columns, rows, unit, bad, [BadRow(*row) for row in listed], connection)


def _files(paths: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise PreviewError(f"{path} does not exist")
        if path.is_dir():
            inside = sorted(file for suffix in ("jsonl", "parquet") for file in path.rglob(f"*.{suffix}"))
            if not inside:
                raise PreviewError(f"{path} holds no .jsonl and no .parquet file")
            found += inside
        elif path.suffix in (".jsonl", ".parquet"):
            found.append(path)
        else:
            raise PreviewError(f"{path} is neither a .jsonl nor a .parquet file nor a directory")
    if len({file.suffix for file in found}) > 1:
        raise PreviewError("the rollouts are .jsonl and .parquet files: give those of one run")
    return found


def _source(files: Sequence[Path]) -> str:
    """A table function of DuckDB: the lines of JSON files, or the columns of parquet files."""
    names = ", ".join("'" + str(file).replace("'", "''") + "'" for file in files)
    if files[0].suffix == ".parquet":
        return f"read_parquet([{names}], union_by_name = true, filename = true)"
    return (
        f"read_csv([{names}], columns = {{'line': 'VARCHAR'}}, delim = '\x01', quote = '', escape = '', "
        "header = false, auto_detect = false, filename = true, max_line_size = 500000000)"
    )


def _columns(
    connection: duckdb.DuckDBPyConnection,
    files: Sequence[Path],
    rewards: Sequence[str],
    group: str | None,
    length: str | None,
    *,
    with_text: bool,
) -> Columns:
    import duckdb

    source = _source(files[:1])
    query = f"SELECT column_name FROM (DESCRIBE SELECT * FROM {source})"
    if files[0].suffix == ".jsonl":
        objects = f"SELECT line FROM {source} WHERE {_IS_OBJECT} LIMIT {_LOOKED_AT}"
        query = f"SELECT DISTINCT unnest(json_keys(line)) AS name FROM ({objects}) ORDER BY name"
    try:
        there = [name for (name,) in connection.execute(query).fetchall()]
    except duckdb.Error as error:
        raise PreviewError(f"{files[0]} cannot be read: {str(error).splitlines()[0]}") from error
    if not there:
        raise PreviewError(f"{files[0]} has no row that is a JSON object")

    def pick(given: str | None, known: Sequence[str]) -> str | None:
        if given is not None:
            if given not in there:
                raise PreviewError(f"{files[0]} has no column {given!r}: it has {', '.join(there)}")
            return given
        return next((name for name in known if name in there), None)

    names = tuple(name for name in (pick(reward, ()) for reward in rewards) if name is not None)
    if not names:
        known = pick(None, REWARD_NAMES)
        others = [name for name in there if name not in _NO_REWARDS]
        if known is None and "completion" in there and len(others) == 1:
            known = others[0]
        if known is None:
            raise PreviewError(
                f"which column of {files[0]} is the reward? It has {', '.join(there)}: give --reward NAME, more than "
                "once for a sum"
            )
        names = (known,)
    group = pick(group, GROUP_NAMES)
    if group is None:
        raise PreviewError(f"which column of {files[0]} tells the prompt? It has {', '.join(there)}: give --group NAME")
    response, found_length = pick(None, RESPONSE_NAMES), pick(length, LENGTH_NAMES)
    if with_text and response is None:
        raise PreviewError(f"--tokenizer needs the responses, and {files[0]} has no column {', '.join(RESPONSE_NAMES)}")
    if response is None and found_length is None:
        raise PreviewError(
            f"{files[0]} has neither a response ({', '.join(RESPONSE_NAMES)}) nor its length "
            f"({', '.join(LENGTH_NAMES)}): give --length NAME"
        )
    return Columns(
        group=group,
        rewards=names,
        response=response,
        length=None if with_text else found_length,
        step=pick(None, STEP_NAMES),
        acc=pick(None, ("acc",)),
    )


def _load(files: Sequence[Path], columns: Columns, *, tokens: bool) -> str:
    """The statement that fills the table ``every``: a row's numbers, or why it is left out."""
    is_json = files[0].suffix == ".jsonl"
    names = [name for name in (columns.step, columns.group, columns.response, columns.length, columns.acc) if name]
    names = list(dict.fromkeys([*names, *columns.rewards]))
    # Texts of the columns, a line of JSON parsed once.
    if is_json:
        paths = ", ".join("'$.\"" + name.replace("'", "''").replace('"', '\\"') + "\"'" for name in names)
        texts = f"json_extract_string(CASE WHEN is_object THEN line ELSE '{{}}' END, [{paths}])"
        source = (
            f"(SELECT line, filename, {_IS_OBJECT} AS is_object FROM {_source(files)} "
            "WHERE trim(coalesce(line, '')) <> '')"
        )
    else:
        texts = "[" + ", ".join(f'CAST("{_quoted(name)}" AS VARCHAR)' for name in names) + "]"
        source = f"(SELECT *, true AS is_object FROM {_source(files)})"

    def text(name: str) -> str:
        return f"texts[{names.index(name) + 1}]"

    def number(name: str) -> str:
        # Success may be a boolean.
        found = text(name)
        return f"CASE lower({found}) WHEN 'true' THEN 1 WHEN 'false' THEN 0 ELSE TRY_CAST({found} AS DOUBLE) END"

    if columns.step is not None:
        step = number(columns.step)
    elif all(re.search(r"\d", file.stem) for file in files):
        step = r"CAST(regexp_extract(filename, '(\d+)[^/\\\d]*$', 1) AS DOUBLE)"
    else:
        step = "0.0"
    group = text(columns.group)
    if columns.group == "uid":
        group = f"regexp_replace({group}, '{_V1_KEY}', '')"
    response = "''" if columns.response is None else f"coalesce({text(columns.response)}, '')"
    excerpt = "line" if is_json else f"coalesce({group}, '') || ' ' || {response}"
    measured = f"{'tokens' if tokens else 'length'}({response})"
    return f"""
        CREATE TABLE every AS SELECT * EXCLUDE excerpt, CASE
            WHEN NOT is_object THEN 'not a JSON object'
            WHEN step IS NULL THEN 'no step'
            WHEN grp IS NULL THEN 'no {columns.group}'
            WHEN reward IS NULL OR NOT isfinite(reward) THEN 'the reward is missing or not finite'
            WHEN length IS NULL OR NOT isfinite(length) OR length < 0 THEN 'the length is missing or not a number'
            END AS reason, CASE WHEN reason IS NOT NULL THEN excerpt END AS excerpt
        FROM (
            SELECT is_object, CAST({step} AS BIGINT) AS step,
                CASE WHEN {group} IS NOT NULL THEN hash({group}) END AS grp,
                {" + ".join(number(name) for name in columns.rewards)} AS reward,
                CAST({number(columns.length) if columns.length is not None else measured} AS DOUBLE) AS length,
                CAST({number(columns.acc) if columns.acc is not None else "NULL"} AS DOUBLE) AS acc,
                filename, left({excerpt}, {SHOWN}) AS excerpt
            FROM (
                SELECT is_object, filename, {texts} AS texts{", line" if is_json else ""}
                FROM {source}
            )
        )
    """


def _quoted(name: str) -> str:
    return name.replace('"', '""')


def _count_tokens(connection: duckdb.DuckDBPyConnection, tokenizer: str) -> None:
    """Give DuckDB a function ``tokens``."""
    import pyarrow as pa
    from duckdb.sqltypes import BIGINT, VARCHAR
    from transformers import AutoTokenizer

    try:
        encode = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        raise PreviewError(f"--tokenizer {tokenizer}: {' '.join(str(error).split())}") from error

    # DuckDB evaluates the annotations, in this module's names.
    def tokens(texts: Any) -> Any:
        found = encode(texts.to_pylist(), add_special_tokens=False)["input_ids"]
        return pa.array([len(ids) for ids in found], type=pa.int64())

    connection.create_function("tokens", tokens, [VARCHAR], BIGINT, type="arrow")


def _run(connection: duckdb.DuckDBPyConnection, statement: str, progress: Progress | None) -> None:
    """Execute a statement in a thread, and report how far it is."""
    errors: list[Exception] = []

    def execute() -> None:
        try:
            connection.execute(statement)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=execute)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
        if progress is not None:
            # -1 before it is known.
            progress("reading, %", max(0, round(connection.query_progress())), 100)
    if progress is not None:
        progress("reading, %", 100, 100)
    if errors:
        raise errors[0]
