"""A version of verl that was not tested is tried, and what is different in it is named."""

import functools

import pytest

pytest.importorskip("verl")

import verl
from verl.trainer.ppo.v1 import utils as v1_utils
from verl.workers.utils import losses

from hpo_plugin.verl import metrics, seams
from hpo_plugin.verl.registration import RegistrationError
from hpo_plugin.verl.self_test import TESTED_VERL, self_test


@pytest.fixture(autouse=True)
def tried_anew():
    self_test.cache_clear()
    yield
    self_test.cache_clear()


def run(recipe, preset="ahpo"):
    return seams.prepare(recipe(**{"algorithm.policy_loss": preset, "actor_rollout_ref.rollout.n": 8}))[1]


def fault(original, change):
    @functools.wraps(original)
    def faulty(*args, **kwargs):
        return change(original(*args, **kwargs))

    return faulty


def doubled(data):
    data.batch["advantages"] = 2 * data.batch["advantages"]
    return data


def test_this_verl_passes_and_nothing_of_it_reaches_the_metrics_of_a_run():
    assert self_test() is None
    assert metrics.drain() == {}


def test_a_tested_version_is_not_tried(monkeypatch, recipe):
    monkeypatch.setattr(verl, "__version__", TESTED_VERL[-1])
    assert run(recipe) == []
    assert self_test.cache_info().misses == 0


def test_another_version_that_passes_runs_with_one_line(monkeypatch, recipe):
    monkeypatch.setattr(verl, "__version__", "0.10.0.dev0")
    (line,) = run(recipe)
    assert line.startswith("warning: hpo_plugin was not tested with verl 0.10.0.dev0, only with ")
    assert line.endswith("; the self-test passed")


def test_a_run_without_hpo_needs_no_version(monkeypatch, recipe):
    monkeypatch.setattr(verl, "__version__", "0.10.0")
    monkeypatch.setattr(losses, "ppo_loss", None)
    assert run(recipe, preset="grpo") == []


@pytest.mark.parametrize(
    ("module", "name", "change", "said"),
    [
        (losses, "ppo_loss", lambda result: (2 * result[0], result[1]), "gradient of ppo_loss differs .* 1.0e\+00"),
        (losses, "ppo_loss", None, "TypeError"),
        (v1_utils, "compute_advantage", doubled, r"compute_advantage returns the advantages \[3\.0"),
    ],
    ids=["another scale", "moved", "other advantages"],
)
def test_a_version_that_fails_is_refused_with_what_is_different(monkeypatch, recipe, module, name, change, said):
    replaced = fault(getattr(module, name), change) if callable(change) else change
    monkeypatch.setattr(module, name, replaced)
    monkeypatch.setattr(verl, "__version__", "0.10.0")
    with pytest.raises(
        RegistrationError, match=rf"does not work with verl 0\.10\.0: .*{said}.*Install verl 0\.9\.0 or "
    ):
        run(recipe)
