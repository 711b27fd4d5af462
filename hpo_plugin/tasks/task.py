"""The task protocol: what the commands, the quickstart and studies require from a task.

A task is one subclass of :class:`Task`, and one instance of it named ``TASK`` in a module. :func:`load_task` finds the
tasks of this package by name and any other task by the path of its file. ``docs/tasks.md`` writes one from scratch.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import random
import sys
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import hpo_plugin
from hpo_plugin.console import Progress
from hpo_plugin.files import Publication, check_output, publish

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.console import RenderableType

#: Names of the tasks of this package.
TASK_NAMES = ("countdown", "telelogs")
#: The columns of a row that verl's ``RLHFDataset`` and reward managers read.
ROW_COLUMNS = ("data_source", "prompt", "reward_model", "extra_info")
#: What :meth:`Task.judge` returns for a correct response, and for one that is not an answer at all.
CORRECT, MALFORMED = "correct", "malformed"

#: A row in verl's format: ``prompt`` (chat messages), ``data_source``, ``reward_model.ground_truth``, ``extra_info``.
Row = dict[str, Any]


class TaskError(ValueError):
    """The name or file is not a task; the message states what is expected."""


def option(help_text: str, default: Any = None, *, flag: str = "", minimum: int | None = None) -> Any:
    """Return a field of a task's options.

    Args:
        help_text: Help on the command line.
        default: Default value.
        flag: The option on the command line, where it is not the field's name: ``--numbers``.
        minimum: Smallest value of an integer.
    """
    return field(default=default, metadata={"help": help_text, "flag": flag, "minimum": minimum})


@dataclass(frozen=True)
class DataOptions:
    """Options of :meth:`Task.prepare`; a task adds its own in a subclass, each made by :func:`option`.

    Attributes:
        train_size: Rows of the training split; None for the task's default.
        test_size: Rows of the test split; None for the task's default.
        seed: Seed of the data; None for the task's default.
    """

    train_size: int | None = option("Rows in the training split.", minimum=1)
    test_size: int | None = option("Rows in the test split.", minimum=1)
    seed: int | None = option("Seed of the data. Default 0.", minimum=0)


@dataclass(frozen=True)
class DataSet:
    """Data files on disk.

    Attributes:
        files: Name to path: ``train`` and ``test``, and others where they were requested.
        manifest: Content of ``manifest.json`` without the digests of the files.
        publication: Which files were written and which existed before.
    """

    files: Mapping[str, Path]
    manifest: Mapping[str, Any]
    publication: Publication


@dataclass(frozen=True)
class Demonstration:
    """Two ways to answer one prompt. The start model learns both; reinforcement learning has to find the better one.

    Attributes:
        prompt: Text of the prompt, as the model reads it.
        solution: The answer that is usually correct. It begins with :attr:`LaptopForm.solution_prefix`.
        guess: A well-formed answer that is rarely correct. It does not begin with that prefix.
        decisions: Further places in ``guess`` at which the model decides between solving and guessing, for a task whose
            answers contain several attempts: offset in characters, and what a guess begins with there.
    """

    prompt: str
    solution: str
    guess: str
    decisions: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class LaptopForm:
    """How a model of some 200,000 parameters learns the task on CPU cores.

    Attributes:
        config_name: Hydra config of verl's trainer.
        steps: Default number of training steps.
        data: Fields of the task's options that a model of this size needs, in the quickstart and in studies.
        quickstart: Further fields of the options in the quickstart: its size and difficulty.
        overrides: Hydra overrides of ``config_name``.
        start_model: Fields of :class:`hpo_plugin.quickstart.start_model.StartModelConfig`.
        response_tokens: Largest number of tokens (bytes) of a response in the measured success of the start model.
        solution_prefix: What every solution of a demonstration begins with, and no guess. Not used with an SFT stage.
        sft_config_name: Hydra config of verl's SFT trainer, which then trains the start model; None trains it with
            :func:`hpo_plugin.quickstart.start_model.build_start_model`.
            It needs the data files ``sft_train``, whose rows are then demonstrated, and ``sft_test``.
        sft_epochs: Passes of the SFT trainer over the demonstrations.
    """

    config_name: str
    steps: int
    data: Mapping[str, Any] = field(default_factory=dict)
    quickstart: Mapping[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    start_model: Mapping[str, Any] = field(default_factory=dict)
    response_tokens: int = 32
    solution_prefix: str = "="
    sft_config_name: str | None = None
    sft_epochs: int = 1


@dataclass(frozen=True)
class Explanation:
    """What is known about the answer to a row.

    Attributes:
        answer: The answer; None if there is none.
        summary: One line about it.
        text: The derivation in full.
        evidence: Lines that support the answer.
        table: A table of what was considered, for the terminal.
    """

    answer: str | None
    summary: str
    text: str = ""
    evidence: Sequence[str] = ()
    table: RenderableType | None = None


class Task(ABC):
    """A task. Subclasses set the class attributes and implement the abstract methods.

    Attributes:
        name: Name on the command line and in directory names.
        title: Name for people.
        Options: Dataclass of the options of the data.
        laptop: The form for CPU cores; None if there is none.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    Options: ClassVar[type[DataOptions]] = DataOptions
    laptop: ClassVar[LaptopForm | None] = None

    # --- required ---

    @abstractmethod
    def prepare(
        self, directory: Path, options: Any, *, force: bool = False, progress: Progress | None = None
    ) -> DataSet:
        """Write the data files with :func:`write_data_set`; files that are identical stay as they are.

        Args:
            directory: Where the files go; created if needed.
            options: An instance of :attr:`Options`.
            force: Whether to replace other data in the directory.
            progress: Receives a stage's name, the work done and the total.

        Returns:
            The files.

        Raises:
            ValueError: An option is invalid or has no effect.
            OSError: The source cannot be read, or the directory cannot be written or holds other data.
        """

    @abstractmethod
    def score(self, row: Row, response: str) -> Mapping[str, Any]:
        """Score a response as the reward of a training run does.

        Args:
            row: The row.
            response: Decoded response without the prompt.

        Returns:
            At least ``score``; ``pred``, the answer, lets responses vote (maj@k).
        """

    # --- what has a default ---

    def validate(self, options: Any) -> None:  # noqa: B027
        """Check the options of the data without making any.

        Args:
            options: An instance of :attr:`Options`.

        Raises:
            ValueError: An option is invalid; the message names it.
        """

    def judge(self, row: Row, response: str) -> str:
        """Return :data:`CORRECT`, :data:`MALFORMED`, or another word for a wrong answer."""
        return CORRECT if self.score(row, response)["score"] == 1 else "wrong"

    def demonstrate(self, row: Row, rng: random.Random) -> Demonstration:
        """Return a solution and a guess for a row; required for a laptop form.

        Args:
            row: A row of the training split; with an SFT stage, of the file ``sft_train``.
            rng: The only source of randomness.
        """
        raise NotImplementedError(
            f"the task {self.name} does not implement demonstrate(), which a laptop form requires"
        )

    def key(self, row: Row) -> Any:
        """Return a JSON value for what a row shows; rows with equal keys have equal demonstrations."""
        return [prompt_text(row), row["reward_model"]["ground_truth"]]

    def identity(self, row: Row) -> Any:
        """Return a JSON value that is equal for rows with the same problem; no two splits share a value."""
        return self.key(row)

    def explain(self, row: Row) -> Explanation:
        """Explain the answer to a row.

        Raises:
            ValueError: The row cannot be read.
        """
        answer = ground_truth_of(row)
        return Explanation(str(answer), f"The answer in the data is {answer}.")

    def read_row(self, columns: Mapping[str, Any]) -> Row:
        """Return a row in verl's format from a row of a source that this task reads.

        Args:
            columns: Column to value; names are lower-case.

        Raises:
            ValueError: The columns are not those of a row.
        """
        missing = [name for name in ("prompt", "reward_model") if columns.get(name) is None]
        if missing:
            raise ValueError(f"the column {missing[0]!r} is missing; found: {', '.join(columns) or 'no columns'}")
        check_prompt(columns["prompt"])
        if not isinstance(columns["reward_model"], Mapping):
            raise ValueError(f"the column 'reward_model' must hold a mapping, got {columns['reward_model']!r:.200}")
        return dict(columns)

    def group(self, ground_truth: Any) -> str | None:
        """Return the group of a row in the table of ``hpo-plugin score``; None for no table."""
        return None

    def metrics(self, prompts: Sequence[tuple[Any, Sequence[Mapping[str, Any]]]]) -> Mapping[str, float]:
        """Compute metrics of a validation.

        Args:
            prompts: Ground truth and scored samples of each prompt; a sample holds ``score``, and ``acc`` and ``pred``
                where the reward returns them.

        Returns:
            ``pass@1``, the mean over prompts of the share of correct samples, and where samples have a ``pred``
            ``maj@k``, the share of prompts whose most frequent answer is correct; the first of several counts.

        Raises:
            ValueError: The prompts have different numbers of samples.
        """
        sizes = sorted({len(samples) for _, samples in prompts})
        if len(sizes) != 1:
            raise ValueError(f"every prompt must have the same number of samples; found {sizes}")
        shares, votes = [], []
        for _, samples in prompts:
            shares.append(sum(is_correct(sample) for sample in samples) / len(samples))
            counts = Counter(str(sample["pred"]) for sample in samples if sample.get("pred"))
            most = max(counts, key=counts.__getitem__, default=None)
            votes.append(any(is_correct(sample) for sample in samples if str(sample.get("pred")) == most))
        found = {"pass@1": sum(shares) / len(shares)}
        if all("pred" in sample for _, samples in prompts for sample in samples):
            found[f"maj@{sizes[0]}"] = sum(votes) / len(votes)
        return found

    def lesson(self, rows: Sequence[Row], seed: int) -> Iterator[Demonstration]:
        """Yield demonstrations without end; every epoch shows each row once, in a new order.

        Args:
            rows: Training rows.
            seed: Seed of the order and of :meth:`demonstrate`.
        """
        rng = random.Random(seed)
        while True:
            order = list(range(len(rows)))
            rng.shuffle(order)
            while order:
                yield self.demonstrate(rows[order.pop()], rng)


def is_correct(sample: Mapping[str, Any]) -> bool:
    """Return whether a scored sample is correct: ``acc`` where the reward returns it, else ``score``."""
    return float(sample["acc"] if sample.get("acc") is not None else sample["score"]) == 1


def ground_truth_of(row: Row) -> Any:
    """Return the ground truth of a row.

    Raises:
        ValueError: The row has none, because it was read from a prompt alone.
    """
    truth = row["reward_model"].get("ground_truth")
    if truth is None:
        raise ValueError(
            "the row has a prompt but no ground truth; use a row of a file that `hpo-plugin prepare` wrote"
        )
    return truth


def check_prompt(prompt: Any) -> None:
    """Check that a prompt is chat messages.

    Raises:
        ValueError: It is not.
    """
    if (
        not isinstance(prompt, list)
        or not prompt
        or not all(isinstance(one, Mapping) and "content" in one for one in prompt)
    ):
        raise ValueError(f"the column 'prompt' must hold a list of chat messages, got {prompt!r:.200}")


def prompt_text(row: Row) -> str:
    """Return the text of the last message of a row's prompt."""
    return str(row["prompt"][-1]["content"])


def to_parquet(table: pa.Table, row_group_size: int = 4_096) -> bytes:
    """Return a table as the bytes of a parquet file; they are the same under one version of pyarrow."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=row_group_size)
    return bytes(sink.getvalue())


def write_data_set(
    directory: Path,
    tables: Mapping[str, pa.Table],
    manifest: Mapping[str, Any],
    *,
    row_group_size: int = 4_096,
    further_files: Mapping[str, bytes] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> DataSet:
    """Write tables as parquet files with a manifest; files that are identical stay as they are.

    Args:
        directory: Where; exists (:func:`hpo_plugin.files.check_output`).
        tables: Name to table; ``train`` becomes ``train.parquet``.
        manifest: JSON values: ``task``, ``parameters`` (what the data are a function of), ``counts`` and others.
        row_group_size: Rows of a row group.
        further_files: File name to content.
        force: Whether to replace other data.
        progress: Receives a stage's name, the work done and the total.

    Raises:
        FileExistsError: A file of the same name has other content and ``force`` is not set.
        OSError: A file cannot be written.
    """
    import pyarrow as pa

    files = {}
    for done, (name, table) in enumerate(tables.items()):
        if progress is not None:
            progress("writing files", done, len(tables))
        files[f"{name}.parquet"] = to_parquet(table, row_group_size)
    versions = {"hpo_plugin": hpo_plugin.__version__, "pyarrow": pa.__version__, **manifest.get("versions", {})}
    described = {**manifest, "versions": versions}
    publication = publish(directory, {**files, **(further_files or {})}, described, force=force)
    if progress is not None:
        progress("writing files", len(tables), len(tables))
    return DataSet({name: directory / f"{name}.parquet" for name in tables}, described, publication)


def write_rows(
    task: Task,
    directory: Path,
    splits: Mapping[str, Sequence[Row]],
    options: DataOptions,
    *,
    force: bool = False,
) -> DataSet:
    """Write the rows of a task's splits: the shortest :meth:`Task.prepare`.

    Args:
        task: The task.
        directory: Where; created if needed.
        splits: ``train`` and ``test`` to rows in verl's format.
        options: What the rows are a function of.
        force: Whether to replace other data.

    Raises:
        ValueError: A split has no rows, a row lacks a column of :data:`ROW_COLUMNS`, or the rows are not of one form.
        FileExistsError: The directory holds other data and ``force`` is not set.
        OSError: A file cannot be written.
    """
    import pyarrow as pa

    for split in ("train", "test"):
        if not splits.get(split):
            raise ValueError(f"{task.name}: the {split} split has no rows; pass at least one")
    for split, rows in splits.items():
        for number, row in enumerate(rows):
            missing = [name for name in ROW_COLUMNS if name not in row]
            if missing:
                raise ValueError(
                    f"{task.name}: row {number} of the {split} split lacks the column {missing[0]!r}; add it"
                )
    # In the form of the manifest, where tuples become lists.
    parameters = json.loads(json.dumps(asdict(options)))
    check_output(directory, parameters, force=force)
    tables = {}
    for split, rows in splits.items():
        try:
            tables[split] = pa.Table.from_pylist(list(rows))
        except (pa.ArrowException, TypeError) as error:
            raise ValueError(f"{task.name}: the rows of the {split} split cannot be written: {error}") from error
    counts = {split: len(rows) for split, rows in splits.items()}
    manifest = {"task": task.name, "parameters": parameters, "counts": counts}
    return write_data_set(directory, tables, manifest, force=force)


def laptop_form(task: Task) -> LaptopForm:
    """Return the laptop form of a task.

    Raises:
        TaskError: It has none.
    """
    if task.laptop is None:
        raise TaskError(f"the task {task.name} has no laptop form; set Task.laptop to train it on CPU cores")
    return task.laptop


def load_task(name: str) -> Task:
    """Return a task.

    Args:
        name: One of :data:`TASK_NAMES`, or the path of a Python file that defines ``TASK``.

    Raises:
        TaskError: There is no such task, or the file cannot be imported or defines no task.
    """
    if name in TASK_NAMES:
        task: Task = importlib.import_module(f"hpo_plugin.tasks.{name}.task").TASK
        return task
    path = Path(name)
    if path.suffix != ".py":
        raise TaskError(f"{name!r} is neither a built-in task ({', '.join(TASK_NAMES)}) nor the path of a Python file")
    if not path.is_file():
        raise TaskError(f"the task file {name} does not exist")
    spec = importlib.util.spec_from_file_location(f"hpo_task_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise TaskError(f"{name} cannot be imported as a Python module")
    module = importlib.util.module_from_spec(spec)
    # The dataclass decorator looks up the module in sys.modules.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
        where = f", line {lines[-1]}" if lines else ""
        raise TaskError(f"{name}{where}: cannot be imported: {type(error).__name__}: {error}") from error
    found = getattr(module, "TASK", None)
    if not isinstance(found, Task):
        raise TaskError(
            f"{name} does not define TASK; set it to an instance of a subclass of hpo_plugin.tasks.task.Task"
        )
    missing = [attribute for attribute in ("name", "title") if not getattr(found, attribute, None)]
    if missing:
        raise TaskError(f"{name}: TASK has no {missing[0]}; set the class attribute")
    return found
