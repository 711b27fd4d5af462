"""The texts of the pull requests: short, complete, with the results that the gates found, and signed by a human."""

import re
from pathlib import Path

import pytest

from contrib.upstream import contribution, trl

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "contrib/upstream/pull_request.md").read_text()
PAGE, _, OF_TRL = (ROOT / "docs/upstream.md").read_text().partition("\n## TRL\n")
TRL_TEXT = (ROOT / "contrib/upstream/trl_pull_request.md").read_text()
TRL_ISSUE = (ROOT / "contrib/upstream/trl_issue.md").read_text()


def test_it_has_at_most_300_words():
    assert len(TEXT.split()) <= 300


def test_it_has_the_sections_of_verls_template():
    assert re.findall(r"^### (.+)$", TEXT, re.MULTILINE) == [
        "What does this PR do?",
        "Checklist Before Starting",
        "Test",
        "API and Usage Example",
        "Design & Code Changes",
        "Checklist Before Submitting",
    ]


def test_it_states_the_assistance_and_the_line_that_a_human_owns():
    assert "an AI assistant wrote code, tests and text. I, ____" in TEXT


def test_the_title_is_one_that_verl_takes():
    assert TEXT.startswith(f"<!-- {contribution.TITLE} -->")
    modules, kind = re.fullmatch(r"\[([a-z_, ]+)\] (\w+): .+", contribution.TITLE).groups()
    assert set(modules.split(", ")) <= {"algo", "cfg", "doc"}
    assert kind == "feat"


def test_the_results_are_those_that_the_gates_found():
    """Fails when a contributed test was added or removed: then run scripts/upstream_gates.py again."""
    (row,) = re.findall(r"^\| the contributed tests \|(.+)\|$", PAGE, re.MULTILINE)
    (passed,) = {cell.partition("→")[2].strip() for cell in row.split("|")}
    trees = re.search(r"^\| gate \|(.+)\|$", PAGE, re.MULTILINE)[1].split("|")
    assert f"test_hpo_on_cpu.py`: {passed} on {', '.join(tree.strip() for tree in trees)}." in TEXT
    assert re.fullmatch(r"\d+ passed", passed)


def test_the_tables_on_the_page_can_be_read_by_themselves():
    table = PAGE.partition("| gate |")[2]
    for name in PAGE.partition("| gate |")[2].splitlines()[0].strip(" |").split(" | "):
        assert re.search(rf"`{re.escape(name)}` is (commit `[0-9a-f]{{9}}` of|a source distribution)", table)
    assert "Before → after" in table
    assert ("failed" in table.partition("\n\n")[0]) == ("One of the project's own tests fails" in table)


def test_the_pull_request_to_trl_follows_its_template_and_discloses_ai():
    """TRL closes the ones of first-time contributors that do not."""
    assert TRL_TEXT.startswith(f"<!-- {trl.TITLE} -->")
    assert re.findall(r"^#+ (.+)$", TRL_TEXT, re.MULTILINE) == [
        "What does this PR do?",
        "Before submitting",
        "AI writing disclosure",
        "Who can review?",
    ]
    assert re.findall(r"^- \[x\] (.+?):", TRL_TEXT, re.MULTILINE) == ["AI-generated"]
    assert "I, ____" in TRL_TEXT


def test_the_issue_for_trl_follows_its_template_for_new_trainers():
    assert re.findall(r"^### (.+)$", TRL_ISSUE, re.MULTILINE) == [
        "Method description",
        "Open source status",
        "Provide useful links for the implementation",
    ]
    assert TRL_ISSUE.count("I, ____") == 1
    assert TRL_ISSUE.count("$$") == 6


def test_the_figures_for_trl_are_those_that_were_measured():
    gained = re.search(r"rises from (.+?) % to (.+?) %", TRL_ISSUE).groups()
    rows = re.findall(
        r"^\| TRL \| \d \| ([\d.]+) % \|.*\| ([\d.]+) % \|$", (ROOT / "docs/trl.md").read_text(), re.MULTILINE
    )
    before, after = ([float(row[k]) for row in rows] for k in (0, 1))
    assert gained == (f"{min(before)}–{max(before)}", f"{min(after)}–{max(after)}")
    study = (ROOT / "docs/results/countdown-laptop.md").read_text()
    for figure in ("+0.004", "+0.009", "0.63", "0.58", "less than 0.1 %"):
        assert figure.lower() in study.lower()
        assert figure.lower() in TRL_ISSUE.lower()
    (passed,) = re.findall(r"^\| the contributed tests \| — → (.+) \|$", OF_TRL, re.MULTILINE)
    (commit,) = re.findall(r"`main` is commit `([0-9a-f]{9})` of", OF_TRL)
    assert f": {passed}, on main at {commit}." in TRL_TEXT


@pytest.fixture(scope="module")
def gates(load_script):
    return load_script("upstream_gates")


def test_the_script_says_how_to_read_what_it_writes(gates):
    measured = {
        "old": gates.Measured(
            "commit `123456789` of 1 May 2026", {"a": ("1 failed", "1 failed")}, {"test_x": "before and after"}, {}, ""
        ),
        "new": gates.Measured("a source distribution", {"b": ("passes", "fails")}, {"test_x": "after"}, {}, ""),
    }
    assert gates.table(measured).splitlines()[2:] == ["| a | 1 failed | — |", "| b | — | passes → fails |"]
    measured["old"].gates["c"] = measured["new"].gates["c"] = measured["new"].gates["d"] = ("passes", "passes")
    listed = gates.table(measured).partition("These gates pass before and after the contribution:\n\n")[2]
    assert listed.splitlines() == ["- `old`, `new`: c", "- `new`: d"]
    text = gates.reading(gates.VERL, measured)
    assert "`old` is commit `123456789` of 1 May 2026; `new` is a source distribution." in text
    assert "fails on `old` (before and after) and on `new` (after): `test_x`; the reason is not known." in text
