"""Start-up: what the plugin adds to ``import verl``, which every process of a run pays.

Fresh interpreters import verl with our entry points and without any, in turn. Both look for entry points, as verl does
in any case (``VERL_USE_EXTERNAL_PLUGINS`` names ours, or none that exists). The difference of two imports of seconds is
uncertain by more than the bar. So within each import with them, the loading of the entry points is also timed by
itself, which is all that verl does with them, and the bar is on that.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks._table import Row, markdown, row

PAIRS = 8
#: Bars: milliseconds, and modules of :data:`HEAVY` that our entry points import.
ADDED_BAR, HEAVY_BAR = 30.0, 0
HEAVY = ("verl.trainer.ppo.core_algos", "verl.workers.engine_workers")

_IMPORT = f"""
import importlib.metadata, json, sys, time
load, loaded = importlib.metadata.EntryPoint.load, {{}}
def timed(self):
    if self.group != "verl.plugins":
        return load(self)
    before, begin = set(sys.modules), time.perf_counter()
    import wrapt
    hooks = time.perf_counter()
    value = load(self)
    end, modules = time.perf_counter(), sorted(set(sys.modules) - before)
    loaded[self.name] = {{"ms": 1000 * (end - begin), "wrapt_ms": 1000 * (hooks - begin), "modules": modules}}
    return value
importlib.metadata.EntryPoint.load = timed
begin, begin_cpu = time.perf_counter(), time.process_time()
import verl
wall, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
before_core = time.perf_counter()
imported = [name for name in {HEAVY!r} if name in sys.modules]
import verl.trainer.ppo.core_algos
core = time.perf_counter() - before_core
print(json.dumps({{"wall": wall, "cpu": cpu, "core_algos": core, "loaded": loaded, "imported": imported}}))
"""


def fresh(script: str, plugins: str, **environment: str) -> Any:
    """Run a script in a fresh interpreter; return what its last line says.

    Args:
        script: What to run.
        plugins: ``VERL_USE_EXTERNAL_PLUGINS``.
        **environment: Further variables.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VERL_")}
    # Without bytecode, imports would be compiling.
    inherited.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**inherited, "VERL_USE_EXTERNAL_PLUGINS": plugins, **environment},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def run(pairs: int = PAIRS) -> list[Row]:
    """Measure everything.

    Args:
        pairs: Imports with, and imports without.
    """
    ours, none = "hpo,hpo_cpu", "no-plugin-of-this-name"
    # Once each before anything is timed: bytecode is written, files are in memory.
    fresh(_IMPORT, ours)
    with_ours: list[dict[str, Any]] = []
    without: list[dict[str, Any]] = []
    for number in range(pairs):
        # In turn, and each first every other time.
        for plugins in (ours, none) if number % 2 else (none, ours):
            (with_ours if plugins == ours else without).append(fresh(_IMPORT, plugins))
    on_cpu = fresh(_IMPORT, ours, VERL_PLATFORM="cpu")
    loads = [sum(entry["ms"] for entry in sample["loaded"].values()) for sample in with_ours]
    modules = [name for entry in with_ours[0]["loaded"].values() for name in entry["modules"]]
    assert set(with_ours[0]["loaded"]) == {"hpo", "hpo_cpu"}, "verl has not loaded our entry points"
    assert not without[0]["loaded"], "verl has loaded plugins in the runs without"
    rows = [row("loading our entry points", statistics.median(loads), "ms", at_most=ADDED_BAR, note=_range(loads))]
    wrapt = [sum(entry["wrapt_ms"] for entry in sample["loaded"].values()) for sample in with_ours]
    limit = "limit: of which importing wrapt, whose hooks we use"
    rows.append(row(limit, statistics.median(wrapt), "ms", note=_range(wrapt)))
    cpu_loads = sum(entry["ms"] for entry in on_cpu["loaded"].values())
    rows.append(row("loading them with VERL_PLATFORM=cpu", cpu_loads, "ms", note="one import"))
    rows.append(
        row(
            "core_algos or engine_workers imported by it",
            len(with_ours[0]["imported"]) - len(without[0]["imported"]),
            "modules",
            at_most=HEAVY_BAR,
            note=f"{len(modules)} modules in all: {_packages(modules)}",
        )
    )
    for key, name in (("wall", "wall time"), ("cpu", "CPU time")):
        a, b = ([1000 * sample[key] for sample in samples] for samples in (with_ours, without))
        rows.append(row(f"import verl without, {name}", statistics.median(b), "ms", note=_range(b)))
        rows.append(row(f"import verl with, {name}", statistics.median(a), "ms", note=_range(a)))
        ratio = statistics.median(a) / statistics.median(b)
        rows.append(row(f"with / without, {name}", ratio, "", note=f"medians of {pairs} pairs in turn"))
    a, b = ([1000 * sample["core_algos"] for sample in samples] for samples in (with_ours, without))
    difference = statistics.median(a) - statistics.median(b)
    note = "difference of medians; here the estimators and losses are registered"
    rows.append(row("added to the later import of core_algos", difference, "ms", note=note))
    return rows


def _range(values: Sequence[float]) -> str:
    return f"{min(values):,.1f} to {max(values):,.1f} in {len(values)}"


def _packages(modules: Sequence[str]) -> str:
    counts: dict[str, int] = {}
    for name in modules:
        package = name.partition(".")[0]
        counts[package] = counts.get(package, 0) + 1
    return ", ".join(f"{count} of {package}" for package, count in counts.items())


def main() -> None:
    """Print the table."""
    print(markdown(run()))


if __name__ == "__main__":
    main()
