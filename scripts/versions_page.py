"""Writes the tables of ``docs/versions.md`` from recorded test results.

    python -m pytest tests/verl ... --junitxml=report.xml
    python scripts/versions_page.py --record report.xml --verl 0.9.1     # into docs/versions.json
    python scripts/versions_page.py --write                              # docs/versions.md from docs/versions.json

A cell says ``run``, or the row's own word, with the date of the oldest result if all of its tests passed, ``in parts``
if only those of parts passed, ``read`` where the source was read, ``—`` otherwise. A failed test shows as ``fails``.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "versions.md"
RESULTS = ROOT / "docs" / "versions.json"

#: Columns of the tables: the names that ``--verl`` takes.
VERSIONS = ("0.9.1", "0.9.0")

ASYNC = r"tests/cpu/test_async_trainers\.py::test_"
OPTIONS = r"tests/cpu/test_training_options\.py::test_"
E2E = r"tests/cpu/test_e2e\.py::test_"
PARTS = r"tests/verl/test_trainers\.py::.*\["
GRADIENTS = r"tests/verl/test_equivalence\.py::.*\["
MEGATRON = r"tests/verl/test_megatron\.py::.*\["
RECIPE = r"tests/recipe/test_executed\.py::test_"


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        cells: The columns before the versions.
        tests: Patterns of test ids; each has to match a test that passed.
        parts: The same, of tests that run parts of it.
        read: Versions whose source was read.
        word: What a cell says if the tests passed.
    """

    cells: tuple[str, ...]
    tests: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    read: tuple[str, ...] = ()
    word: str = "run"


def _trainer(name: str, engine: str, *tests: str, rollout: str = "`hf_cpu`", part: str = "") -> Row:
    return Row((name, engine, rollout), tests, (PARTS + re.escape(part),) if part else ())


TABLES: dict[str, tuple[tuple[str, ...], tuple[Row, ...]]] = {
    "trainers": (
        ("trainer", "engine", "rollout"),
        (
            _trainer("V1 `sync`", "FSDP2", E2E + "default_rollout", part="V1 sync"),
            _trainer("V1 `sync`", "FSDP2, two ranks", E2E + "two_ranks"),
            _trainer("V1 `sync`", "FSDP2", E2E + "vllm_rollout", rollout="vLLM on CPU"),
            _trainer("V1 `sync`, reference model and KL loss", "FSDP2", E2E + "a_reference_model"),
            _trainer("V1 `sync`, LoRA", "FSDP2", OPTIONS + "an_actor_with_lora"),
            _trainer("V1 `colocate_async`", "FSDP2", ASYNC + "colocate_async", part="V1 colocate_async"),
            _trainer(
                "V1 `colocate_async`, importance weights",
                "FSDP2",
                OPTIONS + r"rollout_correction\[importance weights\]",
            ),
            _trainer(
                "V1 `colocate_async`, importance weights and rejection",
                "FSDP2",
                OPTIONS + r"rollout_correction\[importance weights and rejection\]",
            ),
            _trainer("V1 `separate_async`", "FSDP2", ASYNC + "separate_async_takes", part="V1 separate_async"),
            _trainer("V1 `separate_async`, two local updates", "FSDP2", ASYNC + "separate_async_has"),
            _trainer(
                "legacy", "FSDP2", r"tests/cpu/test_legacy_trainer\.py::test_the_legacy_trainer_takes", part="legacy"
            ),
            _trainer("one-step-off", "FSDP2", ASYNC + "one_step_off", part="one-step-off"),
            _trainer("fully-async", "FSDP2", ASYNC + "fully_async", part="fully-async"),
            *(
                _trainer(f"V1 `sync`, recipe {name}", engine, f"{RECIPE}{test}{re.escape(f'[{task}]')}")
                for test, engine in (("fsdp2", "FSDP2"), ("megatron", "Megatron, PP2"))
                for name, task in (
                    ("Countdown-3", "countdown3"),
                    ("Countdown-4", "countdown4"),
                    ("TeleLogs", "telelogs"),
                    ("TeleLogs after SFT", "telelogs after SFT"),
                )
            ),
            Row(
                ("recipes", "FSDP2, Megatron", "SGLang"),
                (r"tests/recipe/test_recipes\.py::.*sglang",),
                word="composed",
            ),
        ),
    ),
    "engines": (
        ("engine", "layout"),
        (
            Row(("FSDP2", "one rank"), (GRADIENTS + "one rank",)),
            Row(("FSDP2", "DP2"), (GRADIENTS + "two ranks",)),
            Row(("FSDP2", "Ulysses SP2"), (r"tests/verl/test_ulysses\.py::.*\[SP2",)),
            Row(("FSDP2", "DP2 × SP2"), (r"tests/verl/test_ulysses\.py::.*\[DP2 x SP2",)),
            *(
                Row(("Megatron", layout), (rf"{MEGATRON}{re.escape(name)}[-\]]",))
                for layout, name in (
                    ("DP2", "DP2"),
                    ("TP2", "TP2"),
                    ("PP2", "PP2"),
                    ("CP2", "CP2"),
                    ("VPP2", "VPP2"),
                    ("TP2 × PP2", "TP2 x PP2"),
                    ("DP2 × PP2", "DP2 x PP2"),
                    ("DP2 × CP2", "DP2 x CP2"),
                    ("EP2, mixture of experts", "EP2"),
                )
            ),
            Row(("Megatron", "data-parallel groups of all layouts"), (r"tests/verl/test_data_parallel_groups\.py::",)),
            Row(("VeOmni", "any"), read=("0.9.1",)),
            Row(("TorchTitan", "any"), read=("0.9.1",)),
            Row(("Automodel", "any"), read=("0.9.1",)),
            Row(("MindSpeed (Megatron on an NPU)", "any"), read=("0.9.1",)),
        ),
    ),
}

Results = dict[str, dict[str, dict[str, str]]]


def read_report(path: Path) -> dict[str, dict[str, str]]:
    """Outcome and date of each test of a JUnit report, by pytest's id; what was skipped is left out."""
    found = {}
    # pytest wrote the file.
    for suite in ElementTree.parse(path).getroot().iter("testsuite"):  # nosec B314
        date = suite.attrib["timestamp"][:10]
        for case in suite.iter("testcase"):
            if case.find("skipped") is not None:
                continue
            failed = case.find("failure") is not None or case.find("error") is not None
            file = case.attrib["classname"].replace(".", "/") + ".py"
            found[f"{file}::{case.attrib['name']}"] = {"outcome": "failed" if failed else "passed", "date": date}
    return found


def is_shown(test: str) -> bool:
    """Whether a row has a pattern that matches a test."""
    rows = [row for _, table in TABLES.values() for row in table]
    return any(re.match(pattern, test) for row in rows for pattern in (*row.tests, *row.parts))


def _state(patterns: tuple[str, ...], results: dict[str, dict[str, str]]) -> tuple[str, str] | None:
    """``passed`` or ``failed`` with the oldest date; None unless each pattern has a result."""
    matched = [[results[test] for test in results if re.match(pattern, test)] for pattern in patterns]
    if not matched or not all(matched):
        return None
    flat = [result for group in matched for result in group]
    failed = any(result["outcome"] == "failed" for result in flat)
    return "failed" if failed else "passed", min(result["date"] for result in flat)


def cell(row: Row, version: str, results: Results) -> str:
    """What a row says of a version."""
    recorded = results.get(version, {})
    for patterns, word in ((row.tests, row.word), (row.parts, "in parts")):
        state = _state(patterns, recorded)
        if state is not None:
            outcome, date = state
            return f"{word} {date}" if outcome == "passed" else f"**fails** {date}"
    return "read" if version in row.read else "—"


def table(name: str, results: Results) -> str:
    """A table in Markdown."""
    head, rows = TABLES[name]
    lines = [head + VERSIONS, ("---",) * (len(head) + len(VERSIONS))]
    lines += [row.cells + tuple(cell(row, version, results) for version in VERSIONS) for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(text: str, results: Results) -> str:
    """The page with its tables written anew; an unknown name is an error."""
    tables = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end -->", re.DOTALL)
    return tables.sub(lambda found: f"<!-- table: {found[1]} -->\n\n{table(found[1], results)}\n\n<!-- end -->", text)


def main() -> None:
    """Record reports, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, nargs="+", help="JUnit reports to record", default=[])
    parser.add_argument("--verl", choices=VERSIONS, help="the version of verl that the reports are of")
    parser.add_argument("--write", action="store_true", help="write docs/versions.md")
    given = parser.parse_args()
    if bool(given.record) != bool(given.verl):
        parser.error("--record and --verl come together")
    results: Results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for report in given.record:
        read = read_report(report)
        shown = {test: result for test, result in read.items() if is_shown(test)}
        # Of a file that was run again, nothing old is kept.
        files = {test.partition("::")[0] for test in read}
        kept = {t: r for t, r in results.get(given.verl, {}).items() if t.partition("::")[0] not in files}
        results[given.verl] = kept | shown
        print(f"{report}: {len(shown)} results of verl {given.verl}")
    if given.record:
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    if given.write:
        PAGE.write_text(page(PAGE.read_text(), results))


if __name__ == "__main__":
    main()
