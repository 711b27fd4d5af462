"""Scores against numbers worked out by hand, and intervals against what they must obey."""

import numpy as np
import pytest
from scipy import stats

from hpo_plugin.study.statistics import (
    CONFIDENCE,
    RESAMPLES,
    fisher,
    holm,
    interquartile_mean,
    mean_band,
    paired_difference,
    probability_of_improvement,
)


def test_the_interquartile_mean_leaves_out_a_quarter_at_either_end():
    # Of eight, two at either end: (3 + 4 + 5 + 6) / 4.
    assert interquartile_mean([np.array([100.0, 1, 2, 3, 4, 5, 6, -7])]).value == pytest.approx((2 + 3 + 4 + 5) / 4)
    # Of five, one at either end.
    assert interquartile_mean([np.array([0.0, 1, 2, 3, 99])]).value == 2
    # Of three, none.
    assert interquartile_mean([np.array([0.0, 1, 5])]).value == 2


def test_settings_are_pooled_and_resampled_each_by_itself():
    low, high = np.array([0.0, 0, 0, 0]), np.array([1.0, 1, 1, 1])
    found = interquartile_mean([low, high])
    assert found.value == 0.5
    # Resampled together, a resample could hold more of the one than of the other; each by itself, none differs.
    assert (found.low, found.high, found.note) == (None, None, "no interval: all resamples are equal")


def test_an_interval_is_scipys():
    scores = np.array([0.1, 0.25, 0.2, 0.4, 0.3])
    expected = stats.bootstrap(
        [scores],
        lambda x, axis: stats.trim_mean(x, 0.25, axis=axis),
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
        batch=500,
    ).confidence_interval
    found = interquartile_mean([scores])
    assert (found.low, found.high) == (expected.low, expected.high)
    assert 0.1 <= found.low < found.value < found.high <= 0.4


def test_one_seed_has_no_interval():
    assert interquartile_mean([np.array([0.3])]).note == "no interval: one seed"


def test_the_probability_of_improvement_counts_pairs_with_ties_half():
    # 2 > 1; 2 = 2; 3 > 1; 3 > 2: three wins and a tie of four pairs.
    assert probability_of_improvement([np.array([2.0, 3])], [np.array([1.0, 2])]).value == pytest.approx(3.5 / 4)
    equal = np.array([1.0, 1])
    assert probability_of_improvement([equal], [equal]).value == 0.5


def test_the_probability_of_improvement_is_the_mean_over_settings():
    better, worse = np.array([2.0, 3, 4]), np.array([0.0, 1, 1.5])
    assert probability_of_improvement([better, worse], [worse, better]).value == pytest.approx(0.5)
    assert probability_of_improvement([better, better], [worse, np.array([2.0, 3, 4])]).value == pytest.approx(0.75)


def test_every_pair_won_is_no_interval_of_zero_width():
    found = probability_of_improvement([np.array([2.0, 3])], [np.array([0.0, 1])])
    assert (found.value, found.low) == (1, None)


def test_differences_are_between_runs_of_one_seed_with_the_interval_of_students_t():
    found = paired_difference([{0: 0.5, 1: 0.4, 2: 0.9, 3: 0.6}], [{1: 0.1, 0: 0.4, 7: 0.0, 3: 0.4}])
    # 0.1, 0.3 and 0.2: mean 0.2, standard deviation 0.1; 4.303 is t at 97.5 % with two degrees of freedom.
    assert found.value == pytest.approx(0.2)
    assert found.low == pytest.approx(0.2 - 4.303 * 0.1 / np.sqrt(3), abs=1e-4)
    assert found.high == pytest.approx(0.2 + 4.303 * 0.1 / np.sqrt(3), abs=1e-4)
    assert paired_difference([{0: 0.5}], [{1: 0.4}]) is None


def test_differences_over_settings_count_every_pair_once():
    one = {seed: 0.1 for seed in range(4)}
    found = paired_difference([one, {0: 0.7, 1: 0.3}], [dict.fromkeys(one, 0.0), {0: 0.1, 1: 0.3}])
    # (4 * 0.1 + 0.6 + 0) / 6
    assert found.value == pytest.approx(1 / 6)
    assert paired_difference([one, {0: 0.7}], [one, {1: 0.1}]) is None


def test_one_pair_and_equal_differences_have_no_interval():
    assert paired_difference([{0: 0.5}], [{0: 0.4}]).note == "no interval: one pair"
    found = paired_difference([{0: 0.5, 1: 0.6}], [{0: 0.25, 1: 0.35}])
    assert found.note == "no interval: all differences are equal"


@pytest.mark.parametrize(("seeds", "share"), [(3, 3 / 4), (5, 5 / 6)])
def test_how_often_intervals_hold_the_true_value(seeds, share):
    """What every report says of them, on normally distributed scores."""
    generator = np.random.default_rng(4)
    differences = generator.standard_normal((600, seeds))
    pairs = [paired_difference([dict(enumerate(row))], [dict.fromkeys(range(seeds), 0.0)]) for row in differences]
    assert np.mean([found.low <= 0 <= found.high for found in pairs]) == pytest.approx(CONFIDENCE, abs=0.03)
    # The band of a curve is the same interval at every point.
    _, low, high = mean_band(generator.standard_normal((seeds, 4000)))
    assert np.mean((low <= 0) & (high >= 0)) == pytest.approx(share, abs=0.02)


def test_a_band_holds_the_mean_at_every_point():
    runs = np.random.default_rng(1).random((4, 7))
    mean, low, high = mean_band(runs)
    assert mean == pytest.approx(runs.mean(axis=0))
    assert (low < mean).all()
    assert (mean < high).all()
    assert mean_band(runs[:1])[1:] == (None, None)


def test_the_same_scores_give_the_same_interval():
    # So many different resamples that other ones would have other percentiles.
    scores = [np.random.default_rng(2).random(11)]
    assert interquartile_mean(scores) == interquartile_mean(scores)


def test_holms_procedure_multiplies_by_the_comparisons_that_are_left_and_never_falls():
    # Holm (1979): 4 x 0.01, 3 x 0.01 raised to that, 2 x 0.03, and 0.04 raised to that.
    assert holm([0.03, 0.01, 0.04, 0.011]) == pytest.approx([0.06, 0.04, 0.06, 0.04])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_difference_has_the_p_value_of_the_paired_t_test():
    ours, theirs = [0.5, 0.4, 0.9, 0.6], [0.4, 0.45, 0.7, 0.4]
    found = paired_difference([dict(enumerate(ours))], [dict(enumerate(theirs))])
    assert found.p == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
    assert (found.p < 0.05) == (found.low > 0 or found.high < 0)


@pytest.mark.parametrize("pairs", [5, 10])
def test_the_detectable_difference_is_found_in_about_four_of_five_studies(pairs):
    rng, spread = np.random.default_rng(0), 0.02
    noise = rng.normal(0, spread, (4_000, pairs))
    detectable = np.mean(
        [
            paired_difference([dict(enumerate(row))], [dict.fromkeys(range(pairs), 0.0)]).detectable
            for row in noise[:500]
        ]
    )
    significant = stats.ttest_1samp(noise + detectable, 0.0, axis=1).pvalue < 0.05
    assert 0.72 < significant.mean() < 0.88


def test_fishers_test_of_two_counts():
    assert fisher((2, 10), (7, 10)) == pytest.approx(stats.fisher_exact([[2, 8], [7, 3]]).pvalue)
    assert fisher((0, 5), (0, 5)) == 1
