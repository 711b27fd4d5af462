r"""Diagnoses in words: chains of thought for supervised fine-tuning, written by the oracle from its evidence.

Every number is quoted from the case or computed from it by :mod:`hpo_plugin.tasks.telelogs.rules`; nothing is made up.
The text follows the ladder of rules in order, states what each rule found, and ends with the answer in ``\boxed{}``.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable

from hpo_plugin.tasks.telelogs.prompts import MISSING
from hpo_plugin.tasks.telelogs.rules import (
    OVERLAP,
    PCI_MODULUS,
    THROUGHPUT,
    Diagnosis,
    RuleResult,
    Situation,
    downtilt,
    lobe_deficit,
    vertical_beamwidth,
)
from hpo_plugin.tasks.telelogs.tables import Case, Cause, DriveTestRow, Value


class NoDiagnosisError(ValueError):
    """No rule holds for any cause on offer, so there is nothing to explain."""


def chain_of_thought(case: Case, diagnosis: Diagnosis) -> str:
    r"""Return the reasoning that leads to a diagnosis, ending with ``\boxed{label}``.

    In the terse wording it is one line: what each rule looked at, no or yes, and the answer.

    Args:
        case: The case.
        diagnosis: What :func:`~hpo_plugin.tasks.telelogs.rules.diagnose` says about it.

    Raises:
        NoDiagnosisError: If the diagnosis is empty.
    """
    if diagnosis.label is None or diagnosis.cause is None or diagnosis.evidence is None:
        raise NoDiagnosisError("no rule holds for any of the options, so there is no reasoning to write")
    boxed = rf"\boxed{{{diagnosis.label}}}"
    situation = Situation(case)
    offered = {option.cause: option.label for option in case.options}
    if case.layout.wording == "terse":
        return f"{_terse(situation, diagnosis, offered)} {boxed}".lstrip()
    affected = _numbers(number for number, _ in situation.affected)
    lines = [
        f"Throughput is below {THROUGHPUT} Mbps in {affected}."
        if situation.affected
        else f"No row shows less than {THROUGHPUT} Mbps."
    ]
    for result in diagnosis.results:
        label = offered.get(result.cause)
        if label is None or result is diagnosis.results[-1]:
            continue
        lines.append(f"{label}: {_quote(situation, result)}{_capitalized(result.sentence())}. Not {label}.")
    evidence = diagnosis.evidence
    decided = f"{_quote(situation, evidence)}{_capitalized(evidence.sentence())}"
    lines.append(f"{diagnosis.label}: {decided}. So it is {diagnosis.label}.")
    lines += ["", f"{diagnosis.cause.text}", boxed]
    return "\n".join(lines)


def _capitalized(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _numbers(numbers: Iterable[int]) -> str:
    """Rows as people count them, from 1."""
    listed = [str(number + 1) for number in numbers]
    return f"row {listed[0]}" if len(listed) == 1 else f"rows {', '.join(listed)}"


def _shown(value: Value) -> str:
    """A number in the digits of the prompt."""
    return MISSING if value is None else f"{value:f}"


def _column(rows: Iterable[DriveTestRow], value: Callable[[DriveTestRow], Value]) -> str:
    return ", ".join(_shown(value(row)) for row in rows)


def _terse(situation: Situation, diagnosis: Diagnosis, offered: Container[Cause]) -> str:
    """The rungs in a few characters each: what was looked at, and no or yes."""
    rungs = []
    for result in diagnosis.results:
        if result.cause in offered and result.values:
            seen = _TERSE_QUOTES[result.rule](situation, result)
            rungs.append(f"{seen} {'yes' if result is diagnosis.evidence else 'no'}")
    return ", ".join(rungs)


def _terse_neighbor(situation: Situation, result: RuleResult) -> str:
    """The strongest neighbor, or the first that the rule counts."""
    if not situation.affected:
        return "n1 -"
    row = situation.affected[0][1]
    place = 0
    if result.holds:
        counted = situation.overlaps() if result.cause is Cause.C4 else situation.same_residues()
        _, row, neighbor = next(counted)
        place = row.neighbors.index(neighbor)
    return f"n{place + 1} {_shown(row.neighbors[place].pci) if row.neighbors else MISSING}"


def _terse_handovers(situation: Situation, result: RuleResult) -> str:
    """The serving PCIs, each with whether it is the one before it or another, and the number of changes."""
    written: list[str] = []
    before: Value = None
    for row in situation.case.drive_test:
        mark = "" if before is None or row.pci is None else "=" if row.pci == before else ">"
        written.append(_shown(row.pci) + mark)
        before = before if row.pci is None else row.pci
    return f"PCI {' '.join(written)} {result.values['changes']}"


_TERSE_QUOTES: dict[str, Callable[[Situation, RuleResult], str]] = {
    "coverage distance": lambda situation, result: f"{result.values['meters']:.1f} m",
    "handovers": _terse_handovers,
    "speed": lambda situation, result: f"v {result.values['speed']:g}",
    "resource blocks": lambda situation, result: f"RB {_shown(situation.case.drive_test[result.rows[0]].rbs)}",
    "weak coverage under a steep beam": lambda situation, result: f"beam {result.values['deficit']:.2f}",
    "PCI mod 30": _terse_neighbor,
    "overlapping coverage": _terse_neighbor,
    "steep beam": lambda situation, result: f"beam {result.values['deficit']:.2f}",
}


def _quote(situation: Situation, result: RuleResult) -> str:
    """The cells of the tables that a rule looks at, before its conclusion."""
    quote = _QUOTES.get(result.rule)
    text = None if quote is None else quote(situation)
    return "" if not text else f"{text}. "


def _quote_positions(situation: Situation) -> str:
    parts = []
    for number, row, index in situation.serving:
        cell = situation.case.cells[index]
        if None not in (row.longitude, row.latitude, cell.longitude, cell.latitude):
            parts.append(
                f"row {number + 1} at {_shown(row.longitude)}, {_shown(row.latitude)} is served by PCI "
                f"{_shown(row.pci)} at {_shown(cell.longitude)}, {_shown(cell.latitude)}"
            )
    return _capitalized("; ".join(parts))


def _quote_serving(situation: Situation) -> str:
    return f"Serving PCIs are {_column(situation.case.drive_test, lambda row: row.pci)}"


def _quote_speeds(situation: Situation) -> str:
    return f"Speeds are {_column(situation.case.drive_test, lambda row: row.speed)}"


def _quote_blocks(situation: Situation) -> str:
    rows = [row for _, row in situation.affected]
    return f"Resource blocks of these rows are {_column(rows, lambda row: row.rbs)}" if rows else ""


def _quote_beams(situation: Situation) -> str:
    parts = []
    for number, row, index in situation.serving:
        cell = situation.case.cells[index]
        deficit, tilt, width = lobe_deficit(row, cell), downtilt(cell), vertical_beamwidth(cell)
        if deficit is None or tilt is None or width is None:
            continue
        edge = tilt - width / 2
        parts.append(
            f"row {number + 1}: tilt {tilt:g}° minus half of the beamwidth {width:g}° is {edge:g}°, elevation "
            f"{edge - deficit:.2f}°, RSRP {_shown(row.rsrp)}"
        )
    return _capitalized("; ".join(parts))


def _quote_pcis(situation: Situation) -> str:
    parts = []
    for number, row in situation.affected:
        if row.pci is None:
            continue
        neighbors = ", ".join(
            _shown(neighbor.pci % PCI_MODULUS) for neighbor in row.neighbors if neighbor.pci is not None
        )
        parts.append(f"row {number + 1}: {_shown(row.pci % PCI_MODULUS)} with {neighbors or 'none'}")
    return f"PCIs modulo {PCI_MODULUS} of serving cell and neighbors, {'; '.join(parts)}" if parts else ""


def _quote_overlap(situation: Situation) -> str:
    stations = situation.stations()
    parts = []
    for number, row, index in situation.serving:
        # The two strongest, and every other that may count.
        near = [
            f"{_shown(neighbor.brsrp)} from {' or '.join(sorted(stations.get(neighbor.pci, ('unknown',))))}"
            for place, neighbor in enumerate(row.neighbors)
            if neighbor.pci is not None
            and neighbor.brsrp is not None
            and (place < 2 or (row.rsrp is not None and neighbor.brsrp >= row.rsrp - OVERLAP))
        ]
        own = situation.case.cells[index].gnodeb_id or MISSING
        parts.append(f"row {number + 1}: serving {_shown(row.rsrp)} from {own}, neighbors {', '.join(near) or 'none'}")
    return _capitalized("; ".join(parts))


_QUOTES: dict[str, Callable[[Situation], str]] = {
    "coverage distance": _quote_positions,
    "handovers": _quote_serving,
    "speed": _quote_speeds,
    "resource blocks": _quote_blocks,
    "weak coverage under a steep beam": _quote_beams,
    "PCI mod 30": _quote_pcis,
    "overlapping coverage": _quote_overlap,
}
