"""The checks of ``hpo-plugin check``, in this process and on every node of a Ray cluster."""
