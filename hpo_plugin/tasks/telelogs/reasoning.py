r"""Diagnoses in words: chains of thought for supervised fine-tuning, written by the oracle from its evidence.

Every number is quoted from the case or computed from it by :mod:`hpo_plugin.tasks.telelogs.rules`; nothing is made up.
The text climbs the ladder rung by rung, says what each rule saw, and ends with the answer in ``\boxed{}``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from hpo_plugin.tasks.telelogs.rules import (
    Diagnosis,
    Finding,
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

    In the terse wording it is one line: what decided, and the answer.

    Args:
        case: The case.
        diagnosis: What :func:`~hpo_plugin.tasks.telelogs.rules.diagnose` says about it.

    Raises:
        NoDiagnosisError: If the diagnosis is empty.
    """
    if diagnosis.label is None or diagnosis.cause is None or diagnosis.evidence is None:
        raise NoDiagnosisError("no rule holds for any of the options, so there is no reasoning to write")
    boxed = rf"\boxed{{{diagnosis.label}}}"
    if case.layout.wording == "terse":
        return f"{_brief(case, diagnosis.evidence)} {boxed}"
    situation = Situation(case)
    affected = _numbers(number for number, _ in situation.affected)
    lines = [f"Throughput is below 600 Mbps in {affected}." if situation.affected else "No row is below 600 Mbps."]
    offered = {option.cause: option.label for option in case.options}
    for finding in diagnosis.findings:
        label = offered.get(finding.cause)
        if label is None or finding is diagnosis.findings[-1]:
            continue
        lines.append(f"{label}: {_quote(situation, finding)}{_capitalized(finding.sentence())}. Not {label}.")
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


def _column(rows: Iterable[DriveTestRow], value: Callable[[DriveTestRow], Value]) -> str:
    return ", ".join("-" if value(row) is None else str(value(row)) for row in rows)


def _brief(case: Case, evidence: Finding) -> str:
    """What decided, in one word and the values it saw."""
    rows = [case.drive_test[number] for number in evidence.rows]
    if evidence.cause is Cause.C7:
        return f"v {_column(rows[:1], lambda row: row.speed)}"
    if evidence.cause is Cause.C8:
        return f"RB {_column(rows[:1], lambda row: row.rbs)}"
    if evidence.cause is Cause.C5:
        return f"PCI {_column(case.drive_test, lambda row: row.pci)}"
    if evidence.cause in (Cause.C4, Cause.C6):
        return f"n1 {_column(rows[:1], lambda row: row.neighbors[0].pci)}"
    return "none" if evidence.cause is Cause.C3 else evidence.rule


def _quote(situation: Situation, finding: Finding) -> str:
    """The cells of the tables that a rule looks at, before its conclusion."""
    quote = _QUOTES.get(finding.rule)
    text = None if quote is None else quote(situation)
    return "" if not text else f"{text}. "


def _quote_positions(situation: Situation) -> str:
    parts = []
    for number, row, index in situation.serving:
        cell = situation.case.cells[index]
        if None not in (row.longitude, row.latitude, cell.longitude, cell.latitude):
            parts.append(
                f"row {number + 1} at {row.longitude}, {row.latitude} is served by PCI {row.pci} at {cell.longitude}, "
                f"{cell.latitude}"
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
            f"{edge - deficit:.1f}°, RSRP {row.rsrp if row.rsrp is not None else '-'}"
        )
    return _capitalized("; ".join(parts))


def _quote_pcis(situation: Situation) -> str:
    parts = []
    for number, row in situation.affected:
        if row.pci is None:
            continue
        neighbors = ", ".join(str(neighbor.pci % 30) for neighbor in row.neighbors if neighbor.pci is not None)
        parts.append(f"row {number + 1}: {row.pci % 30} with {neighbors or 'none'}")
    return f"PCIs modulo 30 of serving cell and neighbors, {'; '.join(parts)}" if parts else ""


def _quote_overlap(situation: Situation) -> str:
    stations = {cell.pci: cell.gnodeb_id for cell in situation.case.cells if cell.pci is not None}
    parts = []
    for number, row, index in situation.serving:
        near = [
            f"{neighbor.brsrp} from {stations.get(neighbor.pci) or 'unknown'}"
            for neighbor in row.neighbors[:2]
            if neighbor.pci is not None and neighbor.brsrp is not None
        ]
        own = situation.case.cells[index].gnodeb_id
        parts.append(f"row {number + 1}: serving {row.rsrp} from {own}, neighbors {', '.join(near) or 'none'}")
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
