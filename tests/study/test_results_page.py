"""The committed results page is what the committed data give, and its words say what they say."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from hpo_plugin.study.data import (
    ALPHA,
    HELD_OUT,
    LENGTH,
    LONGEST,
    REWARD,
    SHARE_NEGATIVE,
    SHARE_POSITIVE,
    SHORTEST,
    read_data,
)
from hpo_plugin.study.report import build_report, early_score, final_score, write_report
from hpo_plugin.study.spec import load_study
from hpo_plugin.study.statistics import paired_difference, probability_of_improvement

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "studies/countdown-laptop.yaml"
RESULTS = ROOT / "docs/results"
COMMAND = "hpo-plugin study report {} --output docs/results --no-png"
#: Every study with a page.
REPORTED = sorted(path for path in (ROOT / "studies").glob("*.yaml") if (RESULTS / f"{path.stem}.md").exists())
SETTINGS = ("countdown3", "countdown4")
WEIGHTS = ("hpo-0.0", "hpo-0.2", "hpo-0.4", "hpo", "hpo-0.8", "hpo-1.0")
CLIPPED = "actor/pg_clipfrac"
PRESETS = OmegaConf.to_container(OmegaConf.load(ROOT / "hpo_plugin/configs/hpo.yaml").policy_loss_presets)


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


def difference(runs, ours, theirs, settings=SETTINGS[:1], *, final, seeds=range(5)):
    def of(arm):
        found = (scores(runs, setting, arm, final=final) for setting in settings)
        return [{seed: score for seed, score in by_seed.items() if seed in seeds} for by_seed in found]

    return paired_difference(of(ours), of(theirs))


def significant(found):
    return found.low > 0 or found.high < 0


def stacked(runs, setting, arm, metric):
    """A row per seed, a column per update."""
    return np.array([run.values[metric][1:] for run in runs[setting, arm].values()])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("study", REPORTED, ids=lambda path: path.stem)
def test_every_figure_and_number_of_the_page_comes_from_the_collected_data(study, tmp_path):
    report = build_report(load_study(study), read_data(study.with_suffix(".parquet")))
    write_report(report, tmp_path, png=False)
    made, there = (
        {
            path.relative_to(folder): path.read_bytes()
            for path in [folder / f"{study.stem}.md", *folder.glob(f"{study.stem}/*")]
        }
        for folder in (tmp_path, RESULTS)
    )
    assert made.keys() == there.keys()
    command = COMMAND.format(study.relative_to(ROOT))
    assert [str(name) for name in made if made[name] != there[name]] == [], f"make the page again: {command}"


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
    fallen = found["countdown4", "grpo-1e-4"][100].values[HELD_OUT][[45, 60]]
    assert [f"{value:.3f}" for value in fallen] == ["0.102", "0.090"]


def test_from_the_regime_on_only_the_number_of_held_out_problems_was_changed():
    chosen, study = load_study(ROOT / "studies/countdown-laptop-regime.yaml"), load_study(STUDY)
    for setting in SETTINGS:
        before, after = chosen.settings[setting].prepare, study.settings[setting].prepare
        assert (before.test_size, after.test_size) == (256, 512)
        assert replace(before, test_size=512) == after
    assert (chosen.steps, chosen.config_name) == (study.steps, study.config_name)
    rate = "actor_rollout_ref.actor.optim.lr=1e-4"
    assert {*chosen.overrides, rate} == set(study.overrides)
    # Other problems were drawn with it, and another start model.
    one, other = (read_data(STUDY.with_name(f"{name}.parquet")) for name in (chosen.name, study.name))
    for setting in SETTINGS:
        inputs = [next(run.info["inputs"] for run in data.values() if run.setting == setting) for data in (one, other)]
        assert all(inputs[0][name] != inputs[1][name] for name in ("train", "test", "model"))


#: A-HPO against another arm, over both settings, with 3 numbers and with 4: the difference, and whether it is certain.
EARLY = {
    "grpo": ("+0.004", True, False, True),
    "sapo": ("+0.004", True, False, True),
    "gspo": ("+0.018", True, True, False),
    "hpo": ("+0.001", False, False, True),
}
FINAL = {
    "grpo": ("+0.009", False, False, False),
    "sapo": ("+0.005", False, False, False),
    "gspo": ("+0.038", True, True, True),
    "hpo": ("+0.001", False, False, False),
}


@pytest.mark.parametrize("other", EARLY)
def test_against_which_ahpo_differs_significantly(runs, other):
    for final, expected in ((False, EARLY[other]), (True, FINAL[other])):
        found = [difference(runs, "ahpo", other, which, final=final) for which in (SETTINGS, *((s,) for s in SETTINGS))]
        assert (f"{found[0].value:+.3f}", *map(significant, found)) == expected


@pytest.mark.parametrize("other", ["grpo", "sapo"])
def test_every_run_against_every_other_shows_no_significant_difference_of_ahpo_to_grpo_and_sapo(runs, other):
    for settings in (SETTINGS, SETTINGS[:1], SETTINGS[1:]):
        for final in (True, False):
            ours, theirs = (
                [np.array(list(scores(runs, setting, arm, final=final).values())) for setting in settings]
                for arm in ("ahpo", other)
            )
            probability = probability_of_improvement(ours, theirs)
            assert probability.low < 0.5 < probability.high


def test_ahpo_against_each_fixed_weight(runs):
    finals = {arm: difference(runs, "ahpo", arm, final=True, seeds=range(3)) for arm in WEIGHTS}
    earlies = {arm: difference(runs, "ahpo", arm, final=False, seeds=range(3)) for arm in WEIGHTS}
    assert [arm for arm in WEIGHTS if significant(finals[arm])] == ["hpo-0.4"]
    assert not any(map(significant, earlies.values()))
    assert finals["hpo-0.4"].value > 0
    assert min(finals, key=lambda arm: finals[arm].value) == "hpo-1.0"
    assert f"{finals['hpo-1.0'].value:+.3f}" == "-0.008"
    assert difference(runs, "ahpo", "hpo", SETTINGS[1:], final=False).low > 0


def test_no_weight_stands_out_and_none_collapses(runs):
    for final, expected in ((True, [("hpo-0.4", "hpo-1.0")]), (False, [])):
        pairs = [
            (low, high)
            for low, high in itertools.combinations(WEIGHTS, 2)
            if significant(difference(runs, high, low, final=final, seeds=range(3)))
        ]
        assert pairs == expected
    finals = {arm: np.mean([scores(runs, "countdown3", arm, final=True)[seed] for seed in range(3)]) for arm in WEIGHTS}
    assert set(sorted(finals, key=finals.get)[-3:]) == {"hpo", "hpo-0.8", "hpo-1.0"}
    early = {arm: np.mean([scores(runs, "countdown3", arm, final=False)[seed] for seed in range(3)]) for arm in WEIGHTS}
    assert early["hpo-0.0"] == pytest.approx(max(early.values()), rel=0.05)


def test_the_mean_length_alone_makes_no_significant_difference_to_grpo(runs):
    for final, expected in ((True, "+0.014"), (False, "+0.002")):
        found = difference(runs, "hpo-1.0", "grpo", final=final)
        assert f"{found.value:+.3f}" == expected
        assert not significant(found)
    differs = {
        key: value
        for key, value in PRESETS["hpo"].items()
        if value != PRESETS["grpo"][key] and key not in ("adv_estimator", "loss_mode")
    }
    assert differs == {"loss_agg_mode": "token-mean"}


def test_lengths_stay(runs):
    for setting, arm in runs:
        lengths = stacked(runs, setting, arm, LENGTH)
        assert abs(lengths[:, -10:].mean() - lengths[:, :10].mean()) < 1
        assert round(lengths.mean()) == (8 if setting == "countdown3" else 10)
    for setting, expected in (("countdown3", (6, 11)), ("countdown4", (8, 17))):
        found = [
            np.concatenate([stacked(runs, setting, arm, name) for where, arm in runs if where == setting]).mean()
            for name in (SHORTEST, LONGEST)
        ]
        assert tuple(map(round, found)) == expected


def test_grpo_and_sapo_are_nearly_one(runs):
    differences = []
    for setting in SETTINGS:
        grpo, sapo = (scores(runs, setting, arm, final=False) for arm in ("grpo", "sapo"))
        differences += [grpo[seed] - sapo[seed] for seed in grpo]
    assert differences.count(0.0) == 6
    assert np.abs(differences).max() < 0.002


def test_gspo_alone_clips(runs):
    for setting, arm in runs:
        clipped = stacked(runs, setting, arm, CLIPPED).mean(axis=1)
        if arm == "gspo":
            assert clipped.min() > 0.055
            assert clipped.max() < 0.125
        else:
            assert clipped.max() < 0.001


def test_the_resolution_of_a_score():
    assert f"{1 / 512:.3f}" == "0.002"
    assert f"{np.sqrt(0.16 * 0.84 / 512):.3f}" == "0.016"


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
