r"""The Countdown reward: a small closed grammar, exact arithmetic, and bounds on everything.

The text comes from a model that is being optimized against this function, so it is treated as hostile: nothing of it
is ever executed, every size is bounded before work is done on it, and no text makes :func:`compute_score` raise.

The grammar of an answer (blanks may stand between tokens)::

    answer   = box{ side } | box{ equation } | side | equation
    equation = side "=" target | target "=" side
    side     = expr | box{ expr }
    expr     = term  { ("+" | "-") term }
    term     = factor { ("*" | "/") factor }
    factor   = ("+" | "-") factor | integer | "(" expr ")" | "\frac{" expr "}{" expr "}"
    integer  = ASCII digits [ "." ]

The tokenizer reads the spellings of :data:`SPELLINGS` (``×``, ``\times``, ``−``, …) as the four operators, and skips
what shows nothing or a blank: whitespace, ``$``, ``\(``, ``\,``, ``\left``. A period may end the answer. There is no
decimal fraction, no power, no factorial, no floor division, no implicit multiplication and no grouping by braces. Every
given number must be used exactly once. docs/countdown.md lists forms with the decision and the reason.

This module imports the standard library only: verl loads it in each of its reward workers.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from enum import Enum
from functools import cache
from operator import index
from typing import Any

from hpo_plugin.tasks.countdown.tinyzero import tinyzero_answer, tinyzero_close, tinyzero_uses, tinyzero_value

#: ``data_source`` of a row in the public layout: the answer stands in ``<answer>`` tags.
PUBLIC_DATA_SOURCE = "countdown"
#: ``data_source`` of a row in the terse layout: the whole response is the answer.
TERSE_DATA_SOURCE = "countdown_terse"
#: Layout name -> the ``data_source`` its rows carry.
DATA_SOURCES = {"public": PUBLIC_DATA_SOURCE, "terse": TERSE_DATA_SOURCE}
#: ``exact``: the grammar of this module. ``tinyzero``: the decision of the public scorer.
MODES = ("exact", "tinyzero")

#: Only this many characters at the end of a response are searched for answer tags.
MAX_SEARCHED_CHARACTERS = 262_144
#: A longer answer is malformed.
MAX_ANSWER_CHARACTERS = 512
#: Deeper nesting of parentheses is malformed; Python's own limit. A fraction counts as two.
MAX_DEPTH = 200
#: Integers with more digits, leading zeros aside, are malformed in an answer and refused in a ground truth.
MAX_DIGITS = 9
#: A ground truth with more numbers is refused.
MAX_NUMBERS = 16

#: Other spellings of the operators.
SPELLINGS = {
    **dict.fromkeys(("×", "·", "⋅", "∙", "∗", "x", r"\times", r"\cdot", r"\ast"), "*"),
    **dict.fromkeys(("÷", "∕", "⁄", r"\div"), "/"),
    **dict.fromkeys(("−", "–"), "-"),
    r"\dfrac": r"\frac",
    r"\tfrac": r"\frac",
}

_OPEN, _CLOSE = "<answer>", "</answer>"
#: A blank, or else a token; the last alternative is any other character, such as an operator.
_TOKEN = re.compile(
    r"""
    \s+ | [$~] | \\[,;:!()\[\]\ ] | \\q?quad(?![A-Za-z]) | \\left(?=\s*\() | \\right(?=\s*\))
    | (
        [0-9]+ (?:\.(?![0-9.]))?
        | \\(?:times|cdot|ast|div)(?![A-Za-z]) | \\(?:[dt]?frac|boxed)(?=\s*\{)
        | \S
    )""",
    re.VERBOSE,
)
#: A level of parentheses in which nothing has been read: 0 + 1 * (what comes first).
_EMPTY_LEVEL = (0, 1, 1, 1, 1, False)
_INTEGER_LIMIT = 10**MAX_DIGITS


class CountdownVerdict(str, Enum):
    """The verdict on an answer: correct, or the reason why it is not."""

    CORRECT = "correct"
    #: Public layout: there is no ``<answer>…</answer>``.
    NO_ANSWER = "no_answer"
    #: Not an expression of the grammar, or beyond one of its bounds.
    MALFORMED = "malformed"
    #: Well-formed, but a number is missing, repeated or not among those given.
    WRONG_NUMBERS = "wrong_numbers"
    #: Well-formed with the right numbers, and somewhere divides by zero.
    DIVISION_BY_ZERO = "division_by_zero"
    #: Well-formed with the right numbers, and its value (or its right side) is not the target.
    WRONG_VALUE = "wrong_value"


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    *,
    format_score: float = 0.0,
    layout: str | None = None,
    mode: str = "exact",
    **kwargs: Any,
) -> float:
    """Score one response, in verl's reward interface (``reward.custom_reward_function``).

    Binary by default: 1.0 for a correct answer, 0.0 for every other text. No text makes it raise, and the work done for
    a text is bounded. What does raise is a row or a setting that cannot be scored, because a bad reward must stop a run
    rather than train on zeros.

    Args:
        data_source: ``countdown`` (public layout) or ``countdown_terse`` (terse layout), as written by
            ``hpo-plugin prepare countdown``.
        solution_str: The decoded response, without the prompt.
        ground_truth: ``{"target": int, "numbers": list[int]}``; the mapping may also be a JSON string, and the numbers
            any sequence or array of integers.
        extra_info: Not used; part of verl's interface.
        format_score: What a well-formed but incorrect answer earns, in [0, 1). Anything above 0 makes the reward
            non-binary and changes the sign counts of A-HPO. Set by
            ``reward.custom_reward_function.reward_kwargs.format_score``. In the mode ``tinyzero``, every answer that is
            not correct earns it, malformed ones included.
        layout: ``public`` or ``terse``; overrides the layout that ``data_source`` implies, for data sets with names of
            their own. Set by ``reward.custom_reward_function.reward_kwargs.layout``.
        mode: ``exact``, or ``tinyzero`` for the decision of the public scorer, which needs the public layout. Set by
            ``reward.custom_reward_function.reward_kwargs.mode``.
        **kwargs: Other keywords of verl's reward managers; ignored, unless they resemble a setting.

    Returns:
        1.0, 0.0, or ``format_score``.

    Raises:
        ValueError: If ``ground_truth`` is malformed, if ``data_source`` implies no layout and none is given, if
            ``format_score`` is outside [0, 1), or if ``mode`` is unknown or does not apply to the layout.
        TypeError: If ``solution_str`` is not a string, or a keyword is a misspelled setting.
    """
    for name in kwargs:
        if meant := _misspelled(name):
            raise TypeError(
                f"reward.custom_reward_function.reward_kwargs.{name}={kwargs[name]!r} has no effect; set "
                f"reward.custom_reward_function.reward_kwargs.{meant} instead"
            )
    if not 0.0 <= format_score < 1.0:
        raise ValueError(
            f"reward.custom_reward_function.reward_kwargs.format_score={format_score!r} must be in [0, 1), so "
            "that a wrong answer earns less than a correct one"
        )
    verdict = judge(solution_str, ground_truth, layout=_layout_of(data_source, layout), mode=mode)
    if verdict is CountdownVerdict.CORRECT:
        return 1.0
    if verdict is CountdownVerdict.NO_ANSWER or (verdict is CountdownVerdict.MALFORMED and mode == "exact"):
        return 0.0
    return float(format_score)


@cache
def _misspelled(name: str) -> str | None:
    """The setting that a keyword resembles."""
    return next(iter(difflib.get_close_matches(name, ("format_score", "layout", "mode"), 1)), None)


def judge(solution_str: str, ground_truth: Any, *, layout: str = "public", mode: str = "exact") -> CountdownVerdict:
    """Judge a response: correct, or the reason why it is not.

    Args:
        solution_str: The decoded response, without the prompt.
        ground_truth: As in :func:`compute_score`.
        layout: ``public``: the last ``<answer>…</answer>`` counts, text around it is free. ``terse``: the whole
            response is the answer; one leading ``=`` is skipped.
        mode: As in :func:`compute_score`. In the mode ``tinyzero``, ``CORRECT`` is the decision of the public scorer,
            ``NO_ANSWER`` is where it finds no answer, and the other verdicts say why it is not correct.

    Returns:
        The verdict.

    Raises:
        ValueError: If ``ground_truth`` is malformed, ``layout`` or ``mode`` is unknown, or the mode does not apply to
            the layout.
        TypeError: If ``solution_str`` is not a string.
    """
    target, numbers = read_ground_truth(ground_truth)
    if not isinstance(solution_str, str):
        raise TypeError(f"solution_str must be the decoded response (str), got {type(solution_str).__name__}")
    if mode not in MODES:
        raise ValueError(
            f"reward.custom_reward_function.reward_kwargs.mode={mode!r} is not one of {', '.join(MODES)}; "
            "remove it to use exact"
        )
    if mode == "tinyzero":
        if layout != "public":
            raise ValueError(
                f"reward.custom_reward_function.reward_kwargs.mode={mode!r} does not apply to layout={layout!r}: the "
                "public scorer reads <answer> tags. Set mode=exact, or set layout=public for data with tags"
            )
        return _judge_as_tinyzero(solution_str, target, numbers)
    if layout == "public":
        answer = last_answer(solution_str)
        if answer is None:
            return CountdownVerdict.NO_ANSWER
    elif layout == "terse":
        if len(solution_str) > MAX_ANSWER_CHARACTERS:
            return CountdownVerdict.MALFORMED
        answer = solution_str.lstrip(" \t\r\n").removeprefix("=")
    else:
        raise ValueError(f"layout={layout!r} is not one of {', '.join(DATA_SOURCES)}")
    return _judge_answer(answer, target, numbers)


def last_answer(text: str) -> str | None:
    """Return what stands in the last ``<answer>…</answer>`` of a text, or None if there is none.

    The last opening tag that is followed by a closing one counts, up to the first closing tag after it; an opening tag
    that is never closed is not an answer and does not hide an earlier one. Only the last
    :data:`MAX_SEARCHED_CHARACTERS` characters are searched.
    """
    start = max(0, len(text) - MAX_SEARCHED_CHARACTERS)
    closing = text.rfind(_CLOSE, start)
    if closing < 0:
        return None
    opening = text.rfind(_OPEN, start, closing)
    if opening < 0:
        return None
    begin = opening + len(_OPEN)
    return text[begin : text.find(_CLOSE, begin, closing + len(_CLOSE))]


def read_ground_truth(ground_truth: Any) -> tuple[int, tuple[int, ...]]:
    """Check a ground truth and return its target and its numbers in ascending order.

    Args:
        ground_truth: ``{"target": int, "numbers": list[int]}`` or that as a JSON string. Numbers may be a list, a
            tuple, or anything with ``tolist()`` (a numpy array, a tensor); integers may be floats, as pandas makes them
            in a column with missing values.

    Raises:
        ValueError: If it is anything else, naming what is wrong.
    """
    given = ground_truth
    if isinstance(given, (str, bytes)):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise _bad_ground_truth(ground_truth, f"it is a string but not JSON ({error})") from error
    if not isinstance(given, (dict, Mapping)):
        raise _bad_ground_truth(ground_truth, f"it is a {type(given).__name__}, not a mapping")
    if "target" not in given or "numbers" not in given:
        raise _bad_ground_truth(ground_truth, "the keys 'target' and 'numbers' are required")
    numbers = given["numbers"]
    if not isinstance(numbers, (list, tuple)) and hasattr(numbers, "tolist"):
        numbers = numbers.tolist()
    if not isinstance(numbers, (list, tuple)):
        raise _bad_ground_truth(ground_truth, f"'numbers' is a {type(numbers).__name__}, not a list")
    if not 1 <= len(numbers) <= MAX_NUMBERS:
        raise _bad_ground_truth(ground_truth, f"'numbers' holds {len(numbers)} numbers, not 1 to {MAX_NUMBERS}")
    checked = [value if type(value) is int else _integer(value, ground_truth) for value in (given["target"], *numbers)]
    if max(checked) >= _INTEGER_LIMIT or min(checked) <= -_INTEGER_LIMIT:
        raise _bad_ground_truth(ground_truth, f"an integer has more than {MAX_DIGITS} digits")
    target, *integers = checked
    if min(integers) < 0:
        raise _bad_ground_truth(ground_truth, "'numbers' holds a negative number, which an answer cannot contain")
    integers.sort()
    return target, tuple(integers)


def _integer(value: Any, ground_truth: Any) -> int:
    # True and False are integers to Python, and a sign of mixed-up columns here.
    if not isinstance(value, bool):
        try:
            return index(value)
        except TypeError:
            if hasattr(value, "is_integer") and value.is_integer():
                return int(value)
    raise _bad_ground_truth(ground_truth, f"{value!r} is not an integer")


def _bad_ground_truth(ground_truth: Any, reason: str) -> ValueError:
    shown = repr(ground_truth)
    if len(shown) > 200:
        shown = f"{shown[:200]}…"
    return ValueError(
        f'malformed Countdown ground truth {shown}: {reason}. Expected {{"target": int, "numbers": [int, …]}} in the '
        "column reward_model.ground_truth, as written by `hpo-plugin prepare countdown`."
    )


def _layout_of(data_source: str, layout: str | None) -> str:
    if layout is not None:
        if layout not in DATA_SOURCES:
            raise ValueError(
                f"reward.custom_reward_function.reward_kwargs.layout={layout!r} is not one of {', '.join(DATA_SOURCES)}"
            )
        return layout
    if data_source == PUBLIC_DATA_SOURCE:
        return "public"
    if data_source == TERSE_DATA_SOURCE:
        return "terse"
    raise ValueError(
        f"data_source={data_source!r} is neither {PUBLIC_DATA_SOURCE!r} nor {TERSE_DATA_SOURCE!r}; set "
        "reward.custom_reward_function.reward_kwargs.layout to public or terse"
    )


def _judge_as_tinyzero(response: str, target: int, numbers: tuple[int, ...]) -> CountdownVerdict:
    answer = tinyzero_answer(response)
    if answer is None:
        return CountdownVerdict.NO_ANSWER
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return CountdownVerdict.MALFORMED
    if not tinyzero_uses(answer, numbers):
        return CountdownVerdict.WRONG_NUMBERS
    value = tinyzero_value(answer)
    if value is None:
        return CountdownVerdict.MALFORMED
    return CountdownVerdict.CORRECT if tinyzero_close(value, target) else CountdownVerdict.WRONG_VALUE


def _judge_answer(answer: str, target: int, numbers: tuple[int, ...]) -> CountdownVerdict:
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return CountdownVerdict.MALFORMED
    tokens = _unboxed([SPELLINGS.get(token, token) for token in _TOKEN.findall(answer) if token])
    claimed: int | None = target
    if "=" in tokens:
        equals = tokens.index("=")
        left, right = _unboxed(tokens[:equals]), _unboxed(tokens[equals + 1 :])
        tokens, claimed = left, _integer_of(right)
        if claimed is None:
            tokens, claimed = right, _integer_of(left)
    parsed = None if claimed is None else _parse(tokens)
    if parsed is None:
        return CountdownVerdict.MALFORMED
    numerator, denominator, literals = parsed
    literals.sort()
    if tuple(literals) != numbers:
        return CountdownVerdict.WRONG_NUMBERS
    if denominator == 0:
        return CountdownVerdict.DIVISION_BY_ZERO
    if numerator != target * denominator or claimed != target:
        return CountdownVerdict.WRONG_VALUE
    return CountdownVerdict.CORRECT


def _unboxed(tokens: list[str]) -> list[str]:
    r"""Return tokens without a final period, and without the ``\boxed{…}`` that holds all of them."""
    while tokens:
        if tokens[-1] == ".":
            tokens = tokens[:-1]
        elif tokens[0] == r"\boxed" and _closing_brace(tokens) == len(tokens) - 1:
            tokens = tokens[2:-1]
        else:
            break
    return tokens


def _closing_brace(tokens: list[str]) -> int:
    """Return the position of the brace that closes the first one, or -1."""
    depth = 0
    for position, token in enumerate(tokens):
        if token == "{":
            depth += 1
        elif token == "}":
            depth -= 1
            if depth == 0:
                return position
    return -1


def _integer_of(tokens: list[str]) -> int | None:
    """Return the value of an integer with at most one sign; None for anything else."""
    negative = tokens[:1] == ["-"]
    digits = tokens[1:] if negative or tokens[:1] == ["+"] else tokens
    if len(digits) != 1 or digits[0][0] not in "0123456789":
        return None
    value = int(digits[0].rstrip("."))
    return None if value >= _INTEGER_LIMIT else -value if negative else value


def _expand_fractions(tokens: list[str]) -> list[str] | None:
    r"""Write each ``\frac{a}{b}`` as ``((a)/(b))``; return None if its braces and the parentheses do not match."""
    expanded: list[str] = []
    # For each open parenthesis or brace what closes it: ")/(" ends a numerator, "))" a denominator.
    closing: list[str] = []
    following = iter(tokens)
    for token in following:
        if token == r"\frac":
            next(following)  # The tokenizer saw the brace.
            expanded += "(("
            closing.append(")/(")
        elif token == "(":
            expanded.append(token)
            closing.append(token)
        elif token == ")":
            if not closing or closing.pop() != "(":
                return None
            expanded.append(token)
        elif token == "}":
            if not closing or closing[-1] == "(":
                return None
            closed = closing.pop()
            expanded += closed
            if closed == ")/(":
                if next(following, "") != "{":
                    return None
                closing.append("))")
        else:
            expanded.append(token)
    return None if closing else expanded


def _parse(tokens: list[str]) -> tuple[int, int, list[int]] | None:
    """Parse and evaluate an expression with a stack of its own, so that no text can exhaust Python's.

    Each level of parentheses holds a sum so far, the term being multiplied up, and the operations that are pending.
    Values are pairs of integers (numerator, denominator), which is exact and several times faster than ``Fraction``;
    they are not reduced, because the bound on the length of the text bounds their size.

    Returns:
        Numerator, denominator (0 if the expression divides by zero anywhere) and the integers in the text; or None if
        the tokens are not an expression of the grammar.
    """
    if r"\frac" in tokens:
        expanded = _expand_fractions(tokens)
        if expanded is None:
            return None
        tokens = expanded
    literals: list[int] = []
    enclosing: list[tuple[int, int, int, int, int, bool]] = []
    divides_by_zero = False
    operand_expected = True
    sum_above, sum_below, sign, term_above, term_below, dividing = _EMPTY_LEVEL
    for token in tokens:
        if operand_expected:
            if token == "(":
                if len(enclosing) == MAX_DEPTH:
                    return None
                enclosing.append((sum_above, sum_below, sign, term_above, term_below, dividing))
                sum_above, sum_below, sign, term_above, term_below, dividing = _EMPTY_LEVEL
                continue
            if token == "-":
                # The sign of a factor is a sign of its term.
                term_above = -term_above
                continue
            if token == "+":
                continue
            if token[0] not in "0123456789":
                return None
            above, below = int(token.rstrip(".")), 1
            if above >= _INTEGER_LIMIT:
                return None
            literals.append(above)
            operand_expected = False
        elif token == "*" or token == "/":
            dividing = token == "/"
            operand_expected = True
            continue
        elif token == "+" or token == "-":
            sum_above = sum_above * term_below + sign * term_above * sum_below
            sum_below *= term_below
            sign = 1 if token == "+" else -1
            term_above, term_below, dividing = 1, 1, False
            operand_expected = True
            continue
        elif token == ")" and enclosing:
            above = sum_above * term_below + sign * term_above * sum_below
            below = sum_below * term_below
            sum_above, sum_below, sign, term_above, term_below, dividing = enclosing.pop()
        else:
            return None
        # A number, or the value of a pair of parentheses, joins the term.
        if not dividing:
            term_above *= above
            term_below *= below
        elif above:
            term_above *= below
            term_below *= above
        else:
            # The rest is still parsed: whether a text is well-formed does not depend on its value.
            divides_by_zero = True
    if operand_expected or enclosing:
        return None
    numerator = sum_above * term_below + sign * term_above * sum_below
    return numerator, 0 if divides_by_zero else sum_below * term_below, literals
