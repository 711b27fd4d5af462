"""megatron-core and mbridge on CPU tensors and gloo, for these tests. Of verl nothing is replaced.

megatron-core asks torch.cuda for devices and streams, and takes attention and RMSNorm from TransformerEngine, whose
kernels need a GPU. Both are replaced by plain torch here; partitioning, pipeline schedules, collectives, gradient
buffers and optimizer are megatron-core's own.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def install() -> None:
    """Make verl's Megatron engine usable in this process; gloo's process group exists already."""
    _pretend_cuda()
    _use_the_local_layers()
    _use_the_local_experts()
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine.megatron import MegatronEngineWithLMHead

    register = EngineRegistry.register(model_type="language_model", backend="megatron", device="cpu")
    register(type("CPUMegatronEngine", (MegatronEngineWithLMHead,), {}))


class _Stream(MagicMock):
    """Work on a CPU is synchronous."""


class _CudaIsCPU(TorchFunctionMode):
    """``device="cuda"`` in a factory function means the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def _pretend_cuda() -> None:
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.synchronize = lambda *arguments, **options: None
    torch.cuda.Stream = torch.cuda.current_stream = _Stream
    Tensor.cuda = lambda self, *arguments, **options: self
    original = Tensor.type

    def cuda_type(self: Tensor, *arguments: Any, **options: Any) -> Any:
        if arguments or options:
            return original(self, *arguments, **options)
        return "torch.cuda." + original(self).rpartition(".")[2]

    Tensor.type = cuda_type
    _CudaIsCPU().__enter__()
    from megatron.core.tensor_parallel import random
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    # Recomputed layers restore it; the CPU's own state is handled beside it.
    random._get_cuda_rng_state = lambda *arguments, **options: torch.empty(0)
    random._set_cuda_rng_state = lambda *arguments, **options: None
    CudaRNGStatesTracker.add = lambda self, name, seed: None
    CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()


class RMSNorm(torch.nn.RMSNorm):
    """In the place of TransformerEngine's."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps)
        self.weight.sequence_parallel = config.sequence_parallel


class _Gather(torch.autograd.Function):
    """All parts of a group, stacked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        torch.distributed.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad[ctx.group.rank()], None


class CausalAttention(torch.nn.Module):
    """In the place of TransformerEngine's: causal within each packed sequence, which context parallelism has split.

    Rank i of n holds chunks i and 2n−1−i of 2n of each sequence, as megatron-core distributes them.
    """

    def __init__(
        self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, pg_collection: Any, **_: Any
    ) -> None:
        super().__init__()
        self.group = pg_collection.cp

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, packed_seq_params: Any = None, **_: Any
    ) -> Tensor:
        """Attention of (T, heads, dim) packed rows: (T, heads · dim)."""
        n, rank = self.group.size(), self.group.rank()
        keys, values = (_Gather.apply(x, self.group) if n > 1 else x.unsqueeze(0) for x in (key, value))
        out = []
        for begin, end in itertools.pairwise(packed_seq_params.cu_seqlens_q_padded.tolist()):
            length, part = end - begin, slice(begin // n, end // n)
            half = length // (2 * n)
            positions = [torch.arange(length)]
            if n > 1:
                positions = [
                    torch.cat(
                        [
                            torch.arange(i * half, (i + 1) * half),
                            torch.arange(length - (i + 1) * half, length - i * half),
                        ]
                    )
                    for i in range(n)
                ]
            mask = torch.cat(positions).unsqueeze(0) <= positions[rank].unsqueeze(1)
            q = query[part]
            k, v = (torch.cat(list(x[:, part])) for x in (keys, values))
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
            attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            out.append(attended.transpose(0, 1).flatten(1))
        return torch.cat(out)


def _use_the_local_layers() -> None:
    from mbridge.core.bridge import Bridge
    from mbridge.core.llm_bridge import LLMBridge
    from mbridge.models.qwen2 import Qwen2Bridge

    def layer_spec(self: Any, vp_stage: int | None = None) -> Any:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

        self.has_vp_stage = True
        spec = get_gpt_decoder_block_spec(self.config, use_transformer_engine=False, vp_stage=vp_stage)
        for layer in spec.layer_specs:
            parts = layer.submodules
            parts.self_attention.submodules.core_attention = CausalAttention
            parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
        spec.layer_norm = RMSNorm
        return spec

    LLMBridge._get_transformer_layer_spec = layer_spec
    # Without TransformerEngine the norms are modules of their own.
    mlp = Qwen2Bridge._MLP_MAPPING
    mlp["pre_mlp_layernorm.weight"] = mlp.pop("mlp.linear_fc1.layer_norm_weight")
    Bridge._OTHER_MAPPING = {"input_layernorm.weight": ["model.layers.{layer_number}.input_layernorm.weight"]}


def _use_the_local_experts() -> None:
    """Sequential experts under the names of the grouped ones, which need TransformerEngine."""
    from mbridge.core.bridge import Bridge
    from megatron.core.transformer.moe import moe_utils

    exchange = torch.distributed.all_to_all_single

    def of_lists(*arguments: Any, **options: Any) -> Any:
        return exchange(*arguments, **{name: x.tolist() if isinstance(x, Tensor) else x for name, x in options.items()})

    torch.distributed.all_to_all_single = of_lists
    moe_utils.te_general_gemm = None  # not defined without TransformerEngine
    original = Bridge._weight_name_mapping_mcore_local_to_global

    def mapping(self: Any, model: Any, consider_ep: bool = True) -> dict[str, str]:
        names = {}
        for local, name in original(self, model, consider_ep).items():
            found = re.match(r"(.*\.mlp\.experts)\.local_experts\.(\d+)\.(linear_fc[12])\.weight", name)
            if found:
                first = self.mpu.ep_rank * self.config.num_moe_experts // self.mpu.ep_size if consider_ep else 0
                name = f"{found[1]}.{found[3]}.weight{int(found[2]) + first}"
            names[local] = name
        return names

    Bridge._weight_name_mapping_mcore_local_to_global = mapping
