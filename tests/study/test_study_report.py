"""The report: from declaration and data alone, the same bytes every time, and it says what it is made of."""

import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from hpo_plugin.study import report as module
from hpo_plugin.study.data import HELD_OUT, REWARD, write_data
from hpo_plugin.study.figures import Panel, Series, line_figure
from hpo_plugin.study.report import build_report, collapsed, early_score, final_score, to_markdown, write_report
from hpo_plugin.study.spec import StudyError, paper_numbers


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    monkeypatch.setattr(module.statistics, "RESAMPLES", 200)


@pytest.fixture
def page(declared, load, data):
    """The Markdown page, without its pictures."""
    return to_markdown(build_report(load(declared), data))


@pytest.fixture
def written(tmp_path, declared, load, data):
    """The directory of a whole report."""
    write_report(build_report(load(declared), data), tmp_path / "out", png=False)
    return tmp_path / "out"


def rows_of(markdown, title, table=""):
    """The rows of the table with this title in a section, as lists of cells; without a title, of the first table."""
    section = markdown.partition(f"## {title}\n")[2].partition("\n## ")[0]
    if table:
        section = section.partition(f"**{table}**\n")[2]
        assert section, f"no table {table!r}"
    lines = [line for line in section.partition("\n**")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_scores_of_one_run(data):
    (run, *_) = data.values()
    # Held out 0.2 and 0.3; rewards 0.1, 0.2, 0.3, 0.4.
    assert final_score(run, 1) == pytest.approx(0.3)
    assert final_score(run, 2) == pytest.approx(0.25)
    assert early_score(run, 0.5) == pytest.approx(0.15)
    assert early_score(run, 1) == pytest.approx(0.25)
    with pytest.raises(StudyError, match=r"easy/grpo/seed0 has 2 evaluations, scores.final_evaluations=3"):
        final_score(run, 3)


def test_the_table_of_an_experiment(page):
    grpo, ahpo = rows_of(page, "One")
    # Final scores of GRPO's seeds: 0.25, 0.26, 0.27. A-HPO is better by 0.05.
    assert grpo[:2] == ["GRPO", "3"]
    assert grpo[2].startswith("0.260 [0.25")
    assert ahpo[2].startswith("0.310 [0.30")
    # Early scores: (0.1 + 0.2) / 2, and 0.01 more for each seed.
    assert grpo[3].startswith("0.160 [0.15")
    (final, _) = rows_of(page, "One", "A-HPO minus each other arm")
    assert final[:2] == ["final", "GRPO"]
    assert final[2].startswith("+0.0500 ")
    (improvement,) = rows_of(page, "One", "Probability of improvement of A-HPO over each other arm")
    assert improvement[:3] == ["GRPO", "3", "1.00 (no interval: all resamples are equal)"]


def test_a_page_starts_with_the_figure_of_the_final_scores_and_the_text(declared, load, data):
    declared["text"] = "The first paragraph.\n"
    page = to_markdown(build_report(load(declared), data))
    title, picture, text, setup, *_ = (part for part in page.split("\n\n") if part)
    assert title == "# A small study"
    assert re.fullmatch(r"!\[Final score: One\. GRPO 0\.260 .+\]\(small/one-final\.svg\)", picture)
    assert (text, setup) == ("The first paragraph.", "## Setup")
    assert page.count("one-final.svg") == 1


def test_comparisons_of_a_table_are_corrected_together(declared, load, data):
    page = to_markdown(build_report(load(declared), data))
    table = page.partition("**A-HPO minus each other arm**\n\n")[2].partition("\n\n")[0]
    assert table.splitlines()[0].endswith("| difference [95 % CI] | p (Holm) | detectable |")
    # Final and early score against the one other arm.
    assert [row[0] for row in rows_of(page, "One", "A-HPO minus each other arm")] == ["final", "early"]


def test_a_run_collapses_where_it_ends_below_half_of_its_best_or_below_its_start(data):
    (run, *_) = data.values()
    rising = np.concatenate([[np.nan], np.linspace(0.1, 0.4, 30)]).astype(np.float32)
    kept = np.concatenate([[0.1], np.full(29, np.nan), [0.2]]).astype(np.float32)

    def with_values(rewards, success):
        return collapsed(replace(run, values={**run.values, REWARD: rewards, HELD_OUT: success}))

    assert not with_values(rising, kept)
    fallen = np.concatenate([rising[:21], np.full(10, 0.1)]).astype(np.float32)
    assert with_values(fallen, kept)
    below = kept.copy()
    below[-1] = 0.05
    assert with_values(rising, below)


def test_a_sweep_reports_best_mean_and_collapsed_runs_in_place_of_curves(declared, load, make_data, tmp_path):
    declared["experiments"]["two"]["seeds"] = [0, 1, 2]
    declared["sweeps"] = {
        "lr": {"title": "Rates", "quantity": "learning rate", "experiments": {"one": 1e-4, "two": 3e-4}}
    }
    study = load(declared)
    better = {("easy", "ahpo"): 0.05, ("hard", "grpo"): 0.02}
    data = {
        cell.key: make_data(cell, held_out=0.2 + 0.01 * cell.seed + better.get((cell.setting, cell.arm), 0.0))
        for cell in study.cells()
    }
    report = build_report(study, data)
    page = to_markdown(report)
    assert "| arm | 1e-4 | 3e-4 | mean | collapsed runs |" in page
    grpo, ahpo = rows_of(page, "Rates", "Final score by learning rate, mean over seeds")
    assert grpo[1:4] == ["0.260", "**0.280**", "0.270"]
    assert ahpo[1:4] == ["**0.310**", "0.260", "0.285"]
    assert grpo[4] == ahpo[4] == "0 of 6 (0, 0)"
    assert "A-HPO minus each other arm, 3 comparisons" in page
    assert "| collapsed runs | GRPO | 0 of 6 vs. 0 of 6 | – | 1.000 | 1.000 |" in page
    assert [picture.name for section in report.sections for picture in section.pictures] == ["lr-final"]
    assert report.lead.name == "lr-final"
    assert "All settings" not in page
    write_report(report, tmp_path, png=False)
    assert (tmp_path / "small/lr-final.svg").exists()


def test_arms_are_compared_with_themselves_in_another_setting(declared, load, make_data):
    declared["experiments"]["one"]["against"] = "hard"
    study = load(declared)
    data = {cell.key: make_data(cell, held_out=0.3 if cell.setting == "easy" else 0.2) for cell in study.cells()}
    report = build_report(study, data)
    page = to_markdown(report)
    table = page.partition("**Easy minus Hard**")[2]
    assert "| final | GRPO | 2 | +0.1000 (no interval: all differences are equal) | – | – |" in table
    assert "| early | A-HPO | 2 | +0.0000 (no interval: all differences are equal) | – | – |" in table
    assert [picture.name for section in report.sections for picture in section.pictures] == ["one-final"]
    assert report.lead.alt.startswith("Final score: Easy minus Hard. GRPO +0.1000 (")


def test_the_settings_together(page):
    grpo, _ = rows_of(page, "All settings")
    # Five scores: 0.25, 0.25, 0.26, 0.26, 0.27; the lowest and the highest are left out.
    assert grpo[1] == "3 + 2"
    assert grpo[2].startswith("0.257 ")
    # Better by 0.05 in each of the five.
    final, early = rows_of(page, "All settings", "A-HPO compared with each other arm")
    assert final[:2] == ["final", "GRPO"]
    assert final[2].startswith("+0.0500 ")
    assert early[:2] == ["early", "GRPO"]


def test_an_ablation_of_one_setting_has_no_part_in_the_settings_together(declared, load, data, page):
    again = declared["experiments"]["one"] | {"title": "Again", "seeds": [0]}
    declared["experiments"]["again"] = again
    declared["experiments"]["reversed"] = again | {"title": "Reversed", "compare": "grpo"}
    assert rows_of(to_markdown(build_report(load(declared), data)), "All settings") == rows_of(page, "All settings")


def test_what_was_run_can_be_read_off(page):
    assert rows_of(page, "Setup", "Settings")[0][:2] == ["Easy", "4"]
    easy, hard = rows_of(page, "Setup", "Runs")
    # Four steps of two seconds.
    assert easy == ["Easy", "6 of 6", "0, 1, 2", "0.1 (0.1 to 0.1)"]
    assert hard[2] == "0, 1"
    assert "10 of 10 runs are finished" in page


def test_an_unfinished_study_says_how_many_runs_its_figures_hold(declared, load, data):
    study = load(declared)
    missing = study.cells()[-1]
    del data[missing.key]
    page = to_markdown(build_report(study, data))
    assert "9 of 10 runs are finished" in page
    assert "Runs of this experiment that are not finished, and not included: 1." in page
    assert rows_of(page, "One")[1][1] == "2"


def test_the_papers_numbers_stand_beside_ours_with_their_source(declared, load, data):
    declared["experiments"]["one"]["paper"] = "telelogs-qwen2.5-1.5b"
    page = to_markdown(build_report(load(declared), data))
    assert [row[-1] for row in rows_of(page, "One")] == ["0.73", "0.84"]
    assert paper_numbers()["telelogs-qwen2.5-1.5b"].source in page
    assert [len(row) for row in rows_of(page, "Two")] == [4, 4]


def test_the_same_data_give_the_same_bytes(tmp_path, declared, load, data):
    del declared["experiments"]["two"], declared["settings"]["hard"]
    made = []
    for name in ("one", "two"):
        write_report(build_report(load(declared), data), tmp_path / name)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        made.append({path.relative_to(tmp_path / name).as_posix(): path.read_bytes() for path in files})
    assert made[0] == made[1]
    assert {path.rpartition(".")[2] for path in made[0]} == {"md", "html", "svg", "png"}
    assert not any(b"20" + b"26" in content for path, content in made[0].items() if path.endswith(("svg", "md")))


def test_every_picture_of_the_page_is_there_and_described(written):
    pictures = re.findall(r"!\[(.+?)\]\((.+?)\)\n", (written / "small.md").read_text())
    names = {path.rpartition("/")[2] for _, path in pictures}
    kinds = ("reward", "time", "held-out", "length", "alpha", "final", "early")
    assert names == {f"{experiment}-{kind}.svg" for experiment in ("one", "two") for kind in kinds}
    assert all((written / path).is_file() for _, path in pictures)
    # The start model: 0.15, 0.16, 0.17 of the three seeds.
    assert any("A-HPO: 0.16 at the start" in alt for alt, path in pictures if path.endswith("one-held-out.svg"))


def test_the_html_page_needs_nothing_else(written):
    html = (written / "small.html").read_text()
    assert html.count("<svg ") == html.count('role="img" aria-label="') == 14
    # Names of namespaces are not fetched.
    assert not re.search(r"""(?:src|href)=["'](?!#)""", html)
    assert not re.search(r"url\((?!#)|@import|<script|<link", html)
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(ids)
    assert "prefers-color-scheme: dark" in html
    assert "currentColor" in html


def test_cells_of_other_studies_are_left_out_and_no_cell_at_all_is_an_error(declared, load, data):
    study = load(declared)
    with pytest.raises(StudyError, match="no cell of this study is in the data"):
        build_report(study, {"foreign": next(iter(data.values()))})


def test_runs_that_began_from_other_inputs_are_not_reported_together(declared, load, data):
    study = load(declared)
    key = study.cells()[0].key
    data[key] = replace(data[key], info={**data[key].info, "inputs": "other"})
    with pytest.raises(StudyError, match="started from different inputs"):
        build_report(study, data)


def test_a_report_needs_neither_verl_nor_ray(tmp_path, declared, load, data):
    load(declared)
    write_data(tmp_path / "study.parquet", data.values())
    code = (
        "import sys; from hpo_plugin.cli.app import app\n"
        f"try: app(['study', 'report', {str(tmp_path / 'study.yaml')!r}, '--output', {str(tmp_path / 'out')!r}])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'verl', 'ray', 'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "out" / "small.md"), str(tmp_path / "out" / "small.html")]


@pytest.mark.parametrize("title", ["A-HPO", "HPO (α = 0.6) (3 seeds)", "an arm with a title that nobody would give it"])
def test_a_legend_is_inside_of_the_picture(title):
    lines = [Series(f"{title} {index}", "black", np.array([1.0, 2.0]), np.array([0.1, 0.2])) for index in range(6)]
    figure = line_figure("title", "update", [Panel("reward", lines)])
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= box.x0
    assert box.x1 <= figure.bbox.x1
