"""Writes the table of ``docs/trl.md``: how exact the gradients of ``HPOTrainer`` are.

    PYTHONPATH=.venv/trl-1.16.0 python scripts/trl_page.py --run       # with the TRL that is found: into docs/trl.json
    python scripts/trl_page.py --write                                 # docs/trl.md from docs/trl.json

Cases and reference are those of ``tests/trl/test_exactness.py``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.version import Version

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "trl.md"
RESULTS = ROOT / "docs" / "trl.json"
PROCESSES = (1, 2)


def measure() -> dict[str, Any]:
    """The largest relative error of a gradient in each case, over one and two processes; seed 1."""
    sys.path.insert(0, str(ROOT / "tests" / "trl"))
    from test_exactness import CASES, FAULTS, run_cases

    errors: dict[str, dict[str, float]] = {name: {} for name in (*CASES, *FAULTS)}
    for processes in PROCESSES:
        with tempfile.TemporaryDirectory() as folder:
            for name, result in run_cases(processes, CASES | FAULTS, Path(folder)).items():
                errors[name][str(processes)] = max(result["errors"])
    # One process has no other α of its own.
    errors["α of each process"].pop("1")
    packages = ("torch", "transformers", "accelerate")
    return {
        "date": datetime.date.today().isoformat(),
        "versions": {package: version(package) for package in packages},
        "errors": errors,
    }


def table(results: dict[str, Any]) -> str:
    """The table in Markdown, newest TRL first."""
    releases = sorted(results, key=Version, reverse=True)
    columns = [(release, str(processes)) for release in releases for processes in PROCESSES]
    words = {"1": "1 process", "2": "2 processes"}
    lines = [["case", *(f"TRL {release}, {words[processes]}" for release, processes in columns)]]
    lines.append(["---"] * len(lines[0]))
    for name in results[releases[0]]["errors"]:
        found = [results[release]["errors"][name].get(processes) for release, processes in columns]
        lines.append([name, *("—" if error is None else f"{error:.1e}" for error in found)])
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    notes = [
        f"TRL {release}: {results[release]['date']}, "
        + ", ".join(f"{name} {number}" for name, number in results[release]["versions"].items())
        for release in releases
    ]
    return text + "\n\n" + ". ".join(notes) + "."


def page(text: str, results: dict[str, Any]) -> str:
    """The page with its table written anew."""
    new = f"<!-- table: exactness -->\n\n{table(results)}\n\n<!-- end -->"
    return re.sub(r"<!-- table: exactness -->\n.*?<!-- end -->", lambda _: new, text, flags=re.DOTALL)


def main() -> None:
    """Measure, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="measure with the TRL that is found")
    parser.add_argument("--write", action="store_true", help="write docs/trl.md")
    given = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if given.run:
        results[version("trl")] = measure()
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    if given.write:
        PAGE.write_text(page(PAGE.read_text(), results))


if __name__ == "__main__":
    main()
