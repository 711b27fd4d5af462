"""Hydra configs. ``hydra_plugins/hpo_plugin_searchpath.py`` puts this package on Hydra's search path.

Groups lie below ``hpo/``, because every Hydra application sees them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

#: Config groups of version 0.1.0 to their names since.
RENAMED_GROUPS = {
    "backend": "hpo/backend",
    "cpu_rollout": "hpo/cpu_rollout",
    "recipe/task": "hpo/task",
    "recipe/model": "hpo/model",
    "recipe/engine": "hpo/engine",
    "recipe/cluster": "hpo/cluster",
}


def config_names() -> set[str]:
    """Return the names of the configs of this package, as ``--config-name`` takes them."""
    return {path.stem for path in Path(__file__).parent.glob("*.yaml")}


def renamed(override: str) -> str:
    """Return an override with the present name of its group.

    Args:
        override: A Hydra override: ``recipe/task=countdown4`` becomes ``hpo/task=countdown4``.
    """
    group, equals, value = override.partition("=")
    name = group.lstrip("+~")
    prefix = group[: len(group) - len(name)]
    return f"{prefix}{RENAMED_GROUPS[name]}={value}" if equals and name in RENAMED_GROUPS else override


def explain_renamed_groups(overrides: Sequence[str]) -> str:
    """Return what to write instead of overrides of groups that were renamed; empty if there are none.

    Args:
        overrides: Hydra overrides.
    """
    changed = [(word, renamed(word)) for word in overrides]
    return "; ".join(f"{before} is now {after}" for before, after in changed if before != after)
