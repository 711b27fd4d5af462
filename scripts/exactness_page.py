"""Writes the tables of ``docs/trl.md`` and ``docs/openrlhf.md``: how exact the gradients are with each framework.

    PYTHONPATH=.venv/trl-1.16.0 .venv/bin/python scripts/exactness_page.py trl --run    # into docs/trl.json
    .venv-openrlhf/bin/python scripts/exactness_page.py openrlhf --run                  # into docs/openrlhf.json
    python scripts/exactness_page.py trl openrlhf --write                               # the pages, from these files

``--run`` measures with the version that is found. Cases and references are those of the tests of each adapter.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROCESSES = (1, 2)
#: A fault that needs two processes to be one.
OF_PROCESSES = "α of each process"


@dataclass(frozen=True)
class Framework:
    """A framework with a page.

    Attributes:
        name: Its distribution, and the folder of its tests.
        title: As in a text.
        module: Of the tests that have the cases.
        packages: Whose versions are recorded.
    """

    name: str
    title: str
    module: str
    packages: tuple[str, ...]

    @property
    def page(self) -> Path:
        """The page with the table."""
        return ROOT / "docs" / f"{self.name}.md"

    @property
    def results(self) -> Path:
        """What was measured, by release of the framework."""
        return ROOT / "docs" / f"{self.name}.json"


FRAMEWORKS = {
    framework.name: framework
    for framework in (
        Framework("trl", "TRL", "test_exactness", ("torch", "transformers", "accelerate")),
        Framework("openrlhf", "OpenRLHF", "test_openrlhf_exactness", ("torch", "transformers", "deepspeed")),
    )
}


def run_cases(harness: Path, processes: int, cases: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a harness of the tests, under torchrun where there are several processes.

    Args:
        harness: a script that takes two files: cases, and what it found for each.
        processes: how many.
        cases: what the harness takes.
        folder: for the two files.

    Returns:
        What the harness found.
    """
    job, out = folder / "cases.json", folder / "out.json"
    job.write_text(json.dumps(cases))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(harness), str(job), str(out)]
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1400)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


def measure(framework: Framework) -> dict[str, Any]:
    """The largest relative error of a gradient in each case, over one and two processes; seed 1."""
    folder = ROOT / "tests" / framework.name
    # The tests and their stand-ins.
    sys.path += [str(folder), str(folder / "stand_ins")]
    tests = importlib.import_module(framework.module)
    cases = tests.CASES | tests.FAULTS
    errors: dict[str, dict[str, float]] = {name: {} for name in cases}
    for processes in PROCESSES:
        with tempfile.TemporaryDirectory() as directory:
            for name, result in run_cases(tests.HARNESS, processes, cases, Path(directory)).items():
                errors[name][str(processes)] = max(result["errors"])
    errors[OF_PROCESSES].pop("1")
    return {
        "date": datetime.date.today().isoformat(),
        "versions": {package: version(package) for package in framework.packages},
        "errors": errors,
    }


def table(title: str, results: dict[str, Any]) -> str:
    """The table in Markdown, newest release first."""
    releases = sorted(results, key=Version, reverse=True)
    columns = [(release, str(processes)) for release in releases for processes in PROCESSES]
    words = {"1": "1 process", "2": "2 processes"}
    lines = [["case", *(f"{title} {release}, {words[processes]}" for release, processes in columns)]]
    lines.append(["---"] * len(lines[0]))
    for name in results[releases[0]]["errors"]:
        found = [results[release]["errors"][name].get(processes) for release, processes in columns]
        lines.append([name, *("—" if error is None else f"{error:.1e}" for error in found)])
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    notes = [
        f"{title} {release} was measured on {results[release]['date']} with "
        + ", ".join(f"{name} {number}" for name, number in results[release]["versions"].items())
        for release in releases
    ]
    return text + "\n\n" + ". ".join(notes) + "."


def page(framework: Framework, text: str, results: dict[str, Any]) -> str:
    """The page with its table written anew."""
    new = f"<!-- table: exactness -->\n\n{table(framework.title, results)}\n\n<!-- end -->"
    return re.sub(r"<!-- table: exactness -->\n.*?<!-- end -->", lambda _: new, text, flags=re.DOTALL)


def main() -> None:
    """Measure, or write the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("frameworks", nargs="+", choices=FRAMEWORKS)
    parser.add_argument("--run", action="store_true", help="measure with the version that is found")
    parser.add_argument("--write", action="store_true", help="write the table of the page")
    given = parser.parse_args()
    for framework in (FRAMEWORKS[name] for name in given.frameworks):
        results = json.loads(framework.results.read_text()) if framework.results.exists() else {}
        if given.run:
            results[version(framework.name)] = measure(framework)
            framework.results.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        if given.write:
            framework.page.write_text(page(framework, framework.page.read_text(), results))


if __name__ == "__main__":
    main()
