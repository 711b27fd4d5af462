"""The CPU backend of verl, which only ``VERL_PLATFORM=cpu`` selects.

``docs/cpu.md`` lists the places where the backend connects to verl, and the reasons. ``tests/cpu/test_cpu_seams.py``
fails if verl moves one of them.
"""
