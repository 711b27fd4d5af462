"""Countdown: reach a target from given numbers, each used once, with + - * / and parentheses.

Names are loaded on first use, so that a reward worker that imports :func:`compute_score` imports nothing else.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hpo_plugin.tasks.countdown.prompts import chat_prompt, prompt_text
from hpo_plugin.tasks.countdown.reward import DATA_SOURCES, CountdownVerdict, compute_score, judge

if TYPE_CHECKING:
    from hpo_plugin.tasks.countdown.dataset import (
        PUBLIC_DATASET,
        generate_splits,
        prepare_countdown,
        to_row,
    )
    from hpo_plugin.tasks.countdown.problems import (
        CountdownConfig,
        CountdownProblem,
        generate_problems,
        problem_stream,
        random_expression,
        reachable_targets,
        solvable,
        solve,
    )
    from hpo_plugin.tasks.sources import SourceUnavailableError

_LAZY = {
    "problems": (
        "CountdownConfig",
        "CountdownProblem",
        "generate_problems",
        "problem_stream",
        "random_expression",
        "reachable_targets",
        "solvable",
        "solve",
    ),
    "dataset": (
        "PUBLIC_DATASET",
        "SourceUnavailableError",
        "generate_splits",
        "prepare_countdown",
        "to_row",
    ),
}
_MODULE_OF = {name: module for module, names in _LAZY.items() for name in names}

__all__ = [
    "DATA_SOURCES",
    "PUBLIC_DATASET",
    "CountdownConfig",
    "CountdownProblem",
    "CountdownVerdict",
    "SourceUnavailableError",
    "chat_prompt",
    "compute_score",
    "generate_problems",
    "generate_splits",
    "judge",
    "prepare_countdown",
    "problem_stream",
    "prompt_text",
    "random_expression",
    "reachable_targets",
    "solvable",
    "solve",
    "to_row",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
