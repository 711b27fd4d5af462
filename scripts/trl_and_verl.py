"""The same training in TRL and in verl: the table and the figure of ``docs/trl.md``.

    PYTHONPATH=.venv/trl-1.16.0 python scripts/trl_and_verl.py --runs runs/trl-and-verl   # trains, and collects
    python scripts/trl_and_verl.py --write                                    # the table of docs/trl.md
    python scripts/trl_and_verl.py --figure curves.svg

For each seed, ``hpo-plugin quickstart`` and ``examples/trl_countdown.py`` train from the same start model on the same
problems with the same settings.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from hpo_plugin.runs.curves import STYLE, smooth
from hpo_plugin.runs.verl_log import evaluations, read_rows, step_views
from hpo_plugin.study.statistics import paired_difference

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "trl.md"
RESULTS = ROOT / "docs" / "trl_and_verl.json"
SEEDS = (0, 1, 2)
#: Steps at the end whose mean reward is compared.
LAST = 20
COLORS = {"verl": "#1f5fa8", "TRL": "#d4770c"}


def train(runs: Path, framework: str, seed: int) -> Path:
    """Train once.

    Args:
        runs: The folder of ``--output``.
        framework: ``verl`` or ``TRL``.
        seed: Of data, start model and sampling.

    Returns:
        The metrics.
    """
    if framework == "verl":
        pattern, command = f"countdown_cpu-ahpo-seed{seed}-*/metrics.jsonl", ["-m", "hpo_plugin.cli", "quickstart"]
    else:
        pattern, command = f"trl/ahpo-seed{seed}/metrics.jsonl", [str(ROOT / "examples" / "trl_countdown.py")]
    subprocess.run([sys.executable, *command, f"--seed={seed}", f"--output={runs}"], check=True)
    (found,) = runs.glob(pattern)
    return found


def collect(runs: Path) -> dict[str, Any]:
    """Train with all seeds.

    Args:
        runs: A folder without runs: versions and date are those of now.

    Returns:
        The curves of all runs, with what they were made by.
    """
    if runs.exists() and any(runs.iterdir()):
        raise SystemExit(f"{runs} is not empty: give a new folder, so that all runs are of one machine and version")
    curves: dict[str, dict[str, Any]] = {framework: {} for framework in COLORS}
    for seed in SEEDS:
        for framework in COLORS:
            rows = read_rows(train(runs, framework, seed))
            views = step_views(rows)
            curves[framework][str(seed)] = {
                "reward": [round(view.reward, 4) for view in views],
                "alpha": [round(view.alpha, 4) for view in views],
                "held_out": [[step, round(success, 4)] for step, success in evaluations(rows)],
            }
    packages = ("verl", "trl", "torch", "transformers")
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {package: version(package) for package in packages},
        "curves": curves,
    }


def scores(curves: dict[str, Any]) -> dict[str, dict[int, float]]:
    """Held-out success at the end, and mean reward of the last steps, by measure and seed, in percent."""
    return {
        "held-out success at the end": {int(seed): 100 * run["held_out"][-1][1] for seed, run in curves.items()},
        f"mean reward of the last {LAST} steps": {
            int(seed): 100 * float(np.mean(run["reward"][-LAST:])) for seed, run in curves.items()
        },
    }


def table(results: dict[str, Any]) -> str:
    """The table in Markdown, and the differences below it."""
    curves = results["curves"]
    lines = ["| framework | seed | before | step 20 | step 40 | step 60 |", "|---|---|---|---|---|---|"]
    for framework in COLORS:
        for seed, run in curves[framework].items():
            cells = [f"{100 * success:.1f} %" for _, success in run["held_out"]]
            lines.append(f"| {framework} | {seed} | {' | '.join(cells)} |")
    ours, theirs = scores(curves["TRL"]), scores(curves["verl"])
    differences = []
    for name in ours:
        found = paired_difference([ours[name]], [theirs[name]])
        assert found is not None
        assert found.low is not None
        differences.append(f"{name} {found.value:+.1f} [{found.low:+.1f}, {found.high:+.1f}]")
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return (
        "\n".join(lines)
        + "\n\nDifference TRL − verl in percentage points, paired by seed, with 95 % confidence intervals (Student's "
        + f"t, {len(SEEDS)} seeds, {len(differences)} comparisons): {'; '.join(differences)}.\n\n"
        + f"Measured on {results['date']}: {results['machine']}, {versions}."
    )


def page(text: str, results: dict[str, Any]) -> str:
    """The page with its table written anew."""
    new = f"<!-- table: trl-and-verl -->\n\n{table(results)}\n\n<!-- end -->"
    return re.sub(r"<!-- table: trl-and-verl -->\n.*?<!-- end -->", lambda _: new, text, flags=re.DOTALL)


def save_figure(results: dict[str, Any], path: Path) -> None:
    """Draw success and α over the steps: a line for each run, held-out success as points.

    Args:
        results: As :func:`collect` returns them.
        path: Of the picture; its suffix is the format.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import PercentFormatter

    with plt.rc_context(STYLE | {"svg.hashsalt": "hpo"}):
        figure, (success, weight) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
        for framework, color in COLORS.items():
            for number, run in enumerate(results["curves"][framework].values()):
                steps = range(1, len(run["reward"]) + 1)
                label = framework if number == 0 else None
                success.plot(steps, smooth(run["reward"]), color=color, linewidth=1.2, alpha=0.8, label=label)
                success.plot(*zip(*run["held_out"], strict=True), "o", color=color, markersize=4, alpha=0.7)
                weight.plot(steps, smooth(run["alpha"]), color=color, linewidth=1.2, alpha=0.8, label=label)
        success.set_title("Success: training (lines), held-out (points)")
        success.set_ylim(bottom=0)
        success.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        weight.set_title("α, weight of negative responses")
        weight.set_ylim(0, 1.05)
        for axis in (success, weight):
            axis.set_xlabel("step")
            axis.legend(loc="best")
        figure.savefig(path, dpi=130)
        plt.close(figure)


def main() -> None:
    """Train and collect, write the page, or draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="train with all seeds into this new folder, and collect")
    parser.add_argument("--write", action="store_true", help="write docs/trl.md")
    parser.add_argument("--figure", type=Path, help="draw the figure into this file")
    given = parser.parse_args()
    if given.runs:
        RESULTS.write_text(json.dumps(collect(given.runs), ensure_ascii=False) + "\n")
    results = json.loads(RESULTS.read_text())
    if given.write:
        PAGE.write_text(page(PAGE.read_text(), results))
    if given.figure:
        save_figure(results, given.figure)


if __name__ == "__main__":
    main()
