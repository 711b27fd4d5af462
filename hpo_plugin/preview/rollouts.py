"""Reads the rollouts that trainers write: finds the columns, and yields the rows of each step.

DuckDB reads the files: it parses JSON lines and parquet in parallel, and sorts on disk what exceeds its memory
limit. It keeps no text: only the hash of a prompt and the length of a response.
"""

from __future__ import annotations

import itertools
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

from hpo_plugin.algorithm import REWARD_LIMIT
from hpo_plugin.console import Progress

if TYPE_CHECKING:
    import duckdb

__all__ = ["BadRow", "Columns", "PreviewError", "Rollouts", "StepRows", "open_rollouts"]

#: Names by which a column is recognized; the first one that is there is taken. verl's dumps: input, output, score,
#: step, uid, acc (``_write_generations`` in verl/trainer/ppo); TRL's: prompt, completion, step (``log_completions``).
STEP_NAMES = ("step", "global_step")
GROUP_NAMES = ("uid", "group", "group_id", "prompt_id", "input", "prompt", "problem", "question")
RESPONSE_NAMES = ("output", "response", "completion")
REWARD_NAMES = ("score", "reward", "rewards")
LENGTH_NAMES = ("response_length", "completion_length", "num_tokens", "length")
#: Columns of TRL's table that are no reward.
_NO_REWARDS = {"step", "prompt", "completion", "advantage", "acc", *GROUP_NAMES, *LENGTH_NAMES}
#: Files, and lines of each, that are looked at to find the columns of JSON lines.
_LOOKED_AT = (20, 200)
#: Rows that are fetched at once.
BATCH = 1 << 18
#: Memory of DuckDB; beyond it, it works in files.
MEMORY = "2GB"
#: Bad rows that are listed, and characters that are shown of each.
LISTED, SHOWN = 20, 80
#: A name for the column with a row's file; none of the user's columns has it.
_FILE = "__hpo_file"
#: ``{uid}_{rollout}_{output}``: the key under which verl's V1 trainer dumps a row.
_V1_KEY = r"^(.*)_(\d+)_(\d+)$"


class PreviewError(ValueError):
    """Rollouts that cannot be read; the message names the file or column and what to do."""


@dataclass(frozen=True)
class Columns:
    """The columns of the rollouts by their role.

    Attributes:
        group: Responses with an equal value in a step are a group.
        rewards: Columns and weights; the weighted sum is the reward.
        response: A text, or a list of messages; None if there are lengths only.
        length: The length in tokens; None: of the text.
        step: None: the number in the file's name, or one step for all rows.
        acc: Success, where the rows have it beside a shaped reward.
    """

    group: str
    rewards: tuple[tuple[str, float], ...]
    response: str | None
    length: str | None
    step: str | None
    acc: str | None

    def __str__(self) -> str:
        rewards = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in self.rewards)
        length = self.length or f"of {self.response}"
        step = self.step or "from the file names, else one step for all rows"
        return f"group {self.group}, reward {rewards}, length {length}, step {step}" + (", acc" if self.acc else "")


@dataclass(frozen=True)
class BadRow:
    """A row that was skipped.

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
    """The responses of one step.

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
    """Rollouts, read and ready to be sorted.

    Attributes:
        columns: Which column is what.
        rows: Responses that are used.
        unit: Of lengths: ``tokens`` or ``characters``.
        bad: Number of skipped rows, by reason.
        listed: The first of them.
    """

    columns: Columns
    rows: int
    unit: str
    bad: dict[str, int]
    listed: list[BadRow]
    _connection: duckdb.DuckDBPyConnection = field(repr=False)

    def steps(self) -> Iterator[StepRows]:
        """Each step's responses, in the order of the steps.

        Raises:
            PreviewError: DuckDB has too little disk space to sort them.
        """
        import duckdb

        try:
            query = "SELECT step, grp, reward, length, acc FROM responses ORDER BY step"
            reader = self._connection.sql(query).to_arrow_reader(BATCH)
            left: dict[str, npt.NDArray[Any]] | None = None
            for batch in reader:
                rows = {name: batch[name].to_numpy(zero_copy_only=False) for name in batch.schema.names}
                if left is not None:
                    rows = {name: np.concatenate([left[name], rows[name]]) for name in rows}
                (starts,) = np.nonzero(np.diff(rows["step"]))
                bounds = [0, *(starts + 1)]
                for first, end in itertools.pairwise(bounds):
                    yield _step({name: values[first:end] for name, values in rows.items()})
                left = {name: values[bounds[-1] :] for name, values in rows.items()}
        except duckdb.Error as error:
            raise _unreadable(error) from error
        if left is not None and len(left["step"]):
            yield _step(left)


def _step(rows: dict[str, npt.NDArray[Any]]) -> StepRows:
    return StepRows(
        step=int(rows["step"][0]),
        groups=np.unique(rows["grp"], return_inverse=True)[1].astype(np.int64),
        rewards=rows["reward"].astype(np.float64),
        lengths=rows["length"].astype(np.float64),
        acc=rows["acc"].astype(np.float64),
    )


def _unreadable(error: Exception) -> PreviewError:
    # DuckDB's message can contain a whole value of the file.
    return PreviewError(f"the rollouts cannot be read: {str(error).splitlines()[0][:500]}")


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
    """Read rollouts into a temporary database, in the folder that ``TMPDIR`` names.

    Args:
        paths: Files (``.jsonl``, ``.parquet``), or directories that hold them.
        rewards: Columns whose sum is the reward, each ``NAME`` or ``NAME=WEIGHT``; by default one that is known by its
            name. In a sum, a missing value counts as 0, unless all are missing.
        group: The column that identifies the prompt.
        length: The column of lengths in tokens.
        tokenizer: A model's name or folder; responses are measured in its tokens.
        progress: Receives the stage, the work done and the total.

    Yields:
        The rollouts, which can be read until the context ends.

    Raises:
        PreviewError: There are no rows, or a column is missing or ambiguous.
    """
    import duckdb

    files = _files(paths)
    with tempfile.TemporaryDirectory(prefix="hpo-preview-") as folder:
        connection = duckdb.connect(str(Path(folder) / "rollouts.duckdb"))
        try:
            connection.execute(f"SET temp_directory = {_text(folder)}; SET memory_limit = '{MEMORY}'")
            columns = _columns(connection, files, rewards, group, length, with_text=tokenizer is not None)
            if tokenizer is not None:
                _count_tokens(connection, tokenizer)
            for macro in _MACROS:
                connection.execute(macro)
            try:
                _run(connection, _create_table(files, columns, tokens=tokenizer is not None), progress)
                found = _open_table(connection, columns, files, tokenizer)
            except duckdb.Error as error:
                raise _unreadable(error) from error
            yield found
        finally:
            connection.close()


def _files(paths: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise PreviewError(f"{path} does not exist")
        if path.is_dir():
            inside = [file for file in sorted(path.iterdir()) if file.suffix in (".jsonl", ".parquet")]
            if not inside:
                below = sorted({str(file.parent) for kind in ("jsonl", "parquet") for file in path.rglob(f"*.{kind}")})
                hint = f"; pass a subdirectory that does: {', '.join(below[:5])}" if below else ""
                raise PreviewError(f"{path} contains no .jsonl or .parquet file{hint}")
            found += inside
        elif path.suffix in (".jsonl", ".parquet"):
            found.append(path)
        else:
            raise PreviewError(f"{path} is not a .jsonl file, a .parquet file or a directory")
    if len({file.suffix for file in found}) > 1:
        raise PreviewError("the rollouts mix .jsonl and .parquet files; pass the files of one run")
    return list({file.resolve(): file for file in found}.values())


# --- SQL ------------------------------------------------------------------------------------------------------------


def _text(value: str) -> str:
    """A string of SQL."""
    return "'" + value.replace("'", "''") + "'"


def _name(value: str) -> str:
    """A column's name in SQL."""
    return '"' + value.replace('"', '""') + '"'


#: Of a JSON value: its text, the text of a response, which may be a list of messages, and its number.
_MACROS = (
    "CREATE MACRO plain(v) AS CASE WHEN json_type(v) <> 'NULL' THEN json_extract_string(v, '$') END",
    "CREATE MACRO said(v) AS CASE WHEN json_type(v) = 'ARRAY' "
    "THEN array_to_string(json_extract_string(v, '$[*].content'), '') ELSE plain(v) END",
    # Success may be a boolean.
    "CREATE MACRO number(v) AS CASE json_type(v) WHEN 'BOOLEAN' THEN CAST(plain(v) = 'true' AS DOUBLE) "
    "ELSE TRY_CAST(plain(v) AS DOUBLE) END",
)
#: Whether a line is a JSON object; DuckDB does not stop at the first false part of an AND.
_IS_OBJECT = "CASE WHEN json_valid(line) THEN json_type(line) = 'OBJECT' ELSE false END"


def _source(files: Sequence[Path], *, count_rejects: bool = False) -> str:
    """A table function of DuckDB: the lines of JSON files, or the columns of parquet files.

    Args:
        files: All of one kind.
        count_rejects: Whether lines that are not text enter the table ``reject_errors``.
    """
    names = ", ".join(_text(str(file)) for file in files)
    if files[0].suffix == ".parquet":
        return f"read_parquet([{names}], union_by_name = true, filename = '{_FILE}')"
    # U+10FFFF is no character, so texts do not contain it. The strict mode rejects files with several kinds of line
    # breaks.
    return (
        f"read_csv([{names}], columns = {{'line': 'VARCHAR'}}, delim = '\U0010ffff', quote = '', escape = '', "
        f"strict_mode = false, header = false, auto_detect = false, filename = '{_FILE}', max_line_size = 500000000, "
        f"{'store_rejects' if count_rejects else 'ignore_errors'} = true)"
    )


def _names(connection: duckdb.DuckDBPyConnection, files: Sequence[Path]) -> list[str]:
    """The names of the columns: of all parquet files, or of some lines of some JSON files."""
    import duckdb

    looked_at = files
    try:
        if files[0].suffix == ".parquet":
            described = connection.execute(f"SELECT column_name FROM (DESCRIBE SELECT * FROM {_source(files)})")
            return [name for (name,) in described.fetchall() if name != _FILE]
        number, lines = _LOOKED_AT
        looked_at = [files[i] for i in np.unique(np.linspace(0, len(files) - 1, number).round().astype(int))]
        found: set[str] = set()
        for file in looked_at:
            objects = f"SELECT line FROM {_source([file])} WHERE {_IS_OBJECT} LIMIT {lines}"
            keys = connection.execute(f"SELECT DISTINCT unnest(json_keys(line)) FROM ({objects})").fetchall()
            found |= {name for (name,) in keys}
    except duckdb.Error as error:
        raise _unreadable(error) from error
    if not found:
        raise PreviewError(
            f"{looked_at[0]} has no row that is a JSON object; pass rollouts with one JSON object per line"
        )
    return sorted(found)


def _columns(
    connection: duckdb.DuckDBPyConnection,
    files: Sequence[Path],
    rewards: Sequence[str],
    group: str | None,
    length: str | None,
    *,
    with_text: bool,
) -> Columns:
    there = _names(connection, files)

    def pick(given: str | None, known: Sequence[str]) -> str | None:
        if given is not None and given not in there:
            raise PreviewError(f"{files[0]} has no column {given!r}; its columns are {', '.join(there)}")
        return given or next((name for name in known if name in there), None)

    summands: list[tuple[str, float]] = []
    for reward in rewards:
        name, separator, weight = reward.rpartition("=")
        if reward in there or not separator:
            name, weight = reward, "1"
        pick(name, ())
        try:
            summands.append((name, float(weight)))
        except ValueError as error:
            raise PreviewError(f"--reward {reward}: {weight!r} is not a number; write NAME=WEIGHT") from error
    if not summands:
        known = pick(None, REWARD_NAMES)
        others = [name for name in there if name not in _NO_REWARDS]
        if known is None and "completion" in there and len(others) == 1:
            known = others[0]
        if known is None and set(there) == {"step", "data"}:
            raise PreviewError(
                f"{files[0]} contains metrics, not rollouts. Train with trainer.rollout_data_dir=DIR, and pass DIR"
            )
        if known is None:
            raise PreviewError(
                f"no reward column found in {files[0]}; its columns are {', '.join(there)}. Pass --reward NAME, "
                "several times for a sum"
            )
        summands = [(known, 1.0)]
    found_group, found_length = pick(group, GROUP_NAMES), pick(length, LENGTH_NAMES)
    response = pick(None, RESPONSE_NAMES)
    if found_group is None:
        raise PreviewError(
            f"no column for the prompt found in {files[0]}; its columns are {', '.join(there)}. Pass --group NAME"
        )
    if with_text and response is None:
        raise PreviewError(
            f"--tokenizer needs the responses, but {files[0]} has no column {' or '.join(RESPONSE_NAMES)}; remove the "
            "option"
        )
    if response is None and found_length is None:
        raise PreviewError(
            f"{files[0]} has neither a response column ({', '.join(RESPONSE_NAMES)}) nor a length column "
            f"({', '.join(LENGTH_NAMES)}). Pass --length NAME"
        )
    return Columns(
        group=found_group,
        rewards=tuple(summands),
        response=response,
        length=None if with_text else found_length,
        step=pick(None, STEP_NAMES),
        acc=pick(None, ("acc",)),
    )


def _step_of_name(files: Sequence[Path]) -> str:
    """The step where no column has it: the number after ``step``, or the only one, in the file's name; else 0."""
    for pattern in (r"step[-_]?(\d{1,15})(?!\d)", r"^\D*(\d{1,15})\D*$"):
        if all(re.search(pattern, file.stem) for file in files):
            stems = [f"WHEN {_text(str(file))} THEN {re.search(pattern, file.stem)[1]}" for file in files]  # type: ignore[index]
            return f"CAST(CASE {_FILE} {' '.join(stems)} END AS DOUBLE)"
    return "0.0"


def _create_table(files: Sequence[Path], columns: Columns, *, tokens: bool) -> str:
    """The statement that fills the table ``every``: a row's numbers, or why it is left out."""
    names = [name for name in (columns.step, columns.group, columns.response, columns.length, columns.acc) if name]
    names = list(dict.fromkeys([*names, *(name for name, _ in columns.rewards)]))
    # The columns as JSON; a line is parsed once.
    if files[0].suffix == ".jsonl":
        paths = ", ".join(_text('$."' + name.replace('"', '\\"') + '"') for name in names)
        values = f"json_extract(CASE WHEN {_IS_OBJECT} THEN line ELSE '{{}}' END, [{paths}])"
        select = f"{_IS_OBJECT} AS is_object, line AS whole"
        source = f"{_source(files, count_rejects=True)} WHERE trim(coalesce(line, '')) <> ''"
    else:
        values = "[" + ", ".join(f"to_json({_name(name)})" for name in names) + "]"
        select, source = f"true AS is_object, CAST({_name(columns.group)} AS VARCHAR) AS whole", _source(files)

    def value(name: str) -> str:
        return f"v[{names.index(name) + 1}]"

    step = f"number({value(columns.step)})" if columns.step is not None else _step_of_name(files)
    group = f"plain({value(columns.group)})"
    summands = [(f"number({value(name)})", weight) for name, weight in columns.rewards]
    reward = " + ".join(
        f"{weight} * " + (summand if len(summands) == 1 else f"CASE WHEN isfinite({summand}) THEN {summand} ELSE 0 END")
        for summand, weight in summands
    )
    any_reward = " OR ".join(f"coalesce(isfinite({summand}), false)" for summand, _ in summands)
    said = "NULL" if columns.response is None else f"said({value(columns.response)})"
    measured = f"{'tokens' if tokens else 'length'}({said})"
    length = f"number({value(columns.length)})" if columns.length is not None else f"CAST({measured} AS DOUBLE)"
    acc = "CAST(NULL AS DOUBLE)" if columns.acc is None else f"number({value(columns.acc)})"
    return f"""
        CREATE TABLE every AS SELECT * EXCLUDE (excerpt, is_object, exact_step, any_reward), CASE
            WHEN NOT is_object THEN 'not a JSON object'
            WHEN step IS NULL OR step <> exact_step THEN 'the step is missing or not an integer'
            WHEN key IS NULL THEN {_text(f"{columns.group} is missing")}
            WHEN NOT any_reward OR abs(reward) > {REWARD_LIMIT}
                THEN 'the reward is missing, or larger than {REWARD_LIMIT:g} in magnitude'
            WHEN length IS NULL OR NOT isfinite(length) OR length < 0 THEN 'the response or its length is missing'
            END AS reason, CASE WHEN reason IS NOT NULL THEN excerpt END AS excerpt
        FROM (
            SELECT is_object, {step} AS exact_step, TRY_CAST({step} AS BIGINT) AS step,
                CASE WHEN {group} IS NOT NULL THEN hash({group}) END AS key,
                regexp_matches({group}, '{_V1_KEY}') AS of_v1,
                hash(regexp_extract({group}, '{_V1_KEY}', 1)) AS prompt,
                TRY_CAST(regexp_extract({group}, '{_V1_KEY}', 2) AS BIGINT) AS rollout,
                TRY_CAST(regexp_extract({group}, '{_V1_KEY}', 3) AS BIGINT) AS output,
                {any_reward} AS any_reward, {reward} AS reward, {length} AS length, {acc} AS acc,
                {_FILE} AS file, left(whole, {SHOWN}) AS excerpt
            FROM (SELECT {select}, {_FILE}, {values} AS v FROM {source})
        )
    """


def _open_table(
    connection: duckdb.DuckDBPyConnection, columns: Columns, files: Sequence[Path], tokenizer: str | None
) -> Rollouts:
    """Make the view ``responses``, and count."""

    def one(query: str) -> Any:
        (row,) = connection.execute(query).fetchall()
        return row

    kept = "FROM every WHERE reason IS NULL"
    # verl's V1 trainer names rows, not groups; elsewhere, rows of a group share the uid.
    of_v1 = columns.group == "uid" and one(f"SELECT coalesce(bool_and(of_v1), false) {kept}")[0]
    if of_v1:
        of_v1 = one(f"SELECT count(*) = count(DISTINCT (step, key)) {kept}")[0]
    if of_v1:
        # A session may have several outputs: the last one has the reward, as in verl.
        connection.execute(
            f"CREATE VIEW responses AS SELECT step, prompt AS grp, arg_max(reward, output) AS reward, sum(length) AS "
            f"length, arg_max(acc, output) AS acc {kept} GROUP BY step, prompt, rollout"
        )
    else:
        connection.execute(f"CREATE VIEW responses AS SELECT step, key AS grp, reward, length, acc {kept}")
    rows = one("SELECT count(*) FROM responses")[0]
    bad = dict(
        connection.execute(
            "SELECT reason, count(*) FROM every WHERE reason IS NOT NULL GROUP BY reason ORDER BY reason"
        ).fetchall()
    )
    if files[0].suffix == ".jsonl" and (rejected := one("SELECT count(*) FROM reject_errors")[0]):
        bad["not UTF-8, or longer than 500 MB"] = rejected
    if not rows:
        why = "; ".join(f"{reason}: {count:,}" for reason, count in bad.items()) or "the files are empty"
        raise PreviewError(f"no usable rows: {why}")
    listed = connection.execute(
        f"SELECT file, reason, coalesce(excerpt, '') FROM every WHERE reason IS NOT NULL LIMIT {LISTED}"
    ).fetchall()
    unit = "characters" if tokenizer is None and columns.length is None else "tokens"
    return Rollouts(columns, rows, unit, bad, [BadRow(*row) for row in listed], connection)


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
    # Not Thread.join, which marks the thread as ended when a signal interrupts it.
    ended = threading.Event()

    def execute() -> None:
        try:
            connection.execute(statement)
        except Exception as error:
            errors.append(error)
        finally:
            ended.set()

    threading.Thread(target=execute).start()
    try:
        while not ended.wait(0.2):
            if progress is not None:
                # -1 before it is known.
                progress("reading, %", max(0, round(connection.query_progress())), 100)
    except BaseException:
        connection.interrupt()
        ended.wait()
        raise
    if progress is not None:
        progress("reading, %", 100, 100)
    if errors:
        raise errors[0]
