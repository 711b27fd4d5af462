r"""The decision of the public Countdown scorer (TinyZero), loopholes included, without executing model output.

The public scorer passes the answer to Python's ``eval`` if it holds only digits, ``+ - * / ( ) .`` and blanks. Python
then accepts more than arithmetic: ``**``, ``//``, decimal points, calls. Here ``ast.parse`` reads the answer, which
executes nothing, and a walk over the tree computes with Python's own numbers, so that integers, floats and complex
numbers mix as they do there. A call, an empty tuple or an ellipsis cannot become a number and ends the walk.

Two bounds, beyond which an answer is not correct: ``MAX_ANSWER_CHARACTERS`` of the reward, and
:data:`MAX_POWER_BITS`. Without the second one, ``9**9**9**9`` does not finish.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

#: An integer power that may have more bits is not computed. The integer results of an answer have no more bits in all.
MAX_POWER_BITS = 65_536

_ALLOWED = re.compile(r"[\d+\-*/().\s]+")
_DIGITS = re.compile(r"\d+")
#: The public scorer drops what precedes this marker. The prompt of a chat model does not contain it; a response may.
_MARKER = "Assistant:"
_TOLERANCE = 1e-5


def tinyzero_answer(response: str) -> str | None:
    """Return the last ``<answer>…</answer>`` in the last line of a response, or None.

    Args:
        response: What follows the chat template's ``<|im_start|>assistant``. Text up to the first ``Assistant:`` in it
            is dropped, as the public scorer does.
    """
    before, marker, after = response.partition(_MARKER)
    line = (after if marker else before).rpartition("\n")[2]
    # The public scorer matches from the left, where repeated opening tags take quadratic time. The last match ends at
    # the first closing tag after the last opening tag that has one. It begins at the first opening tag after the
    # closing tag before that, because no match contains a closing tag.
    last_opening = line.rfind("<answer>", 0, max(0, line.rfind("</answer>")))
    if last_opening < 0:
        return None
    previous_closing = line.rfind("</answer>", 0, last_opening)
    begin = line.find("<answer>", max(0, previous_closing)) + len("<answer>")
    return line[begin : line.find("</answer>", last_opening)].strip()


def tinyzero_uses(answer: str, numbers: Sequence[int]) -> bool:
    """Return whether the runs of digits in an answer are the given numbers, each once.

    Args:
        answer: The answer, of at most ``MAX_ANSWER_CHARACTERS`` characters.
        numbers: The given numbers in ascending order.
    """
    return sorted(map(int, _DIGITS.findall(answer))) == list(numbers)


def tinyzero_value(answer: str) -> Any:
    """Return the number that Python's ``eval`` gives for an answer, or None where it raises or gives another object.

    Args:
        answer: The answer, of at most ``MAX_ANSWER_CHARACTERS`` characters.
    """
    if _ALLOWED.fullmatch(answer) is None:
        return None
    try:
        return _value(ast.parse(answer, mode="eval").body, [])
    except (SyntaxError, ArithmeticError, TypeError, RecursionError, MemoryError):
        return None


def tinyzero_close(value: Any, target: int) -> bool:
    """Return whether a value is within 1e-5 of the target; the modulus counts for complex numbers."""
    try:
        return bool(abs(value - target) < _TOLERANCE)
    except OverflowError:
        return False


def _value(node: ast.expr, sizes: list[int]) -> Any:
    # Signs are the only operations that can nest deeply, so they are collected in a loop.
    signs = []
    while isinstance(node, ast.UnaryOp):
        signs.append(_SIGNS[type(node.op)])
        node = node.operand
    if isinstance(node, ast.BinOp):
        value = _OPERATIONS[type(node.op)](_value(node.left, sizes), _value(node.right, sizes))
        if isinstance(value, int):
            sizes.append(value.bit_length())
            if sum(sizes) > MAX_POWER_BITS:
                raise OverflowError(f"integers of more than {MAX_POWER_BITS} bits in all")
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = node.value
    else:
        raise TypeError(f"{type(node).__name__} is not a number")
    for sign in reversed(signs):
        value = sign(value)
    return value


def _power(base: Any, exponent: Any) -> Any:
    if (
        isinstance(base, int)
        and isinstance(exponent, int)
        and abs(base) > 1
        and base.bit_length() * exponent > MAX_POWER_BITS
    ):
        raise OverflowError(f"an integer power of more than {MAX_POWER_BITS} bits")
    return base**exponent


_SIGNS: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_OPERATIONS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: _power,
}
