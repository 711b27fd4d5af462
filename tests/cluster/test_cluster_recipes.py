"""The manifest and the commands in recipes/cluster are ones that Ray, this package's command line and verl accept."""

import shlex
from pathlib import Path

import pytest
import yaml

pytest.importorskip("verl")

import typer.main

from hpo_plugin.check.checks import check_algorithm, check_by_verl
from hpo_plugin.check.compose import compose
from hpo_plugin.cli.app import app
from hpo_plugin.cpu.checks import CPUS_PER_RANK, RAY_CPU_SLACK
from hpo_plugin.runs.launch import plan, refuse_own_keys

RECIPES = Path(__file__).parents[2] / "recipes" / "cluster"


def parsed(words):
    """The arguments of ``hpo-plugin launch`` as the command line reads them, and the config they compose."""
    command = typer.main.get_command(app).commands["launch"]
    values = command.make_context("launch", list(words)).params
    refuse_own_keys(values["overrides"])
    config, finding = compose(values["config_name"], values["overrides"])
    assert config is not None, finding
    for checked in (*check_algorithm(config), check_by_verl(config)):
        assert checked.ok, checked
    assert plan(config, values["config_name"], values["overrides"]).save_every > 0
    return values, config


@pytest.fixture(scope="module")
def manifest():
    return yaml.safe_load((RECIPES / "kuberay.yaml").read_text())


def test_the_rayjob_submits_a_launch_that_verl_accepts_with_its_run_on_the_shared_volume(manifest):
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    program, command, *words = shlex.split(manifest["spec"]["entrypoint"])
    assert (program, command) == ("hpo-plugin", "launch")
    values, _ = parsed(words)
    groups = [manifest["spec"]["rayClusterSpec"]["headGroupSpec"]]
    groups += manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    for group in groups:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert str(values["run_dir"]).startswith("/shared/")
        assert "persistentVolumeClaim" in volumes[mounts["/shared"]]
        assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory"}


def test_the_rayjobs_workers_have_what_the_config_asks_for(manifest):
    _, config = parsed(shlex.split(manifest["spec"]["entrypoint"])[2:])
    (workers,) = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert {workers[key] for key in ("replicas", "minReplicas", "maxReplicas")} == {config.trainer.nnodes}
    (container,) = workers["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert int(limits["nvidia.com/gpu"]) == config.trainer.n_gpus_per_node
    assert workers["rayStartParams"]["num-cpus"] == limits["cpu"]
    assert int(limits["cpu"]) >= CPUS_PER_RANK * config.trainer.n_gpus_per_node + RAY_CPU_SLACK


def test_a_rayjob_that_lost_its_head_is_started_again_and_each_start_submits_once(manifest):
    assert manifest["spec"]["submissionMode"] == "K8sJobMode"
    assert manifest["spec"]["backoffLimit"] > 0
    assert manifest["spec"]["submitterConfig"]["backoffLimit"] == 0


def test_the_arguments_of_the_readme_are_those_of_a_launch():
    _, _, rest = (RECIPES / "README.md").read_text().partition("\narguments=(\n")
    block, end, _ = rest.partition("\n)\n")
    assert end
    parsed(shlex.split(block, comments=True))
