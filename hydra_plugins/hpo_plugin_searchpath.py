"""Puts this package's configs on Hydra's search path.

Hydra imports every module of the namespace package ``hydra_plugins``; with this one installed,
``python -m verl.trainer.main_ppo --config-name=countdown_cpu`` finds the config without ``--config-path``.
"""

import itertools
import sys
from collections.abc import Sequence

from hydra.core.config_search_path import ConfigSearchPath
from hydra.errors import ConfigCompositionException
from hydra.plugins.search_path_plugin import SearchPathPlugin

from hpo_plugin.configs import config_names, explain_renamed_groups


class HpoPluginSearchPath(SearchPathPlugin):
    """Appends ``pkg://hpo_plugin.configs``; a config of the same name in the application's own path wins."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append our configs, after the application's own.

        Raises:
            ConfigCompositionException: The command line selects a config of ours and a group by its name of 0.1.0.
        """
        search_path.append(provider="hpo_plugin", path="pkg://hpo_plugin.configs")
        _refuse_renamed_groups(sys.argv[1:])


def _refuse_renamed_groups(arguments: Sequence[str]) -> None:
    named = {word.partition("=")[2] for word in arguments if word.startswith("--config-name=")}
    named |= {after for word, after in itertools.pairwise(arguments) if word in ("--config-name", "-cn")}
    if named & config_names() and (instead := explain_renamed_groups(arguments)):
        raise ConfigCompositionException(f"hpo_plugin has renamed its config groups: {instead}")
