"""verl on a CPU-only machine: chosen by ``VERL_PLATFORM=cpu`` and by nothing else.

Where each piece meets verl, and why, is the table of seams in ``docs/cpu.md``; ``tests/cpu/test_cpu_seams.py`` fails
when verl moves one of them.
"""
