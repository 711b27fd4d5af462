"""The ``hpo-plugin`` command line."""
