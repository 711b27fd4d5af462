"""docs/versions.md says what docs/versions.json recorded, and nothing else."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("versions_page")


@pytest.fixture(scope="module")
def results():
    return json.loads((ROOT / "docs" / "versions.json").read_text())


def test_the_page_is_what_its_script_writes(script, results):
    text = script.PAGE.read_text()
    assert script.page(text, results) == text, "run scripts/versions_page.py --write"


def test_every_recorded_test_is_there_and_every_row_of_runs_has_one_with_the_version_of_ci(script, results):
    for recorded in results.values():
        for test in recorded:
            file, _, name = test.partition("::")
            assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(), test
    for _, rows in script.TABLES.values():
        for row in rows:
            assert row.tests or row.read, row
            if row.tests:
                assert script.cell(row, "0.9.1", results).startswith(f"{row.word} 20"), row


def test_a_report_is_read_and_a_failure_is_shown(script, tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite timestamp="2026-11-27T03:00:00.1">'
        '<testcase classname="tests.cpu.test_a" name="test_x[one]"/>'
        '<testcase classname="tests.cpu.test_a" name="test_x[two]"><failure/></testcase>'
        '<testcase classname="tests.cpu.test_a" name="test_x[three]"><skipped/></testcase>'
        "</testsuite></testsuites>"
    )
    read = script.read_report(report)
    assert {test.partition("::")[2]: result["outcome"] for test, result in read.items()} == {
        "test_x[one]": "passed",
        "test_x[two]": "failed",
    }
    one, two, three, both = (
        script.Row(("x",), tests=(rf"tests/cpu/test_a\.py::test_x{which}",))
        for which in (r"\[one", r"\[two", r"\[three", "")
    )
    results = {"0.9.1": read}
    assert script.cell(one, "0.9.1", results) == "run 2026-11-27"
    assert script.cell(two, "0.9.1", results) == script.cell(both, "0.9.1", results) == "**fails** 2026-11-27"
    assert script.cell(three, "0.9.1", results) == script.cell(one, "0.9.0", results) == "—"
    parts = script.Row(("x",), tests=("nothing",), parts=one.tests, read=("0.9.0",))
    assert [script.cell(parts, version, results) for version in ("0.9.1", "0.9.0")] == ["in parts 2026-11-27", "read"]


def test_an_unknown_table_is_an_error(script):
    with pytest.raises(KeyError):
        script.page("<!-- table: other -->\n<!-- end -->", {})
    assert re.search(r"<!-- table: trainers -->\n\n\| trainer ", script.PAGE.read_text())
