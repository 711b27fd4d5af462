"""What ``make gpu-proof`` measures on a device (``scripts/gpu_proof.py``, ``docs/gpu.md``).

A module here has ``run(device) -> list[dict]``, as those of :mod:`benchmarks` have ``run()``.
:func:`benchmarks.__main__.measure` runs it in a process of its own, so that no memory of the device stays taken.
"""
