"""Run benchmarks, print their tables, and write them with the machine and the versions.

    python -m benchmarks                       # all but the training runs; some minutes
    python -m benchmarks countdown startup     # these
    python -m benchmarks --whole-step          # the training runs too

Each benchmark runs in a process of its own. The exit status is 1 if a bar is missed, and if a benchmark fails or is not
there: neither is passed over.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks._table import markdown, number

ROOT = Path(__file__).resolve().parents[1]
#: What `make bench` runs, in this order. A name without a module is reported as missing.
BENCHMARKS = ("advantage", "policy_loss", "startup", "countdown", "telelogs")
#: Runs of verl's trainer: only with --whole-step, or by name.
TRAINING = ("whole_step",)
#: Seconds after which a benchmark has failed.
LIMIT = {"whole_step": 3600.0}
DEFAULT_LIMIT = 600.0
DISTRIBUTIONS = ("hpo-plugin", "verl", "torch", "transformers", "tensordict", "ray", "numpy", "wrapt")

Result = dict[str, Any]


def measure(
    name: str, *, package: str = "benchmarks", limit: float | None = None, arguments: Sequence[str] = ()
) -> Result:
    """Run one benchmark in a process of its own.

    Args:
        name: Module in ``package``.
        package: Where it is.
        limit: Seconds it may take; default by :data:`LIMIT`.
        arguments: Of its ``run``.

    Returns:
        ``status`` (``ok``, ``missing`` or ``failed``), ``rows``, ``error`` (None where it is ok), ``seconds``, and
        ``load``, the machine's load average (one minute) before it began.
    """
    module = f"{package}.{name}"
    result: Result = {"status": "ok", "rows": [], "error": None, "seconds": 0.0, "load": os.getloadavg()[0]}
    if importlib.util.find_spec(module) is None:
        return {**result, "status": "missing", "error": f"there is no module {module}"}
    begin = time.monotonic()
    seconds = limit or LIMIT.get(name, DEFAULT_LIMIT)
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "benchmarks", "--child", module, str(answer), *arguments]
        try:
            # What it prints must not come between the tables.
            status = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            result.update(status="failed", error=f"did not end within {seconds:g} seconds")
        else:
            if answer.exists():
                result.update(json.loads(answer.read_bytes()))
            else:
                how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
                result.update(status="failed", error=f"ended without a result: {how}")
    result["seconds"] = time.monotonic() - begin
    return result


def child(module: str, answer: Path, arguments: Sequence[str]) -> None:
    """Run a benchmark in this process and write what it returns, or why it could not, to a file."""
    try:
        rows = importlib.import_module(module).run(*arguments)
        if not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
            raise TypeError(f"{module}.run() returned no list of rows: {rows!r:.200}")
        # Numbers of numpy and torch become Python's.
        text = json.dumps({"status": "ok", "rows": rows}, default=lambda value: value.item())
    except Exception:
        text = json.dumps({"status": "failed", "error": traceback.format_exc()})
    answer.write_text(text, encoding="utf-8")


def machine() -> dict[str, Any]:
    """What the results depend on, of the machine."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "architecture": platform.machine(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "system": platform.system(),
    }


def versions(distributions: Sequence[str] = DISTRIBUTIONS) -> dict[str, str]:
    """Python's and those of distributions."""
    found = {"python": platform.python_version()}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def missed(results: Mapping[str, Result]) -> list[str]:
    """Name everything that is not as it should be: benchmarks that are missing or failed, and bars that are missed."""
    found = []
    for name, result in results.items():
        if result["status"] in ("missing", "failed"):
            found.append(f"{name} {'is missing' if result['status'] == 'missing' else 'failed'}")
        found += [f"{name}: {next(iter(row.values()), '')}" for row in result["rows"] if row.get("met") is False]
    return found


def section(name: str, result: Result) -> str:
    """Return what is printed of one benchmark."""
    head = f"## {name}\n\n"
    if result["status"] == "not run":
        return f"{head}Not run. {result['error']}"
    if result["status"] != "ok":
        return f"{head}**{result['status']}**\n\n```text\n{result['error'].strip()}\n```"
    table = markdown(result["rows"])
    return f"{head}{table}\n\n{result['seconds']:.0f} s; load average before: {result['load']:.1f}."


def report(names: Sequence[str], output: Path, *, package: str = "benchmarks", left_out: Sequence[str] = ()) -> int:
    """Run benchmarks, print each table when it is there, and write all of them.

    Args:
        names: Which, in this order.
        output: The JSON file.
        package: Where the modules are.
        left_out: Benchmarks that are named as not run.

    Returns:
        The exit status.
    """
    facts = {"machine": machine(), "versions": versions()}
    about = {**facts, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    print(", ".join(f"{key} {value}" for part in facts.values() for key, value in part.items()))
    results: dict[str, Result] = {}
    for name in [*names, *left_out]:
        if name in names:
            results[name] = measure(name, package=package)
        else:
            how = f"make bench ARGS={'--whole-step' if name in TRAINING else name}"
            results[name] = {"status": "not run", "rows": [], "error": how, "seconds": 0.0, "load": None}
        print(f"\n{section(name, results[name])}", flush=True)
        # After each, so that an interrupted call leaves what it has.
        output.parent.mkdir(parents=True, exist_ok=True)
        written = json.dumps({**about, "benchmarks": results}, indent=2, ensure_ascii=False)
        output.write_text(f"{written}\n", encoding="utf-8")
    bars = [row["met"] for result in results.values() for row in result["rows"] if row.get("met") is not None]
    wrong = missed(results)
    print(f"\n{number(sum(bars))} of {number(len(bars))} bars are met. Written: {output}")
    for line in wrong:
        print(f"- {line}")
    return 1 if wrong else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = (*BENCHMARKS, *TRAINING)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(every)}")
    parser.add_argument("--whole-step", action="store_true", help="add the training runs (some ten minutes)")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "bench.json", help="default: runs/bench.json")
    parser.add_argument("--child", nargs="+", metavar="MODULE FILE ARGUMENT", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        child(given.child[0], Path(given.child[1]), given.child[2:])
        return 0
    for name in given.names:
        if name not in every:
            parser.error(f"{name!r} is not one of {', '.join(every)}")
    names = [*(given.names or BENCHMARKS), *(TRAINING if given.whole_step else ())]
    return report(list(dict.fromkeys(names)), given.output, left_out=[name for name in every if name not in names])


if __name__ == "__main__":
    sys.exit(main())
