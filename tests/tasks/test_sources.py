"""Reading rows: the shapes that files have, what is wrong with them, and the Hugging Face hub."""

from __future__ import annotations

import csv
import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hpo_plugin.files import sha256
from hpo_plugin.tasks.sources import SourceUnavailableError, describe_file, read_file, read_hub

#: Text with all that a CSV file has to quote, and a line separator that JSON does not escape.
ROWS: list[dict[str, Any]] = [
    {"question": 'a|b\n"c", d\n\ne：\u2028', "answer": "C3"},
    {"question": "", "answer": "C1"},
    {"question": "last", "answer": "7"},
]
COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}


def written(path: Path, text: str) -> Path:
    # As it is, line breaks included.
    path.write_bytes(text.encode())
    return path


def csv_text(rows: list[dict[str, Any]], line_end: str = "\n") -> str:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator=line_end)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


# --- the shapes ---


def dumped(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("array.json", dumped(ROWS)),
        ("printed-array.json", dumped(ROWS, indent=2)),
        ("array.jsonl", "\n " + dumped(ROWS)),
        ("lines.jsonl", "\n".join(map(dumped, ROWS))),
        ("lines.json", "\n".join(map(dumped, ROWS)) + "\n"),
        ("crlf.jsonl", "\r\n".join(map(dumped, ROWS)) + "\r\n"),
        ("empty-lines.jsonl", "\n\n".join(map(dumped, ROWS)) + "\n\n"),
        ("columns.json", dumped(COLUMNS)),
        ("printed-columns.json", dumped(COLUMNS, indent=1)),
        ("lf.csv", csv_text(ROWS)),
        ("crlf.csv", csv_text(ROWS, "\r\n")),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "with a byte order mark"])
def test_rows_are_read_from_every_shape_of_text(tmp_path: Path, name: str, text: str, mark: str) -> None:
    assert read_file(written(tmp_path / name, mark + text)) == ROWS


def test_line_breaks_of_windows_inside_of_a_csv_field_are_line_breaks(tmp_path: Path) -> None:
    text = csv_text(ROWS, "\n").replace("\n", "\r\n")
    assert read_file(written(tmp_path / "a.csv", text)) == ROWS


def test_parquet_keeps_its_types(tmp_path: Path) -> None:
    rows = [{"target": 3, "nums": [1, 2]}, {"target": None, "nums": [4]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_file(tmp_path / "a.parquet") == rows


@pytest.mark.parametrize("options", [{}, {"indent": 2}])
def test_an_object_of_splits_gives_rows_that_name_their_split(tmp_path: Path, options: dict[str, Any]) -> None:
    text = json.dumps({"train": ROWS[:2], "test": ROWS[2:], "empty": []}, **options)
    assert read_file(written(tmp_path / "a.json", text)) == [
        {**row, "split": split} for row, split in zip(ROWS, ("train", "train", "test"), strict=True)
    ]


def test_an_object_of_splits_decides_the_split_whatever_its_rows_say(tmp_path: Path) -> None:
    text = json.dumps({"train": [{"split": "easy"}], "test": [{"split": "train"}]})
    assert read_file(written(tmp_path / "a.json", text)) == [{"split": "train"}, {"split": "test"}]


def test_an_object_whose_last_row_stands_on_a_line_of_its_own_is_one_object(tmp_path: Path) -> None:
    """Only the last of these lines is JSON by itself."""
    text = '{"train": [\n{"question": "a"},\n{"question": "b"}\n]}'
    assert [row["question"] for row in read_file(written(tmp_path / "a.json", text))] == ["a", "b"]


def test_a_single_row_is_a_row(tmp_path: Path) -> None:
    assert read_file(written(tmp_path / "a.jsonl", json.dumps(ROWS[0]))) == ROWS[:1]
    assert read_file(written(tmp_path / "a.json", json.dumps(ROWS[0]))) == ROWS[:1]
    # Not a column of two rows.
    row = {"target": [1, 2], "nums": [3, 4]}
    assert read_file(written(tmp_path / "b.jsonl", json.dumps(row))) == [row]


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("damage", ["not json", '{"question": "trunc', "null"])
def test_a_damaged_line_is_none_wherever_it_stands(tmp_path: Path, place: int, suffix: str, damage: str) -> None:
    lines = [json.dumps(row) for row in ROWS]
    lines[place] = damage
    rows = read_file(written(tmp_path / f"a{suffix}", "\n".join(lines)))
    assert rows == [None if number == place else row for number, row in enumerate(ROWS)]


def test_a_csv_row_with_fields_missing_has_nothing_in_them(tmp_path: Path) -> None:
    rows = read_file(written(tmp_path / "a.csv", "question,answer\nonly\na,b\n"))
    assert rows == [{"question": "only", "answer": None}, {"question": "a", "answer": "b"}]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_a_file_without_rows_has_none(tmp_path: Path, name: str) -> None:
    assert read_file(written(tmp_path / name, "\n")) == []


# --- what cannot be read ---


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.parquet", b"question,answer\n", "cannot be read as .parquet"),
        ("a.json", b"[1,", "cannot be read as .json: Expecting value"),
        ("a.json", b'{\n  "train": [\n', "Expecting value: line 3"),
        ("a.json", b"no\njson\n", "Expecting value: line 1"),
        ("a.jsonl", b"no\njson\n", "cannot be read as .jsonl"),
        ("a.json", b'{"question": ["a", "b"], "answer": ["C1"]}', "expected JSON lines, an array of rows"),
        ("a.json", b'{"train": [{"question": "a"}], "about": "text"}', "expected JSON lines, an array of rows"),
        ("a.json", b'{\n"question": "a",\n"answer": "C1"\n}', "expected JSON lines, an array of rows"),
        ("a.csv", "question,answer\n".encode("utf-16"), "codec can't decode"),
        ("a.csv", b"question\n" + b"x" * 200_000, "field larger than field limit"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SourceUnavailableError) as caught:
        read_file(path)
    assert said in str(caught.value)
    assert repr(str(path)) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for suffix in (".parquet", ".json", ".csv"):
        with pytest.raises(SourceUnavailableError, match=f"missing{suffix}' cannot be read"):
            read_file(tmp_path / f"missing{suffix}")


# --- what identifies a file ---


def test_a_file_is_described_by_its_content_not_by_its_folder(tmp_path: Path) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        path = written(tmp_path / folder / "a.csv", "x")
        assert describe_file(path) == {"source": "a.csv", "source_sha256": sha256(b"x")}


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.xlsx'.*must end in \.parquet, \.json, \.jsonl, \.csv"):
        describe_file(written(tmp_path / "a.xlsx", "x"))


# --- the hub ---


def hub(monkeypatch: pytest.MonkeyPatch, load_dataset: Any) -> None:
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


def test_the_hub_is_asked_for_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*arguments: str, **options: str) -> Any:
        asked.append((arguments, options))
        return types.SimpleNamespace(to_list=lambda: ROWS)

    hub(monkeypatch, load_dataset)
    assert read_hub("a/b", split="train") == ROWS
    assert read_hub("a/b", config="c", split="test") == ROWS
    assert asked == [(("a/b",), {"split": "train"}), (("a/b", "c"), {"split": "test"})]


def test_whatever_the_hubs_libraries_raise_is_one_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    class OfPythonsOwn(Exception):
        pass

    for error in (ConnectionError("no route to host"), OfPythonsOwn("no route to host"), KeyError("no route to host")):

        def load_dataset(*arguments: str, error: Exception = error, **options: str) -> Any:
            raise error

        hub(monkeypatch, load_dataset)
        with pytest.raises(SourceUnavailableError) as caught:
            read_hub("a/b", split="train", advice="Ask for access")
        message = str(caught.value)
        assert message.startswith("the data set 'a/b' could not be loaded from the Hugging Face Hub")
        assert type(error).__name__ in message
        assert "no route to host" in message
        assert "Ask for access" in message
        assert "HF_TOKEN" in message
        assert "pass that file as the source" in message
        assert caught.value.__cause__ is error
