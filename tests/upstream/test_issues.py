"""The reports of verl's bugs. A test here fails when verl no longer has the bug: then remove the report."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from contrib.upstream import issues

pytest.importorskip("verl")

FORM = """# [module] What goes wrong

```python
print(1)
print(2)
```

```text
1
2
```

- Seen with: 0.9.1
- Known upstream: No report found.
"""


@pytest.mark.parametrize("path", issues.reports(), ids=lambda path: path.stem)
def test_a_report_has_the_form_of_an_issue(path: Path):
    report = issues.read(path)
    text = path.read_text(encoding="utf-8")
    assert re.fullmatch(r"\d\d-[a-z-]+", report.name)
    assert "hpo_plugin" not in text
    assert re.search(r"^Expected: \S", text, re.MULTILINE)
    assert max(len(line) for line in text.splitlines()) <= 120


@pytest.mark.e2e
@pytest.mark.parametrize("path", issues.reports(), ids=lambda path: path.stem)
def test_verl_has_the_bug_of_a_report(path: Path, tmp_path: Path):
    report = issues.read(path)
    reason = issues.missing(report, tree=None)
    if reason is not None:
        pytest.skip(reason)
    cwd = issues.checkout(None) if report.needs == "checkout" else tmp_path
    done = issues.run(report, sys.executable, issues.environment(None), cwd)
    assert done.stdout == f"{report.output}\n", f"verl no longer has the bug? Then remove the report.\n{done.stderr}"


def test_the_parts_of_a_report_are_read(tmp_path: Path):
    path = tmp_path / "01-name.md"
    path.write_text(FORM + "\n<!-- needs: checkout -->\n")
    assert issues.read(path) == issues.Report(
        "01-name", "[module] What goes wrong", "python", "print(1)\nprint(2)\n", "1\n2", "checkout"
    )


@pytest.mark.parametrize("part", ["# [module] What", "```python", "```text", "- Seen with", "- Known upstream"])
def test_a_report_without_a_part_is_refused(tmp_path: Path, part: str):
    path = tmp_path / "01-name.md"
    path.write_text(FORM.replace(part, "-"))
    with pytest.raises(ValueError, match=r"01-name\.md has no"):
        issues.read(path)


def test_another_output_is_found_and_a_missing_checkout_is_no_answer(tmp_path: Path):
    report = issues.Report("01-name", "[module] What", "python", "print(1)", "1", None)
    assert issues.shown(report, tree=None) is True
    assert issues.shown(issues.Report("01-name", "[module] What", "bash", "echo 2", "1", None), tree=None) is False
    needing = issues.Report("01-name", "[module] What", "bash", "echo 1", "1", "checkout")
    assert issues.shown(needing, tree=tmp_path) is None
