"""Run probes with bad input, faults and load, and write what they find.

    python -m torture                       # all probes; hours
    python -m torture countdown-text        # these
    python -m torture --list                # the probes and their cases
    python -m torture --record --write      # copy the results to docs/torture.json and docs/robustness.md

Each case runs in a process of its own, and its result is a file in the workspace. To resume an interrupted command, run
it again: cases with a result are not run again. The exit status is 1 if a case found a failure.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.__main__ import machine, versions
from hpo_plugin.files import atomic_write
from torture.probe import Probe, Result, merged

ROOT = Path(__file__).resolve().parents[1]
#: Modules with probes, in the order of the tables.
MODULES: tuple[str, ...] = (
    "torture.algorithm_inputs",
    "torture.verl_inputs",
    "torture.trl_inputs",
    "torture.text",
    "torture.coverage_guided",
    "torture.rollout_text",
    "torture.settings",
    "torture.faults",
    "torture.trl_faults",
    "torture.determinism",
    "torture.long_run",
    "torture.scale",
)
RESULTS = ROOT / "docs" / "torture.json"
PAGE = ROOT / "docs" / "robustness.md"
#: Lines of a case's output that a failure shows.
SHOWN_LINES = 15


def probes(modules: Sequence[str] = MODULES) -> dict[str, Probe]:
    """The probes by name."""
    return {probe.name: probe for module in modules for probe in importlib.import_module(module).PROBES}


def child(modules: str, name: str, case: str, answer: Path) -> None:
    """Run a case in this process, and write its result."""
    try:
        result = probes(modules.split(","))[name].cases[case](Path.cwd())
    except Exception:
        result = Result(failures=[f"exception in the probe: {traceback.format_exc()}"])
    atomic_write(answer, json.dumps(dataclasses.asdict(result)).encode())


def run_case(modules: Sequence[str], probe: Probe, case: str, kept: Path) -> Result:
    """Run a case in a process of its own; a case that ends without a result is a failure.

    Args:
        modules: modules with probes.
        probe: the probe.
        case: the case.
        kept: gets the folder of a case with a failure: its output and what it has written.
    """
    shutil.rmtree(kept, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="torture-", ignore_cleanup_errors=True) as folder:
        answer, log, work = (Path(folder) / name for name in ("answer.json", "output.log", "work"))
        work.mkdir()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))}
        command = [sys.executable, "-m", "torture", "--child", ",".join(modules), probe.name, case, str(answer)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=work, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                status: int | None = process.wait(timeout=probe.limit)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if answer.exists():
            result = Result(**json.loads(answer.read_bytes()))
        else:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-SHOWN_LINES:])
            how = f"did not end within {probe.limit:g} s" if status is None else f"ended with exit status {status}"
            result = Result(failures=[f"the case {how} and without a result\n{tail}"])
        if result.failures:
            shutil.move(folder, kept)
        return result


def run(names: Sequence[str], workspace: Path, modules: Sequence[str] = MODULES) -> bool:
    """Run the cases that have no result yet; return whether no case has a failure."""
    fine = True
    for name, probe in probes(modules).items():
        if name not in names:
            continue
        folder = workspace / name
        folder.mkdir(parents=True, exist_ok=True)
        for case in probe.cases:
            path, kept = folder / f"{case}.json", folder / f"{case}.failed"
            if path.exists():
                result = Result(**json.loads(path.read_bytes())["result"])
                print(f"{name}/{case}: has a result", flush=True)
            else:
                begin = time.monotonic()
                result = run_case(modules, probe, case, kept)
                record = {
                    "result": dataclasses.asdict(result),
                    "seconds": round(time.monotonic() - begin, 1),
                    "date": time.strftime("%Y-%m-%d"),
                    "machine": machine(),
                    "versions": versions(),
                }
                print(f"{name}/{case}: {result.inputs:,} inputs, {len(result.failures)} failures", flush=True)
                # A case with a failure is run again by the next command.
                if result.failures:
                    print(f"  output and files: {kept}", flush=True)
                else:
                    atomic_write(path, json.dumps(record, indent=1).encode())
            for failure in result.failures[:5]:
                print(f"  {failure}", flush=True)
            fine = fine and not result.failures
    return fine


def record(workspace: Path, known: dict[str, Any], modules: Sequence[str] = MODULES) -> dict[str, Any]:
    """The results by probe, in the form of ``docs/torture.json``.

    Args:
        workspace: the workspace.
        known: earlier results. They are kept for probes that lack the result of a case, unless a case has failed.
        modules: modules with probes.
    """
    found = dict(known)
    for name, probe in probes(modules).items():
        if any((workspace / name / f"{case}.failed").exists() for case in probe.cases):
            print(f"{name}: a case has failed")
            found.pop(name, None)
            continue
        paths = [workspace / name / f"{case}.json" for case in probe.cases]
        if not all(path.exists() for path in paths):
            print(f"{name}: not all cases have a result")
            continue
        records = [json.loads(path.read_bytes()) for path in paths]
        total = merged([Result(**record["result"]) for record in records])
        found[name] = {
            **dataclasses.asdict(total),
            "cases": len(records),
            "seconds": round(sum(record["seconds"] for record in records)),
            "dates": sorted({record["date"] for record in records}),
            "machine": records[-1]["machine"],
            "versions": records[-1]["versions"],
        }
    return found


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.3g}"


def table(section: str, results: dict[str, Any], modules: Sequence[str] = MODULES) -> str:
    """The Markdown table of a section; a probe without a result is shown as not run."""
    lines = ["| what is tried | outcome of each input | inputs | measured |", "|---|---|---:|---|"]
    for name, probe in probes(modules).items():
        if probe.section != section:
            continue
        found = results.get(name)
        if found is None:
            lines.append(f"| {probe.title} | {probe.expected} | not run | |")
            continue
        measured = [f"{key}: {_number(value)}" for part in ("counts", "worst") for key, value in found[part].items()]
        lines.append(f"| {probe.title} | {probe.expected} | {found['inputs']:,} | {'; '.join(measured)} |")
    return "\n".join(lines)


def page(text: str, results: dict[str, Any], modules: Sequence[str] = MODULES) -> str:
    """The page with its tables written anew."""
    tables = re.compile(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)
    return tables.sub(
        lambda found: f"<!-- table: {found[1]} -->\n\n{table(found[1], results, modules)}\n\n<!-- end -->", text
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m torture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="PROBE", help="which; all by default")
    parser.add_argument("--workspace", type=Path, default=ROOT / "runs" / "torture", help="default: runs/torture")
    parser.add_argument("--list", action="store_true", help="list the probes and their cases")
    parser.add_argument("--record", action="store_true", help="write the workspace's results to docs/torture.json")
    parser.add_argument("--write", action="store_true", help="write the tables of docs/robustness.md")
    parser.add_argument("--child", nargs=4, metavar=("MODULES", "PROBE", "CASE", "FILE"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        modules, name, case, answer = given.child
        child(modules, name, case, Path(answer))
        return 0
    every = probes()
    for name in given.names:
        if name not in every:
            parser.error(f"{name!r} is not one of {', '.join(every)}")
    if given.list:
        for name, probe in every.items():
            print(f"{name}: {probe.title} ({len(probe.cases)} cases: {', '.join(probe.cases)})")
        return 0
    if given.record:
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        written = record(given.workspace, known)
        RESULTS.write_text(json.dumps(written, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    if given.write:
        PAGE.write_text(page(PAGE.read_text(), json.loads(RESULTS.read_text())))
    if given.record or given.write:
        return 0
    return 0 if run(given.names or list(every), given.workspace) else 1


if __name__ == "__main__":
    sys.exit(main())
