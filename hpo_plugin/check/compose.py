"""Composes a config like verl's trainer, in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import yaml
from omegaconf import DictConfig

from hpo_plugin.check.report import Finding
from hpo_plugin.configs import config_names, explain_renamed_groups


def compose(
    config_name: str, overrides: Sequence[str], config_dir: Path | None = None
) -> tuple[DictConfig | None, Finding]:
    """Compose a config like ``verl.trainer.main_ppo``: from verl's directory and the search-path plugins.

    Args:
        config_name: Name of the config, without directory and suffix.
        overrides: Hydra overrides.
        config_dir: An additional directory to search.

    Returns:
        The config, or None on failure; and a finding that states what was composed, or the error.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    verl = find_spec("verl")
    if verl is None or not verl.submodule_search_locations:
        return None, Finding("config", "verl is not installed", False, "install verl first")
    if config_name in config_names() and (instead := explain_renamed_groups(overrides)):
        found = f"hpo_plugin has renamed its config groups: {instead}"
        return None, Finding("config", found, False, "use the new names")
    if config_dir is not None and not config_dir.is_dir():
        found = f"--config-dir={config_dir} is not a directory"
        return None, Finding("config", found, False, "set --config-dir to an existing directory")
    directory = Path(verl.submodule_search_locations[0]) / "trainer" / "config"
    try:
        with _searched_too(config_dir), initialize_config_dir(str(directory), version_base=None):
            config = hydra_compose(config_name, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        return None, Finding(
            "config",
            f"{config_name}: {' '.join(str(error).split())}",
            False,
            "correct the name or the override",
        )
    shown = f" with {len(overrides)} overrides" if overrides else ""
    return config, Finding("config", f"{config_name}{shown}")


@contextmanager
def _searched_too(config_dir: Path | None) -> Iterator[None]:
    """The same as Hydra's ``--config-dir``. Hydra does not look for a primary config in ``hydra.searchpath``."""
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    if config_dir is None:
        yield
        return
    directories = [config_dir.resolve()]

    class ConfigDir(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            for directory in directories:
                search_path.append("command-line", f"file://{directory}")

    Plugins.instance().register(ConfigDir)
    try:
        yield
    finally:
        # Hydra cannot unregister a plugin.
        directories.clear()
