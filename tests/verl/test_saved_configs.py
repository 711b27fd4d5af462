"""Configs and runs of version 0.1.0 still work: names in saved configs, groups in the command of a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf, open_dict
from verl.trainer.ppo import core_algos  # noqa: F401  registers hpo and ahpo
from verl.utils.config import omega_conf_to_dataclass

from hpo_plugin.check.compose import compose as compose_by_name
from hpo_plugin.configs import RENAMED_GROUPS, config_names
from hpo_plugin.errors import ConfigError
from hpo_plugin.runs.launch import refuse_another_run
from hpo_plugin.runs.training import TrainingError
from hpo_plugin.verl import seams
from hpo_plugin.verl.config import HPOPolicyLossConfig

#: actor_rollout_ref.actor.policy_loss and algorithm.hpo as a run of version 0.1.0 saved them, beside verl's own keys.
SAVED: dict[str, Any] = {
    "actor_rollout_ref.actor.policy_loss": {
        "_target_": "hpo_plugin.glue.config.HPOPolicyLossConfig",
        "loss_mode": "${policy_loss_presets.${algorithm.policy_loss}.loss_mode}",
        "adv_estimator": "${algorithm.adv_estimator}",
        "alpha": "${algorithm.hpo.alpha}",
        "alpha_min": "${algorithm.hpo.alpha_min}",
    },
    "algorithm.hpo": {"alpha": 0.6, "alpha_min": 0.2, "weigh": None},
}


@pytest.fixture
def saved(tmp_path) -> DictConfig:
    """A whole config with the saved nodes, from a file."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("hpo_trainer", ["actor_rollout_ref.rollout.n=8"])
    with open_dict(config):
        for key, node in SAVED.items():
            OmegaConf.update(config, key, node, merge=False)
    OmegaConf.save(config, tmp_path / "config.yaml")
    loaded = OmegaConf.load(tmp_path / "config.yaml")
    assert isinstance(loaded, DictConfig)
    return loaded


def test_a_saved_config_selects_what_it_selected(saved: DictConfig):
    selection, lines = seams.prepare(saved)
    assert selection is not None
    assert (selection.variant.name, selection.settings["alpha_min"], lines) == ("ahpo", 0.2, [])
    policy_loss = omega_conf_to_dataclass(saved.actor_rollout_ref.actor.policy_loss)
    assert isinstance(policy_loss, HPOPolicyLossConfig)
    assert (policy_loss.loss_mode, policy_loss.adv_estimator) == ("ahpo", "ahpo")


def test_what_version_010_let_a_user_choose_and_is_gone_is_refused(saved: DictConfig):
    saved.algorithm.hpo.weigh = "loss"
    with pytest.raises(ConfigError, match=r"algorithm\.hpo\.weigh=loss is not a setting"):
        seams.prepare(saved)


def test_the_entry_point_of_version_010_is_the_present_one():
    from hpo_plugin.glue import plugin as old
    from hpo_plugin.verl import plugin

    assert old.plugin is plugin


@pytest.mark.parametrize(("old", "new"), RENAMED_GROUPS.items())
def test_a_renamed_group_is_explained(old: str, new: str):
    name = "hpo_recipe" if old.startswith("recipe") else "countdown_cpu"
    config, finding = compose_by_name(name, [f"{old}=x", "data.seed=1"])
    assert config is None
    assert f"{old}=x is now {new}=x" in finding.found


@pytest.mark.e2e
@pytest.mark.timeout(200)
def test_a_renamed_group_is_explained_by_verls_own_command():
    command = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-name=hpo_recipe", "recipe/cluster=2x8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode != 0
    assert "recipe/cluster=2x8 is now hpo/cluster=2x8" in done.stderr


def test_other_applications_with_groups_of_these_names_are_left_alone():
    from hydra_plugins.hpo_plugin_searchpath import _refuse_renamed_groups

    _refuse_renamed_groups(["--config-name=their_own", "recipe/task=x", "backend=y"])
    _refuse_renamed_groups(["recipe/task=x"])


def test_every_application_sees_groups_below_hpo_only():
    from hpo_plugin import configs

    folder = Path(configs.__file__).parent
    groups = {path.name for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert groups == {"hpo"}
    assert {"hpo", "hpo_recipe", "countdown_cpu", "laptop_cpu"} <= config_names()


def test_a_launched_run_is_resumed_under_the_new_names_of_its_groups(tmp_path):
    known = {"config_name": "hpo_recipe", "overrides": ["recipe/task=countdown3", "data.seed=1"]}
    asked = {"config_name": "hpo_recipe", "overrides": ["hpo/task=countdown3", "data.seed=1"]}
    refuse_another_run(known, asked, tmp_path)
    with pytest.raises(TrainingError, match="hpo/task=countdown4"):
        refuse_another_run(known, asked | {"overrides": ["hpo/task=countdown4", "data.seed=1"]}, tmp_path)
