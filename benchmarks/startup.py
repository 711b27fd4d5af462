"""Start-up: what the plugin adds to ``import verl``, which every process of a run pays.

Fresh interpreters import verl with our entry points and without any, in turn. Both look for entry points, as verl does
in any case (``VERL_USE_EXTERNAL_PLUGINS`` names ours, or none that exists).

The difference of two imports of seconds is uncertain by more than the bar. But until verl looks for plugins both run
the same code, so whatever they differ by until then is not the plugin's: it says how exact the difference is. The bar
is on what follows, from the search to the end of the import. The loading of the entry points is timed by itself too.
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
entry_points = importlib.metadata.entry_points
def searched(**arguments):
    if arguments.get("group") == "verl.plugins":
        searched.at = time.perf_counter()
    return entry_points(**arguments)
importlib.metadata.entry_points = searched
begin, begin_cpu = time.perf_counter(), time.process_time()
import verl
end = time.perf_counter()
wall, cpu, until, since = end - begin, time.process_time() - begin_cpu, searched.at - begin, end - searched.at
before_core = time.perf_counter()
imported = [name for name in {HEAVY!r} if name in sys.modules]
import verl.trainer.ppo.core_algos
core = time.perf_counter() - before_core
times = {{"wall": wall, "cpu": cpu, "until": until, "since": since, "core_algos": core}}
print(json.dumps(times | {{"loaded": loaded, "imported": imported}}))
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
    since, until, core = (
        [_median(samples, key) for samples in (with_ours, without)] for key in ("since", "until", "core_algos")
    )
    note = (
        f"from the search for plugins to the end: {since[0]:.1f} with, {since[1]:.1f} without; medians of {pairs} each"
    )
    rows = [row("added to import verl", since[0] - since[1], "ms", at_most=ADDED_BAR, note=note)]
    rows.append(row("of which loading our entry points", statistics.median(loads), "ms", note=_range(loads)))
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
    note = "the same code with and without: nothing of this is the plugin's"
    rows.append(row("difference before the search for plugins", until[0] - until[1], "ms", note=note))
    for key, name in (("wall", "wall time"), ("cpu", "CPU time")):
        medians = [_median(samples, key) for samples in (with_ours, without)]
        note = f"{medians[0]:,.0f} and {medians[1]:,.0f} ms"
        rows.append(row(f"import verl, with / without, {name}", medians[0] / medians[1], "", note=note))
    note = "here the estimators and losses are registered"
    rows.append(row("added to the later import of core_algos", core[0] - core[1], "ms", note=note))
    return rows


def _median(samples: Sequence[dict[str, Any]], key: str) -> float:
    return 1000 * statistics.median(sample[key] for sample in samples)


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
