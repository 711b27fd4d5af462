"""Measure the synthetic TeleLogs: the oracle's confusion table and the distributions of the fields.

python scripts/telelogs_report.py                       # prints the tables of docs/telelogs.md
python scripts/telelogs_report.py --figure fields.svg   # and draws the distributions (needs the extra cpu)
"""

from __future__ import annotations

import argparse
import platform
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

import hpo_plugin
from hpo_plugin.tasks.telelogs import Cause, Diagnosis, diagnose, render_prompt
from hpo_plugin.tasks.telelogs.counterfactuals import EDITS
from hpo_plugin.tasks.telelogs.radio import BaseScenario, BaseScenarios
from hpo_plugin.tasks.telelogs.rules import lobe_deficit
from hpo_plugin.tasks.telelogs.tables import Case

SEED = 0
SCENARIOS = 2_000
#: Field -> what the published test split has: {percentile: value}; 0 and 100 are its range.
PUBLISHED: Mapping[str, Mapping[int, float]] = {
    "throughput in the dip [Mbps]": {10: 204, 50: 358, 90: 483},
    "throughput elsewhere [Mbps]": {0: 600, 50: 1003, 100: 1648},
    "speed [km/h]": {0: 0, 100: 39},
    "resource blocks": {0: 160, 100: 211},
    "RSRP [dBm]": {0: -90, 50: -82, 100: -46},
    "SINR [dB]": {0: -9, 100: 39},
    "neighbors": {0: 2, 100: 5},
    "cells": {0: 4, 100: 13},
    "lobe deficit of C1 [°]": {10: 0.4, 50: 5.3, 90: 8.5},
    "characters of a prompt": {0: 4112, 100: 4999},
}
PERCENTILES = (0, 10, 50, 90, 100)


def fields(bases: Sequence[BaseScenario]) -> dict[str, list[float]]:
    """Return the values of each field over base scenarios; of C1 and of prompts, over their counterfactuals."""
    rows = [(number in base.dip, row) for base in bases for number, row in enumerate(base.drive_test)]
    rng = random.Random(SEED)
    deficits, lengths = [], []
    for base in bases:
        for cause, edit in EDITS.items():
            drive_test, cells = edit(base, rng)
            lengths.append(float(len(render_prompt(Case(drive_test, cells)))))
            if cause is Cause.C1:
                before = [drive_test[number] for number in base.dip if number < base.handover]
                deficits.append(max(_known(lobe_deficit(row, cells[base.first]) for row in before)))
    return {
        "throughput in the dip [Mbps]": _known(row.throughput for in_dip, row in rows if in_dip),
        "throughput elsewhere [Mbps]": _known(row.throughput for in_dip, row in rows if not in_dip),
        "speed [km/h]": _known(row.speed for _, row in rows),
        "resource blocks": _known(row.rbs for _, row in rows),
        "RSRP [dBm]": _known(row.rsrp for _, row in rows),
        "SINR [dB]": _known(row.sinr for _, row in rows),
        "neighbors": [float(sum(n.pci is not None for n in row.neighbors)) for _, row in rows],
        "cells": [float(len(base.cells)) for base in bases],
        "lobe deficit of C1 [°]": deficits,
        "characters of a prompt": lengths,
    }


def _known(values: Iterable[object]) -> list[float]:
    return [float(value) for value in values if value is not None]  # type: ignore[arg-type]


def confusion(bases: Sequence[BaseScenario]) -> Counter[tuple[Cause, Cause | None]]:
    """Count (edit, what the oracle finds) over all edits of all scenarios, before anything is drawn again."""
    found: Counter[tuple[Cause, Cause | None]] = Counter()
    for base in bases:
        for cause, edit in EDITS.items():
            diagnosis: Diagnosis = diagnose(Case(*edit(base, random.Random(f"{SEED}/{base.number}/{cause.value}"))))
            found[cause, diagnosis.cause] += 1
    return found


def print_tables(values: Mapping[str, Sequence[float]], found: Counter[tuple[Cause, Cause | None]]) -> None:
    """Print the field table and the confusion table in Markdown."""
    print("| field | " + " | ".join(f"p{p}" for p in PERCENTILES) + " | published |")
    print("|---|" + "---|" * (len(PERCENTILES) + 1))
    for name, field in values.items():
        measured = " | ".join(f"{value:.4g}" for value in np.percentile(field, PERCENTILES))
        published = ", ".join(f"p{p} {value:g}" for p, value in PUBLISHED[name].items())
        print(f"| {name} | {measured} | {published} |")
    print()
    columns = [*Cause, None] if any(cause is None for _, cause in found) else [*Cause]
    print("| edit | " + " | ".join("none" if cause is None else cause.value for cause in columns) + " |")
    print("|---|" + "---|" * len(columns))
    for edited in Cause:
        print(f"| {edited.value} | " + " | ".join(str(found[edited, cause] or "") for cause in columns) + " |")


def draw(values: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw a histogram of each field, with the published quantiles as lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 5, figsize=(15, 5.4), layout="constrained")
    for axis, (name, field) in zip(axes.flat, values.items(), strict=True):
        whole = all(value == int(value) for value in field) and max(field) - min(field) < 60
        bins = np.arange(min(field) - 0.5, max(field) + 1.5) if whole else 40
        axis.hist(field, bins=bins, color="#8fb3d9", edgecolor="none")
        for percentile, value in PUBLISHED[name].items():
            inner = 0 < percentile < 100
            axis.axvline(value, color="#c1440e", lw=1.4, ls="-" if inner else ":")
            if inner:
                axis.axvline(np.percentile(field, percentile), color="#1f3b57", lw=1.2, ls="--")
        axis.set_title(name, fontsize=10)
        axis.set_yticks([])
        axis.tick_params(labelsize=8)
        axis.spines[["top", "left", "right"]].set_visible(False)
    handles = [
        plt.Line2D([], [], color="#c1440e", lw=1.4, label="published quantile"),
        plt.Line2D([], [], color="#c1440e", lw=1.4, ls=":", label="published range"),
        plt.Line2D([], [], color="#1f3b57", lw=1.2, ls="--", label="synthetic quantile"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def main() -> None:
    """Print everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path, help="draw the distributions into this file (.svg, .png, .pdf)")
    parser.add_argument("--figure-only", action="store_true", help="print nothing")
    arguments = parser.parse_args()
    stream = BaseScenarios(SEED)
    bases = [next(stream) for _ in range(SCENARIOS)]
    values = fields(bases)
    if arguments.figure is not None:
        draw(values, arguments.figure)
    if arguments.figure_only:
        return
    print(
        f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}, hpo-plugin "
        f"{hpo_plugin.__version__}; seed {SEED}, {SCENARIOS:,} base scenarios "
        f"({stream.accepted:,} of {stream.drawn:,} candidates qualify)\n"
    )
    print_tables(values, confusion(bases))


if __name__ == "__main__":
    main()
