"""How verl loads the plugin: what it costs, when it registers, and that it never fails in silence.

``import verl`` takes many seconds, so four interpreters answer all questions that need a fresh one.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from verl.trainer.ppo import core_algos

from hpo_plugin.glue import plugin, registration
from hpo_plugin.glue.config import HPOPolicyLossConfig
from hpo_plugin.glue.estimators import ESTIMATORS
from hpo_plugin.glue.losses import LOSSES
from hpo_plugin.glue.registration import RegistrationError, require_registered

LOADING = """
import json, sys
import hpo_plugin.glue.plugin
facts = {"with_plugin": sorted({"verl", "torch", "omegaconf", "numpy"} & set(sys.modules))}
import verl
heavy = ["verl.trainer.ppo.core_algos", "verl.workers.engine_workers", "hpo_plugin.algorithm", "hpo_plugin.glue.worker"]
facts["with_verl"] = [name for name in heavy if name in sys.modules]
from verl.trainer.ppo import core_algos
facts["with_core_algos"] = [name for name in heavy if name in sys.modules]
facts["estimators"] = {n: f.__module__ for n, f in core_algos.ADV_ESTIMATOR_REGISTRY.items() if "hpo" in n}
facts["losses"] = {n: f.__module__ for n, f in core_algos.POLICY_LOSS_REGISTRY.items() if "hpo" in n}
print(json.dumps(facts))
"""

ADDED = """
import importlib.metadata, json, sys
load, added = importlib.metadata.EntryPoint.load, {}
def watched(self):
    before = set(sys.modules)
    value = load(self)
    added[self.name] = sorted(set(sys.modules) - before)
    return value
importlib.metadata.EntryPoint.load = watched
import verl
print(json.dumps(added))
"""

BROKEN = """
import json, sys
sys.modules["hpo_plugin.glue.seams"] = None
import verl
facts = {}
from hpo_plugin.glue.registration import require_registered
for mode in ("ahpo", "vanilla"):
    try:
        require_registered("grpo", mode)
        facts[mode] = None
    except Exception as error:
        facts[mode] = [type(error).__name__, str(error)]
print(json.dumps(facts))
"""


TAKEN = """
import json, sys
from omegaconf import OmegaConf
from hpo_plugin.glue import seams
sys.modules.pop("hpo_plugin.glue.plugin", None)
import os
os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"
from verl.trainer.ppo import core_algos
import verl.utils.config
@core_algos.register_policy_loss("ahpo")
def foreign(): ...
import hpo_plugin.glue.plugin
config = OmegaConf.create({
    "algorithm": {"adv_estimator": "grpo"},
    "actor_rollout_ref": {"actor": {"policy_loss": {"loss_mode": "ahpo"}, "loss_agg_mode": "token-mean"}},
})
try:
    verl.utils.config.validate_config(config, False, False)
    said = None
except Exception as error:
    said = [type(error).__name__, str(error)]
print(json.dumps({"said": said, "foreign": core_algos.POLICY_LOSS_REGISTRY["ahpo"] is foreign}))
"""


def fresh(script: str) -> tuple[dict[str, Any], str]:
    """What a fresh interpreter prints as its last line, and its stderr."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VERL_USE_EXTERNAL")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture(scope="module")
def loading() -> dict[str, Any]:
    return fresh(LOADING)[0]


@pytest.mark.timeout(400)
def test_the_entry_point_alone_imports_neither_verl_nor_torch(loading):
    assert loading["with_plugin"] == []


@pytest.mark.timeout(400)
def test_import_verl_loads_no_more_of_verl_or_of_us_than_without_the_plugin(loading):
    assert loading["with_verl"] == []


@pytest.mark.timeout(400)
def test_the_plugin_adds_a_few_small_modules_to_import_verl():
    """What verl loads by our entry points is ours, and wrapt. benchmarks/startup.py has the milliseconds."""
    added = fresh(ADDED)[0]
    modules = [*added["hpo"], *added["hpo_cpu"]]
    assert "hpo_plugin.glue.plugin" in modules
    assert {name.partition(".")[0] for name in modules} <= {"hpo_plugin", "wrapt"}
    assert len([name for name in modules if name.startswith("hpo_plugin")]) <= 10
    assert len(modules) <= 30


@pytest.mark.timeout(400)
def test_estimators_and_losses_are_registered_when_verls_registry_is_imported_and_not_the_workers(loading):
    ours = dict.fromkeys(("hpo", "ahpo"), "hpo_plugin.glue.estimators")
    assert loading["estimators"] == ours
    assert loading["losses"] == dict.fromkeys(("hpo", "ahpo"), "hpo_plugin.glue.losses")
    assert loading["with_core_algos"] == ["verl.trainer.ppo.core_algos", "hpo_plugin.algorithm"]


@pytest.mark.timeout(400)
def test_a_plugin_that_cannot_load_is_logged_and_whatever_needs_it_raises_the_reason():
    """Verl itself would log it at DEBUG and go on. Here the hook that runs at once fails, after the first was set."""
    facts, stderr = fresh(BROKEN)
    assert "hpo_plugin could not be loaded into verl" in stderr
    kind, message = facts["ahpo"]
    assert kind == "RegistrationError"
    assert "hpo_plugin.glue.seams" in message
    assert "did not load completely" in message
    assert facts["vanilla"] is None


@pytest.mark.timeout(400)
def test_a_name_that_was_taken_before_stops_the_driver_with_the_reason():
    """The registration hook fails at once; the hook of the config check is set all the same, and says why."""
    facts, stderr = fresh(TAKEN)
    assert "hpo_plugin could not be loaded into verl" in stderr
    assert facts["foreign"]
    kind, message = facts["said"]
    assert kind == "RegistrationError"
    assert "is already registered by __main__.foreign" in message


def test_a_failed_installation_keeps_its_reason(monkeypatch, caplog):
    def explode(module: str, hook: Any) -> None:
        raise ImportError("no wrapt here")

    monkeypatch.setattr(plugin, "FAILURE", None)
    monkeypatch.setattr(plugin, "_set_hook", explode)
    with caplog.at_level(logging.ERROR):
        plugin.load()
    assert plugin.FAILURE == "ImportError: no wrapt here"
    assert "hpo and ahpo are not available" in caplog.text
    with pytest.raises(RegistrationError, match="no wrapt here"):
        HPOPolicyLossConfig(adv_estimator="grpo", loss_mode="ahpo")


def test_a_plugin_verl_was_told_not_to_load_is_missed(monkeypatch):
    monkeypatch.delitem(sys.modules, "hpo_plugin.glue.plugin")
    with pytest.raises(RegistrationError, match="verl did not load the entry point hpo of"):
        require_registered("ahpo", "vanilla")


def test_what_is_registered_is_ours_and_without_hysteresis_nothing_is_asked_for(monkeypatch):
    require_registered("ahpo", "ahpo")
    require_registered("grpo", "hpo")
    monkeypatch.setattr(plugin, "FAILURE", "broken")
    require_registered("grpo", "vanilla")


@pytest.mark.parametrize("name", ["hpo", "ahpo"])
def test_a_loss_that_somebody_overwrote_later_is_noticed(monkeypatch, name):
    """The function register_policy_loss of verl overwrites without a word."""
    monkeypatch.setattr(core_algos, "POLICY_LOSS_REGISTRY", dict(core_algos.POLICY_LOSS_REGISTRY))
    core_algos.register_policy_loss(name)(core_algos.compute_policy_loss_vanilla)
    with pytest.raises(RegistrationError, match=rf"policy loss '{name}'.*compute_policy_loss_vanilla"):
        require_registered("grpo", name)


@pytest.mark.parametrize("registry", ["POLICY_LOSS_REGISTRY", "ADV_ESTIMATOR_REGISTRY"])
def test_something_missing_is_named(monkeypatch, registry):
    monkeypatch.setattr(core_algos, registry, {})
    with pytest.raises(RegistrationError, match=r"'ahpo' of hpo_plugin is not registered .* nothing is registered"):
        require_registered("ahpo", "ahpo")


def stand_in(**registries: Any) -> SimpleNamespace:
    """A module core_algos with empty registries, or those given; its functions must not be reached."""
    module = SimpleNamespace(ADV_ESTIMATOR_REGISTRY={}, POLICY_LOSS_REGISTRY={})
    module.register_adv_est = lambda name: lambda f: module.ADV_ESTIMATOR_REGISTRY.__setitem__(name, f)
    module.register_policy_loss = lambda name: lambda f: module.POLICY_LOSS_REGISTRY.__setitem__(name, f)
    module.__dict__.update(registries)
    return module


def test_registration_fills_both_registries_and_may_be_repeated():
    module = stand_in()
    registration.register(module)
    registration.register(module)
    assert module.ADV_ESTIMATOR_REGISTRY == ESTIMATORS
    assert module.POLICY_LOSS_REGISTRY == LOSSES


@pytest.mark.parametrize("registry", ["POLICY_LOSS_REGISTRY", "ADV_ESTIMATOR_REGISTRY"])
@pytest.mark.parametrize("name", ["hpo", "ahpo"])
def test_a_name_held_by_another_package_is_refused_and_nothing_is_overwritten(registry, name):
    def foreign() -> None: ...

    module = stand_in(**{registry: {name: foreign}})
    with pytest.raises(RegistrationError) as refused:
        registration.register(module)
    for text in (f"'{name}'", __name__, "foreign", "VERL_USE_EXTERNAL_PLUGINS"):
        assert text in str(refused.value)
    assert getattr(module, registry) == {name: foreign}
    other = {"POLICY_LOSS_REGISTRY", "ADV_ESTIMATOR_REGISTRY"} - {registry}
    assert getattr(module, other.pop()) == {}
