"""The sentences of the simulated studies' pages say what their data say."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from hpo_plugin.study.data import ALPHA, HELD_OUT, LENGTH, read_data
from hpo_plugin.study.report import collapsed, early_score, final_score
from hpo_plugin.study.spec import load_study
from hpo_plugin.study.statistics import holm, paired_difference

ROOT = Path(__file__).parents[2]
RATES = ("lr-1e-4", "lr-3e-4", "lr-1e-3")
OTHERS = ("grpo", "token-mean", "hpo", "gspo", "sapo")


def collected(name):
    """Setting, arm -> seed -> data; every declared cell is there."""
    path = ROOT / "studies" / f"{name}.yaml"
    data, runs = read_data(path.with_suffix(".parquet")), {}
    for cell in load_study(path).cells():
        runs.setdefault((cell.setting, cell.arm), {})[cell.seed] = data[cell.key]
    return runs


@pytest.fixture(scope="module")
def rates():
    return collected("learning-rate")


@pytest.fixture(scope="module")
def groups():
    return collected("group-size")


def finals(runs, setting, arm):
    return {seed: final_score(run, 1) for seed, run in runs[setting, arm].items()}


def areas(runs, arm):
    return {seed: np.mean([finals(runs, rate, arm)[seed] for rate in RATES]) for seed in finals(runs, RATES[0], arm)}


def means(runs, arm):
    return [np.mean(list(finals(runs, rate, arm).values())) for rate in RATES]


def difference(ours, theirs):
    found = paired_difference([ours], [theirs])
    assert found is not None
    return found


def best(runs, arm):
    return finals(runs, RATES[int(np.argmax(means(runs, arm)))], arm)


def test_the_seeds_are_new(rates, groups):
    for runs in (rates, groups):
        assert all(set(by_seed) == {10, 11, 12, 13, 14, 15} for by_seed in runs.values())


def test_at_its_best_learning_rate_every_algorithm_ends_alike(rates):
    assert [round(min(max(means(rates, arm)) for arm in ("ahpo", *OTHERS)), 3)] == [0.176]
    assert [round(max(max(means(rates, arm)) for arm in ("ahpo", *OTHERS)), 3)] == [0.188]
    found = {arm: difference(best(rates, "ahpo"), best(rates, arm)) for arm in OTHERS}
    assert f"{min(one.value for one in found.values()):+.3f}" == "-0.003"
    assert f"{max(one.value for one in found.values()):+.3f}" == "+0.009"
    assert min(one.p for one in found.values()) > 0.29
    assert f"{found['sapo'].detectable:.3f}" == "0.012" == f"{min(one.detectable for one in found.values()):.3f}"
    assert f"{found['gspo'].detectable:.3f}" == "0.041" == f"{max(one.detectable for one in found.values()):.3f}"


def test_the_front_page_says_what_the_study_of_learning_rates_says(rates):
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"[{sum(map(len, rates.values()))} simulated runs]" in text
    assert "reach a held-out success of 0.176 to 0.188, each at its best of three learning rates" in text
    assert "There, A-HPO minus another algorithm is -0.003 to +0.009." in text
    # The two are those of test_at_the_highest_learning_rate_all_lose_and_few_runs_collapse_with_ahpo.
    assert "Of 15 comparisons" in text
    assert "two are statistically significant without a correction, and none with Holm's" in text


def test_gspo_is_behind_at_one_learning_rate_only(rates):
    low, middle = (difference(finals(rates, rate, "ahpo"), finals(rates, rate, "gspo")) for rate in RATES[:2])
    assert f"{low.value:.3f}" == "0.033"
    assert low.low > 0
    assert middle.low < 0 < middle.high
    assert abs(middle.value) < 0.002


def test_at_the_highest_learning_rate_all_lose_and_few_runs_collapse_with_ahpo(rates):
    left = {arm: means(rates, arm)[2] / max(means(rates, arm)) for arm in ("ahpo", *OTHERS)}
    assert max(left.values()) < 0.6
    kept = sorted(left, key=lambda arm: means(rates, arm)[2])
    assert kept[-2:] == ["ahpo", "hpo"]
    assert set(kept[:2]) == {"sapo", "gspo"}
    area = {arm: difference(areas(rates, "ahpo"), areas(rates, arm)) for arm in OTHERS}
    assert f"{area['gspo'].value:.3f}" == "0.021"
    assert f"{area['sapo'].value:.3f}" == "0.017"
    assert max(area["gspo"].p, area["sapo"].p) < 0.05
    fallen = {arm: [sum(map(collapsed, rates[rate, arm].values())) for rate in RATES] for arm in left}
    assert all(counts[:2] == [0, 0] for counts in fallen.values())
    assert (fallen["ahpo"][2], fallen["grpo"][2], fallen["sapo"][2]) == (1, 4, 4)
    p_values = [difference(best(rates, "ahpo"), best(rates, arm)).p for arm in OTHERS] + [area[a].p for a in OTHERS]
    p_values += [stats.fisher_exact([[1, 17], [sum(fallen[arm]), 18 - sum(fallen[arm])]]).pvalue for arm in OTHERS]
    assert len(p_values) == 15
    assert min(holm(p_values)) > 0.05


def test_alpha_min_acts_in_large_groups_and_the_scores_do_not_show_it(groups):
    def below(setting, bound):
        alphas = np.array([run.values[ALPHA][1:] for run in groups[setting, "min-0"].values()])
        return round(100 * float((alphas < bound - 1e-6).mean()), 1)

    assert [round(below(setting, 0.1)) for setting in ("n-16", "n-32")] == [8, 17]
    assert [round(below(setting, 0.2)) for setting in ("n-16", "n-32")] == [38, 45]
    assert below("n-16", 0.05) == 0
    for zero, low in zip(groups["n-16", "min-0"].values(), groups["n-16", "min-0.05"].values(), strict=True):
        assert final_score(zero, 1) == final_score(low, 1)
    found = [
        difference(finals(groups, setting, "min-0.1"), finals(groups, setting, arm))
        for setting in ("n-16", "n-32")
        for arm in ("min-0", "min-0.05", "min-0.2")
    ]
    assert max(abs(one.value) for one in found) < 0.004
    assert min(one.p for one in found) > 0.14
    seen = [one.detectable for one in found]
    assert (f"{min(seen):.3f}", f"{max(seen):.3f}") == ("0.006", "0.017")


LONG = ("grpo", "token-mean", "grpo-ahpo", "positive")


def test_long_failures_do_not_decide_and_do_not_stay_long():
    runs = collected("long-failures")
    assert all(set(by_seed) == set(range(10, 20)) for by_seed in runs.values())
    low, high = "lr-3e-4", "lr-6e-4"
    score = {key: np.mean([final_score(run, 1) for run in by_seed.values()]) for key, by_seed in runs.items()}
    assert (f"{score[high, 'ahpo']:.3f}", f"{score[high, 'grpo']:.3f}") == ("0.102", "0.095")
    found = difference(finals(runs, high, "ahpo"), finals(runs, high, "grpo"))
    assert [f"{x:+.3f}" for x in (found.value, found.low, found.high)] == ["+0.007", "-0.022", "+0.036"]
    assert f"{found.detectable:.3f}" == "0.041"
    fallen = {key: sum(map(collapsed, by_seed.values())) for key, by_seed in runs.items()}
    assert {key for key, count in fallen.items() if count} == {(high, "token-mean"), (high, "positive")}
    assert sum(fallen.values()) == 2
    assert [f"{score[low, arm]:.3f}" for arm in ("ahpo", "grpo-ahpo")] == ["0.171", "0.170"]
    others = [arm for arm in LONG if arm != "grpo-ahpo"]
    assert [f"{f(score[low, arm] for arm in others):.3f}" for f in (min, max)] == ["0.157", "0.160"]
    against = [difference(finals(runs, low, "ahpo"), finals(runs, low, arm)) for arm in others]
    assert [f"{f(one.value for one in against):.3f}" for f in (min, max)] == ["0.011", "0.014"]
    assert 0.07 < min(one.p for one in against) < max(one.p for one in against) < 0.111
    assert [f"{f(one.detectable for one in against):.3f}" for f in (min, max)] == ["0.018", "0.025"]
    first, last = (
        {key: np.mean([run.values[LENGTH][part].mean() for run in by_seed.values()]) for key, by_seed in runs.items()}
        for part in (slice(1, 2), slice(-10, None))
    )
    assert min(first.values()) > 60
    assert max(last.values()) < 20
    assert all(8.5 < length < 9.5 for (_, arm), length in last.items() if arm == "grpo-ahpo")
    assert all(12.5 < length < 19.5 for (_, arm), length in last.items() if arm != "grpo-ahpo")


def test_the_regime_of_long_failures_was_chosen_on_grpo():
    ((setting, arm), by_seed) = next(iter(collected("long-failures-regime").items()))
    assert (setting, arm, set(by_seed)) == ("search", "grpo", {100})
    (run,) = by_seed.values()
    tested = run.values[HELD_OUT][~np.isnan(run.values[HELD_OUT])]
    assert tested[-1] > 3 * tested[0]


def test_the_simulator_ends_where_verls_trainer_ends():
    path = ROOT / "studies/simulator-validation.yaml"
    runs = collected(path.stem)
    arms = ("grpo", "gspo", "sapo", "hpo", "ahpo")

    def compared(score, settings, arms, combinations):
        def of(setting):
            seeds = runs[setting, "grpo"]
            return {seed: float(np.mean([score(runs[setting, arm][seed]) for arm in arms])) for seed in seeds}

        ours, theirs = [of(setting) for setting in settings], [of(setting) for setting in settings.values()]
        assert sum(map(len, theirs)) == combinations
        found = paired_difference(ours, theirs)
        assert found is not None
        return found

    def final_and_early(settings, arms, combinations):
        return (
            compared(lambda run: final_score(run, 1), settings, arms, combinations),
            compared(lambda run: early_score(run, 0.5), settings, arms, combinations),
        )

    final, early = final_and_early({"countdown3": "verl-countdown3", "countdown4": "verl-countdown4"}, arms, 8)
    assert [f"{x:+.3f}" for x in (final.value, final.low, final.high)] == ["+0.008", "-0.011", "+0.028"]
    assert [f"{x:+.3f}" for x in (early.value, early.low, early.high)] == ["+0.002", "-0.008", "+0.011"]
    assert f"{final.detectable:.3f}" == "0.027"
    higher = {"lr-3e-4": "verl-3e-4", "lr-1e-3": "verl-1e-3", "long": "verl-long"}
    final, early = final_and_early(higher, ("grpo", "ahpo"), 10)
    assert [f"{x:+.3f}" for x in (final.value, final.low, final.high)] == ["-0.004", "-0.024", "+0.016"]
    assert [f"{x:+.3f}" for x in (early.value, early.low, early.high)] == ["+0.003", "-0.006", "+0.012"]
    assert f"{final.detectable:.3f}" == "0.028"
    pair = [
        {seed: final_score(run, 1) for seed, run in runs[name, "ahpo"].items()} for name in ("lr-1e-3", "verl-1e-3")
    ]
    found = paired_difference(pair[:1], pair[1:])
    assert [f"{x:+.3f}" for x in (found.value, found.low, found.high)] == ["-0.014", "-0.017", "-0.012"]
    apart = [pair[0][seed] - pair[1][seed] for seed in pair[1]]
    assert max(apart) - min(apart) < 0.002
    # The variance of a share of 512 answers is share * (1 - share) / 512.
    shares = np.array([np.mean(list(by_seed.values())) for by_seed in pair])
    assert f"{np.sqrt((shares * (1 - shares) / 512).sum()):.3f}" == "0.017"
    differences, of_higher = [], 0
    for (setting, arm), by_seed in runs.items():
        there = runs.get((f"verl-{setting.removeprefix('lr-')}", arm)) or runs.get((f"verl-{setting}", arm), {})
        if not setting.startswith("verl-") and set(by_seed) & set(there):
            for score in (lambda run: final_score(run, 1), lambda run: early_score(run, 0.5)):
                pair = [{seed: score(run) for seed, run in found.items()} for found in (by_seed, there)]
                found = paired_difference(pair[:1], pair[1:])
                differences.append(found)
                of_higher += setting in higher and found.p is not None
    p_values = [found.p for found in differences if found.p is not None]
    assert (len(p_values), of_higher) == (32, 12)
    assert f"{min(holm(p_values)):.3f}" == "0.066"
