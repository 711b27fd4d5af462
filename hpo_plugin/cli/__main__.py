"""``python -m hpo_plugin.cli``: the ``hpo-plugin`` command if the directory of scripts is not on the path."""

from hpo_plugin.cli.app import app

app(prog_name="hpo-plugin")
