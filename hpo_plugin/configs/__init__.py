"""Hydra configs. ``hydra_plugins/hpo_plugin_searchpath.py`` adds this package to Hydra's search path.

Config groups are below ``hpo/``, because they are on the search path of every Hydra application.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

#: Config group of version 0.1.0 -> its present name.
RENAMED_GROUPS = {
    "backend": "hpo/backend",
    "cpu_rollout": "hpo/cpu_rollout",
    "recipe/task": "hpo/task",
    "recipe/model": "hpo/model",
    "recipe/engine": "hpo/engine",
    "recipe/cluster": "hpo/cluster",
}


def config_names() -> set[str]:
    """Return the names of the configs of this package, as for ``--config-name``."""
    return {path.stem for path in Path(__file__).parent.glob("*.yaml")}


def renamed(override: str) -> str:
    """Return an override with the present name of its config group.

    Args:
        override: A Hydra override: ``recipe/task=countdown4`` becomes ``hpo/task=countdown4``.
    """
    group, equals, value = override.partition("=")
    name = group.lstrip("+~")
    prefix = group[: len(group) - len(name)]
    return f"{prefix}{RENAMED_GROUPS[name]}={value}" if equals and name in RENAMED_GROUPS else override


def explain_renamed_groups(overrides: Sequence[str]) -> str:
    """Return the new form of overrides whose config groups were renamed; empty if there are none.

    Args:
        overrides: Hydra overrides.
    """
    changed = [(word, renamed(word)) for word in overrides]
    return "; ".join(f"{before} is now {after}" for before, after in changed if before != after)
