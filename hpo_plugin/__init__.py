"""HPO and A-HPO (Hysteretic Policy Optimization, arXiv 2605.30201) for verl.

- :mod:`hpo_plugin.algorithm`: the mathematics; imports torch only.
- :mod:`hpo_plugin.verl`: what registers it in verl.
- :mod:`hpo_plugin.cpu`: verl's trainer on a machine without a GPU; opt-in.
- :mod:`hpo_plugin.tasks`: problems, prompts and rewards; know neither of the above.
- :mod:`hpo_plugin.configs`: Hydra configs, found by ``--config-name`` without a path.
- :mod:`hpo_plugin.cli`: the ``hpo-plugin`` command.

This module imports nothing, because verl loads the plugin in every one of its processes.
"""

__version__ = "0.1.0"
