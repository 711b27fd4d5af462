"""Puts this package's configs on Hydra's search path.

Hydra imports every module of the namespace package ``hydra_plugins``; with this one installed,
``python -m verl.trainer.main_ppo --config-name=countdown_cpu`` finds the config without ``--config-path``.
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class HpoPluginSearchPath(SearchPathPlugin):
    """Appends ``pkg://hpo_plugin.configs``; a config of the same name in the application's own path wins."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append our configs, after the application's own."""
        search_path.append(provider="hpo_plugin", path="pkg://hpo_plugin.configs")
