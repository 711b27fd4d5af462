"""The entry point of version 0.1.0, which an editable install keeps until it is installed again."""

from hpo_plugin.verl import plugin  # noqa: F401
