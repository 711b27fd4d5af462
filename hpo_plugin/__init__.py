"""HPO and A-HPO (Hysteretic Policy Optimization, arXiv 2605.30201) for verl, TRL and OpenRLHF.

- :mod:`hpo_plugin.algorithm`, ``fused``, ``variants``: the mathematics; imports torch alone.
- :mod:`hpo_plugin.verl`, ``trl``, ``openrlhf``: the adapters to verl, TRL and OpenRLHF; ``slime``: a hook for slime.
- :mod:`hpo_plugin.tasks`: problems, prompts and rewards, behind one protocol.
- :mod:`hpo_plugin.cpu`: verl's trainer on a machine without a GPU; opt-in.
- :mod:`hpo_plugin.recipe`, ``check``, ``runs``, ``quickstart``, ``preview``, ``study``: what the commands do.
- :mod:`hpo_plugin.configs`: Hydra configs, found by ``--config-name`` without a path.
- :mod:`hpo_plugin.cli`: the ``hpo-plugin`` command.

``docs/contributing.md`` says where to look for what.

This module imports nothing, because verl loads the plugin in every one of its processes.
"""

__version__ = "0.2.0"
