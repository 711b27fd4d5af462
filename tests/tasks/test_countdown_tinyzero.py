"""The mode tinyzero: the decision of the public scorer, compared with Python's own ``eval``; nothing is executed."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import warnings
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from hpo_plugin.tasks.countdown.reward import MAX_ANSWER_CHARACTERS, CountdownVerdict, compute_score, judge
from hpo_plugin.tasks.countdown.tinyzero import MAX_POWER_BITS, tinyzero_value

TRUTH = {"target": 22, "numbers": [3, 7, 5]}
RIGHT = "<answer>3*5+7</answer>"


def tinyzero(response: str, truth: dict[str, Any] | None = None, **keywords: Any) -> float:
    return compute_score("countdown", response, truth or TRUTH, mode="tinyzero", **keywords)


def decision_by_eval(response: str, truth: dict[str, Any]) -> float:
    """What the public scorer gives for a chat prompt and a response: 1, 0.1 for another answer, 0 without an answer.

    Its steps, with Python's ``eval`` itself. The texts of these tests are short, and their powers are small.
    """
    text = f"<|im_start|>user\nUsing the numbers [3, 7, 5], ...<|im_end|>\n<|im_start|>assistant\n{response}"
    marker = next(known for known in ("Assistant:", "<|im_start|>assistant") if known in text)
    found = [match[1] for match in re.finditer("<answer>(.*?)</answer>", text.split(marker, 1)[1].split("\n")[-1])]
    if not found:
        return 0.0
    answer = found[-1].strip()
    if sorted(map(int, re.findall(r"\d+", answer))) != sorted(truth["numbers"]):
        return 0.1
    if not re.match(r"^[-\d+*/().\s]+$", answer):
        return 0.1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return 1.0 if abs(eval(answer, {"__builtins__": None}, {}) - truth["target"]) < 1e-5 else 0.1
    except Exception:
        return 0.1


def agree(response: str, truth: dict[str, Any]) -> float:
    expected = decision_by_eval(response, truth)
    assert tinyzero(response, truth, format_score=0.1) == expected
    assert tinyzero(response, truth) == float(expected == 1.0)
    verdict = judge(response, truth, mode="tinyzero")
    assert (verdict is CountdownVerdict.CORRECT) == (expected == 1.0)
    assert (verdict is CountdownVerdict.NO_ANSWER) == (expected == 0.0)
    return expected


# --- what an answer is ---

PIECES = ["<answer>", "</answer>", "<answer>", "</answer>", "3*5+7", "1+1", " ", "\n", "\r", "\x0b", "\u2028"]
PIECES += ["Assistant:", "<|im_start|>assistant", "<answer", "answer>", "<", "x"]


@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
@example(f"{RIGHT} Assistant: {RIGHT}")
@example(f"{RIGHT}<|im_start|>assistant")
@example("<answer><answer>3*5+7</answer></answer>")
@example("<answer>1</answer></answer><answer>3*5+7</answer></answer><answer>")
@settings(max_examples=600, deadline=None)
def test_the_same_answer_is_found(response: str) -> None:
    agree(response, TRUTH)


# --- what an answer is worth ---

TOKENS = [
    "+",
    "-",
    "*",
    "/",
    "**",
    "//",
    "(",
    ")",
    "(",
    ")",
    ".",
    " ",
    "\t",
    "1",
    "2",
    "3",
    "5",
    "7",
    "0",
    "12",
    "2.",
    ".5",
]


def truths(answer: str) -> list[dict[str, Any]]:
    """Ground truths that an answer is close to meet: the numbers that it holds, and the target that it reaches."""
    numbers = [int(run) for run in re.findall("[0-9]+", answer)]
    targets = {0, 1, 22}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = eval(answer.strip(), {"__builtins__": None}, {})
        targets |= {round(value.real), round(value.real) + 1}
    except Exception:
        pass
    return [{"target": target, "numbers": numbers} for target in targets if abs(target) < 10**9]


def with_small_powers(answer: str) -> bool:
    """Whether ``eval`` is quick: no power of large numbers, and no power of a power of more than small ones."""
    runs = [int(run) for run in re.findall("[0-9]+", answer)]
    if not runs or len(runs) > 16 or max(runs) >= 10**9:
        return False
    powers = answer.count("**")
    return powers == 0 or (max(runs) <= 12 and len(runs) <= 4 and powers == 1) or (max(runs) <= 3 and len(runs) <= 3)


@given(st.lists(st.sampled_from(TOKENS), min_size=1, max_size=16).map("".join))
@example("3**2")
@example("2**-1*4")
@example("(-2)**.5")
@example("-((-2)**.5)**2")
@example("2//3*5")
@example("-7//2")
@example("7.//2.")
@example("5.(3)")
@example("5(3)")
@example("()")
@example("3*()")
@example("...")
@example("3+...")
@example("1..5")
@example("1.5.")
@example("007.5")
@example("007")
@example("00")
@example("1 2")
@example("(\n3)")
@example("3\x0c+5")
@example("3\r+5")
@example("(3\r\n+5)")
@example("3+\\\n5")
@example("+-+-3")
@example("- -3")
@example("3- -5")
@example("*3")
@example("(*3)")
@example("5(*3)")
@example("5(**3)")
@example("0**-1")
@example("0.**-1")
@example("1/3*3")
@example("12**12**2")
@example("3/0")
@example("3\u00a0+5")
@example("\u00a03+5\u3000")
@example("٣+5")
@example("1_0")
@settings(max_examples=1500, deadline=None)
def test_the_decision_is_that_of_eval(answer: str) -> None:
    assume(with_small_powers(answer) or not re.search("[0-9]", answer))
    for truth in truths(answer) or [TRUTH]:
        if truth["numbers"]:
            agree(f"<answer>{answer}</answer>", truth)
        agree(f"<answer>{answer}</answer>", TRUTH)


@given(
    st.recursive(
        st.sampled_from(["1", "2", "3", "7", "12", "2.", "0.5", ".5", "0"]),
        lambda part: st.one_of(
            st.tuples(
                st.sampled_from(["({}{}{})", "{}{}{}"]),
                part,
                st.sampled_from(["+", "-", "*", "/", "//", " - ", "*-"]),
                part,
            ).map(lambda drawn: drawn[0].format(*drawn[1:])),
            st.tuples(st.sampled_from("+-"), part).map("".join),
            part.map("({})".format),
        ),
        max_leaves=7,
    ),
    st.sampled_from(["{}", "({})**2", "({})**.5", "2**({})", "({})**-1"]),
)
@settings(max_examples=600, deadline=None)
def test_the_decision_is_that_of_eval_on_expressions(inner: str, outer: str) -> None:
    assume(outer != "2**({})" or with_small_powers(outer.format(inner)))
    answer = outer.format(inner)
    for truth in truths(answer):
        agree(f"<answer>{answer}</answer>", truth)


def test_every_answer_earns_the_format_score() -> None:
    for answer in ("3+5+7", "3", "three", "9**9**9**9", "", "x" * 600):
        assert tinyzero(f"<answer>{answer}</answer>", format_score=0.1) == 0.1
    assert tinyzero("3*5+7", format_score=0.1) == 0.0


# --- bounds, the two documented differences ---


def test_a_power_beyond_the_bound_is_refused_and_one_below_is_computed() -> None:
    assert tinyzero_value("2**30000-2**30000+22") == 22
    assert tinyzero_value("2**70000-2**70000+22") is None
    assert 2 * 32767 < MAX_POWER_BITS < 2 * 32769
    assert tinyzero_value("2**32767") == 2**32767
    assert tinyzero_value("2**32769") is None
    # One and zero have no large powers.
    assert tinyzero_value("(1-2)**999999999+0**999999999") == -1
    assert tinyzero_value("9**9**9**9") is None
    assert tinyzero_value("2**-999999999") == 0.0


def test_an_answer_beyond_the_bound_is_refused() -> None:
    def padded(length: int) -> float:
        return tinyzero(f"<answer>3*5{' ' * (length - 5)}+7</answer>")

    assert padded(MAX_ANSWER_CHARACTERS) == 1.0
    assert padded(MAX_ANSWER_CHARACTERS + 1) == 0.0


HOSTILE = {
    "opening tags": "<answer>" * 32_768,
    "closing tags": "</answer>" * 29_127,
    "pairs of tags": "<answer></answer>" * 15_420,
    "lines": f"{RIGHT}\n" * 10_000,
    "markers": "Assistant:" * 26_000,
    "digits": f"<answer>{'9' * 262_000}</answer>",
    "signs": f"<answer>3*5+7+{'-' * 490}0</answer>",
    "calls": f"<answer>3*5+7{'()' * 240}</answer>",
    "nested calls": f"<answer>3*5+7{'(' * 190}{')' * 190}</answer>",
    "nested stars": f"<answer>3*5+7{'(**' * 160}</answer>",
    "a tower": f"<answer>{'**'.join(['9'] * 16)}</answer>",
    "large powers": f"<answer>{'*'.join(['9**20000'] * 8)}</answer>",
    "large quotients": f"<answer>{'//7*'.join(['9**20000'] * 7)}</answer>",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_text_takes_more_than_a_few_milliseconds(name: str) -> None:
    text = HOSTILE[name]
    numbers = [int(run) for run in re.findall("[0-9]+", text[:MAX_ANSWER_CHARACTERS]) if len(run) < 9][:16]
    times = []
    for _ in range(5):
        begin = time.process_time()
        tinyzero(text, {"target": 22, "numbers": numbers or [1]})
        times.append(time.process_time() - begin)
    assert min(times) < 0.005


# --- how the mode is chosen ---


def test_an_unknown_mode_is_refused_with_its_key_value_and_remedy() -> None:
    with pytest.raises(
        ValueError, match=r"reward_kwargs\.mode='public' is not one of exact, tinyzero; remove it to use exact"
    ):
        compute_score("countdown", RIGHT, TRUTH, mode="public")
    with pytest.raises(ValueError, match=r"reward_kwargs\.mode=None is not one of"):
        compute_score("countdown", "", TRUTH, mode=None)  # type: ignore[arg-type]


def test_the_mode_needs_the_layout_with_tags() -> None:
    with pytest.raises(
        ValueError, match=r"mode='tinyzero' does not apply to layout='terse'.*mode=exact, or set layout=public"
    ):
        compute_score("countdown_terse", "3*5+7", TRUTH, mode="tinyzero")
    assert compute_score("countdown_terse", RIGHT, TRUTH, mode="tinyzero", layout="public") == 1.0


def test_verl_passes_the_mode() -> None:
    reward = pytest.importorskip("verl.trainer.ppo.reward")
    from omegaconf import OmegaConf

    path = "pkg://hpo_plugin.tasks.countdown.reward"
    function = {"path": path, "name": "compute_score", "reward_kwargs": {"mode": "tinyzero", "format_score": 0.1}}
    score = reward.get_custom_reward_fn(OmegaConf.create({"reward": {"custom_reward_function": function}}))
    given_by_verl = {"data_source": "countdown", "ground_truth": {"target": 9, "numbers": [2, 3]}, "extra_info": {}}
    assert score(solution_str="<answer>3**2</answer>", **given_by_verl) == 1.0
    assert score(solution_str="<answer>3^2</answer>", **given_by_verl) == 0.1


def test_nothing_is_executed() -> None:
    """Under an audit hook that refuses to run code, every decision is still made."""
    code = (
        "import sys\n"
        "from hpo_plugin.tasks.countdown.reward import compute_score\n"
        "from hpo_plugin.tasks.countdown.tinyzero import tinyzero_value\n"
        "assert tinyzero_value('3*5+7') == 22\n"
        "events = []\n"
        "sys.addaudithook(lambda event, arguments: events.append(event))\n"
        "for answer in ('3*5+7', '3**2', '2(3)', '9**9**9**9', '__import__(1)'):\n"
        "    truth = {'target': 9, 'numbers': [2, 3]}\n"
        "    compute_score('countdown', f'<answer>{answer}</answer>', truth, mode='tinyzero')\n"
        "assert set(events) <= {'compile'}, events\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
