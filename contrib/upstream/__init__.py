"""The contribution to verl itself: what ``python -m contrib.upstream`` writes. Nothing here imports verl or torch."""
