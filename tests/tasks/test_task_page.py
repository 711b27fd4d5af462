"""The file of ``docs/tasks.md`` is a task by that page alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from hpo_plugin.cli.app import app
from hpo_plugin.tasks.task import TASK_NAMES, TaskError, is_correct, load_task, write_rows

PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"


@pytest.fixture(scope="module")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (text,) = re.findall(r"```python\n(\"\"\"Sorting:.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(text.splitlines()) < 150
    path = tmp_path_factory.mktemp("task") / "sorting.py"
    path.write_text(text, encoding="utf-8")
    return path


def call(*arguments: object) -> str:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_the_commands_take_the_file_of_a_task(task_file: Path, tmp_path: Path):
    assert "--letters" in call("prepare", task_file, "--help")
    sizes = ("--train-size", 40, "--test-size", 10, "--letters", 3)
    out = call("prepare", task_file, "--output", tmp_path / "data", *sizes)
    assert re.search(r"train +40", out)
    assert "already exists, identical" in call("prepare", task_file, "--output", tmp_path / "data", *sizes)
    rows = pq.read_table(tmp_path / "data" / "test.parquet").to_pylist()
    word, answer = rows[3]["prompt"][0]["content"], rows[3]["reward_model"]["ground_truth"]
    assert word == word[:3] + ":"
    assert answer == "".join(sorted(word[:3]))
    assert answer in call("explain", task_file, tmp_path / "data" / "test.parquet", "--row", 3)
    samples = [
        {
            "uid": f"{prompt}_{k}_0",
            "gts": "abc",
            "pred": pred,
            "score": float(pred == "abc"),
            "acc": float(pred == "abc"),
        }
        for prompt, preds in (("p", ["abc", "abc", "bca"]), ("q", ["cab", "abc", "cab"]))
        for k, pred in enumerate(preds)
    ]
    (tmp_path / "5.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    out = call("score", task_file, tmp_path / "5.jsonl")
    assert "pass@1  50.00 %" in out
    assert "maj@3   50.00 %" in out
    assert re.search(r"3 letters +6 +50.0 %", out)


def test_the_tasks_of_this_package_implement_the_same_protocol(tmp_path: Path):
    for name in TASK_NAMES:
        task = load_task(name)
        assert task.name == name
        sizes = {"train_size": 16, "test_size": 16}
        made = task.prepare(tmp_path / name, task.Options(**sizes))
        rows = pq.read_table(made.files["test"]).to_pylist()
        answer = task.explain(rows[0]).answer
        assert answer is not None
        response = rf"\boxed{{{answer}}}" if name == "telelogs" else f"<answer>{answer}</answer>"
        assert is_correct(task.score(rows[0], response))
        assert task.judge(rows[0], response) == "correct"
        assert not is_correct(task.score(rows[0], "no answer"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("chess", None, "neither a built-in task .countdown, telelogs. nor the path of a Python file"),
        ("nowhere.py", None, "nowhere.py does not exist"),
        ("empty.py", "", "does not define TASK"),
        ("wrong.py", "TASK = 3\n", "does not define TASK"),
        (
            "broken.py",
            "import no_such_module\n",
            "cannot be imported: ModuleNotFoundError: .*no_such_module",
        ),
    ],
)
def test_what_is_not_a_task_is_refused_with_the_reason(tmp_path: Path, monkeypatch, name, text, message):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(TaskError, match=message):
        load_task(name)
    for command in (["prepare", name, "--output", "d"], ["quickstart", "--task", name]):
        done = CliRunner(env={"COLUMNS": "300"}).invoke(app, command)
        assert done.exit_code == 2
        assert "Traceback" not in done.output


def test_a_prompt_alone_cannot_be_explained_where_the_answer_is_data(task_file: Path):
    for task in (task_file, "countdown"):
        done = CliRunner().invoke(app, ["explain", str(task), "-"], input="dcba:")
        assert done.exit_code == 1
        assert "no ground truth" in done.output


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "dcba:", "reward_model": {"ground_truth": "abcd"}},
            "the column 'prompt' must hold a list of chat messages",
        ),
        (
            {"prompt": [], "reward_model": {"ground_truth": "abcd"}},
            "the column 'prompt' must hold a list of chat messages",
        ),
        (
            {"prompt": [{"role": "user", "content": "dcba:"}], "reward_model": "abcd"},
            "'reward_model' must hold a mapping",
        ),
        ({"prompt": [{"role": "user", "content": "dcba:"}], "reward_model": {"style": "rule"}}, "no ground truth"),
        ({"question": "dcba:"}, "the column 'prompt' is missing; found: question"),
    ],
)
def test_a_row_of_another_form_is_an_error_and_not_a_traceback(task_file: Path, tmp_path: Path, row, message):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    done = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["explain", str(task_file), str(tmp_path / "rows.jsonl")])
    assert done.exit_code == 1
    assert message in done.output


def test_options_with_tuples_are_the_same_when_they_are_given_again(tmp_path: Path):
    task = load_task("countdown")
    rows = [
        {"data_source": "d", "prompt": [], "reward_model": {"ground_truth": k}, "extra_info": {"k": k}} for k in (1, 2)
    ]
    options = task.Options(counts=(3, 4))
    for expected in (("test.parquet", "train.parquet"), ()):
        made = write_rows(task, tmp_path, {"train": rows[:1], "test": rows[1:]}, options)
        assert tuple(sorted(set(made.publication.written) - {"manifest.json"})) == expected
    with pytest.raises(ValueError, match="the test split has no rows"):
        write_rows(task, tmp_path, {"train": rows, "test": []}, options)
    mixed = [rows[0], {**rows[1], "reward_model": {"ground_truth": "x"}}]
    with pytest.raises(ValueError, match="rows of the train split cannot be written"):
        write_rows(task, tmp_path / "other", {"train": mixed, "test": rows}, options)


def test_an_edited_demonstration_is_another_start_model(task_file: Path, monkeypatch):
    from hpo_plugin.quickstart.start_model import demonstrated

    task = load_task(str(task_file))
    rows = [task.row(word) for word in ("dcba", "abdc")]
    before = demonstrated(task, rows, 0)
    real = type(task).demonstrate
    monkeypatch.setattr(type(task), "demonstrate", lambda self, row, rng: replace(real(self, row, rng), guess="dcba"))
    assert demonstrated(task, rows, 0) != before
    # Those of 0.1.0 stay valid.
    assert demonstrated(load_task("countdown"), rows, 0) == {}


def test_a_demonstration_whose_answers_begin_alike_is_refused(task_file: Path, tmp_path: Path, monkeypatch):
    from hpo_plugin.quickstart.start_model import StartModelConfig, build_start_model

    task = load_task(str(task_file))
    rows = [task.row(word) for word in ("dcba", "abdc", "bacd")]
    real = type(task).demonstrate
    monkeypatch.setattr(type(task), "demonstrate", lambda self, row, rng: replace(real(self, row, rng), guess="=dcba"))
    with pytest.raises(ValueError, match="must begin with the task's solution prefix '='"):
        build_start_model(tmp_path / "m", task, rows[:2], rows[2:], config=StartModelConfig(steps=1))


def test_a_study_takes_the_file_of_a_task(task_file: Path):
    from hpo_plugin.study.spec import Prepare, setting_data

    prepare = Prepare(task=str(task_file), problems={"letters": 3}, train_size=20, test_size=8)
    task, options = setting_data(prepare)
    assert (task.name, options.letters, options.train_size) == ("sorting", 3, 20)
    assert re.fullmatch(r"sorting-[0-9a-f]{12}", prepare.name)
    with pytest.raises(ValueError, match=r"words is not an option of the sorting data; the options are .*letters"):
        setting_data(Prepare(task=str(task_file), problems={"words": 3}, train_size=20, test_size=8))


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_the_task_trains_three_steps_with_verls_own_trainer(task_file: Path, tmp_path: Path):
    command = [sys.executable, "-m", "hpo_plugin.cli", "quickstart", f"--task={task_file}", "--steps=3", "--n-test=64"]
    done = subprocess.run([*command, f"--output={tmp_path}"], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "sorting_cpu-ahpo-seed0-001"
    steps = [json.loads(line)["data"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 4
    for step in steps[1:]:
        assert 0.1 <= step["actor/hpo/alpha"] <= 1
        assert step["actor/grad_norm"] > 0
        assert step["critic/rewards/mean"] > 0
    assert any(key.startswith("val-core/sorting/") for key in steps[3])
    assert (run / "curves.png").exists()
