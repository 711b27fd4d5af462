r"""TeleLogs prompts: text to typed tables and back, byte for byte.

Two wordings of the same tables. ``full`` is the data set's, with its quirks: the literal ``\boxed{{}}``, the spelling
"Engeneering", the full-width colon. ``terse`` has no fixed text but short column names, for models of a few hundred
thousand parameters. Both are data (:data:`WORDINGS`); one parser and one renderer serve them.

Variants found in the field are read: labels that are digits or a letter with digits, five to eight options in any
order, either table first, columns left out or moved, ``-`` for a missing value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Final

from hpo_plugin.tasks.telelogs.tables import (
    CELL_COLUMNS,
    DRIVE_TEST_COLUMNS,
    MAX_NEIGHBORS,
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

#: What a missing value is written as.
MISSING: Final = "-"
#: A label: ``C3``, ``3``, ``M4``.
LABEL_PATTERN: Final = "[A-Z]?[1-9][0-9]?"
#: Most rows of a table: the limit bounds the time for a text that is not a prompt. The data set has up to 13.
MAX_ROWS: Final = 100

# Bounded, so that no number is too long for the arithmetic of the rules.
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,14})(?:\.[0-9]{1,20})?", re.ASCII)
_EMPTY_LINES = re.compile("\n*")
_CAUSE_BY_TEXT = {cause.text: cause for cause in Cause}


class PromptError(ValueError):
    """A prompt that does not parse.

    Attributes:
        line: Number of the line, from 1.
        reason: What is wrong with it.
    """

    def __init__(self, line: int, reason: str, found: str | None = None) -> None:
        """Say what is wrong where, and what stands there."""
        # A reason can contain a part of the prompt.
        reason = reason if len(reason) <= 300 else reason[:297] + "..."
        shown = "" if found is None else f": {found if len(found) <= 120 else found[:117] + '...'!r}"
        super().__init__(f"line {line}: {reason}{shown}")
        self.line = line
        self.reason = reason
        self._found = found

    def __reduce__(self) -> tuple[type[PromptError], tuple[int, str, str | None]]:
        """Pickle by the arguments: errors travel between processes."""
        return PromptError, (self.line, self.reason, self._found)


@dataclass(frozen=True)
class Wording:
    """The fixed text of a prompt.

    Attributes:
        before: Blocks of lines before the options. ``{count}`` and ``{box}`` stand for what varies.
        after: Blocks of lines between the options and the tables.
        closing: Blocks of lines after the tables.
        explains_options: Whether each option is a line with its sentence, or all of them are words of one line.
        drive_test_headings: How the first table may be announced; the first one is the usual one.
        cells_headings: The same for the second table.
        boxes: The literals that may stand for ``{box}``.
        drive_test_names: Field -> column name.
        cell_names: Field -> column name.
        gaps: Empty lines before each block, and after the last one.
    """

    before: tuple[tuple[str, ...], ...]
    after: tuple[tuple[str, ...], ...]
    closing: tuple[tuple[str, ...], ...]
    explains_options: bool
    drive_test_headings: tuple[str, ...]
    cells_headings: tuple[str, ...]
    boxes: tuple[str, ...]
    drive_test_names: dict[str, str]
    cell_names: dict[str, str]
    gaps: tuple[int, ...]


_NEIGHBOR = "Measurement PCell Neighbor Cell Top Set(Cell Level) Top {k} "

WORDINGS: Final[dict[str, Wording]] = {
    "full": Wording(
        before=(
            (
                "Analyze the 5G wireless network drive-test user plane data and engineering parameters.",
                "Identify the reason for the throughput dropping below 600Mbps in certain road sections.",
                "From the following {count} potential root causes, select the most likely one and enclose its number "
                "in {box} in the final answer.",
            ),
        ),
        after=(
            (
                "Given:",
                "- The default electronic downtilt value is 255, representing a downtilt angle of 6 degrees. Other "
                "values represent the actual downtilt angle in degrees.",
            ),
            (
                "Beam Scenario and Vertical Beamwidth Relationships:",
                "- When the cell's Beam Scenario is set to Default or SCENARIO_1 to SCENARIO_5, the vertical beamwidth "
                "is 6 degrees.",
                "- When the cell's Beam Scenario is set to SCENARIO_6 to SCENARIO_11, the vertical beamwidth is 12 "
                "degrees.",
                "- When the cell's Beam Scenario is set to SCENARIO_12 or above, the vertical beamwidth is 25 degrees.",
            ),
        ),
        closing=(),
        explains_options=True,
        drive_test_headings=("User plane drive test data as follows：", "User plane drive test data as follows:"),
        cells_headings=(
            "Engeneering parameters data as follows：",
            "Engeneering parameters data as follows:",
            "Engineering parameters data as follows：",
            "Engineering parameters data as follows:",
        ),
        boxes=(r"\boxed{{}}", r"\boxed{}"),
        drive_test_names={
            "timestamp": "Timestamp",
            "longitude": "Longitude",
            "latitude": "Latitude",
            "speed": "GPS Speed (km/h)",
            "pci": "5G KPI PCell RF Serving PCI",
            "rsrp": "5G KPI PCell RF Serving SS-RSRP [dBm]",
            "sinr": "5G KPI PCell RF Serving SS-SINR [dB]",
            "throughput": "5G KPI PCell Layer2 MAC DL Throughput [Mbps]",
            **{f"neighbor_{k}_pci": _NEIGHBOR.format(k=k) + "PCI" for k in range(1, MAX_NEIGHBORS + 1)},
            **{
                f"neighbor_{k}_brsrp": _NEIGHBOR.format(k=k) + "Filtered Tx BRSRP [dBm]"
                for k in range(1, MAX_NEIGHBORS + 1)
            },
            "rbs": "5G KPI PCell Layer1 DL RB Num (Including 0)",
        },
        cell_names={
            "gnodeb_id": "gNodeB ID",
            "cell_id": "Cell ID",
            "longitude": "Longitude",
            "latitude": "Latitude",
            "mechanical_azimuth": "Mechanical Azimuth",
            "mechanical_downtilt": "Mechanical Downtilt",
            "digital_tilt": "Digital Tilt",
            "digital_azimuth": "Digital Azimuth",
            "beam_scenario": "Beam Scenario",
            "height": "Height",
            "pci": "PCI",
            "txrx_mode": "TxRx Mode",
            "max_transmit_power": "Max Transmit Power",
            "antenna_model": "Antenna Model",
        },
        gaps=(0, 1, 1, 1, 1, 1, 2, 1, 0),
    ),
    "terse": Wording(
        before=(),
        after=(),
        closing=(("?",),),
        explains_options=False,
        drive_test_headings=("drive",),
        cells_headings=("cells",),
        boxes=(),
        drive_test_names={
            "timestamp": "time",
            "longitude": "lon",
            "latitude": "lat",
            "speed": "v",
            "pci": "PCI",
            "rsrp": "RSRP",
            "sinr": "SINR",
            "throughput": "Mbps",
            **{f"neighbor_{k}_pci": f"n{k}" for k in range(1, MAX_NEIGHBORS + 1)},
            **{f"neighbor_{k}_brsrp": f"b{k}" for k in range(1, MAX_NEIGHBORS + 1)},
            "rbs": "RB",
        },
        cell_names={
            "gnodeb_id": "gNB",
            "cell_id": "cell",
            "longitude": "lon",
            "latitude": "lat",
            "mechanical_azimuth": "azimuth",
            "mechanical_downtilt": "tilt",
            "digital_tilt": "etilt",
            "digital_azimuth": "eazimuth",
            "beam_scenario": "beam",
            "height": "height",
            "pci": "PCI",
            "txrx_mode": "txrx",
            "max_transmit_power": "power",
            "antenna_model": "antenna",
        },
        gaps=(0, 0, 0, 0, 0, 0, 0),
    ),
}


# --- rendering -----------------------------------------------------------------------------------------------------


def render_prompt(case: Case) -> str:
    """Return a case as the text of a prompt, the exact inverse of :func:`parse_prompt`.

    Args:
        case: The case; its layout decides wording, columns and the order of the tables.

    Raises:
        ValueError: If the layout names a wording or a column that does not exist.
    """
    layout = case.layout
    wording = _wording(layout.wording)
    count = len(case.options) if layout.stated_options is None else layout.stated_options
    box = layout.box if layout.box is not None else next(iter(wording.boxes), "")
    blocks: list[str] = [
        "\n".join(line.replace("{count}", str(count)).replace("{box}", box) for line in block)
        for block in wording.before
    ]
    if wording.explains_options:
        blocks.append("\n".join([f"{option.label}: {option.cause.text}" for option in case.options]))
    else:
        blocks.append(" ".join([_terse_option(option) for option in case.options]))
    blocks += ["\n".join(block) for block in wording.after]
    drive_test_lines, cells_lines = table_lines(case)
    drive_test = [layout.drive_test_heading or wording.drive_test_headings[0], "\n".join(drive_test_lines)]
    cells = [layout.cells_heading or wording.cells_headings[0], "\n".join(cells_lines)]
    blocks += [*cells, *drive_test] if layout.cells_first else [*drive_test, *cells]
    blocks += ["\n".join(block) for block in wording.closing]
    gaps = wording.gaps if layout.gaps is None else layout.gaps
    parts = ["\n" * gaps[0], blocks[0]]
    for gap, block in zip(gaps[1:-1], blocks[1:], strict=True):
        parts += ["\n" * (gap + 1), block]
    parts.append("\n" * gaps[-1])
    return "".join(parts)


def _wording(name: str) -> Wording:
    if name not in WORDINGS:
        raise ValueError(f"wording={name!r} is not one of {', '.join(WORDINGS)}")
    return WORDINGS[name]


def _terse_option(option: Option) -> str:
    return option.label if option.label == option.cause.value else f"{option.label}={option.cause.value}"


def table_lines(case: Case) -> tuple[list[str], list[str]]:
    """Return the lines of both tables, column names first: the drive test, and the engineering parameters.

    Args:
        case: The case; its layout decides the columns.

    Raises:
        ValueError: If the layout names a wording or a column that does not exist.
    """
    layout = case.layout
    wording = _wording(layout.wording)
    drive_test = [_header(layout.drive_test_columns, wording.drive_test_names)]
    read = _drive_test_reader(layout.drive_test_columns)
    drive_test += ["|".join([_written(value) for value in read(row)]) for row in case.drive_test]
    cells = [_header(layout.cell_columns, wording.cell_names)]
    columns = layout.cell_columns
    cells += ["|".join([_written(getattr(cell, column)) for column in columns]) for cell in case.cells]
    return drive_test, cells


def _header(columns: tuple[str, ...], names: dict[str, str]) -> str:
    unknown = [column for column in columns if column not in names]
    if unknown:
        raise ValueError(f"column {unknown[0]!r} is not one of {', '.join(names)}")
    return "|".join([names[column] for column in columns])


@lru_cache(maxsize=64)
def _drive_test_reader(columns: tuple[str, ...]) -> Callable[[DriveTestRow], list[Value | str]]:
    plan = [_neighbor_column(column) or (column, -1) for column in columns]

    def read(row: DriveTestRow) -> list[Value | str]:
        neighbors = row.neighbors
        count = len(neighbors)
        return [
            getattr(row, name) if place < 0 else getattr(neighbors[place], name) if place < count else None
            for name, place in plan
        ]

    return read


def _neighbor_column(column: str) -> tuple[str, int] | None:
    """``neighbor_3_pci`` -> ("pci", 2)."""
    if not column.startswith("neighbor_"):
        return None
    _, number, name = column.split("_")
    return name, int(number) - 1


def _written(value: Value | str) -> str:
    if value is None:
        return MISSING
    text = str(value)
    # str() of a Decimal turns to exponents for very small numbers.
    return format(value, "f") if "E" in text and isinstance(value, Decimal) else text


# --- parsing -------------------------------------------------------------------------------------------------------


class _Lines:
    """The lines of a prompt, read once from top to bottom; counts the empty ones between blocks."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._begin = 0
        self._taken = 0
        self.gaps: list[int] = []

    @property
    def number(self) -> int:
        """Of the next line, from 1."""
        return self._taken + 1

    def skip_empty(self) -> None:
        matched = _EMPTY_LINES.match(self._text, self._begin)
        # After the last line break there is one more empty line.
        end = matched.end() + (matched.end() == len(self._text)) if matched else 0
        self.gaps.append(max(0, end - self._begin))
        self._taken += self.gaps[-1]
        self._begin += self.gaps[-1]

    def peek(self) -> str | None:
        """The next line; None at an empty one and at the end."""
        end = self._text.find("\n", self._begin)
        return self._text[self._begin : end if end >= 0 else None] or None

    def take(self, expected: str) -> str:
        line = self.peek()
        if line is None:
            ended = not self._text[self._begin :].strip("\n")
            raise PromptError(
                min(self.number, self._text.count("\n") + 1),
                f"expected {expected}, but {'the text ends' if ended else 'found an empty line'}",
            )
        self._taken += 1
        self._begin += len(line) + 1
        return line

    def fail(self, reason: str, found: str) -> PromptError:
        """An error about the line taken last."""
        return PromptError(self._taken, reason, found)


def parse_prompt(text: str) -> Case:
    """Read a TeleLogs prompt.

    Args:
        text: The prompt: fixed text, options, and both tables, in one of the known wordings.

    Returns:
        The case. ``render_prompt`` of it is ``text`` again.

    Raises:
        PromptError: If anything is not understood, or a table has more than :data:`MAX_ROWS` rows; it names the line.
    """
    lines = _Lines(text)
    lines.skip_empty()
    first = lines.peek() or ""
    # A terse prompt starts with labels; only its first word is read, since the line can be long.
    name = "terse" if re.match(rf"{LABEL_PATTERN}(?:=C[1-8])?(?: |$)", first) else "full"
    wording = WORDINGS[name]
    stated: int | None = None
    box: str | None = None
    for block in wording.before:
        for template in block:
            found_count, found_box = _take_fixed(lines, template, wording)
            stated = stated if found_count is None else found_count
            box = box if found_box is None else found_box
        lines.skip_empty()
    options = _take_options(lines, wording)
    for block in wording.after:
        lines.skip_empty()
        for template in block:
            _take_fixed(lines, template, wording)
    lines.skip_empty()
    heading = lines.take("the heading of a table")
    cells_first = heading in wording.cells_headings
    headings: dict[bool, str] = {}
    drive_test: tuple[DriveTestRow, ...] = ()
    cells: tuple[RadioCell, ...] = ()
    drive_test_columns: tuple[str, ...] = ()
    cell_columns: tuple[str, ...] = ()
    for is_cells in (cells_first, not cells_first):
        known = wording.cells_headings if is_cells else wording.drive_test_headings
        if is_cells is not cells_first:
            lines.skip_empty()
            heading = lines.take(repr(known[0]))
        if heading not in known:
            raise lines.fail(f"expected {known[0]!r}", heading)
        headings[is_cells] = heading
        lines.skip_empty()
        if is_cells:
            cell_columns, rows = _take_table(lines, wording, wording.cell_names)
            cells = tuple([_cell(cell_columns, row) for row in rows])
        else:
            drive_test_columns, rows = _take_table(lines, wording, wording.drive_test_names)
            drive_test = _drive_test(drive_test_columns, rows)
    for block in wording.closing:
        lines.skip_empty()
        for template in block:
            _take_fixed(lines, template, wording)
    lines.skip_empty()
    after = lines.peek()
    if after is not None:
        raise PromptError(lines.number, "expected the end of the prompt", after)
    # The last empty "line" is what follows the last line break.
    layout = PromptLayout(
        wording=name,
        drive_test_columns=drive_test_columns,
        cell_columns=cell_columns,
        cells_first=cells_first,
        stated_options=None if stated == len(options) else stated,
        box=_unusual(box, wording.boxes),
        cells_heading=_unusual(headings[True], wording.cells_headings),
        drive_test_heading=_unusual(headings[False], wording.drive_test_headings),
        gaps=None if tuple(lines.gaps) == wording.gaps else tuple(lines.gaps),
    )
    return Case(drive_test, cells, options, layout)


def _unusual(found: str | None, known: Sequence[str]) -> str | None:
    return None if not known or found == known[0] else found


def _take_fixed(lines: _Lines, template: str, wording: Wording) -> tuple[int | None, str | None]:
    """Take a line of fixed text; return the count and the box in it, if it has them."""
    expected = template.replace("{count}", "8").replace("{box}", next(iter(wording.boxes), ""))
    line = lines.take(repr(expected))
    if line == expected == template:
        return None, None
    pattern = re.escape(template).replace(r"\{count\}", "(?P<count>[1-9])")
    pattern = pattern.replace(r"\{box\}", f"(?P<box>{'|'.join(map(re.escape, wording.boxes))})")
    matched = re.fullmatch(pattern, line)
    if matched is None:
        raise lines.fail(f"expected {expected!r}", line)
    return int(matched["count"]), matched["box"]


def _take_options(lines: _Lines, wording: Wording) -> tuple[Option, ...]:
    options: list[Option] = []
    if wording.explains_options:
        while (not options or lines.peek() is not None) and (line := lines.take("an option such as 'C1: …'")):
            label, colon, text = line.partition(": ")
            if not colon or not re.fullmatch(LABEL_PATTERN, label):
                raise lines.fail("expected an option: a label such as C3, 3 or M4, a colon, a sentence", line)
            if text not in _CAUSE_BY_TEXT:
                raise lines.fail("not one of the eight root causes", text)
            _add_option(options, Option(label, _CAUSE_BY_TEXT[text]), lines, line)
    else:
        line = lines.take("the labels of the options")
        # No more labels than causes are distinct, so what follows the next word does not matter.
        for word in line.split(" ", len(Cause) + 1):
            label, _, cause = word.partition("=")
            # "C3=C3" is written "C3".
            if (cause or label) not in Cause.__members__ or label == cause:
                raise lines.fail("expected labels such as C3, or M4=C3", line)
            _add_option(options, Option(label, Cause(cause or label)), lines, line)
    return tuple(options)


def _add_option(options: list[Option], option: Option, lines: _Lines, line: str) -> None:
    if any(option.label == other.label for other in options):
        raise lines.fail(f"the label {option.label} appears twice", line)
    if any(option.cause is other.cause for other in options):
        raise lines.fail("the same root cause appears twice", line)
    options.append(option)


#: Number of the line, and its cells.
_Row = tuple[int, list[str]]


def _take_table(lines: _Lines, wording: Wording, names: dict[str, str]) -> tuple[tuple[str, ...], list[_Row]]:
    """Take a table up to an empty line, the next heading, or the end; return its columns by field, and its rows."""
    header = lines.take("the column names of a table")
    by_name = {name: column for column, name in names.items()}
    columns: list[str] = []
    # A name that follows all columns is unknown or appears twice.
    for name in header.split("|", len(by_name) + 1):
        if name not in by_name:
            raise lines.fail(f"unknown column {name!r}", header)
        if by_name[name] in columns:
            raise lines.fail(f"the column {name!r} appears twice", header)
        columns.append(by_name[name])
    ends = {*wording.drive_test_headings, *wording.cells_headings, *(block[0] for block in wording.closing)}
    rows: list[_Row] = []
    while (line := lines.peek()) is not None and line not in ends:
        lines.take("a row")
        if len(rows) == MAX_ROWS:
            raise lines.fail(f"more than {MAX_ROWS} rows in a table", line)
        if (count := line.count("|") + 1) != len(columns):
            raise lines.fail(f"{count} cells in a table of {len(columns)} columns", line)
        rows.append((lines.number - 1, line.split("|")))
    if not rows:
        raise lines.fail("a table without rows", header)
    return tuple(columns), rows


def _read_cells(columns: Sequence[str], row: _Row) -> dict[str, Value | str]:
    number, cells = row
    values: dict[str, Value | str] = {}
    for column, text in zip(columns, cells, strict=True):
        if text == MISSING:
            values[column] = None
        elif column in TEXT_COLUMNS:
            if not text or text != text.strip() or not text.isprintable():
                raise PromptError(number, f"{column}: expected text or {MISSING!r}", text)
            values[column] = text
        elif _NUMBER.fullmatch(text):
            values[column] = Decimal(text)
        else:
            raise PromptError(number, f"{column}: expected a number such as -85.2, or {MISSING!r}", text)
    return values


def _drive_test(columns: tuple[str, ...], rows: Sequence[_Row]) -> tuple[DriveTestRow, ...]:
    places = [place for column in columns if (place := _neighbor_column(column))]
    count = max((place + 1 for _, place in places), default=0)
    names = [(f"neighbor_{k}_pci", f"neighbor_{k}_brsrp") for k in range(1, count + 1)]
    plain = [column for column in DRIVE_TEST_COLUMNS if not _neighbor_column(column)]
    drive_test = []
    for row in rows:
        values = _read_cells(columns, row)
        neighbors = tuple([Neighbor(values.get(pci), values.get(brsrp)) for pci, brsrp in names])  # type: ignore[arg-type]
        drive_test.append(DriveTestRow(neighbors=neighbors, **{name: values.get(name) for name in plain}))  # type: ignore[arg-type]
    return tuple(drive_test)


def _cell(columns: tuple[str, ...], row: _Row) -> RadioCell:
    values = _read_cells(columns, row)
    return RadioCell(**{column: values.get(column) for column in CELL_COLUMNS})  # type: ignore[arg-type]
