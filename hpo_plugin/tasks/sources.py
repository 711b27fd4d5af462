"""Reads the rows of a data set from a local file or from the Hugging Face Hub."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hpo_plugin.files import sha256_of_file

FILE_SUFFIXES = (".parquet", ".json", ".jsonl", ".csv")
#: Column added to the rows of a JSON file that is an object of splits.
SPLIT_COLUMN = "split"


class SourceUnavailableError(OSError):
    """The source of a data set cannot be reached or read."""


def describe_file(path: Path) -> dict[str, Any]:
    """Return what identifies a file in a manifest: its content, because paths differ between machines.

    Raises:
        ValueError: If its name ends in something that cannot be read.
    """
    if path.suffix.lower() not in FILE_SUFFIXES:
        raise ValueError(f"source={str(path)!r}: the file name must end in {', '.join(FILE_SUFFIXES)}")
    return {"source": path.name, "source_sha256": sha256_of_file(path)}


def read_file(path: Path) -> list[Any]:
    """Return the rows of a file in their order; a line that cannot be read at all is None.

    Args:
        path: A parquet file, a CSV file with a header, or JSON: lines, an array of rows, an object of columns, or an
            object of splits (its rows then carry their split's name in the column ``split``).

    Raises:
        SourceUnavailableError: If it cannot be read.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            table: list[Any] = pq.read_table(path).to_pylist()
            return table
        # Byte order marks are what spreadsheets leave in front of a first column's name.
        text = path.read_text(encoding="utf-8-sig")
        if suffix == ".csv":
            return list(csv.DictReader(io.StringIO(text, newline="")))
        if text.lstrip().startswith("["):
            parsed: list[Any] = json.loads(text)
            return parsed
        lines = [line for line in text.split("\n") if line.strip()]
        rows = [_json_or_none(line) for line in lines]
        # None where the lines are objects of their own.
        whole = _json_or_none(text)
        if isinstance(whole, dict):
            holds_lists = any(isinstance(value, list) for value in whole.values())
            if len(lines) > 1 or (suffix == ".json" and holds_lists):
                return _rows_of_object(whole)
        elif lines and not any(isinstance(row, dict) for row in rows):
            # Says where it is not JSON.
            json.loads(text)
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise SourceUnavailableError(f"source={str(path)!r} cannot be read as {suffix}: {error}") from error
    return rows


def _rows_of_object(whole: Any) -> list[Any]:
    values = list(whole.values()) if isinstance(whole, dict) else []
    if values and all(isinstance(value, list) for value in values):
        if all(isinstance(row, Mapping) for value in values for row in value):
            return [{**row, SPLIT_COLUMN: split} for split, rows in whole.items() for row in rows]
        if len({len(value) for value in values}) == 1:
            return [dict(zip(whole, row, strict=True)) for row in zip(*values, strict=True)]
    raise ValueError("expected JSON lines, an array of rows, an object of columns, or an object of splits")


def _json_or_none(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def read_hub(
    dataset: str, *, split: str, config: str | None = None, advice: str = "Check the id and the network"
) -> list[Any]:
    """Return the rows of a split of a data set on the Hugging Face hub, with the user's own token.

    Args:
        dataset: Its id.
        split: Its split.
        config: Its configuration, where it has several.
        advice: What to check first if it cannot be loaded.

    Raises:
        SourceUnavailableError: If it cannot be loaded, saying what to do.
    """
    # Imported here: it takes a second, and only this source needs it.
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise SourceUnavailableError("datasets is not installed: pip install 'hpo-plugin[hub]'") from error

    arguments = [dataset] if config is None else [dataset, config]
    try:
        rows: list[Any] = datasets.load_dataset(*arguments, split=split).to_list()
    except Exception as error:
        # The libraries underneath raise a dozen unrelated types; all of them mean that there is no data.
        raise SourceUnavailableError(
            f"the data set {dataset!r} could not be loaded from the Hugging Face Hub "
            f"({type(error).__name__}: {error}). {advice} (HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE apply), or "
            "download its file on another machine and pass that file as the source."
        ) from error
    return rows
