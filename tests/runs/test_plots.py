"""The picture and the terminal's curves."""

import math

from hpo_plugin.runs.plots import draw_curves, save_curves, smooth


def run_of(steps):
    rows = {0: {"val-core/countdown/reward/mean@1": 0.06}}
    for step in range(1, steps + 1):
        rows[step] = {
            "critic/rewards/mean": 0.3 * step / steps,
            "actor/hpo/alpha": 0.1 + 0.8 * step / steps,
            "actor/hpo/share_positive": 0.2,
            "actor/hpo/share_negative": 0.5,
            "response_length/mean": 9.0,
        }
    rows[steps]["val-core/countdown/reward/mean@1"] = 0.31
    return rows


def test_smoothing_is_the_mean_of_the_last_values_known():
    assert smooth([1.0, 3.0, math.nan, 5.0], over=2) == [1.0, 2.0, 3.0, 5.0]


def test_the_picture_is_a_png_of_readable_size(tmp_path):
    path = tmp_path / "curves.png"
    save_curves(run_of(20), path, title="a run", n_test=512)
    from matplotlib import image

    height, width, _ = image.imread(path).shape
    assert (width, height) == (1300, 832)


def test_a_run_without_alpha_and_without_evaluation_has_a_picture_too(tmp_path):
    rows = {1: {"critic/rewards/mean": 0.1}, 2: {"critic/rewards/mean": 0.2}}
    save_curves(rows, tmp_path / "curves.png", title="a run", n_test=512)
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_the_terminal_shows_both_curves_within_the_width_and_one_dot_per_evaluation():
    text = draw_curves(run_of(20), width=80, color=False)
    assert "success in %" in text
    assert "α, weight of negative responses" in text
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("●") == 3  # two evaluations, and the one that explains the sign
    assert "\x1b" not in text
    assert "\x1b" in draw_curves(run_of(20), width=80, color=True)


def test_an_empty_run_can_be_drawn():
    assert "success in %" in draw_curves({}, width=80, color=False)
