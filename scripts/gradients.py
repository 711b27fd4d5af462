"""Measures the effect of α on an update: the tables and the figure of ``docs/results/gradients.md``.

    python scripts/gradients.py --runs runs      # simulate, and write docs/gradients.json
    python scripts/gradients.py --write          # write the tables of docs/results/gradients.md
    python scripts/gradients.py --figure gradients.svg

The simulator trains cells of two studies at GRPO's best learning rate, and splits the gradient of every step by the
sign of the advantage. ``hpo-plugin study prepare`` makes the data and the start models below ``--runs``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpo_plugin.check.compose import compose
from hpo_plugin.runs.curves import smooth
from hpo_plugin.simulator.gradients import compare_gradients
from hpo_plugin.simulator.loop import simulate
from hpo_plugin.study.cells import Workspace
from hpo_plugin.study.figures import STRONG, Panel, Series, line_figure
from hpo_plugin.study.inputs import full_overrides
from hpo_plugin.study.spec import load_study
from hpo_plugin.study.statistics import mean_band

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results" / "gradients.md"
RESULTS = ROOT / "docs" / "gradients.json"
#: Study and setting -> the arms that are simulated.
CELLS = {
    ("learning-rate", "lr-3e-4"): ("grpo", "token-mean", "hpo", "ahpo"),
    ("long-failures", "lr-3e-4"): ("grpo", "token-mean", "ahpo"),
}
SEEDS = (20, 21, 22)
#: Number of first and of last updates that a table summarizes.
WINDOW = 10
NAMES = ("ratio", "cosine", "alpha", "turn", "length", "adamw_turn", "adamw_length", "step")
#: Title of a table -> its columns: measure -> title.
COLUMNS = {
    "gradients of both signs": {
        "ratio": "‖g⁻‖/‖g⁺‖",
        "cosine": "cosine of g⁺ and g⁻",
        "alpha": "α of A-HPO",
        "step": "norm of the step",
    },
    "A-HPO's α compared with α = 1": {
        "turn": "gradient: angle",
        "length": "gradient: length",
        "adamw_turn": "step: angle",
        "adamw_length": "step: length",
    },
}


def collect(runs: Path) -> dict[str, Any]:
    """Simulate every cell."""
    # verl's plugins register estimators and losses.
    import verl  # noqa: F401

    torch.set_num_threads(1)
    curves: dict[str, dict[str, list[dict[str, list[float | None]]]]] = {}
    for (name, setting), arms in CELLS.items():
        study = load_study(ROOT / "studies" / f"{name}.yaml")
        workspace = Workspace(study, runs)
        for arm in arms:
            for seed in SEEDS:
                cell = study.cell(setting, arm, seed)
                overrides = [text for text in full_overrides(workspace, cell) if "trainer.test_freq" not in text]
                overrides += ["trainer.test_freq=-1", "trainer.val_before_train=False"]
                config, finding = compose(cell.config_name, overrides)
                if config is None:
                    raise SystemExit(f"{finding.found}: {finding.remedy}")
                rows = [metrics for step, metrics in simulate(config, compare_gradients) if step]
                run = {n: [_rounded(row.get(f"gradients/{n}")) for row in rows] for n in NAMES}
                curves.setdefault(f"{name}/{setting}", {}).setdefault(arm, []).append(run)
                print(cell.name, run["ratio"][0], run["ratio"][-1], flush=True)
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {package: version(package) for package in ("verl", "torch", "transformers")},
        "curves": curves,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def ends(runs: list[Mapping[str, list[float | None]]], name: str) -> tuple[float, float]:
    """Median of the first and of the last updates, mean over seeds. Updates without both signs are omitted."""
    found = []
    for window in (slice(None, WINDOW), slice(-WINDOW, None)):
        medians = [np.median([value for value in run[name][window] if value is not None]) for run in runs]
        found.append(float(np.mean(medians)))
    return found[0], found[1]


def table(results: Mapping[str, Any]) -> str:
    """The tables in Markdown."""
    lines = []
    for place, by_arm in results["curves"].items():
        name, setting = place.split("/")
        study = load_study(ROOT / "studies" / f"{name}.yaml")
        for title, columns in COLUMNS.items():
            lines += [f"**{study.settings[setting].title}: {title}**", ""]
            lines += [f"| run | {' | '.join(columns.values())} |", f"|---|{'---|' * len(columns)}"]
            for arm, runs in by_arm.items():
                cells = []
                for measure in columns:
                    digits, unit = (0, "°") if "turn" in measure else (0 if measure == "step" else 2, "")
                    cells.append(", ".join(f"{value:.{digits}f}{unit}" for value in ends(runs, measure)))
                lines.append(f"| {study.arms[arm].title} | {' | '.join(cells)} |")
            lines.append("")
    versions = ", ".join(f"{package} {number}" for package, number in results["versions"].items())
    lines.append(
        f"Each cell shows the median of the first {WINDOW} updates and the median of the last {WINDOW} of 60, as means "
        f"over the seeds {', '.join(map(str, SEEDS))}. {results['date']}, {results['machine']}, {versions}."
    )
    return "\n".join(lines)


def page(text: str, results: Mapping[str, Any]) -> str:
    """The page with its tables replaced."""
    new = f"<!-- table: gradients -->\n\n{table(results)}\n\n<!-- end -->"
    return re.sub(r"<!-- table: gradients -->\n.*?<!-- end -->", lambda _: new, text, flags=re.DOTALL)


def figure(results: Mapping[str, Any]) -> Any:
    """The angle between the updates with A-HPO's α and with α = 1, in the runs of A-HPO."""
    panels = []
    for place, by_arm in results["curves"].items():
        series = []
        for name, title, color in (("turn", "gradient", "#7f7f7f"), ("adamw_turn", "AdamW's step", STRONG)):
            values = np.array([[np.nan if value is None else value for value in run[name]] for run in by_arm["ahpo"]])
            known = ~np.isnan(values).any(axis=0)
            mean, low, high = mean_band(np.array([smooth(run) for run in values[:, known].tolist()]))
            steps = np.arange(1, len(known) + 1, dtype=float)[known]
            # matplotlib omits labels with a leading underscore from the legend; the first panel has the legend.
            label = f"_{title}" if panels else title
            series.append(Series(label, color, steps, mean, low, high, strong=name == "adamw_turn"))
        panels.append(Panel(f"degrees ({place.partition('/')[0]})", series))
    return line_figure("Angle between the updates with A-HPO's α and with α = 1", "update", panels)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", type=Path, help="simulate, with the inputs that `hpo-plugin study prepare` wrote to this directory"
    )
    parser.add_argument("--write", action="store_true", help="write the tables to the page")
    parser.add_argument("--figure", type=Path, help="draw the figure to this path")
    given = parser.parse_args(argv)
    if given.runs is not None:
        RESULTS.write_text(json.dumps(collect(given.runs), separators=(",", ":")) + "\n", encoding="utf-8")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    if given.write:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    if given.figure is not None:
        figure(results).savefig(given.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
