"""Rows of results: what they hold, and how they are printed.

A row is a dictionary whose values are strings, numbers, booleans or None. Any keys may be in it, and become the columns
in the order in which they first appear. One key is read: ``met`` says whether the row's bar is met, and is None, or
absent, where there is no bar. :func:`row` makes the usual one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def row(
    name: str,
    measured: float,
    unit: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    note: str = "",
) -> Row:
    """Make a row of one measurement and its bar.

    Args:
        name: What was measured.
        measured: The result.
        unit: Its unit.
        at_least: The bar, where more is better.
        at_most: The bar, where less is better. Without either there is no bar.
        note: Spread, circumstances.

    Returns:
        The row, with ``bar`` as text and ``met``. A result that is not a number meets no bar.

    Raises:
        ValueError: If both bars are given.
    """
    if at_least is not None and at_most is not None:
        raise ValueError("a row has one bar: at_least or at_most")
    bar, met = "", None
    if at_least is not None:
        bar, met = f"≥ {number(at_least)}", bool(measured >= at_least)
    elif at_most is not None:
        bar, met = f"≤ {number(at_most)}", bool(measured <= at_most)
    return {"name": name, "measured": float(measured), "unit": unit, "bar": bar, "met": met, "note": note}


def number(value: float) -> str:
    """Write a number with three significant digits, and thousands with commas."""
    if isinstance(value, int) or (math.isfinite(value) and abs(value) >= 1000):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a Markdown table; a bar that is missed stands out."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(_cell(row.get(column)) for column in columns)} |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float | int):
        return number(value)
    return str(value).replace("|", "\\|").replace("\n", " ")
