"""verl 0.8's FSDP2 engine on a CPU, for these tests: 0.8 has no platform plugin, which the CPU backend is made of."""

import os

import torch
import torch.distributed as dist
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

if os.environ.get("WG_BACKEND") == "ray" and not dist.is_initialized():
    dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))

EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")(FSDPEngineWithLMHead)
for name in ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved"):
    setattr(torch.cpu, name, getattr(torch.cpu, name, lambda *arguments, **options: 0))
for name in ("empty_cache", "reset_peak_memory_stats", "manual_seed", "set_device"):
    setattr(torch.cpu, name, getattr(torch.cpu, name, lambda *arguments, **options: None))
