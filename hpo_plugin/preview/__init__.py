"""``hpo-plugin preview``: what HPO would have done to a run, from the rollouts that its trainer wrote."""
