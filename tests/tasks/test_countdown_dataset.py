"""Countdown data files: what verl reads, splits that share nothing, the public data kept as published."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from hpo_plugin.cli.app import app
from hpo_plugin.tasks.countdown import (
    CountdownConfig,
    SourceUnavailableError,
    chat_prompt,
    compute_score,
    generate_problems,
    generate_splits,
    prepare_countdown,
    prompt_text,
    solve,
)

SMALL: dict[str, Any] = {"train_size": 40, "test_size": 10}
CONFIG = CountdownConfig(counts=(3,), max_number=20, seed=4)
#: 12 rows as in the public data; rows 2 and 9 are damaged, row 4 has no solution, row 11 repeats row 0, which is in the
#: training split of SOURCE_SPLIT, in another order.
ROWS: list[dict[str, Any]] = [
    {"target": 22, "nums": [3, 7, 5]},
    {"target": 10, "nums": [1, 2, 3, 4]},
    {"target": None, "nums": [1, 2, 3]},
    {"target": 24, "nums": [2, 3, 4]},
    {"target": 99, "nums": [1, 1, 1]},
    {"target": 24, "nums": [3, 3, 8, 8]},
    {"target": 22, "nums": [3, 7, 5]},
    {"target": 15, "nums": [5, 6, 4]},
    {"target": 12, "nums": [4, 4, 4]},
    {"target": 12, "nums": [-4, 4, 4]},
    {"target": 30, "nums": [5, 5, 5]},
    {"target": 22, "nums": [5, 3, 7]},
]
SOURCE_SPLIT: dict[str, Any] = {"train_size": 8, "test_size": 4}


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def identities(path: Path) -> list[tuple[Any, ...]]:
    truths = [row["reward_model"]["ground_truth"] for row in rows_of(path)]
    return [(*sorted(truth["numbers"]), truth["target"]) for truth in truths]


# --- prompts ---


def test_the_public_prompt_is_tinyzeros() -> None:
    assert prompt_text([44, 19, 35], 98) == (
        "Using the numbers [44, 19, 35], create an equation that equals 98. You can use basic arithmetic operations "
        "(+, -, *, /) and each number can only be used once. Show your work in <think> </think> tags. And return the "
        "final answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>."
    )


def test_the_terse_prompt_is_short() -> None:
    assert chat_prompt((3, 7, 5), 22, "terse") == [{"role": "user", "content": "3 7 5=22:"}]


def test_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layout='short'"):
        prompt_text([1], 1, "short")
    with pytest.raises(ValueError, match="layout='short'"):
        prepare_countdown(tmp_path, layout="short")


# --- synthetic data ---


@pytest.mark.parametrize("layout", ["public", "terse"])
def test_rows_have_the_columns_verl_reads_and_can_be_solved_and_scored(tmp_path: Path, layout: str) -> None:
    made = prepare_countdown(tmp_path, config=CONFIG, layout=layout, **SMALL)
    for split, path, size in (("train", made.files["train"], 40), ("test", made.files["test"], 10)):
        rows = rows_of(path)
        assert len(rows) == size
        for position, row in enumerate(rows):
            truth = row["reward_model"]["ground_truth"]
            assert row["prompt"] == chat_prompt(truth["numbers"], truth["target"], layout)
            assert row["reward_model"]["style"] == "rule"
            assert row["extra_info"] == {"split": split, "index": position}
            solution = solve(truth["numbers"], truth["target"])
            text = f"<answer>{solution}</answer>" if layout == "public" else str(solution)
            assert compute_score(row["data_source"], text, truth) == 1.0


def test_verls_dataset_reads_the_files(tmp_path: Path) -> None:
    rl_dataset = pytest.importorskip("verl.utils.dataset.rl_dataset")
    from omegaconf import OmegaConf

    made = prepare_countdown(tmp_path / "data", config=CONFIG, **SMALL)
    config = OmegaConf.create({"cache_dir": str(tmp_path / "cache"), "filter_overlong_prompts": False})
    dataset = rl_dataset.RLHFDataset([str(made.files["train"])], tokenizer=None, config=config)
    assert len(dataset) == 40
    row = dataset[7]
    truth = row["reward_model"]["ground_truth"]
    assert row["raw_prompt"] == chat_prompt(truth["numbers"], truth["target"])
    assert row["index"] == 7
    batch = rl_dataset.collate_fn([dataset[0], row])
    truth = batch["reward_model"][1]["ground_truth"]
    answer = f"<answer>{solve(truth['numbers'], truth['target'])}</answer>"
    assert compute_score(batch["data_source"][1], answer, truth) == 1.0


def test_splits_share_no_problem_and_repeat_none(tmp_path: Path) -> None:
    config = CountdownConfig(counts=(3,), max_number=12)
    made = prepare_countdown(tmp_path, config=config, train_size=1500, test_size=300)
    train, test = identities(made.files["train"]), identities(made.files["test"])
    assert len(set(train)) == 1500
    assert len(set(test)) == 300
    assert not set(train) & set(test)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_splits_are_equally_hard(seed: int) -> None:
    """The stream gives the likely problems first: in a small range, those that most expressions solve."""
    config = CountdownConfig(counts=(3,), max_number=12, seed=seed)
    train, test = generate_splits(config, 2560, 512)
    everything = generate_problems(config, 3072)
    place = {problem: number / len(everything) for number, problem in enumerate(everything)}
    assert {*train, *test} == set(place)
    # The mean of 512 uniform numbers: 0.5, standard error 0.013.
    assert sum(place[problem] for problem in test) / len(test) == pytest.approx(0.5, abs=0.04)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        prepare_countdown(tmp_path / name, config=CONFIG, **SMALL)
    for file in ("train.parquet", "test.parquet", "manifest.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_manifest_says_how_the_data_was_made(tmp_path: Path) -> None:
    prepare_countdown(tmp_path, config=CONFIG, **SMALL)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["parameters"]["seed"] == 4
    assert manifest["parameters"]["counts"] == [3]
    assert manifest["parameters"]["max_number"] == 20
    assert manifest["counts"] == {"train": 40, "test": 10}
    assert set(manifest["files"]) == {"train.parquet", "test.parquet"}


def test_identical_data_is_left_and_other_data_is_refused(tmp_path: Path) -> None:
    prepare_countdown(tmp_path, config=CONFIG, **SMALL)
    assert prepare_countdown(tmp_path, config=CONFIG, **SMALL).publication.written == ()
    other = CountdownConfig(counts=(3,), max_number=20, seed=5)
    with pytest.raises(FileExistsError, match="seed: found 4, requested 5"):
        prepare_countdown(tmp_path, config=other, **SMALL)
    made = prepare_countdown(tmp_path, config=other, force=True, **SMALL)
    assert "train.parquet" in made.publication.written


@pytest.mark.parametrize("sizes", [{"train_size": 0}, {"test_size": 0}, {"train_size": -5}])
def test_empty_splits_are_refused(tmp_path: Path, sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        prepare_countdown(tmp_path, config=CONFIG, **sizes)


def test_settings_without_effect_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only_counts"):
        prepare_countdown(tmp_path, only_counts=(3,))
    with pytest.raises(ValueError, match="config applies only to synthetic"):
        prepare_countdown(tmp_path, config=CONFIG, source="a/b")


# --- the public data ---


def write_source(directory: Path, suffix: str) -> Path:
    path = directory / f"public{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS))
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS))
    else:
        lines = [f'{"" if row["target"] is None else row["target"]},"{row["nums"]}"' for row in ROWS]
        path.write_text("\n".join(["target,nums", *lines]))
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json", ".csv"])
def test_a_source_is_split_by_position_and_every_row_is_accounted_for(tmp_path: Path, suffix: str) -> None:
    source = write_source(tmp_path, suffix)
    made = prepare_countdown(tmp_path / "out", source=str(source), **SOURCE_SPLIT)
    # Of rows 0-7 the damaged row 2 is missing, of rows 8-11 the damaged row 9; order is kept.
    assert [row["reward_model"]["ground_truth"]["numbers"] for row in rows_of(made.files["train"])] == [
        ROWS[position]["nums"] for position in (0, 1, 3, 4, 5, 6, 7)
    ]
    assert [row["reward_model"]["ground_truth"]["target"] for row in rows_of(made.files["test"])] == [12, 30, 22]
    counts = dict(made.manifest["counts"])
    examples = counts.pop("malformed_examples")
    assert counts == {
        "train": 7,
        "test": 3,
        "rows_in_source": 12,
        "rows_beyond_the_split": 0,
        "malformed_dropped": 2,
        "other_counts_dropped": 0,
        # 1,1,1 -> 99, and 5,5,5 makes 30 = 5*5+5.
        "unsolvable_kept": 1,
        "solvability_unchecked": 0,
        # Row 6 repeats row 0, and both are row 11 of the test split.
        "repeated_in_train": 1,
        "train_rows_also_in_test": 2,
    }
    assert examples[0].startswith("row 2:")
    assert examples[1].startswith("row 9:")


def test_numbers_can_be_selected_after_cutting(tmp_path: Path) -> None:
    source = write_source(tmp_path, ".parquet")
    made = prepare_countdown(tmp_path / "out", source=str(source), train_size=8, test_size=4, only_counts=(3,))
    assert made.manifest["counts"]["other_counts_dropped"] == 2
    assert made.manifest["counts"]["train"] == 5
    with pytest.raises(ValueError, match="the test split has no usable row"):
        prepare_countdown(tmp_path / "none", source=str(source), train_size=8, test_size=4, only_counts=(4,))


def test_the_published_split_is_the_default_and_too_few_rows_are_refused(tmp_path: Path) -> None:
    source = write_source(tmp_path, ".jsonl")
    with pytest.raises(ValueError, match=r"has 12 rows, fewer than train_size=327680 plus test_size=1024"):
        prepare_countdown(tmp_path / "out", source=str(source))


def test_columns_of_another_data_set_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text("\n".join(['{"question": 1}'] * 4 + ["not json"]))
    with pytest.raises(ValueError, match=r"the train split has no usable row \(5 malformed"):
        prepare_countdown(tmp_path / "out", source=str(path), train_size=4, test_size=1)


@pytest.mark.parametrize("source", ["missing.parquet", "no such thing", "dir/missing.csv"])
def test_a_source_that_is_neither_file_nor_hub_id_is_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(SourceUnavailableError, match="neither an existing file"):
        prepare_countdown(tmp_path, source=source)


def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path: Path) -> None:
    for suffix in (".parquet", ".json"):
        path = tmp_path / f"bad{suffix}"
        path.write_text("[1,")
        with pytest.raises(SourceUnavailableError, match="cannot be read"):
            prepare_countdown(tmp_path / "out", source=str(path))


def test_a_hub_id_is_loaded_and_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, split: str) -> Any:
        asked.append((name, split))
        return types.SimpleNamespace(to_list=lambda: ROWS)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    made = prepare_countdown(tmp_path, source="Jiayi-Pan/Countdown-Tasks-3to4", **SOURCE_SPLIT)
    assert asked == [("Jiayi-Pan/Countdown-Tasks-3to4", "train")]
    assert made.manifest["counts"]["train"] == 7


def test_an_unreachable_hub_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> Any:
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(SourceUnavailableError, match=r"no route to host.*pass that file as the source"):
        prepare_countdown(tmp_path, source="Jiayi-Pan/Countdown-Tasks-3to4")


# --- the command ---


def command(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["prepare", "countdown", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, " ".join(result.output.split())


def test_the_command_writes_and_a_second_run_leaves_it(tmp_path: Path) -> None:
    arguments = ["--output", str(tmp_path), "--numbers", "3", "--max-number", "20", "--train-size", "30"]
    arguments += ["--test-size", "5", "--layout", "terse", "--seed", "9"]
    status, output = command(*arguments)
    assert status == 0, output
    assert "train 30" in output
    assert [row["prompt"][0]["content"][-1] for row in rows_of(tmp_path / "test.parquet")] == [":"] * 5
    status, output = command(*arguments)
    assert status == 0
    assert output.count("already exists, identical") == 2
    status, output = command(*arguments[:-1], "10")
    assert status == 1
    assert "seed: found 9, requested 10" in output


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--max-number", "0"], "max_number=0"),
        (["--min-target", "50", "--max-target", "40"], "max_target=40"),
        (["--numbers", "1"], "at least 2"),
        (["--numbers", "2", "--max-number", "3", "--train-size", "900"], "distinct problems requested"),
        (["--layout", "short"], "layout='short'"),
        (["--source", "nowhere.csv"], "neither an existing file"),
        (["--source", "a/b", "--seed", "3"], "seed=3 applies only to synthetic problems and has no effect"),
    ],
)
def test_wrong_input_ends_with_a_message_that_names_it(tmp_path: Path, arguments: list[str], named: str) -> None:
    status, output = command("--output", str(tmp_path / "out"), *arguments)
    assert status in (1, 2)
    assert named in output
    assert "Traceback" not in output
    assert not list(tmp_path.glob("out/*"))
