"""The contributions to verl and to TRL: what ``python -m contrib.upstream`` writes. It imports no torch."""
