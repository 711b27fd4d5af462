"""A TeleLogs case as typed tables: a drive test, the engineering parameters of the cells around it, the options.

Numbers are :class:`decimal.Decimal`, which keeps the digits as they are written: a parsed prompt renders to the same
bytes, and evidence quotes what the prompt says. A missing value (``-``) is None.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from enum import Enum
from typing import Final

Value = Decimal | None


class Cause(str, Enum):
    """The eight root causes, by their names in the data set.

    A prompt may offer a cause under another label; see :class:`Option`.
    """

    C1 = "C1"
    C2 = "C2"
    C3 = "C3"
    C4 = "C4"
    C5 = "C5"
    C6 = "C6"
    C7 = "C7"
    C8 = "C8"

    @property
    def text(self) -> str:
        """The sentence by which a prompt offers it."""
        return _CAUSE_TEXTS[self.value]


_CAUSE_TEXTS: Final = {
    "C1": "The serving cell's downtilt angle is too large, causing weak coverage at the far end.",
    "C2": "The serving cell's coverage distance exceeds 1km, resulting in over-shooting.",
    "C3": "A neighboring cell provides higher throughput.",
    "C4": "Non-colocated co-frequency neighboring cells cause severe overlapping coverage.",
    "C5": "Frequent handovers degrade performance.",
    "C6": "Neighbor cell and serving cell have the same PCI mod 30, leading to interference.",
    "C7": "Test vehicle speed exceeds 40km/h, impacting user throughput.",
    "C8": "Average scheduled RBs are below 160, affecting throughput.",
}


@dataclass(frozen=True, slots=True)
class Neighbor:
    """One of the strongest neighbor cells that a row reports.

    Attributes:
        pci: Physical cell identity.
        brsrp: Filtered beam RSRP, in dBm.
    """

    pci: Value
    brsrp: Value


@dataclass(frozen=True, slots=True)
class DriveTestRow:
    """One second of the drive test.

    Attributes:
        timestamp: As written.
        longitude: Degrees.
        latitude: Degrees.
        speed: GPS speed, in km/h.
        pci: Physical cell identity of the serving cell.
        rsrp: SS-RSRP of the serving cell, in dBm.
        sinr: SS-SINR of the serving cell, in dB.
        throughput: Downlink throughput at the MAC layer, in Mbps.
        neighbors: The strongest first; as many as the table has columns for.
        rbs: Scheduled downlink resource blocks, silent slots included.
    """

    timestamp: str | None
    longitude: Value
    latitude: Value
    speed: Value
    pci: Value
    rsrp: Value
    sinr: Value
    throughput: Value
    neighbors: tuple[Neighbor, ...]
    rbs: Value


@dataclass(frozen=True, slots=True)
class RadioCell:
    """Engineering parameters of one cell.

    Attributes:
        gnodeb_id: Base station; cells with the same one are colocated.
        cell_id: Number of the cell at its base station.
        longitude: Degrees.
        latitude: Degrees.
        mechanical_azimuth: Degrees, clockwise from north.
        mechanical_downtilt: Degrees.
        digital_tilt: Degrees, or 255 for the default of 6.
        digital_azimuth: Degrees.
        beam_scenario: ``DEFAULT`` or ``SCENARIO_<n>``; decides the vertical beamwidth.
        height: Meters.
        pci: Physical cell identity.
        txrx_mode: Antenna ports, as in ``64T64R``.
        max_transmit_power: dBm.
        antenna_model: As written.
    """

    gnodeb_id: str | None
    cell_id: str | None
    longitude: Value
    latitude: Value
    mechanical_azimuth: Value
    mechanical_downtilt: Value
    digital_tilt: Value
    digital_azimuth: Value
    beam_scenario: str | None
    height: Value
    pci: Value
    txrx_mode: str | None
    max_transmit_power: Value
    antenna_model: str | None

    @property
    def name(self) -> str:
        """``gNodeB-cell``, for people to read."""
        return f"{self.gnodeb_id or '?'}-{self.cell_id or '?'}"


@dataclass(frozen=True, slots=True)
class Option:
    """A root cause as a prompt offers it.

    Attributes:
        label: ``C3``, a digit (``3``) or a letter with digits (``M4``).
        cause: What it stands for.
    """

    label: str
    cause: Cause


#: All eight under their own names.
STANDARD_OPTIONS: Final = tuple(Option(cause.value, cause) for cause in Cause)

#: Most neighbors that a prompt's table has columns for.
MAX_NEIGHBORS: Final = 5

#: Columns of the drive test, by field; ``neighbor_3_pci`` is the PCI of the third neighbor.
DRIVE_TEST_COLUMNS: Final = (
    "timestamp",
    "longitude",
    "latitude",
    "speed",
    "pci",
    "rsrp",
    "sinr",
    "throughput",
    *(f"neighbor_{k}_pci" for k in range(1, MAX_NEIGHBORS + 1)),
    *(f"neighbor_{k}_brsrp" for k in range(1, MAX_NEIGHBORS + 1)),
    "rbs",
)
#: Columns of the engineering parameters, by field.
CELL_COLUMNS: Final = (
    "gnodeb_id",
    "cell_id",
    "longitude",
    "latitude",
    "mechanical_azimuth",
    "mechanical_downtilt",
    "digital_tilt",
    "digital_azimuth",
    "beam_scenario",
    "height",
    "pci",
    "txrx_mode",
    "max_transmit_power",
    "antenna_model",
)
#: Fields that hold text; all others hold numbers.
TEXT_COLUMNS: Final = frozenset({"timestamp", "gnodeb_id", "cell_id", "beam_scenario", "txrx_mode", "antenna_model"})


@dataclass(frozen=True, slots=True)
class PromptLayout:
    r"""What a prompt looks like, beyond what it says.

    Attributes:
        wording: Name of the fixed text: ``full`` or ``terse`` (``hpo_plugin.tasks.telelogs.prompts.WORDINGS``).
        drive_test_columns: Columns of the drive test in their order, by field.
        cell_columns: The same of the engineering parameters.
        cells_first: Whether the engineering parameters come before the drive test.
        stated_options: The number of causes in "From the following 8 potential root causes"; None for the
            number of options.
        box: The literal in the instruction: ``\boxed{{}}`` in the data set.
        cells_heading: The same for "Engeneering parameters data as follows：".
        drive_test_heading: The same for "User plane drive test data as follows：".
        gaps: Empty lines before each block of the prompt and after the last one; None for the usual ones.
    """

    wording: str = "full"
    drive_test_columns: tuple[str, ...] = DRIVE_TEST_COLUMNS
    cell_columns: tuple[str, ...] = CELL_COLUMNS
    cells_first: bool = False
    stated_options: int | None = None
    box: str | None = None
    cells_heading: str | None = None
    drive_test_heading: str | None = None
    gaps: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """One question of TeleLogs.

    Attributes:
        drive_test: Rows in the order of time.
        cells: Engineering parameters, in the order of the prompt.
        options: The causes on offer, in the order of the prompt.
        layout: What the prompt looks like.
    """

    drive_test: tuple[DriveTestRow, ...]
    cells: tuple[RadioCell, ...]
    options: tuple[Option, ...] = STANDARD_OPTIONS
    layout: PromptLayout = field(default_factory=PromptLayout)

    def label_of(self, cause: Cause) -> str | None:
        """Return the label of a cause, or None if it is not on offer."""
        return next((option.label for option in self.options if option.cause is cause), None)

    def cause_of(self, label: str) -> Cause | None:
        """Return the cause behind a label, or None if there is no such label."""
        return next((option.cause for option in self.options if option.label == label), None)
