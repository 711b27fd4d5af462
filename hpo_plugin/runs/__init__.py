"""Training runs of verl: directory, trainer process, log, resuming, curves, and the launch on a cluster."""
