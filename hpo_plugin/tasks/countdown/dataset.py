"""Countdown data files for verl: synthetic problems, or the public data set, as parquet with a manifest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hpo_plugin.console import Progress
from hpo_plugin.files import check_output
from hpo_plugin.tasks.countdown.problems import (
    CountdownConfig,
    CountdownProblem,
    fits_exactly,
    generate_problems,
    solvable,
)
from hpo_plugin.tasks.countdown.prompts import chat_prompt
from hpo_plugin.tasks.countdown.reward import DATA_SOURCES, read_ground_truth
from hpo_plugin.tasks.sources import (
    FILE_SUFFIXES,
    SourceUnavailableError,
    describe_file,
    read_file,
    read_hub,
)
from hpo_plugin.tasks.task import DataSet, write_data_set

#: The public data set on the Hugging Face hub.
PUBLIC_DATASET = "Jiayi-Pan/Countdown-Tasks-3to4"
#: The published split: the first rows train, the next ones test.
PUBLISHED_TRAIN_SIZE, PUBLISHED_TEST_SIZE = 327_680, 1_024
#: Sizes of a synthetic data set when none are given.
SYNTHETIC_TRAIN_SIZE, SYNTHETIC_TEST_SIZE = 20_000, 1_024
#: Problems with more numbers are written without checking that they can be solved: the check takes seconds each.
MAX_CHECKED_COUNT = 5
#: Beside the seed; the problems themselves are drawn with their count of numbers, which is never 0.
_SPLIT_STREAM = 0

#: What verl reads: ``prompt`` (RLHFDataset), ``data_source``, ``reward_model.ground_truth`` and ``extra_info``
#: (reward managers), ``extra_info.index`` (RLHFDataset).
SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("ability", pa.string()),
        (
            "reward_model",
            pa.struct(
                [
                    ("style", pa.string()),
                    ("ground_truth", pa.struct([("target", pa.int64()), ("numbers", pa.list_(pa.int64()))])),
                ]
            ),
        ),
        ("extra_info", pa.struct([("split", pa.string()), ("index", pa.int64())])),
    ]
)


def to_row(problem: CountdownProblem, split: str, row: int, layout: str = "public") -> dict[str, Any]:
    """Return a problem as one row of verl's data format.

    Args:
        problem: The problem.
        split: ``train`` or ``test``.
        row: Its position in the split.
        layout: ``public`` or ``terse``.
    """
    return {
        "data_source": DATA_SOURCES[layout],
        "prompt": chat_prompt(problem.numbers, problem.target, layout),
        "ability": "math",
        "reward_model": {
            "style": "rule",
            "ground_truth": {"target": problem.target, "numbers": list(problem.numbers)},
        },
        "extra_info": {"split": split, "index": row},
    }


def to_table(problems: Iterable[CountdownProblem], split: str, layout: str = "public") -> pa.Table:
    """Return problems as a table of rows in verl's format."""
    rows = [to_row(problem, split, row, layout) for row, problem in enumerate(problems)]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def generate_splits(
    config: CountdownConfig, train_size: int, test_size: int, progress: Progress | None = None
) -> tuple[list[CountdownProblem], list[CountdownProblem]]:
    """Generate a training and a test split that share no problem.

    The test split is a random part of all problems, drawn by the seed. It is not a beginning or an end of the stream:
    easy problems, which many expressions solve, are found first, and in a small range the splits would differ in
    difficulty.

    Args:
        config: What to generate.
        train_size: Problems in the training split.
        test_size: Problems in the test split.
        progress: Receives the number of problems generated so far.

    Returns:
        The training split, the test split.

    Raises:
        ValueError: If the config is invalid or its ranges hold too few distinct problems.
    """
    report = None if progress is None else (lambda done, total: progress("generating problems", done, total))
    problems = generate_problems(config, test_size + train_size, report)
    # Raw bits: numpy guarantees their stream, not that of its shuffles.
    keys = np.random.PCG64(np.random.SeedSequence([config.seed, _SPLIT_STREAM])).random_raw(len(problems))
    tested = set(np.argsort(keys, kind="stable")[:test_size].tolist())
    train = [problem for number, problem in enumerate(problems) if number not in tested]
    return train, [problem for number, problem in enumerate(problems) if number in tested]


def prepare_countdown(
    output: str | Path,
    *,
    config: CountdownConfig | None = None,
    layout: str = "public",
    train_size: int | None = None,
    test_size: int | None = None,
    source: str = "synthetic",
    only_counts: Sequence[int] = (),
    force: bool = False,
    progress: Progress | None = None,
) -> DataSet:
    """Write ``train.parquet``, ``test.parquet`` and ``manifest.json``; keep identical existing data.

    Args:
        output: The directory; created if needed.
        config: What to generate; only for ``source="synthetic"``.
        layout: ``public`` or ``terse``.
        train_size: Rows of the training split; default 20,000, or for another source the published 327,680.
        test_size: Rows of the test split; default 1,024. A source is split by position, training rows first.
        source: ``synthetic``, the path of a parquet, JSON (lines or array) or CSV file with the columns ``target`` and
            ``nums`` (or ``numbers``), or the id of such a data set on the Hugging Face hub.
        only_counts: Keep only the rows of a source with so many numbers, after splitting; not for ``synthetic``, where
            ``config.counts`` says it.
        force: Replace other data in the directory.
        progress: Receives a stage's name, the work done and the total.

    Returns:
        Paths, manifest, and what was written.

    Raises:
        ValueError: If an argument is invalid, has no effect with this source, or asks for more rows than there are.
        FileExistsError: If the directory holds other data and ``force`` is not set.
        SourceUnavailableError: If the source cannot be reached or read.
        OSError: If the directory cannot be written.
    """
    if layout not in DATA_SOURCES:
        raise ValueError(f"layout={layout!r} is not one of {', '.join(DATA_SOURCES)}")
    synthetic = source == "synthetic"
    if train_size is None:
        train_size = SYNTHETIC_TRAIN_SIZE if synthetic else PUBLISHED_TRAIN_SIZE
    if test_size is None:
        test_size = SYNTHETIC_TEST_SIZE if synthetic else PUBLISHED_TEST_SIZE
    for name, size in (("train_size", train_size), ("test_size", test_size)):
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")
    parameters: dict[str, Any] = {"layout": layout, "train_size": train_size, "test_size": test_size}
    directory = Path(output)
    counts: dict[str, Any] = {}
    if synthetic:
        if only_counts:
            raise ValueError(
                f"only_counts={tuple(only_counts)} selects rows of a source; for synthetic problems, set config.counts"
            )
        config = CountdownConfig() if config is None else config
        config.validate()
        parameters |= {"source": "synthetic", **asdict(config), "counts": list(config.counts)}
        check_output(directory, parameters, force=force)
        train, test = generate_splits(config, train_size, test_size, progress)
    else:
        if config is not None:
            raise ValueError(
                f"config applies only to synthetic problems and has no effect with source={source!r}; remove it"
            )
        parameters |= {**_describe_source(source), "only_counts": sorted(only_counts)}
        check_output(directory, parameters, force=force)
        train, test, counts = _convert(source, train_size, test_size, only_counts, progress)
    counts |= {"train": len(train), "test": len(test)}
    tables = {split: to_table(problems, split, layout) for split, problems in (("train", train), ("test", test))}
    manifest = {"task": "countdown", "parameters": parameters, "counts": counts}
    return write_data_set(directory, tables, manifest, row_group_size=65_536, force=force, progress=progress)


# --- the public data -----------------------------------------------------------------------------------------------

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WRITTEN_LIST = re.compile(r"[\[(]?\s*([0-9]+(?:(?:\s*,\s*|\s+)[0-9]+)*)\s*[\])]?", re.ASCII)
_EXAMPLES = 5


def _describe_source(source: str) -> dict[str, Any]:
    """What identifies a source in a manifest."""
    path = Path(source)
    if path.is_file():
        return describe_file(path)
    if path.suffix.lower() in FILE_SUFFIXES or not _HUB_ID.fullmatch(source):
        raise SourceUnavailableError(
            f"source={source!r} is neither an existing file ({', '.join(FILE_SUFFIXES)}) nor the id of a data set on "
            f"the Hugging Face Hub, such as {PUBLIC_DATASET}"
        )
    return {"source": source}


def _read_source(source: str) -> list[Any]:
    """Return the rows of a source in its order; a row that cannot be read at all is None."""
    path = Path(source)
    return read_file(path) if path.is_file() else read_hub(source, split="train")


def read_problem(row: Any) -> CountdownProblem:
    """Return the problem of a row with the columns ``nums`` (or ``numbers``) and ``target``.

    Raises:
        ValueError: The row is malformed.
    """
    if not isinstance(row, Mapping):
        raise ValueError("not a row with columns")
    numbers = row["nums"] if "nums" in row else row.get("numbers")
    target = row.get("target")
    if isinstance(numbers, str):
        written = _WRITTEN_LIST.fullmatch(numbers.strip())
        if written is None:
            raise ValueError(f"nums={numbers!r} is not a list of integers")
        numbers = [int(number) for number in re.findall("[0-9]+", written[1])]
    if isinstance(target, str) and re.fullmatch("-?[0-9]{1,12}", target.strip()):
        target = int(target)
    # The reward's own check: whatever is written can be scored.
    value, _ = read_ground_truth({"target": target, "numbers": numbers})
    return CountdownProblem(tuple(int(number) for number in numbers or ()), value)


def _convert(
    source: str, train_size: int, test_size: int, only_counts: Sequence[int], progress: Progress | None
) -> tuple[list[CountdownProblem], list[CountdownProblem], dict[str, Any]]:
    if progress is not None:
        progress("reading the source", 0, 1)
    rows = _read_source(source)
    if progress is not None:
        progress("reading the source", 1, 1)
    if len(rows) < train_size + test_size:
        raise ValueError(
            f"source={source!r} has {len(rows)} rows, fewer than train_size={train_size} plus test_size={test_size}; "
            "lower one of them (--train-size, --test-size)"
        )
    splits: dict[str, list[CountdownProblem]] = {"train": [], "test": []}
    malformed: list[str] = []
    other_counts = 0
    for position, row in enumerate(rows[: train_size + test_size]):
        try:
            problem = read_problem(row)
        except ValueError as error:
            malformed.append(f"row {position}: {error}")
            continue
        if only_counts and len(problem.numbers) not in only_counts:
            other_counts += 1
            continue
        splits["train" if position < train_size else "test"].append(problem)
    for split, problems in splits.items():
        if not problems:
            first = f"; first malformed row: {malformed[0]}" if malformed else ""
            raise ValueError(
                f"source={source!r}: the {split} split has no usable row ({len(malformed)} malformed, {other_counts} "
                f"with a different count of numbers{first})"
            )
    unsolvable, unchecked = _count_unsolvable(splits["train"] + splits["test"], progress)
    train_identities = [problem.identity for problem in splits["train"]]
    test_identities = {problem.identity for problem in splits["test"]}
    return (
        splits["train"],
        splits["test"],
        {
            "rows_in_source": len(rows),
            "rows_beyond_the_split": len(rows) - train_size - test_size,
            "malformed_dropped": len(malformed),
            "malformed_examples": [example[:300] for example in malformed[:_EXAMPLES]],
            "other_counts_dropped": other_counts,
            "unsolvable_kept": unsolvable,
            "solvability_unchecked": unchecked,
            "repeated_in_train": len(train_identities) - len(set(train_identities)),
            "train_rows_also_in_test": sum(identity in test_identities for identity in train_identities),
        },
    )


def _count_unsolvable(problems: Sequence[CountdownProblem], progress: Progress | None) -> tuple[int, int]:
    """Return how many problems have no solution, and how many were too large to tell."""
    by_count: dict[int, list[CountdownProblem]] = {}
    for problem in problems:
        by_count.setdefault(len(problem.numbers), []).append(problem)
    unsolvable = unchecked = done = 0
    for count, group in sorted(by_count.items()):
        for begin in range(0, len(group), 4096):
            part = group[begin : begin + 4096]
            small = count <= MAX_CHECKED_COUNT and all(
                fits_exactly(problem.numbers, problem.target) for problem in part
            )
            if small:
                reached = solvable([problem.numbers for problem in part], [problem.target for problem in part])
                unsolvable += int(np.count_nonzero(~reached))
            else:
                unchecked += len(part)
            done += len(part)
            if progress is not None:
                progress("checking solvability", done, len(problems))
    return unsolvable, unchecked
