"""verl's platform interface for CPUs.

The platform has the name ``cpu``, which only ``VERL_PLATFORM=cpu`` selects. :meth:`PlatformCPU.is_platform_available`
returns False, so verl's auto-detection never selects it.
"""

import resource
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from typing_extensions import override
from verl.plugin.platform import PlatformBase, PlatformRegistry


class _CPUDeviceModule(types.ModuleType):
    """``torch.cpu`` with the functions that verl uses of an accelerator's module, such as ``torch.cuda``.

    The memory functions return values of this process: the current resident memory, and the peak since its start.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def is_available(self) -> bool:
        return True

    def get_device_name(self, device: object = None) -> str:
        return "CPU"

    def empty_cache(self) -> None:
        """Do nothing: there is no cache to empty."""

    def set_device(self, device: object) -> None:
        """Do nothing: there is one CPU device."""

    def memory_allocated(self, device: object = None) -> int:
        return psutil.Process().memory_info().rss

    memory_reserved = memory_allocated

    def max_memory_allocated(self, device: object = None) -> int:
        # On Linux, ru_maxrss is in KiB.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    max_memory_reserved = max_memory_allocated

    def reset_peak_memory_stats(self, device: object = None) -> None:
        """Do nothing: the operating system keeps the peak for the life of the process."""

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: object = None) -> None:
        torch.set_rng_state(state)


_DEVICE_MODULE = _CPUDeviceModule("hpo_plugin.cpu.device_module")


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """verl's platform for CPU cores. One training rank uses one logical Ray ``GPU``."""

    @property
    @override
    def device_name(self) -> str:
        return "cpu"

    @property
    @override
    def vendor_name(self) -> str:
        return "cpu"

    @property
    @override
    def device_module(self) -> types.ModuleType:
        return _DEVICE_MODULE

    @override
    def is_available(self) -> bool:
        return True

    @override
    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        # verl's auto-detection must not select this platform.
        return False

    @override
    def current_device(self) -> torch.device:
        # verl passes this value to Tensor.to(), which would take an index as an accelerator.
        return torch.device("cpu")

    @override
    def device_count(self) -> int:
        return 1

    @override
    def set_device(self, device_index: int) -> None:
        """Do nothing: there is one CPU device."""

    @override
    def synchronize(self, device_index: int | None = None) -> None:
        """Do nothing: work on the CPU is synchronous."""

    @override
    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    @override
    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    @override
    def set_allocator_settings(self, settings: str) -> None:
        """Do nothing: the settings are those of an accelerator's allocator."""

    @override
    def empty_cache(self) -> None:
        """Do nothing: there is no cache to empty."""

    @override
    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    @override
    def communication_backend_name(self) -> str:
        return "gloo"

    @override
    def visible_devices_envvar(self) -> str:
        # Ray manages this variable for its resource "GPU", of which each rank uses one logical unit.
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    @override
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    @override
    def profiler_start(self) -> None:
        """Do nothing: there is no device profiler."""

    @override
    def profiler_stop(self) -> None:
        """Do nothing: there is no device profiler."""

    @override
    def ray_resource_name(self) -> str:
        # verl counts free accelerators under "GPU" or "NPU" only (ResourcePoolManager._check_resource_available).
        return "GPU"

    @override
    def ray_noset_envvars(self) -> list[str]:
        return []

    @override
    def is_ipc_supported(self) -> bool:
        # Weights reach verl's vLLM server through shared memory instead.
        return False

    @override
    def rollout_env_vars(self) -> dict[str, str]:
        return {
            # Otherwise vLLM pins its threads to cores that the trainer also needs.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
        }

    @override
    def cudart(self) -> None:
        return None
