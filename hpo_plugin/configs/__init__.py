"""Hydra configs, reached by ``--config-name`` through :mod:`hydra_plugins.hpo_plugin_searchpath`."""
