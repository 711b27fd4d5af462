"""The memory, disk space and network traffic of a recipe, computed from its config.

Sizes are in bytes unless a name states another unit. docs/hardware.md describes which numbers are exact and which are
assumptions; scripts/hardware_page.py generates its tables from this module. The module imports OmegaConf, and no part
of verl.
"""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from hpo_plugin.recipe.layout import KEY_RECIPE, Layout

__all__ = ["GIB", "GPU_MEMORY", "Architecture", "Sizes"]

GIB = 2**30

#: Memory of an 80 GB GPU that programs can use. Assumed.
GPU_MEMORY = 79 * GIB

#: CUDA contexts of trainer and vLLM, buffers of NCCL, and CUDA graphs, which vLLM keeps while it sleeps. Assumed.
OVERHEAD = 6 * GIB

#: The part of vLLM's memory that it uses for activations. Assumed.
VLLM_WORKING = 2 * GIB

BF16, FP32 = 2, 4
ADAM = 2 * FP32

#: Bytes of one logit at the peak of an update. FSDP: bf16; flash-attention's cross entropy computes the gradient in
#: place. Megatron's Float16Module makes an fp32 copy, which becomes the softmax in place; the conversion needs both.
_UPDATE_LOGIT = {"fsdp2": BF16, "megatron": BF16 + FP32}
#: Bytes of one logit while verl computes old log-probs and entropy: its Megatron engine clones the logits first.
_LOG_PROB_LOGIT = {"fsdp2": BF16, "megatron": FP32 + FP32}
#: ``recipe.engine`` of the configs whose memory this module estimates.
MEMORY_ENGINES = frozenset(_UPDATE_LOGIT)
#: Bytes of one logit of an entropy chunk: fp32 copy, softmax, and their product (verl/utils/torch_functional.py).
_ENTROPY_LOGIT = 3 * FP32


@dataclass(frozen=True)
class Architecture:
    """A decoder with grouped-query attention, rotary positions, RMSNorm and a gated MLP: Qwen2 and Llama.

    Attributes:
        layers: Number of layers.
        hidden: Width.
        heads: Attention heads.
        kv_heads: Key-value heads.
        head_dim: Width of a head.
        intermediate: Width of the MLP.
        vocab: Size of the vocabulary.
        tied: Whether the output layer shares its weights with the embedding.
        attention_bias: Whether queries, keys and values have biases.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    attention_bias: bool

    @property
    def attention_width(self) -> int:
        """Width of the queries, keys and values of one token together."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Number of parameters of one layer: queries, keys, values, output; gate, up, down; two norms."""
        attention = self.hidden * (self.attention_width + self.heads * self.head_dim)
        biases = self.attention_width * self.attention_bias
        return attention + biases + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def embedding_parameters(self) -> int:
        """Number of parameters of the embedding; an untied output layer has the same number."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole model."""
        ends = (1 if self.tied else 2) * self.embedding_parameters + self.hidden
        return self.layers * self.layer_parameters + ends

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's keys and values in bf16."""
        return 2 * self.layers * self.kv_heads * self.head_dim * BF16

    def stage_parameters(self, pipeline: int) -> int:
        """Number of parameters of the largest pipeline stage: its layers, and the embedding or the output layer."""
        if pipeline == 1:
            return self.parameters
        return self.layers // pipeline * self.layer_parameters + self.embedding_parameters + self.hidden


@dataclass(frozen=True)
class Sizes:
    """The memory, disk space and network traffic of one composed recipe, per GPU unless stated otherwise.

    Attributes:
        architecture: The model.
        layout: GPUs, batch and parallel sizes.
        engine: ``fsdp2`` or ``megatron``.
        offload: Whether the trainer's state moves to CPU memory while vLLM generates.
        gpu_memory_utilization: vLLM's share of a GPU's memory, in (0, 1].
        entropy_chunk: Tokens per chunk of the entropy computation.
        expected_prompt_tokens: Mean number of prompt tokens. Estimated.
    """

    architecture: Architecture
    layout: Layout
    engine: str
    offload: bool
    gpu_memory_utilization: float
    entropy_chunk: int
    expected_prompt_tokens: int

    @classmethod
    def of(cls, config: DictConfig) -> Sizes:
        """Read a config composed from ``hpo_recipe``."""
        recipe = config[KEY_RECIPE]
        actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
        return cls(
            architecture=Architecture(**OmegaConf.to_container(recipe.architecture)),  # type: ignore[arg-type]
            layout=Layout.of(config),
            engine=recipe.engine,
            offload=recipe.offload,
            gpu_memory_utilization=rollout.gpu_memory_utilization,
            entropy_chunk=actor.entropy_from_logits_chunk_size,
            expected_prompt_tokens=recipe.expected_prompt_tokens,
        )

    # --- memory ------------------------------------------------------------------------------------------------------

    @property
    def weights(self) -> int:
        """Bytes of the parameters: FSDP2 fp32, sharded over all GPUs; Megatron bf16, per stage and tensor rank."""
        return self._sharded(FP32, BF16)

    @property
    def gradients(self) -> int:
        """Bytes of the gradients: fp32, sharded like the parameters."""
        return self._sharded(FP32, FP32)

    @property
    def optimizer(self) -> int:
        """Bytes of Adam's moments and Megatron's fp32 parameters, sharded over all GPUs that share a stage."""
        if self.engine == "fsdp2":
            return self._sharded(ADAM, 0)
        sharing = self.layout.gpus // self.layout.pipeline
        return (ADAM + FP32) * self.architecture.stage_parameters(self.layout.pipeline) // sharing

    def _sharded(self, fsdp2: int, megatron: int) -> int:
        if self.engine == "fsdp2":
            return fsdp2 * self.architecture.parameters // self.layout.gpus
        return megatron * self.architecture.stage_parameters(self.layout.pipeline) // self.layout.tensor

    @property
    def gathered(self) -> int:
        """Bytes that FSDP2 gathers: two layers and the embedding in bf16, and the larger gradient in bf16 and fp32."""
        if self.engine == "megatron":
            return 0
        layer, embedding = self.architecture.layer_parameters, self.architecture.embedding_parameters
        return BF16 * (2 * layer + embedding) + (BF16 + FP32) * max(layer, embedding)

    @property
    def activations(self) -> int:
        """Bytes of each layer's input, and of one recomputed layer with its gradients, sharded over tensor ranks."""
        model = self.architecture
        inputs = model.layers * model.hidden
        layer = 4 * model.hidden + model.attention_width + model.heads * model.head_dim + 4 * model.intermediate
        return BF16 * self.layout.tokens_per_gpu * (inputs + 2 * layer) // self.layout.tensor

    @property
    def update_logits(self) -> int:
        """Bytes of the logits of a micro-batch during an update."""
        return self._logits(_UPDATE_LOGIT[self.engine], 0)

    @property
    def log_prob_logits(self) -> int:
        """Bytes of the logits of a micro-batch, and of an entropy chunk, while verl computes old log-probs."""
        return self._logits(_LOG_PROB_LOGIT[self.engine], min(self.entropy_chunk, self.layout.tokens_per_gpu))

    def _logits(self, each: int, chunk: int) -> int:
        tokens = each * self.layout.tokens_per_gpu + _ENTROPY_LOGIT * chunk
        return tokens * self.architecture.vocab // self.layout.tensor

    @property
    def kept(self) -> int:
        """Bytes that the trainer holds outside an update. FSDP2 frees the gradients; Megatron keeps their buffer."""
        return self.weights + self.optimizer + (self.gradients if self.engine == "megatron" else 0)

    @property
    def update_peak(self) -> int:
        """Peak bytes of the training half of a step, while vLLM sleeps: of an update, or of the old log-probs."""
        update = self.weights + self.gradients + self.optimizer + self.activations + self.update_logits
        return max(update, self.kept + self.log_prob_logits) + self.gathered + OVERHEAD

    @property
    def rollout_peak(self) -> int:
        """Peak bytes while vLLM generates, including what the trainer keeps."""
        return self.vllm + (0 if self.offload else self.kept) + OVERHEAD

    @property
    def vllm(self) -> int:
        """Bytes of vLLM: weights and working memory; the rest of its share holds keys and values."""
        return int(self.gpu_memory_utilization * GPU_MEMORY)

    @property
    def fits(self) -> bool:
        """Whether both peaks fit in :data:`GPU_MEMORY`, and vLLM has room for a row."""
        return max(self.update_peak, self.rollout_peak) <= GPU_MEMORY and self.kv_rows >= 1

    @property
    def kv_rows(self) -> int:
        """Number of rows of maximum length that one vLLM replica holds at a time."""
        tensor = self.layout.rollout_tensor
        free = self.vllm - BF16 * self.architecture.parameters // tensor - VLLM_WORKING
        per_token = self.architecture.kv_bytes // min(tensor, self.architecture.kv_heads)
        return max(free, 0) // (per_token * self.layout.row_tokens)

    # --- work, disk, network -----------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """Number of responses of a step, on all GPUs."""
        return self.layout.prompts * self.layout.responses

    @property
    def most_tokens(self) -> int:
        """Number of tokens of a step, if every prompt and response has its maximum length."""
        return self.rows * self.layout.row_tokens

    @property
    def expected_tokens(self) -> int:
        """Number of tokens of a step, if responses have half of their maximum length. Assumed."""
        return self.rows * (self.expected_prompt_tokens + self.layout.response_tokens // 2)

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint on disk, of all ranks: parameters (FSDP2: fp32; Megatron: bf16) and optimizer state."""
        each = FP32 + ADAM if self.engine == "fsdp2" else BF16 + FP32 + ADAM
        return each * self.architecture.parameters

    @property
    def weight_sync(self) -> int:
        """Bytes that a GPU receives from others when vLLM gets new weights: all but its own part (FSDP2: fp32)."""
        shares = self.layout.gpus if self.engine == "fsdp2" else self.layout.tensor * self.layout.pipeline
        each = FP32 if self.engine == "fsdp2" else BF16
        return each * self.architecture.parameters * (shares - 1) // shares
