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

from hpo_plugin.variants import VARIANTS, Variant, register_variant
from hpo_plugin.verl import plugin, registration
from hpo_plugin.verl.config import HPOPolicyLossConfig
from hpo_plugin.verl.estimators import estimator
from hpo_plugin.verl.losses import policy_loss
from hpo_plugin.verl.registration import RegistrationError, require_registered

LOADING = """
import json, sys
import hpo_plugin.verl.plugin
facts = {"with_plugin": sorted({"verl", "torch", "omegaconf", "numpy"} & set(sys.modules))}
import verl
heavy = ["verl.trainer.ppo.core_algos", "verl.workers.engine_workers", "hpo_plugin.verl.estimators"]
facts["with_verl"] = [name for name in heavy if name in sys.modules]
from verl.trainer.ppo import core_algos
facts["with_core_algos"] = [name for name in heavy if name in sys.modules]
facts["estimators"] = {n: f.func.__module__ for n, f in core_algos.ADV_ESTIMATOR_REGISTRY.items() if "hpo" in n}
facts["losses"] = {n: f.func.__module__ for n, f in core_algos.POLICY_LOSS_REGISTRY.items() if "hpo" in n}
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
sys.modules["hpo_plugin.verl.seams"] = None
import verl
facts = {}
from hpo_plugin.verl.registration import require_registered
for mode in ("ahpo", "vanilla"):
    try:
        require_registered(mode, mode)
        facts[mode] = None
    except Exception as error:
        facts[mode] = [type(error).__name__, str(error)]
print(json.dumps(facts))
"""


TAKEN = """
import json, os
os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"
from verl.trainer.ppo import core_algos
import verl.utils.config
@core_algos.register_policy_loss("ahpo")
def foreign(): ...
import hpo_plugin.verl.plugin
from omegaconf import OmegaConf
from hpo_plugin.verl.seams import prepare
facts = {}
for loss_mode in ("vanilla", "ahpo"):
    config = OmegaConf.create({
        "algorithm": {"adv_estimator": "ahpo"},
        "actor_rollout_ref": {"actor": {"policy_loss": {"loss_mode": loss_mode}, "loss_agg_mode": "token-mean"}},
    })
    try:
        prepare(config)
        facts[loss_mode] = None
    except Exception as error:
        facts[loss_mode] = [type(error).__name__, str(error)]
print(json.dumps(facts | {"foreign": core_algos.POLICY_LOSS_REGISTRY["ahpo"] is foreign}))
"""


VARIANT = (
    """
import json, sys
sys.modules["my_variant"] = module = type(sys)("my_variant")
exec("""
    + "'''"
    + """
# A user's module that imports verl's registry before it registers its own variant.
from verl.trainer.ppo import core_algos
from hpo_plugin.variants import VARIANTS, Variant, register_variant

def sqrt_alpha(counts, values):
    return (counts.positive / counts.negative.clamp(min=1)).sqrt().clamp(values["alpha_min"], 1.0)

register_variant(Variant("sqrt_hpo", "√-HPO", "α = √(p̂⁺ / p̂⁻)", sqrt_alpha, VARIANTS["ahpo"].settings))
"""
    + "'''"
    + """, module.__dict__)
from verl.trainer.ppo import core_algos
print(json.dumps([core_algos.get_adv_estimator_fn("sqrt_hpo").args, core_algos.get_policy_loss_fn("sqrt_hpo").args]))
"""
)


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
    """What verl loads by our entry points is ours, and wrapt: verl has imported torch and OmegaConf by then.

    benchmarks/startup.py has the milliseconds.
    """
    added = fresh(ADDED)[0]
    modules = [*added["hpo"], *added["hpo_cpu"]]
    assert "hpo_plugin.verl.plugin" in modules
    assert {name.partition(".")[0] for name in modules} <= {"hpo_plugin", "wrapt"}
    assert len([name for name in modules if name.startswith("hpo_plugin")]) <= 17
    assert len(modules) <= 36


@pytest.mark.timeout(400)
def test_estimators_and_losses_are_registered_when_verls_registry_is_imported_and_not_the_workers(loading):
    ours = dict.fromkeys(("hpo", "ahpo"), "hpo_plugin.verl.estimators")
    assert loading["estimators"] == ours
    assert loading["losses"] == dict.fromkeys(("hpo", "ahpo"), "hpo_plugin.verl.losses")
    assert loading["with_core_algos"] == ["verl.trainer.ppo.core_algos", "hpo_plugin.verl.estimators"]


@pytest.mark.timeout(400)
def test_a_plugin_that_cannot_load_is_logged_and_whatever_needs_it_raises_the_reason():
    """Verl would only log it at DEBUG. Here the hook that runs immediately fails, after the first was set."""
    facts, stderr = fresh(BROKEN)
    assert "the setup of hpo_plugin failed. Runs that do not use HPO continue; runs that use it stop" in stderr
    kind, message = facts["ahpo"]
    assert kind == "RegistrationError"
    assert "hpo_plugin.verl.seams" in message
    assert "did not load completely" in message
    assert facts["vanilla"] is None


@pytest.mark.timeout(400)
def test_a_name_that_was_taken_before_stays_its_owners_and_stops_only_runs_that_select_it():
    facts, _ = fresh(TAKEN)
    assert facts["foreign"]
    assert facts["vanilla"] is None
    kind, message = facts["ahpo"]
    assert kind == "RegistrationError"
    assert "the name is registered by __main__.foreign" in message


@pytest.mark.timeout(400)
def test_a_variant_that_is_registered_later_is_in_verls_registries_too():
    assert fresh(VARIANT)[0] == [["sqrt_hpo"], ["sqrt_hpo"]]


def test_a_failed_installation_keeps_its_reason(monkeypatch, caplog):
    monkeypatch.setattr(plugin, "FAILURE", None)
    monkeypatch.setitem(sys.modules, "wrapt", None)
    with caplog.at_level(logging.ERROR):
        plugin.load()
    assert plugin.FAILURE.startswith("ModuleNotFoundError: import of wrapt halted")
    assert "runs that use it stop" in caplog.text
    with pytest.raises(RegistrationError, match="import of wrapt halted"):
        HPOPolicyLossConfig(adv_estimator="ahpo", loss_mode="ahpo")


def test_a_plugin_verl_was_told_not_to_load_is_missed(monkeypatch):
    monkeypatch.delitem(sys.modules, "hpo_plugin.verl.plugin")
    with pytest.raises(RegistrationError, match="verl did not load the entry point hpo of"):
        require_registered("ahpo", "vanilla")


def test_what_is_registered_is_ours_and_without_a_variant_nothing_is_asked_for(monkeypatch):
    require_registered("ahpo", "ahpo")
    require_registered("hpo", "gspo")
    monkeypatch.setattr(plugin, "FAILURE", "broken")
    require_registered("grpo", "vanilla")


@pytest.mark.parametrize("name", ["hpo", "ahpo"])
def test_a_loss_that_somebody_overwrote_later_is_noticed(monkeypatch, name):
    """The function register_policy_loss of verl overwrites without a word."""
    monkeypatch.setattr(core_algos, "POLICY_LOSS_REGISTRY", dict(core_algos.POLICY_LOSS_REGISTRY))
    core_algos.register_policy_loss(name)(core_algos.compute_policy_loss_vanilla)
    with pytest.raises(RegistrationError, match=rf"policy loss '{name}'.*compute_policy_loss_vanilla"):
        require_registered(name, name)


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
    assert {name: estimator(name) for name in VARIANTS} == module.ADV_ESTIMATOR_REGISTRY
    assert {name: policy_loss(name) for name in VARIANTS} == module.POLICY_LOSS_REGISTRY


@pytest.mark.parametrize("registry", ["POLICY_LOSS_REGISTRY", "ADV_ESTIMATOR_REGISTRY"])
@pytest.mark.parametrize("name", ["hpo", "ahpo"])
def test_a_name_held_by_another_package_is_not_overwritten_and_the_others_are_registered(registry, name):
    def foreign() -> None: ...

    module = stand_in(**{registry: {name: foreign}})
    registration.register(module)
    assert getattr(module, registry)[name] is foreign
    held = [module.ADV_ESTIMATOR_REGISTRY.get(n) for n in VARIANTS] + [
        module.POLICY_LOSS_REGISTRY.get(n) for n in VARIANTS
    ]
    ours = [estimator(n) for n in VARIANTS] + [policy_loss(n) for n in VARIANTS]
    assert sum(a is b for a, b in zip(held, ours, strict=True)) == 3


def test_a_name_that_is_neither_verls_nor_a_variants_is_no_business_of_ours():
    require_registered("somebody_elses", "gspo")


def test_registering_a_variant_twice_is_refused_only_if_it_differs():
    register_variant(VARIANTS["ahpo"])
    with pytest.raises(ValueError, match="'ahpo' is already registered"):
        register_variant(Variant("ahpo", "A-HPO", "other", VARIANTS["ahpo"].alpha))
