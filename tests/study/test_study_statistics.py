"""Scores against numbers worked out by hand, and intervals against what they must obey."""

import numpy as np
import pytest
from scipy import stats

from hpo_plugin.study.statistics import (
    CONFIDENCE,
    RESAMPLES,
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
    assert (found.low, found.high, found.note) == (None, None, "no interval: resamples do not differ")


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


def test_differences_are_between_runs_of_one_seed():
    found = paired_difference([{0: 0.5, 1: 0.4, 2: 0.9}], [{1: 0.1, 0: 0.4, 7: 0.0}])
    # (0.5 - 0.4 + 0.4 - 0.1) / 2
    assert found.value == pytest.approx(0.2)
    assert found.low == pytest.approx(0.1)
    assert found.high == pytest.approx(0.3)
    assert paired_difference([{0: 0.5}], [{1: 0.4}]) is None


def test_differences_over_settings_count_every_pair_once_and_are_resampled_within_a_setting():
    one = {seed: 0.1 for seed in range(4)}
    found = paired_difference([one, {0: 0.7, 1: 0.3}], [dict.fromkeys(one, 0.0), {0: 0.1, 1: 0.3}])
    # (4 * 0.1 + 0.6 + 0) / 6, and at the ends twice the one pair of the second setting.
    assert found.value == pytest.approx(1 / 6)
    assert found.low == pytest.approx(0.4 / 6)
    assert found.high == pytest.approx(1.6 / 6)
    assert paired_difference([one, {0: 0.7}], [one, {1: 0.1}]) is None


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
