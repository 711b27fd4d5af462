"""Each place where the CPU backend meets verl; one of these fails when verl moves it (docs/cpu.md, "Seams")."""

import inspect
import os
import subprocess
import sys

import pytest

pytest.importorskip("verl")


def run_on_cpu_platform(code):
    """Run code in a fresh process with ``VERL_PLATFORM=cpu``; verl's registries are per process."""
    environment = os.environ | {"VERL_PLATFORM": "cpu"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_verl_is_the_version_the_backend_is_written_for():
    import verl

    assert verl.__version__ == "0.9.1"


def test_platform_is_registered_before_verl_asks_for_it_and_selected_by_the_variable_only():
    out = run_on_cpu_platform(
        "import verl\n"
        "from verl.plugin.platform import get_platform\n"
        "p = get_platform()\n"
        "print(type(p).__name__, p.device_name, p.ray_resource_name(), p.current_device(), p.is_platform_available())\n"
    )
    assert out.split() == ["PlatformCPU", "cpu", "GPU", "cpu", "False"]


def test_platform_answers_every_abstract_question_of_verl():
    from verl.plugin.platform import PlatformBase

    from hpo_plugin.cpu.platform import PlatformCPU

    assert PlatformBase.__abstractmethods__
    assert not PlatformCPU.__abstractmethods__


@pytest.mark.parametrize(
    "name",
    [
        "is_available",
        "empty_cache",
        "synchronize",
        "memory_allocated",
        "memory_reserved",
        "max_memory_allocated",
        "max_memory_reserved",
        "mem_get_info",
        "get_rng_state",
        "set_rng_state",
        "manual_seed",
        "get_device_name",
    ],
)
def test_device_module_answers_what_verl_asks_of_an_accelerator(name):
    from hpo_plugin.cpu.platform import PlatformCPU

    module = PlatformCPU().device_module
    function = getattr(module, name)
    if name == "set_rng_state":
        function(module.get_rng_state())
    elif name == "manual_seed":
        function(0)
    else:
        function()


def test_external_lib_registers_engine_replica_and_adapter():
    out = run_on_cpu_platform(
        "import verl.workers.engine_workers\n"
        "from verl.utils.import_utils import import_external_libs\n"
        "import_external_libs('hpo_plugin.cpu.backend')\n"
        "from verl.workers.engine import EngineRegistry\n"
        "from verl.workers.rollout.base import get_rollout_class\n"
        "from verl.workers.rollout.replica import get_rollout_replica_class\n"
        "print(EngineRegistry.get_engine_cls('language_model', 'fsdp2').__name__)\n"
        "print(get_rollout_class('hf_cpu').__name__, get_rollout_replica_class('hf_cpu').__name__)\n"
    )
    assert out.split() == ["CPUFSDPEngineWithLMHead", "HFServerAdapter", "HFReplica"]


def test_a_moved_adapter_registry_is_refused_by_name(monkeypatch):
    from verl.workers.rollout import base

    from hpo_plugin.cpu.registration import register_rollout

    monkeypatch.setattr(base, "_ROLLOUT_REGISTRY", {})
    with pytest.raises(RuntimeError, match=r"_ROLLOUT_REGISTRY.*install verl==0\.9\.1"):
        register_rollout()


def test_verl_leaves_an_existing_process_group_alone():
    """The gloo group is created first because verl would name the device ``cpu`` twice, which torch refuses."""
    from verl.utils.distributed import initialize_global_process_group_ray

    source = inspect.getsource(initialize_global_process_group_ray)
    assert "if not torch.distributed.is_initialized()" in source
    import torch.distributed as dist

    with pytest.raises(ValueError, match="Duplicate device type cpu"):
        dist.distributed_c10d.BackendConfig("cpu:gloo,cpu:gloo")


def test_worker_group_marks_its_workers_with_the_variable_that_starts_gloo():
    from verl.single_controller.ray import base

    assert '"WG_BACKEND": "ray"' in inspect.getsource(base)


def test_engine_overrides_the_method_that_pins_memory_for_forward_only_models():
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

    assert "CPUOffloadPolicy(pin_memory=True)" in inspect.getsource(FSDPEngine._build_fsdp_module)


def test_custom_samplers_get_exactly_the_arguments_the_replay_buffer_takes():
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    from hpo_plugin.cpu.replay_buffer import replay_buffer

    source = inspect.getsource(PPOTrainer._build_replay_buffer)
    always = source[source.index("replay_buffer_kwargs = dict(") : source.index("# Preserve the existing constructor")]
    taken = set(inspect.signature(replay_buffer).parameters)
    assert taken == {line.split("=")[0].strip() for line in always.splitlines() if line.startswith(" " * 12)}


def test_replay_buffer_overrides_a_method_verl_calls():
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    assert "self._select_prompt_uids(" in inspect.getsource(ReplayBuffer.sample)
    assert list(inspect.signature(ReplayBuffer._select_prompt_uids).parameters) == [
        "self",
        "partition_id",
        "sampleable_keys",
        "batch_size",
    ]


def test_rollout_server_takes_the_arguments_of_verls_client():
    from verl.workers.rollout.llm_server import LLMServerClient

    from hpo_plugin.cpu.rollout import HFServer

    source = inspect.getsource(LLMServerClient.generate)
    call = source[source.index("await server.generate.remote(") :]
    sent = {"request_id", "prompt_ids", "sampling_params", "image_data", "video_data"}
    assert all(f"{name}=" in call for name in sent)
    assert sent <= set(inspect.signature(HFServer.generate).parameters)


def test_config_is_found_and_composes_with_verls_defaults(monkeypatch):
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    from hydra import compose, initialize_config_module

    with initialize_config_module(config_module="verl.trainer.config", version_base=None):
        config = compose("countdown_cpu")
        assert config.actor_rollout_ref.rollout.name == "hf_cpu"
        assert config.trainer.device == "cpu"
        assert config.trainer.v1.sampler.sampler_kwargs.train_batch_size == config.data.train_batch_size
        assert compose("countdown_cpu", ["hpo/cpu_rollout=vllm"]).actor_rollout_ref.rollout.name == "vllm"


def test_the_sft_trainers_process_group_would_name_the_device_twice_and_is_made_over_gloo_instead():
    from verl.trainer import sft_trainer
    from verl.utils import distributed

    # What makes the seam necessary, and what makes it work: the name is looked up when the trainer starts.
    own = inspect.getsource(distributed.initialize_global_process_group)
    assert own.index("init_process_group(") < own.index("is_initialized()")
    source = inspect.getsource(sft_trainer.run_sft)
    assert "from verl.utils.distributed import initialize_global_process_group\n" in source
    out = run_on_cpu_platform(
        "import os\n"
        "os.environ |= dict(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT='0')\n"
        "import torch.distributed as dist\n"
        "from verl.utils.distributed import destroy_global_process_group, initialize_global_process_group\n"
        "print(*initialize_global_process_group(), dist.get_backend())\n"
        "destroy_global_process_group()\n"
        "print(dist.is_initialized())\n"
    )
    assert out.split() == ["0", "0", "1", "gloo", "False"]


def test_a_moved_function_of_the_sft_trainer_is_refused_by_name():
    import types

    from hpo_plugin.cpu.process_group import use_gloo_in_torchrun

    with pytest.raises(RuntimeError, match=r"elsewhere\.initialize_global_process_group.*install verl==0\.9\.1"):
        use_gloo_in_torchrun(types.ModuleType("elsewhere"))


def test_without_the_cpu_platform_the_sft_trainers_process_group_is_verls_own():
    environment = {key: value for key, value in os.environ.items() if key != "VERL_PLATFORM"}
    code = "from verl.utils import distributed as d; print(d.initialize_global_process_group.__module__)"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split()[-1] == "verl.utils.distributed"


def test_the_sft_config_is_found_by_verls_sft_trainer_and_checks_platform_and_strategy(monkeypatch):
    from hydra import compose, initialize_config_module
    from omegaconf.errors import InterpolationResolutionError

    with initialize_config_module(config_module="verl.trainer.config", version_base=None):
        config = compose("telelogs_sft_cpu", ["model.path=x", "data.train_files=y"])
        wrong = compose("telelogs_sft_cpu", ["model.path=x", "data.train_files=y", "engine.strategy=fsdp"])
    monkeypatch.delenv("VERL_PLATFORM", raising=False)
    with pytest.raises(InterpolationResolutionError, match="VERL_PLATFORM is None"):
        _ = config.trainer.device
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    assert config.trainer.device == "cpu"
    assert config.model.external_lib == ["hpo_plugin.cpu.backend", "hpo_plugin.verl.sft_resume"]
    with pytest.raises(InterpolationResolutionError, match=r"Set engine\.strategy=fsdp2"):
        _ = wrong.trainer.device


def test_saved_weights_are_copies_in_the_place_where_verls_separate_trainers_look_for_the_function():
    """``DetachActorWorker`` imports it from ``verl.utils.fsdp_utils`` when it is first used."""
    out = run_on_cpu_platform(
        "import inspect, torch, verl.utils.fsdp_utils as utils\n"
        "from verl.experimental.separation.engine_workers import DetachActorWorker\n"
        "source = inspect.getsource(DetachActorWorker._get_strategy_handlers)\n"
        "assert 'from verl.utils.fsdp_utils import (\\n                fsdp2_sharded_load_from_cpu,' in source\n"
        "import torch.distributed as dist\n"
        "from torch.distributed.fsdp import fully_shard\n"
        "dist.init_process_group('gloo', rank=0, world_size=1, store=dist.HashStore())\n"
        "model = torch.nn.Linear(2, 2)\n"
        "fully_shard(model)\n"
        "state, spec = utils.fsdp2_sharded_save_to_cpu(model)\n"
        "before = model.weight.full_tensor().clone()\n"
        "with torch.no_grad(): model.weight.zero_()\n"
        "utils.fsdp2_sharded_load_from_cpu(model, state, spec)\n"
        "assert torch.equal(model.weight.full_tensor(), before) and before.any()\n"
        "print('restored')\n"
    )
    assert out.split() == ["restored"]


def test_a_moved_function_that_saves_weights_is_refused_by_name():
    from types import ModuleType

    from hpo_plugin.cpu.saved_weights import copy_saved_weights

    module = ModuleType("verl.utils.fsdp_utils")
    copy_saved_weights(module)
    with pytest.raises(
        RuntimeError, match=r"fsdp_utils\.fsdp2_sharded_save_to_cpu does not exist.*install verl==0\.9\.1"
    ):
        module.fsdp2_sharded_save_to_cpu(None)


def test_verl_passes_a_checkpoint_engine_the_arguments_that_the_one_for_gloo_takes():
    from verl.checkpoint_engine import CheckpointEngineManager, CheckpointEngineRegistry
    from verl.checkpoint_engine.base import CheckpointEngineWorker
    from verl.workers.engine_workers import ActorRolloutRefWorker

    from hpo_plugin.cpu.checkpoint_engine import GlooCheckpointEngine

    assert CheckpointEngineRegistry.get("gloo") is GlooCheckpointEngine
    assert not GlooCheckpointEngine.__abstractmethods__
    actor = inspect.getsource(ActorRolloutRefWorker.init_model)
    assert "backend, is_master=(torch.distributed.get_rank() == 0), bucket_size=bucket_size, **engine_kwargs" in actor
    assert "backend, bucket_size=bucket_size, **engine_kwargs" in inspect.getsource(CheckpointEngineWorker.__init__)
    build = inspect.getsource(CheckpointEngineManager.build_process_group)
    assert "actor_wg.world_size, rollout.world_size, metadata" in build
