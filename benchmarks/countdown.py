"""Countdown: answers scored and problems generated per second, and the text that takes the reward longest.

What stands beside it: a scorer as public ones are (a regular expression and Python's ``eval``, floats, open to the
holes in docs/countdown.md), and what no scorer written in Python avoids, reading the tokens; for problems, the same
construction one problem at a time with ``Fraction``, and making the objects alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from operator import add, mul, sub, truediv
from typing import Any

from benchmarks._table import Row, markdown, row
from benchmarks._timing import rate, worst
from hpo_plugin.tasks.countdown import CountdownConfig, CountdownProblem, generate_problems
from hpo_plugin.tasks.countdown.problems import random_expression, solve
from hpo_plugin.tasks.countdown.reward import (
    DATA_SOURCES,
    MAX_ANSWER_CHARACTERS,
    MAX_DEPTH,
    MAX_NUMBERS,
    MAX_SEARCHED_CHARACTERS,
    compute_score,
)

SEED = 0
PROBLEMS = 600
GENERATED = 100_000
#: Bars: answers a second and problems a second on one core, milliseconds of the worst text.
SCORED_BAR, GENERATED_BAR, WORST_BAR = 50_000, 20_000, 5.0

Truth = dict[str, Any]
Answers = list[tuple[str, Truth]]


# --- ordinary answers ----------------------------------------------------------------------------------------------


def ordinary_answers(layout: str, size: int = PROBLEMS) -> Answers:
    """Answers as models write them, eight to a problem: right, wrong, and malformed ones.

    Args:
        layout: ``public`` (a chain of thought before the tags, of 200 to 2,000 characters) or ``terse``.
        size: Problems, of 3 and 4 numbers up to 99.

    Returns:
        (response, ground truth) pairs.
    """
    rng = random.Random(SEED)
    answers: Answers = []
    for problem in generate_problems(CountdownConfig(seed=SEED), size):
        truth = {"target": problem.target, "numbers": list(problem.numbers)}
        right = solve(problem.numbers, problem.target, rng) or ""
        wrong = random_expression(problem.numbers, rng)
        contents = [
            right,
            f" {_spaced(right)} = {problem.target}",
            wrong,
            f"{wrong}={problem.target}",
            # A number too few, a parenthesis too many, words, another spelling or a sign.
            random_expression(problem.numbers[:-1], rng),
            f"{right})",
            f"We can make {problem.target} from the numbers",
            wrong.replace("*", "×") if "*" in wrong else f"-{wrong}",
        ]
        for number, content in enumerate(contents):
            text = f"={content}" if layout == "terse" else _reasoned(content, problem, rng, closed=number != 6)
            answers.append((text, truth))
    return answers


def _spaced(expression: str) -> str:
    return re.sub("([-+*/])", r" \1 ", expression)


def _reasoned(content: str, problem: CountdownProblem, rng: random.Random, *, closed: bool) -> str:
    tries = [f"Let me try {random_expression(problem.numbers, rng)}: no.\n" for _ in range(rng.randint(6, 60))]
    answer = f"<answer>{content}</answer>" if closed else f"<answer>{content}"
    return f"Let me solve this step by step.\n<think>\n{''.join(tries)}</think>\n{answer}"


def public_scorer(response: str, truth: Truth) -> float:
    """Score as public scorers do; not safe, and here for its speed only."""
    matches = list(re.finditer(r"<answer>(.*?)</answer>", response))
    if not matches:
        return 0.0
    equation = matches[-1].group(1).strip()
    try:
        if sorted(int(n) for n in re.findall(r"\d+", equation)) != sorted(truth["numbers"]):
            return 0.0
        if not re.match(r"^[\d+\-*/().\s]+$", equation):
            return 0.0
        # TinyZero's function, which the benchmark compares with ours on equations that this file makes.
        value = eval(equation, {"__builtins__": None}, {})  # nosec B307
        return float(abs(value - truth["target"]) < 1e-5)
    except Exception:
        return 0.0


def read_tokens(response: str) -> int:
    """Split a response's last line into tokens and sum its integers: the part of the work that no scorer avoids."""
    tokens = re.findall(r"[0-9]+|[-+*/()]", response[response.rfind("<answer>") + 8 :])
    return sum(int(token) for token in tokens if token.isdigit())


# --- hostile texts -------------------------------------------------------------------------------------------------


def hostile_texts(rng: random.Random) -> Iterator[tuple[str, str]]:
    """(layout, text) of everything that could take long: long, deep, large, and almost an answer.

    Args:
        rng: Draws the texts that are random.
    """
    size = MAX_SEARCHED_CHARACTERS
    opening, closing = "<answer>", "</answer>"
    words = [opening, closing, "<", ">", closing[:-1], closing[1:], opening[:-1], opening[1:], " ", "1", "(", "1+"]
    # Almost the tags: one character replaced, at every place.
    words += [f"{tag[:i]}{c}{tag[i + 1 :]}" for tag in (opening, closing) for i in range(len(tag)) for c in "<>x"]
    # Random words of the tags' letters: what a search for a tag could stumble over most.
    words += ["".join(rng.choices("</answer>", k=rng.randint(2, 12))) for _ in range(120)]
    for word in words:
        repeated = word * (size // len(word))
        yield "public", repeated
        # Python searches texts with other alphabets by other code.
        yield "public", f"\U0001f600{repeated}"
        yield "public", f"{opening}{repeated}{closing}"[-size:]
        yield "terse", word * (MAX_ANSWER_CHARACTERS // len(word))
    yield "public", (opening + closing) * (16 * size // 17)
    for _ in range(200):
        content = _hostile_expression(rng)
        yield "terse", content
        yield "public", f"{'<' * (size - 1000)}{opening}{content}{closing}"
    for form in (
        r"\frac{",
        r"\frac{1}{",
        r"\boxed{",
        r"\left(",
        r"\times",
        "-",
        "×",
        r"\frac",
        "}",
        "x",
        "1=",
        "1.",
        "$",
    ):
        for ending in ("", "1", "}" * 90, "}." * 50, "1" + "}{1}" * 60):
            yield "terse", (form * MAX_ANSWER_CHARACTERS)[: MAX_ANSWER_CHARACTERS - len(ending)] + ending
    for blank in (" ", "\n", "\t \r\n"):
        yield "terse", f"1={blank * 600}"[:MAX_ANSWER_CHARACTERS]
        yield "terse", f"{blank * 600}"[: MAX_ANSWER_CHARACTERS - 3] + "1=x"
        yield "terse", blank * size


def _hostile_expression(rng: random.Random) -> str:
    """As much arithmetic as fits: large integers, divisions, parentheses to the bound."""
    operators, digits = rng.choice(["+-*/", "/", "*", "+", "+/", "-/", "*/"]), rng.choice([1, 2, 9])
    text, depth = "", 0
    while True:
        opened = min(rng.choice([0, 0, rng.randint(1, 3), MAX_DEPTH]), MAX_DEPTH - depth)
        closed = rng.randint(0, depth + opened) if rng.random() < 0.3 else 0
        number = rng.randint(10 ** (digits - 1), 10**digits - 1)
        piece = f"{'(' * opened}{number}{')' * closed}{rng.choice(operators)}"
        if len(text) + len(piece) + depth + opened - closed + 1 > MAX_ANSWER_CHARACTERS:
            return f"{text}1{')' * depth}"
        text += piece
        depth += opened - closed


def worst_text() -> tuple[float, str]:
    """The hostile text that takes longest: CPU milliseconds, and what it begins and ends with."""
    rng = random.Random(SEED)
    truth = {"target": 999_999_999, "numbers": list(range(999_999_999 - MAX_NUMBERS, 999_999_999))}
    found = []
    by_layout: dict[str, list[str]] = {layout: [] for layout in DATA_SOURCES}
    for layout, text in hostile_texts(rng):
        by_layout[layout].append(text)
    for layout, texts in by_layout.items():
        score = partial(compute_score, DATA_SOURCES[layout], ground_truth=truth)
        milliseconds, text = worst(texts, score)
        shown = text if len(text) <= 40 else f"{text[:20]}…{text[-15:]}"
        found.append((milliseconds, f"{layout}, {len(text):,} characters: {shown!r}"))
    return max(found)


# --- problems ------------------------------------------------------------------------------------------------------


def build_one_at_a_time(size: int, rng: random.Random) -> list[CountdownProblem]:
    """The generator's construction without numpy: problems of 4 numbers, none twice."""
    config = CountdownConfig(counts=(4,))
    seen: dict[tuple[tuple[int, ...], int], CountdownProblem] = {}
    while len(seen) < size:
        numbers = [rng.randint(config.min_number, config.max_number) for _ in range(4)]
        values = [Fraction(number) for number in numbers]
        try:
            while len(values) > 1:
                a, b = (values.pop(rng.randrange(len(values))) for _ in range(2))
                values.append(rng.choice((add, sub, mul, truediv))(a, b))
        except ZeroDivisionError:
            continue
        if values[0].denominator == 1 and config.min_target <= values[0] <= config.max_target:
            problem = CountdownProblem(tuple(numbers), int(values[0]))
            seen.setdefault(problem.identity, problem)
    return list(seen.values())


def make_objects(problems: list[CountdownProblem]) -> list[CountdownProblem]:
    """Make the same objects again, from numbers that are there: what no generator that returns them avoids."""
    return [CountdownProblem(problem.numbers, problem.target) for problem in problems]


def run() -> list[Row]:
    """Measure everything."""
    public, terse = (ordinary_answers(layout) for layout in DATA_SOURCES)
    rows = [
        _scoring("public", public),
        _rate("reference: regular expression and eval", lambda: [public_scorer(*pair) for pair in public], len(public)),
        _rate("limit: tokens alone", lambda: [read_tokens(text) for text, _ in public], len(public)),
        _scoring("terse", terse),
    ]
    milliseconds, text = worst_text()
    rows.append(row("score, worst text found", milliseconds, "ms", at_most=WORST_BAR, note=text))
    config = CountdownConfig(counts=(4,), seed=SEED)
    problems = generate_problems(config, GENERATED)
    return [
        *rows,
        _rate("problems of 4 numbers", lambda: generate_problems(config, GENERATED), GENERATED, bar=GENERATED_BAR),
        _rate("reference: one at a time", lambda: build_one_at_a_time(2_000, random.Random(SEED)), 2_000),
        _rate("limit: the objects alone", lambda: make_objects(problems), GENERATED),
    ]


def _scoring(layout: str, answers: Answers) -> Row:
    source = DATA_SOURCES[layout]

    def score_all() -> list[float]:
        return [compute_score(source, text, truth) for text, truth in answers]

    right = 100 * sum(score_all()) / len(answers)
    length = sum(len(text) for text, _ in answers) / len(answers)
    shape = f"{len(answers):,} answers of {length:,.0f} characters, {right:.0f} % right; "
    return _rate(f"score, {layout}", score_all, len(answers), bar=SCORED_BAR, note=shape)


def _rate(name: str, work: Callable[[], object], items: int, *, bar: float | None = None, note: str = "") -> Row:
    measured, spread = rate(work, items)
    return row(name, measured, "per second and core", at_least=bar, note=f"{note}{spread}")


def main() -> None:
    """Print the table."""
    print(markdown(run()))


if __name__ == "__main__":
    main()
