"""TeleLogs: synthetic rows per second, with the shares of the stages, and the text that takes the reward longest.

A row is generated, checked by the oracle and rendered. The limit beside it is rendering alone: the text of some 4,500
characters that has to be written in any case.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from benchmarks._table import Row, markdown, row
from benchmarks._timing import rate, worst
from hpo_plugin.tasks.telelogs import diagnose, generate, render_prompt
from hpo_plugin.tasks.telelogs.reward import MAX_SEARCHED_CHARACTERS, compute_score
from hpo_plugin.tasks.telelogs.tables import Cause

SEED = 0
ROWS = 3_000
#: Bars: rows a second on one core, milliseconds of the worst text.
ROWS_BAR, WORST_TEXT_BAR = 2_000, 5.0
#: Characters of a hostile text; the reward reads the last MAX_SEARCHED_CHARACTERS of them.
HOSTILE_CHARACTERS = 262_144


def make_rows(rows: int = ROWS) -> None:
    """Generate rows, each checked by the oracle, and render their prompts."""
    for made in generate(rows, balance="train", seed=SEED).rows:
        render_prompt(made.case)


def ordinary_responses(size: int = 5_000) -> list[str]:
    """Chains of thought of some 1,500 characters with a right, a wrong or a malformed box, or none."""
    rng = random.Random(SEED)
    boxes = [r"\boxed{C3}", r"\boxed{ 3. }", r"\boxed{C5}", r"\boxed{\textbf{c3}}", r"\boxed{the third}", "C3"]
    boxes += [rf"\boxed{{C3: {Cause.C3.text}}}", rf"\boxed{{\text{{C5: {Cause.C5.text}}}}}"]
    thought = "The throughput at 15:03:{:02d} is {} Mbps, below 600, while the serving cell is {}.\n"
    return [
        "".join(thought.format(i % 60, rng.randint(100, 1500), rng.randint(1, 900)) for i in range(rng.randint(5, 30)))
        + f"The root cause is {rng.choice(boxes)}."
        for _ in range(size)
    ]


def hostile_texts(rng: random.Random) -> Iterator[str]:
    """Texts of boxes and braces, beyond the bound: open, closed, nested, almost boxes."""
    words = ["{", "}", "{}", "}{", "\\", r"\boxed", r"\\boxed{", "x", "\\boxed \n{", r"\text {", "C ", r"\, "]
    words += [r"\boxed{", r"\boxed{}", r"\boxed{{", r"\boxed{C3}"]
    parts = [r"\boxed{", "{", "}", "\\", r"\boxed", "C3"]
    words += ["".join(rng.choices(parts, k=rng.randint(2, 8))) for _ in range(40)]
    for word in words:
        repeated = word * (HOSTILE_CHARACTERS // len(word))
        yield repeated
        yield f"\U0001f600{repeated}"
        # In a box that begins where the search does.
        yield rf"{repeated}\boxed{{{repeated[: MAX_SEARCHED_CHARACTERS - 8]}"
        yield rf"{repeated}\boxed{{{repeated[: MAX_SEARCHED_CHARACTERS - 9]}}}"
    half = MAX_SEARCHED_CHARACTERS // 2
    yield "{" * half + "}" * half
    yield r"\boxed{" * (half // 4) + "}" * (half // 4)
    yield rf"\boxed{{{'{}' * (half - 10)}}}"
    yield r"\boxed{" + "\\text{" * (half // 3) + "}"


def run() -> list[Row]:
    """Measure everything."""
    cases = [made.case for made in generate(ROWS, balance="train", seed=SEED).rows]
    measured, spread = rate(make_rows, ROWS, passes=5)
    rows = [row("rows", measured, "per second and core", at_least=ROWS_BAR, note=spread)]
    stages = {
        "of which the oracle, once a row": lambda: [diagnose(case) for case in cases],
        "limit: rendering alone": lambda: [render_prompt(case) for case in cases],
    }
    for name, work in stages.items():
        measured, spread = rate(work, ROWS, passes=5)
        rows.append(row(name, measured, "per second and core", note=spread))
    responses = ordinary_responses()
    measured, spread = rate(lambda: [compute_score("telelogs", text, "C3") for text in responses], len(responses))
    rows.append(row("score", measured, "per second and core", note=spread))
    hostile = list(hostile_texts(random.Random(SEED)))
    milliseconds, text = worst(hostile, lambda text: compute_score("telelogs", text, "C3"))
    shown = f"{len(text):,} characters: {text[:20] + '…' + text[-15:]!r}"
    rows.append(row("score, worst text found", milliseconds, "ms", at_most=WORST_TEXT_BAR, note=shown))
    return rows


def main() -> None:
    """Print the table."""
    print(markdown(run()))


if __name__ == "__main__":
    main()
