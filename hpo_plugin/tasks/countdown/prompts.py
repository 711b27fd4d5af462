"""Countdown prompts, in two layouts.

``public``: the wording of the public TinyZero data preparation, so that results compare; answers stand in ``<answer>``
tags. ``terse``: a dozen characters for byte- or character-level models of a few hundred thousand parameters; the whole
response is the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from hpo_plugin.tasks.countdown.reward import DATA_SOURCES

#: The user turn of TinyZero's template.
PUBLIC_TEMPLATE = (
    "Using the numbers {numbers}, create an equation that equals {target}. You can use basic arithmetic operations "
    "(+, -, *, /) and each number can only be used once. Show your work in <think> </think> tags. And return the final "
    "answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>."
)
#: How TinyZero begins the assistant's turn for the model. verl opens that turn itself through the chat template, which
#: cannot carry a prefill, so data files do not contain it; it is here for whoever builds prompts as plain text.
PUBLIC_PREFILL = "Let me solve this step by step.\n<think>"
#: Terse layout: ``3 7 5=22:``, answered by ``3*5+7``.
TERSE_TEMPLATE = "{numbers}={target}:"


def prompt_text(numbers: Sequence[int], target: int, layout: str = "public") -> str:
    """Return the text of a problem's user turn.

    Args:
        numbers: The given numbers, in the order in which they are shown.
        target: The value to reach.
        layout: ``public`` or ``terse``.

    Raises:
        ValueError: If the layout is unknown.
    """
    if layout == "public":
        return PUBLIC_TEMPLATE.format(numbers=list(numbers), target=target)
    if layout == "terse":
        return TERSE_TEMPLATE.format(numbers=" ".join(map(str, numbers)), target=target)
    raise ValueError(f"layout={layout!r} is not one of {', '.join(DATA_SOURCES)}")


def chat_prompt(numbers: Sequence[int], target: int, layout: str = "public") -> list[dict[str, str]]:
    """Return a problem as the chat messages verl's ``RLHFDataset`` reads: one user turn.

    Args:
        numbers: The given numbers, in the order in which they are shown.
        target: The value to reach.
        layout: ``public`` or ``terse``.

    Raises:
        ValueError: If the layout is unknown.
    """
    return [{"role": "user", "content": prompt_text(numbers, target, layout)}]
