r"""Hostile text to the rewards of Countdown and TeleLogs, and to the parser of TeleLogs prompts.

Texts are written by small grammars, drawn from pieces, mutated from a corpus, and searched for by time. Each decision
is compared with an oracle, which is written from docs/countdown.md and docs/telelogs.md and shares no code with the
package: it rewrites an answer as Python and reads it with ``ast``, or matches braces from the front.
"""

from __future__ import annotations

import ast
import json
import random
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Any

from hpo_plugin.tasks.countdown.reward import compute_score as countdown_score
from hpo_plugin.tasks.telelogs.prompts import MAX_ROWS, PromptError, parse_prompt, render_prompt
from hpo_plugin.tasks.telelogs.reward import compute_score as telelogs_score
from hpo_plugin.tasks.telelogs.tables import Case
from torture.probe import Probe, Result, seeded

#: Characters of a long text.
LONG = 262_144
#: Largest CPU time of a reward or a parser for any text, in milliseconds.
LIMIT_MS = 5.0
#: Share of long texts.
LONG_SHARE = 1 / 1000
CORPUS = Path(__file__).parent / "corpus"

Choose = Callable[[Sequence[Any]], Any]


def corpus(name: str) -> list[str]:
    """The committed texts for a target."""
    texts: list[str] = json.loads((CORPUS / f"{name}.json").read_text(encoding="utf-8"))
    return texts


# --- oracles -------------------------------------------------------------------------------------------------------

_TIMES = re.compile(r"\\(?:times|cdot|ast)(?![A-Za-z])|[×·⋅∙∗]|(?<!\\bo)x")
_OVER = re.compile(r"\\div(?![A-Za-z])|[÷∕⁄]")
_BLANK = re.compile(r"\s|[$~]|\\[,;:!()\[\] ]|\\q?quad(?![A-Za-z])|\\left(?=\s*\()|\\right(?=\s*\))")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}[\s$~]*\{([^{}]*)\}")
_ARITHMETIC = re.compile(r"[0-9+\-*/(). ]*")


def countdown_oracle(response: str, target: int, numbers: Sequence[int], layout: str) -> bool:
    """Whether a response is right according to docs/countdown.md: ``ast`` reads the answer, rewritten as Python.

    Args:
        response: The text.
        target: Of the problem.
        numbers: Of the problem.
        layout: ``public`` or ``terse``.
    """
    answer = response
    if layout == "public":
        parts = response[-262_144:].split("<answer>")
        answer = next((part for part in reversed(parts[1:]) if "</answer>" in part), "</answer>").split("</answer>")[0]
    if len(answer) > 512:
        return False
    if layout == "terse":
        answer = answer.lstrip(" \t\r\n")
        answer = answer[1:] if answer[:1] == "=" else answer
    # Blanks first: a macro of blanks may stand beside anything.
    text = _BLANK.sub(" ", answer)
    text = _OVER.sub("/", _TIMES.sub("*", text)).replace("−", "-").replace("–", "-")
    while (expanded := _FRACTION.sub(r"((\1)/(\2))", text)) != text:
        text = expanded
    text = _unboxed(text)
    sides = text.split("=")
    if len(sides) == 1:
        return _is_solution(text, target, numbers)
    if len(sides) != 2:
        return False
    left, right = map(_unboxed, sides)
    return any(
        re.fullmatch(r"[+-]? *[0-9]+\.?", claim) is not None
        and int(claim.replace(" ", "").rstrip(".")) == target
        and _is_solution(side, target, numbers)
        for side, claim in ((left, right), (right, left))
    )


def _unboxed(text: str) -> str:
    """Without blanks and periods at the ends, and without boxes around all of a text."""
    while True:
        text = text.strip()
        opened = re.match(r"\\boxed\s*\{", text)
        if text.endswith("."):
            text = text[:-1]
        elif opened is not None and text.endswith("}") and _balanced(text[opened.end() : -1]):
            text = text[opened.end() : -1]
        else:
            return text


def _balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth < 0:
            return False
    return depth == 0


def _is_solution(text: str, target: int, numbers: Sequence[int]) -> bool:
    """Whether an expression has the value of the target and exactly the given numbers."""
    if _ARITHMETIC.fullmatch(text) is None or "**" in text or "//" in text:
        return False
    if any(len(run.lstrip("0")) > 9 for run in re.findall("[0-9]+", text)):
        return False
    plain = re.sub(r"([0-9]+)\.?(?![0-9.])", lambda run: str(int(run[1])), text)
    found: list[int] = []

    def value(node: ast.expr) -> Fraction:
        sign = 1
        while isinstance(node, ast.UnaryOp):
            sign = -sign if isinstance(node.op, ast.USub) else sign
            node = node.operand
        if isinstance(node, ast.Constant) and type(node.value) is int:
            found.append(node.value)
            return sign * Fraction(node.value)
        if not isinstance(node, ast.BinOp):
            raise ValueError("not arithmetic")
        left, right = value(node.left), value(node.right)
        if isinstance(node.op, ast.Add):
            return sign * (left + right)
        if isinstance(node.op, ast.Sub):
            return sign * (left - right)
        return sign * (left * right if isinstance(node.op, ast.Mult) else left / right)

    try:
        result = value(ast.parse(plain.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return False
    return result == target and sorted(found) == sorted(numbers)


def tinyzero_oracle(response: str, target: int, numbers: Sequence[int]) -> bool | None:
    """The decision of the public scorer by Python's own ``eval``; None where that could take long.

    Args:
        response: The text.
        target: Of the problem.
        numbers: Of the problem.
    """
    line = (response.split("Assistant:", 1)[1] if "Assistant:" in response else response).split("\n")[-1]
    found = [part.split("<answer>", 1)[1] for part in line.split("</answer>")[:-1] if "<answer>" in part]
    if not found:
        return False
    answer = found[-1].strip()
    if len(answer) > 512 or re.match(r"^[-\d+*/().\s]+$", answer) is None:
        return False
    runs = [int(run) for run in re.findall(r"\d+", answer)]
    if sorted(runs) != sorted(numbers):
        return False
    if "**" in re.sub(r"\s", "", answer) and not is_small_power(answer):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The reference that the package is compared with; answers consist of digits and operators.
            return bool(abs(eval(answer, {"__builtins__": None}, {}) - target) < 1e-5)  # nosec B307
    except Exception:
        return False


def is_small_power(answer: str) -> bool:
    """Whether the powers of an answer are of numbers so small that ``eval`` is quick."""
    runs = [int(run) for run in re.findall(r"\d+", answer)]
    return answer.count("**") == 1 and max(runs, default=0) <= 12 and len(runs) <= 4


_FONT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|up|normal)?|math(?:bf|it|rm|sf|tt|normal)|emph|underline|mbox|boldsymbol|bm"
    r"|operatorname)(?=\s*\{)"
)
_SENTENCES = {
    "C1": "The serving cell's downtilt angle is too large, causing weak coverage at the far end.",
    "C2": "The serving cell's coverage distance exceeds 1km, resulting in over-shooting.",
    "C3": "A neighboring cell provides higher throughput.",
    "C4": "Non-colocated co-frequency neighboring cells cause severe overlapping coverage.",
    "C5": "Frequent handovers degrade performance.",
    "C6": "Neighbor cell and serving cell have the same PCI mod 30, leading to interference.",
    "C7": "Test vehicle speed exceeds 40km/h, impacting user throughput.",
    "C8": "Average scheduled RBs are below 160, affecting throughput.",
}


def last_box(response: str) -> str | None:
    """The content of the closed box that begins last, by matching braces from the front."""
    text = response[-16_384:]
    boxes = {found.end() - 1 for found in re.finditer(r"\\boxed\s*\{", text)}
    opened: list[int] = []
    closed: tuple[int, int] | None = None
    for brace in re.finditer("[{}]", text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif opened:
            begin = opened.pop()
            if begin in boxes and (closed is None or begin > closed[0]):
                closed = (begin, brace.start())
    return None if closed is None else text[closed[0] + 1 : closed[1]]


def telelogs_oracle(response: str, label: str, cause: str | None) -> bool:
    """Whether the last closed box names the label and nothing else, but for its own sentence.

    Args:
        response: The text.
        label: The right one.
        cause: The root cause behind the label.
    """
    box = last_box(response)
    if box is None or len(box) > 512:
        return False
    shown = re.sub(r"[{}$]", "", _FONT.sub("", box))
    shown = re.sub(r"\\[,;:! ]|\\q?quad(?![A-Za-z])|~", " ", shown).replace("’", "'")
    sentence = _SENTENCES.get(cause or label, "")
    names = {label, label[1:]} if label[0].isalpha() else {label}
    # A blank or a sign between two digits separates numbers.
    head = re.match(r"[\s(]*([A-Za-z]?)[\s_]*([0-9]+)(?![0-9])", shown)
    if head is None or head[1].upper() + head[2] not in names:
        return False

    def letters(text: str) -> str:
        return re.sub(r"[\s.:,()\-–—]", "", text).lower()

    return letters(shown[head.end() :]) in ("", letters(sentence))


# --- texts ---------------------------------------------------------------------------------------------------------

#: Characters that look like others, show nothing, or change their number when their case changes.
ODD_CHARACTERS = (
    "\u200b\u2060\ufeff\u202e\u0301\x00\x01\x0b\x1c\x85\xa0\u2028\u3000٣３³Ⅲ𝟹СİſK−–—×÷ｃ｛｝\ud800\udcff\U0001f600"
)


def mutated(rng: random.Random, text: str, pieces: Sequence[str], others: Sequence[str]) -> str:
    """A text with one to four places changed: removed, repeated, moved, replaced, or crossed with another text."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        first = rng.randrange(len(text) + 1)
        last = min(len(text), first + rng.choice((0, 1, 1, 2, 5, 20)))
        kind = rng.randrange(8)
        if kind == 0:
            text = text[:first] + text[last:]
        elif kind == 1:
            text = text[:last] + text[first:last] * rng.choice((1, 2, 9)) + text[last:]
        elif kind == 2:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            text = text[:first] + other[start : start + rng.choice((5, 20, 500))] + text[last:]
        elif kind == 3:
            text = text[:first] + rng.choice(ODD_CHARACTERS) + text[last:]
        elif kind == 4:
            text = text[last:] + text[:first] if rng.random() < 0.2 else text[:first] + text[last:] + text[first:last]
        else:
            text = text[:first] + rng.choice(pieces) + text[last:]
    return text


def drawn(rng: random.Random, pieces: Sequence[str]) -> str:
    """Pieces in random order."""
    return "".join(rng.choices(pieces, k=rng.randint(1, 24)))


def long_text(rng: random.Random, pieces: Sequence[str], answer: str) -> str:
    """A text of LONG characters, most of it a repeated word, perhaps with an answer in or after it."""
    word = "".join(rng.choices(pieces, k=rng.choice((1, 1, 2, 3, 6)))) or "x"
    repeated = word * (LONG // len(word) + 1)
    answer = rng.choice(("", answer))
    where = rng.choice((LONG, LONG, LONG - 50, LONG // 2, 0)) - len(answer)
    return (repeated[: max(where, 0)] + answer + repeated)[:LONG]


@dataclass(frozen=True)
class Recipe:
    """A text of two parts that are repeated, and an end.

    Attributes:
        first: A word.
        second: Another one.
        end: What follows.
        share: Share of the first word in the length.
        length: Characters.
    """

    first: str
    second: str
    end: str
    share: float
    length: int

    def text(self) -> str:
        """The text."""
        length = max(0, self.length - len(self.end))
        front = int(length * self.share)
        parts = (self.first, front), (self.second, length - front)
        return "".join((word * (count // max(1, len(word)) + 1))[:count] for word, count in parts) + self.end

    def changed(self, rng: random.Random, pieces: Sequence[str], lengths: Sequence[int]) -> Recipe:
        """The recipe with one part changed."""
        words = [self.first, self.second, self.end]
        place = rng.randrange(5)
        if place < 3:
            words[place] = mutated(rng, words[place], pieces, pieces)[:80]
        return Recipe(
            words[0] or "x",
            words[1] or "x",
            words[2],
            rng.choice((0.0, 0.5, 0.9, 1.0, rng.random())) if place == 3 else self.share,
            rng.choice(lengths) if place == 4 else self.length,
        )


def slowest(
    rng: random.Random, milliseconds: Callable[[str], float], pieces: Sequence[str], size: int
) -> Iterator[str]:
    """Search for texts that take long: change the slowest recipes that were found so far.

    Args:
        rng: Draws the recipes.
        milliseconds: Measures a text.
        pieces: Of the words.
        size: Number of texts.

    Yields:
        The texts.
    """
    lengths = (LONG, 16_384, 16_383, 540, 512, 511)
    known: list[tuple[float, int, Recipe]] = []
    for number in range(size):
        if len(known) < 8 or rng.random() < 0.2:
            first, second, end = ("".join(rng.choices(pieces, k=rng.randint(1, 4))) or "x" for _ in range(3))
            recipe = Recipe(first, second, end, rng.choice((0.0, 0.5, 1.0)), rng.choice(lengths))
        else:
            recipe = rng.choice(known)[2].changed(rng, pieces, lengths)
        text = recipe.text()
        known.append((milliseconds(text), number, recipe))
        known = sorted(known, reverse=True)[:8] if len(known) > 16 else known
        yield text


def cpu_ms(call: Callable[[], object], repeats: int = 1) -> float:
    """CPU time of a call, in milliseconds: the smallest of several, because other processes disturb the measurement."""
    best = float("inf")
    for _ in range(repeats):
        begin = time.process_time()
        call()
        best = min(best, time.process_time() - begin)
    return 1000 * best


class Timer:
    """Keeps the largest time of the calls; a time that would be the largest is measured again before it counts."""

    def __init__(self, result: Result) -> None:
        """Measure for a result."""
        self.result, self.worst = result, 0.0

    def __call__(self, call: Callable[[], Any], text: str) -> Any:
        """Call, and return what the call returns."""
        begin = time.process_time()
        answer = call()
        milliseconds = 1000 * (time.process_time() - begin)
        if milliseconds > self.worst:
            for repeats in (5, 20, 100):
                milliseconds = min(milliseconds, cpu_ms(call, repeats))
                if milliseconds <= max(self.worst, LIMIT_MS / 2):
                    break
            if milliseconds > self.worst:
                self.worst = milliseconds
                self.result.measure("slowest text (CPU ms)", round(milliseconds, 3))
                if milliseconds > LIMIT_MS:
                    self.result.failures.append(f"{milliseconds:.1f} ms for {shown(text)}")
        return answer


def shown(text: str) -> str:
    """A text in a failure: all of it if it is short, else its ends."""
    return ascii(text) if len(text) <= 600 else f"{len(text)} characters {text[:200]!a} … {text[-200:]!a}"


# --- Countdown -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sum:
    """A problem and a solution.

    Attributes:
        target: Of the problem.
        numbers: Of the problem.
        tokens: The solution.
        latex: The solution with fractions.
    """

    target: int
    numbers: tuple[int, ...]
    tokens: tuple[str, ...]
    latex: tuple[str, ...]


@cache
def sums(seed: int = 0, size: int = 500) -> tuple[Sum, ...]:
    """Random problems with solutions, built from the numbers up."""
    rng = random.Random(seed)
    made: list[Sum] = []
    while len(made) < size:
        largest = rng.choice((9, 12, 99, 99, 999_999_999))
        numbers = [rng.randint(0, largest) for _ in range(rng.choice((1, 2, 3, 3, 4, 4, 6, 16)))]
        parts: list[tuple[Fraction, tuple[str, ...], tuple[str, ...]]]
        parts = [(Fraction(number), (str(number),), (str(number),)) for number in numbers]
        while len(parts) > 1:
            (a, x, latex_x), (b, y, latex_y) = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
            operator = rng.choice("+-*/" if b else "+-*")
            value = {"+": a + b, "-": a - b, "*": a * b}[operator] if operator != "/" else a / b
            latex = (r"\frac{", *latex_x, "}{", *latex_y, "}")
            if operator != "/":
                latex = ("(", *latex_x, operator, *latex_y, ")")
            parts.append((value, ("(", *x, operator, *y, ")"), latex))
        value, tokens, latex = parts[0]
        if value.denominator == 1 and abs(value) < 10**9:
            made.append(Sum(int(value), tuple(numbers), tokens, latex))
    return tuple(made)


COUNTDOWN_PIECES = [*"0123579+-*/()=. x$~{}[]!^%|,", "12", "22", "**", "//", "()", "5.", ".5", "007", "\n", "\t", "1e5"]
COUNTDOWN_PIECES += ["×", "·", "÷", "−", r"\times", r"\cdot ", r"\div", r"\frac{", "}{", r"\frac", r"\boxed{"]
COUNTDOWN_PIECES += [r"\left(", r"\right)", r"\,", r"\quad", r"\(", r"\)", "=22", "22=", "<answer>", "</answer>"]
COUNTDOWN_PIECES += [r"\boxed", "<answer", "answer>", "Assistant:", "<|im_start|>assistant", "3*5+7", "\U0001f600"]
COUNTDOWN_PIECES += ["٣", "\u200b", "9" * 30]
_BLANKS = ("", "", "", "", " ", "\n", "\u00a0", r"\,", r"\; ", r"\quad ", "~", "$")
_MULTIPLY = ("*", "*", "*", "×", "·", "x", r"\times ", r"\cdot ")
_DIVIDE = ("/", "/", "/", "÷", r"\div ")
_MINUS = ("-", "-", "-", "−", "–")
_ANSWERS: tuple[str, ...]
_ANSWERS = ("{}", "{}", "{}", "{}.", "({})", "+{}", "--{}", r"\boxed{{{}}}", "${}$", "{} = {target}", "{target}={}")
_ANSWERS += (r"\boxed{{{} = {target}}}", r"{} = \boxed{{{target}}}", r"\boxed{{{}}} = {target}", r"$\boxed{{{}}}$.")
_BEFORE: tuple[str, ...]
_BEFORE = ("", "", "Let me see: ", "<answer>1+1</answer> No: ", "<answer>", "<answer>1+1 ", "</answer>", "{ ( ")
_BEFORE += ("<answer></answer>",)
_AFTER = ("", "", " Done.", "\n", " <answer>1+1", "</answer>", " }", "\U0001f600")


def written(rng: random.Random, tokens: Sequence[str]) -> str:
    """An expression in one of the documented spellings, whatever its tokens."""
    blank = rng.choice(_BLANKS)
    spelled = {"*": rng.choice(_MULTIPLY), "/": rng.choice(_DIVIDE), "-": rng.choice(_MINUS)}
    return blank.join([spelled.get(token, token) for token in tokens])


def changed_tokens(rng: random.Random, tokens: Sequence[str]) -> list[str]:
    """Tokens with one of them removed, added, replaced, or in another place."""
    changed = list(tokens)
    place = rng.randrange(len(changed))
    kind = rng.randrange(5)
    if kind == 0:
        del changed[place]
    elif kind == 1:
        changed.insert(place, rng.choice(COUNTDOWN_PIECES))
    elif kind == 2:
        other = rng.randrange(len(changed))
        changed[place], changed[other] = changed[other], changed[place]
    else:
        changed[place] = rng.choice(COUNTDOWN_PIECES[:12] if kind == 3 else ("+", "-", "*", "/", "1", "2"))
    return changed


@dataclass(frozen=True)
class CountdownInput:
    """A text for the Countdown reward.

    Attributes:
        text: The response.
        target: Of the problem.
        numbers: Of the problem.
        layout: ``public`` or ``terse``.
        right: Whether it is written as the documentation says that a right answer may be; None: not known.
    """

    text: str
    target: int
    numbers: tuple[int, ...]
    layout: str
    right: bool | None = None


def countdown_inputs(rng: random.Random, size: int) -> Iterator[CountdownInput]:
    """Texts for the Countdown reward: right answers, nearly right ones, drawn and mutated ones, and long ones."""
    problems, seeds, recent = sums(), corpus("countdown"), [RIGHT]
    for _ in range(size):
        problem = rng.choice(problems)
        layout = rng.choice(("public", "terse"))
        right: bool | None = None
        kind = rng.random()
        if kind < 0.55:
            tokens: Sequence[str] = problem.tokens if rng.random() < 0.7 else problem.latex
            right = kind < 0.25
            side = written(rng, tokens if right else changed_tokens(rng, tokens))
            answer = rng.choice(_ANSWERS).format(side, target=problem.target)
            right = (len(answer) <= 512) if right else None
            recent[rng.randrange(len(recent))] = answer
            if len(recent) < 50:
                recent.append(answer)
        elif kind < 0.75:
            answer = mutated(rng, rng.choice(recent), COUNTDOWN_PIECES, recent)
        elif kind < 0.9:
            answer = mutated(rng, rng.choice(seeds), COUNTDOWN_PIECES, seeds)
        else:
            answer = drawn(rng, COUNTDOWN_PIECES)
        text = answer
        if layout == "public":
            text = f"{rng.choice(_BEFORE)}<answer>{answer}</answer>{rng.choice(_AFTER)}"
            if right is None and rng.random() < 0.2:
                text = mutated(rng, text, COUNTDOWN_PIECES, recent)
        elif rng.random() < 0.2:
            text = f" ={text}"
            right = right and len(text) <= 512
        if rng.random() < LONG_SHARE:
            text, right = long_text(rng, COUNTDOWN_PIECES, text), None
        yield CountdownInput(text, problem.target, problem.numbers, layout, right)


#: The solution of the problem that texts without one of their own have.
RIGHT = "3*5+7"
TRUTH = (22, (3, 5, 7))


def examine_countdown(given: CountdownInput, result: Result, score: Callable[[Callable[[], Any], str], Any]) -> None:
    """Score one text, and compare the decision with the oracle."""
    truth = {"target": given.target, "numbers": list(given.numbers)}
    source = "countdown" if given.layout == "public" else "countdown_terse"
    result.inputs += 1
    try:
        reward = score(partial(countdown_score, source, given.text, truth), given.text)
    except Exception as error:
        result.failures.append(f"{type(error).__name__}: {error}: {given.layout} {truth} {shown(given.text)}")
        return
    if reward == 1.0:
        result.count("accepted")
        if not countdown_oracle(given.text, given.target, given.numbers, given.layout):
            result.failures.append(f"wrongly accepted: {given.layout} {truth} {shown(given.text)}")
    elif reward != 0.0:
        result.failures.append(f"reward {reward!r}: {given.layout} {truth} {shown(given.text)}")
    elif given.right:
        result.failures.append(f"wrongly rejected: {given.layout} {truth} {shown(given.text)}")


def countdown(seed: int, size: int) -> Result:
    """The Countdown reward with its grammar."""
    result = Result()
    score = Timer(result)
    rng = random.Random(seed)
    for given in countdown_inputs(rng, size):
        examine_countdown(given, result, score)
    for layout in ("public", "terse"):
        source = "countdown" if layout == "public" else "countdown_terse"
        truth = {"target": TRUTH[0], "numbers": list(TRUTH[1])}
        measure = partial(_milliseconds, partial(_countdown_score, source, truth))
        for text in slowest(rng, measure, COUNTDOWN_PIECES, size // 2000):
            for whole in (text, f"<answer>{text}</answer>"):
                examine_countdown(CountdownInput(whole, *TRUTH, layout), result, score)
    return result


def _countdown_score(source: str, truth: Mapping[str, Any], text: str) -> float:
    return countdown_score(source, text, truth)


def _milliseconds(call: Callable[[str], object], text: str) -> float:
    return cpu_ms(partial(call, text), 2)


# --- the mode tinyzero ---------------------------------------------------------------------------------------------

PYTHON_PIECES = [*"0123579+-*/(). ", "12", "22", "**", "//", "()", "5.", ".5", "007", "2.0", "**2", "**.5", "\t"]
PYTHON_PIECES += ["\x0c"]


def tinyzero_inputs(rng: random.Random, size: int) -> Iterator[CountdownInput]:
    """Texts for the mode tinyzero; half of the problems are made for the answer."""
    problems, seeds, recent = sums(), corpus("tinyzero"), [RIGHT]
    for _ in range(size):
        problem = rng.choice(problems)
        target, numbers = problem.target, problem.numbers
        kind = rng.random()
        if kind < 0.5:
            tokens = changed_tokens(rng, problem.tokens) if kind > 0.2 else problem.tokens
            answer = rng.choice(("", "", " ")).join(tokens)
            recent[rng.randrange(len(recent))] = answer
            if len(recent) < 50:
                recent.append(answer)
        elif kind < 0.7:
            answer = mutated(rng, rng.choice(seeds), PYTHON_PIECES, seeds)
        elif kind < 0.85:
            answer = mutated(rng, rng.choice(recent), PYTHON_PIECES, recent)
        else:
            answer = drawn(rng, PYTHON_PIECES)
        if rng.random() < 0.5:
            target, numbers = made_for(answer, rng) or (target, numbers)
        text = f"{rng.choice(_BEFORE)}<answer>{answer}</answer>{rng.choice(_AFTER)}"
        if rng.random() < 0.1:
            text = mutated(rng, text, COUNTDOWN_PIECES, recent)
        if rng.random() < LONG_SHARE:
            text = long_text(rng, COUNTDOWN_PIECES, text)
        yield CountdownInput(text, target, numbers, "public")


def made_for(answer: str, rng: random.Random) -> tuple[int, tuple[int, ...]] | None:
    """A problem that an answer nearly solves: its numbers, and the target that it reaches."""
    runs = [int(run) for run in re.findall("[0-9]+", answer)]
    if not 1 <= len(runs) <= 16 or max(runs) >= 10**9:
        return None
    target = rng.choice((0, 1, 22))
    if re.fullmatch(r"[0-9+\-*/(). ]+", answer) and ("**" not in answer or is_small_power(answer)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # Digits, operators and parentheses.
                value = eval(answer.strip(), {"__builtins__": None}, {})  # nosec B307
            target = round(abs(value) if isinstance(value, complex) else value)
        except Exception:
            pass
    return (target, tuple(runs)) if abs(target) < 10**9 else None


def examine_tinyzero(given: CountdownInput, result: Result, score: Callable[[Callable[[], Any], str], Any]) -> None:
    """Score one text in the mode tinyzero, and compare the decision with ``eval``."""
    truth = {"target": given.target, "numbers": list(given.numbers)}
    result.inputs += 1
    try:
        reward = score(partial(countdown_score, "countdown", given.text, truth, mode="tinyzero"), given.text)
    except Exception as error:
        result.failures.append(f"{type(error).__name__}: {error}: {truth} {shown(given.text)}")
        return
    expected = tinyzero_oracle(given.text, given.target, given.numbers)
    if expected is None:
        result.count("not compared: large powers")
    elif reward != float(expected):
        result.failures.append(f"reward {reward!r}, public scorer {expected}: {truth} {shown(given.text)}")
    elif expected:
        result.count("accepted")


def solved(text: str) -> tuple[int, tuple[int, ...]]:
    """A problem with the numbers of a text, so that the value of the text is computed."""
    runs = [int(run) for run in re.findall("[0-9]+", text[:600]) if len(run) <= 9]
    return (22, tuple(runs[:16])) if runs else TRUTH


def tinyzero(seed: int, size: int) -> Result:
    """The Countdown reward in the mode tinyzero."""
    result = Result()
    score = Timer(result)
    rng = random.Random(seed)
    for given in tinyzero_inputs(rng, size):
        examine_tinyzero(given, result, score)

    def call(text: str) -> float:
        target, numbers = solved(text)
        truth = {"target": target, "numbers": list(numbers)}
        return countdown_score("countdown", f"<answer>{text}</answer>", truth, mode="tinyzero")

    pieces = [*PYTHON_PIECES, "9**16000", "9**8000", "(9**", "**999999999", "(1", "(*", "<answer>", "</answer>"]
    for text in slowest(rng, partial(_milliseconds, call), pieces, size // 1000):
        examine_tinyzero(CountdownInput(f"<answer>{text}</answer>", *solved(text), "public"), result, score)
    return result


# --- the TeleLogs reward -------------------------------------------------------------------------------------------

TELELOGS_PIECES = ["{", "}", "{", "}", "{}", r"\boxed{", r"\boxed", r"\boxed {", r"\text{", r"\textbf{", r"\mathrm{"]
TELELOGS_PIECES += [r"\text"]
TELELOGS_PIECES += ["C3", "c3", "3", "C4", "M3", "12", "0", "C", "_", "C_", "(", ")", ".", ":", ",", "-", "–", " "]
TELELOGS_PIECES += ["\n"]
TELELOGS_PIECES += ["\\", r"\,", r"\;", r"\quad ", "~", "$", "$$", " or ", "not ", "?", "%", r"\phantom{", "\u200b"]
TELELOGS_PIECES += ["٣", "C３"]
TELELOGS_PIECES += [*_SENTENCES.values(), "A neighboring cell", "\U0001f600", "\x00", "İ", "x" * 40]
TELELOGS_PIECES += ["\\boxed" + " " * 30]
_LABELS = ("C3", "C3", "C8", "M4", "X12", "7", "12", "C30")
_LETTERS = ("{0}{1}", "{0}{1}", "{0} {1}", "{0}_{1}", "{0}_{{{1}}}", r"\mathrm{{{0}}}_{{{1}}}", r"{0}\,{1}")
_DRESSES: tuple[str, ...]
_DRESSES = ("{}", "{}", "{{{}}}", r"\text{{{}}}", r"\textbf{{{}}}", r"\mathbf {{{}}}", "${}$", " {} ", "{}.", "({})")
_DRESSES += (r"\;{}",)
_EXPLAINED = ("{}: {}", "{} {}", "{}. {}", "{} - {}", "{} – {}", "{} ({})", r"\textbf{{{}}}: \text{{{}}}")
_BOX_BEFORE = ("", "", r"\boxed{C4} no: ", r"\boxed{", "{ ", "} ", r"\boxed{C1 or ", "C4 ", "\U0001f600")
_BOX_AFTER = ("", "", ".", " }", "{", r" \boxed{C4", " Not C4.", "\n")


@dataclass(frozen=True)
class TeleLogsInput:
    """A text for the TeleLogs reward.

    Attributes:
        text: The response.
        label: The right label.
        cause: The root cause behind it; None if the row does not have it.
        right: As in :class:`CountdownInput`.
    """

    text: str
    label: str
    cause: str | None
    right: bool | None = None


def telelogs_inputs(rng: random.Random, size: int) -> Iterator[TeleLogsInput]:
    """Texts for the TeleLogs reward: right boxes, nearly right ones, drawn and mutated ones, and long ones."""
    seeds, recent, causes = corpus("telelogs"), [r"\boxed{C3}"], [*_SENTENCES]
    for _ in range(size):
        label = rng.choice(_LABELS)
        cause: str | None = rng.choice(causes)
        right: bool | None = None
        kind = rng.random()
        if kind < 0.5:
            right = kind < 0.25
            named = label if right or rng.random() < 0.5 else rng.choice(_LABELS)
            letter, number = (named[0], named[1:]) if named[0].isalpha() else ("", named)
            if letter and rng.random() < 0.8:
                content = rng.choice(_LETTERS).format(rng.choice((letter, letter.lower())), number)
            else:
                content = number
            if rng.random() < 0.3:
                sentence = _SENTENCES[cause if right else rng.choice(causes)]  # type: ignore[index]
                sentence = rng.choice((sentence, sentence[:-1], sentence.lower(), sentence.replace(" ", "\n")))
                content = rng.choice(_EXPLAINED).format(content, sentence)
            else:
                content = rng.choice(_DRESSES).format(content)
            if not right:
                content = mutated(rng, content, TELELOGS_PIECES, seeds)
            text = rf"\boxed{{{content}}}"
            recent[rng.randrange(len(recent))] = text
            if len(recent) < 50:
                recent.append(text)
        elif kind < 0.7:
            text = mutated(rng, rng.choice(recent), TELELOGS_PIECES, recent)
        elif kind < 0.85:
            text = mutated(rng, rng.choice(seeds), TELELOGS_PIECES, seeds)
        else:
            text = drawn(rng, TELELOGS_PIECES)
        text = rng.choice(_BOX_BEFORE) + text + rng.choice(_BOX_AFTER)
        if not right and rng.random() < 0.1:
            cause = None
        if rng.random() < LONG_SHARE:
            text, right = long_text(rng, TELELOGS_PIECES, text), None
        yield TeleLogsInput(text, label, cause, right or None)


def examine_telelogs(given: TeleLogsInput, result: Result, score: Callable[[Callable[[], Any], str], Any]) -> None:
    """Score one text, and compare the decision with the oracle."""
    extra = {"cause": given.cause} if given.cause is not None else None
    result.inputs += 1
    try:
        scored = score(partial(telelogs_score, "telelogs", given.text, given.label, extra), given.text)
    except Exception as error:
        result.failures.append(f"{type(error).__name__}: {error}: {given.label} {extra} {shown(given.text)}")
        return
    about = f"{given.label} {extra} {shown(given.text)}"
    reward, pred = scored["score"], scored["pred"]
    if reward not in (0.0, 1.0) or scored["acc"] != reward or (pred == given.label) != (reward == 1.0):
        result.failures.append(f"result {scored!r}: {about}")
    elif pred and re.fullmatch("[A-Z]?[1-9][0-9]?", pred) is None:
        result.failures.append(f"prediction {pred!r}: {about}")
    elif reward:
        result.count("accepted")
        if not telelogs_oracle(given.text, given.label, given.cause):
            result.failures.append(f"wrongly accepted: {about}")
    elif given.right:
        result.failures.append(f"wrongly rejected: {about}")


def telelogs(seed: int, size: int) -> Result:
    """The TeleLogs reward."""
    result = Result()
    score = Timer(result)
    rng = random.Random(seed)
    for given in telelogs_inputs(rng, size):
        examine_telelogs(given, result, score)
    measure = partial(_milliseconds, lambda text: telelogs_score("telelogs", text, "C3"))
    for text in slowest(rng, measure, TELELOGS_PIECES, size // 1000):
        examine_telelogs(TeleLogsInput(text, "C3", "C3"), result, score)
    return result


# --- TeleLogs prompts ----------------------------------------------------------------------------------------------

PROMPT_PIECES = ["|", "||", "-", "--", "\n", "\n\n", "\r", " ", "\t", "0", "-0", "00", "1.", ".5", "1e5", "1E-7", "NaN"]
PROMPT_PIECES += ["inf"]
PROMPT_PIECES += ["9" * 15, "9" * 16, "0." + "0" * 20, "0." + "0" * 21, "-0.0", "1_0", "٣", "３", "\u00a0", "\u200b"]
PROMPT_PIECES += ["\x00"]
PROMPT_PIECES += ["?", "drive", "cells", "C3", "M4=C5", "C3=C3", "C9", "PCI", "RB", "n1", "n6", "v|v", "255", "{count}"]
PROMPT_PIECES += ["{{}}"]
PROMPT_PIECES += [r"\boxed{}", r"\boxed{{}}", "：", ":", "C1: ", "Given:", "Timestamp", "Longitude", "\ud800"]
PROMPT_PIECES += ["\U0001f600"]


@cache
def prompts(seed: int = 0, size: int = 12) -> tuple[str, ...]:
    """Prompts of synthetic cases in both wordings."""
    from hpo_plugin.tasks.telelogs.synthetic import generate, relabeled
    from hpo_plugin.tasks.telelogs.variants import REDUCTIONS

    full = list(generate(size, seed=seed).rows)
    small = list(generate(4 * size, seed=seed, reduction=REDUCTIONS["laptop"]).rows)
    rows = [*full[: size // 2], *relabeled(full[size // 2 :], seed), *small, *relabeled(small, seed)]
    return tuple(render_prompt(row.case) for row in rows)


def prompt_inputs(rng: random.Random, size: int, known: Sequence[str]) -> Iterator[str]:
    """Prompts with lines, cells and characters changed; most of them are reduced prompts, which are short."""
    texts = [*known, *corpus("prompt")]
    for _ in range(size):
        text = rng.choice(texts)
        kind = rng.random()
        if kind < 0.4:
            lines = text.split("\n")
            place, other = rng.randrange(len(lines)), rng.randrange(len(lines))
            change = rng.randrange(5)
            if change == 0:
                del lines[place]
            elif change == 1:
                lines.insert(place, lines[other])
            elif change == 2:
                lines[place], lines[other] = lines[other], lines[place]
            elif change == 3:
                others = rng.choice(texts).split("\n")
                lines[place:] = others[rng.randrange(len(others)) :]
            else:
                cells = lines[place].split("|")
                cells[rng.randrange(len(cells))] = rng.choice(PROMPT_PIECES)
                lines[place] = "|".join(cells)
            text = "\n".join(lines)
        elif kind < 0.9:
            text = mutated(rng, text, PROMPT_PIECES, PROMPT_PIECES)
        elif kind < 0.97:
            text = drawn(rng, PROMPT_PIECES)
        yield text


def long_prompt(rng: random.Random, text: str) -> str:
    """A prompt with 256 kB: a line that repeats a word, or many lines; or one with as many rows as are allowed."""
    lines = text.split("\n")
    if rng.random() < 0.2:
        tables = [place for place, line in enumerate(lines[:-1]) if "|" in line and "|" not in lines[place + 1]]
        for place in reversed(tables):
            # The table keeps its column names.
            first = next(row for row in range(place, 0, -1) if "|" not in lines[row - 1]) + 1
            lines[first : place + 1] = [lines[place]] * MAX_ROWS
        return "\n".join(lines)
    place = rng.randrange(len(lines))
    word = rng.choice((f"\n{lines[place]}", f"|{lines[place]}", rng.choice(PROMPT_PIECES), f" {rng.choice(_LABELS)}"))
    lines[place] += word * (LONG // len(word))
    return "\n".join(lines)


def examine_prompt(text: str, result: Result, parse: Callable[[Callable[[], Any], str], Any]) -> None:
    """Parse one text: it is rendered to the same text again, or it is a PromptError that names a line of it."""
    result.inputs += 1
    try:
        case = parse(partial(_parsed, text), text)
    except Exception as error:
        result.failures.append(f"{type(error).__name__}: {error}: {shown(text)}")
        return
    if isinstance(case, PromptError):
        if not 1 <= case.line <= text.count("\n") + 1 or len(str(case)) > 1000:
            result.failures.append(f"line {case.line}, {len(str(case))} characters of error: {shown(text)}")
        return
    result.count("parsed")
    try:
        if render_prompt(case) != text:
            result.failures.append(f"rendered to another text: {shown(text)}")
    except Exception as error:
        result.failures.append(f"rendering: {type(error).__name__}: {error}: {shown(text)}")


def _parsed(text: str) -> Case | PromptError:
    try:
        return parse_prompt(text)
    except PromptError as error:
        return error


def prompt(seed: int, size: int) -> Result:
    """The parser of TeleLogs prompts."""
    result = Result()
    parse = Timer(result)
    rng = random.Random(seed)
    known = prompts()
    for text in prompt_inputs(rng, size, known):
        examine_prompt(text, result, parse)
    for _ in range(max(2, size // 500)):
        examine_prompt(long_prompt(rng, rng.choice(known)), result, parse)
    return result


# --- probes --------------------------------------------------------------------------------------------------------


PROBES: tuple[Probe, ...] = (
    Probe(
        "countdown-text",
        "text",
        "Countdown reward, texts up to 256 kB",
        "reward 1 only if the oracle agrees, 1 for right answers in all documented forms; no exception; at most 5 ms",
        seeded(10, lambda _, seed: countdown(seed, 350_000)),
    ),
    Probe(
        "tinyzero-text",
        "text",
        "Countdown reward with `mode=tinyzero`, texts up to 256 kB",
        "the decision of the public scorer, computed with `eval`; no exception; at most 5 ms",
        seeded(10, lambda _, seed: tinyzero(seed, 250_000)),
    ),
    Probe(
        "telelogs-text",
        "text",
        "TeleLogs reward, texts up to 256 kB",
        "reward 1 only if the oracle agrees, 1 for right boxes in all documented forms; no exception; at most 5 ms",
        seeded(10, lambda _, seed: telelogs(seed, 350_000)),
    ),
    Probe(
        "prompt-text",
        "text",
        "`parse_prompt` of TeleLogs, texts up to 256 kB",
        "the same text when rendered, or `PromptError` with the line; at most 5 ms",
        seeded(10, lambda _, seed: prompt(seed, 50_000)),
    ),
)
