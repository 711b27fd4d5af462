"""``hpo-plugin preview``: what is read, what is computed, what is said."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hpo_plugin.algorithm import adaptive_alpha, hysteretic_advantage
from hpo_plugin.cli.app import app
from hpo_plugin.preview import rollouts as reading
from hpo_plugin.preview.report import Preview, picture, sentences, web_page
from hpo_plugin.preview.rollouts import Columns, PreviewError, Rollouts, open_rollouts
from hpo_plugin.preview.steps import StepPreview, preview_step

pytest.importorskip("duckdb")


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def computed(*paths, alpha_mins=(0.1,), **options):
    with open_rollouts(paths, **options) as read:
        return [preview_step(step, alpha_mins) for step in read.steps()], read


#: One success in four, and a group of equal rewards: 1 positive, 3 negative, 4 without signal.
ROLLOUT = [
    {"prompt": "a", "response": "xx", "reward": 1.0},
    *({"prompt": "a", "response": "xxxx", "reward": 0.0} for _ in range(3)),
    *({"prompt": "b", "response": "xxxxxx", "reward": 0.1} for _ in range(4)),
]


def test_a_step_by_hand(tmp_path):
    (step,), read = computed(write(tmp_path / "rollout.jsonl", ROLLOUT))
    assert (read.rows, read.unit, read.bad) == (8, "characters", {})
    assert (step.step, step.responses, step.groups, step.degenerate_groups) == (0, 8, 2, 1)
    assert (step.share_positive, step.share_negative) == (1 / 8, 3 / 8)
    assert step.alpha == {0.1: pytest.approx(1 / 3)}
    assert (step.length, step.length_positive, step.length_negative) == (38 / 8, 2, 4)
    assert step.tokens_negative == 12 / 14
    # Σ A is 0 within a group: half of Σ|A| is negative, and tokens are twice as many there.
    assert step.abs_advantage_negative == pytest.approx(1 / 2)
    assert step.abs_advantage_tokens_negative == pytest.approx(2 / 3)
    assert step.update_share(1.0) == pytest.approx(2 / 3)
    assert step.update_share(0.5) == pytest.approx(1 / 2)
    assert step.update_share(0.0) == 0
    assert step.update_share(0.5, per_response=True) == pytest.approx(1 / 3)
    assert math.isnan(step.shaped_positive)


def test_alpha_is_that_of_the_function_that_training_calls(tmp_path):
    generator = np.random.default_rng(0)
    rewards = generator.integers(0, 3, 64) / 10
    rows = [{"prompt": i // 8, "response_length": 5, "reward": reward} for i, reward in enumerate(rewards)]
    (step,), _ = computed(write(tmp_path / "a.jsonl", rows), alpha_mins=(0.0, 0.9))
    for alpha_min, alpha in step.alpha.items():
        result = hysteretic_advantage(
            torch.from_numpy(rewards).float(),
            torch.arange(64) // 8,
            lambda counts, low=alpha_min: adaptive_alpha(counts, low),
        )
        assert alpha == pytest.approx(float(result.alpha))


def test_what_verls_trainers_dump(tmp_path):
    """Written by verl's own function. V1 names rows by uid, rollout and output; the legacy trainer has no uid."""
    base = pytest.importorskip("verl.trainer.ppo.v1.trainer_base", reason="verl is not installed")
    legacy = pytest.importorskip("verl.trainer.ppo.ray_trainer", reason="verl is not installed")
    inputs, outputs, scores = ["p"] * 4 + ["q"] * 4, ["xy"] * 8, [1.0, 0, 0, 0, 0, 0, 1.0, 1.0]
    for number in (1, 2, 10):
        keys = [f"id_{i // 4}_{i % 4}_0" for i in range(8)]
        writer = next(kind for kind in vars(base).values() if hasattr(kind, "_write_generations"))
        writer._write_generations(inputs, outputs, [None] * 8, scores, {"uid": keys}, tmp_path / "v1", number)
        acc = {"acc": [bool(score) for score in scores]}
        writer = next(kind for kind in vars(legacy).values() if hasattr(kind, "_write_generations"))
        writer._write_generations(inputs, outputs, [None] * 8, scores, acc, tmp_path / "legacy", number)
    for name, group in (("v1", "uid"), ("legacy", "input")):
        steps, read = computed(tmp_path / name)
        assert read.columns.group == group
        assert [step.step for step in steps] == [1, 2, 10]
        assert all((step.groups, step.share_positive, step.share_negative) == (2, 3 / 8, 5 / 8) for step in steps)
    assert all(step.shaped_positive == 0 for step in steps)


def test_what_trl_logs(tmp_path):
    """A file of ``log_completions`` for each step, with conversations and one column for each reward function."""
    pandas = pytest.importorskip("pandas")
    rows = []
    for i in range(8):
        question = [{"role": "user", "content": "p" if i < 4 else "q"}]
        answer = [
            {"role": "assistant", "content": "xx" if i == 0 else "xxx"},
            {"role": "tool", "content": "yyy" * (i > 0)},
        ]
        rows.append(
            {
                "step": 5,
                "prompt": question,
                "completion": answer,
                "right": float(i == 0),
                "short": 0.5,
                "advantage": 0.0,
            }
        )
    (tmp_path / "completions").mkdir()
    pandas.DataFrame(rows).to_parquet(tmp_path / "completions" / "completions_00005.parquet")
    with pytest.raises(
        PreviewError, match=r"no reward column found in .*; its columns are .*right.*\. Pass --reward NAME"
    ):
        computed(tmp_path / "completions")
    (step,), read = computed(tmp_path / "completions", rewards=["right", "short=0.5"])
    assert read.columns.rewards == (("right", 1.0), ("short", 0.5))
    assert (step.length_positive, step.length_negative) == (2, 6)
    assert (step.step, step.groups, step.share_positive, step.share_negative) == (5, 2, 1 / 8, 3 / 8)


def test_steps_from_file_names_and_lengths_from_a_column(tmp_path):
    for number in (3, 20):
        write(tmp_path / f"step-{number}.jsonl", [{**row, "num_tokens": 7} for row in ROLLOUT])
    steps, read = computed(tmp_path)
    assert ([step.step for step in steps], read.unit) == ([3, 20], "tokens")
    assert all(step.length == 7 for step in steps)


def test_lengths_in_tokens_of_a_tokenizer(tmp_path):
    from hpo_plugin.quickstart.start_model import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    text = "3 + 4 = 7"
    file = write(tmp_path / "a.jsonl", [{**row, "response": text} for row in ROLLOUT])
    (step,), read = computed(file, tokenizer=str(tmp_path / "tokenizer"))
    assert (step.length, read.unit) == (len(tokenizer(text, add_special_tokens=False)["input_ids"]), "tokens")
    with pytest.raises(PreviewError, match="--tokenizer"):
        computed(file, tokenizer=str(tmp_path / "nothing"))


def test_steps_larger_and_smaller_than_what_is_fetched_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BATCH", 2048)
    sizes = [1, 5000, 2, 2048, 700, 4096]
    rows = [
        {"step": step, "prompt": i // 2, "response_length": 1, "reward": i % 2}
        for step, size in enumerate(sizes)
        for i in range(size)
    ]
    np.random.default_rng(0).shuffle(rows)
    steps, _ = computed(write(tmp_path / "a.jsonl", rows))
    assert [step.responses for step in steps] == sizes


def test_the_metrics_of_a_run_are_not_rollouts(tmp_path):
    path = write(tmp_path / "metrics.jsonl", [{"step": 1, "data": {"actor/lr": 1e-6}}])
    with pytest.raises(PreviewError, match=r"contains metrics, not rollouts.*trainer\.rollout_data_dir=DIR"):
        computed(path)


def test_rows_that_cannot_be_used_are_counted_and_listed(tmp_path):
    bad = [
        '{"prompt": "broken',
        "[1, 2]",
        {"prompt": "a", "response": "x"},
        '{"prompt": "a", "response": "x", "reward": NaN}',
        {"prompt": "a", "response": "x", "reward": "much"},
        {"response": "x", "reward": 1.0},
        "",
    ]
    steps, read = computed(write(tmp_path / "a.jsonl", [*ROLLOUT, *bad]))
    assert (read.rows, steps[0].responses) == (8, 8)
    assert read.bad == {
        "not a JSON object": 2,
        "the reward is missing, or larger than 1e+12 in magnitude": 3,
        "prompt is missing": 1,
    }
    assert len(read.listed) == 6
    assert {row.excerpt for row in read.listed} >= {'{"prompt": "broken', "[1, 2]"}
    with pytest.raises(PreviewError, match="no usable rows: prompt is missing: 1"):
        computed(write(tmp_path / "b.jsonl", [{"prompt": None, "response": "x", "reward": 1.0}]))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [{"text": "x", "reward": 1}],
            {},
            r"no column for the prompt found in .*; its columns are reward, text\. Pass --group NAME",
        ),
        ([{"prompt": "x", "reward": 1}], {}, "has neither a response"),
        (ROLLOUT, {"rewards": ["score"]}, "has no column 'score'; its columns are prompt, response, reward"),
        (ROLLOUT, {"length": "tokens"}, "has no column 'tokens'"),
        (["nothing"], {}, "has no row that is a JSON object"),
    ],
)
def test_columns_that_are_not_known_are_asked_for(tmp_path, rows, options, message):
    with pytest.raises(PreviewError, match=message):
        computed(write(tmp_path / "a.jsonl", rows), **options)


def test_paths_that_hold_no_rollouts(tmp_path):
    for path, message in (
        (tmp_path / "nothing", "does not exist"),
        (tmp_path, r"contains no \.jsonl or \.parquet file"),
        (write(tmp_path / "a.txt", []), "is not a .jsonl file, a .parquet file or a directory"),
    ):
        with pytest.raises(PreviewError, match=message):
            computed(path)


def made(count, **values):
    """A run of equal steps, but for values that are functions of the step's number."""
    first = dict(
        responses=8,
        groups=2,
        degenerate_groups=1,
        share_positive=0.1,
        share_negative=0.4,
        alpha={0.1: 0.25},
        length=10.0,
        length_positive=10.0,
        length_negative=20.0,
        tokens_negative=0.5,
        abs_advantage_negative=0.5,
        abs_advantage_tokens_negative=2 / 3,
        shaped_positive=math.nan,
    )
    steps = [
        StepPreview(step=i, **first | {name: value(i) for name, value in values.items()}) for i in range(1, count + 1)
    ]
    read = Rollouts(Columns("uid", (("score", 1.0),), "output", None, "step", None), 8 * count, "tokens", {}, [], None)
    return Preview(read, steps, 0.6, (0.1,))


def test_the_summary():
    said = sentences(made(120, alpha=lambda i: {0.1: 0.25 if i <= 80 else 0.95}))
    assert said[0] == (
        "In the first 40 steps, 80 % of the responses with a signal have a negative advantage. A-HPO with α_min = 0.1 "
        "would have multiplied these advantages by 0.25."
    )
    assert said[1].startswith("50 % of the groups have no signal")
    # The mean of 5 steps is above 0.9 when all five are.
    assert said[2].startswith("From step 85, α stays above 0.9")
    assert "2.00 times as long" in said[3]
    # 80 steps of (1/4 · 2/3) / (1/4 · 2/3 + 1/3) = 1/3, and 40 of 0.655.
    assert "their share of the update is 67 % without α and 44 % with A-HPO" in said[3]
    assert "does not predict the rewards of a run with HPO" in said[-1]


def test_the_summary_of_a_run_at_the_limit_without_signal_or_with_shaping():
    # As `float` gives the fp32 number that `adaptive_alpha` returns.
    said = sentences(made(6, alpha=lambda i: {0.1: float(torch.tensor(0.1))}))
    assert "At the end, α is 0.10 (mean of 5 steps)." in said
    assert "α equals its lower limit α_min = 0.1 in 6 of 6 steps with a signal." in said
    nothing = dict.fromkeys(("length_positive", "length_negative"), lambda i: math.nan)
    said = sentences(
        made(1, share_negative=lambda i: 0.0, share_positive=lambda i: 0.0, alpha=lambda i: {0.1: 1.0}, **nothing)
    )
    assert said == [
        "No response has a signal: in every group, all rewards are equal. No algorithm learns from these rollouts."
    ]
    assert any(
        "25 % of the positive responses are in groups without a success" in s
        for s in sentences(made(4, shaped_positive=lambda i: 0.25))
    )


def test_the_page_needs_nothing_from_elsewhere():
    preview = made(30)
    drawn = picture(preview)
    assert drawn.startswith(b"\x89PNG")
    page = web_page(preview, drawn, ["<runs>"])
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:)""", page)
    assert "&lt;runs&gt;" in page
    assert page.count("<tr>") == 13


def test_the_command_writes_its_files_and_says_what_was_left_out(tmp_path):
    file = write(tmp_path / "1.jsonl", [*ROLLOUT, "broken"])
    done = CliRunner().invoke(app, ["preview", str(file), "--output", str(tmp_path / "out"), "--alpha-min", "0.2"])
    assert done.exit_code == 0, done.output
    assert "skipped rows, not a JSON object: 1" in done.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"preview.html", "preview.png", "steps.jsonl"}
    (row,) = map(json.loads, (tmp_path / "out" / "steps.jsonl").read_text().splitlines())
    assert (row["step"], row["alpha"], row["shaped_positive"]) == (1, {"0.2": pytest.approx(1 / 3)}, None)
    assert "broken" in (tmp_path / "out" / "preview.html").read_text()


@pytest.mark.parametrize(
    "arguments", [["nothing"], ["1.jsonl", "--reward", "score"], ["1.jsonl", "--output", "1.jsonl"]]
)
def test_the_command_says_in_one_line_why_it_stops(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "1.jsonl", ROLLOUT)
    done = CliRunner().invoke(app, ["preview", *arguments])
    assert isinstance(done.exception, SystemExit)
    assert done.exit_code == 1
    assert done.output.startswith("error: ")


def test_a_session_of_several_outputs_is_one_response(tmp_path):
    """As in verl: the reward of the last output; the length of all."""
    rows = [
        {"input": "p", "output": "xx", "score": float(s == 0 and o == 2), "step": 1, "uid": f"id-7_{s}_{o}"}
        for s in range(4)
        for o in range(3)
    ]
    (step,), read = computed(write(tmp_path / "1.jsonl", rows))
    assert (read.rows, step.groups, step.share_positive, step.share_negative) == (4, 1, 1 / 4, 3 / 4)
    assert (step.alpha[0.1], step.length) == (pytest.approx(1 / 3), 6)


def test_a_uid_that_only_looks_like_a_key_of_verl_is_a_group(tmp_path):
    rows = [{**ROLLOUT[i], "uid": f"math_{group}_7"} for group in range(3) for i in range(4)]
    (step,), _ = computed(write(tmp_path / "1.jsonl", rows))
    assert (step.groups, step.share_positive) == (3, 1 / 4)


def test_a_missing_reward_counts_as_0_in_a_sum_unless_all_are_missing(tmp_path):
    values = [(1.0, None), (0.0, None), (None, 1.0), (None, 0.0), (None, None)]
    rows = [{"prompt": "p", "response": "x", "math": a, "code": b} for a, b in values]
    (step,), read = computed(write(tmp_path / "1.jsonl", rows), rewards=["math", "code"])
    assert (step.responses, step.share_positive, step.share_negative) == (4, 1 / 2, 1 / 2)
    assert read.bad == {"the reward is missing, or larger than 1e+12 in magnitude": 1}
    with pytest.raises(PreviewError, match="'much' is not a number; write NAME=WEIGHT"):
        computed(tmp_path / "1.jsonl", rewards=["math=much"])


def test_columns_that_only_later_files_have(tmp_path):
    (tmp_path / "0.jsonl").write_text("")
    write(tmp_path / "1.jsonl", [{**row, "step": 7, "acc": row["reward"]} for row in ROLLOUT])
    (step,), read = computed(tmp_path)
    assert (step.step, read.columns.acc) == (7, "acc")


def test_numbers_in_file_names(tmp_path):
    for name in ("run2_step_10_rank0.jsonl", "run2_step_3_rank0.jsonl"):
        write(tmp_path / "a" / name, ROLLOUT)
    assert [step.step for step in computed(tmp_path / "a")[0]] == [3, 10]
    for name in ("1_of_2.jsonl", "2_of_2.jsonl"):
        write(tmp_path / "b" / name, ROLLOUT)
    assert [step.step for step in computed(tmp_path / "b")[0]] == [0]


def test_broken_steps_rewards_and_bytes_are_left_out_and_the_rest_is_used(tmp_path):
    rows = [{**row, "step": 1} for row in ROLLOUT]
    odd = [{**ROLLOUT[0], "step": step} for step in (0.5, 1e30, None)] + [{**rows[0], "reward": 1e39}]
    file = write(tmp_path / "1.jsonl", [*rows, *odd, {**rows[0], "response": None}])
    file.write_bytes(file.read_bytes() + '{"prompt": "é'.encode()[:-1])
    (step,), read = computed(file)
    assert step.responses == 8
    assert read.bad == {
        "the step is missing or not an integer": 3,
        "the reward is missing, or larger than 1e+12 in magnitude": 1,
        "the response or its length is missing": 1,
        "not UTF-8, or longer than 500 MB": 1,
    }


def test_names_with_quotes_and_the_own_column_names(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    columns = {
        "it's": ["p"] * 2,
        'a "reward"': [1.0, 0.0],
        "filename": ["f"] * 2,
        "is_object": [False] * 2,
        "length": [1, 2],
    }
    parquet.write_table(pa.table(columns), tmp_path / "it's.parquet")
    (step,), _ = computed(tmp_path / "it's.parquet", group="it's", rewards=['a "reward"'])
    assert (step.share_positive, step.length) == (1 / 2, 1.5)
    write(tmp_path / "1.jsonl", [{"it's": "p", 'a "reward"': 1.0, "length": 1}])
    assert computed(tmp_path / "1.jsonl", group="it's", rewards=['a "reward"'])[1].rows == 1


def test_success_in_part_of_the_groups_is_judged_where_it_is_known(tmp_path):
    rows = [{**ROLLOUT[i], "acc": i == 0} for i in range(4)]
    rows += [{**ROLLOUT[i], "prompt": "c"} for i in range(4)] + [
        {**ROLLOUT[i], "prompt": "d", "acc": 0} for i in range(4)
    ]
    (step,), _ = computed(write(tmp_path / "1.jsonl", rows))
    assert step.shaped_positive == 1 / 2


def test_positive_responses_without_length(tmp_path):
    rows = [{**row, "response": "" if row["reward"] == 1 else "xx"} for row in ROLLOUT]
    (step,), read = computed(write(tmp_path / "1.jsonl", rows))
    assert step.update_share(1.0) == 1
    assert math.isnan(step.update_share(0.0))
    assert sentences(Preview(read, [step], 0.0, (0.1,)))


def test_the_hint_at_a_wrong_group(tmp_path):
    rows = [{**row, "prompt": i} for i, row in enumerate(ROLLOUT)]
    (step,), read = computed(write(tmp_path / "1.jsonl", rows))
    assert sentences(Preview(read, [step], 0.6, (0.1,)))[1].startswith(
        "Every group has a single response. If prompt does not"
    )


def test_an_interrupt_while_reading_ends_the_query_and_removes_the_files(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(reading.tempfile, "tempdir", None)
    (tmp_path / "tmp").mkdir()
    rows = [{"prompt": i // 8, "response_length": 1, "reward": i % 2} for i in range(300_000)]
    file = write(tmp_path / "1.jsonl", rows)

    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        computed(file, progress=interrupted)
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_and_removes_its_files(tmp_path, number):
    rows = [{"prompt": i // 8, "response_length": 1, "reward": i % 2} for i in range(400_000)]
    file = write(tmp_path / "1.jsonl", rows)
    (tmp_path / "tmp").mkdir()
    # A shell starts what runs in the background with SIGINT ignored, these tests too.
    heeded = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heeded}; from hpo_plugin.cli.app import app; app()"
    command = [sys.executable, "-c", code, "preview", str(file), "--output", str(tmp_path / "out")]
    process = subprocess.Popen(
        command, env=os.environ | {"TMPDIR": str(tmp_path / "tmp")}, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "tmp").glob("*/rollouts.duckdb")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert list((tmp_path / "tmp").iterdir()) == []
