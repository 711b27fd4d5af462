"""What a config for the CPU backend must satisfy, and that it is said before anything starts."""

import os
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from hpo_plugin.cpu import checks
from hpo_plugin.cpu.checks import check_config


def config(**changes):
    base = OmegaConf.create(
        {
            "actor_rollout_ref": {"actor": {"strategy": "fsdp2"}, "ref": {"strategy": "fsdp2"}},
            "trainer": {"n_gpus_per_node": 1, "nnodes": 1},
            "ray_kwargs": {"ray_init": {"num_gpus": 1, "num_cpus": 12}},
        }
    )
    for key, value in changes.items():
        OmegaConf.update(base, key.replace("__", "."), value)
    return base


@pytest.fixture
def cpu_platform(monkeypatch):
    monkeypatch.setenv("VERL_PLATFORM", "cpu")


@pytest.mark.usefixtures("cpu_platform")
def test_the_default_config_passes():
    check_config(config())


@pytest.mark.parametrize("value", [None, "nvidia"])
def test_another_platform_is_refused_with_what_to_do(monkeypatch, value):
    monkeypatch.delenv("VERL_PLATFORM", raising=False)
    if value:
        monkeypatch.setenv("VERL_PLATFORM", value)
    with pytest.raises(RuntimeError, match="Set VERL_PLATFORM=cpu in the environment"):
        check_config(config())


@pytest.mark.usefixtures("cpu_platform")
@pytest.mark.parametrize("installed", [True, False])
def test_the_vllm_rollout_needs_vllm(monkeypatch, installed):
    monkeypatch.setattr(checks, "find_spec", lambda name: object() if installed else None)
    check_config(config(actor_rollout_ref__rollout__name="hf_cpu"))
    if installed:
        check_config(config(actor_rollout_ref__rollout__name="vllm"))
    else:
        with pytest.raises(ModuleNotFoundError, match=r"rollout\.name=vllm.*`make install-vllm`.*hpo/cpu_rollout=hf"):
            check_config(config(actor_rollout_ref__rollout__name="vllm"))


@pytest.mark.usefixtures("cpu_platform")
@pytest.mark.parametrize("role", ["actor", "ref"])
@pytest.mark.parametrize("strategy", ["fsdp", "megatron"])
def test_another_strategy_is_refused_by_its_config_key(role, strategy):
    with pytest.raises(
        ValueError,
        match=rf"actor_rollout_ref\.{role}\.strategy={strategy} is not supported.*Set .*\.{role}\.strategy=fsdp2",
    ):
        check_config(config(**{f"actor_rollout_ref__{role}__strategy": strategy}))


@pytest.mark.usefixtures("cpu_platform")
def test_more_ranks_than_logical_gpus_are_refused():
    with pytest.raises(ValueError, match=r"num_gpus=1 logical.*2 ranks.*Set ray_kwargs\.ray_init\.num_gpus=2"):
        check_config(config(trainer__n_gpus_per_node=2))


@pytest.mark.usefixtures("cpu_platform")
def test_too_few_logical_cpus_are_refused():
    changes = {"trainer__n_gpus_per_node": 4, "ray_kwargs__ray_init__num_gpus": 4}
    with pytest.raises(ValueError, match=r"num_cpus=12.*4 ranks.*num_cpus=15"):
        check_config(config(**changes))


def test_importing_the_entry_point_without_the_platform_touches_neither_torch_nor_verl():
    """It is loaded in every verl process, also where the CPU backend is not wanted."""
    code = (
        "import sys, hpo_plugin.cpu.plugin; "
        "heavy = sorted({'torch', 'verl', 'ray', 'transformers'} & set(sys.modules)); "
        "sys.exit(', '.join(heavy) or None)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "VERL_PLATFORM"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.usefixtures("cpu_platform")
def test_a_separate_rollout_needs_logical_gpus_and_cpus_of_its_own():
    separate = {"actor_rollout_ref__rollout": {"nnodes": 1, "n_gpus_per_node": 2}}
    with pytest.raises(ValueError, match=r"num_gpus=1 .*1 ranks and the separate rollout 2.*num_gpus=3"):
        check_config(config(**separate))
    check_config(config(**separate, ray_kwargs__ray_init__num_gpus=3))
    with pytest.raises(ValueError, match=r"num_cpus=9 .*3 ranks.*2 per rank of a separate rollout.*num_cpus=10"):
        check_config(config(**separate, ray_kwargs__ray_init={"num_gpus": 3, "num_cpus": 9}))


@pytest.mark.parametrize(
    ("sections", "gpus", "cpus"),
    [
        ({}, 1, 12),
        ({"trainer": {"n_gpus_per_node": 4, "nnodes": 2}}, 4, 27),
        ({"actor_rollout_ref.rollout": {"nnodes": 2, "n_gpus_per_node": 2}}, 5, 14),
        ({"rollout": {"nnodes": 1, "n_gpus_per_node": 1}}, 2, 18),
        ({"rollout": {"nnodes": 1, "n_gpus_per_node": 1}, "async_training": {}}, 2, 31),
    ],
    ids=["V1", "eight ranks", "separate_async", "one-step-off", "fully-async"],
)
def test_logical_resources_are_what_verl_reserves(sections, gpus, cpus):
    """3 CPUs a training rank, 2 a separate one, 3 for others; 10 or 23 for the experimental trainers' own actors."""
    changed = config()
    for section, values in sections.items():
        OmegaConf.update(changed, section, values)
    assert (checks.num_gpus(changed), checks.num_cpus(changed)) == (gpus, cpus)


@pytest.mark.usefixtures("cpu_platform")
def test_two_nodes_without_a_cluster_are_refused():
    changed = config(trainer__nnodes=2)
    changed.ray_kwargs.ray_init.num_gpus = checks.num_gpus(changed)
    with pytest.raises(ValueError, match=r"num_gpus=1 logical GPUs are not sufficient: .*2 ranks"):
        check_config(changed)


@pytest.mark.usefixtures("cpu_platform")
def test_what_the_separate_trainers_or_the_rollout_cannot_follow_is_refused():
    separate = {"actor_rollout_ref__rollout": {"nnodes": 1, "n_gpus_per_node": 1}, "ray_kwargs__ray_init__num_gpus": 2}
    unsharded = {"actor_rollout_ref__actor__fsdp_config": {"reshard_after_forward": False}}
    check_config(config(**unsharded))
    with pytest.raises(ValueError, match=r"fsdp_config\.reshard_after_forward=False.*Set .*reshard_after_forward=True"):
        check_config(config(**separate, **unsharded))
    lora = {"actor_rollout_ref__model": {"lora_rank": 4, "lora": {"merge": False}}}
    check_config(config(**lora))
    with pytest.raises(ValueError, match=r"lora_rank=4.*Set actor_rollout_ref\.model\.lora\.merge=True"):
        check_config(config(**lora, actor_rollout_ref__rollout={"name": "hf_cpu", "nnodes": 0}))
