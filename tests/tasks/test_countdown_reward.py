"""The Countdown reward: what counts, what does not, and that no text can hurt it.

The forms that models write have tests of their own, from the table of the docs: test_reward_forms.py.
"""

from __future__ import annotations

import ast
import json
import random
import re
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpo_plugin.tasks.countdown.problems import random_expression
from hpo_plugin.tasks.countdown.reward import (
    MAX_ANSWER_CHARACTERS,
    MAX_DEPTH,
    MAX_SEARCHED_CHARACTERS,
    CountdownVerdict,
    compute_score,
    judge,
)

TRUTH = {"target": 22, "numbers": [3, 7, 5]}
RIGHT = "3*5+7"


def score(answer: str, target: int = 22, numbers: tuple[int, ...] = (3, 7, 5)) -> float:
    """Score an answer in both layouts, which must agree."""
    truth = {"target": target, "numbers": list(numbers)}
    public = compute_score("countdown", f"<think>hm</think> <answer>{answer}</answer>", truth)
    assert compute_score("countdown_terse", answer, truth) == public
    return public


def reference_value(expression: str) -> Fraction:
    """Evaluate by Python's own parser and Fraction; independent of the code under test."""

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        assert isinstance(node, ast.BinOp)
        left, right = value(node.left), value(node.right)
        match node.op:
            case ast.Add():
                return left + right
            case ast.Sub():
                return left - right
            case ast.Mult():
                return left * right
        return left / right

    return value(ast.parse(expression.strip(), mode="eval").body)


# --- correct answers ---


@pytest.mark.parametrize(
    "answer",
    [
        "3*5+7",
        "7+5*3",
        " ( 3 * 5 ) + 7 ",
        "\n3*5+7\n",
        "((((3))*(5))+(7))",
        "3*5+7 = 22",
        "3*5+7=22",
    ],
)
def test_a_correct_answer_earns_one(answer: str) -> None:
    assert score(answer) == 1.0


@pytest.mark.parametrize(
    ("answer", "target", "numbers"),
    [
        ("10-4-3", 3, (10, 4, 3)),
        ("24/4/3", 2, (24, 4, 3)),
        ("24/4*3", 18, (24, 4, 3)),
        ("2+3*4", 14, (2, 3, 4)),
        ("(2+3)*4", 20, (2, 3, 4)),
        ("10-(4-3)", 9, (10, 4, 3)),
        # Through a fraction: 8 / (3 - 8/3) = 8 / (1/3).
        ("8/(3-8/3)", 24, (8, 3, 8, 3)),
        # A third is exact: no float would give 1.
        ("1/3+2/3", 1, (1, 3, 2, 3)),
        # Through a negative value.
        ("5*(3-7)+40", 20, (5, 3, 7, 40)),
        ("(3-7)/(5-9)", 1, (3, 7, 5, 9)),
        # Zero may be multiplied and divided, not divided by.
        ("(4-4)/3+7", 7, (4, 4, 3, 7)),
    ],
)
def test_precedence_and_exact_arithmetic(answer: str, target: int, numbers: tuple[int, ...]) -> None:
    assert score(answer, target, numbers) == 1.0
    assert score(answer, target + 1, numbers) == 0.0


def test_one_side_of_an_equation_must_be_the_target() -> None:
    assert score("3*5+7=22") == 1.0
    assert score("22=3*5+7") == 1.0
    assert score("3*5+7=23") == 0.0
    assert score("23=3*5+7") == 0.0
    assert score("3*5+8=22") == 0.0
    assert score("3*5+7=22=22") == 0.0
    assert score("22=3*5+7=22") == 0.0
    assert score("3*5+7=") == 0.0
    assert score("3*5+7=44/2") == 0.0
    assert score("3*5+7=(22)") == 0.0
    assert score("7+5=3*5-3", 12, (7, 5)) == 0.0
    assert score("3-7=-4", -4, (3, 7)) == 1.0
    assert score("3-7=4", -4, (3, 7)) == 0.0
    # A single number is an answer, too.
    assert score("22=22", 22, (22,)) == 1.0
    assert score("22=11+11", 22, (22,)) == 0.0
    assert score("22=22") == 0.0


# --- the holes of public scorers, each refused ---


@pytest.mark.parametrize("answer", ["9**9**9**9", "__import__('os').system('true')", "exec('1')", "3*5+7 if 1 else 0"])
def test_hole_model_text_is_never_evaluated(answer: str) -> None:
    assert score(answer) == 0.0


def test_hole_floor_division_is_not_an_operation() -> None:
    assert score("7//3", 2, (7, 3)) == 0.0


def test_hole_power_is_not_an_operation() -> None:
    assert score("3**2", 9, (3, 2)) == 0.0
    assert score("3^2", 9, (3, 2)) == 0.0
    assert score("3* *2", 9, (3, 2)) == 0.0


def test_hole_factorial_is_not_an_operation() -> None:
    assert score("5!-3", 117, (5, 3)) == 0.0


def test_hole_modulo_and_bit_operations_are_not_operations() -> None:
    for answer, value in (("7%3", 1), ("7&3", 3), ("7|3", 7), ("7>>3", 0), ("~7+3", -5)):
        assert score(answer, value, (7, 3)) == 0.0


def test_hole_numbers_split_by_a_decimal_point() -> None:
    assert score("1.5*2", 3, (1, 5, 2)) == 0.0
    assert score("1.5", 2, (1, 5)) == 0.0


def test_hole_numbers_glued_together() -> None:
    assert score("15", 15, (1, 5)) == 0.0
    assert score("1 5", 15, (1, 5)) == 0.0
    assert score("1_5", 15, (1, 5)) == 0.0
    assert score("1e5", 100000, (1, 5)) == 0.0
    assert score("2(3)", 6, (2, 3)) == 0.0
    assert score("(2)3", 6, (2, 3)) == 0.0
    assert score("(2)(3)", 6, (2, 3)) == 0.0


def test_hole_the_whole_answer_is_parsed_not_only_its_last_line() -> None:
    assert score("I guess\n3*5+7") == 0.0
    assert score("1+1\n3*5+7") == 0.0
    assert score("3*5+7\nor 3+5+7") == 0.0
    # One expression over two lines is one expression.
    assert score("3*5\n+7") == 1.0


def test_hole_a_number_used_twice() -> None:
    assert judge("<answer>3+3</answer>", {"target": 6, "numbers": [3, 5]}) is CountdownVerdict.WRONG_NUMBERS
    assert score("7+5*3+7-7") == 0.0


def test_hole_a_number_not_used() -> None:
    assert score("15+7", 22, (15, 7, 4)) == 0.0
    assert score("22") == 0.0


def test_hole_a_number_that_was_not_given() -> None:
    assert score("20+2") == 0.0
    assert score("3*5+7+0") == 0.0


def test_a_number_given_twice_is_used_twice() -> None:
    assert score("4*4+4", 20, (4, 4, 4)) == 1.0
    assert score("4*5", 20, (4, 4, 5)) == 0.0


@pytest.mark.parametrize(
    "answer", ["３*５+７", "3*5+٧", "³*5+7", "3*5+7\u200b", "3*5\u2060+7", "3*5+7\x00", "3✕5+7", "𝟹*5+7"]
)
def test_hole_digits_are_ascii_and_nothing_is_hidden(answer: str) -> None:
    assert score(answer) == 0.0


@pytest.mark.parametrize(
    "between", [" ", "\n", "\u00a0", r"\,", r"\quad ", "$", "$$", "~", r"\(", r"\left", "{}", r"\text{}", ""]
)
def test_hole_nothing_joins_two_numbers(between: str) -> None:
    assert score(f"1{between}5", 15, (1, 5)) == 0.0
    assert score(f"1{between}5", 15, (15,)) == (0.0 if between else 1.0)
    assert score(f"3{between}(5)+7") == 0.0


@pytest.mark.parametrize(
    "answer",
    [
        r"\frac{}{3}+22",
        r"\frac{3}{}+22",
        r"\frac{66}",
        r"\frac{66}3",
        r"\frac 66 3",
        r"\frac(66)(3)",
        r"\frac{66}{3",
        r"\frac{66}{3)}",
        r"\frac{(66}{3)}",
        r"(\frac{66}{3)}",
        r"\frac{66}{3}}",
        r"\frac{66}+{3}",
        r"\fraction{66}{3}",
        r"\sqrt{66}{3}",
        r"\frac{66}{3}{1}",
        r"{66}/{3}",
        r"\frac{66/3}",
        r"\frac{66=22}{3}",
    ],
)
def test_a_fraction_has_two_arguments_in_braces(answer: str) -> None:
    assert score(answer, 22, (66, 3)) == 0.0
    assert score(r"\frac{66}{3}", 22, (66, 3)) == 1.0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (r"\boxed{\boxed{3*5+7}}", 1.0),
        (r"\boxed{3*5+7}=\boxed{22}", 1.0),
        (r"\boxed{22}=\boxed{3*5+7}", 1.0),
        (r"\boxed{\boxed{3*5+7}=22}", 1.0),
        (r"\boxed{3*5+7.}.", 1.0),
        (r"\boxed{3*5}+\boxed{7}", 0.0),
        (r"\boxed{3*5+7", 0.0),
        (r"3*5+7}", 0.0),
        (r"\boxed{3*5+7}}", 0.0),
        (r"\boxed{}", 0.0),
        (r"\boxed{22}", 0.0),
        (r"3*5+7 \boxed{22}", 0.0),
        (r"\boxed{22=3*5}+7", 0.0),
        (r"7+\boxed{3*5=22}", 0.0),
        (r"5+\boxed{3*7=22}", 0.0),
        (r"-\boxed{-3*5-7=22}", 0.0),
        (r"\boxed 3*5+7", 0.0),
    ],
)
def test_a_box_holds_the_answer_or_a_side(answer: str, expected: float) -> None:
    assert score(answer) == expected


def test_hole_nesting_is_bounded() -> None:
    def nested(depth: int) -> str:
        return "(" * depth + "3*5+7" + ")" * depth

    assert score(nested(MAX_DEPTH)) == 1.0
    assert score(nested(MAX_DEPTH + 1)) == 0.0
    assert score("(" * 400) == 0.0
    assert score("()" * 200) == 0.0


def test_hole_length_is_bounded() -> None:
    padded = RIGHT + " " * (MAX_ANSWER_CHARACTERS - len(RIGHT))
    assert score(padded) == 1.0
    assert score(padded + " ") == 0.0


def test_hole_magnitude_is_bounded() -> None:
    assert score("9" * 9, 999_999_999, (999_999_999,)) == 1.0
    assert score("9" * 10 + "-" + "9" * 10 + "+22") == 0.0
    assert score("0" * 400 + "3*5+7") == 1.0
    assert score("3*5+7=1" + "0" * 400) == 0.0


def test_hole_division_by_zero_is_wrong_and_does_not_raise() -> None:
    assert score("22+3/(5-5)", 22, (22, 3, 5, 5)) == 0.0
    # 1 / (1 / 0) is not 0.
    assert score("5-5/(3/(4-4))", 5, (5, 5, 3, 4, 4)) == 0.0
    assert score("(4-4)/(3-3)", 0, (4, 4, 3, 3)) == 0.0
    truth = {"target": 0, "numbers": [4, 4, 3, 3]}
    assert judge("<answer>(4-4)/(3-3)</answer>", truth) is CountdownVerdict.DIVISION_BY_ZERO


def test_signs_are_part_of_a_factor() -> None:
    assert score("--22", 22, (22,)) == 1.0
    assert score("-+-+22", 22, (22,)) == 1.0
    assert score("-2*-11", 22, (2, 11)) == 1.0
    assert score("-2*11", 22, (2, 11)) == 0.0
    assert score("-44/-2", 22, (44, 2)) == 1.0
    assert score("-(3-5)*11", 22, (3, 5, 11)) == 1.0
    assert score("--(5-3)*11", 22, (3, 5, 11)) == 1.0
    assert score("10-4--3", 9, (10, 4, 3)) == 1.0
    assert score("22-", 22, (22,)) == 0.0
    assert score("-", 0, (22,)) == 0.0
    assert score("5/-(3-3)", 0, (5, 3, 3)) == 0.0


@pytest.mark.parametrize("answer", ["", " ", "+", "3*5+", "*3", "3*5+7)", "(3*5+7", ")3*5+7(", "3*5+7.0", "(3*5)+()+7"])
def test_what_is_not_an_expression_earns_nothing(answer: str) -> None:
    assert judge(f"<answer>{answer}</answer>", TRUTH) is CountdownVerdict.MALFORMED
    assert score(answer) == 0.0


# --- which answer counts ---


def test_the_last_closed_answer_counts() -> None:
    def public(text: str) -> float:
        return compute_score("countdown", text, TRUTH)

    assert public("<answer>1+1</answer> no: <answer>3*5+7</answer>") == 1.0
    assert public("<answer>3*5+7</answer> no: <answer>1+1</answer>") == 0.0
    # An opening tag that is never closed is no answer.
    assert public("<answer>3*5+7</answer> or <answer>1+1") == 1.0
    assert public("<answer>1+1 <answer>3*5+7</answer>") == 1.0
    assert public("<answer>3*5+7</answer></answer> done") == 1.0
    assert public("<answer>3*5+7") == 0.0
    assert public("3*5+7</answer>") == 0.0
    assert public("</answer>3*5+7<answer>") == 0.0
    assert public("<ANSWER>3*5+7</ANSWER>") == 0.0
    assert public("") == 0.0


def test_text_around_the_tags_is_free() -> None:
    assert compute_score("countdown", "9**9 <think>\n1.5</think>\n<answer>3*5+7</answer>\nThat is it!", TRUTH) == 1.0


def test_answers_are_searched_only_near_the_end_of_the_text() -> None:
    answer = f"<answer>{RIGHT}</answer>"
    inside = "x" * 1000 + answer + "y" * (MAX_SEARCHED_CHARACTERS - len(answer))
    assert compute_score("countdown", inside, TRUTH) == 1.0
    assert compute_score("countdown", inside + "y", TRUTH) == 0.0


def test_the_public_layout_needs_tags_and_the_terse_one_refuses_them() -> None:
    tagged = f"<answer>{RIGHT}</answer>"
    assert compute_score("countdown", RIGHT, TRUTH) == 0.0
    assert compute_score("countdown", tagged, TRUTH) == 1.0
    assert compute_score("countdown_terse", RIGHT, TRUTH) == 1.0
    assert compute_score("countdown_terse", tagged, TRUTH) == 0.0


def test_the_terse_layout_skips_one_leading_equals_sign() -> None:
    assert compute_score("countdown_terse", "=3*5+7", TRUTH) == 1.0
    assert compute_score("countdown_terse", " = 3*5+7 = 22", TRUTH) == 1.0
    assert compute_score("countdown_terse", "==3*5+7", TRUTH) == 0.0
    assert compute_score("countdown", "<answer>=3*5+7</answer>", TRUTH) == 0.0


def test_terse_answers_end_with_the_text() -> None:
    assert compute_score("countdown_terse", "3*5+7 ok", TRUTH) == 0.0
    assert compute_score("countdown_terse", "3*5+7\n4 5 6=1:4+5", TRUTH) == 0.0


# --- binary, unless asked otherwise ---


def test_a_format_bonus_is_off_by_default_and_goes_to_well_formed_answers_only() -> None:
    wrong, junk, none = "<answer>3+5+7</answer>", "<answer>three</answer>", "I do not know"
    assert [compute_score("countdown", text, TRUTH) for text in (wrong, junk, none)] == [0.0, 0.0, 0.0]
    bonus = [compute_score("countdown", text, TRUTH, format_score=0.1) for text in (wrong, junk, none)]
    assert bonus == [0.1, 0.0, 0.0]
    assert compute_score("countdown", f"<answer>{RIGHT}</answer>", TRUTH, format_score=0.1) == 1.0


@pytest.mark.parametrize(("name", "meant"), [("formatscore", "format_score"), ("modes", "mode"), ("lay_out", "layout")])
def test_a_misspelled_setting_is_an_error_and_other_keywords_are_verls(name: str, meant: str) -> None:
    with pytest.raises(
        TypeError, match=rf"reward_kwargs\.{name}='x' has no effect; set .*reward_kwargs\.{meant} instead"
    ):
        compute_score("countdown", "", TRUTH, **{name: "x"})
    others = {"reward_router_address": None, "reward_model_tokenizer": None}
    assert compute_score("countdown", f"<answer>{RIGHT}</answer>", TRUTH, **others) == 1.0


@pytest.mark.parametrize("format_score", [-0.1, 1.0, 2.0, float("nan")])
def test_a_format_bonus_outside_its_range_is_refused(format_score: float) -> None:
    with pytest.raises(ValueError, match="format_score"):
        compute_score("countdown", "", TRUTH, format_score=format_score)


# --- what verl passes ---


@pytest.mark.parametrize(
    "truth",
    [
        {"target": 22, "numbers": (3, 7, 5)},
        {"target": np.int64(22), "numbers": np.array([3, 7, 5])},
        {"target": 22, "numbers": np.array([3, 7, 5], dtype=object)},
        json.dumps(TRUTH),
        {"target": 22, "numbers": [5, 3, 7], "more": "columns"},
    ],
)
def test_ground_truth_forms(truth: object) -> None:
    assert compute_score("countdown", f"<answer>{RIGHT}</answer>", truth) == 1.0
    assert compute_score("countdown", "<answer>3+5+7</answer>", truth) == 0.0


def test_a_ground_truth_that_pandas_made_floats_of_is_scored_as_integers(tmp_path: Path) -> None:
    """A column of numbers with a missing value is a column of floats."""
    pandas = pytest.importorskip("pandas")
    assert compute_score("countdown", "<answer>20+2</answer>", {"target": 22.0, "numbers": [2.0, 20.0]}) == 1.0
    frame = pandas.DataFrame({"target": [22, None], "first": [2, None], "second": [20, None]})
    row = frame.iloc[0]
    frame["truth"] = [{"target": row.target, "numbers": [row["first"], row.second]}, None]
    frame[["truth"]].to_parquet(tmp_path / "rows.parquet")
    truth = pandas.read_parquet(tmp_path / "rows.parquet").truth[0]
    assert str(truth["target"]) == "22.0"
    assert compute_score("countdown", "<answer>20+2</answer>", truth) == 1.0
    assert compute_score("countdown", "<answer>20-2</answer>", truth) == 0.0


@pytest.mark.parametrize(
    ("truth", "reason"),
    [
        (None, "NoneType"),
        ("22", "not a mapping"),
        ("{target: 22}", "not JSON"),
        ({}, "target"),
        ({"target": 22}, "numbers"),
        ({"target": 22, "nums": [3, 7, 5]}, "numbers"),
        ({"target": 22, "numbers": "3 7 5"}, "not a list"),
        ({"target": 22, "numbers": []}, "0 numbers"),
        ({"target": 22, "numbers": [1] * 17}, "17 numbers"),
        ({"target": 22.5, "numbers": [3, 7, 5]}, "22.5 is not an integer"),
        ({"target": float("nan"), "numbers": [3, 7, 5]}, "nan is not an integer"),
        ({"target": float("inf"), "numbers": [3, 7, 5]}, "inf is not an integer"),
        ({"target": 22, "numbers": [3, 7.25, 5]}, "7.25 is not an integer"),
        ({"target": None, "numbers": [3, 7, 5]}, "None is not an integer"),
        ({"target": True, "numbers": [3, 7, 5]}, "True is not an integer"),
        ({"target": 22, "numbers": [3, 7, "5"]}, "'5' is not an integer"),
        ({"target": 22, "numbers": [3, 7, -5]}, "negative"),
        ({"target": 10**9, "numbers": [3, 7, 5]}, "digits"),
        ({"target": 1, "numbers": [10**40]}, "digits"),
    ],
)
def test_a_malformed_ground_truth_stops_the_run(truth: object, reason: str) -> None:
    with pytest.raises(ValueError, match="malformed Countdown ground truth") as caught:
        compute_score("countdown", "anything", truth)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 700


def test_an_unknown_data_source_is_refused_unless_the_layout_is_named() -> None:
    with pytest.raises(ValueError, match=r"data_source='mine'.*reward_kwargs.layout"):
        compute_score("mine", RIGHT, TRUTH)
    assert compute_score("mine", RIGHT, TRUTH, layout="terse") == 1.0
    assert compute_score("mine", RIGHT, TRUTH, layout="public") == 0.0
    with pytest.raises(ValueError, match="layout='short'"):
        compute_score("mine", RIGHT, TRUTH, layout="short")


def test_a_solution_that_is_not_text_is_refused() -> None:
    with pytest.raises(TypeError, match="NoneType"):
        compute_score("countdown", None, TRUTH)  # type: ignore[arg-type]


def test_verl_loads_it_by_package_path_and_passes_its_keywords() -> None:
    reward = pytest.importorskip("verl.trainer.ppo.reward")
    from omegaconf import OmegaConf

    config = OmegaConf.create(
        {
            "reward": {
                "custom_reward_function": {
                    "path": "pkg://hpo_plugin.tasks.countdown.reward",
                    "name": "compute_score",
                    "reward_kwargs": {"format_score": 0.25},
                }
            }
        }
    )
    function = reward.get_custom_reward_fn(config)

    def scored(text: str) -> float:
        return function(
            data_source="countdown",
            solution_str=text,
            ground_truth=TRUTH,
            extra_info={"num_turns": None, "rollout_reward_scores": {}},
            reward_router_address="host:1",
            reward_model_tokenizer=None,
        )

    assert scored(f"<answer>{RIGHT}</answer>") == 1.0
    assert scored("<answer>3+5+7</answer>") == 0.25


def test_importing_the_reward_imports_nothing_heavy() -> None:
    code = (
        "import sys; from hpo_plugin.tasks.countdown import compute_score; "
        "heavy = {'numpy', 'pyarrow', 'rich', 'torch', 'datasets', 'verl'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- fuzzing ---

expression_text = st.text(alphabet="0123456789+-*/()= \n.<>answer!^", max_size=80)


def is_binary(value: float) -> bool:
    return type(value) is float and value in (0.0, 1.0)


@given(st.one_of(st.text(), expression_text, st.binary().map(lambda data: data.decode("utf-8", "surrogateescape"))))
@settings(max_examples=150, deadline=None)
def test_fuzz_any_text_scores_zero_or_one(text: str) -> None:
    assert is_binary(compute_score("countdown", text, TRUTH))
    assert is_binary(compute_score("countdown_terse", text, TRUTH))
    assert is_binary(compute_score("countdown", f"<answer>{text}</answer>", TRUTH))


@given(
    st.lists(st.integers(0, 99), min_size=1, max_size=8),
    st.randoms(use_true_random=False),
    st.integers(-2, 2),
)
@settings(max_examples=150, deadline=None)
def test_fuzz_random_valid_expressions_agree_with_fractions(
    numbers: list[int], rng: random.Random, offset: int
) -> None:
    expression = random_expression(numbers, rng)
    spaced = "".join(
        rng.choice(["", " ", "\n"]) + character if character in "+-*/()" else character for character in expression
    )
    try:
        value = reference_value(expression)
    except ZeroDivisionError:
        truth = {"target": 0, "numbers": numbers}
        assert judge(spaced, truth, layout="terse") is CountdownVerdict.DIVISION_BY_ZERO
        return
    target = max(-(10**8), min(10**8, int(value) + offset))
    verdict = judge(spaced, {"target": target, "numbers": numbers}, layout="terse")
    assert verdict is (CountdownVerdict.CORRECT if value == target else CountdownVerdict.WRONG_VALUE)


@given(st.text(alphabet="0123456789+-*/() ", max_size=24))
@settings(max_examples=250, deadline=None)
def test_fuzz_well_formed_means_what_python_means_less_its_extras(text: str) -> None:
    """A text judged well-formed is a Python expression of signs and + - * / over integers, and the reverse."""

    def closed(node: ast.AST) -> bool:
        if isinstance(node, ast.BinOp):
            operations = (ast.Add, ast.Sub, ast.Mult, ast.Div)
            return isinstance(node.op, operations) and closed(node.left) and closed(node.right)
        if isinstance(node, ast.UnaryOp):
            return isinstance(node.op, (ast.UAdd, ast.USub)) and closed(node.operand)
        return isinstance(node, ast.Constant) and isinstance(node.value, int)

    try:
        # Python refuses the leading zeros of 07, which the grammar ignores.
        plain = re.sub("[0-9]+", lambda run: str(int(run[0])), text.strip())
        well_formed = closed(ast.parse(plain, mode="eval").body) and all(
            int(run) < 10**9 for run in re.findall("[0-9]+", text)
        )
    except (SyntaxError, ValueError):
        well_formed = False
    verdict = judge(text, {"target": 1, "numbers": [1]}, layout="terse")
    assert (verdict is not CountdownVerdict.MALFORMED) == well_formed


# --- time ---

MEGABYTE = 1_000_000
ADVERSARIAL = {
    "a megabyte of prose": "word " * (MEGABYTE // 5),
    "a megabyte in tags": "<answer>" + "1+" * (MEGABYTE // 2) + "</answer>",
    "opening tags": "<answer>" * (MEGABYTE // 8),
    "closing tags": "</answer>" * (MEGABYTE // 9),
    "pairs of tags": "<answer></answer>" * (MEGABYTE // 17),
    "almost closing tags": "<answer>" + "</answer" * (MEGABYTE // 8),
    "almost opening tags": "<answer" * (MEGABYTE // 7) + "</answer>",
    "left brackets": "<" * MEGABYTE + "</answer>",
    "nested parentheses": "<answer>" + "(" * MEGABYTE + "1" + ")" * MEGABYTE + "</answer>",
    "nesting within the length": "<answer>" + "(" * 255 + "1" + ")" * 255 + "</answer>",
    "a giant integer": "<answer>" + "9" * MEGABYTE + "</answer>",
    "a giant right side": "<answer>1=" + "9" * 500 + "</answer>",
    "large products": "<answer>" + "*".join(["999999999"] * 51) + "</answer>",
    "large fractions": "<answer>" + "+".join(["1/999999999"] * 42) + "</answer>",
    "many operators": "<answer>" + "/".join(["9"] * 256) + "</answer>",
    "spaces": "<answer>" + " " * MEGABYTE + "</answer>",
    "fractions": "<answer>" + r"\frac{" * 80 + "1" + "}{1}" * 8 + "</answer>",
    "closed fractions": "<answer>" + r"\frac{1}{" * 45 + "1" + "}" * 45 + "</answer>",
    "boxes": "<answer>" + r"\boxed{" * 63 + "}" * 63 + "</answer>",
    "boxes and periods": "<answer>" + r"\boxed{" * 50 + "1" + "}." * 50 + "</answer>",
    "signs": "<answer>" + "-" * 500 + "1</answer>",
    "commands": "<answer>" + r"\left" * 100 + "</answer>",
    "blanks after commands": "<answer>" + r"\frac" + " " * 490 + "</answer>",
    "unicode": "\U0001f600" * (MEGABYTE // 4) + "<answer>٣</answer>",
}


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("data_source", ["countdown", "countdown_terse"])
def test_no_text_takes_more_than_a_few_milliseconds(name: str, data_source: str) -> None:
    text = ADVERSARIAL[name]
    times = []
    for _ in range(5):
        begin = time.process_time()
        assert compute_score(data_source, text, TRUTH) == 0.0
        times.append(time.process_time() - begin)
    # CPU time and the best of five, because other processes share the machine.
    assert min(times) < 0.005
