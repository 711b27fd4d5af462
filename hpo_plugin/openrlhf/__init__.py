"""HPO and A-HPO in OpenRLHF: ``python -m hpo_plugin.openrlhf`` in place of ``python -m openrlhf.cli.train_ppo_ray``.

This module imports nothing, because Ray imports the package in every worker process.
"""
