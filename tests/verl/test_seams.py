"""The five places where verl has no extension point. These tests fail when verl moves one of them."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest
import torch
import verl
import verl.utils.config
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from hpo_plugin.errors import ConfigError
from hpo_plugin.verl import plugin, seams
from hpo_plugin.verl.registration import RegistrationError, require_registered

VERL = Path(verl.__file__).parent

OF_ESTIMATION = ["adv_estimator", "gamma", "lam", "num_repeat", "norm_adv_by_std_in_grpo", "config"]
SEAMS = {
    "verl.utils.config.validate_config": ["config", "use_reference_policy", "use_critic"],
    "verl.trainer.main_ppo.run_ppo": ["config", "task_runner_class"],
    "verl.trainer.ppo.metric_utils.compute_data_metrics": ["batch", "use_critic"],
    "verl.trainer.ppo.v1.utils.compute_advantage_for_multi_trajectories": ["data", "batch_keys", *OF_ESTIMATION],
    "verl.trainer.ppo.ray_trainer.compute_advantage": ["data", *OF_ESTIMATION],
}
"""Each seam, with the parameters that verl's function has."""

CALLERS = {
    "validate_config": [
        "trainer/main_ppo.py",
        "trainer/main_ppo_v0.py",
        "experimental/one_step_off_policy/main_ppo.py",
    ],
    "run_ppo": [
        "trainer/main_ppo.py",
        "experimental/one_step_off_policy/main_ppo.py",
        "experimental/fully_async_policy/fully_async_main.py",
    ],
    "compute_data_metrics": [
        "trainer/ppo/ray_trainer.py",
        "trainer/ppo/v1/trainer_base.py",
        "experimental/separation/ray_trainer.py",
    ],
    "compute_advantage_for_multi_trajectories": ["trainer/ppo/v1/trainer_base.py"],
    "compute_advantage": [
        "trainer/ppo/ray_trainer.py",
        "trainer/ppo/v1/utils.py",
        "experimental/separation/ray_trainer.py",
    ],
}


def function(seam: str) -> Any:
    module, _, name = seam.rpartition(".")
    return getattr(importlib.import_module(module), name)


def tree(path: str) -> ast.Module:
    return ast.parse((VERL / path).read_text(encoding="utf-8"))


# What verl has --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seam", SEAMS)
def test_verls_function_has_the_parameters_that_ours_passes_on(seam):
    original = function(seam).__wrapped__
    assert list(inspect.signature(original).parameters) == SEAMS[seam]
    assert original.__module__ == seam.rpartition(".")[0]


@pytest.mark.parametrize(("name", "path"), [(name, path) for name, paths in CALLERS.items() for path in paths])
def test_every_trainer_calls_it_by_the_name_in_the_module_where_we_put_ours(name, path):
    (module,) = (seam.rpartition(".")[0] for seam in SEAMS if seam.endswith(f".{name}"))
    nodes = list(ast.walk(tree(path)))
    imported = {(n.module, alias.name) for n in nodes if isinstance(n, ast.ImportFrom) for alias in n.names}
    defined = path == module.removeprefix("verl.").replace(".", "/") + ".py"
    assert defined or (module, name) in imported
    assert name in {n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}


def test_no_other_trainer_of_verl_computes_advantages_or_collects_metrics():
    """A new trainer needs a row in the table of trainers, and a look at whether it calls the seams."""
    found = {
        str(path.relative_to(VERL))
        for path in VERL.rglob("*.py")
        if "compute_data_metrics(" in path.read_text(encoding="utf-8")
    }
    assert found == {*CALLERS["compute_data_metrics"], "trainer/ppo/metric_utils.py"}


def test_ours_stands_where_the_trainers_took_it_from():
    for name, paths in CALLERS.items():
        for path in paths:
            # main_ppo of one-step-off and fully-async import run_ppo inside of main.
            module = importlib.import_module("verl." + path.removesuffix(".py").replace("/", "."))
            if hasattr(module, name):
                assert hasattr(getattr(module, name), "__wrapped__"), (path, name)


# What stands there ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seam", SEAMS)
def test_ours_is_a_plain_function_that_pickle_finds_under_verls_name(seam):
    ours = function(seam)
    assert inspect.isfunction(ours)
    assert pickle.loads(pickle.dumps(ours)) is ours
    assert cloudpickle.loads(cloudpickle.dumps(ours)) is ours


BY_VALUE = """
import sys
import cloudpickle, verl
from verl.utils.config import validate_config
from verl.trainer.main_ppo import run_ppo
from verl.trainer.ppo.metric_utils import compute_data_metrics
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.ppo import core_algos

class TaskRunner:
    def run(self, config):
        return [validate_config, run_ppo, compute_data_metrics, compute_advantage_for_multi_trajectories,
                compute_advantage, core_algos.get_adv_estimator_fn("ahpo"), core_algos.get_policy_loss_fn("ahpo")]

assert TaskRunner.__module__ == "__main__"
open(sys.argv[1], "wb").write(cloudpickle.dumps(TaskRunner))
open(sys.argv[2], "wb").write(cloudpickle.dumps(TaskRunner().run(None)))
"""

LOADED = """
import sys, pickle
for path in sys.argv[1:]:
    value = pickle.load(open(path, "rb"))
    functions = value().run(None) if isinstance(value, type) else value
    assert all(hasattr(f, "__wrapped__") for f in functions[:5]), functions
    assert functions[5].args == functions[6].args == ("ahpo",)
print("loaded")
"""


@pytest.mark.timeout(400)
def test_a_task_runner_of_main_that_names_all_of_them_travels_to_another_process(tmp_path):
    """Ray pickles a class of ``__main__`` by value; a proxy in the place of a function cannot be pickled at all."""
    files = [str(tmp_path / name) for name in ("class.pkl", "functions.pkl")]
    for script in (BY_VALUE, LOADED):
        (tmp_path / "script.py").write_text(script)
        done = subprocess.run(
            [sys.executable, str(tmp_path / "script.py"), *files], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("loaded\n")


@pytest.mark.parametrize(
    "moved",
    [
        SimpleNamespace(__name__="verl.utils.config"),
        SimpleNamespace(__name__="verl.utils.config", validate_config=lambda settings: settings),
        SimpleNamespace(__name__="verl.trainer.ppo.v1.utils"),
    ],
)
def test_a_seam_that_is_not_what_it_was_is_recorded_and_stops_only_runs_that_select_hpo(monkeypatch, moved, caplog):
    before, name = dict(vars(moved)), moved.__name__
    monkeypatch.setattr(plugin, "FAILURE", None)
    plugin._on_import(moved)
    assert vars(moved) == before
    assert plugin.FAILURE.startswith(f"RegistrationError: {name}.")
    assert "runs that use it stop" in caplog.text
    require_registered("grpo", "vanilla")
    with pytest.raises(RegistrationError, match="does not exist or has other parameters: hpo_plugin does not support"):
        require_registered("ahpo", "vanilla")


def test_where_compute_advantage_has_moved_hpo_runs_and_an_observed_run_outside_of_v1_is_refused(monkeypatch, caplog):
    from verl.trainer.ppo import ray_trainer

    moved = SimpleNamespace(__name__="verl.trainer.ppo.ray_trainer")
    monkeypatch.setattr(plugin, "FAILURE", None)
    plugin._on_import(moved)
    assert (plugin.FAILURE, caplog.text, vars(moved)) == (None, "", {"__name__": "verl.trainer.ppo.ray_trainer"})
    require_registered("ahpo", "ahpo")
    monkeypatch.setattr(ray_trainer, "compute_advantage", inspect.unwrap(ray_trainer.compute_advantage))
    config = experimental("fully_async_policy", "algorithm.adv_estimator=grpo", "+algorithm.hpo.observe=true")
    with pytest.raises(
        RegistrationError, match=r"observe=True cannot observe the fully-async trainer, because this version .*has no"
    ):
        seams.prepare(config)
    monkeypatch.undo()
    seams.prepare(config)


def test_a_run_is_not_observed_by_half_where_the_plugin_could_not_be_set_up(monkeypatch):
    monkeypatch.setattr(plugin, "FAILURE", "RegistrationError: something moved")
    config = experimental("one_step_off_policy", "algorithm.adv_estimator=grpo", "+algorithm.hpo.observe=true")
    with pytest.raises(RegistrationError, match=r"did not load completely in this process: .*something moved"):
        seams.prepare(config)


def test_the_hooks_are_set_on_the_modules_of_the_seams():
    assert set(plugin.SEAM_MODULES) == set(seams.SEAMS) == {seam.rpartition(".")[0] for seam in SEAMS}


# Before the first rollout ---------------------------------------------------------------------------------------------


def test_verls_own_check_runs_with_what_it_was_given(recipe, monkeypatch):
    received = []

    def original(config, use_reference_policy, use_critic):
        received.append((config, use_reference_policy, use_critic))
        return "checked"

    config = recipe(**{"actor_rollout_ref.rollout.n": 8})
    assert seams._validate_config(original, config, False, use_critic=True) == "checked"
    assert seams._validate_config(original, config=config, use_reference_policy=True, use_critic=False) == "checked"
    assert received == [(config, False, True), (config, True, False)]


def experimental(name: str, *overrides: str) -> DictConfig:
    """The config of one of verl's experimental mains."""
    directory = VERL / "experimental" / name / "config"
    main = {"fully_async_policy": "fully_async_ppo_trainer", "one_step_off_policy": "one_step_off_ppo_trainer"}[name]
    search = f"hydra.searchpath=[file://{VERL}/trainer/config]"
    batches = ("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1", "actor_rollout_ref.rollout.n=8")
    with initialize_config_dir(str(directory), version_base=None):
        return compose(main, [search, *batches, *overrides])


class Started(Exception):
    """Ray would have been started."""


@pytest.fixture
def run_ppo(monkeypatch):
    """Verl's ``run_ppo`` as its mains import it, up to where it starts Ray."""
    from verl.trainer import main_ppo

    def start() -> None:
        raise Started

    monkeypatch.setattr(main_ppo.ray, "is_initialized", start)
    return main_ppo.run_ppo


@pytest.mark.parametrize("main", ["fully_async_policy", "one_step_off_policy"])
@pytest.mark.parametrize(
    "selected",
    [
        ["algorithm.adv_estimator=ahpo", "actor_rollout_ref.actor.policy_loss.loss_mode=ahpo"],
        ["algorithm.adv_estimator=grpo", "actor_rollout_ref.actor.policy_loss.loss_mode=ahpo"],
        ["+algorithm.policy_loss=ahpo"],
    ],
)
def test_the_experimental_trainers_are_set_up_by_run_ppo(run_ppo, main, selected):
    """fully-async never calls ``validate_config``. Its bypass mode changes the loss mode of the driver's copy only."""
    config = experimental(main, *selected)
    assert config.algorithm.rollout_correction.bypass_mode
    with pytest.raises(Started):
        run_ppo(config, task_runner_class=None)
    assert config.algorithm.adv_estimator == "ahpo"
    policy_loss = config.actor_rollout_ref.actor.policy_loss
    assert (policy_loss._target_, policy_loss.adv_estimator) == (seams.OUR_TARGET, "ahpo")


@pytest.mark.parametrize("main", ["fully_async_policy", "one_step_off_policy"])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["+algorithm.policy_loss=banana"], "banana is not a preset"),
        (["actor_rollout_ref.actor.policy_loss.loss_mode=ahpo"], "does not support algorithm.adv_estimator=gae"),
        (["algorithm.adv_estimator=ahpo", "algorithm.use_kl_in_reward=True"], "use_kl_loss=True"),
    ],
)
def test_the_experimental_trainers_stop_before_ray_starts(run_ppo, main, wrong, said):
    with pytest.raises(ConfigError, match=said):
        run_ppo(experimental(main, *wrong), task_runner_class=None)


@pytest.mark.parametrize("main", ["fully_async_policy", "one_step_off_policy"])
def test_the_experimental_trainers_start_without_hpo_as_without_the_plugin(run_ppo, main):
    config = experimental(main, "algorithm.adv_estimator=grpo")
    before = OmegaConf.to_container(config)
    with pytest.raises(Started):
        run_ppo(config, None)
    assert OmegaConf.to_container(config) == before


def test_a_key_that_nothing_applied_stops_v1_before_the_first_update():
    """A trainer of somebody's own that calls neither ``validate_config`` nor ``run_ppo``."""
    from verl import DataProto
    from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

    data = DataProto.from_dict(tensors={"response_mask": torch.ones(1, 1)})
    config = OmegaConf.create({"policy_loss": "ahpo", "adv_estimator": "gae"})
    with pytest.raises(ConfigError, match=r"algorithm.policy_loss=ahpo was not applied, because .*adv_estimator=ahpo"):
        compute_advantage_for_multi_trajectories(data, ["u_0_0"], "gae", config=config)


def test_nothing_of_verls_workers_is_touched():
    from verl.workers import engine_workers

    owner = engine_workers.ActorRolloutRefWorker
    assert owner.actor_worker_cls is owner.ref_worker_cls is engine_workers.TrainingWorker
    assert engine_workers.TrainingWorker.__module__ == "verl.workers.engine_workers"
    assert "hpo" not in os.environ.get("VERL_USE_EXTERNAL_MODULES", "")
