"""The contribution to verl itself: what ``hpo-plugin upstream`` writes. Nothing here imports verl or torch."""
