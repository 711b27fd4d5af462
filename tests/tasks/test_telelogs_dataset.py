"""TeleLogs data files: what verl reads, sources in the shapes people have them, no row lost, no access said so."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import hpo_plugin
from hpo_plugin import files
from hpo_plugin.files import sha256
from hpo_plugin.tasks.sources import SourceUnavailableError
from hpo_plugin.tasks.task import DataSet
from hpo_plugin.tasks.telelogs.dataset import (
    PUBLIC_CONFIG,
    PUBLIC_DATASET,
    SCHEMA,
    SFT_SCHEMA,
    NoAccessError,
    prepare_telelogs,
    read_row,
)
from hpo_plugin.tasks.telelogs.leakage import scenario_key
from hpo_plugin.tasks.telelogs.prompts import parse_prompt, render_prompt
from hpo_plugin.tasks.telelogs.reward import compute_score, read_answer
from hpo_plugin.tasks.telelogs.rules import diagnose
from hpo_plugin.tasks.telelogs.synthetic import class_counts, generate, relabeled
from hpo_plugin.tasks.telelogs.tables import Cause
from hpo_plugin.tasks.telelogs.variants import REDUCTIONS

SMALL: dict[str, Any] = {"train_size": 48, "test_size": 16}


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def questions(path: Path) -> list[str]:
    return [row["prompt"][0]["content"] for row in rows_of(path)]


def truths(path: Path) -> list[str]:
    return [row["reward_model"]["ground_truth"] for row in rows_of(path)]


def scenarios(path: Path) -> set[str]:
    return {row["extra_info"]["scenario"] for row in rows_of(path)}


def manifest_of(made: DataSet) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((made.publication.directory / "manifest.json").read_text())
    return manifest


def check_accounts(made: DataSet) -> None:
    """No row of the source is lost, and the manifest's counts are those of the files."""
    counts = made.manifest["counts"]
    assert counts["rows_in_source"] == counts["rows"]["train"] + counts["rows"]["test"] + counts["rows_refused"]
    assert sum(counts["refused_for"].values()) == counts["rows_refused"]
    for name, path in made.files.items():
        assert len(rows_of(path)) == counts["rows"][name]
    listing = made.publication.directory / "refused.jsonl"
    refused = [json.loads(line) for line in listing.read_text().splitlines()] if listing.exists() else []
    assert len(refused) == counts["rows_refused"]


@pytest.fixture(scope="module")
def source_rows() -> list[dict[str, Any]]:
    """Five scenarios with all of their counterfactuals, in random order."""
    made = generate(40, split="test", seed=21)
    return [{"question": render_prompt(row.case), "answer": row.label} for row in made.rows]


@pytest.fixture(scope="module")
def synthetic_data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    directory = tmp_path_factory.mktemp("telelogs")
    return prepare_telelogs(directory, seed=3, relabeled=True, sft=True, **SMALL)


# --- synthetic ---


def test_rows_have_the_columns_verl_reads_and_can_be_scored(synthetic_data: DataSet) -> None:
    for name, split, size, data_source in (
        ("train", "train", 48, "telelogs"),
        ("test", "test", 16, "telelogs"),
        # verl keeps its metrics apart.
        ("test_relabeled", "test", 16, "telelogs_relabeled"),
    ):
        path = synthetic_data.files[name]
        assert pq.read_schema(path).equals(SCHEMA)
        rows = rows_of(path)
        assert len(rows) == size
        for position, row in enumerate(rows):
            [message] = row["prompt"]
            case = parse_prompt(message["content"])
            label = row["reward_model"]["ground_truth"]
            assert message["role"] == "user"
            assert row["data_source"] == data_source
            assert row["ability"] == "telecom"
            assert row["reward_model"]["style"] == "rule"
            assert row["extra_info"] == {
                "split": split,
                "index": position,
                "id": None,
                "cause": case.cause_of(label),
                "scenario": scenario_key(case),
            }
            assert diagnose(case).label == label
            assert compute_score(row["data_source"], rf"So it is \boxed{{{label}}}.", label)["score"] == 1.0
            assert compute_score(row["data_source"], "I cannot tell.", label)["score"] == 0.0


def test_splits_are_balanced_as_asked_and_share_no_scenario(tmp_path: Path, synthetic_data: DataSet) -> None:
    def causes(path: Path) -> Counter[str]:
        return Counter(row["extra_info"]["cause"] for row in rows_of(path))

    # The published shares for training, and every class as often for testing.
    assert causes(synthetic_data.files["train"]) == class_counts(48, "train")
    assert causes(synthetic_data.files["test"]) == class_counts(16, "uniform")
    made = prepare_telelogs(tmp_path / "uniform", balance="uniform", **SMALL)
    assert causes(made.files["train"]) == class_counts(48, "uniform")
    long = prepare_telelogs(tmp_path / "long", train_size=8, test_size=80)
    assert causes(long.files["test"]) == class_counts(80, "uniform") != class_counts(80, "train")
    for data in (synthetic_data, made):
        assert not scenarios(data.files["train"]) & scenarios(data.files["test"])
        assert (
            data.manifest["leakage"]["shared_scenarios"]
            == data.manifest["leakage"]["train_rows"]
            == data.manifest["leakage"]["test_rows"]
            == 0
        )
        assert data.manifest["leakage"]["test_scenarios"] == 2


def test_the_rows_are_those_of_the_generator(synthetic_data: DataSet) -> None:
    train = generate(48, split="train", balance="train", seed=3).rows
    assert questions(synthetic_data.files["train"]) == [render_prompt(row.case) for row in train]
    test = generate(16, split="test", seed=3).rows
    assert questions(synthetic_data.files["test"]) == [render_prompt(row.case) for row in test]
    assert truths(synthetic_data.files["test"]) == [row.label for row in test]
    changed = relabeled(test, seed=3)
    assert questions(synthetic_data.files["test_relabeled"]) == [render_prompt(row.case) for row in changed]
    assert truths(synthetic_data.files["test_relabeled"]) == [row.label for row in changed]


def test_demonstrations_reason_to_the_answer(synthetic_data: DataSet) -> None:
    for split in ("train", "test"):
        path = synthetic_data.files[f"sft_{split}"]
        assert pq.read_schema(path).equals(SFT_SCHEMA)
        rows = rows_of(path)
        assert [row["messages"][0]["content"] for row in rows] == questions(synthetic_data.files[split])
        for row, label in zip(rows, truths(synthetic_data.files[split]), strict=True):
            assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
            assert read_answer(row["messages"][1]["content"]) == label == row["cause"]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path, synthetic_data: DataSet) -> None:
    again = prepare_telelogs(tmp_path / "again", seed=3, relabeled=True, sft=True, **SMALL)
    names = {path.name for path in synthetic_data.publication.directory.iterdir()}
    assert names == {
        "manifest.json",
        "train.parquet",
        "test.parquet",
        "test_relabeled.parquet",
        "sft_train.parquet",
        "sft_test.parquet",
    }
    for name in names:
        here, there = (made.publication.directory / name for made in (synthetic_data, again))
        assert here.read_bytes() == there.read_bytes()
    other = prepare_telelogs(tmp_path / "other", seed=4, **SMALL)
    assert not set(questions(other.files["train"])) & set(questions(again.files["train"]))
    assert not set(questions(other.files["test"])) & set(questions(again.files["test"]))


def test_a_second_call_leaves_the_files_alone(synthetic_data: DataSet) -> None:
    directory = synthetic_data.publication.directory
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    again = prepare_telelogs(directory, seed=3, relabeled=True, sft=True, **SMALL)
    assert again.publication.written == ()
    assert set(again.publication.unchanged) == set(before)
    assert {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} == before
    assert again.manifest == synthetic_data.manifest


def test_the_manifest_says_how_the_data_was_made(synthetic_data: DataSet) -> None:
    manifest = manifest_of(synthetic_data)
    files = manifest.pop("files")
    assert manifest == json.loads(json.dumps(synthetic_data.manifest))
    assert manifest["task"] == "telelogs"
    assert manifest["parameters"] == {
        "source": "synthetic",
        "sizes": {"train": 48, "test": 16},
        "balance": "train",
        "reduction": "full",
        "seed": 3,
        "relabeled": True,
        "sft": True,
    }
    counts = manifest["counts"]
    assert counts["rows"] == {"train": 48, "test": 16, "test_relabeled": 16, "sft_train": 48, "sft_test": 16}
    for split in ("train", "test"):
        made = generate(counts["rows"][split], split=split, balance="train" if split == "train" else "uniform", seed=3)
        assert counts[f"{split}_scenarios"] == made.scenarios
        assert counts[f"{split}_scenario_candidates_drawn"] == made.candidates_drawn
        assert counts[f"{split}_scenarios_given_up"] == made.scenarios_given_up
        assert sum(counts[f"{split}_rows_redrawn"].values()) == sum(made.redrawn.values())
        assert counts[f"sft_{split}_without_demonstration"] == 0
        of_cause = class_counts(len(made.rows), "train" if split == "train" else "uniform")
        assert manifest["oracle"][split] == {cause.value: {cause.value: count} for cause, count in of_cause.items()}
    assert manifest["leakage"]["shared_scenarios"] == 0
    assert manifest["versions"]["hpo_plugin"] == hpo_plugin.__version__
    assert set(manifest["versions"]) == {"hpo_plugin", "numpy", "pyarrow"}
    assert files == {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path.read_bytes())}
        for path in synthetic_data.files.values()
    }


def test_redrawn_rows_are_named_in_the_manifest(tmp_path: Path) -> None:
    made = prepare_telelogs(tmp_path, train_size=1600, test_size=8, balance="uniform", seed=1)
    redrawn = made.manifest["counts"]["train_rows_redrawn"]
    assert redrawn
    assert all(re.fullmatch("C[1-8] found as (C[1-8]|none)", name) and count > 0 for name, count in redrawn.items())


def test_the_laptop_reduction_is_applied(tmp_path: Path) -> None:
    made = prepare_telelogs(tmp_path, reduction="laptop", relabeled=True, sft=True, **SMALL)
    causes = REDUCTIONS["laptop"].causes
    for name in ("train", "test", "test_relabeled"):
        assert set(Counter(row["extra_info"]["cause"] for row in rows_of(made.files[name]))) == set(causes)
        assert max(map(len, questions(made.files[name]))) < 300
    # The scenario is that of the whole case.
    whole = {row.scenario for row in generate(16, split="test").rows}
    assert whole & scenarios(made.files["test"])
    assert len(rows_of(made.files["sft_train"])) == 48


def test_other_data_is_refused_unless_forced(tmp_path: Path, source_rows: list[dict[str, Any]]) -> None:
    prepare_telelogs(tmp_path, **SMALL)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for changed, said in (
        ({"seed": 1}, "seed: found 0, requested 1"),
        ({"test_size": 24}, "sizes: found {'test': 16, 'train': 48}"),
        ({"balance": "uniform"}, "balance: found 'train', requested 'uniform'"),
        ({"sft": True}, "sft: found False, requested True"),
    ):
        with pytest.raises(FileExistsError, match=said):
            prepare_telelogs(tmp_path, **{**SMALL, **changed})
    path = tmp_path.with_suffix(".json")
    path.write_text(json.dumps(source_rows))
    with pytest.raises(FileExistsError, match="source: found 'synthetic'"):
        prepare_telelogs(tmp_path, source=str(path))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    made = prepare_telelogs(tmp_path, seed=1, force=True, **SMALL)
    assert set(made.publication.written) == {"train.parquet", "test.parquet", "manifest.json"}
    assert manifest_of(made)["parameters"]["seed"] == 1


def test_what_an_interruption_left_is_completed_and_never_taken_for_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = files.atomic_write

    def interrupted(path: Path, data: bytes) -> None:
        if path.name == "test.parquet":
            raise KeyboardInterrupt
        real(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(files, "atomic_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare_telelogs(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["train.parquet"]
    with pytest.raises(FileExistsError, match=r"train\.parquet would change"):
        prepare_telelogs(tmp_path, seed=1, **SMALL)
    made = prepare_telelogs(tmp_path, **SMALL)
    assert set(made.publication.written) == {"test.parquet", "manifest.json"}


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    made = prepare_telelogs(tmp_path, **SMALL)
    made.files["test"].write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"test\.parquet would change"):
        prepare_telelogs(tmp_path, **SMALL)
    assert made.files["test"].read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"train_size": 0}, "size=0 leaves a root cause without a row; set at least 8"),
        ({"test_size": 0}, "size=0 leaves a root cause without a row; set at least 8"),
        ({"train_size": -5}, "size=-5"),
        ({"test_size": 7}, "size=7"),
        ({"balance": "even"}, "balance='even' is not one of train, uniform"),
        ({"balance": ""}, "balance='' is not one of"),
        ({"reduction": "tiny"}, "reduction='tiny' is not one of full, laptop"),
        ({"reduction": ""}, "reduction='' is not one of"),
        ({"seed": -1}, "seed=-1"),
        ({"test_source": "test.csv"}, "test_source='test.csv' has no effect with source='synthetic'"),
    ],
)
def test_invalid_settings_are_named(tmp_path: Path, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        prepare_telelogs(tmp_path / "out", **{**SMALL, **arguments})
    assert not list(tmp_path.glob("out/*"))


def test_the_published_sizes_are_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def stop(sizes: dict[str, int], *others: Any) -> Any:
        asked.append(sizes)
        raise KeyboardInterrupt

    monkeypatch.setattr("hpo_plugin.tasks.telelogs.dataset._generate", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare_telelogs(tmp_path)
    assert asked == [{"train": 2400, "test": 864}]


# --- local files: shapes ---


def write_csv(path: Path, rows: list[dict[str, Any]], line_end: str = "\n", mark: str = "") -> Path:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes((mark + stream.getvalue().replace("\n", line_end)).encode())
    return path


def write_text(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def write_rows(path: Path, rows: list[Any]) -> Path:
    return write_text(path, "\n".join(json.dumps(row) for row in rows))


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


SHAPES: dict[str, Callable[[Path, list[dict[str, Any]]], Path]] = {
    "csv": lambda folder, rows: write_csv(folder / "a.csv", rows),
    # Also the line breaks of the prompts, as an editor leaves them.
    "csv of Windows": lambda folder, rows: write_csv(folder / "a.csv", rows, "\r\n"),
    "csv of a spreadsheet": lambda folder, rows: write_csv(folder / "a.csv", rows, mark="\ufeff"),
    "json array": lambda folder, rows: write_text(folder / "a.json", json.dumps(rows)),
    "json lines": lambda folder, rows: write_rows(folder / "a.jsonl", rows),
    "json lines named json": lambda folder, rows: write_rows(folder / "a.json", rows),
    "json columns": lambda folder, rows: write_text(
        folder / "a.json", json.dumps({name: [row[name] for row in rows] for name in rows[0]})
    ),
    "parquet": lambda folder, rows: write_parquet(folder / "a.parquet", rows),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_file_gives_the_same_rows(tmp_path: Path, shape: str, source_rows: list[dict[str, Any]]) -> None:
    path = SHAPES[shape](tmp_path, source_rows)
    made = prepare_telelogs(tmp_path / "out", source=str(path))
    check_accounts(made)
    # As text and order they are the source's.
    given = [(row["question"], row["answer"]) for row in source_rows]
    for name in ("train", "test"):
        rows = list(zip(questions(made.files[name]), truths(made.files[name]), strict=True))
        assert rows == [row for row in given if row in rows]
    assert made.manifest["counts"]["rows_refused"] == 0
    assert manifest_of(made)["parameters"] == {
        "source": path.name,
        "source_sha256": sha256(path.read_bytes()),
        "seed": 0,
        "relabeled": False,
        "sft": False,
    }


def test_a_json_object_of_splits_keeps_them(tmp_path: Path, source_rows: list[dict[str, Any]]) -> None:
    path = write_text(tmp_path / "a.json", json.dumps({"train": source_rows[:30], "test": source_rows[30:]}))
    made = prepare_telelogs(tmp_path / "out", source=str(path))
    assert questions(made.files["train"]) == [row["question"] for row in source_rows[:30]]
    assert questions(made.files["test"]) == [row["question"] for row in source_rows[30:]]


def test_columns_are_found_in_any_case_and_the_id_is_kept(tmp_path: Path, source_rows: list[dict[str, Any]]) -> None:
    rows = [
        {" ID": f"row-{number}", "QUESTION": row["question"], "Answer ": row["answer"], "other": 1}
        for number, row in enumerate(source_rows)
    ]
    made = prepare_telelogs(tmp_path / "out", source=str(write_csv(tmp_path / "a.csv", rows)))
    kept = {
        (row["extra_info"]["id"], row["prompt"][0]["content"]) for path in made.files.values() for row in rows_of(path)
    }
    assert kept == {(f"row-{number}", row["question"]) for number, row in enumerate(source_rows)}
    # A number becomes text.
    assert read_row({**source_rows[0], "Id": 17}).identity == "17"
    assert read_row(source_rows[0]).identity is None


# --- local files: answers ---


@pytest.mark.parametrize("form", ["{}", r"\boxed{{{}}}", r"\boxed{{{{{}}}}}", r"\boxed{{\text{{{}}}}}", " {}\n"])
def test_answers_are_read_in_the_forms_that_occur(source_rows: list[dict[str, Any]], form: str) -> None:
    for row in source_rows[:8]:
        label = row["answer"]
        assert read_row({**row, "answer": form.format(label)}).label == label
        # A bare number.
        assert read_row({**row, "answer": form.format(label[1:])}).label == label
    assert read_row({**source_rows[0], "answer": r"It is not \boxed{C1} but \boxed{C2}."}).label == "C2"
    assert read_row({**source_rows[0], "answer": 7}).label == "C7"


def test_answers_of_relabeled_prompts_are_their_labels(source_rows: list[dict[str, Any]]) -> None:
    made = generate(40, split="test", seed=21)
    for row in relabeled(made.rows, seed=2):
        case_row = {"question": render_prompt(row.case), "answer": row.label}
        assert read_row(case_row).label == row.label
        assert read_row({**case_row, "answer": row.label.lstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ")}).label == row.label
        # A letter that the labels do not have.
        if row.label.isdigit():
            with pytest.raises(ValueError, match="is not one of the options"):
                read_row({**case_row, "answer": f"C{row.label}"})


def test_a_bare_number_that_could_mean_two_labels_is_refused(source_rows: list[dict[str, Any]]) -> None:
    question = source_rows[0]["question"].replace("\nC4: ", "\nM3: ")
    assert read_row({"question": question, "answer": "M3"}).label == "M3"
    assert read_row({"question": question, "answer": "5"}).label == "C5"
    with pytest.raises(ValueError, match=r"the answer is not one of the options C1, C2, C3, M3, .*: '3'"):
        read_row({"question": question, "answer": "3"})


@pytest.mark.parametrize("answer", ["C9", "9", "c3", "C3: A neighboring cell", "", "nan", r"\boxed{C3, C4}", "C3.0"])
def test_an_answer_that_is_no_option_is_refused(source_rows: list[dict[str, Any]], answer: str) -> None:
    with pytest.raises(ValueError, match="the answer is not one of the options C1, C2, C3, C4, C5, C6, C7, C8: "):
        read_row({**source_rows[0], "answer": answer})


# --- local files: splits ---


@pytest.mark.parametrize(
    ("train", "test", "column"),
    [
        ("train", "test", "split"),
        ("Train", "TEST", "Split"),
        ("training", "validation", "SPLIT"),
        (" train", "val ", "split"),
    ],
)
def test_the_split_of_a_column_is_kept(
    tmp_path: Path, source_rows: list[dict[str, Any]], train: str, test: str, column: str
) -> None:
    rows = [{**row, column: test if number % 4 == 1 else train} for number, row in enumerate(source_rows)]
    made = prepare_telelogs(tmp_path / "out", source=str(write_csv(tmp_path / "a.csv", rows)))
    check_accounts(made)
    assert questions(made.files["test"]) == [row["question"] for row in source_rows[1::4]]
    assert made.manifest["counts"]["rows"] == {"train": 30, "test": 10}
    assert made.manifest["counts"]["splits"] == "as published"
    # Rows of one scenario stand on both sides of this split, and that is said.
    leakage = made.manifest["leakage"]
    assert leakage["train_scenarios"] == 5
    in_test = {scenario_key(parse_prompt(row["question"])) for row in source_rows[1::4]}
    assert leakage["test_scenarios"] == leakage["shared_scenarios"] == len(in_test)
    assert leakage["test_rows"] == 10
    assert leakage["train_rows"] == sum(
        row["extra_info"]["scenario"] in in_test for row in rows_of(made.files["train"])
    )


def test_a_second_file_is_the_test_split(tmp_path: Path, source_rows: list[dict[str, Any]]) -> None:
    train = write_rows(tmp_path / "train.jsonl", source_rows[:30])
    test = write_parquet(tmp_path / "test.parquet", source_rows[30:])
    made = prepare_telelogs(tmp_path / "out", source=str(train), test_source=str(test))
    check_accounts(made)
    assert questions(made.files["train"]) == [row["question"] for row in source_rows[:30]]
    assert questions(made.files["test"]) == [row["question"] for row in source_rows[30:]]
    parameters = manifest_of(made)["parameters"]
    assert parameters["test_source"] == "test.parquet"
    assert parameters["test_source_sha256"] == sha256(test.read_bytes())
    assert parameters["source_sha256"] == sha256(train.read_bytes())
    # Another test split is other data.
    write_parquet(test, source_rows[31:])
    with pytest.raises(FileExistsError, match="test_source_sha256"):
        prepare_telelogs(tmp_path / "out", source=str(train), test_source=str(test))


@pytest.mark.parametrize("none_given", [False, True])
def test_without_a_split_scenarios_are_split_not_rows(
    tmp_path: Path, source_rows: list[dict[str, Any]], none_given: bool
) -> None:
    rows = [{**row, "split": None} for row in source_rows] if none_given else source_rows
    path = write_rows(tmp_path / "a.jsonl", rows)
    by_seed = []
    for seed in range(6):
        made = prepare_telelogs(tmp_path / f"out{seed}", source=str(path), seed=seed)
        check_accounts(made)
        # One scenario of five, with all of its rows.
        assert made.manifest["counts"]["rows"] == {"train": 32, "test": 8}
        assert made.manifest["leakage"]["shared_scenarios"] == 0
        assert not scenarios(made.files["train"]) & scenarios(made.files["test"])
        assert "by base scenario" in made.manifest["counts"]["splits"]
        by_seed.append(frozenset(scenarios(made.files["test"])))
    assert len(set(by_seed)) > 1
    again = prepare_telelogs(tmp_path / "again", source=str(path), seed=2)
    assert scenarios(again.files["test"]) == by_seed[2]


def test_rows_with_and_without_a_split_are_not_mixed(tmp_path: Path, source_rows: list[dict[str, Any]]) -> None:
    rows = [{**row, "split": "train" if number else None} for number, row in enumerate(source_rows)]
    with pytest.raises(ValueError, match="1 rows have no split name, but the others do"):
        prepare_telelogs(tmp_path / "out", source=str(write_rows(tmp_path / "a.jsonl", rows)))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"train_size": 10}, "train_size=10 applies only to synthetic cases and has no effect with source="),
        ({"test_size": 0}, "test_size=0 applies only to"),
        ({"balance": "train"}, "balance='train' applies only to"),
        ({"reduction": "full"}, "reduction='full' applies only to"),
    ],
)
@pytest.mark.parametrize("source", ["hub", "a.jsonl"])
def test_settings_without_effect_are_refused(tmp_path: Path, source: str, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        prepare_telelogs(tmp_path, source=source, **arguments)


@pytest.mark.parametrize("source", ["missing.parquet", "no such thing", "a/b", "."])
def test_a_missing_source_is_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(SourceUnavailableError, match=r"^source=.* is neither synthetic, hub, nor an existing file"):
        prepare_telelogs(tmp_path / "out", source=source)
    there = write_rows(tmp_path / "a.jsonl", [{}])
    with pytest.raises(SourceUnavailableError, match=r"^test_source="):
        prepare_telelogs(tmp_path / "out", source=str(there), test_source=source)
    assert not (tmp_path / "out").exists()


# --- local files: rows that cannot be used ---


def test_no_row_is_lost_and_every_refusal_has_its_reason(tmp_path: Path, source_rows: list[dict[str, Any]]) -> None:
    question = source_rows[0]["question"]
    damaged: list[Any] = [
        # (what stands in the file, what is said about it)
        ({"question": question, "answer": "C9"}, "the answer is not one of the options"),
        ({"question": question, "answer": "no idea"}, "the answer is not one of the options"),
        ({"question": question}, "the column 'answer' is missing; found: question"),
        ({"question": None, "answer": "C1"}, "the column 'question' is empty"),
        ({"question": "", "answer": "C1"}, "line 1: expected 'Analyze the 5G"),
        ({"question": "What is 2 + 2?", "answer": "4"}, "line 1: expected 'Analyze the 5G"),
        ({"question": question + "\nmore", "answer": "C1"}, "cells in a table of 14 columns: 'more'"),
        ({"question": question.replace("SCENARIO_12 or", "SCENARIO_13 or"), "answer": "C1"}, "SCENARIO_12 or above"),
        ({"question": question.replace("\n", "\r\n"), "answer": "C1"}, "line 1: "),
        ({"question": question, "answer": "C1", "split": "dev"}, "the split is not one of train, training, test"),
        ({}, "the column 'question' is missing; found: no columns"),
        (["question", "answer"], "not a row with columns"),
        ("not json at all", "not a row with columns"),
    ]
    good = [
        {**row, "split": "test" if number % 2 else "train"} for number, row in enumerate(source_rows[: len(damaged)])
    ]
    lines = [text for row, (bad, _) in zip(good, damaged, strict=True) for text in (bad, row)]
    path = write_text(
        tmp_path / "a.jsonl", "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    made = prepare_telelogs(tmp_path / "out", source=str(path))
    check_accounts(made)
    assert questions(made.files["train"]) == [row["question"] for row in good[::2]]
    assert questions(made.files["test"]) == [row["question"] for row in good[1::2]]
    listing = (tmp_path / "out" / "refused.jsonl").read_text()
    refused = [json.loads(line) for line in listing.splitlines()]
    assert [entry["row"] for entry in refused] == list(range(0, 2 * len(damaged), 2))
    for entry, (_, said) in zip(refused, damaged, strict=True):
        assert said in entry["reason"]
    assert refused[9]["split"] == "dev"
    counts = made.manifest["counts"]
    assert counts["rows_in_source"] == 2 * len(damaged)
    assert counts["rows_refused"] == len(damaged)
    # Counted by what is wrong, not by what stands there.
    kinds = {name[:30]: count for name, count in counts["refused_for"].items()}
    assert kinds["the answer is not one of the o"] == 2
    assert kinds["not a row with columns"] == 2
    assert "no idea" not in str(counts["refused_for"])
    assert len(counts["refused_examples"]) == 5
    assert counts["refused_examples"][0].startswith("row 0: the answer is not one of")
    files = manifest_of(made)["files"]
    assert files["refused.jsonl"]["sha256"] == sha256(listing.encode())


def test_refusals_of_one_kind_are_one_count(tmp_path: Path, source_rows: list[dict[str, Any]]) -> None:
    bad = [{**row, "answer": f"answer {number}"} for number, row in enumerate(source_rows[:6])]
    bad += [{**row, "question": f"{row['question']}\ndamage '{number}'"} for number, row in enumerate(source_rows)]
    rows = [*({**row, "split": "train"} for row in bad), *({**row, "split": "test"} for row in source_rows)]
    rows += [{**row, "split": "train"} for row in source_rows]
    made = prepare_telelogs(tmp_path / "out", source=str(write_rows(tmp_path / "a.jsonl", rows)))
    check_accounts(made)
    counts = made.manifest["counts"]["refused_for"]
    assert counts == {
        "1 cells in a table of 14 columns": 40,
        "the answer is not one of the options C1, C2, C3, C4, C5, C6, C7, C8": 6,
    }


def test_a_prompt_that_would_be_written_otherwise_is_refused(
    monkeypatch: pytest.MonkeyPatch, source_rows: list[dict[str, Any]]
) -> None:
    monkeypatch.setattr("hpo_plugin.tasks.telelogs.dataset.render_prompt", lambda case: render_prompt(case) + " ")
    with pytest.raises(ValueError, match="the prompt parses but does not render back to the same text"):
        read_row(source_rows[0])


def test_only_refused_rows_is_an_error_that_names_the_first(tmp_path: Path, source_rows: list[dict[str, Any]]) -> None:
    rows = [{**row, "answer": f"D{number + 1}"} for number, row in enumerate(source_rows)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=r"the train split has no usable row \(40 rows, 40 refused; .*: 'D1'\)"):
        prepare_telelogs(tmp_path / "out", source=str(path))
    assert not list((tmp_path / "out").iterdir())
    other = write_rows(tmp_path / "b.jsonl", [{"prompt": "a", "label": "b"}] * 3)
    with pytest.raises(ValueError, match="the column 'question' is missing; found: prompt, label"):
        prepare_telelogs(tmp_path / "out", source=str(other))


def test_a_split_without_rows_is_an_error(tmp_path: Path, source_rows: list[dict[str, Any]]) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{**row, "split": "train"} for row in source_rows])
    with pytest.raises(ValueError, match=r"the test split has no usable row \(40 rows, 0 refused\)"):
        prepare_telelogs(tmp_path / "out", source=str(path))
    path = write_text(tmp_path / "empty.json", "")
    with pytest.raises(ValueError, match=r"the train split has no usable row \(0 rows, 0 refused\)"):
        prepare_telelogs(tmp_path / "out", source=str(path))


# --- relabeled files, demonstrations, the oracle ---


@pytest.fixture(scope="module")
def disputed(source_rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a published split, of which the oracle does not agree with every fifth."""
    rows = []
    for number, row in enumerate(source_rows):
        wrong = "C3" if row["answer"] != "C3" else "C4"
        rows.append({**row, "answer": wrong if number % 5 == 0 else row["answer"]})
        rows[-1]["split"] = "train" if number < 25 else "test"
    return rows


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, disputed: list[dict[str, Any]]) -> DataSet:
    folder = tmp_path_factory.mktemp("converted")
    source = write_rows(folder / "a.jsonl", disputed)
    return prepare_telelogs(folder / "out", source=str(source), relabeled=True, sft=True, seed=2)


def test_labels_are_kept_whatever_the_oracle_says(converted: DataSet, disputed: list[dict[str, Any]]) -> None:
    check_accounts(converted)
    assert truths(converted.files["train"]) == [row["answer"] for row in disputed[:25]]
    assert truths(converted.files["test"]) == [row["answer"] for row in disputed[25:]]
    causes = [row["extra_info"]["cause"] for row in rows_of(converted.files["test_relabeled"])]
    assert causes == [row["answer"] for row in disputed[25:]]
    for row, question in zip(
        rows_of(converted.files["test_relabeled"]), questions(converted.files["test"]), strict=True
    ):
        case = parse_prompt(row["prompt"][0]["content"])
        assert case.cause_of(row["reward_model"]["ground_truth"]) == row["extra_info"]["cause"]
        assert case.drive_test == parse_prompt(question).drive_test
        assert row["extra_info"]["scenario"] == scenario_key(parse_prompt(question))


def test_a_label_that_the_oracle_rejects_gets_no_demonstration(
    converted: DataSet, disputed: list[dict[str, Any]]
) -> None:
    counts = converted.manifest["counts"]
    for split, part, missing in (("train", disputed[:25], 5), ("test", disputed[25:], 3)):
        rows = rows_of(converted.files[f"sft_{split}"])
        agreed = [row for row in part if diagnose(parse_prompt(row["question"])).label == row["answer"]]
        assert len(part) - len(agreed) == missing == counts[f"sft_{split}_without_demonstration"]
        assert [row["messages"][0]["content"] for row in rows] == [row["question"] for row in agreed]
        assert [read_answer(row["messages"][1]["content"]) for row in rows] == [row["answer"] for row in agreed]


def test_the_oracles_agreement_is_a_table(converted: DataSet, disputed: list[dict[str, Any]]) -> None:
    for split, part in (("train", disputed[:25]), ("test", disputed[25:])):
        pairs = Counter((row["answer"], str(diagnose(parse_prompt(row["question"])).label)) for row in part)
        table = converted.manifest["oracle"][split]
        assert {(label, found): n for label, counts in table.items() for found, n in counts.items()} == pairs
        assert list(table) == sorted(table)
    assert any(label != found for label, counts in converted.manifest["oracle"]["train"].items() for found in counts)


def test_a_case_that_no_rule_explains_counts_as_none(tmp_path: Path, source_rows: list[dict[str, Any]]) -> None:
    """Without C3 on offer nothing is left where no other rule holds."""
    rows = [
        {"question": re.sub("\nC3: .*", "", row["question"]).replace("following 8", "following 7"), "answer": "C8"}
        for row in source_rows
    ]
    source = write_rows(tmp_path / "a.jsonl", rows)
    made = prepare_telelogs(tmp_path / "out", source=str(source), sft=True)
    check_accounts(made)
    assert made.manifest["counts"]["rows_refused"] == 0
    assert sum(made.manifest["oracle"][split]["C8"]["none"] for split in ("train", "test")) == 5
    without = sum(made.manifest["counts"][f"sft_{split}_without_demonstration"] for split in ("train", "test"))
    assert without == 35


def test_progress_is_told(tmp_path: Path, source_rows: list[dict[str, Any]]) -> None:
    told: list[tuple[str, int, int]] = []

    def progress(stage: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        told.append((stage, done, total))

    prepare_telelogs(tmp_path / "synthetic", progress=progress, **SMALL)
    assert ("generating train rows", 48, 48) in told
    assert ("generating test rows", 16, 16) in told
    told.clear()
    source = write_rows(tmp_path / "a.jsonl", source_rows * 3)
    prepare_telelogs(tmp_path / "file", source=str(source), progress=progress)
    assert ("reading the source", 1, 1) in told
    assert ("parsing prompts", 120, 120) in told
    assert told[-1] == ("writing files", 2, 2)


# --- the hub ---


def hub(monkeypatch: pytest.MonkeyPatch, load_dataset: Callable[..., Any]) -> None:
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


def test_the_hub_is_asked_for_its_configuration_and_both_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source_rows: list[dict[str, Any]]
) -> None:
    asked = []

    def load_dataset(*arguments: str, split: str) -> Any:
        asked.append((*arguments, split))
        rows = source_rows[:30] if split == "train" else source_rows[30:]
        return types.SimpleNamespace(to_list=lambda: rows)

    hub(monkeypatch, load_dataset)
    made = prepare_telelogs(tmp_path, source="hub")
    assert asked == [(PUBLIC_DATASET, PUBLIC_CONFIG, "train"), (PUBLIC_DATASET, PUBLIC_CONFIG, "test")]
    assert (PUBLIC_DATASET, PUBLIC_CONFIG) == ("netop/TeleLogs", "troubleshooting")
    check_accounts(made)
    assert questions(made.files["train"]) == [row["question"] for row in source_rows[:30]]
    assert questions(made.files["test"]) == [row["question"] for row in source_rows[30:]]
    assert manifest_of(made)["parameters"] == {
        "source": "netop/TeleLogs",
        "config": "troubleshooting",
        "seed": 0,
        "relabeled": False,
        "sft": False,
    }
    with pytest.raises(ValueError, match="has no effect with source='hub', which has a test split"):
        prepare_telelogs(tmp_path, source="hub", test_source="a.csv")


def http_error(status: int, **headers: str) -> Exception:
    """What huggingface_hub raises for an answer of the hub."""
    httpx = pytest.importorskip("httpx")
    http = pytest.importorskip("huggingface_hub.utils")
    url = "https://huggingface.co/datasets/netop/TeleLogs/resolve/main/README.md"
    answer = httpx.Response(
        status,
        headers={name.replace("_", "-"): text for name, text in headers.items()},
        request=httpx.Request("HEAD", url),
    )
    with pytest.raises(http.HfHubHTTPError) as caught:
        http.hf_raise_for_status(answer)
    return caught.value


def not_found(message: str) -> Exception:
    """What datasets makes of a refusal; the error beneath is gone by then."""
    error: Exception = pytest.importorskip("datasets.exceptions").DatasetNotFoundError(message)
    return error


def wrapped(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


GATED = "Access to dataset netop/TeleLogs is restricted and you are not in the authorized list."
REFUSALS: dict[str, Callable[[], Exception]] = {
    "gated, not logged in": lambda: http_error(401, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted."),
    "gated, not on the list": lambda: http_error(403, X_Error_Code="GatedRepo", X_Error_Message=GATED),
    "hidden": lambda: http_error(401, X_Error_Code="RepoNotFound"),
    "a wrong token": lambda: http_error(401, X_Error_Message="Invalid credentials in Authorization header"),
    "a token without the right": lambda: http_error(
        403, X_Error_Message="Please enable access to public gated repositories in your fine-grained token settings"
    ),
    "datasets, not logged in": lambda: not_found(
        "Dataset 'netop/TeleLogs' is a gated dataset on the Hub. You must be authenticated to access it."
    ),
    "datasets, not on the list": lambda: not_found(
        "Dataset 'netop/TeleLogs' is a gated dataset on the Hub. Visit the dataset page at "
        "https://huggingface.co/datasets/netop/TeleLogs to ask for access."
    ),
    "datasets, hidden": lambda: not_found("Dataset 'netop/TeleLogs' doesn't exist on the Hub or cannot be accessed."),
    "beneath another error": lambda: wrapped(
        RuntimeError("An error occurred while generating the dataset"), http_error(403, X_Error_Code="GatedRepo")
    ),
    "by its name only": lambda: type("GatedRepoError", (OSError,), {})("no"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_of_the_hub_says_how_to_get_access(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: str
) -> None:
    error = REFUSALS[refusal]()

    def load_dataset(*arguments: str, **options: str) -> Any:
        raise error

    hub(monkeypatch, load_dataset)
    with pytest.raises(NoAccessError) as caught:
        prepare_telelogs(tmp_path, source="hub")
    message = str(caught.value)
    for said in (PUBLIC_DATASET, "Request access", "approval is manual", "hf auth login", "HF_TOKEN", "synthetic"):
        assert said in message
    assert type(error).__name__ in message
    assert not list(tmp_path.iterdir())


def connection_error(name: str, message: str) -> Exception:
    error: Exception = getattr(pytest.importorskip("httpx"), name)(message)
    return error


FAILURES: dict[str, Callable[[], Exception]] = {
    "no such host": lambda: connection_error("ConnectError", "[Errno -2] Name or service not known"),
    "time": lambda: connection_error("ReadTimeout", "The read operation timed out"),
    "datasets": lambda: ConnectionError("Couldn't reach 'netop/TeleLogs' on the Hub (LocalEntryNotFoundError)"),
    "offline": lambda: ConnectionError(
        "Couldn't reach the Hugging Face Hub for dataset 'netop/TeleLogs': Offline mode is enabled."
    ),
    # Numbers in addresses and request numbers mean nothing.
    "an address": lambda: ConnectionError(
        "HTTPSConnectionPool(host='huggingface.co', port=443): Max retries exceeded (Caused by NewConnectionError("
        "'<urllib3.connection.HTTPSConnection object at 0x7f4030040140>: Failed to establish a new connection'))"
    ),
    "a request number": lambda: http_error(500, X_Request_Id="Root=1-67403401-403a401b4013e4035c"),
    "too many requests": lambda: http_error(429),
    "a proxy": lambda: connection_error("ProxyError", "403 Forbidden"),
    "a proxy by its text": lambda: OSError("Tunnel connection failed: 403 Forbidden by the proxy"),
    "the disk": lambda: OSError(28, "No space left on device"),
    "a word in a word": lambda: RuntimeError("the aggregated index is damaged"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_another_failure_is_not_taken_for_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    error = FAILURES[failure]()

    def load_dataset(*arguments: str, **options: str) -> Any:
        raise error

    hub(monkeypatch, load_dataset)
    with pytest.raises(SourceUnavailableError) as caught:
        prepare_telelogs(tmp_path, source="hub")
    assert type(caught.value) is SourceUnavailableError
    message = str(caught.value)
    assert str(error).strip() in message
    assert "check the network" in message
    assert "request access" in message
    assert not list(tmp_path.iterdir())


def test_no_access_is_a_source_that_is_unavailable() -> None:
    assert issubclass(NoAccessError, SourceUnavailableError)
    assert issubclass(SourceUnavailableError, OSError)


# --- verl ---


def test_verls_dataset_reads_the_files(tmp_path: Path, synthetic_data: DataSet) -> None:
    rl_dataset = pytest.importorskip("verl.utils.dataset.rl_dataset")
    from omegaconf import OmegaConf

    config = OmegaConf.create({"cache_dir": str(tmp_path / "cache"), "filter_overlong_prompts": False})
    path = synthetic_data.files["train"]
    dataset = rl_dataset.RLHFDataset([str(path)], tokenizer=None, config=config)
    assert len(dataset) == 48
    row = dataset[7]
    assert row["raw_prompt"] == [{"role": "user", "content": questions(path)[7]}]
    assert row["index"] == 7
    batch = rl_dataset.collate_fn([dataset[0], row])
    truth = batch["reward_model"][1]["ground_truth"]
    assert truth == truths(path)[7]
    assert batch["extra_info"][1]["cause"] in set(Cause)
    assert compute_score(batch["data_source"][1], rf"\boxed{{{truth}}}", truth)["score"] == 1.0


def test_verls_sft_dataset_learns_the_answer_only(synthetic_data: DataSet) -> None:
    sft_dataset = pytest.importorskip("verl.utils.dataset.multiturn_sft_dataset")
    from omegaconf import OmegaConf

    from hpo_plugin.quickstart.start_model import build_tokenizer

    tokenizer = build_tokenizer(8192)
    config = OmegaConf.create({"max_length": 8192, "truncation": "error", "pad_mode": "no_padding"})
    path = synthetic_data.files["sft_train"]
    dataset = sft_dataset.MultiTurnSFTDataset([str(path)], tokenizer, config)
    rows = rows_of(path)
    assert len(dataset) == len(rows) == 48
    for number in (0, 7, 47):
        item = dataset[number]
        question, answer = (message["content"] for message in rows[number]["messages"])
        ids, mask = item["input_ids"], item["loss_mask"].bool()
        assert tokenizer.decode(ids) == question + answer + tokenizer.eos_token
        assert tokenizer.decode(ids[mask]) == answer + tokenizer.eos_token
        assert tokenizer.decode(ids[~mask]) == question
        # One stretch, at the end.
        assert mask.tolist() == sorted(mask.tolist())


def test_a_row_of_the_other_split_is_refused_where_each_split_has_its_file(
    tmp_path: Path, source_rows: list[dict[str, Any]]
) -> None:
    rows = [{**row, "split": "train"} for row in source_rows]
    rows[2]["split"] = "test"
    train, test = write_csv(tmp_path / "train.CSV", rows), write_csv(tmp_path / "test.csv", source_rows)
    made = prepare_telelogs(tmp_path / "out", source=str(train), test_source=str(test))
    assert made.manifest["counts"]["rows_refused"] == 1
    (entry,) = [json.loads(line) for line in (tmp_path / "out" / "refused.jsonl").read_text().splitlines()]
    assert entry["row"] == 2
    assert "names a different split than its file" in entry["reason"]
