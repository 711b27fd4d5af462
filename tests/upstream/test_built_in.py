"""Where verl has HPO itself, the plugin steps aside; another package that holds a name is still an error."""

import os
import subprocess
from types import SimpleNamespace

import pytest
import torch

from contrib.upstream.contribution import FILES
from hpo_plugin.verl import registration
from hpo_plugin.verl.presets import preset_rows
from hpo_plugin.verl.registration import RegistrationError

CORE_ALGOS = "verl.trainer.ppo.core_algos"
NAMES = ("hpo", "ahpo")
LINE = "verl provides hpo and ahpo as advantage estimators; hpo_plugin does not register its own"


@pytest.mark.timeout(600)
def test_verls_estimators_stay_registered_and_ours_fills_the_rest(built_in):
    assert built_in["registered"] == {
        "estimator hpo": CORE_ALGOS,
        "estimator ahpo": CORE_ALGOS,
        "estimator ours": "hpo_plugin.verl.estimators",
        **{f"loss {name}": "hpo_plugin.verl.losses" for name in (*NAMES, "ours")},
    }


@pytest.mark.timeout(600)
def test_a_process_logs_only_what_is_not_as_expected(built_in):
    """The facts contain estimators of verl that do something else, and sessions of several outputs."""
    said = [line for line in built_in["log"].splitlines() if "verl's built-in" in line]
    assert len(said) == 2
    assert "counts each output of a session as a response" in said[0]
    assert "no hpo metrics are logged for a batch of verl's built-in estimator ahpo: its advantages differ" in said[1]
    assert "built in" not in built_in["log"]


@pytest.mark.timeout(600)
def test_another_estimator_of_verl_has_no_metrics_of_ours(built_in):
    assert built_in["others"] == {"another weight": {}, "not finite": {}, "no uid": {}}


@pytest.mark.timeout(600)
def test_check_says_so(built_in):
    assert built_in["check"] == [LINE]


@pytest.mark.timeout(600)
def test_command_lines_work_as_before_and_what_contradicts_itself_is_refused(built_in):
    good, refused = dict(list(built_in["configs"].items())[:-6]), list(built_in["configs"].values())[-6:]
    assert {f"hpo_trainer algorithm.policy_loss={preset}" for preset in preset_rows()} <= set(good)
    assert {name: said for name, said in good.items() if said != "passed"} == {}
    for said, message in zip(
        refused,
        (
            "two different algorithms",
            "α on the advantages of rloo needs hpo_plugin's estimator ahpo, but this version of verl provides ahpo",
            "α on the advantages of rloo needs hpo_plugin's estimator ahpo, but this version of verl provides ahpo",
            "α on the advantages of rloo needs hpo_plugin's estimator ahpo, but this version of verl provides ahpo",
            "algorithm.use_kl_in_reward=True",
            "algorithm.policy_loss=gspo contradicts",
        ),
        strict=True,
    ):
        assert message in said


@pytest.mark.timeout(600)
def test_the_plugin_checks_and_sets_only_what_is_its_own(built_in):
    prepared = dict(built_in["prepared"])
    without = prepared.pop("hpo_trainer algorithm.policy_loss=gspo")
    assert without["selection"] == "no α"
    assert (without["lines"], without["unchanged"]) == ([], True)
    with_our_loss = prepared.pop("hpo_trainer algorithm.policy_loss=ahpo")
    assert with_our_loss["selection"].startswith("A-HPO")
    assert with_our_loss["lines"] == []
    by_preset = prepared.pop("ppo_trainer +algorithm.policy_loss=ahpo")
    assert by_preset["selection"].startswith("A-HPO")
    assert by_preset["lines"] == [
        "algorithm.adv_estimator: gae -> ahpo",
        "actor_rollout_ref.actor.policy_loss.loss_mode: vanilla -> ahpo",
    ]
    assert len(prepared) == 2
    for name, by_verl in prepared.items():
        assert by_verl == {
            "selection": None,
            "lines": [],
            "unchanged": True,
            "check": ["ahpo, which verl provides and checks itself"],
        }, name


@pytest.mark.timeout(600)
def test_advantages_are_the_plugins_to_1e_6_and_so_are_the_metrics(built_in):
    assert len(built_in["batches"]) == 5
    for name, facts in built_in["batches"].items():
        for column in ("advantages", "returns"):
            own, verls = (torch.tensor(values) for values in facts[column])
            assert own[0].any(), name
            assert not verls[16:].any(), name
            torch.testing.assert_close(verls, own, rtol=1e-6, atol=1e-7)
        own, verls = facts["metrics"]
        assert verls == pytest.approx(own, rel=1e-6), name
        assert own["actor/hpo/share_degenerate_groups"] == 0.5


@pytest.mark.timeout(600)
def test_a_preset_that_was_not_applied_is_refused(built_in):
    assert "algorithm.policy_loss=ahpo was not applied" in built_in["not applied"]


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


#: Whether a run is left to verl (None), refused, or made by this package.
RUNS = {
    "both": ["algorithm.adv_estimator=ahpo", "actor_rollout_ref.actor.policy_loss.loss_mode=ahpo"],
    "estimator": ["algorithm.adv_estimator=ahpo"],
    "loss": ["algorithm.adv_estimator=grpo", "actor_rollout_ref.actor.policy_loss.loss_mode=hpo"],
    "preset": ["+algorithm.policy_loss=ahpo"],
    "another": ["algorithm.adv_estimator=grpo"],
}
REFUSED = "refused"


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((), {"both": "ahpo", "estimator": "ahpo", "loss": "hpo", "preset": "ahpo"}),
        (("ADV_ESTIMATOR_REGISTRY",), {"both": "ahpo", "estimator": None, "loss": "hpo", "preset": "ahpo"}),
        (
            ("ADV_ESTIMATOR_REGISTRY", "POLICY_LOSS_REGISTRY"),
            {"both": None, "estimator": None, "loss": None, "preset": None},
        ),
        # Whether such a loss applies α itself is not known: it is not combined with our estimator.
        (("POLICY_LOSS_REGISTRY",), {"both": REFUSED, "estimator": "ahpo", "loss": None, "preset": REFUSED}),
    ],
)
def test_each_piece_that_verl_has_is_left_to_verl(monkeypatch, parts, expected):
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    from hpo_plugin.check.compose import compose
    from hpo_plugin.verl.seams import prepare

    verls = registries(**dict.fromkeys(NAMES, CORE_ALGOS))
    for registry in ("ADV_ESTIMATOR_REGISTRY", "POLICY_LOSS_REGISTRY"):
        others = {name: value for name, value in getattr(core_algos, registry).items() if name not in NAMES}
        monkeypatch.setattr(core_algos, registry, others | (getattr(verls, registry) if registry in parts else {}))
    registration.register(core_algos)
    for registry in parts:
        assert {name: getattr(core_algos, registry)[name] for name in NAMES} == getattr(verls, registry)
    assert (registration.describe_built_in(core_algos) is None) == (not parts)

    def run(overrides):
        config, finding = compose("ppo_trainer", ["actor_rollout_ref.rollout.n=8", *overrides])
        assert config is not None, finding
        try:
            selection = prepare(config)[0]
        except RegistrationError as error:
            return REFUSED if "the name is registered by" in str(error) else str(error)
        return None if selection is None else getattr(selection.variant, "name", "no variant")

    assert {name: run(overrides) for name, overrides in RUNS.items()} == expected | {"another": "no variant"}


@pytest.mark.timeout(600)
def test_the_contributed_script_selects_what_it_is_called_after_and_verl_accepts_it(built_in):
    assert built_in["scripts"] == {"run_qwen3_8b_fsdp.sh": ["ahpo", "fsdp", "passed"]}


@pytest.mark.parametrize(
    ("has_lock", "environment", "launcher"),
    [
        (True, {}, "uv"),
        (False, {}, "python3"),
        (True, {"VERL_USE_UV": "0"}, "python3"),
        (True, {"DEVICE": "npu"}, "python3"),
    ],
)
def test_the_contributed_script_uses_uv_where_verl_has_its_lock_file(tmp_path, has_lock, environment, launcher):
    for name in ("uv", "python3"):
        stub = tmp_path / name
        stub.write_text(f"#!/bin/bash\nprintf '%s\\0' {name} \"$@\"\n")
        stub.chmod(0o755)
    if has_lock:
        (tmp_path / "uv.lock").touch()
    script = FILES / "examples/hpo_trainer/run_qwen3_8b_fsdp.sh.in"
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
    assert ("--extra fsdp" in " ".join(said)) == (launcher == "uv")


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_verls_trainer_trains_with_the_built_in_algorithms(in_tree, patched):
    """The run of tests/cpu, with verl's estimator and our policy loss."""
    test = "tests/cpu/test_e2e.py::test_default_rollout_trains_and_agrees_with_the_trainer_to_1e_5"
    done = in_tree(patched, "-m", "pytest", "-q", "-m", "e2e", test, plugins="auto", timeout=900)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
