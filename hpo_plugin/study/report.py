"""The report of a study: pictures, a Markdown page, and one HTML page that needs nothing else.

The report is a function of the declaration and the collected data: the same data give the same bytes. A page starts
with the figure of the final scores and the text of the study. Tables, other figures and definitions follow.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import numpy as np
import numpy.typing as npt
from markdown_it import MarkdownIt

from hpo_plugin.files import atomic_write
from hpo_plugin.runs.curves import SMOOTHED_OVER, smooth
from hpo_plugin.study import statistics
from hpo_plugin.study.data import (
    ALPHA,
    HELD_OUT,
    LENGTH,
    REWARD,
    SHARE_NEGATIVE,
    SHARE_POSITIVE,
    CellData,
    check_inputs,
)
from hpo_plugin.study.figures import STRONG, Panel, Series, colors, line_figure, save, score_figure
from hpo_plugin.study.spec import SIMULATOR, VERL, Cell, Experiment, Study, StudyError, Sweep, paper_numbers
from hpo_plugin.study.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Points of a curve over time.
_TIME_POINTS = 100
#: Updates over which :func:`collapsed` takes means.
COLLAPSE_WINDOW = 10
#: End of the name of a figure of final scores.
FINAL = "-final"

Floats = npt.NDArray[np.float64]
#: Seed -> value.
BySeed = dict[int, float]


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        header: Titles of the columns.
        rows: Cells.
        title: Title above the table; may be empty.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        name: File name without suffix.
        alt: Alternative text.
        figure: The figure.
    """

    name: str
    alt: str
    figure: Figure


@dataclass
class Section:
    """A section of the page. The fields are in the order of the page.

    Attributes:
        title: Heading.
        paragraphs: Text in Markdown.
        tables: Tables.
        notes: Text below the tables.
        pictures: Pictures.
    """

    title: str
    paragraphs: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


@dataclass(frozen=True)
class StudyReport:
    """A page.

    Attributes:
        name: Name of the study and of its files.
        title: Heading of the page.
        text: Introduction in Markdown.
        sections: Sections of the page.
    """

    name: str
    title: str
    text: str
    sections: Sequence[Section]

    @property
    def lead(self) -> Picture | None:
        """The figure above the text: the first figure of final scores. Its section does not show it again."""
        pictures = (picture for section in self.sections for picture in section.pictures)
        return next((picture for picture in pictures if picture.name.endswith(FINAL)), None)


@dataclass(frozen=True)
class Results:
    """The finished runs of one experiment.

    Attributes:
        experiment: The experiment.
        runs: Arm -> seed -> data, in the experiment's order; arms without a finished run are left out.
    """

    experiment: Experiment
    runs: Mapping[str, Mapping[int, CellData]]

    @classmethod
    def of(cls, study: Study, experiment: Experiment, data: Mapping[str, CellData]) -> Results:
        """Select the finished runs by the keys of their cells."""
        runs: dict[str, dict[int, CellData]] = {}
        for arm in experiment.arms:
            for seed in sorted(experiment.seeds):
                found = data.get(study.cell(experiment.setting, arm, seed).key)
                if found is not None:
                    runs.setdefault(arm, {})[seed] = found
        return cls(experiment, runs)

    def finals(self, arm: str, last: int) -> BySeed:
        """Mean held-out success over the last evaluations, by seed.

        Raises:
            StudyError: A run was not evaluated so often.
        """
        return {seed: final_score(run, last) for seed, run in self.runs[arm].items()}

    def earlies(self, arm: str, fraction: float) -> BySeed:
        """Mean training reward over the first part of the steps, by seed."""
        return {seed: early_score(run, fraction) for seed, run in self.runs[arm].items()}

    def stacked(self, arm: str, metric: str, first: int = 1) -> Floats:
        """A metric of an arm: a row per seed, a column per step from the first."""
        return np.array([run.values[metric][first:] for run in self.runs[arm].values()], float)


def final_score(run: CellData, last: int) -> float:
    """Mean of held-out success over the last evaluations of a run.

    Raises:
        StudyError: There are fewer.
    """
    tested = run.values[HELD_OUT][1:]
    tested = tested[~np.isnan(tested)]
    if len(tested) < last:
        raise StudyError(
            f"{run.setting}/{run.arm}/seed{run.seed} has {len(tested)} evaluations, scores.final_evaluations={last}"
        )
    return float(tested[-last:].mean(dtype=float))


def early_score(run: CellData, fraction: float) -> float:
    """Mean training reward over the first part of a run's steps: the area under the curve, normalized."""
    rewards = run.values[REWARD][1:]
    return float(rewards[: math.ceil(fraction * len(rewards))].mean(dtype=float))


def build_report(study: Study, data: Mapping[str, CellData]) -> StudyReport:
    """Compute the report.

    Args:
        study: The declaration.
        data: Collected cells by key. Cells of other studies are ignored.

    Raises:
        StudyError: There is nothing to report, or cells that are compared started from different inputs.
    """
    used = [data[cell.key] for cell in study.cells() if cell.key in data]
    if not used:
        raise StudyError("no cell of this study is in the data; run it, then run `hpo-plugin study collect`")
    check_inputs(used, study.against)
    results = {name: Results.of(study, experiment, data) for name, experiment in study.experiments.items()}
    swept = {name for sweep in study.sweeps.values() for name in sweep.experiments}
    # For these, the page has the table and the figure that compare the settings, and no curves.
    opposed = {experiment.against for experiment in study.experiments.values()}
    drawn = {
        name
        for name, experiment in study.experiments.items()
        if name not in swept and experiment.against is None and experiment.setting not in opposed
    }
    sections = [_setup(study, data, used)]
    sections += [_sweep(study, name, sweep, results) for name, sweep in study.sweeps.items()]
    sections += [
        _experiment(study, name, result, data, pictures=name in drawn)
        for name, result in results.items()
        if result.runs
    ]
    sections += _overall(study, {name: result for name, result in results.items() if name not in swept})
    sections.append(_definitions(study))
    return StudyReport(study.name, study.title, study.text.strip(), sections)


def beside_paper(study: Study, data: Mapping[str, CellData]) -> dict[str, dict[str, str]]:
    """Final scores of a study where a paper reports a number.

    Args:
        study: The declaration.
        data: Collected cells by key.

    Returns:
        ``experiments.<name>.paper`` -> the paper's name of an arm -> its figure as in the report. Of two experiments
        beside the same numbers, the first.

    Raises:
        StudyError: A run was not evaluated often enough.
    """
    found: dict[str, dict[str, str]] = {}
    for experiment in study.experiments.values():
        if experiment.paper is None:
            continue
        results = Results.of(study, experiment, data)
        for arm in results.runs:
            finals = results.finals(arm, study.scores.final_evaluations)
            shown = _shown(statistics.interquartile_mean([_array(finals)]))
            found.setdefault(experiment.paper, {}).setdefault(study.arms[arm].paper or arm, shown)
    return found


# --- setup ---------------------------------------------------------------------------------------------------------


def _setup(study: Study, data: Mapping[str, CellData], used: Sequence[CellData]) -> Section:
    cells = study.cells()
    settings, runs = [], []
    for name, setting in study.settings.items():
        of_setting = [cell for cell in cells if cell.setting == name]
        found = [data[cell.key] for cell in of_setting if cell.key in data]
        seeds = sorted({cell.seed for cell in of_setting if cell.key in data})
        prepare = setting.prepare
        start = found[0].info.get("start") if found else None
        minutes = [run.seconds[-1] / 60 for run in found]
        settings.append(
            [
                setting.title,
                str(of_setting[0].steps),
                f"{prepare.train_size:,}" if prepare else "–",
                f"{prepare.test_size:,}" if prepare else "–",
                f"{start['sampled']['correct']:.3f}" if start and "sampled" in start else "–",
            ]
        )
        runs.append(
            [
                setting.title,
                f"{len(found)} of {len(of_setting)}",
                ", ".join(map(str, seeds)) or "–",
                f"{np.median(minutes):.1f} ({min(minutes):.1f} to {max(minutes):.1f})" if minutes else "–",
            ]
        )
    tables = [
        Table(
            ["setting", "updates", "training problems", "held-out problems", "success of the start model"],
            settings,
            "Settings",
        ),
        Table(["setting", "finished runs", "seeds", "minutes per run, median (range)"], runs, "Runs"),
    ]
    hours = sum(run.info["result"].get("wall_seconds", 0.0) for run in used) / 3600
    training = sum(run.seconds[-1] for run in used) / 3600
    paragraphs = [
        f"{len(used)} of {len(cells)} runs are finished. Training took {training:.1f} hours in total, and {hours:.1f} "
        "hours with start-up, evaluations and interruptions; the times of parallel runs are added up. Every run uses "
        f"{_trainers(cells)} with the config `{study.config_name}`. Runs of a setting with the same seed start from "
        "the same data and the same start model. The seed determines the order of the problems and the samples.",
        f"Machine: {_distinct(_machine(run) for run in used)}. Versions: {_distinct(_versions(run) for run in used)}.",
    ]
    return Section("Setup", paragraphs, tables)


def _trainers(cells: Sequence[Cell]) -> str:
    names = {VERL: "verl's own trainer", SIMULATOR: "[the simulator](../simulator.md)"}
    used = {cell.trainer for cell in cells}
    return " or ".join(text for trainer, text in names.items() if trainer in used)


def _machine(run: CellData) -> str:
    machine = run.info["result"].get("machine")
    if not machine:
        return "not recorded"
    return _plain(f"{machine['system']} {machine['machine']}, {machine['cores']} cores, {machine['memory_gb']} GB")


def _versions(run: CellData) -> str:
    result = run.info["result"]
    versions = {"Python": result.get("machine", {}).get("python"), **result.get("versions", {})}
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return _plain(shown) or "not recorded"


def _plain(text: str) -> str:
    """Text of the collected data in one line of Markdown, without HTML."""
    return escape(" ".join(text.split()), quote=False)


def _distinct(texts: Iterable[str]) -> str:
    return "; ".join(sorted(set(texts)))


# --- one experiment ------------------------------------------------------------------------------------------------


def _experiment(study: Study, name: str, results: Results, data: Mapping[str, CellData], *, pictures: bool) -> Section:
    experiment, scores = results.experiment, study.scores
    arms = list(results.runs)
    finals = {arm: results.finals(arm, scores.final_evaluations) for arm in arms}
    earlies = {arm: results.earlies(arm, scores.early_fraction) for arm in arms}
    final_iqm = {arm: statistics.interquartile_mean([_array(finals[arm])]) for arm in arms}
    early_iqm = {arm: statistics.interquartile_mean([_array(earlies[arm])]) for arm in arms}
    paper = paper_numbers()[experiment.paper] if experiment.paper else None

    header = ["arm", "seeds", f"final score {_INTERVAL}", f"early score {_INTERVAL}"] + (["paper"] if paper else [])
    rows = []
    for arm in arms:
        row = [study.arms[arm].title, str(len(finals[arm])), _shown(final_iqm[arm]), _shown(early_iqm[arm])]
        if paper:
            reported = paper.values.get(study.arms[arm].paper or arm)
            row.append("–" if reported is None else f"{reported:.2f}")
        rows.append(row)
    section = Section(experiment.title, [text for text in [experiment.text.strip()] if text], [Table(header, rows)])
    if paper:
        section.notes.append(
            f"Column **paper**: {paper.title}. {paper.source} Check that task and model match before you compare."
        )
    missing = len(experiment.arms) * len(experiment.seeds) - sum(map(len, results.runs.values()))
    if missing:
        section.notes.append(f"Runs of this experiment that are not finished, and not included: {missing}.")
    if experiment.compare in arms:
        section.tables += _comparison(study, experiment.compare, finals, earlies)
    if experiment.against is not None:
        _add_against(section, study, name, experiment.against, results, data)
    if not pictures:
        return section

    palette = _palette(experiment)
    section.pictures += [
        *_curves(study, name, results, palette),
        *(
            _score_picture(
                f"{name}-{kind}",
                f"{kind.capitalize()} score: {experiment.title}",
                [(study.arms[arm].title, palette[arm], iqm[arm], list(by_seed[arm].values())) for arm in arms],
                f"{what}: seeds (dots), interquartile mean with 95 % CI",
            )
            for kind, what, iqm, by_seed in (
                ("final", "held-out success", final_iqm, finals),
                ("early", "training reward", early_iqm, earlies),
            )
        ),
        *_explanation(study, name, results, palette),
    ]
    return section


def _score_picture(
    name: str,
    title: str,
    rows: Sequence[tuple[str, str, Estimate, Sequence[float]]],
    xlabel: str,
    *,
    signed: bool = False,
) -> Picture:
    digits = 4 if signed else 3
    shown = "; ".join(f"{arm} {_shown(estimate, digits=digits, sign=signed)}" for arm, _, estimate, _ in rows)
    alt = f"{title.replace(chr(10), ' ')}. {shown}."
    return Picture(name, alt, score_figure(title, rows, xlabel, signed=signed))


def _palette(experiment: Experiment) -> dict[str, str]:
    others = [arm for arm in experiment.arms if arm != experiment.compare]
    palette = dict(zip(others, colors(len(others), ordered=experiment.ordered), strict=True))
    return {arm: palette.get(arm, STRONG) for arm in experiment.arms}


def _comparison(study: Study, ours: str, finals: Mapping[str, BySeed], earlies: Mapping[str, BySeed]) -> list[Table]:
    others = [arm for arm in finals if arm != ours]
    differences, rows = [], []
    for which, scores in (("final", finals), ("early", earlies)):
        for arm in others:
            differences.append(statistics.paired_difference([scores[ours]], [scores[arm]]))
            rows.append([which, study.arms[arm].title])
    improvements = [
        [
            study.arms[arm].title,
            str(len(set(finals[arm]) & set(finals[ours]))),
            *(
                _shown(statistics.probability_of_improvement([_array(scores[ours])], [_array(scores[arm])]), digits=2)
                for scores in (finals, earlies)
            ),
        ]
        for arm in others
    ]
    title = study.arms[ours].title
    tested = [[*row, *values] for row, values in zip(rows, _tested(differences), strict=True)]
    return [
        Table(["score", "other arm", *_TESTED], tested, f"{title} minus each other arm"),
        Table(
            ["other arm", "pairs", f"final score {_INTERVAL}", f"early score {_INTERVAL}"],
            improvements,
            f"Probability of improvement of {title} over each other arm",
        ),
    ]


def _add_against(
    section: Section, study: Study, name: str, setting: str, results: Results, data: Mapping[str, CellData]
) -> None:
    """Compare each arm with itself in another setting: a table and a figure."""
    keys = {(cell.setting, cell.arm, cell.seed): cell.key for cell in study.cells()}
    rows, differences, drawn = [], [], []
    palette = _palette(results.experiment)
    for which in ("final", "early"):
        for arm, runs in results.runs.items():
            there = {seed: data[key] for seed in runs if (key := keys.get((setting, arm, seed), "")) in data}
            if not there:
                continue
            other = Results(results.experiment, {arm: there})
            if which == "final":
                ours, theirs = (r.finals(arm, study.scores.final_evaluations) for r in (results, other))
            else:
                ours, theirs = (r.earlies(arm, study.scores.early_fraction) for r in (results, other))
            found = statistics.paired_difference([ours], [theirs])
            assert found is not None
            differences.append(found)
            rows.append([which, study.arms[arm].title, str(len(there))])
            if which == "final":
                pairs = [ours[seed] - theirs[seed] for seed in there]
                drawn.append((study.arms[arm].title, palette[arm], found, pairs))
    if not rows:
        return
    ours_title, theirs_title = study.settings[results.experiment.setting].title, study.settings[setting].title
    tested = [[*row, *values] for row, values in zip(rows, _tested(differences), strict=True)]
    section.tables.append(Table(["score", "arm", "pairs", *_TESTED], tested, f"{ours_title} minus {theirs_title}"))
    section.pictures.append(
        _score_picture(
            f"{name}{FINAL}",
            f"Final score: {ours_title}\nminus {theirs_title}",
            drawn,
            "difference of held-out success: pairs of runs (dots), mean with 95 % CI",
            signed=True,
        )
    )


#: Notation of a confidence interval in the header of a table.
_INTERVAL = "[95 % CI]"
#: Columns of :func:`_tested`.
_TESTED = (f"difference {_INTERVAL}", "p (Holm)", "detectable")


def _tested(differences: Sequence[Estimate | None]) -> list[list[str]]:
    """Difference, adjusted p value and detectable difference of each comparison of a family."""
    adjusted = iter(statistics.holm([found.p for found in differences if found is not None and found.p is not None]))
    rows = []
    for found in differences:
        if found is None:
            rows.append(["no common seed", "–", "–"])
        elif found.p is None or found.detectable is None:
            rows.append([_shown(found, digits=4, sign=True), "–", "–"])
        else:
            rows.append([_shown(found, digits=4, sign=True), _p_value(next(adjusted)), f"{found.detectable:.3f}"])
    return rows


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


# --- a sweep -------------------------------------------------------------------------------------------------------


def collapsed(run: CellData) -> bool:
    """Whether the reward of a run fell by more than half, or its success below that of the start model.

    True if the mean reward over the last :data:`COLLAPSE_WINDOW` updates is below half of the highest mean over as many
    successive updates, or if the last held-out success is below the one before training.
    """
    rewards = run.values[REWARD][1:].astype(float)
    window = min(COLLAPSE_WINDOW, len(rewards))
    means = np.convolve(rewards, np.full(window, 1 / window), mode="valid")
    tested = run.values[HELD_OUT][~np.isnan(run.values[HELD_OUT])]
    return bool(means[-1] < means.max() / 2 or tested[-1] < tested[0])


def _sweep(study: Study, name: str, sweep: Sweep, results: Mapping[str, Results]) -> Section:
    by_value = {value: results[experiment] for experiment, value in sweep.experiments.items()}
    first = next(iter(by_value.values())).experiment
    arms = [arm for arm in first.arms if all(arm in result.runs for result in by_value.values())]
    last = study.scores.final_evaluations
    finals = {arm: {value: result.finals(arm, last) for value, result in by_value.items()} for arm in arms}
    fallen = {
        arm: {value: sum(map(collapsed, result.runs[arm].values())) for value, result in by_value.items()}
        for arm in arms
    }
    means = {arm: {value: float(_array(scores).mean()) for value, scores in finals[arm].items()} for arm in arms}
    best = {arm: max(means[arm], key=means[arm].__getitem__) for arm in arms}
    # The mean over the values, of the runs with a seed that all have.
    averages = {
        arm: {
            seed: float(np.mean([scores[seed] for scores in finals[arm].values()]))
            for seed in set.intersection(*(set(scores) for scores in finals[arm].values()))
        }
        for arm in arms
    }
    rows = []
    for arm in arms:
        runs = sum(len(scores) for scores in finals[arm].values())
        scores = [f"**{mean:.3f}**" if value == best[arm] else f"{mean:.3f}" for value, mean in means[arm].items()]
        fallen_runs = f"{sum(fallen[arm].values())} of {runs} ({', '.join(map(str, fallen[arm].values()))})"
        rows.append([study.arms[arm].title, *scores, f"{_array(averages[arm]).mean():.3f}", fallen_runs])
    header = ["arm", *map(_value, by_value), "mean", "collapsed runs"]
    section = Section(
        sweep.title,
        [text for text in [sweep.text.strip()] if text],
        [Table(header, rows, f"Final score by {sweep.quantity}, mean over seeds")],
        [
            f"Bold marks the **best** score of an arm. **Mean** is the mean over the values of the {sweep.quantity}. A "
            f"run has **collapsed** if its mean reward over the last {COLLAPSE_WINDOW} updates is below half of its "
            f"highest mean over {COLLAPSE_WINDOW} successive updates, or if its last held-out success is below that of "
            f"the start model. Parentheses give the number of collapsed runs for each {sweep.quantity}."
        ],
    )
    ours = first.compare
    if ours in arms:
        section.tables.append(_sweep_comparison(study, ours, finals, best, averages, fallen))
    palette = _palette(first)
    x = np.log10(list(by_value))
    lines = []
    for arm in arms:
        mean, low, high = statistics.mean_band(
            np.array([[scores[seed] for scores in finals[arm].values()] for seed in sorted(averages[arm])])
        )
        lines.append(Series(study.arms[arm].title, palette[arm], x, mean, low, high, strong=arm == ours))
    ends = "; ".join(f"{line.title}: {', '.join(f'{score:.3f}' for score in line.mean)}" for line in lines)
    section.pictures.append(
        Picture(
            f"{name}{FINAL}",
            f"Final score by {sweep.quantity} ({', '.join(map(_value, by_value))}), mean over seeds with 95 % "
            f"confidence band. {ends}.",
            line_figure(
                f"Final score by {sweep.quantity}",
                f"log₁₀ of the {sweep.quantity}",
                [Panel("held-out success", lines)],
            ),
        )
    )
    return section


def _value(value: float) -> str:
    """A value of a swept quantity: ``16``, or ``3e-4`` for a learning rate."""
    return f"{value:g}" if value >= 0.01 else np.format_float_scientific(value, trim="-", exp_digits=1)


def _sweep_comparison(
    study: Study,
    ours: str,
    finals: Mapping[str, Mapping[float, BySeed]],
    best: Mapping[str, float],
    averages: Mapping[str, BySeed],
    fallen: Mapping[str, Mapping[float, int]],
) -> Table:
    others = [arm for arm in finals if arm != ours]
    at_best = {arm: finals[arm][best[arm]] for arm in finals}
    rows: list[list[str]] = []
    p_values: list[float] = []
    tests = [("best", arm, at_best) for arm in others] + [("mean", arm, averages) for arm in others]
    found = [statistics.paired_difference([scores[ours]], [scores[arm]]) for _, arm, scores in tests]
    for (what, arm, _), difference in zip(tests, found, strict=True):
        assert difference is not None
        p_values.append(1.0 if difference.p is None else difference.p)
        detectable = "–" if difference.detectable is None else f"{difference.detectable:.3f}"
        rows.append([what, study.arms[arm].title, _shown(difference, digits=4, sign=True), detectable])
    counts = {arm: (sum(fallen[arm].values()), sum(map(len, finals[arm].values()))) for arm in finals}
    for arm in others:
        (a, runs), (b, of) = counts[ours], counts[arm]
        p_values.append(statistics.fisher(counts[ours], counts[arm]))
        rows.append(["collapsed runs", study.arms[arm].title, f"{a} of {runs} vs. {b} of {of}", "–"])
    adjusted = statistics.holm(p_values)
    header = ["measure", "other arm", f"difference {_INTERVAL}", "detectable", "p", "p (Holm)"]
    tested = [[*row, _p_value(p), _p_value(q)] for row, p, q in zip(rows, p_values, adjusted, strict=True)]
    return Table(header, tested, f"{study.arms[ours].title} minus each other arm, {len(rows)} comparisons")


# --- pictures of an experiment -------------------------------------------------------------------------------------


def _curves(study: Study, name: str, results: Results, palette: Mapping[str, str]) -> list[Picture]:
    pictures = []
    for kind, title, unit, metric in (
        ("reward", "Training reward per update", "mean reward", REWARD),
        ("held-out", "Held-out success", "success rate", HELD_OUT),
        ("length", "Response length", "mean tokens per response", LENGTH),
    ):
        series = []
        for arm in results.runs:
            # Step 0 is the start model, which has an evaluation but no training samples.
            first = 0 if metric == HELD_OUT else 1
            values = results.stacked(arm, metric, first)
            known = ~np.isnan(values).any(axis=0)
            steps = np.arange(first, values.shape[1] + first, dtype=float)[known]
            smoothed = values[:, known] if metric == HELD_OUT else _smoothed(values)[:, known]
            if known.any():
                series.append(_series(study, results, arm, palette[arm], steps, smoothed))
        if series:
            pictures.append(_line_picture(f"{name}-{kind}", title, "update", unit, series))
    series = []
    for arm, runs in results.runs.items():
        minutes = [run.seconds[1:] / 60 for run in runs.values()]
        grid = np.linspace(max(times[0] for times in minutes), min(times[-1] for times in minutes), _TIME_POINTS)
        smoothed = _smoothed(results.stacked(arm, REWARD))
        values = np.array([np.interp(grid, times, run) for times, run in zip(minutes, smoothed, strict=True)])
        series.append(_series(study, results, arm, palette[arm], grid, values))
    pictures.insert(1, _line_picture(f"{name}-time", "Training reward over time", "minutes", "mean reward", series))
    return pictures


def _explanation(study: Study, name: str, results: Results, palette: Mapping[str, str]) -> list[Picture]:
    """α and the shares of positive and negative advantages, for the arms whose α changes."""
    stacked = {arm: results.stacked(arm, ALPHA) for arm in results.runs}
    # Only the losses and presets of this package log α.
    arms = [arm for arm, values in stacked.items() if not np.isnan(values).any() and np.ptp(values) > 0]
    if not arms:
        return []
    shares = (
        (ALPHA, "α", "-"),
        (SHARE_POSITIVE, "positive, p̂⁺", "-"),
        (SHARE_NEGATIVE, "negative, p̂⁻", "--"),
    )
    weights: list[Series] = []
    signs: list[Series] = []
    for arm in arms:
        for metric, label, style in shares:
            values = _smoothed(results.stacked(arm, metric))
            steps = np.arange(1, values.shape[1] + 1, dtype=float)
            title = f"{study.arms[arm].title}: {label}"
            color = palette[arm]
            if len(arms) == 1 and metric != ALPHA:
                color = "#009e73" if metric == SHARE_POSITIVE else "#595959"
            mean, low, high = statistics.mean_band(values)
            (weights if metric == ALPHA else signs).append(Series(title, color, steps, mean, low, high, style))
    panels = [Panel("α", weights, 1.05), Panel("share of responses", signs)]
    title = "α, and the shares of positive and negative advantages"
    alt = f"{title}, mean over seeds. {_ends([*weights, *signs])}."
    return [Picture(f"{name}-alpha", alt, line_figure(title, "update", panels))]


def _series(study: Study, results: Results, arm: str, color: str, x: Floats, values: Floats) -> Series:
    mean, low, high = statistics.mean_band(values)
    title, seeds = study.arms[arm].title, len(values)
    label = title if seeds == len(results.experiment.seeds) else f"{title} ({seeds} seed{'' if seeds == 1 else 's'})"
    return Series(label, color, x, mean, low, high, strong=arm == results.experiment.compare)


def _line_picture(name: str, title: str, xlabel: str, ylabel: str, series: Sequence[Series]) -> Picture:
    figure = line_figure(title, xlabel, [Panel(ylabel, series)])
    return Picture(name, f"{title}, mean over seeds with 95 % confidence band. {_ends(series)}.", figure)


def _ends(series: Sequence[Series]) -> str:
    return "; ".join(
        f"{line.title}: {line.mean[0]:.2f} at the start, {line.mean[-1]:.2f} at the end" for line in series
    )


def _smoothed(values: Floats) -> Floats:
    return np.array([smooth(run) for run in values.tolist()])


# --- all settings --------------------------------------------------------------------------------------------------


def _difference(ours: Sequence[BySeed], theirs: Sequence[BySeed]) -> str:
    difference = statistics.paired_difference(ours, theirs)
    return "no common seed" if difference is None else _shown(difference, digits=4, sign=True)


def _overall(study: Study, results: Mapping[str, Results]) -> list[Section]:
    """Scores over several settings, where experiments compare the same arms in different ones."""
    found: dict[str, dict[str, Results]] = {}
    for result in results.values():
        ours, setting = result.experiment.compare, result.experiment.setting
        if ours is not None and ours in result.runs:
            # The first experiment of a setting: others, such as an ablation, have runs of it again.
            found.setdefault(ours, {}).setdefault(setting, result)
    sections = []
    for ours, by_setting in found.items():
        compared = list(by_setting.values())
        arms = [arm for arm in compared[0].runs if all(arm in result.runs for result in compared)]
        if len(compared) > 1 and len(arms) > 1:
            sections.append(_over_settings(study, ours, arms, compared))
    return sections


def _over_settings(study: Study, ours: str, arms: Sequence[str], compared: Sequence[Results]) -> Section:
    scores = study.scores

    def by_seed(arm: str, *, final: bool) -> list[BySeed]:
        return [
            r.finals(arm, scores.final_evaluations) if final else r.earlies(arm, scores.early_fraction)
            for r in compared
        ]

    def strata(arm: str, *, final: bool) -> list[Floats]:
        return [_array(found) for found in by_seed(arm, final=final)]

    scored = [
        [
            study.arms[arm].title,
            " + ".join(str(len(result.runs[arm])) for result in compared),
            *(_shown(statistics.interquartile_mean(strata(arm, final=final))) for final in (True, False)),
        ]
        for arm in arms
    ]
    differences = [
        [
            "final" if final else "early",
            study.arms[arm].title,
            _difference(by_seed(ours, final=final), by_seed(arm, final=final)),
            _shown(
                statistics.probability_of_improvement(strata(ours, final=final), strata(arm, final=final)), digits=2
            ),
        ]
        for final in (True, False)
        for arm in arms
        if arm != ours
    ]
    tables = [
        Table(["arm", "seeds", f"final score {_INTERVAL}", f"early score {_INTERVAL}"], scored),
        Table(
            ["score", "other arm", f"difference {_INTERVAL}", f"probability of improvement {_INTERVAL}"],
            differences,
            f"{study.arms[ours].title} compared with each other arm",
        ),
    ]
    settings = "; ".join(study.settings[result.experiment.setting].title for result in compared)
    text = (
        f"This section pools the runs of these settings: {settings}. Scores are pooled without normalization, because "
        "all of them are shares of correct answers. A setting with more seeds has more weight. The interquartile mean "
        "mostly drops the lowest scores of the hardest setting and the highest scores of the easiest one. The "
        "bootstrap resamples within each setting. The difference is the mean over all pairs of runs with the same "
        "setting and seed. The probability of improvement is the mean over the settings."
    )
    return Section("All settings", [text], tables)


# --- definitions ---------------------------------------------------------------------------------------------------


def _definitions(study: Study) -> Section:
    scores = study.scores
    final = (
        "success on held-out problems at the last evaluation"
        if scores.final_evaluations == 1
        else f"mean success on held-out problems over the last {scores.final_evaluations} evaluations"
    )
    return Section(
        "Definitions",
        [
            f"- **Final score**: {final}. The model is evaluated every {study.test_every} updates.\n"
            f"- **Early score**: mean training reward over the first {100 * scores.early_fraction:.0f} % of the "
            "updates, which is the normalized area under this part of the reward curve.\n"
            "- **Score of an arm**: the interquartile mean over seeds. It drops the lowest and the highest quarter of "
            "the scores, rounded down: none of three seeds, and one at each end of five. Brackets contain the 95 % "
            f"confidence interval of a percentile bootstrap over seeds with {statistics.RESAMPLES:,} resamples.\n"
            "- **Difference**: the mean difference between runs with the same seed. Brackets contain the 95 % "
            "confidence interval of Student's t. A difference is statistically significant without correction if the "
            "interval excludes 0. By chance, this happens in one of twenty comparisons between equal arms.\n"
            "- **p**: p value of the paired t test, or of Fisher's exact test for collapsed runs. **p (Holm)** is the "
            "p value with Holm's correction for the number of comparisons in the table. If it is below 0.05, the "
            "difference is statistically significant after the correction.\n"
            "- **Detectable**: the true difference that one uncorrected test with the same number of pairs and the "
            f"same spread finds significant with a probability of {100 * statistics.POWER:.0f} %. The study can miss "
            "smaller differences.\n"
            "- **Probability of improvement**: over all pairs of one run of each arm, the share in which the first arm "
            "has the higher score. Ties count one half. It is not significant if the interval includes 0.5.\n"
            f"- **Curves**: mean over seeds, with its 95 % bootstrap confidence interval as a band. Each point is a "
            f"trailing mean over {SMOOTHED_OVER} updates, except for held-out success, which is not smoothed.\n"
            "- **Time**: the trainer's time for its steps, without evaluations and start-up. Other programs on the "
            "machine affect it. The curve of an arm over time ends where its first run ends.\n"
            "- **Few seeds**: bootstrap intervals and bands are too narrow with few seeds. For means of normally "
            "distributed scores, they contain the true mean in about three of four cases with three seeds, and in five "
            "of six cases with five. Use the differences to decide whether two arms differ."
        ],
    )


# --- output --------------------------------------------------------------------------------------------------------


def to_markdown(report: StudyReport) -> str:
    """Render the Markdown page. Its pictures are in a directory with the name of the report."""
    text = _templates().get_template("report.md.j2").render(report=report)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("hpo_plugin.study"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        # The page in Markdown contains the Markdown of STUDY.yaml.
        autoescape=jinja2.select_autoescape(["html.j2"], default=False),
    )


def write_report(report: StudyReport, output: Path, *, png: bool = True) -> list[Path]:
    """Write ``<name>.md``, ``<name>.html`` and the pictures in ``<name>/``.

    Args:
        report: The report.
        output: Directory.
        png: Whether to write each picture as PNG too; the pages use SVG.

    Returns:
        The two pages.
    """
    pictures = output / report.name
    pictures.mkdir(parents=True, exist_ok=True)
    inline = {}
    for section in report.sections:
        for picture in section.pictures:
            inline[picture.name] = (picture.alt, save(picture.figure, pictures / picture.name, png=png))
    text = to_markdown(report)
    written = [output / f"{report.name}.md", output / f"{report.name}.html"]
    for path, content in zip(written, (text, _to_html(report, text, inline)), strict=True):
        atomic_write(path, content.encode())
    return written


def _to_html(report: StudyReport, text: str, inline: Mapping[str, tuple[str, str]]) -> str:
    """The Markdown page as HTML, with the pictures in it: name -> what it shows, SVG.

    HTML in the Markdown is shown as text, and links have no scheme that executes code.
    """
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    # Cells break between words, but not inside a figure with its interval.
    body = re.sub(r"(\d) (\[[^\],]+,) ([^\]]+\])", "\\1&nbsp;\\2&nbsp;\\3", body)
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    # A section's pictures stand beside each other where there is room.
    body = re.sub(r"(?:<p><img [^>]*></p>\s*)+", lambda found: f'<div class="pictures">{found[0]}</div>', body)

    def embed(found: re.Match[str]) -> str:
        if found[1] not in inline:
            return found[0]
        alt, svg = inline[found[1]]
        described = f'<svg role="img" aria-label="{escape(alt)}" '
        return f"<div>{svg.replace('<svg ', described, 1)}</div>"

    body = re.sub(rf'<p><img [^>]*src="{re.escape(report.name)}/([^"]+)\.svg"[^>]*></p>', embed, body)
    return _templates().get_template("report.html.j2").render(report=report, body=body)


def _array(by_seed: BySeed) -> Floats:
    return np.array(list(by_seed.values()), float)


def _shown(estimate: Estimate, *, digits: int = 3, sign: bool = False) -> str:
    def number(value: float) -> str:
        # Adding zero takes the sign off a rounded -0.0.
        return f"{round(value, digits) + 0.0:{'+' if sign else ''}.{digits}f}"

    if estimate.low is None or estimate.high is None:
        return f"{number(estimate.value)} ({estimate.note})"
    return f"{number(estimate.value)} [{number(estimate.low)}, {number(estimate.high)}]"
