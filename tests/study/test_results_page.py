"""The committed results page is what the committed data give, and its words say what they say."""

from pathlib import Path

import numpy as np
import pytest

from hpo_plugin.study.data import ALPHA, HELD_OUT, LENGTH, REWARD, SHARE_NEGATIVE, SHARE_POSITIVE, read_data
from hpo_plugin.study.report import build_report, early_score, final_score, write_report
from hpo_plugin.study.spec import load_study
from hpo_plugin.study.statistics import interquartile_mean, paired_difference, probability_of_improvement

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "studies/countdown-laptop.yaml"
RESULTS = ROOT / "docs/results"
COMMAND = "hpo-plugin study report studies/countdown-laptop.yaml --output docs/results --no-png"
SETTINGS = ("countdown3", "countdown4")
WEIGHTS = ("hpo-0.0", "hpo-0.2", "hpo-0.4", "hpo", "hpo-0.8", "hpo-1.0")
CLIPPED = "actor/pg_clipfrac"


def collected(path):
    """Setting and arm -> seed -> data."""
    found = read_data(path.with_suffix(".parquet"))
    runs = {}
    for cell in load_study(path).cells():
        if cell.key in found:
            runs.setdefault((cell.setting, cell.arm), {})[cell.seed] = found[cell.key]
    return runs


@pytest.fixture(scope="module")
def runs():
    return collected(STUDY)


def scores(runs, setting, arm, *, final):
    return {seed: final_score(run, 1) if final else early_score(run, 0.5) for seed, run in runs[setting, arm].items()}


def difference(runs, other, settings, *, final):
    ours, theirs = ([scores(runs, setting, arm, final=final) for setting in settings] for arm in ("ahpo", other))
    return paired_difference(ours, theirs)


def stacked(runs, setting, arm, metric):
    """A row per seed, a column per update."""
    return np.array([run.values[metric][1:] for run in runs[setting, arm].values()])


@pytest.mark.timeout(300)
def test_every_figure_and_number_of_the_page_comes_from_the_collected_data(tmp_path):
    report = build_report(load_study(STUDY), read_data(STUDY.with_suffix(".parquet")))
    write_report(report, tmp_path, png=False)
    made, there = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*") if path.suffix != ".html"}
        for folder in (tmp_path, RESULTS)
    )
    assert made.keys() == there.keys()
    assert [str(name) for name in made if made[name] != there[name]] == [], f"make the page again: {COMMAND}"


def test_no_run_is_missing(runs):
    assert sum(map(len, runs.values())) == len(load_study(STUDY).cells()) == 55
    for arm in ("grpo", "gspo", "sapo", "hpo", "ahpo"):
        assert len(runs["countdown3", arm]) == 5
        assert len(runs["countdown4", arm]) == 3


def test_the_regime_was_chosen_where_success_rises_for_most_of_the_updates():
    found = collected(ROOT / "studies/countdown-laptop-regime.yaml")
    assert set(found) == {(setting, "grpo-1e-4") for setting in SETTINGS}
    for seeds in found.values():
        assert set(seeds) == {100}
        success = seeds[100].values[HELD_OUT]
        # Before training, and after 15, 30, 45 and 60 updates.
        evaluated = success[~np.isnan(success)]
        assert len(evaluated) == 5
        assert (np.diff(evaluated[:4]) > 0).all()
        assert evaluated[0] < 0.05


@pytest.mark.parametrize("other", ["grpo", "sapo"])
def test_ahpo_is_a_little_ahead_of_grpo_and_sapo(runs, other):
    for settings in (SETTINGS, SETTINGS[:1], SETTINGS[1:]):
        for final in (True, False):
            found = difference(runs, other, settings, final=final)
            assert 0 < found.value < 0.02
            # At the end, with 3 numbers alone, it is not certain.
            assert (found.low > 0) is not (final and settings == SETTINGS[:1])
            ours, theirs = (
                [np.array(list(scores(runs, setting, arm, final=final).values())) for setting in settings]
                for arm in ("ahpo", other)
            )
            probability = probability_of_improvement(ours, theirs)
            assert probability.low < 0.5 < probability.high


@pytest.mark.parametrize("final", [True, False])
def test_ahpo_is_ahead_of_gspo_in_every_pair(runs, final):
    for setting in SETTINGS:
        ours, theirs = (scores(runs, setting, arm, final=final) for arm in ("ahpo", "gspo"))
        assert all(ours[seed] > theirs[seed] for seed in theirs)


@pytest.mark.parametrize("final", [True, False])
def test_ahpo_and_the_best_fixed_weight_are_not_told_apart(runs, final):
    found = difference(runs, "hpo", SETTINGS, final=final)
    assert found.low <= 0 <= found.high


def test_no_weight_stands_out_and_none_collapses(runs):
    found = [
        interquartile_mean([np.array(list(scores(runs, "countdown3", arm, final=True).values())[:3])])
        for arm in WEIGHTS
    ]
    assert max(each.low for each in found) <= min(each.high for each in found)
    early = {arm: np.mean(list(scores(runs, "countdown3", arm, final=False).values())[:3]) for arm in WEIGHTS}
    assert early["hpo-0.0"] == pytest.approx(max(early.values()), rel=0.05)


def test_lengths_stay(runs):
    for setting, arm in runs:
        lengths = stacked(runs, setting, arm, LENGTH)
        assert abs(lengths[:, -10:].mean() - lengths[:, :10].mean()) < 1
        assert lengths.min() > 6.5
        assert lengths.max() < 11.5


def test_grpo_and_sapo_lie_on_each_other_through_the_first_half(runs):
    for setting in SETTINGS:
        grpo, sapo = (scores(runs, setting, arm, final=False) for arm in ("grpo", "sapo"))
        assert all(grpo[seed] == pytest.approx(sapo[seed], abs=0.003) for seed in grpo)


def test_gspo_alone_clips(runs):
    for setting, arm in runs:
        clipped = stacked(runs, setting, arm, CLIPPED).mean()
        assert (0.05 < clipped < 0.15) if arm == "gspo" else clipped < 0.001


def test_alpha_of_ahpo_begins_at_a_seventh_never_touches_its_bound_and_climbs(runs):
    for setting in SETTINGS:
        alpha = stacked(runs, setting, "ahpo", ALPHA)
        # float32
        assert alpha.min() == pytest.approx(1 / 7)
        assert 0.35 < alpha[:, -10:].mean() < 0.45
    assert stacked(runs, "countdown3", "ahpo", ALPHA)[:, :10].mean() < 0.2
    shares = [stacked(runs, "countdown3", "ahpo", name) for name in (SHARE_POSITIVE, SHARE_NEGATIVE)]
    positive, negative = (share[:, -15:].mean() / share[:, :15].mean() for share in shares)
    assert positive > 2 * negative
    first = stacked(runs, "countdown4", "ahpo", ALPHA)[:, :3] == 1
    assert first.any()
    assert (stacked(runs, "countdown4", "ahpo", REWARD)[:, :3][first] == 0).all()
