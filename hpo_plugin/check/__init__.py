"""What ``hpo-plugin check`` looks at, in this process and on every node of a Ray cluster."""
