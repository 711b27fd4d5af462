"""What this package promises about speed, measured: ``python -m benchmarks`` (``make bench``).

A module here is one benchmark. It has ``run() -> list[dict]``, which measures and returns rows of a table, and
``main()``, which prints them; :mod:`benchmarks._table` says what a row holds. What a benchmark compares with stands in
the same file. Modules whose names begin with an underscore are what the benchmarks share.
"""
