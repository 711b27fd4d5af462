"""Where verl has HPO itself, the plugin steps aside; another package that holds a name is still an error."""

import logging
from types import SimpleNamespace

import pytest

from hpo_plugin.glue import registration
from hpo_plugin.glue.arms import HYSTERETIC
from hpo_plugin.glue.registration import RegistrationError

LINE = "verl has HPO and A-HPO built in: hpo_plugin steps aside in their favor"


@pytest.mark.timeout(600)
def test_the_built_in_algorithms_stay_registered(built_in):
    assert set(built_in["registered"]) == {f"{kind} {name}" for kind in ("estimator", "loss") for name in HYSTERETIC}
    assert set(built_in["registered"].values()) == {"verl.trainer.ppo.core_algos"}


@pytest.mark.timeout(600)
def test_verls_own_worker_trains(built_in):
    assert built_in["worker"] == "verl.workers.engine_workers"


@pytest.mark.timeout(600)
def test_one_line_says_so(built_in):
    assert built_in["log"].count(LINE) == 1


@pytest.mark.timeout(600)
def test_check_says_so(built_in):
    assert built_in["check"] == ["hpo and ahpo are built into this verl; hpo_plugin steps aside"]


@pytest.mark.timeout(600)
def test_command_lines_go_on_working_and_verl_refuses_what_contradicts_itself(built_in):
    *good, contradictory = built_in["configs"].items()
    assert [(name, said) for name, said in good if said != "passed"] == []
    assert "two different algorithms" in contradictory[1]


def registries(**held):
    """Of a verl in which these names are taken, each by a module."""

    def function(module):
        def held_function(): ...

        held_function.__module__ = module
        return held_function

    return SimpleNamespace(
        ADV_ESTIMATOR_REGISTRY={name: function(module) for name, module in held.items()},
        POLICY_LOSS_REGISTRY={name: function(module) for name, module in held.items()},
    )


def test_a_verl_that_has_only_one_of_the_two_is_a_conflict():
    core_algos = registries(hpo=registration.CORE_ALGOS)
    assert not registration.is_built_in(core_algos)
    with pytest.raises(RegistrationError, match="already registered"):
        registration.register(core_algos)


def test_another_package_is_a_conflict(caplog):
    core_algos = registries(hpo="other.package", ahpo="other.package")
    with caplog.at_level(logging.WARNING), pytest.raises(RegistrationError, match="already registered"):
        registration.register(core_algos)
    assert LINE not in caplog.text


def test_nothing_is_registered_beside_the_built_in(caplog):
    core_algos = registries(hpo=registration.CORE_ALGOS, ahpo=registration.CORE_ALGOS)
    before = dict(core_algos.POLICY_LOSS_REGISTRY)
    with caplog.at_level(logging.WARNING):
        registration.register(core_algos)
    assert before == core_algos.POLICY_LOSS_REGISTRY
    assert caplog.messages == [LINE]


@pytest.mark.timeout(600)
def test_the_contributed_scripts_select_what_they_are_called_after_and_verl_accepts_them(built_in):
    assert built_in["scripts"] == {
        "run_qwen3_8b_fsdp.sh": ["ahpo", "fsdp", "passed"],
        "run_qwen3_8b_megatron.sh": ["ahpo", "megatron", "passed"],
    }


@pytest.mark.e2e
@pytest.mark.timeout(1000)
def test_verls_trainer_trains_with_the_built_in_algorithms(in_tree, patched):
    """The run of tests/cpu: a policy loss without α of the batch would stop it, so α reaches the workers."""
    test = "tests/cpu/test_e2e.py::test_default_rollout_trains_and_agrees_with_the_trainer_to_1e_5"
    done = in_tree(patched, "-m", "pytest", "-q", "-m", "e2e", test, plugins="auto", timeout=900)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
