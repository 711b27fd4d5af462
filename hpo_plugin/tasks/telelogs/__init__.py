"""TeleLogs: find the root cause of low 5G throughput from a drive test and the engineering parameters of the cells.

Names are loaded on first use, so that a reward worker that imports :func:`compute_score` imports nothing else.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hpo_plugin.tasks.telelogs.reward import TeleLogsVerdict, compute_score, judge, summarize

if TYPE_CHECKING:
    from hpo_plugin.tasks.telelogs.dataset import (
        PUBLIC_DATASET,
        NoAccessError,
        prepare_telelogs,
    )
    from hpo_plugin.tasks.telelogs.prompts import PromptError, parse_prompt, render_prompt
    from hpo_plugin.tasks.telelogs.reasoning import chain_of_thought
    from hpo_plugin.tasks.telelogs.rules import Diagnosis, RuleResult, diagnose
    from hpo_plugin.tasks.telelogs.synthetic import SyntheticRow, generate, relabeled
    from hpo_plugin.tasks.telelogs.tables import Case, Cause, DriveTestRow, Neighbor, Option, RadioCell
    from hpo_plugin.tasks.telelogs.variants import REDUCTIONS, Reduction

_LAZY = {
    "dataset": ("PUBLIC_DATASET", "NoAccessError", "prepare_telelogs"),
    "prompts": ("PromptError", "parse_prompt", "render_prompt"),
    "reasoning": ("chain_of_thought",),
    "rules": ("Diagnosis", "RuleResult", "diagnose"),
    "synthetic": ("SyntheticRow", "generate", "relabeled"),
    "tables": ("Case", "Cause", "RadioCell", "DriveTestRow", "Neighbor", "Option"),
    "variants": ("REDUCTIONS", "Reduction"),
}
_MODULE_OF = {name: module for module, names in _LAZY.items() for name in names}

__all__ = [
    "PUBLIC_DATASET",
    "REDUCTIONS",
    "Case",
    "Cause",
    "Diagnosis",
    "DriveTestRow",
    "Neighbor",
    "NoAccessError",
    "Option",
    "PromptError",
    "RadioCell",
    "Reduction",
    "RuleResult",
    "SyntheticRow",
    "TeleLogsVerdict",
    "chain_of_thought",
    "compute_score",
    "diagnose",
    "generate",
    "judge",
    "parse_prompt",
    "prepare_telelogs",
    "relabeled",
    "render_prompt",
    "summarize",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
