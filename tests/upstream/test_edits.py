"""Each anchor inserts where it says, and says what is missing where it cannot."""

import pytest

from contrib.upstream.edits import AfterDefinition, AfterField, AfterKey, AfterLine, AfterSection, AnchorError

PYTHON = """\
__all__ = ["é", "One"]


@decorated("x")
class One:
    first: int = 0
    second: dict = field(
        default_factory=dict
    )  # a comment

    def method(self):
        value = compute(1)
        if value:
            value = compute(
                2
            )
        return value


def after():
    pass
"""

YAML = """\
# a comment
top:

  # first
  first: 1

  # nested
  nested:

    # deep
    deep: [1, 2]

  # last
  last: 2

other: 3
"""


def lines_after(source, line, count):
    lines = source.splitlines()
    return lines[lines.index(line) + 1 :][:count]


def test_after_a_definition_with_decorators_and_all_of_its_body():
    edited = AfterDefinition("One").insert(PYTHON, "def new():\n    pass\n")
    assert lines_after(edited, "        return value", 6) == ["", "", "def new():", "    pass", "", ""]


def test_after_a_field_of_several_lines_at_its_indentation():
    assert lines_after(AfterField("One").insert(PYTHON, "third = 1\n"), "    )  # a comment", 1) == ["    third = 1"]
    assert lines_after(AfterField("One", "first").insert(PYTHON, "x = 1\n"), "    first: int = 0", 1) == ["    x = 1"]


def test_after_a_key_and_its_value_and_before_the_comment_of_the_next():
    assert lines_after(AfterKey("top.first").insert(YAML, "\nnew: 1\n"), "  first: 1", 3) == ["", "  new: 1", ""]
    edited = AfterKey("top.nested").insert(YAML, "\nnew: 1\n")
    assert lines_after(edited, "    deep: [1, 2]", 4) == ["", "  new: 1", "", "  # last"]


def test_after_the_last_line_that_begins_so():
    assert AfterLine("b").insert("a\nb1\nb2\nc\n", "b3\n") == "a\nb1\nb2\nb3\nc\n"


def test_at_the_end_of_a_section_and_not_at_a_comment_in_its_code():
    source = "# A\n\n## One\n\n```python\n# x\n```\n\n### Deep\n\ntext\n\n## Two\n"
    assert AfterSection("## One").insert(source, "new\n") == source.replace("text\n", "text\n\nnew\n")
    assert AfterSection("## Two").insert(source, "new\n") == source + "\nnew\n"


@pytest.mark.parametrize(
    ("anchor", "source", "said"),
    [
        (AfterDefinition("Two"), PYTHON, "0 definitions of Two"),
        (AfterDefinition("One"), PYTHON + PYTHON, "2 definitions of One"),
        (AfterField("One", "third"), PYTHON, "class One has no field third"),
        (AfterKey("top.missing"), YAML, r"no key top\.missing"),
        (AfterKey("top.first.deeper"), YAML, r"no key top\.first\.deeper"),
        (AfterLine("d"), "a\n", "no line that begins with 'd'"),
        (AfterSection("## A"), "# A\n", "0 headings '## A'"),
    ],
)
def test_what_is_missing_is_named(anchor, source, said):
    with pytest.raises(AnchorError, match=said):
        anchor.insert(source, "x = 1\n")
