"""Programs that measure how the package behaves under bad input, faults and load (``docs/robustness.md``).

``python -m torture`` runs the probes and writes their results. The tests in ``tests/torture`` run the same functions
with fewer inputs.
"""
