r"""What models write: the tables of the docs, row by row, and random mixes of all forms.

Each property builds an answer of known value, writes it in a random mix of forms, and compares the reward with a judge
of its own: the value of the tree that was built, in fractions, and the numbers in its leaves.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from hpo_plugin.tasks.countdown.reward import MAX_ANSWER_CHARACTERS, CountdownVerdict
from hpo_plugin.tasks.countdown.reward import compute_score as countdown_score
from hpo_plugin.tasks.countdown.reward import judge as countdown_judge
from hpo_plugin.tasks.telelogs.reward import compute_score as telelogs_score
from hpo_plugin.tasks.telelogs.tables import Cause

DOCS = Path(__file__).parents[2] / "docs"
DECISIONS = {"accept": 1.0, "reject": 0.0}


def rows_of(page: str, header: str) -> list[list[str]]:
    """Read a table of a page: one row for each form of its first cell, without code marks, ⏎ as a line break."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    rows = []
    for line in lines[lines.index(header) + 2 :]:
        if not line.startswith("|"):
            break
        forms, cells = re.fullmatch(r"\| `(.*?)` \| (.*) \|", line).groups()
        rows.extend([form.replace("⏎", "\n"), *cells.split(" | ")] for form in forms.split("` `"))
    return rows


COUNTDOWN_FORMS = rows_of("countdown.md", "| form | problem | exact | tinyzero | why |")
TELELOGS_FORMS = rows_of("telelogs.md", "| response | label | decision | why |")


@pytest.mark.parametrize(("form", "problem", "exact", "tinyzero", "why"), COUNTDOWN_FORMS)
def test_the_table_of_countdown(form: str, problem: str, exact: str, tinyzero: str, why: str) -> None:
    numbers, target = problem.split(" → ")
    truth = {"target": int(target), "numbers": [int(number) for number in numbers.split()]}
    response = form if "<answer>" in form else f"<think>\nHm.\n</think>\n<answer>{form}</answer>"
    assert countdown_score("countdown", response, truth) == DECISIONS[exact]
    assert countdown_score("countdown", response, truth, mode="tinyzero") == DECISIONS[tinyzero]
    if "<answer>" not in form:
        assert countdown_score("countdown_terse", form, truth) == DECISIONS[exact]
    assert why


@pytest.mark.parametrize(("response", "label", "decision", "why"), TELELOGS_FORMS)
def test_the_table_of_telelogs(response: str, label: str, decision: str, why: str) -> None:
    shown, _, cause = label.partition(" = ")
    result = telelogs_score("telelogs", f"Reasoning.\n{response}", shown, {"cause": cause or None})
    assert result["score"] == result["acc"] == DECISIONS[decision]
    assert (result["pred"] == shown) == (decision == "accept")
    assert why


def test_the_tables_are_read_whole() -> None:
    """A row that the pattern of a row missed would fail to match; an empty table would test nothing."""
    assert len(COUNTDOWN_FORMS) > 60
    assert len(TELELOGS_FORMS) > 50
    assert not any("`" in row[0] for row in COUNTDOWN_FORMS + TELELOGS_FORMS)
    assert {row[2] for row in COUNTDOWN_FORMS} == {row[3] for row in COUNTDOWN_FORMS} == set(DECISIONS)
    assert {row[2] for row in TELELOGS_FORMS} == set(DECISIONS)


# --- Countdown: expressions in any mix of forms ---

#: An integer, ("-", operand) for a sign, or (operator, left, right).
Tree = Any
OPERATIONS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": Fraction.__add__,
    "-": Fraction.__sub__,
    "*": Fraction.__mul__,
    "/": Fraction.__truediv__,
}
SPELLED = {
    "+": ["+"],
    "-": ["-", "−", "–"],
    "*": ["*", "×", "·", "⋅", "∙", "∗", "x", r"\times ", r"\times", r"\cdot ", r"\ast "],
    "/": ["/", "÷", "∕", "⁄", r"\div "],
}
BLANKS = ["", "", "", "", " ", "  ", "\n", "\t", "\u00a0", "\u2009", r"\,", r"\;", r"\ ", r"\quad ", "~", "$"]


def value_of(tree: Tree) -> Fraction:
    if isinstance(tree, int):
        return Fraction(tree)
    if len(tree) == 2:
        return -value_of(tree[1])
    return OPERATIONS[tree[0]](value_of(tree[1]), value_of(tree[2]))


def leaves_of(tree: Tree) -> list[int]:
    return [tree] if isinstance(tree, int) else [leaf for part in tree[1:] for leaf in leaves_of(part)]


@st.composite
def trees(draw: st.DrawFn, numbers: list[int]) -> Tree:
    """An expression of the numbers whose value is an integer; most quotients are integers, too."""
    parts: list[Tree] = list(draw(st.permutations(numbers)))
    while len(parts) > 1:
        left, right = parts.pop(), parts.pop(draw(st.integers(0, len(parts) - 1)))
        divisor = value_of(right)
        integral = divisor != 0 and (value_of(left) / divisor).denominator == 1
        operators = "+-*///" if integral else "+-*/" if divisor != 0 and draw(st.integers(0, 9)) == 0 else "+-*"
        tree: Tree = (draw(st.sampled_from(operators)), left, right)
        if draw(st.integers(0, 4)) == 0:
            tree = ("-", tree)
        parts.append(tree)
    tree = ("-", parts[0]) if draw(st.integers(0, 6)) == 0 else parts[0]
    assume(value_of(tree).denominator == 1 and abs(value_of(tree)) < 10**9)
    return tree


def written(tree: Tree, draw: st.DrawFn) -> tuple[str, int]:
    """Write an expression; return it with its precedence: 1 a sum, 2 a product, 3 a sign, 4 what stands alone."""

    def blank() -> str:
        return draw(st.sampled_from(BLANKS))

    def enclosed(part: Tree, least: int) -> str:
        text, precedence = written(part, draw)
        if precedence >= least and draw(st.integers(0, 7)):
            return text
        left, right = draw(
            st.sampled_from([("(", ")"), ("(", ")"), (r"\left(", r"\right)"), (r"\left (", r"\right )")])
        )
        return f"{left}{blank()}{text}{blank()}{right}"

    if isinstance(tree, int):
        digits = draw(st.sampled_from([f"{tree}", f"{tree}", f"{tree}", f"{tree}.", f"0{tree}", f"00{tree}."]))
        return digits, 4
    if len(tree) == 2:
        return draw(st.sampled_from(SPELLED["-"])) + blank() + enclosed(tree[1], 3), 3
    operator, left, right = tree
    if operator == "/" and draw(st.booleans()):
        command = draw(st.sampled_from([r"\frac", r"\dfrac", r"\tfrac", r"\frac "]))
        parts = (f"{{{blank()}{written(part, draw)[0]}{blank()}}}" for part in (left, right))
        return command + draw(st.sampled_from(["", " "])).join(parts), 4
    precedence = 1 if operator in "+-" else 2
    spelled = draw(st.sampled_from(SPELLED[operator]))
    return f"{enclosed(left, precedence)}{blank()}{spelled}{blank()}{enclosed(right, precedence + 1)}", precedence


def wrapped(text: str, draw: st.DrawFn) -> str:
    form = draw(
        st.sampled_from(["{}", "{}", "{}", "${}$", r"\({}\)", r"\[ {} \]", r"\boxed{{{}}}", r"$\boxed {{{}}}$"])
    )
    return form.format(text)


@st.composite
def answers(draw: st.DrawFn, tree: Tree, target: int, equation: bool | None = None) -> str:
    """An answer with the value of the tree, perhaps as an equation with the target, in a mix of forms."""
    text = wrapped(written(tree, draw)[0], draw)
    if draw(st.booleans()) if equation is None else equation:
        side = wrapped(draw(st.sampled_from([f"{target}", f" {target}", f"{target} "])), draw)
        text = wrapped("=".join(draw(st.permutations([text, side]))), draw)
    if draw(st.integers(0, 5)) == 0 and not text.endswith("."):
        text += "."
    assume(len(text) <= MAX_ANSWER_CHARACTERS)
    return text


numbers_given = st.lists(st.one_of(st.integers(0, 12), st.integers(0, 99)), min_size=1, max_size=5)


def verdict(answer: str, target: int, numbers: list[int]) -> CountdownVerdict:
    """Judge in both layouts, which must agree."""
    truth = {"target": target, "numbers": numbers}
    public = countdown_judge(f"<think>1</think> <answer>{answer}</answer>", truth)
    assert countdown_judge(answer, truth, layout="terse") is public
    return public


many = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])


@given(st.data(), numbers_given)
@many
def test_every_mix_of_forms_of_a_right_answer_is_accepted(data: st.DataObject, numbers: list[int]) -> None:
    tree = data.draw(trees(numbers))
    target = int(value_of(tree))
    assert verdict(data.draw(answers(tree, target)), target, numbers) is CountdownVerdict.CORRECT


def mutated(tree: Tree, draw: st.DrawFn) -> Tree:
    """Change one place of an expression: a number, an operator, an operand too many or too few."""
    if isinstance(tree, int):
        kind = draw(st.sampled_from(["another", "twice", "glued", "sign"]))
        if kind == "another":
            return draw(st.integers(0, 120))
        if kind == "glued":
            return int(f"{tree}{draw(st.integers(0, 9))}")
        return ("-", tree) if kind == "sign" else ("-", ("+", tree, tree), tree)
    kind = draw(st.sampled_from(["inside", "inside", "operator", "omitted", "swapped"]))
    if kind == "omitted":
        return tree[-1]
    if kind == "inside":
        place = draw(st.integers(1, len(tree) - 1))
        return (*tree[:place], mutated(tree[place], draw), *tree[place + 1 :])
    if len(tree) == 2:
        return tree[1]
    operator = draw(st.sampled_from("+-*/"))
    return (tree[0], tree[2], tree[1]) if kind == "swapped" else (operator, tree[1], tree[2])


@given(st.data(), numbers_given, st.integers(-1, 1))
@many
def test_a_mutated_answer_is_accepted_only_where_it_is_right(
    data: st.DataObject, numbers: list[int], offset: int
) -> None:
    """The judge is the tree: its leaves must be the numbers and its value the target. Most mutations are wrong."""
    tree = data.draw(trees(numbers))
    target = int(value_of(tree)) + offset
    changed = mutated(tree, data.draw)
    try:
        right = sorted(leaves_of(changed)) == sorted(numbers) and value_of(changed) == target
    except ZeroDivisionError:
        right = False
    claimed = data.draw(st.sampled_from([target, target, target + 1]))
    equation = data.draw(st.booleans())
    found = verdict(data.draw(answers(changed, claimed, equation)), target, numbers)
    assert (found is CountdownVerdict.CORRECT) == (right and not (equation and claimed != target))


WRONG_ENDINGS = [
    "!",
    "^1",
    "**1",
    "//1",
    "%1",
    " or 1",
    "\n1",
    "=",
    "==1",
    " 0",
    ".0",
    "{}",
    "()",
    ")",
    "(0)",
    "\u200b",
    "٠",
    "|",
]


@given(st.data(), numbers_given, st.sampled_from(WRONG_ENDINGS))
@many
def test_what_is_not_arithmetic_makes_a_right_answer_wrong(
    data: st.DataObject, numbers: list[int], ending: str
) -> None:
    tree = data.draw(trees(numbers))
    target = int(value_of(tree))
    answer = data.draw(answers(tree, target))
    assume(len(answer) + len(ending) <= MAX_ANSWER_CHARACTERS)
    assert verdict(answer + ending, target, numbers) is not CountdownVerdict.CORRECT
    assert verdict(f"not {answer}", target, numbers) is not CountdownVerdict.CORRECT
    assert verdict(answer.replace("(", "[").replace(")", "]") + "]", target, numbers) is not CountdownVerdict.CORRECT


@given(st.data(), numbers_given)
@many
def test_what_the_public_scorer_accepts_is_accepted_but_for_its_holes(data: st.DataObject, numbers: list[int]) -> None:
    """Written without ``**``, ``//`` and decimals, its only hole is a value that is near the target."""
    tree = data.draw(trees(numbers))
    tree = mutated(tree, data.draw) if data.draw(st.booleans()) else tree
    answer = python_form(tree, data.draw)
    assume(len(answer) <= MAX_ANSWER_CHARACTERS)
    try:
        value = value_of(tree)
    except ZeroDivisionError:
        return
    target = round(value)
    truth = {"target": target, "numbers": leaves_of(tree)}
    assume(abs(target) < 10**9)
    public = countdown_score("countdown", f"<answer>{answer}</answer>", truth, mode="tinyzero")
    exact = countdown_score("countdown", f"<answer>{answer}</answer>", truth)
    assert exact == float(value == target)
    assert public >= exact or abs(value) > 10**6
    if public > exact:
        assert 0 < abs(value - target) < Fraction(1, 10**4)


def python_form(tree: Tree, draw: st.DrawFn) -> str:
    """Write an expression as Python reads it, with signs, points, zeros, parentheses and blanks to spare."""
    blank = draw(st.sampled_from(["", "", " ", "\t"]))
    if isinstance(tree, int):
        text = draw(st.sampled_from([f"{tree}", f"{tree}", f"{tree}.", f"0{tree}.", f"(({tree}))"]))
    elif len(tree) == 2:
        text = f"(-{blank}{python_form(tree[1], draw)})"
    else:
        text = f"({python_form(tree[1], draw)}{blank}{tree[0]}{blank}{python_form(tree[2], draw)})"
    return draw(st.sampled_from(["", "", "", "+", "--", "+ +", "- -"])) + text


# --- TeleLogs: labels in any mix of forms ---

FONTS = [
    "text",
    "textbf",
    "textit",
    "textrm",
    "texttt",
    "mathrm",
    "mathbf",
    "mathsf",
    "emph",
    "underline",
    "mbox",
    "bm",
]
SPACES = ["", "", "", " ", "  ", "\n", "\t", "\u00a0", r"\,", r"\;", r"\ ", r"\quad ", "~"]


def dressed(text: str, draw: st.DrawFn) -> str:
    """Put a text into blanks, braces, font commands and math delimiters that do not change what it shows."""
    for _ in range(draw(st.integers(0, 3))):
        before, after = draw(st.sampled_from(SPACES)), draw(st.sampled_from(SPACES))
        font = draw(st.sampled_from(FONTS))
        text = draw(
            st.sampled_from(["{}", "{{{}}}", rf"\{font}{{{{{{}}}}}}", rf"\{font} {{{{{{}}}}}}", "${}$"])
        ).format(f"{before}{text}{after}")
    return text


def cased(text: str, draw: st.DrawFn) -> str:
    return draw(st.sampled_from([text, text, text.lower(), text.upper(), text.title()]))


@st.composite
def boxes(draw: st.DrawFn, label: str, text: str | None = None) -> str:
    """A box that shows a label, perhaps with an option text, in a mix of forms."""
    letter, number = (label[0], label[1:]) if label[0].isalpha() else ("", label)
    letter = cased(letter, draw)
    joined = draw(st.sampled_from(["", "", "", " ", "_", r"\,"])) if letter else ""
    shown = draw(
        st.sampled_from(
            [f"{letter}{joined}{number}", f"{letter}{joined}{{{number}}}", f"{dressed(letter, draw)}{number}"]
        )
    )
    shown = dressed(shown, draw)
    if text is None:
        shown = draw(st.sampled_from(["{}", "{}", "{}.", "({})", "{}:"])).format(shown)
    else:
        words = cased(text if draw(st.booleans()) else text.rstrip("."), draw).replace(
            " ", draw(st.sampled_from([" ", " ", "\n", "  "]))
        )
        words = dressed(words.replace("'", draw(st.sampled_from(["'", "’"]))), draw)
        shown = draw(
            st.sampled_from(["{} {}", "{}: {}", "{}:{}", "{}. {}", "{} - {}", "{} – {}", "{} ({})", "({}) {}."])
        ).format(shown, words)
    shown = dressed(shown, draw)
    assume(len(shown) <= 500)
    return draw(st.sampled_from([r"\boxed{%s}", r"\boxed {%s}"])) % shown


labels = st.builds(
    lambda letter, number: f"{letter}{number}", st.sampled_from(["", "C", "C", "M", "X"]), st.integers(1, 99)
)
causes = st.sampled_from(list(Cause))


@given(st.data(), labels, causes, st.booleans())
@many
def test_every_mix_of_forms_of_the_label_is_accepted(
    data: st.DataObject, label: str, cause: Cause, explained: bool
) -> None:
    answer = label.lstrip("CMX") if data.draw(st.booleans()) else label
    box = data.draw(boxes(answer, cause.text if explained else None))
    before = data.draw(st.sampled_from(["", "Hm. ", r"\boxed{C99} no, ", r"\boxed{C99 or ", "{", "} "]))
    after = data.draw(st.sampled_from(["", ".", " }", "{", r" \boxed{C99", " Not C99."]))
    result = telelogs_score("telelogs", before + box + after, label, {"cause": cause.value})
    assert result == {"score": 1.0, "acc": 1.0, "pred": label}


@given(st.data(), labels, labels, causes, causes)
@many
def test_a_box_that_names_anything_else_is_refused(
    data: st.DataObject, label: str, other: str, cause: Cause, named: Cause
) -> None:
    def refused(box: str) -> None:
        assert telelogs_score("telelogs", box, label, {"cause": cause.value})["score"] == 0.0

    assume(other not in (label, label[1:]))
    # Another label, alone, with its own text, and with the right one.
    for text in (None, named.text, cause.text):
        refused(data.draw(boxes(other, text)))
    # The right label with the text of another option.
    if named is not cause:
        refused(data.draw(boxes(label, named.text)))
    # Two labels, in either order, the same one twice included.
    for pair in ([label, other], [other, label], [label, label]):
        joined = data.draw(st.sampled_from([", ", " or ", " and ", "/", "; ", " ", r"\,", ":", " ("])).join(
            dressed(one, data.draw) for one in pair
        )
        refused(rf"\boxed{{{joined}}}")
        refused(rf"\boxed{{{joined} {cause.text}}}")
        refused(rf"\boxed{{{pair[0]} {cause.text} {pair[1]}}}")
    # Words, and what hides or negates.
    for form in (
        "not {}",
        "{} is wrong",
        r"{} \neq",
        "{}?",
        "{}%",
        r"{}\phantom{{1}}",
        "{}\u200b",
        r"\color{{white}}{}",
        "{}!",
    ):
        refused(rf"\boxed{{{form.format(label)}}}")


@given(st.text(alphabet="C3c4 .:,()-_{}$\\text~\n", max_size=14))
@example("C3 - C4")
@settings(max_examples=500, deadline=None)
def test_an_accepted_box_shows_the_label_and_only_punctuation(content: str) -> None:
    # The box ends at the first brace that closes nothing.
    depths = [content[: end + 1].count("}") - content[: end + 1].count("{") for end in range(len(content))]
    inside = content[: depths.index(1)] if 1 in depths else content
    if telelogs_score("telelogs", rf"\boxed{{{content}}}", "C3")["score"]:
        assert re.sub(r"\\text(?=\s*\{)|[\s.:,()\-_{}$~\\]", "", inside) in ("C3", "c3", "3")
