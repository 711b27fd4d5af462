"""Where verl has HPO itself, the plugin steps aside; another package that holds a name is still an error."""

import logging
import os
import subprocess
from types import SimpleNamespace

import pytest

from contrib.upstream.contribution import FILES
from hpo_plugin.verl import registration
from hpo_plugin.verl.presets import preset_rows
from hpo_plugin.verl.registration import RegistrationError

CORE_ALGOS = "verl.trainer.ppo.core_algos"
NAMES = ("hpo", "ahpo")
LINE = "verl has HPO and A-HPO built in: hpo_plugin steps aside in their favor"


@pytest.mark.timeout(600)
def test_the_built_in_algorithms_stay_registered(built_in):
    assert set(built_in["registered"]) == {f"{kind} {name}" for kind in ("estimator", "loss") for name in NAMES}
    assert set(built_in["registered"].values()) == {CORE_ALGOS}


@pytest.mark.timeout(600)
def test_one_line_says_so_in_each_process(built_in):
    """The driver and every worker import the registry, and each is a process like the one that is looked at here."""
    assert built_in["log"].count(LINE) == 1


@pytest.mark.timeout(600)
def test_check_says_so(built_in):
    assert built_in["check"] == ["hpo and ahpo are built into this verl; hpo_plugin steps aside"]


@pytest.mark.timeout(600)
def test_command_lines_go_on_working_and_verl_refuses_what_contradicts_itself(built_in):
    *good, contradictory = built_in["configs"].items()
    assert {f"hpo_trainer algorithm.policy_loss={preset}" for preset in preset_rows()} <= {name for name, _ in good}
    assert [(name, said) for name, said in good if said != "passed"] == []
    assert "two different algorithms" in contradictory[1]


@pytest.mark.timeout(600)
def test_the_plugin_checks_and_sets_nothing_where_verls_own_algorithms_are_selected(built_in):
    prepared = dict(built_in["prepared"])
    without = prepared.pop("hpo_trainer algorithm.policy_loss=gspo")
    assert without["selection"] == "no hysteretic weights"
    assert (without["lines"], without["unchanged"]) == ([], True)
    by_preset = prepared.pop("ppo_trainer +algorithm.policy_loss=ahpo")
    assert by_preset["selection"] is None
    assert by_preset["lines"] == [
        "algorithm.adv_estimator: gae -> ahpo",
        "actor_rollout_ref.actor.policy_loss.loss_mode: vanilla -> ahpo",
    ]
    assert prepared
    for name, by_verl in prepared.items():
        assert by_verl == {
            "selection": None,
            "lines": [],
            "unchanged": True,
            "check": ["verl's own hpo and ahpo, which verl checks itself"],
        }, name


@pytest.mark.timeout(600)
def test_advantages_and_metrics_are_verls_own(built_in):
    """A metric that the plugin added would replace verl's own α, which has the same name."""
    assert built_in["seams"]
    assert {name: facts for name, facts in built_in["seams"].items() if facts != {"same": True, "added": []}} == {}


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


@pytest.mark.parametrize("part", ["ADV_ESTIMATOR_REGISTRY", "POLICY_LOSS_REGISTRY"])
def test_a_verl_that_has_a_part_keeps_it_and_the_runs_that_select_hpo_stop(caplog, monkeypatch, part):
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    from hpo_plugin.check.compose import compose
    from hpo_plugin.verl.seams import prepare

    built_in = getattr(registries(**dict.fromkeys(NAMES, CORE_ALGOS)), part)
    for registry in ("ADV_ESTIMATOR_REGISTRY", "POLICY_LOSS_REGISTRY"):
        others = {name: value for name, value in getattr(core_algos, registry).items() if name not in NAMES}
        monkeypatch.setattr(core_algos, registry, others | built_in if registry == part else others)
    with caplog.at_level(logging.WARNING):
        registration.register(core_algos)
    assert not registration.is_built_in(core_algos)
    assert LINE not in caplog.text
    assert {name: getattr(core_algos, part)[name] for name in NAMES} == built_in

    def run(*overrides):
        config, finding = compose("ppo_trainer", ["actor_rollout_ref.rollout.n=8", *overrides])
        assert config is not None, finding
        return prepare(config)[0]

    for overrides in (
        ["algorithm.adv_estimator=ahpo", "actor_rollout_ref.actor.policy_loss.loss_mode=ahpo"],
        ["algorithm.adv_estimator=grpo", "actor_rollout_ref.actor.policy_loss.loss_mode=hpo"],
        ["+algorithm.policy_loss=ahpo"],
    ):
        with pytest.raises(RegistrationError, match=r"part of HPO built in.* an hpo_plugin that was made for it"):
            run(*overrides)
    assert run("algorithm.adv_estimator=grpo").variant is None


def test_nothing_is_registered_beside_the_built_in(caplog):
    core_algos = registries(hpo=CORE_ALGOS, ahpo=CORE_ALGOS)
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


@pytest.mark.parametrize("engine", ["fsdp", "megatron"])
@pytest.mark.parametrize(
    ("has_lock", "environment", "launcher"),
    [
        (True, {}, "uv"),
        (False, {}, "python3"),
        (True, {"VERL_USE_UV": "0"}, "python3"),
        (True, {"DEVICE": "npu"}, "python3"),
    ],
)
def test_the_contributed_scripts_use_uv_where_verl_has_its_lock_file(tmp_path, engine, has_lock, environment, launcher):
    for name in ("uv", "python3"):
        stub = tmp_path / name
        stub.write_text(f"#!/bin/bash\nprintf '%s\\0' {name} \"$@\"\n")
        stub.chmod(0o755)
    if has_lock:
        (tmp_path / "uv.lock").touch()
    script = FILES / f"examples/hpo_trainer/run_qwen3_8b_{engine}.sh.in"
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(script), "trainer.nnodes=2"],
        cwd=tmp_path,
        env=os.environ | {"PATH": path} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    said = done.stdout.split("\0")[:-1]
    assert said[0] == launcher
    assert ("verl.trainer.main_ppo" in said, said[-1]) == (True, "trainer.nnodes=2")
    workers = [
        argument for argument in said if argument.startswith("ray_kwargs.ray_init.runtime_env.py_executable=uv ")
    ]
    assert len(workers) == (launcher == "uv")
    assert (f"--extra {engine}" in " ".join(said)) == (launcher == "uv")


@pytest.mark.e2e
@pytest.mark.timeout(1000)
def test_verls_trainer_trains_with_the_built_in_algorithms(in_tree, patched):
    """The run of tests/cpu: a policy loss without α of the batch would stop it, so α reaches the workers."""
    test = "tests/cpu/test_e2e.py::test_default_rollout_trains_and_agrees_with_the_trainer_to_1e_5"
    done = in_tree(patched, "-m", "pytest", "-q", "-m", "e2e", test, plugins="auto", timeout=900)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
