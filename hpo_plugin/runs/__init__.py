"""One training run of verl: its directory, process, log, resume, curves, and its launch on a cluster."""
