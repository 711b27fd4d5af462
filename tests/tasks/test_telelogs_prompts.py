r"""TeleLogs prompts: one case has one text and one text one case, byte for byte; all else is refused, naming the line.

``PROMPT`` is the published layout written out by hand with invented values; the tables of the data set are not here.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hpo_plugin.tasks.telelogs.prompts import MAX_ROWS, WORDINGS, PromptError, parse_prompt, render_prompt, table_lines
from hpo_plugin.tasks.telelogs.rules import diagnose
from hpo_plugin.tasks.telelogs.synthetic import SyntheticRow, generate, relabeled
from hpo_plugin.tasks.telelogs.tables import (
    CELL_COLUMNS,
    DRIVE_TEST_COLUMNS,
    STANDARD_OPTIONS,
    TEXT_COLUMNS,
    Case,
    Cause,
    DriveTestRow,
    Neighbor,
    Option,
    PromptLayout,
    RadioCell,
    Value,
)
from hpo_plugin.tasks.telelogs.variants import REDUCTIONS, reduce_case

#: Line by line, so that the number of a line can be looked up: the first one is 1.
LINES = [
    # 1
    "Analyze the 5G wireless network drive-test user plane data and engineering parameters.",
    "Identify the reason for the throughput dropping below 600Mbps in certain road sections.",
    "From the following 8 potential root causes, select the most likely one and enclose its number in \\boxed{{}} in "
    "the final answer.",
    "",
    # 5
    "C1: The serving cell's downtilt angle is too large, causing weak coverage at the far end.",
    "C2: The serving cell's coverage distance exceeds 1km, resulting in over-shooting.",
    "C3: A neighboring cell provides higher throughput.",
    "C4: Non-colocated co-frequency neighboring cells cause severe overlapping coverage.",
    "C5: Frequent handovers degrade performance.",
    # 10
    "C6: Neighbor cell and serving cell have the same PCI mod 30, leading to interference.",
    "C7: Test vehicle speed exceeds 40km/h, impacting user throughput.",
    "C8: Average scheduled RBs are below 160, affecting throughput.",
    "",
    "Given:",
    # 15
    "- The default electronic downtilt value is 255, representing a downtilt angle of 6 degrees. Other values "
    "represent the actual downtilt angle in degrees.",
    "",
    "Beam Scenario and Vertical Beamwidth Relationships:",
    "- When the cell's Beam Scenario is set to Default or SCENARIO_1 to SCENARIO_5, the vertical beamwidth is 6 "
    "degrees.",
    "- When the cell's Beam Scenario is set to SCENARIO_6 to SCENARIO_11, the vertical beamwidth is 12 degrees.",
    # 20
    "- When the cell's Beam Scenario is set to SCENARIO_12 or above, the vertical beamwidth is 25 degrees.",
    "",
    "User plane drive test data as follows：",
    "",
    # 24
    "Timestamp|Longitude|Latitude|GPS Speed (km/h)|5G KPI PCell RF Serving PCI|5G KPI PCell RF Serving SS-RSRP [dBm]|"
    "5G KPI PCell RF Serving SS-SINR [dB]|5G KPI PCell Layer2 MAC DL Throughput [Mbps]|"
    "Measurement PCell Neighbor Cell Top Set(Cell Level) Top 1 PCI|"
    "Measurement PCell Neighbor Cell Top Set(Cell Level) Top 2 PCI|"
    "Measurement PCell Neighbor Cell Top Set(Cell Level) Top 3 PCI|"
    "Measurement PCell Neighbor Cell Top Set(Cell Level) Top 4 PCI|"
    "Measurement PCell Neighbor Cell Top Set(Cell Level) Top 5 PCI|"
    "Measurement PCell Neighbor Cell Top Set(Cell Level) Top 1 Filtered Tx BRSRP [dBm]|"
    "Measurement PCell Neighbor Cell Top Set(Cell Level) Top 2 Filtered Tx BRSRP [dBm]|"
    "Measurement PCell Neighbor Cell Top Set(Cell Level) Top 3 Filtered Tx BRSRP [dBm]|"
    "Measurement PCell Neighbor Cell Top Set(Cell Level) Top 4 Filtered Tx BRSRP [dBm]|"
    "Measurement PCell Neighbor Cell Top Set(Cell Level) Top 5 Filtered Tx BRSRP [dBm]|"
    "5G KPI PCell Layer1 DL RB Num (Including 0)",
    "2030-01-02 03:04:05.000000|5.100000|50.2|7|11|-80.10|12.5|900.25|12|13|-|-|-|-84.00|-95.5|-|-|-|200.00",
    "2030-01-02 03:04:06.000000|5.100010|50.2|8|11|-81|-0.5|410.00|12|13|14|-|-|-83.50|-96|-97|-|-|199.5",
    "2030-01-02 03:04:07.000000|5.100020|-|9|12|-81.75|0|55|11|-|13|14|15|-82.25|-|-96|-97.50|-98|-",
    "",
    "",
    # 30
    "Engeneering parameters data as follows：",
    "",
    "gNodeB ID|Cell ID|Longitude|Latitude|Mechanical Azimuth|Mechanical Downtilt|Digital Tilt|Digital Azimuth|"
    "Beam Scenario|Height|PCI|TxRx Mode|Max Transmit Power|Antenna Model",
    "0000123|1|5.101|50.201|40|3|255|0|DEFAULT|25.0|11|64T64R|34.9|Invented 1",
    "0000123|2|5.101|50.201|160|4|9|-10|SCENARIO_7|25.0|12|32T32R|34.9|-",
]
PROMPT = "\n".join(LINES)

#: The same kind of case in the wording of small models.
TERSE_LINES = [
    "C3 M4=C5 7=C8",
    "drive",
    "v|PCI|RSRP|Mbps|n1|b1|RB",
    "7|11|-80.10|900.25|12|-84.00|200.00",
    "8|11|-|410.00|12|-|199.5",
    "cells",
    "gNB|PCI",
    "0000123|11",
    "0000123|12",
    "?",
]
TERSE = "\n".join(TERSE_LINES)

NONE = Neighbor(None, None)


def neighbor(pci: str, brsrp: str) -> Neighbor:
    return Neighbor(Decimal(pci), Decimal(brsrp))


CASE = Case(
    drive_test=(
        DriveTestRow(
            timestamp="2030-01-02 03:04:05.000000",
            longitude=Decimal("5.1"),
            latitude=Decimal("50.2"),
            speed=Decimal(7),
            pci=Decimal(11),
            rsrp=Decimal("-80.1"),
            sinr=Decimal("12.5"),
            throughput=Decimal("900.25"),
            neighbors=(neighbor("12", "-84"), neighbor("13", "-95.5"), NONE, NONE, NONE),
            rbs=Decimal(200),
        ),
        DriveTestRow(
            timestamp="2030-01-02 03:04:06.000000",
            longitude=Decimal("5.10001"),
            latitude=Decimal("50.2"),
            speed=Decimal(8),
            pci=Decimal(11),
            rsrp=Decimal(-81),
            sinr=Decimal("-0.5"),
            throughput=Decimal(410),
            neighbors=(neighbor("12", "-83.5"), neighbor("13", "-96"), neighbor("14", "-97"), NONE, NONE),
            rbs=Decimal("199.5"),
        ),
        DriveTestRow(
            timestamp="2030-01-02 03:04:07.000000",
            longitude=Decimal("5.10002"),
            latitude=None,
            speed=Decimal(9),
            pci=Decimal(12),
            rsrp=Decimal("-81.75"),
            sinr=Decimal(0),
            throughput=Decimal(55),
            neighbors=(
                neighbor("11", "-82.25"),
                NONE,
                neighbor("13", "-96"),
                neighbor("14", "-97.5"),
                neighbor("15", "-98"),
            ),
            rbs=None,
        ),
    ),
    cells=(
        RadioCell(
            gnodeb_id="0000123",
            cell_id="1",
            longitude=Decimal("5.101"),
            latitude=Decimal("50.201"),
            mechanical_azimuth=Decimal(40),
            mechanical_downtilt=Decimal(3),
            digital_tilt=Decimal(255),
            digital_azimuth=Decimal(0),
            beam_scenario="DEFAULT",
            height=Decimal(25),
            pci=Decimal(11),
            txrx_mode="64T64R",
            max_transmit_power=Decimal("34.9"),
            antenna_model="Invented 1",
        ),
        RadioCell(
            gnodeb_id="0000123",
            cell_id="2",
            longitude=Decimal("5.101"),
            latitude=Decimal("50.201"),
            mechanical_azimuth=Decimal(160),
            mechanical_downtilt=Decimal(4),
            digital_tilt=Decimal(9),
            digital_azimuth=Decimal(-10),
            beam_scenario="SCENARIO_7",
            height=Decimal(25),
            pci=Decimal(12),
            txrx_mode="32T32R",
            max_transmit_power=Decimal("34.9"),
            antenna_model=None,
        ),
    ),
)


def edited(number: int, old: str, new: str, lines: list[str] | None = None) -> str:
    """PROMPT with something else in one line."""
    changed = list(LINES if lines is None else lines)
    assert old in changed[number - 1]
    changed[number - 1] = changed[number - 1].replace(old, new, 1)
    return "\n".join(changed)


def without(*numbers: int, lines: list[str] | None = None) -> str:
    return "\n".join(line for number, line in enumerate(LINES if lines is None else lines, 1) if number not in numbers)


def with_line(number: int, line: str, lines: list[str] | None = None) -> str:
    """PROMPT with a line more, which gets that number."""
    changed = list(LINES if lines is None else lines)
    changed.insert(number - 1, line)
    return "\n".join(changed)


def swapped() -> str:
    """PROMPT with the engineering parameters first."""
    return "\n".join([*LINES[:21], *LINES[29:], "", "", *LINES[21:27]])


def refused(text: str) -> PromptError:
    with pytest.raises(PromptError) as caught:
        parse_prompt(text)
    assert str(caught.value).startswith(f"line {caught.value.line}: {caught.value.reason}")
    return caught.value


def assert_kept(text: str) -> Case:
    case = parse_prompt(text)
    assert render_prompt(case) == text
    return case


@pytest.fixture(scope="module")
def rows() -> list[SyntheticRow]:
    plain = list(generate(24, seed=5).rows)
    laptop = list(generate(15, seed=5, reduction=REDUCTIONS["laptop"]).rows)
    return plain + laptop + relabeled(plain, 1) + relabeled(laptop, 1)


# --- the published layout ---


def test_the_published_layout_parses_into_typed_values() -> None:
    assert parse_prompt(PROMPT) == CASE


def test_the_published_layout_renders_to_the_same_bytes() -> None:
    assert render_prompt(parse_prompt(PROMPT)).encode() == PROMPT.encode()


def test_values_without_their_layout_render_to_the_published_layout() -> None:
    # As the generator makes them: nothing of the layout is set. Only the digits after the point differ from PROMPT.
    assert CASE.layout == PromptLayout()
    assert CASE.options == STANDARD_OPTIONS
    lines = render_prompt(CASE).split("\n")
    assert lines[:24] == LINES[:24]
    assert lines[27:32] == LINES[27:32]
    assert lines[24] == LINES[24].replace("5.100000", "5.1").replace("80.10", "80.1").replace("84.00", "84").replace(
        "200.00", "200"
    )


def test_the_quirks_are_there() -> None:
    text = render_prompt(CASE)
    assert text.count(r"\boxed{{}}") == 1
    assert text.count("Engeneering") == 1
    assert text.count("as follows：\n\n") == 2
    assert "\n\n\nEngeneering" in text
    assert not text.endswith("\n")


def test_the_terse_layout_parses_and_renders() -> None:
    case = assert_kept(TERSE)
    assert case.options == (Option("C3", Cause.C3), Option("M4", Cause.C5), Option("7", Cause.C8))
    assert [row.speed for row in case.drive_test] == [7, 8]
    assert [row.neighbors for row in case.drive_test] == [
        (neighbor("12", "-84.00"),),
        (Neighbor(Decimal(12), None),),
    ]
    assert [(cell.gnodeb_id, cell.pci) for cell in case.cells] == [("0000123", 11), ("0000123", 12)]
    assert case.cells[0].height is None
    assert case.drive_test[0].timestamp is None


def test_identifiers_keep_their_leading_zeros_and_are_text() -> None:
    assert {cell.gnodeb_id for cell in parse_prompt(PROMPT).cells} == {"0000123"}


def test_the_lines_of_the_tables_are_those_of_the_prompt() -> None:
    assert table_lines(parse_prompt(PROMPT)) == (LINES[23:27], LINES[31:])
    assert table_lines(parse_prompt(TERSE)) == (TERSE_LINES[2:5], TERSE_LINES[6:9])


# --- exact inverses: generated cases ---


def test_generated_cases_come_back_from_their_prompts(rows: list[SyntheticRow]) -> None:
    for row in rows:
        text = render_prompt(row.case)
        assert parse_prompt(text) == row.case
        assert render_prompt(parse_prompt(text)) == text


def test_generated_prompts_are_of_the_published_size(rows: list[SyntheticRow]) -> None:
    lengths = [len(render_prompt(row.case)) for row in rows[:24]]
    assert min(lengths) > 4_000
    assert max(lengths) < 5_200


def test_the_diagnosis_survives_the_prompt(rows: list[SyntheticRow]) -> None:
    for row in rows:
        assert diagnose(parse_prompt(render_prompt(row.case))).label == row.label


def test_reduced_cases_come_back_from_their_prompts(rows: list[SyntheticRow]) -> None:
    for row in rows[:8]:
        for wording in WORDINGS:
            reduction = replace(REDUCTIONS["full"], rows=6, cells=2, wording=wording)
            case = reduce_case(row.case, reduction)
            assert parse_prompt(render_prompt(case)) == case


# --- exact inverses: any case ---

#: Digits as a prompt may have them: zeros at the end, a negative zero, far below what str() writes without exponent.
numbers = st.one_of(
    st.integers(-(10**15) + 1, 10**15 - 1).map(str),
    st.builds(
        lambda sign, whole, fraction: f"{sign}{whole}.{fraction}",
        st.sampled_from(["", "-"]),
        st.integers(0, 1200),
        st.text("0123456789", min_size=1, max_size=20),
    ),
    st.sampled_from(["0", "-0", "0.0", "-0.0", "100", "1.500", "0.00000001", "-0.0000000000", "255", "1000000"]),
).map(Decimal)
values: st.SearchStrategy[Value] = st.one_of(st.none(), numbers, numbers)
#: What a cell of text may hold; not the lines that end a table, which a table of one column cannot hold.
texts = st.one_of(
    st.none(),
    st.sampled_from(
        ["0000123", "DEFAULT", "SCENARIO_12", "2030-01-02 03:04:05.000000", "64T64R", "-1", "--", "É 天线"]
    ),
    st.text(min_size=1, max_size=8).filter(
        lambda text: (
            text == text.strip() and text.isprintable() and "|" not in text and text not in ("-", "?", "drive", "cells")
        )
    ),
)


@st.composite
def options(draw: st.DrawFn) -> tuple[Option, ...]:
    causes = draw(st.permutations(list(Cause)))[: draw(st.integers(5, 8))]
    style = draw(st.sampled_from(["own", "digits", "letters", "mixed"]))
    if style == "own":
        labels = [cause.value for cause in causes]
    elif style == "digits":
        labels = [str(number) for number in draw(st.permutations(range(1, len(causes) + 1)))]
    else:
        letters = "ABCM" if style == "letters" else ["", "C"]
        drawn = st.builds(lambda letter, number: f"{letter}{number}", st.sampled_from(letters), st.integers(1, 99))
        labels = draw(st.lists(drawn, min_size=len(causes), max_size=len(causes), unique=True))
    return tuple(Option(label, cause) for label, cause in zip(labels, causes, strict=True))


@st.composite
def layouts(draw: st.DrawFn, count: int) -> PromptLayout:
    """Layouts as the parser names them: None where a prompt is as usual."""
    name = draw(st.sampled_from(sorted(WORDINGS)))
    wording = WORDINGS[name]

    def unusual(known: tuple[str, ...]) -> str | None:
        return draw(st.sampled_from([None, *known[1:]])) if known else None

    def columns(known: tuple[str, ...]) -> tuple[str, ...]:
        if draw(st.booleans()):
            return known
        return tuple(draw(st.permutations(known))[: draw(st.integers(1, len(known)))])

    gaps: tuple[int, ...] | None = None
    if draw(st.booleans()):
        gaps = tuple(draw(st.integers(0, 3)) for _ in wording.gaps)
        # Sentences of options end at an empty line.
        gaps = (*gaps[:2], max(gaps[2], 1), *gaps[3:])
    stated = draw(st.sampled_from([None, *range(1, 10)])) if name == "full" else None
    return PromptLayout(
        wording=name,
        drive_test_columns=columns(DRIVE_TEST_COLUMNS),
        cell_columns=columns(CELL_COLUMNS),
        cells_first=draw(st.booleans()),
        stated_options=None if stated == count else stated,
        box=unusual(wording.boxes),
        cells_heading=unusual(wording.cells_headings),
        drive_test_heading=unusual(wording.drive_test_headings),
        gaps=None if gaps == wording.gaps else gaps,
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any case that a prompt can say."""
    offered = draw(options())
    layout = draw(layouts(len(offered)))
    drive_test = layout.drive_test_columns
    places = [int(column.split("_")[1]) for column in drive_test if column.startswith("neighbor_")]

    def row() -> DriveTestRow:
        found = {column: draw(texts if column in TEXT_COLUMNS else values) for column in drive_test}
        return DriveTestRow(
            neighbors=tuple(
                Neighbor(found.get(f"neighbor_{k}_pci"), found.get(f"neighbor_{k}_brsrp"))  # type: ignore[arg-type]
                for k in range(1, max(places, default=0) + 1)
            ),
            **{
                column: found.get(column)  # type: ignore[arg-type]
                for column in DRIVE_TEST_COLUMNS
                if not column.startswith("neighbor_")
            },
        )

    def cell() -> RadioCell:
        found = {column: draw(texts if column in TEXT_COLUMNS else values) for column in layout.cell_columns}
        return RadioCell(**{column: found.get(column) for column in CELL_COLUMNS})  # type: ignore[arg-type]

    return Case(
        tuple(row() for _ in range(draw(st.integers(1, 3)))),
        tuple(cell() for _ in range(draw(st.integers(1, 2)))),
        offered,
        layout,
    )


@given(cases())
@settings(max_examples=120, deadline=None)
def test_any_case_comes_back_from_its_prompt(case: Case) -> None:
    text = render_prompt(case)
    assert parse_prompt(text) == case
    # Decimals are equal whatever their zeros, so equal cases are not enough.
    assert render_prompt(parse_prompt(text)) == text


@given(cases())
@settings(max_examples=60, deadline=None)
def test_any_prompt_that_parses_can_be_diagnosed(case: Case) -> None:
    diagnosis = diagnose(case)
    assert diagnosis.label is None or case.cause_of(diagnosis.label) is diagnosis.cause


@pytest.mark.parametrize(
    "digits",
    [
        "0.00000001",
        "-0.0",
        "-0",
        "0.0",
        "100",
        "1.500",
        "-85.20",
        "0.0000000",
        "999999999999999",
        "7.00000000000000000001",
    ],
)
def test_numbers_keep_their_digits(digits: str) -> None:
    case = assert_kept(edited(26, "|-81|", f"|{digits}|"))
    assert case.drive_test[1].rsrp == Decimal(digits)


@pytest.mark.parametrize("number", [25, 26, 27, 33, 34])
def test_every_cell_of_a_row_may_be_missing(number: int) -> None:
    cells = LINES[number - 1].split("|")
    for place in range(len(cells)):
        line = "|".join([*cells[:place], "-", *cells[place + 1 :]])
        assert_kept("\n".join([*LINES[: number - 1], line, *LINES[number:]]))
    case = assert_kept("\n".join([*LINES[: number - 1], "|".join("-" * len(cells)), *LINES[number:]]))
    missing = (case.drive_test[number - 25],) if number < 30 else (case.cells[number - 33],)
    found = [getattr(missing[0], name) for name in type(missing[0]).__dataclass_fields__ if name != "neighbors"]
    assert found == [None] * len(found)


# --- variants ---


def test_the_stated_number_of_causes_is_kept_whatever_is_offered() -> None:
    text = edited(3, "following 8", "following 5")
    case = assert_kept(text)
    assert len(case.options) == 8
    assert case.layout.stated_options == 5
    # Five causes under "the following 8", and under "the following 5".
    fewer = without(5, 6, 8)
    assert assert_kept(fewer).layout.stated_options == 8
    assert assert_kept(fewer.replace("following 8", "following 5")).layout.stated_options is None


@pytest.mark.parametrize("labels", [list("12345678"), ["M4", "A7", "Z12", "3", "C1", "Q99", "X1", "7"]])
def test_labels_may_be_digits_or_a_letter_with_digits(labels: list[str]) -> None:
    order = [3, 0, 7, 1, 6, 2, 5, 4]
    lines = [f"{label}: {LINES[4 + place][4:]}" for label, place in zip(labels, order, strict=True)]
    case = assert_kept("\n".join([*LINES[:4], *lines, *LINES[12:]]))
    assert [option.label for option in case.options] == labels
    assert [option.cause for option in case.options] == [list(Cause)[place] for place in order]
    assert case.label_of(Cause.C8) == labels[2]
    assert case.cause_of(labels[1]) is Cause.C1


def test_the_tables_may_be_swapped() -> None:
    case = assert_kept(swapped())
    assert case.layout == PromptLayout(cells_first=True)
    assert (case.drive_test, case.cells) == (CASE.drive_test, CASE.cells)


def test_columns_may_be_moved_and_left_out() -> None:
    lines = list(LINES)
    order = [18, 0, 17, 4, 8]
    for number in range(24, 28):
        cells = lines[number - 1].split("|")
        lines[number - 1] = "|".join(cells[place] for place in order)
    lines[31:] = ["PCI", "11", "12"]
    case = assert_kept("\n".join(lines))
    assert case.layout.drive_test_columns == ("rbs", "timestamp", "neighbor_5_brsrp", "pci", "neighbor_1_pci")
    assert case.layout.cell_columns == ("pci",)
    assert [row.rbs for row in case.drive_test] == [Decimal(200), Decimal("199.5"), None]
    assert case.drive_test[2].neighbors == (Neighbor(Decimal(11), None), NONE, NONE, NONE, Neighbor(None, Decimal(-98)))
    assert case.drive_test[0].speed is None
    assert case.cells[1].gnodeb_id is None


@pytest.mark.parametrize(
    ("number", "old", "new", "field"),
    [
        (3, r"\boxed{{}}", r"\boxed{}", "box"),
        (22, "：", ":", "drive_test_heading"),
        (30, "：", ":", "cells_heading"),
        (30, "Engeneering", "Engineering", "cells_heading"),
        (30, "Engeneering parameters data as follows：", "Engineering parameters data as follows:", "cells_heading"),
    ],
)
def test_other_spellings_are_read_and_kept(number: int, old: str, new: str, field: str) -> None:
    layout = assert_kept(edited(number, old, new)).layout
    assert new in getattr(layout, field)
    assert replace(layout, **{field: None}) == PromptLayout()


@pytest.mark.parametrize("number", [number for number, line in enumerate(LINES, 1) if not line])
def test_empty_lines_between_blocks_may_differ(number: int) -> None:
    assert assert_kept(with_line(number, "")).drive_test == CASE.drive_test
    # One fewer: only the options need the empty line that ends them.
    if number == 13:
        assert refused(without(13)).line == 13
    else:
        assert_kept(without(number))


@pytest.mark.parametrize("text", [PROMPT, TERSE, swapped()])
def test_line_breaks_around_a_prompt_are_kept(text: str) -> None:
    for around in ("\n", "\n\n\n"):
        assert_kept(text + around)
        assert_kept(around + text)
        assert_kept(around + text + around)


# --- refusals ---


@pytest.mark.parametrize("number", [number for number, line in enumerate(LINES[:22], 1) if line])
def test_a_wrong_line_of_fixed_text_is_named(number: int) -> None:
    for wrong in (f"!{LINES[number - 1]}", LINES[number - 1].upper(), LINES[number - 1][:-1]):
        error = refused("\n".join([*LINES[: number - 1], wrong, *LINES[number:]]))
        assert error.line == number
        assert error.reason.startswith(("expected '", 'expected "- When', "expected an option", "not one of the eight"))
        assert wrong[5:30] in str(error)


@pytest.mark.parametrize("number", [number for number, line in enumerate(LINES, 1) if line and not 4 < number < 13])
def test_a_line_left_out_is_missed_where_it_was(number: int) -> None:
    if number in (25, 26, 27, 33, 34):
        # A row is not missed.
        assert_kept(without(number))
        return
    error = refused(without(number))
    assert error.line in (number, number + 1)


REFUSALS: list[tuple[str, int, str]] = [
    # The instruction.
    (edited(3, "8", "0"), 3, "expected 'From the following 8 potential root causes"),
    (edited(3, "8", "10"), 3, "expected 'From the following 8 potential root causes"),
    (edited(3, "8", "08"), 3, "expected 'From the following 8 potential root causes"),
    (edited(3, "8", "８"), 3, "expected 'From the following 8 potential root causes"),
    (edited(3, "8", "{count}"), 3, "expected 'From the following 8 potential root causes"),
    (edited(3, r"\boxed{{}}", "{box}"), 3, "expected 'From the following 8 potential root causes"),
    (edited(3, "8", "{count}").replace(r"\boxed{{}}", "{box}"), 3, "expected 'From the following 8"),
    (edited(3, r"\boxed{{}}", r"\boxed{{{}}}"), 3, "expected 'From the following 8 potential root causes"),
    (PROMPT[1:], 1, "expected 'Analyze the 5G wireless network"),
    ("\ufeff" + PROMPT, 1, "expected 'Analyze the 5G wireless network"),
    (edited(22, "follows：", "follows"), 22, "expected 'User plane drive test data as follows：'"),
    (edited(30, "Engeneering", "Engineerin"), 30, "expected 'Engeneering parameters data as follows：'"),
    # Options.
    (edited(7, "higher", "lower"), 7, "not one of the eight root causes"),
    (edited(7, "throughput.", "throughput. "), 7, "not one of the eight root causes"),
    (edited(7, "C3: ", "C3:"), 7, "expected an option"),
    (edited(7, "C3", "c3"), 7, "expected an option"),
    (edited(7, "C3", "C03"), 7, "expected an option"),
    (edited(7, "C3", "C100"), 7, "expected an option"),
    (edited(7, "C3", "0"), 7, "expected an option"),
    (edited(7, "C3", "CC3"), 7, "expected an option"),
    (edited(7, "C3", "C٣"), 7, "expected an option"),
    (edited(7, "C3", ""), 7, "expected an option"),
    (edited(7, "C3", " C3"), 7, "expected an option"),
    (edited(7, "C3", "C2"), 7, "the label C2 appears twice"),
    (edited(7, LINES[6], "C9: " + LINES[4][4:]), 7, "the same root cause appears twice"),
    (with_line(13, "C9: The weather is bad."), 13, "not one of the eight root causes"),
    (without(*range(5, 13)), 6, "expected an option"),
    # Columns.
    (edited(24, "GPS Speed (km/h)", "GPS Speed"), 24, "unknown column 'GPS Speed'"),
    (edited(24, "Timestamp|", "timestamp|"), 24, "unknown column 'timestamp'"),
    (edited(24, "Timestamp|", "|Timestamp|"), 24, "unknown column ''"),
    (edited(24, "(Including 0)", "(Including 0)|"), 24, "unknown column ''"),
    (edited(24, "Longitude|Latitude", "Longitude|Longitude"), 24, "the column 'Longitude' appears twice"),
    (edited(24, "Top 5 PCI", "Top 6 PCI"), 24, "unknown column 'Measurement PCell Neighbor Cell Top Set(Cell Level)"),
    (edited(24, "Timestamp", "PCI"), 24, "unknown column 'PCI'"),
    (edited(32, "PCI|TxRx Mode", "PCI|PCI"), 32, "the column 'PCI' appears twice"),
    (edited(32, "Height", "Height "), 32, "unknown column 'Height '"),
    # Rows.
    (edited(26, "|199.5", ""), 26, "18 cells in a table of 19 columns"),
    (edited(26, "|199.5", "|199.5|"), 26, "20 cells in a table of 19 columns"),
    (edited(26, "2030", "|2030"), 26, "20 cells in a table of 19 columns"),
    (edited(34, "|-", ""), 34, "13 cells in a table of 14 columns"),
    (with_line(25, "---|---|---"), 25, "3 cells in a table of 19 columns"),
    (with_line(28, " "), 28, "1 cells in a table of 19 columns"),
    (with_line(26, ""), 27, "expected 'Engeneering parameters data as follows：'"),
    (edited(25, "2030-01-02 03:04:05.000000", ""), 25, "timestamp: expected text or '-'"),
    (edited(25, "2030", " 2030"), 25, "timestamp: expected text or '-'"),
    (edited(25, "2030-01-02 03", "2030-01-02\u00a003"), 25, "timestamp: expected text or '-'"),
    (edited(25, "2030-01-02 03", "2030-01-02\u202803"), 25, "timestamp: expected text or '-'"),
    (edited(33, "Invented 1", "Invented\t1"), 33, "antenna_model: expected text or '-'"),
    (edited(33, "Invented 1", "Invented \ud800"), 33, "antenna_model: expected text or '-'"),
    (edited(33, "|40|", "|4O|"), 33, "mechanical_azimuth: expected a number"),
    # Tables.
    (without(*range(22, 30)), 26, "expected 'User plane drive test data as follows：', but the text ends"),
    ("\n".join(LINES[:27]), 27, "expected 'Engeneering parameters data as follows：', but the text ends"),
    ("\n".join(LINES[:21]), 21, "expected the heading of a table, but the text ends"),
    (without(25, 26, 27), 24, "a table without rows"),
    (without(33, 34), 32, "a table without rows"),
    ("\n".join([*LINES[:29], *LINES[21:27]]), 30, "expected 'Engeneering parameters data as follows：'"),
    ("\n".join([*LINES[:21], *LINES[29:], "", *LINES[29:]]), 28, "expected 'User plane drive test data as follows：'"),
    # After the end.
    (PROMPT + "\n\nThe answer is C3.", 36, "expected the end of the prompt"),
    (PROMPT + "\n\n ", 36, "expected the end of the prompt"),
    (PROMPT + "\n\n" + PROMPT, 36, "expected the end of the prompt"),
    (PROMPT + "\n ", 35, "1 cells in a table of 14 columns"),
    (PROMPT + "\n?", 35, "1 cells in a table of 14 columns"),
    # Line ends and tabs.
    (PROMPT.replace("\n", "\r\n"), 1, "expected 'Analyze the 5G wireless network"),
    (PROMPT.replace("\n", "\r"), 1, "expected 'Analyze the 5G wireless network"),
    (edited(26, "199.5", "199.5\r"), 26, "rbs: expected a number"),
    (edited(22, "：", "：\r"), 22, "expected 'User plane drive test data as follows：'"),
    (edited(12, "throughput.", "throughput.\r"), 12, "not one of the eight root causes"),
    (with_line(23, "\r"), 23, "unknown column '\\r'"),
    (edited(26, "|-81|", "\t-81\t"), 26, "17 cells in a table of 19 columns"),
    (edited(26, "|-81|", "|\t-81|"), 26, "rsrp: expected a number"),
]


@pytest.mark.parametrize(("text", "line", "reason"), REFUSALS)
def test_a_refusal_names_the_line_and_the_reason(text: str, line: int, reason: str) -> None:
    error = refused(text)
    assert (error.line, reason in error.reason) == (line, True), error


TERSE_REFUSALS: list[tuple[str, int, str]] = [
    (edited(1, "C3", "C3=C3", TERSE_LINES), 1, "expected labels such as C3, or M4=C3"),
    (edited(1, "C3", "M3", TERSE_LINES), 1, "expected labels such as C3, or M4=C3"),
    (edited(1, "C3", "7=C2", TERSE_LINES), 1, "the label 7 appears twice"),
    (edited(1, "C3", "C8", TERSE_LINES), 1, "the same root cause appears twice"),
    (edited(1, "C3 ", "C3  ", TERSE_LINES), 1, "expected labels such as C3, or M4=C3"),
    (edited(1, "7=C8", "7=C9", TERSE_LINES), 1, "expected labels such as C3, or M4=C3"),
    # A line that does not start with a label is taken for the other wording.
    (edited(1, "C3 ", "c3 ", TERSE_LINES), 1, "expected"),
    (edited(2, "drive", "Drive", TERSE_LINES), 2, "expected 'drive'"),
    (edited(3, "RSRP", "rsrp", TERSE_LINES), 3, "unknown column 'rsrp'"),
    (edited(4, "-80.10", "-80.", TERSE_LINES), 4, "rsrp: expected a number"),
    (edited(6, "cells", "cell", TERSE_LINES), 6, "1 cells in a table of 7 columns"),
    (without(10, lines=TERSE_LINES), 9, "expected '?', but the text ends"),
    (edited(10, "?", "??", TERSE_LINES), 10, "1 cells in a table of 2 columns"),
    (TERSE + "\n?", 11, "expected the end of the prompt"),
    (TERSE + "C3", 10, "1 cells in a table of 2 columns"),
    (without(8, 9, lines=TERSE_LINES), 7, "a table without rows"),
    (without(4, 5, lines=TERSE_LINES), 3, "a table without rows"),
]


@pytest.mark.parametrize(("text", "line", "reason"), TERSE_REFUSALS)
def test_a_refusal_of_a_terse_prompt_names_the_line_and_the_reason(text: str, line: int, reason: str) -> None:
    error = refused(text)
    assert (error.line, reason in error.reason) == (line, True), error


NOT_NUMBERS = ["nan", "NaN", "inf", "-inf", "Infinity", "1e3", "1E-7", "+5", "007", "-01", " 5", "5 ", "٣", "５", "²"]
NOT_NUMBERS += ["", ".5", "5.", "1_000", "1,5", "--5", "0x1F", "1/2", "5.5.5", "−5", "None", "5\u00a0", "- 5", "5-"]
#: Longer than any measurement, and too long for the arithmetic of the rules.
NOT_NUMBERS += ["9" * 16, "0." + "1" * 21, "9" * 5000]


@pytest.mark.parametrize("text", NOT_NUMBERS, ids=lambda text: ascii(text)[:12])
def test_what_is_not_a_plain_number_is_refused(text: str) -> None:
    for number, old, column in ((25, "|-80.10|", "rsrp"), (26, "|-97|", "neighbor_3_brsrp"), (34, "|4|", "mech")):
        error = refused(edited(number, old, f"|{text}|"))
        assert error.line == number
        assert error.reason.startswith(column)
        assert "expected a number such as -85.2" in error.reason


def test_the_message_shows_what_stands_there_in_short() -> None:
    error = refused(edited(26, "|-81|", "|minus 81|"))
    assert str(error) == "line 26: rsrp: expected a number such as -85.2, or '-': 'minus 81'"
    assert len(str(refused("x" * 100_000))) < 300
    assert len(str(refused(edited(25, "2030", "x" * 100_000 + " |")))) < 300
    assert repr("\r")[1:-1] in str(refused(PROMPT.replace("\n", "\r\n")))


@pytest.mark.parametrize("lines", [LINES, swapped().split("\n"), TERSE_LINES], ids=["full", "swapped", "terse"])
def test_a_prompt_without_its_last_lines_is_refused_or_complete(lines: list[str]) -> None:
    complete = []
    for count in range(len(lines)):
        for end in ("", "\n"):
            text = "\n".join(lines[:count]) + end
            error = refused_or_kept(text)
            if error is None:
                complete.append(count)
                continue
            # Nothing is wrong with what is there, so the error is where the text stops, or at a table's head.
            assert "the text ends" in error.reason or "without rows" in error.reason, (count, error)
            assert max(count, 1) - 2 <= error.line <= max(count, 1) + 1, (count, error)
    # A prompt without the last rows of its last table is one.
    last_rows = 0 if lines is TERSE_LINES else len(lines) - (34 if lines is LINES else 33) + 1
    assert complete == [number for number in range(len(lines) - last_rows, len(lines)) for _ in ("", "\n")]


@pytest.mark.parametrize("text", [TERSE, "\n".join([*LINES[:4], LINES[4], *LINES[12:]])], ids=["terse", "full"])
def test_a_prompt_that_is_truncated_anywhere_is_refused_or_complete(text: str) -> None:
    for end in range(0, len(text), 1 if len(text) < 1000 else 7):
        refused_or_kept(text[:end])


@pytest.mark.parametrize("text", ["", "\n", "\n\n\n", " ", "?", "C3", "C3 C4\n", "Given:", "\x00", "\udcff"])
def test_a_text_that_is_no_prompt_is_refused(text: str) -> None:
    assert refused(text).line >= 1


# --- fuzzing ---


def refused_or_kept(text: str) -> PromptError | None:
    """What parses renders to itself, and nothing but PromptError is raised; return that."""
    error = None
    try:
        case = parse_prompt(text)
    except PromptError as caught:
        error = caught
    if error is None:
        assert render_prompt(case) == text
        return None
    assert 1 <= error.line <= text.count("\n") + 1
    assert len(str(error)) < 600
    return error


PIECES = [
    "|",
    "||",
    "-",
    "\n",
    "\n\n",
    " ",
    "\r",
    "\t",
    "0",
    "9",
    ".",
    "-0.0",
    "1e3",
    "C1",
    "C3=C3",
    "=C1",
    "?",
    "{count}",
]
PIECES += ["{box}", "drive", "cells", "{{}}", r"\boxed{}", "：", ":", LINES[29], LINES[21], LINES[4], LINES[13]]
PIECES += LINES[24:27]
pieces = st.sampled_from(PIECES)


@given(st.one_of(st.text(), st.lists(pieces).map("".join), st.lists(pieces).map("\n".join)))
@settings(max_examples=150, deadline=None)
def test_fuzz_any_text_is_refused_by_a_prompt_error_or_kept(text: str) -> None:
    refused_or_kept(text)


@given(
    st.sampled_from([PROMPT, swapped(), TERSE, "\n".join([*TERSE_LINES[:6], "gNB", "0000123", "?"])]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12), st.one_of(pieces, st.just(""))), min_size=1, max_size=3),
)
@settings(max_examples=250, deadline=None)
def test_fuzz_a_damaged_prompt_is_refused_by_a_prompt_error_or_kept(
    text: str, damages: list[tuple[float, int, str]]
) -> None:
    for share, length, piece in damages:
        begin = int(share * len(text))
        text = text[:begin] + piece + text[begin + length :]
    refused_or_kept(text)


@given(st.integers(0, 10**9))
@settings(max_examples=80, deadline=None)
def test_fuzz_lines_dropped_doubled_and_swapped(seed: int) -> None:
    rng = random.Random(seed)
    lines = list(rng.choice([LINES, TERSE_LINES]))
    change: Callable[[int], None]
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(lines))
        change = rng.choice([lines.pop, lambda at: lines.insert(at, lines[at]), lambda at: lines.append(lines.pop(at))])
        change(place)
    assume(lines)
    refused_or_kept("\n".join(lines))


# --- rendering ---


def test_a_layout_with_an_unknown_wording_or_column_is_refused() -> None:
    with pytest.raises(ValueError, match=r"wording='short' is not one of full, terse"):
        render_prompt(replace(CASE, layout=PromptLayout(wording="short")))
    for name in ("drive_test_columns", "cell_columns"):
        with pytest.raises(ValueError, match=r"column 'color' is not one of .*pci"):
            render_prompt(replace(CASE, layout=PromptLayout(**{name: ("pci", "color")})))


def test_the_two_wordings_name_the_same_columns_and_no_name_twice() -> None:
    for wording in WORDINGS.values():
        assert tuple(wording.drive_test_names) == DRIVE_TEST_COLUMNS
        assert tuple(wording.cell_names) == CELL_COLUMNS
        assert len(set(wording.drive_test_names.values())) == len(DRIVE_TEST_COLUMNS)
        assert len(set(wording.cell_names.values())) == len(CELL_COLUMNS)


def test_a_row_with_fewer_neighbors_than_columns_has_missing_cells() -> None:
    row = replace(CASE.drive_test[0], neighbors=CASE.drive_test[0].neighbors[:1])
    written = render_prompt(replace(CASE, drive_test=(row,))).split("\n")[24].split("|")
    assert written[8:18] == ["12", "-", "-", "-", "-", "-84", "-", "-", "-", "-"]


# --- time ---


@pytest.mark.parametrize(
    "text",
    [
        "C3 " * 300_000,
        "C3 C4" + " C3=C4" * 150_000,
        "|" * 1_000_000,
        "\n" * 1_000_000,
        "\n".join(LINES[:23]) + "\n" + "Timestamp|" * 100_000,
        "\n".join(LINES[:24]) + "\n" + "-|" * 500_000,
        "\n".join(LINES[:24]) + "\n" + "9" * 1_000_000,
        "\n".join([*LINES[:23], "Timestamp"]) + "\n-" * 500_000,
    ],
    ids=["labels", "options", "bars", "line breaks", "columns", "cells", "digits", "rows"],
)
def test_a_megabyte_of_nonsense_is_refused_at_once(text: str) -> None:
    begin = time.perf_counter()
    refused(text)
    # It takes at most some 10 ms; the limit allows for other processes.
    assert time.perf_counter() - begin < 2.0


def test_a_table_has_at_most_a_hundred_rows() -> None:
    longest = "\n".join([*LINES[:24], *[LINES[24]] * MAX_ROWS, *LINES[27:]])
    case = parse_prompt(longest)
    assert len(case.drive_test) == MAX_ROWS
    assert render_prompt(case) == longest
    with pytest.raises(PromptError, match="line 125: more than 100 rows in a table"):
        parse_prompt(longest.replace(LINES[24], f"{LINES[24]}\n{LINES[24]}", 1))
